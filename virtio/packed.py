"""The packed virtqueue in Python, device side (virtio 1.2, 2.8): the reference that virtio/native/ring.c is held to.

As virtio.split: sans-I/O, it never signals, loop thread only, for tests and single-threaded drivers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from virtio.chain import ReferenceChain
from virtio.constants import QUEUE_SIZE_MAX, Feature
from virtio.errors import GuestError, StateError
from virtio.layouts import PackedDescriptor, fast
from virtio.protocols import DmaMemory
from virtio.split import F_INDIRECT, F_NEXT, F_WRITE, ReferenceRing, SplitRing, area, indirect_table

F_AVAIL, F_USED = 1 << 7, 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2
_descriptor = fast(PackedDescriptor)


class PackedRing(ReferenceRing):
    """Arguments as virtio._ring.Ring; GuestError if an area is misaligned or outside memory."""

    def __init__(self, memory: DmaMemory, size: int, desc: int, driver: int, device: int, features: int = 0) -> None:
        if not 0 < size <= QUEUE_SIZE_MAX:
            raise GuestError("queue size is not valid")
        super().__init__(memory, size, features)
        self._desc = area(memory, desc, 16 * size, 16)
        self._words = self._desc.cast("H")
        self._longs = self._desc.cast("I")
        self._driver = area(memory, driver, 4, 4).cast("I")
        self._device = area(memory, device, 4, 4).cast("I")
        self.avail_wrap = True
        self.used_wrap = True

    @staticmethod
    def _available(flags: int, wrap: bool) -> bool:
        # 2.8.1: available when AVAIL equals and USED differs from the driver ring wrap counter
        return bool(flags & F_AVAIL) == wrap and bool(flags & F_USED) != wrap

    def _flags(self, index: int) -> int:
        return self._words[8 * index + 7]

    def _walk(self) -> ReferenceChain | None:
        if not self._available(self._flags(self.next_avail), self.avail_wrap):
            return None
        chain = ReferenceChain(self.memory, self.popped, self.longest)
        at, slots, wrap = self.next_avail, 0, self.avail_wrap
        while True:
            if self.in_flight + slots >= self.size:
                raise GuestError("more descriptors in flight than the queue holds")
            gpa, length, number, flags = _descriptor.unpack_from(self._desc, 16 * at)
            # 2.8.17: "A driver MUST NOT make the first descriptor in the list available before all subsequent
            # descriptors comprising the list are made available."
            if slots and not self._available(flags, wrap):
                raise GuestError("descriptor list runs into one that is not available")
            slots += 1
            at += 1
            if at == self.size:
                at, wrap = 0, not wrap
            if flags & F_INDIRECT:
                # 2.8.7: an indirect descriptor stands alone; its table is walked in order
                if flags & F_NEXT or slots > 1:
                    raise GuestError("indirect descriptor in a packed descriptor list")
                for inner in _descriptor.iter_unpack(indirect_table(self, gpa, length)):
                    if inner[3] & F_INDIRECT:
                        raise GuestError("indirect descriptor inside an indirect table")
                    chain.add(inner[0], inner[1], bool(inner[3] & F_WRITE))
            else:
                chain.add(gpa, length, bool(flags & F_WRITE))
            if not flags & F_NEXT:
                chain.id = number  # 2.8.6: "Buffer ID is included in the last descriptor in the list"
                break
        chain.slots = slots
        self.next_avail, self.avail_wrap = at, wrap
        return chain

    def _step_back(self, chain: ReferenceChain) -> None:
        self.next_avail -= chain.slots
        if self.next_avail < 0:
            self.next_avail += self.size
            self.avail_wrap = not self.avail_wrap

    def _use(self, chains: Sequence[tuple[ReferenceChain, int]]) -> None:
        first: tuple[int, int] | None = None
        for chain, written in chains:
            at = self.next_used
            flags = F_AVAIL | F_USED if self.used_wrap else 0
            if written:
                flags |= F_WRITE
            self._longs[4 * at + 2] = written
            self._words[8 * at + 6] = chain.id
            if first is None:
                first = at, flags
            else:
                self._words[8 * at + 7] = flags
            self.next_used += chain.slots
            if self.next_used >= self.size:
                self.next_used -= self.size
                self.used_wrap = not self.used_wrap
        if first is not None:  # last: the driver sees all of them at once
            self._words[8 * first[0] + 7] = first[1]

    def needs_notification(self) -> bool:
        self._open()
        delta, self.signal_delta = self.signal_delta, 0
        if not delta or self.error:
            return False
        event = self._driver[0]
        flags = event >> 16 & 3
        if flags == EVENT_DISABLE:
            return False
        if flags != EVENT_DESC or not self.event_idx:
            return True
        offset = event & 0x7FFF
        if bool(event & 0x8000) != self.used_wrap:
            offset -= self.size
        return (self.next_used - offset - 1) & 0xFFFF < delta

    def look_again(self) -> bool:
        """Never: this ring is for memory that is all there."""
        return False

    def has_available(self) -> bool:
        self._open()
        return not self.error and self._available(self._flags(self.next_avail), self.avail_wrap)

    def enable_notification(self) -> bool:
        self._open()
        if self.error:
            return False
        offset = self.next_avail | (0x8000 if self.avail_wrap else 0)
        self._device[0] = offset | EVENT_DESC << 16 if self.event_idx else EVENT_ENABLE << 16
        return self.has_available()

    def want_more(self) -> None:
        self._open()
        if not self.error:
            self._device[0] = EVENT_ENABLE << 16

    def disable_notification(self) -> None:
        self._open()
        if not self.error:
            self._device[0] = EVENT_DISABLE << 16

    def save(self) -> dict[str, Any]:
        if self.in_flight:
            raise StateError("requests are in flight")
        return {
            "next_avail": self.next_avail,
            "next_used": self.next_used,
            "avail_wrap": self.avail_wrap,
            "used_wrap": self.used_wrap,
        }

    def restore(self, next_avail: int, next_used: int, avail_wrap: bool = True, used_wrap: bool = True) -> None:
        if not (0 <= next_avail < self.size and 0 <= next_used < self.size):
            raise ValueError("ring index is out of range")
        self.next_avail, self.next_used = next_avail, next_used
        self.avail_wrap, self.used_wrap = bool(avail_wrap), bool(used_wrap)


def reference_ring(
    memory: DmaMemory, size: int, desc: int, driver: int, device: int, features: int = 0
) -> SplitRing | PackedRing:
    """The ring in Python that was negotiated."""
    kind = PackedRing if features & Feature.RING_PACKED else SplitRing
    return kind(memory, size, desc, driver, device, features)
