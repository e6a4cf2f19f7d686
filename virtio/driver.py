"""The driver's side of a split virtqueue, for tests, benchmarks and anyone who wants to talk to a device.

It owns a part of guest memory, lays a queue out in it, makes buffers available and collects used ones (virtio
1.2, 2.7.13, 2.7.14). Nothing here is needed to run a guest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from virtio.constants import Feature
from virtio.layouts import SplitDescriptor, fast
from virtio.protocols import GuestMemory

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
_descriptor = fast(SplitDescriptor)


class Allocator:
    """Guest memory handed out in order; `free_all` begins anew."""

    def __init__(self, memory: GuestMemory, start: int, end: int) -> None:
        self.memory = memory
        self.start = start
        self.end = end
        self._next = start

    def take(self, size: int, alignment: int = 16) -> int:
        """A guest-physical address; MemoryError if the part is used up."""
        gpa = -(-self._next // alignment) * alignment
        if gpa + size > self.end:
            raise MemoryError("the driver's memory is used up")
        self._next = gpa + size
        return gpa

    def put(self, data: bytes) -> int:
        """Store bytes; their address."""
        gpa = self.take(max(len(data), 1))
        self.memory.view(gpa, len(data))[:] = data
        return gpa

    def moved(self, memory: GuestMemory) -> Allocator:
        """The same allocations in a copy of the memory."""
        other = Allocator(memory, self.start, self.end)
        other._next = self._next
        return other

    def free_all(self) -> None:
        self._next = self.start


@dataclass(frozen=True, slots=True)
class Used:
    """A buffer the device returned: the head (or buffer id), and how many bytes were written."""

    id: int
    length: int


Buffer = tuple[int, int]
"""(guest-physical address, length)."""


class DriverQueue:
    """One split virtqueue laid out in `allocator`'s memory."""

    def __init__(self, allocator: Allocator, size: int, features: int = 0) -> None:
        self.allocator = allocator
        self.memory = allocator.memory
        self.size = size
        self.features = features
        self.desc = allocator.take(16 * size, 16)
        self.driver = allocator.take(6 + 2 * size, 4)
        self.device = allocator.take(6 + 8 * size, 4)
        for gpa, length in ((self.desc, 16 * size), (self.driver, 6 + 2 * size), (self.device, 6 + 8 * size)):
            self.memory.view(gpa, length)[:] = bytes(length)
        self._map()
        self._free = list(range(size - 1, -1, -1))
        self._links: dict[int, list[int]] = {}
        self._last_used = 0
        self._kicked = 0

    def _map(self) -> None:
        self._table = self.memory.view(self.desc, 16 * self.size)
        self._avail = self.memory.view(self.driver, 6 + 2 * self.size).cast("H")
        self._used = self.memory.view(self.device, 6 + 8 * self.size).cast("H")

    def moved(self, allocator: Allocator) -> DriverQueue:
        """The same queue in a copy of the memory."""
        other = copy.copy(self)
        other.allocator, other.memory = allocator, allocator.memory
        other._map()
        return other

    def set_descriptor(self, index: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
        """Write one table entry as it is, also a wrong one."""
        _descriptor.pack_into(self._table, 16 * index, gpa, length, flags, following)

    def offer(self, head: int) -> None:
        """Put a head into the available ring, also a wrong one."""
        index = self._avail[1]
        self._avail[2 + index % self.size] = head
        self._avail[1] = (index + 1) & 0xFFFF

    def add(self, readable: Sequence[Buffer] = (), writable: Sequence[Buffer] = (), *, indirect: bool = False) -> int:
        """Make one buffer available; its head. MemoryError if descriptors are short."""
        parts = [(gpa, length, 0) for gpa, length in readable]
        parts += [(gpa, length, F_WRITE) for gpa, length in writable]
        if indirect:
            table = b"".join(
                _descriptor.pack(gpa, length, flags | (F_NEXT if i + 1 < len(parts) else 0), i + 1)
                for i, (gpa, length, flags) in enumerate(parts)
            )
            parts = [(self.allocator.put(table), len(table), F_INDIRECT)]
        if len(parts) > len(self._free):
            raise MemoryError("no free descriptors")
        chain = [self._free.pop() for _ in parts]
        for i, (gpa, length, flags) in enumerate(parts):
            last = i + 1 == len(parts)
            self.set_descriptor(chain[i], gpa, length, flags | (0 if last else F_NEXT), 0 if last else chain[i + 1])
        self._links[chain[0]] = chain
        self.offer(chain[0])
        return chain[0]

    def used(self) -> list[Used]:
        """What the device returned since the last call; descriptors become free again."""
        found = []
        while self._last_used != self._used[1]:
            at = 2 + 4 * (self._last_used % self.size)
            head = self._used[at] | self._used[at + 1] << 16
            found.append(Used(head, self._used[at + 2] | self._used[at + 3] << 16))
            self._free += reversed(self._links.pop(head, []))
            self._last_used = (self._last_used + 1) & 0xFFFF
        if self.features & Feature.EVENT_IDX:
            self._avail[2 + self.size] = self._last_used
        return found

    def needs_kick(self) -> bool:
        """Whether the device wants an available buffer notification for what was added since the last
        call."""
        new, old = self._avail[1], self._kicked
        self._kicked = new
        if self.features & Feature.EVENT_IDX:
            event = self._used[2 + 4 * self.size]
            return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return new != old and not self._used[0] & 1

    def no_interrupts(self, silent: bool) -> None:
        """Ask for no used buffer notifications (2.7.7)."""
        if self.features & Feature.EVENT_IDX:
            if silent:
                self._avail[2 + self.size] = (self._last_used + 0x8000) & 0xFFFF
            else:
                self._avail[2 + self.size] = self._last_used
        else:
            self._avail[0] = int(silent)
