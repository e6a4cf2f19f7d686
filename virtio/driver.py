"""The driver's side of virtqueues, for tests, benchmarks and anyone who wants to talk to a device.

It owns a part of guest memory, lays a queue out in it, makes buffers available and collects used ones (virtio
1.2, 2.7.13, 2.7.14). Nothing here is needed to run a guest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from virtio.constants import Feature
from virtio.layouts import PackedDescriptor, SplitDescriptor, fast
from virtio.protocols import DmaMemory

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
F_AVAIL, F_USED = 1 << 7, 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2
_descriptor = fast(SplitDescriptor)
_packed = fast(PackedDescriptor)


class Allocator:
    """Guest memory handed out in order; `free_all` begins anew."""

    def __init__(self, memory: DmaMemory, start: int, end: int) -> None:
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

    @property
    def left(self) -> int:
        """Bytes that are not handed out."""
        return self.end - self._next

    def put(self, data: bytes) -> int:
        """Store bytes; their address."""
        gpa = self.take(max(len(data), 1))
        self.memory.view(gpa, len(data))[:] = data
        return gpa

    def moved(self, memory: DmaMemory) -> Allocator:
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
        self._notified = 0

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

    def needs_notification(self) -> bool:
        """Whether the device wants an available buffer notification for what was added since the last
        call."""
        new, old = self._avail[1], self._notified
        self._notified = new
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


class PackedDriverQueue:
    """One packed virtqueue laid out in `allocator`'s memory (2.8.21, 2.8.22); the same interface as DriverQueue."""

    def __init__(self, allocator: Allocator, size: int, features: int = 0) -> None:
        self.allocator = allocator
        self.memory = allocator.memory
        self.size = size
        self.features = features
        self.desc = allocator.take(16 * size, 16)
        self.driver = allocator.take(4, 4)
        self.device = allocator.take(4, 4)
        for gpa, length in ((self.desc, 16 * size), (self.driver, 4), (self.device, 4)):
            self.memory.view(gpa, length)[:] = bytes(length)
        self._map()
        self._next = 0
        self._wrap = True
        self._last_used = 0
        self._used_wrap = True
        self._free = size
        self._ids = list(range(size - 1, -1, -1))
        self._slots: dict[int, int] = {}
        self._added = 0

    def _map(self) -> None:
        self._table = self.memory.view(self.desc, 16 * self.size)
        self._words = self._table.cast("H")
        self._longs = self._table.cast("I")
        self._event = self.memory.view(self.driver, 4).cast("I")
        self._wish = self.memory.view(self.device, 4).cast("I")

    def moved(self, allocator: Allocator) -> PackedDriverQueue:
        """The same queue in a copy of the memory."""
        other = copy.copy(self)
        other.allocator, other.memory = allocator, allocator.memory
        other._map()
        return other

    def set_descriptor(self, index: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
        """Write one descriptor as it is, also a wrong one, with buffer id `following`; `offer` makes it available."""
        _packed.pack_into(self._table, 16 * index, gpa, length, following, flags)

    def offer(self, index: int) -> None:
        """Make what stands at `index` available."""
        self._words[8 * index + 7] = self._words[8 * index + 7] & ~(F_AVAIL | F_USED) | self._marks()

    def _marks(self) -> int:
        return F_AVAIL if self._wrap else F_USED

    def add(self, readable: Sequence[Buffer] = (), writable: Sequence[Buffer] = (), *, indirect: bool = False) -> int:
        """Make one buffer available; its id. MemoryError if descriptors are short."""
        parts = [(gpa, length, 0) for gpa, length in readable]
        parts += [(gpa, length, F_WRITE) for gpa, length in writable]
        if indirect:
            table = b"".join(_packed.pack(gpa, length, 0, flags) for gpa, length, flags in parts)
            parts = [(self.allocator.put(table), len(table), F_INDIRECT)]
        if len(parts) > self._free:
            raise MemoryError("no free descriptors")
        number = self._ids.pop()
        first = self._next, 0
        for i, (gpa, length, flags) in enumerate(parts):
            flags |= self._marks() | (F_NEXT if i + 1 < len(parts) else 0)
            if i == 0:
                first = self._next, flags
                flags ^= F_AVAIL | F_USED  # not available yet: the head is made so last
            _packed.pack_into(self._table, 16 * self._next, gpa, length, number, flags)
            self._next += 1
            if self._next == self.size:
                self._next, self._wrap = 0, not self._wrap
        self._words[8 * first[0] + 7] = first[1]
        self._free -= len(parts)
        self._slots[number] = len(parts)
        self._added += len(parts)
        return number

    def used(self) -> list[Used]:
        """What the device returned since the last call; descriptors become free again."""
        found = []
        while True:
            flags = self._words[8 * self._last_used + 7]
            if not bool(flags & F_AVAIL) == bool(flags & F_USED) == self._used_wrap:
                break
            number = self._words[8 * self._last_used + 6]
            # 2.8.5: the length means something only if VIRTQ_DESC_F_WRITE is set
            found.append(Used(number, self._longs[4 * self._last_used + 2] if flags & F_WRITE else 0))
            slots = self._slots.pop(number)
            self._ids.append(number)
            self._free += slots
            self._last_used += slots
            if self._last_used >= self.size:
                self._last_used -= self.size
                self._used_wrap = not self._used_wrap
        if self.features & Feature.EVENT_IDX:
            self._event[0] = self._last_used | self._used_wrap << 15 | EVENT_DESC << 16
        return found

    def needs_notification(self) -> bool:
        """Whether the device wants an available buffer notification for what was added since the last call."""
        added, self._added = self._added, 0
        wish = self._wish[0]
        flags = wish >> 16 & 3
        if not added or flags == EVENT_DISABLE:
            return False
        if flags != EVENT_DESC:
            return True
        offset = wish & 0x7FFF
        if bool(wish & 0x8000) != self._wrap:
            offset -= self.size
        return (self._next - offset - 1) & 0xFFFF < added

    def no_interrupts(self, silent: bool) -> None:
        """Ask for no used buffer notifications (2.8.14)."""
        self._event[0] = (EVENT_DISABLE if silent else EVENT_ENABLE) << 16


AnyDriverQueue = DriverQueue | PackedDriverQueue


def driver_queue(allocator: Allocator, size: int, features: int) -> AnyDriverQueue:
    """A queue of the kind that was negotiated."""
    return (PackedDriverQueue if features & Feature.RING_PACKED else DriverQueue)(allocator, size, features)
