"""The descriptor chain of the reference rings (virtio 1.2, 2.7.4): the same interface as
virtio._ring.Chain."""

from __future__ import annotations

from virtio.errors import GuestError, StateError
from virtio.protocols import DmaMemory

INDIRECT_MAX = 1024
"""Entries of an indirect table at most, if the Queue Size is smaller."""


class ReferenceChain:
    """One chain while it is walked, then while the device has it."""

    def __init__(self, memory: DmaMemory, order: int, longest: int) -> None:
        self.memory = memory
        self.order = order
        self.id = 0
        self.slots = 1
        self.readable_length = 0
        self.writable_length = 0
        self.written = 0
        self.usable = True
        self._longest = longest
        self._segments: list[tuple[int, int, bool]] = []

    @property
    def segments(self) -> tuple[tuple[int, int, bool], ...]:
        """Chain.segments"""
        return tuple(self._segments)

    def add(self, gpa: int, length: int, write: bool) -> None:
        """One descriptor, checked; GuestError."""
        if len(self._segments) >= self._longest:
            raise GuestError("descriptor chain is too long")
        if not length:
            raise GuestError("descriptor has length zero")
        # 2.7.4.2: "The driver MUST place any device-writable descriptor elements after any device-readable"
        if not write and self.writable_length:
            raise GuestError("device-readable descriptor after a device-writable one")
        try:
            self.memory.view(gpa, length)
        except GuestError:
            raise GuestError("descriptor points outside guest memory") from None
        self._segments.append((gpa, length, write))
        if write:
            self.writable_length += length
        else:
            self.readable_length += length
        # 2.7.5.2: "Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total"
        if self.readable_length + self.writable_length > 0xFFFFFFFF:
            raise GuestError("descriptor chain is longer than 2^32 bytes")

    def _views(self, write: bool) -> list[memoryview]:
        if not self.usable:
            raise StateError("the chain was returned to the driver, or the queue was reset")
        return [self.memory.view(gpa, length) for gpa, length, writable in self._segments if writable == write]

    def readable(self) -> list[memoryview]:
        """Chain.readable"""
        return self._views(False)

    def writable(self) -> list[memoryview]:
        """Chain.writable"""
        return self._views(True)

    def read(self, length: int = -1, offset: int = 0, /) -> bytes:
        """Chain.read"""
        data = b"".join(self._views(False))[max(offset, 0) :]
        return data if length < 0 else data[:length]

    def write(self, data: bytes | bytearray | memoryview, offset: int | None = None, /) -> int:
        """Chain.write"""
        skip = start = self.written if offset is None else offset
        left = memoryview(data)
        done = 0
        for view in self._views(True):
            if skip >= len(view):
                skip -= len(view)
                continue
            part = min(len(left), len(view) - skip)
            view[skip : skip + part] = left[:part]
            left = left[part:]
            done += part
            skip = 0
        if done:
            self.written = max(self.written, start + done)
        return done
