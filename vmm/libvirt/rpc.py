"""Messages of libvirt's RPC: a length, a header, a body. Sans-I/O, but for `read_message`.

A message is `length (4 bytes, itself included), program, version, procedure, type, serial, status`, each 4 bytes in
XDR, and a body whose form the procedure says. The largest is 32 MiB, as libvirt has it.
"""

from __future__ import annotations

import asyncio
import enum
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from vmm.libvirt.xdr import XdrError

REMOTE, QEMU, ADMIN, KEEPALIVE = 0x20008086, 0x20008087, 0x06900690, 0x6B656570
"""Program numbers."""
VERSION = 1
MAX_MESSAGE = 32 << 20
MAX_GREETING = 64 << 10
"""The largest message that a client may send before it has opened its connection."""
STREAM_CHUNK = 256 << 10
"""Bytes of data in one message of a stream that we send; libvirt's clients have taken that much since 2013."""
CHUNK = 64 << 10
PING, PONG = 1, 2
"""The two procedures of the keepalive program."""


class RpcKind(enum.IntEnum):
    """What a message is."""

    CALL = 0
    REPLY = 1
    EVENT = 2
    STREAM = 3
    CALL_WITH_FDS = 4
    REPLY_WITH_FDS = 5
    HOLE = 6


class RpcStatus(enum.IntEnum):
    """How a message is meant: CONTINUE is used in streams only, where OK ends and ERROR aborts."""

    OK = 0
    ERROR = 1
    CONTINUE = 2


class RpcHeader(NamedTuple):
    """Of a message; `status` and `kind` are numbers that may be none of the above."""

    program: int
    version: int
    procedure: int
    kind: int
    serial: int
    status: int


class RpcMessage(NamedTuple):
    header: RpcHeader
    body: bytes


_HEADER = struct.Struct(">IIiIII")
SMALLEST = 4 + _HEADER.size


def pack(header: RpcHeader, body: bytes = b"") -> bytes:
    """A message as bytes. Raises XdrError if it is larger than a client takes."""
    length = SMALLEST + len(body)
    if length > MAX_MESSAGE:
        raise XdrError(f"an answer of {length} bytes; at most {MAX_MESSAGE} fit a message")
    return struct.pack(">I", length) + _HEADER.pack(*header) + body


def message_length(prefix: bytes, limit: int) -> int:
    """Bytes that follow the four of the length. Raises XdrError."""
    (length,) = struct.unpack(">I", prefix)
    if not SMALLEST <= length <= limit:
        raise XdrError(f"a message of {length} bytes; {SMALLEST} to {limit} are allowed here")
    return int(length) - 4


def unpack(data: bytes) -> RpcMessage:
    """What follows the length: at least a header's bytes."""
    return RpcMessage(RpcHeader(*_HEADER.unpack_from(data)), data[_HEADER.size :])


class Budget:
    """Memory for large messages of all clients together: who asks for more than is left waits."""

    def __init__(self, total: int) -> None:
        self._left = self._total = total
        self._waiting: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def reserved(self, count: int) -> AsyncIterator[None]:
        """Hold `count` bytes, no more than there are in all, for the block."""
        count = min(count, self._total)
        while self._left < count:
            freed = asyncio.get_running_loop().create_future()
            self._waiting.append(freed)
            await freed
        self._left -= count
        try:
            yield
        finally:
            self._left += count
            waiting, self._waiting = self._waiting, []
            for freed in waiting:
                if not freed.done():
                    freed.set_result(None)


async def read_message(reader: asyncio.StreamReader, limit: int, budget: Budget, seconds: float) -> RpcMessage:
    """The next message. A large one takes memory as it arrives, of the common budget, and must be whole within
    `seconds`. Raises XdrError, TimeoutError, asyncio.IncompleteReadError."""
    length = message_length(await reader.readexactly(4), limit)
    async with asyncio.timeout(seconds):
        if length <= CHUNK:
            return unpack(await reader.readexactly(length))
        async with budget.reserved(length):
            data = bytearray()
            while len(data) < length:
                data += await reader.readexactly(min(CHUNK, length - len(data)))
            return unpack(bytes(data))
