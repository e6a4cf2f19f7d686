"""What a block device is made of, and the one that lives in memory.

A user's backend is a subclass of BlockBackend with `capacity`, `read` and `write`. Offsets and lengths are
bytes and multiples of 512 within the capacity. Any exception becomes an I/O error in the guest, and so does a read of
another type or length; a warning names the class. Loop thread only.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

CHUNK = 256 << 10
"""The most bytes one call is asked for."""


class BlockBackend(Protocol):
    """What a block device reads and writes."""

    capacity: int
    """Bytes, a multiple of 512; what is beyond the last whole sector is not visible."""
    read_only: bool = False
    block_size: int = 512
    """Logical block size in bytes."""

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""

    async def write(self, offset: int, data: bytes) -> None:
        """Store all of `data` at `offset`."""

    async def flush(self) -> None:
        """Make everything written durable."""
        return None

    async def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed any more; what they read as is the backend's choice."""
        return None

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make the bytes read as zero; with `unmap` their space may be given up."""
        for at in range(offset, offset + length, CHUNK):
            await self.write(at, bytes(min(CHUNK, offset + length - at)))
            await asyncio.sleep(0)  # a `write` that never waits must not keep the loop

    async def aclose(self) -> None:
        """Give up descriptors."""
        return None


class MemoryBlock(BlockBackend):
    """A disk in memory: the fake, and a RAM disk."""

    def __init__(self, capacity: int, *, read_only: bool = False) -> None:
        self.data = bytearray(capacity)
        self.capacity = capacity // 512 * 512
        self.read_only = read_only
        self.flushes = 0

    async def read(self, offset: int, length: int) -> bytes:
        """BlockBackend.read"""
        return bytes(memoryview(self.data)[offset : offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        """BlockBackend.write"""
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        self.flushes += 1

    async def discard(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, CHUNK):
            part = min(CHUNK, offset + length - at)
            self.data[at : at + part] = bytes(part)
