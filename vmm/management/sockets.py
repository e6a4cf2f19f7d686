"""UNIX stream sockets of a machine: listening at a path that only its user can open. Loop thread."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from vmm.errors import ConfigError, HostError, os_reason

BACKLOG = 128
"""Clients that may wait to be accepted; further ones wait in connect(2) (unix(7))."""
MAX_PATH = 107
"""sun_path of unix(7) holds 108 bytes with the terminating zero."""


def check_path(path: Path, what: str) -> None:
    """Raise ConfigError if the path does not fit a socket address."""
    length = len(os.fsencode(path))
    if length > MAX_PATH:
        raise ConfigError(
            f"{what}: {path}: {length} bytes are too long for a socket, which takes {MAX_PATH}; "
            "use a shorter name or directory"
        )


def listen(path: Path, what: str) -> socket.socket:
    """A listening socket, mode 0600. A stale socket (nobody answers) is replaced; a live one raises ConfigError."""
    check_path(path, what)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    try:
        for _attempt in range(2):
            before = os.umask(0o177)
            try:
                listener.bind(str(path))
                break
            except OSError as error:
                if not path.is_socket():
                    name = "exists and is no socket" if path.exists() else os_reason(error)
                    raise ConfigError(f"{what}: {path}: {name}; choose another path") from error
            finally:
                os.umask(before)
            if is_live(path):
                raise ConfigError(f"{what}: {path}: another program listens there; choose another path")
            path.unlink(missing_ok=True)
        else:
            raise ConfigError(f"{what}: {path}: taken by another program just now; try again")
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(f"{what}: {path}: {os_reason(error)}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def is_live(path: Path) -> bool:
    """Somebody listens at this socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return False
        return True
