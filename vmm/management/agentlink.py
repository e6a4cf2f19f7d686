"""The guest's agent of a machine that another process runs: a connection to it, handed over by the control socket.

That process hands over the end of a socket and parses nothing of what goes through it; the client speaks the agent's
protocol (vmm/guest/frames.py) itself. A client that does not read, or goes away, concerns only its own program. Loop
thread.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from virtio.backends.vsock import Streams
from vmm.errors import HostError, os_reason
from vmm.guest.agent import Agent
from vmm.guest.frames import VERSION
from vmm.management.control import LINE_LIMIT, STARTING_SECONDS, answered
from vmm.management.registry import RegistryEntry, find

MAX_DESCRIPTORS = 4
QUIET_SECONDS = 2.0
"""How long the guest's agent may take before `on_wait` is called."""


def agent_of(entry: RegistryEntry, on_wait: Callable[[], None] | None = None) -> Agent:
    """The agent of a machine's guest. `on_wait` is called once if the agent does not listen yet."""

    async def connect() -> Streams:
        try:
            return await _connect(entry, on_wait)
        except OSError as error:
            # Not an OSError: an Agent takes those for an agent that is busy, and asks again.
            raise HostError(f"{entry.name}: {os_reason(error)}") from error

    return Agent(connect, patience=None)


async def _connect(entry: RegistryEntry, on_wait: Callable[[], None] | None) -> Streams:
    begin = time.monotonic()
    while True:
        answer, descriptor = await _ask(entry)
        if descriptor is not None:
            return await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
        if answer.get("ready", True):
            raise HostError(f"{entry.name}: the machine's process handed over no connection")
        if on_wait is not None and time.monotonic() - begin > QUIET_SECONDS:
            on_wait()
            on_wait = None


async def _ask(entry: RegistryEntry) -> tuple[dict[str, Any], int | None]:
    """The answer, and the descriptor that came with it. Raises what the machine answers."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        await _reach(client, entry)
        await loop.sock_sendall(client, json.dumps({"command": "agent", "version": VERSION}).encode() + b"\n")
        line, descriptors = bytearray(), array.array("i")
        try:
            while not line.endswith(b"\n"):
                await _readable(client)
                data, ancillary, _, _ = client.recvmsg(
                    LINE_LIMIT, socket.CMSG_SPACE(MAX_DESCRIPTORS * descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
                )
                for level, kind, content in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
                if not data or len(line) > LINE_LIMIT:
                    break
                line += data
            answer = answered(entry, bytes(line))
            return answer, (descriptors.pop(0) if descriptors else None)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


async def _reach(client: socket.socket, entry: RegistryEntry) -> None:
    """Connect; wait for a machine that only starts, and for one whose queue is full."""
    deadline = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            client.connect(str(entry.control))
            return
        except BlockingIOError:
            pass
        except (FileNotFoundError, ConnectionRefusedError):
            find(entry.name)
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.01)


async def _readable(client: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def came() -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            ready.set_result(None)

    loop.add_reader(client.fileno(), came)
    try:
        await ready
    finally:
        loop.remove_reader(client.fileno())
