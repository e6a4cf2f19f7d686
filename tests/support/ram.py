"""Guest RAM for tests of loaders and tables: one anonymous mapping per range of the layout."""

from __future__ import annotations

import mmap

from vmm.errors import GuestError
from vmm.machine.layout import AddressRange, Layout


class Ram:
    """The part of guest memory that loaders use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[tuple[AddressRange, mmap.mmap]] = [
            (part, mmap.mmap(-1, part.size)) for part in Layout(size).ram
        ]

    def _find(self, gpa: int, length: int) -> tuple[mmap.mmap, int]:
        for part, memory in self._parts:
            if part.start <= gpa and gpa + length <= part.end:
                return memory, gpa - part.start
        raise GuestError(f"guest-physical range {gpa:#x}+{length:#x} is not within memory")

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        memory, offset = self._find(gpa, len(data))
        memory[offset : offset + len(data)] = bytes(data)

    def read(self, gpa: int, length: int) -> bytes:
        memory, offset = self._find(gpa, length)
        return memory[offset : offset + length]

    def text(self, gpa: int) -> str:
        """The zero-terminated string at `gpa`."""
        return self.read(gpa, 4096).split(b"\0")[0].decode()
