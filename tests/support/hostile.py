"""Hostile drivers against any device: requests that are right, then spoiled; malformed rings; registers accessed at
random; resets, pauses and moves at any moment.

The invariant: nothing comes out of a register access, the loop or the log but GuestErrors (DEVICE_NEEDS_RESET), the
loop serves others all the time, and after a reset the device works. tests/property/test_virtio_devices.py and
tests/fuzz/virtio_fuzz.py run campaigns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from pathlib import Path
from typing import Any

from tests.support import malformed
from tests.support.hostile_devices import WORLDS, Source, World
from tests.support.stalls import StallWatch
from tests.support.virtio import MEMORY, Driver, MmioDriver, PciDriver
from virtio.constants import Feature
from virtio.device import Device
from virtio.devices.rng import EntropyDevice
from virtio.driver import AnyDriverQueue, driver_queue
from virtio.fake import FakeMemory
from virtio.packed import reference_ring

SECONDS = 20
"""For what ends soon or never."""


class Watch(logging.Handler):
    """Collects what must not happen: unhandled errors of the loop, and errors in the log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(self.format(record))

    def unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.seen.append(f"{context.get('message')}: {context.get('exception')!r}")

    def check(self) -> None:
        assert not self.seen, "\n".join(self.seen)


def scribble(driver: Driver, source: Source) -> None:
    """Buffers of random shape; then some bytes of the rings changed."""
    memory = driver.memory
    for index, queue in enumerate(driver.queues):
        for _ in range(source.randrange(3)):
            parts: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
            for some, chance in zip(parts, (0.4, 0.6), strict=True):
                while source.random() < chance:
                    some.append((source.randrange(memory.base, memory.base + MEMORY - 5000), source.randrange(1, 5000)))
            if any(parts):
                with contextlib.suppress(MemoryError):
                    queue.add(*parts, indirect=source.random() < 0.3)
        for _ in range(source.choice((0, 0, 0, 1, 3, 20))):
            area = source.choice(((queue.desc, 16 * queue.size), (queue.driver, 4), (queue.driver, 4 + queue.size)))
            at = area[0] + source.randrange(area[1])
            memory.view(at, 1)[0] = source.choice((0, 1, 2, 4, 7, 0x80, 0xFF, source.randrange(256)))
        if source.random() < 0.9:
            driver.notify(index)


def access(driver: Driver, source: Source) -> None:
    """One access to a register, to any address of the range, with any width."""
    size = source.choice((1, 2, 4, 4, 4, 8))
    value = source.choice((0, 1, 2, 3, 4, 7, 8, 15, 64, 128, 0xFFFFFFFF, source.getrandbits(64))) & (1 << 8 * size) - 1
    if isinstance(driver, PciDriver):
        bar = source.choice((4, 4, 4, 4, 1, 0))
        offset = source.choice((0, 0x1000, 0x2000, 0x3000)) + source.randrange(64)
        what = source.randrange(7)
        if what == 0:
            driver.pci.bar_read(bar, offset, size)
        elif what == 1:
            driver.pci.config_write(0x80 + 4 * source.randrange(6), min(size, 4), value & 0xFFFFFFFF)
        elif what == 2:
            driver.pci.config_read(0x80 + 4 * source.randrange(6), min(size, 4))
        elif what == 3:
            driver.host.msix_enabled = not driver.host.msix_enabled
        elif what == 4:
            driver.host.addresses[4] = source.choice((None, 0xC0010000, 0xC0020000))
            driver.pci.bars_changed()
        else:
            driver.pci.bar_write(bar, offset, size, value)
    elif isinstance(driver, MmioDriver):
        offset = source.choice((4 * source.randrange(64), source.randrange(0x200)))
        if source.random() < 0.3:
            driver.mmio.read(offset, size)
        else:
            driver.mmio.write(offset, size, value)


