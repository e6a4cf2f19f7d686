"""Device side of virtio-blk: what one request costs the loop, from pop to used ring, reads from the page cache.

The driver's part (making buffers available, collecting used ones) is not counted.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Iterator

from virtio import _ring
from virtio.constants import Feature
from virtio.driver import Allocator, DriverQueue
from virtio.fake import FakeMemory

IMAGE = 64 << 20
BASE = 0x100000
FEATURES = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX


class Rig:
    """One queue over one image, with `depth` reads of `length` bytes in `parts` segments prepared."""

    def __init__(self, fd: int, depth: int, length: int, parts: int = 1) -> None:
        self.memory = FakeMemory(depth * (length + 4096) + (1 << 20), BASE)
        allocator = Allocator(self.memory, BASE, BASE + len(self.memory.bytes))
        self.queue = DriverQueue(allocator, 256, FEATURES)
        native = _ring.Memory(self.memory.regions())
        queue = self.queue
        self.ring = _ring.Ring(native, 256, queue.desc, queue.driver, queue.device, FEATURES)
        self.engine = _ring.BlockEngine(fd, IMAGE // 512)
        self.requests = []
        self.sectors: list[memoryview] = []
        self.length = length
        self.batches = 0
        for index in range(depth):
            # far apart, so that nothing merges
            sector = (index * 7919 * (length // 512 + 8)) % ((IMAGE - length) // 512)
            head = allocator.put(struct.pack("<IIQ", 0, 0, sector))
            self.sectors.append(self.memory.view(head + 8, 8).cast("Q"))
            data = allocator.take(length, 4096)
            step = length // parts
            room = [(data + step * part, step) for part in range(parts)] + [(allocator.take(1), 1)]
            self.requests.append(([(head, 16)], room))

    def batch(self) -> int:
        """Nanoseconds that the device needs for one batch."""
        queue = self.queue
        self.batches += 1
        for sector in self.sectors:  # another part of the image each time: not only what the processor's cache holds
            sector[0] = (sector[0] + self.batches * 8191 * 8) % ((IMAGE - self.length) // 512) // 8 * 8
        for readable, writable in self.requests:
            queue.add(readable, writable)
        start = time.perf_counter_ns()
        self.engine.drain(self.ring)
        taken = time.perf_counter_ns() - start
        done = len(queue.used())
        while done < len(self.requests):  # what was not in the page cache
            self.engine.reap()
            done += len(queue.used())
        return taken

    def best(self, seconds: float) -> float:
        """Seconds for one batch: the median."""
        samples = []
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(samples) < 5:
            samples.append(self.batch())
        self.engine.close()
        return sorted(samples)[len(samples) // 2] / 1e9


def rows(seconds: float = 0.3) -> Iterator[dict[str, object]]:
    """One row per measurement: name, value, unit."""
    with tempfile.TemporaryFile() as image:
        block = os.urandom(1 << 20)
        for _ in range(IMAGE >> 20):
            image.write(block)
        image.flush()
        fd = image.fileno()
        for depth in (1, 8, 32):
            taken = Rig(fd, depth, 4096).best(seconds)
            yield {
                "name": f"virtio-blk, device side, 4 KiB read, depth {depth}",
                "value": round(taken / depth * 1e6, 2),
                "unit": "µs",
                "goal": 3.0 if depth == 32 else None,
            }
        for length, parts, label in (
            (128 << 10, 1, "128 KiB"),
            (128 << 10, 32, "128 KiB in 32 segments"),
            (1 << 20, 1, "1 MiB"),
        ):
            taken = Rig(fd, 4, length, parts).best(seconds)
            yield {
                "name": f"virtio-blk, device side, {label} read",
                "value": round(4 * length / taken / 1e9, 2),
                "unit": "GB/s",
                "better": "more",
            }


if __name__ == "__main__":
    for row in rows():
        print(row)
