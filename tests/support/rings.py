"""Rings of both kinds in both implementations, with the driver's side of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from virtio import _ring
from virtio.constants import Feature
from virtio.driver import Allocator, AnyDriverQueue, driver_queue
from virtio.fake import FakeMemory
from virtio.packed import reference_ring

BASE = 0x4000
MEMORY = 1 << 20
END = BASE + MEMORY


def native_ring(memory: FakeMemory, *args: int) -> Any:
    return _ring.Ring(_ring.Memory(memory.regions(), memory.written), *args)


MAKERS: dict[str, Callable[..., Any]] = {"c": native_ring, "python": reference_ring}


@dataclass(frozen=True, slots=True)
class Rig:
    """What a ring test works with. `make` may be called again for a second ring."""

    implementation: str
    packed: bool

    def make(self, features: int = 0, size: int = 8, memory: FakeMemory | None = None) -> tuple[Any, AnyDriverQueue]:
        """(the device's ring, the driver's queue) over fresh memory."""
        memory = memory or FakeMemory(MEMORY, BASE)
        features |= Feature.RING_PACKED if self.packed else 0
        # at most 1 MiB is the queue's own, so that larger memories are left to the test
        queue = driver_queue(Allocator(memory, memory.base, memory.base + MEMORY), size, features)
        return self.ring(queue), queue

    def ring(self, queue: AnyDriverQueue) -> Any:
        """Another device's ring for a queue that is laid out already."""
        areas = queue.size, queue.desc, queue.driver, queue.device
        return MAKERS[self.implementation](queue.memory, *areas, int(queue.features))


RIGS = {
    f"{'packed' if packed else 'split'}-{implementation}": Rig(implementation, packed)
    for packed in (False, True)
    for implementation in MAKERS
}
