"""The split virtqueue in Python, device side (virtio 1.2, 2.7): the reference that virtio/native/ring.c is
held to.

Sans-I/O, it never signals. Indices are read and stored whole through cast views. Loop thread only. It does
not order its accesses as C does, so it serves tests and single-threaded drivers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from virtio.chain import INDIRECT_MAX, ReferenceChain
from virtio.constants import QUEUE_SIZE_MAX, Feature
from virtio.errors import GuestError, StateError
from virtio.layouts import SplitDescriptor, fast
from virtio.protocols import DmaMemory

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
AVAIL_F_NO_INTERRUPT = USED_F_NO_NOTIFY = 1
_descriptor = fast(SplitDescriptor)


def area(memory: DmaMemory, gpa: int, length: int, alignment: int) -> memoryview:
    """A queue area; GuestError if it is misaligned or not RAM."""
    if gpa % alignment:
        raise GuestError("queue area is not aligned")
    try:
        return memory.view(gpa, length)
    except GuestError:
        raise GuestError("queue area is outside guest memory") from None


class ReferenceRing:
    """What split and packed rings share: latching, order, the set of chains in flight."""

    def __init__(self, memory: DmaMemory, size: int, features: int) -> None:
        self.memory = memory
        self.size = size
        self.features = features
        self.event_idx = bool(features & Feature.EVENT_IDX)
        self.indirect = bool(features & Feature.INDIRECT_DESC)
        self.in_order = bool(features & Feature.IN_ORDER)
        self.longest = max(size, INDIRECT_MAX)
        self.in_flight = 0
        self.error: str | None = None
        self.closed = False
        self.popped = 0
        self.pushed = 0
        self.signal_delta = 0
        self.next_avail = 0
        self.next_used = 0
        self._done: dict[int, tuple[ReferenceChain, int]] = {}
        self._live: set[ReferenceChain] = set()

    def _walk(self) -> ReferenceChain | None:
        raise NotImplementedError

    def _use(self, chains: Sequence[tuple[ReferenceChain, int]]) -> None:
        raise NotImplementedError

    def _open(self) -> None:
        if self.closed:
            raise StateError("the queue was reset")

    def pop(self) -> ReferenceChain | None:
        self._open()
        if self.error:
            raise GuestError(self.error)
        try:
            chain = self._walk()
        except GuestError as error:
            self.error = str(error)
            raise
        if chain is not None:
            self.popped += 1
            self.in_flight += chain.slots
            self._live.add(chain)
        return chain

    def pop_batch(self, limit: int, /) -> list[ReferenceChain]:
        chains: list[ReferenceChain] = []
        while len(chains) < limit:
            chain = self.pop()
            if chain is None:
                break
            chains.append(chain)
        return chains

    def _retire(self, chain: ReferenceChain) -> None:
        self._open()
        if chain not in self._live:
            raise StateError("the chain was returned to the driver")
        self._live.discard(chain)
        chain.usable = False

    def push(self, chain: ReferenceChain, written: int | None = None, /) -> None:
        self.push_batch([(chain, chain.written if written is None else written)])

    def push_batch(self, chains: Sequence[tuple[ReferenceChain, int]], /) -> None:
        for chain, written in chains:
            if written > chain.writable_length:
                raise ValueError("written is too large")
            self._retire(chain)
        if self.error or not chains:
            return
        if not self.in_order:
            self._account(chains)
            return
        # 2.7.9, 2.8.8: with VIRTIO_F_IN_ORDER buffers are used in the order they were made available.
        self._done |= {chain.order: (chain, written) for chain, written in chains}
        ready: list[tuple[ReferenceChain, int]] = []
        while self.pushed + len(ready) in self._done:
            ready.append(self._done.pop(self.pushed + len(ready)))
        self._account(ready)

    def _account(self, chains: Sequence[tuple[ReferenceChain, int]]) -> None:
        self._use(chains)
        slots = sum(chain.slots for chain, _ in chains)
        self.in_flight -= slots
        self.signal_delta += slots
        self.pushed += len(chains)

    def undo_pop(self, chain: ReferenceChain, /) -> None:
        if chain.order + 1 != self.popped:
            raise ValueError("not the chain popped last")
        self._retire(chain)
        self._step_back(chain)
        self.in_flight -= chain.slots
        self.popped -= 1

    def _step_back(self, chain: ReferenceChain) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True
        for chain in self._live:
            chain.usable = False


class SplitRing(ReferenceRing):
    """Arguments as virtio._ring.Ring; GuestError if an area is misaligned or outside memory."""

    def __init__(self, memory: DmaMemory, size: int, desc: int, driver: int, device: int, features: int = 0) -> None:
        if not 0 < size <= QUEUE_SIZE_MAX or size & (size - 1):
            raise GuestError("queue size is not valid")
        super().__init__(memory, size, features)
        self._desc = area(memory, desc, 16 * size, 16)
        self._driver = area(memory, driver, 6 + 2 * size, 2).cast("H")
        device_area = area(memory, device, 6 + 8 * size, 4)
        self._device = device_area.cast("H")
        self._elements = device_area[4 : 4 + 8 * size].cast("I")
        # 2.7.10.2: "if the VIRTIO_F_EVENT_IDX feature bit is negotiated: The device MUST set flags to 0."
        self._device[0] = 0

    def _walk(self) -> ReferenceChain | None:
        waiting = (self._driver[1] - self.next_avail) & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise GuestError("available index jumped by more than the queue size")
        if self.in_flight >= self.size:
            raise GuestError("more buffers in flight than the queue holds")
        chain = ReferenceChain(self.memory, self.popped, self.longest)
        chain.id = self._driver[2 + self.next_avail % self.size]
        self._follow(chain, self._desc, self.size, chain.id, nested=False)
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        return chain

    def _follow(self, chain: ReferenceChain, table: memoryview, entries: int, at: int, nested: bool) -> None:
        seen = 0
        while True:
            if at >= entries:
                raise GuestError("descriptor index is outside the table")
            # 2.7.5.2: "this implies that loops in the descriptor chain are forbidden"
            if seen >= entries:
                raise GuestError("descriptor chain has a loop")
            seen += 1
            gpa, length, flags, following = _descriptor.unpack_from(table, 16 * at)
            if flags & F_INDIRECT:
                # 2.7.5.3.1: "The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag within an indirect
                # descriptor"
                if nested:
                    raise GuestError("indirect descriptor inside an indirect table")
                # 2.7.5.3.1: "A driver MUST NOT set both VIRTQ_DESC_F_INDIRECT and VIRTQ_DESC_F_NEXT in
                # flags."
                if flags & F_NEXT:
                    raise GuestError("indirect descriptor with VIRTQ_DESC_F_NEXT")
                inner = indirect_table(self, gpa, length)
                self._follow(chain, inner, length // 16, 0, nested=True)
                return
            chain.add(gpa, length, bool(flags & F_WRITE))
            if not flags & F_NEXT:
                return
            at = following

    def _step_back(self, chain: ReferenceChain) -> None:
        self.next_avail = (self.next_avail - 1) & 0xFFFF

    def _use(self, chains: Sequence[tuple[ReferenceChain, int]]) -> None:
        for chain, written in chains:
            at = self.next_used % self.size
            self._elements[2 * at] = chain.id
            self._elements[2 * at + 1] = written
            self.next_used = (self.next_used + 1) & 0xFFFF
        self._device[1] = self.next_used  # 2.7.8.2: "The device MUST set len prior to updating the used idx."

    def needs_notification(self) -> bool:
        self._open()
        delta, self.signal_delta = self.signal_delta, 0
        if not delta or self.error:
            return False
        if self.event_idx:
            return (self.next_used - self._driver[2 + self.size] - 1) & 0xFFFF < delta
        return not self._driver[0] & AVAIL_F_NO_INTERRUPT

    def look_again(self) -> bool:
        """Never: this ring is for memory that is all there."""
        return False

    def has_available(self) -> bool:
        self._open()
        return not self.error and self._driver[1] != self.next_avail

    def enable_notification(self) -> bool:
        self._open()
        if self.error:
            return False
        if self.event_idx:
            self._device[2 + 4 * self.size] = self.next_avail
        else:
            self._device[0] = 0
        return self.has_available()

    def want_more(self) -> None:
        self._open()
        if self.error:
            return
        if self.event_idx:
            self._device[2 + 4 * self.size] = self._driver[1]
        else:
            self._device[0] = 0

    def disable_notification(self) -> None:
        self._open()
        if not self.error and not self.event_idx:  # 2.7.10.2: with it, "the device MUST set flags to 0"
            self._device[0] = USED_F_NO_NOTIFY

    def save(self) -> dict[str, Any]:
        if self.in_flight:
            raise StateError("requests are in flight")
        return {
            "next_avail": self.next_avail,
            "next_used": self.next_used,
            "avail_wrap": True,
            "used_wrap": True,
        }

    def restore(self, next_avail: int, next_used: int, avail_wrap: bool = True, used_wrap: bool = True) -> None:
        if not (0 <= next_avail <= 0xFFFF and 0 <= next_used <= 0xFFFF):
            raise ValueError("ring index is out of range")
        self.next_avail, self.next_used = next_avail, next_used


def indirect_table(ring: ReferenceRing, gpa: int, length: int) -> memoryview:
    """The table an indirect descriptor refers to, copied once; GuestError."""
    # 2.7.5.3.1: "The driver MUST NOT set the VIRTQ_DESC_F_INDIRECT flag unless the VIRTIO_F_INDIRECT_DESC
    # feature was negotiated."
    if not ring.indirect:
        raise GuestError("indirect descriptor without VIRTIO_F_INDIRECT_DESC")
    if not length or length % 16:
        raise GuestError("indirect table's length is not a multiple of 16")
    if length // 16 > ring.longest:
        raise GuestError("indirect table is too long")
    try:
        return memoryview(bytes(ring.memory.view(gpa, length)))
    except GuestError:
        raise GuestError("indirect table is outside guest memory") from None
