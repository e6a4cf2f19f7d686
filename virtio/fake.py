"""Guest memory without a machine: for tests, benchmarks and trying a device out."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from virtio.errors import GuestError


class FakeMemory:
    """`size` bytes of RAM at `base`, and the ranges that devices wrote."""

    def __init__(self, size: int = 1 << 20, base: int = 0) -> None:
        self.base = base
        self.buffer = mmap.mmap(-1, size)
        self.bytes = memoryview(self.buffer)
        self.log: list[tuple[int, int]] = []

    def regions(self) -> Sequence[tuple[int, memoryview]]:
        return [(self.base, self.bytes)]

    def view(self, gpa: int, length: int) -> memoryview:
        start = gpa - self.base
        if start < 0 or length < 0 or start + length > len(self.bytes):
            raise GuestError(f"[{gpa:#x}, +{length:#x}) is outside guest memory")
        return self.bytes[start : start + length]

    def written(self, gpa: int, length: int) -> None:
        self.log.append((gpa, length))

    def discard_ranges(self, ranges: Sequence[tuple[int, int]]) -> int:
        """DmaMemory: whole pages hold zeros afterwards."""
        views = []
        for gpa, length in ranges:
            self.view(gpa, length)
            first = -(-gpa // 4096) * 4096
            views.append(self.view(first, max((gpa + length) // 4096 * 4096 - first, 0)))
        for view in views:
            view[:] = bytes(len(view))
        return sum(map(len, views))

