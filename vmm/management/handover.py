"""A connection that a machine's process hands over by its control socket (SCM_RIGHTS). The client side, blocking."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from vmm.errors import HostError, os_reason
from vmm.management.control import LINE_LIMIT, answered
from vmm.management.registry import RegistryEntry


def take_connection(entry: RegistryEntry, command: str, patience: float = 10.0, **values: Any) -> socket.socket:
    """Raises what the machine answers, HostError if it hands over none."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(patience)
            client.connect(str(entry.control))
            client.sendall(json.dumps({"command": command, **values}).encode() + b"\n")
            line, descriptors = bytearray(), list[int]()
            while not line.endswith(b"\n") and len(line) <= LINE_LIMIT:
                data, more, _, _ = socket.recv_fds(client, LINE_LIMIT, 4)
                descriptors += more
                if not data:
                    break
                line += data
    except OSError as error:
        raise HostError(f"{entry.name}: {os_reason(error)}") from error
    taken = descriptors[:1]
    try:
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        answered(entry, bytes(line))
        if not taken:
            raise HostError(f"{entry.name}: the machine's process handed over no connection")
        return socket.socket(fileno=taken.pop())
    finally:
        for descriptor in taken:
            os.close(descriptor)
