"""Input and output on descriptors that are not ours: standard streams, which other processes share with us.

O_NONBLOCK belongs to the open file, and so to everybody who has it: whoever sets it breaks the shell's next program,
which reads "Resource temporarily unavailable". So no flag of such an open file is ever changed, and none is given to an
event loop (libuv sets O_NONBLOCK on what it watches): a loop watches an epoll instance of ours that has the descriptor
in it. Reads and writes do not block: a terminal or pipe is opened a second time, a socket is asked with MSG_DONTWAIT,
and where neither can be had (the file of another user) the descriptor is polled before each call.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from typing import Self

PIPE_CHUNK = 512
"""Bytes that a descriptor which polled writable takes without blocking (POSIX: PIPE_BUF is at least this)."""


class _Shared:
    """A descriptor of somebody else's. `watched` is what a loop's add_reader takes to wait for it; -1: it is always
    ready (a regular file)."""

    _flags: int
    _events: int

    def __init__(self, descriptor: int) -> None:
        """Raises OSError if it is not open."""
        self.descriptor = descriptor
        self._own = -1
        self._socket: socket.socket | None = None
        self._patient = False
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(descriptor))
        elif stat.S_ISFIFO(mode) or os.isatty(descriptor):
            try:
                self._own = os.open(
                    f"/proc/self/fd/{descriptor}", self._flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                )
            except OSError:
                self._patient = True
        self._epoll: select.epoll | None = select.epoll()
        try:
            self._epoll.register(descriptor, self._events)
            self.watched = self._epoll.fileno()
        except OSError:  # EPERM: a regular file
            self._epoll.close()
            self._epoll = None
            self.watched = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _open(self) -> int:
        return self.descriptor if self._own < 0 else self._own

    def _ready(self) -> bool:
        poll = select.poll()
        poll.register(self.descriptor, self._events)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Idempotent. The descriptor itself stays as it was."""
        if self._own >= 0:
            own, self._own = self._own, -1
            os.close(own)
        if self._socket is not None:
            self._socket.close()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None


class Input(_Shared):
    """Reads from a descriptor what is there."""

    _flags, _events = os.O_RDONLY, select.EPOLLIN

    def read(self, limit: int) -> bytes | None:
        """Up to `limit` bytes; b"" at the end; None: wait until `watched` is readable. Raises OSError."""
        try:
            if self._socket is not None:
                return self._socket.recv(limit, socket.MSG_DONTWAIT)
            if self._patient and not self._ready():
                return None
            return os.read(self._open, limit)
        except BlockingIOError:
            return None


class Output(_Shared):
    """Writes to a descriptor what it takes."""

    _flags, _events = os.O_WRONLY, select.EPOLLOUT

    def write(self, data: bytes) -> int:
        """The number of bytes, -1: wait until `watched` is readable. Raises OSError."""
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            if self._patient:
                if not self._ready():
                    return -1
                data = data[:PIPE_CHUNK]
            return os.write(self._open, data)
        except BlockingIOError:
            return -1