def misplace(queue: AnyDriverQueue, source: Source) -> None:
    """Tell the device of a queue that is not where it can be."""
    where = source.choice((0, 1, 2, 8, 2**64 - 1, 2**64 - 16, 2**63, queue.memory.base - 16, source.getrandbits(64)))
    setattr(queue, source.choice(("desc", "driver", "device")), where)


class Campaign:
    """One device, one driver after another. `python`: the rings in Python instead of those in C."""

    def __init__(self, world: World, kind: str, source: Source) -> None:
        self.world, self.kind, self.source = world, kind, source
        self.options: dict[str, Any] = {"packed": source.random() < 0.5, "in_order": source.random() < 0.3}
        if source.random() < 0.3:
            self.options["ring_factory"] = reference_ring
        self.device: Device
        self.driver: Driver

    async def begin(self) -> None:
        self.device = await self.world.make()
        self.driver = self.connect(self.device)

    def connect(self, device: Device) -> Driver:
        driver = (PciDriver if self.kind == "pci" else MmioDriver)(device, **self.options)
        if isinstance(driver, PciDriver):
            driver.pci.capability_placed(4, 0x80)
        return driver

    async def initialize(self, wanted: int = -1) -> None:
        """A reset, and the device set up as it should be."""
        self.driver.write_status(0)
        await self.driver.wait(lambda: self.driver.read_status() == 0, SECONDS)
        self.driver.initialize(wanted)

    async def misconfigure(self) -> None:
        """A reset, and one queue or more where there is no place for it."""
        source = self.source
        self.driver.write_status(0)
        await self.driver.wait(lambda: self.driver.read_status() == 0, SECONDS)
        self.driver.initialize(spoil=lambda queue: source.random() < 0.5 and misplace(queue, source))
        for index in range(len(self.driver.queues)):
            self.driver.notify(index)
        await self.initialize()

    async def malform(self) -> None:
        """One of the rings that a driver must not make."""
        if self.source.random() < 0.5:
            await self.initialize()
        queue = self.source.choice(self.driver.queues) if self.driver.queues else None
        if queue is None or queue.size < 8:
            return
        packed = bool(self.driver.features & Feature.RING_PACKED)
        _, spoil, _ = self.source.choice(list(malformed.cases(packed).values()))
        with contextlib.suppress(MemoryError):
            if self.source.random() < 0.1:
                malformed.crowd(queue, self.source.choice((1, MEMORY - 4096)))  # more than 4 GiB in all
            else:
                spoil(queue)
        self.driver.notify(self.driver.queues.index(queue))

    async def stop_queue(self) -> None:
        """virtio-mmio: the driver stops using a queue; then it may set it up again."""
        driver, source = self.driver, self.source
        if not isinstance(driver, MmioDriver) or not driver.queues:
            return
        index = source.randrange(len(driver.queues))
        driver.set(0x030, index)
        driver.set(0x044, 0)
        if driver.get(0x044) or source.random() < 0.3:
            return
        with contextlib.suppress(MemoryError):
            queue = driver_queue(driver.allocator, driver.queues[index].size, driver.features)
            wrong = source.random() < 0.1
            if wrong:
                misplace(queue, source)
            with contextlib.suppress(AssertionError):  # of a device that needs a reset
                driver.configure_queue(index, queue)
            if wrong:
                await self.initialize()
            else:
                driver.queues[index] = queue

    async def move(self) -> None:
        """Drain, save, and go on with another device."""
        await asyncio.wait_for(self.driver.transport.quiesce(), SECONDS)
        if self.source.random() < 0.4:
            self.driver.transport.resume()
            return
        state = self.driver.transport.save()
        self.driver.transport.reset()
        await self.device.aclose()
        self.device = await self.world.make()
        other = self.connect(self.device)
        other.memory.bytes[:] = self.driver.memory.bytes
        other.transport.restore(state)
        other.adopt(self.driver)
        other.transport.resume()
        self.driver = other

    def collect(self) -> None:
        for queue in self.driver.queues:
            with contextlib.suppress(KeyError, IndexError):  # a driver's own confusion about a ring that it spoiled
                queue.used()

    async def flood(self) -> None:
        """One kind of request, again and again: with the buffers that happen to be there for its answers, or with none;
        returned buffers are taken back or not. A reset may come in the midst."""
        source = self.source
        after, again = source.getrandbits(64), source.getstate()
        for count in range(1, source.choice((100, 400)) + 1):
            source.setstate(again)
            try:
                self.world.request(self.driver)
            except MemoryError:
                self.collect()
                if self.driver.allocator.left < MEMORY // 4:
                    await self.initialize()
            self.driver.memory.log.clear()
            if count % 8 == 0:
                await asyncio.sleep(0)
        source.seed(after)
        if source.random() < 0.5:
            self.driver.write_status(0)
            await self.initialize()

    async def step(self) -> None:
        source, chance = self.source, self.source.random()
        if chance < 0.62:
            try:
                self.world.request(self.driver)
            except MemoryError:
                self.collect()
                if self.driver.allocator.left < MEMORY // 4:
                    await self.initialize()
        elif chance < 0.74:
            await self.world.host(self.device)
        elif chance < 0.90:
            await asyncio.sleep(0)
        elif chance < 0.94:
            access(self.driver, source)
        elif chance < 0.945:
            await self.flood()
        elif chance < 0.96:
            if self.driver.queues:
                self.driver.notify(source.randrange(len(self.driver.queues)))
        elif chance < 0.97:
            scribble(self.driver, source)
        elif chance < 0.975:
            await self.malform()
        elif chance < 0.978:
            await self.stop_queue()
        elif chance < 0.98:
            await self.misconfigure()
        elif chance < 0.987:
            await self.initialize(source.choice((-1, -1, source.getrandbits(40))))
        elif chance < 0.993:
            await self.move()
        else:
            self.collect()

    async def run(self) -> None:
        source = self.source
        for _ in range(source.randrange(20)):
            access(self.driver, source)
        for _ in range(source.randrange(1, 4)):
            if source.random() < 0.95:
                await self.initialize(source.choice((-1, -1, source.getrandbits(40))))
            for _ in range(source.randrange(80)):
                await self.step()
        await self.initialize()
        await self.world.works(self.driver)


