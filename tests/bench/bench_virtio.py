"""Device side of virtio-blk: what a request costs the loop, and how long a batch takes, by what carries it out.

Reads from the page cache are answered within the loop's turn. What would block goes to an io_uring or to threads: both
are measured by turns, past the page cache (O_DIRECT) and for what a file system writes into it. The driver's part
(making buffers available, collecting used ones) is not counted.
"""

from __future__ import annotations

import os
import select
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virtio import _ring
from virtio.backends.file import Io
from virtio.constants import Feature
from virtio.driver import Allocator, DriverQueue
from virtio.fake import FakeMemory
from virtio.images.chain import open_chain
from virtio.images.copy import convert
from virtio.images.create import create_qcow2

IMAGE = 64 << 20
BASE = 0x100000
FEATURES = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX
READ, WRITE = 0, 1
LAPS = 2


@dataclass(frozen=True, kw_only=True)
class Load:
    """`depth` requests of `length` bytes in `parts` segments, at places far apart, so that nothing merges."""

    kind: int = READ
    depth: int
    length: int
    parts: int = 1
    align: int = 0
    inline: bool = True


class Rig:
    """One queue over one image."""

    def __init__(self, fd: int, load: Load, engine: Io = "auto", image: _ring.Image | None = None) -> None:
        self.load = load
        self.memory = FakeMemory(load.depth * (load.length + 8192) + (1 << 20), BASE)
        allocator = Allocator(self.memory, BASE, BASE + len(self.memory.bytes))
        self.queue = DriverQueue(allocator, 256, FEATURES)
        native = _ring.Memory(self.memory.regions())
        queue = self.queue
        self.ring = _ring.Ring(native, 256, queue.desc, queue.driver, queue.device, FEATURES)
        image = image or _ring.Image.raw(fd, IMAGE, load.align)
        self.engine = _ring.BlockEngine(image, IMAGE // 512, engine=engine, inline=load.inline)
        self.completed = select.epoll()
        for descriptor in self.engine.descriptors():
            self.completed.register(descriptor, select.EPOLLIN)
        self.requests = []
        self.sectors: list[memoryview] = []
        self.batches = 0
        for index in range(load.depth):
            sector = (index * 7919 * (load.length // 512 + 8)) % ((IMAGE - load.length) // 512) // 8 * 8
            head = allocator.put(struct.pack("<IIQ", load.kind, 0, sector))
            self.sectors.append(self.memory.view(head + 8, 8).cast("Q"))
            data = allocator.take(load.length, 4096)
            step = load.length // load.parts
            room = [(data + step * part, step) for part in range(load.parts)]
            status = [(allocator.take(1), 1)]
            self.requests.append(([(head, 16)], room + status) if load.kind == READ else ([(head, 16), *room], status))

    def batch(self) -> tuple[int, int]:
        """Nanoseconds: of the loop's, and until all are done."""
        queue = self.queue
        self.batches += 1
        for sector in self.sectors:  # another part of the image each time: not only what the processor's cache holds
            sector[0] = (sector[0] + self.batches * 8191 * 8) % ((IMAGE - self.load.length) // 512) // 8 * 8
        for readable, writable in self.requests:
            queue.add(readable, writable)
        begin = start = time.perf_counter_ns()
        self.engine.drain(self.ring)
        taken = time.perf_counter_ns() - start
        done = len(queue.used())
        while done < len(self.requests):
            self.completed.poll()
            start = time.perf_counter_ns()
            self.engine.reap()
            taken += time.perf_counter_ns() - start
            done += len(queue.used())
        return taken, time.perf_counter_ns() - begin

    def run(self, seconds: float) -> list[tuple[int, int]]:
        samples = []
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(samples) < 5:
            samples.append(self.batch())
        self.engine.close()
        self.completed.close()
        return samples


def median(samples: list[int]) -> float:
    """Of nanoseconds, in seconds."""
    return sorted(samples)[len(samples) // 2] / 1e9


def cached(fd: int, seconds: float) -> Iterator[dict[str, object]]:
    """Reads from the page cache: the loop does all of it."""
    for depth in (1, 8, 32):
        taken = median([loop for loop, _ in Rig(fd, Load(depth=depth, length=4096)).run(seconds)])
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
        taken = median([loop for loop, _ in Rig(fd, Load(depth=4, length=length, parts=parts)).run(seconds)])
        yield {
            "name": f"virtio-blk, device side, {label} read",
            "value": round(4 * length / taken / 1e9, 2),
            "unit": "GB/s",
            "better": "more",
        }


def formats(seconds: float) -> Iterator[dict[str, object]]:
    """Cached reads of 4 KiB: raw beside qcow2, whose clusters are its own or its backing file's, by turns."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        with open(folder / "raw", "wb") as file:
            for _ in range(IMAGE >> 20):
                file.write(os.urandom(1 << 20))
        convert(str(folder / "raw"), str(folder / "qcow2"))
        create_qcow2(str(folder / "over"), IMAGE, backing="raw", backing_format="raw")
        create_qcow2(str(folder / "extended"), IMAGE, backing="qcow2", backing_format="qcow2", extended_l2=True)
        for depth in (1, 32):
            load = Load(depth=depth, length=4096)
            found: dict[str, list[int]] = {"raw": [], "qcow2": [], "over": [], "extended": []}
            for _ in range(LAPS * 2):
                for kind, samples in found.items():
                    with open_chain(folder / kind) as chain:
                        rig = Rig(chain.top.fd, load, image=chain.image)
                        samples += [loop for loop, _ in rig.run(seconds / LAPS)]
            base = median(found["raw"])
            labels = {"qcow2": "qcow2", "over": "qcow2 over raw", "extended": "extended qcow2 over qcow2"}
            for kind, label in labels.items():
                taken = median(found[kind])
                yield {
                    "name": f"virtio-blk, device side, 4 KiB read, depth {depth}, {label}",
                    "value": round(taken / depth * 1e6, 2),
                    "unit": "µs",
                    "ratio": round(taken / base, 2),
                    "note": f"{round(taken / base, 2)} of raw's",
                }


def engines(fd: int, load: Load, label: str, seconds: float) -> Iterator[dict[str, object]]:
    """The same load on both engines by turns."""
    found: dict[Io, list[tuple[int, int]]] = {"io_uring": [], "threads": []}
    if _ring.BlockEngine.io_uring_error():
        del found["io_uring"]
    for _ in range(LAPS):
        for engine, samples in found.items():
            samples += Rig(fd, load, engine).run(seconds / LAPS)
    for engine, samples in found.items():
        loop, whole = (median([sample[part] for sample in samples]) for part in (0, 1))
        name = f"{label}, {engine}"
        if load.length > 4096:
            rate = round(load.depth * load.length / whole / 1e9, 2)
            yield {"name": name, "value": rate, "unit": "GB/s", "better": "more"}
            continue
        goal = 3.0 if load.depth == 32 and load.align and load.kind == READ and engine == "io_uring" else None
        yield {"name": f"{name}: loop", "value": round(loop / load.depth * 1e6, 2), "unit": "µs", "goal": goal}
        yield {"name": f"{name}: until done", "value": round(whole / load.depth * 1e6, 2), "unit": "µs"}


def rows(seconds: float = 0.4) -> Iterator[dict[str, object]]:
    """One row per measurement: name, value, unit."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as image:
        block = os.urandom(1 << 20)
        for _ in range(IMAGE >> 20):
            image.write(block)
        image.flush()
        os.fsync(image.fileno())
        yield from cached(image.fileno(), seconds)
        yield from formats(seconds)
        for depth in (1, 8, 32):
            load = Load(kind=WRITE, depth=depth, length=4096, inline=False)
            yield from engines(image.fileno(), load, f"4 KiB write into the page cache, depth {depth}", seconds)
        os.fsync(image.fileno())
        try:
            direct = os.open(image.name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            yield {"name": "O_DIRECT", "value": None, "unit": "", "note": error.strerror}
            return
        try:
            for depth in (1, 8, 32):
                load = Load(depth=depth, length=4096, align=512)
                yield from engines(direct, load, f"O_DIRECT, 4 KiB read, depth {depth}", seconds)
            for length, label in ((128 << 10, "128 KiB"), (1 << 20, "1 MiB")):
                load = Load(depth=8, length=length, align=512)
                yield from engines(direct, load, f"O_DIRECT, {label} read, depth 8", seconds)
        finally:
            os.close(direct)


if __name__ == "__main__":
    for row in rows():
        print(row)