class Neighbour:
    """A second machine's device in the same loop: an entropy source whose driver asks, and asks again when answered."""

    def __init__(self) -> None:
        self.answers = 0
        self.driver = MmioDriver(EntropyDevice(random.Random(0).randbytes), FakeMemory(1 << 16))
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self.driver.initialize()
        self._task = asyncio.get_running_loop().create_task(self._ask(), name="neighbour")

    async def _ask(self) -> None:
        room = self.driver.buffer(64)
        while True:
            self.driver.submit(0, [], [room])
            while not self.driver.queues[0].used():
                await asyncio.sleep(0)
            self.driver.memory.log.clear()
            self.answers += 1

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.driver.transport.reset()
        await self.driver.transport.device.aclose()


async def campaign(name: str, kind: str, seed: int, folder: Path) -> StallWatch:
    """`name` of WORLDS over `kind`, pci or mmio; how long the loop stood still in it. AssertionError, TimeoutError or
    what came out if something did."""
    async with StallWatch() as stalls:
        neighbour = Neighbour()
        neighbour.begin()
        try:
            await _campaign(name, kind, seed, folder)
        finally:
            await neighbour.end()
        assert neighbour.answers, "the second machine was not served"
    return stalls


async def _campaign(name: str, kind: str, seed: int, folder: Path) -> None:
    source = random.Random(seed)
    world = WORLDS[name](source, folder)
    watch = Watch()
    asyncio.get_running_loop().set_exception_handler(watch.unhandled)
    logging.getLogger("virtio").addHandler(watch)
    run = Campaign(world, kind, source)
    await run.begin()
    try:
        await run.run()
    finally:
        run.driver.transport.reset()
        await run.device.aclose()
        await world.close()
        logging.getLogger("virtio").removeHandler(watch)
    watch.check()
