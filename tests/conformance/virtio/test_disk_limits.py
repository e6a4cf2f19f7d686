"""Limits of a disk hold on every path that a request may take: exact over time, fair between queues, and nothing is
polled. Time is the test's own."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.clocks import SteppedClock
from tests.support.engines import open_path
from tests.support.virtio import Driver, PciDriver
from virtio.backends.block import BlockBackend
from virtio.devices import blk
from virtio.devices.blk import BlockDevice, BlockState, BlockStateV1
from virtio.driver import Buffer
from virtio.errors import ConfigError

SECTORS = 8192
SECOND = 1_000_000_000
PATHS = ["io_uring-cached", "io_uring-direct", "threads-uncached", "io_uring-qcow2", "coroutines"]


@dataclass
class Flight:
    """A request of the driver's that it makes again when it is answered."""

    queue: int
    kind: int
    length: int
    head: Buffer
    data: Buffer
    status: Buffer


class Load:
    """A driver that always has requests out, over a disk whose time the test moves."""

    def __init__(self, driver: Driver, clock: SteppedClock) -> None:
        self.driver, self.clock = driver, clock
        self.device: BlockDevice = driver.transport.device  # type: ignore[assignment]
        self.flights: dict[tuple[int, int], Flight] = {}
        self.done: Counter[tuple[int, int, int]] = Counter()
        """Answers by (queue, kind, bytes)."""

    def add(self, count: int, *, queue: int = 0, kind: int = blk.IN, length: int = 4096) -> None:
        for _ in range(count):
            sector = len(self.flights) * 8
            head = self.driver.buffer(struct.pack("<IIQ", kind, 0, sector))
            self.driver.allocator.take(0, 4096)
            data = (self.driver.allocator.take(length, 4096), length)
            self._send(Flight(queue, kind, length, head, data, self.driver.buffer(b"\xee")))

    def _send(self, flight: Flight) -> None:
        self.driver.memory.view(*flight.status)[:] = b"\xee"
        readable, writable = [flight.head], [flight.status]
        if flight.kind != blk.FLUSH:
            (writable.insert(0, flight.data) if flight.kind == blk.IN else readable.append(flight.data))
        number = self.driver.queues[flight.queue].add(readable, writable)
        self.flights[flight.queue, number] = flight
        if self.driver.queues[flight.queue].needs_notification():
            self.driver.notify(flight.queue)

    def collect(self) -> None:
        """Count what is answered, and ask for it again."""
        again = []
        for index, queue in enumerate(self.driver.queues):
            for used in queue.used():
                flight = self.flights.pop((index, used.id))
                assert self.driver.bytes_at(flight.status) == b"\0"
                self.done[index, flight.kind, flight.length] += 1
                again.append(flight)
        for flight in again:
            self._send(flight)

    async def settle(self) -> None:
        """Until every request waits for tokens, and nothing else goes on."""
        still = 0
        async with asyncio.timeout(60):
            while still < 6:
                before = sum(self.done.values())
                await asyncio.sleep(0)
                self.collect()
                engine = self.device._engine
                working = engine is not None and engine.in_flight > engine.waiting
                if working:
                    await asyncio.sleep(0.0005)
                still = 0 if working or sum(self.done.values()) != before else still + 1

    async def run(self, seconds: float) -> None:
        """So much of the clock's time."""
        end = self.clock.now + int(seconds * SECOND)
        await self.settle()
        while self.clock.now < end and self.clock.step():
            await self.settle()

    def count(self, queue: int | None = None, kind: int | None = None) -> int:
        return sum(n for (q, k, _), n in self.done.items() if queue in (None, q) and kind in (None, k))

    def moved(self) -> int:
        return sum(n * length for (_, _, length), n in self.done.items())


@pytest.fixture(params=PATHS)
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> BlockBackend:
    (tmp_path / "disk").write_bytes(random.Random(3).randbytes(SECTORS * 512))
    return await open_path(request.param, tmp_path / "disk")


@pytest.fixture
async def load(backend: BlockBackend) -> AsyncIterator[Load]:
    device = BlockDevice(backend, queues=4)
    clock = device.clock = SteppedClock()
    driver = PciDriver(device)
    driver.initialize()
    yield Load(driver, clock)
    driver.transport.reset()
    await device.aclose()


@pytest.mark.parametrize("rate", [7, 100, 1000])
async def test_operations_are_exact(load: Load, rate: int) -> None:
    load.device.set_limits({"iops": rate, "iops_burst": 1})
    load.add(32)
    seconds = 300 / rate
    await load.run(seconds)
    assert load.count() == pytest.approx(rate * (load.clock.now / SECOND), abs=2)
    assert load.clock.fired <= load.count() + 2, "a timer for each request that waited, and no more"


@pytest.mark.parametrize("length", [512, 4096, 65536])
async def test_bytes_are_exact_however_long_requests_are(load: Load, length: int) -> None:
    rate = 100 * length
    if load.device.backend.block_size > length:
        pytest.skip("the disk has larger blocks")
    load.device.set_limits({"bps": rate, "bps_burst": 3 * length})
    load.add(8, length=length)
    await load.run(4)
    assert load.moved() == pytest.approx(rate * load.clock.now / SECOND + 3 * length, abs=2 * length)


async def test_a_burst_passes_at_once_and_comes_back(load: Load) -> None:
    load.device.set_limits({"iops": 10, "iops_burst": 50})
    load.add(60)
    await load.settle()
    assert load.count() == 50
    load.clock.now += 100 * SECOND  # the bucket is full again, and no more
    load.clock.step()
    await load.settle()
    assert load.count() == 100


async def test_without_a_burst_no_second_has_a_twentieth_too_much(load: Load) -> None:
    load.device.set_limits({"iops": 400})
    load.add(64)
    await load.run(1)
    assert 400 <= load.count() <= 421


async def test_reads_do_not_wait_for_the_limit_of_writes(load: Load) -> None:
    load.device.set_limits({"iops_write": 10, "iops_write_burst": 1, "iops_read": 500, "iops_read_burst": 1})
    load.add(16, kind=blk.OUT)
    load.add(2, kind=blk.IN)
    await load.run(2)
    seconds = load.clock.now / SECOND
    assert load.count(kind=blk.OUT) == pytest.approx(10 * seconds, abs=2)
    assert load.count(kind=blk.IN) == pytest.approx(500 * seconds, abs=2)


async def test_flushes_are_writes(load: Load) -> None:
    load.device.set_limits({"iops_write": 20, "iops_write_burst": 1})
    load.add(4, kind=blk.FLUSH, length=0)
    await load.run(2)
    assert load.count(kind=blk.FLUSH) == pytest.approx(20 * load.clock.now / SECOND, abs=2)


async def test_queues_have_equal_parts(load: Load) -> None:
    load.device.set_limits({"iops": 200, "iops_burst": 1})
    for queue, depth in enumerate((13, 5, 2, 1)):
        load.add(depth, queue=queue)
    await load.run(2)
    parts = [load.count(queue=queue) for queue in range(4)]
    assert max(parts) - min(parts) <= 4, parts


async def test_long_requests_are_not_starved_by_short_ones(load: Load) -> None:
    load.device.set_limits({"bps": 1 << 20, "bps_burst": 65536})
    load.add(8, queue=0, length=4096)
    load.add(2, queue=1, length=65536)
    await load.run(3)
    assert abs(load.count(queue=0) - load.count(queue=1)) <= 9, load.done


async def test_limits_change_while_requests_wait(load: Load) -> None:
    load.device.set_limits({"iops": 1, "iops_burst": 1})
    load.add(16)
    await load.run(3)
    before, at = load.count(), load.clock.now
    load.device.set_limits({"iops": 1000})
    await load.run(0.5)
    assert load.count() - before == pytest.approx(1000 * (load.clock.now - at) / SECOND, abs=2)
    assert load.device.limits.as_dict() == {"iops": 1000, "iops_burst": 1}
    waiting = load.count()
    load.device.set_limits({"iops": 0})
    async with asyncio.timeout(60):
        while load.count() < waiting + 200:
            await asyncio.sleep(0)
            load.collect()
    assert load.device.limits.as_dict() == {}
    load.device.set_limits({"iops": 1})
    await load.settle()


async def test_what_waits_is_owed_when_the_machine_moves(load: Load) -> None:
    load.device.set_limits({"iops": 10, "iops_burst": 1})
    load.add(21)
    await load.settle()
    await asyncio.wait_for(load.driver.transport.quiesce(), 30)
    found = load.driver.transport.save().device
    assert found.limits[0].rate == 10 and found.limits[0].level == pytest.approx(-21_000, abs=10)
    load.driver.transport.resume()
    await load.settle()  # the 21 answers are taken, and as many asked for again
    assert load.count() == 22
    assert load.clock.step(), "the debt is paid first: 21 tokens, and one for the next request"
    assert load.clock.now == pytest.approx(2.2 * SECOND, rel=0.01)
    await load.settle()
    assert load.count() == 23


async def test_a_reset_forgets_what_waits(load: Load) -> None:
    load.device.set_limits({"iops": 1, "iops_burst": 1})
    load.add(9)
    await load.settle()
    load.driver.transport.reset()
    await asyncio.wait_for(load.device.settle(), 30)
    assert not load.clock.step(), "no timer is left"
    load.flights.clear()
    load.driver.initialize()
    load.device.set_limits({"iops": 1000, "iops_burst": 20})
    load.add(3)
    await load.run(0.1)
    assert load.count() > 20


async def test_a_change_of_the_disk_waits_for_no_tokens(load: Load) -> None:
    load.device.set_limits({"iops": 1, "iops_burst": 1})
    load.add(9)
    await load.settle()
    seen = []

    async def change() -> None:
        seen.append(all(not queue.in_flight for queue in load.device.active.queues))

    await asyncio.wait_for(load.device.exchange(change), 30)
    assert seen == [True]


async def test_state_keeps_limits_and_debts(load: Load, tmp_path: Path) -> None:
    load.device.set_limits({"bps_read": 5 << 20, "bps_read_burst": 9 << 20, "iops": 77})
    saved = load.device.save_device()
    other = BlockDevice(await open_path("coroutines", tmp_path / "disk"))
    other.restore_device(saved)
    assert other.limits.as_dict() == {"bps_read": 5 << 20, "bps_read_burst": 9 << 20, "iops": 77}
    assert other.save_device() == saved
    other.restore_device(BlockState.upgrade(BlockStateV1(True, other.capacity)))
    assert other.limits.as_dict()["iops"] == 77, "a state without limits leaves the configuration's"
    await other.aclose()


async def test_impossible_limits_are_refused(load: Load) -> None:
    load.device.set_limits({"iops": 5})
    for wrong in ({"iosp": 1}, {"iops": -1}, {"iops": 1 << 41}, {"iops": True}, {"bps": 1.5}, {"iops_burst_burst": 1}):
        with pytest.raises(ConfigError):
            load.device.set_limits({"iops": 9, **wrong})  # type: ignore[dict-item]
    assert load.device.limits.as_dict() == {"iops": 5}


async def test_by_the_hosts_clock_no_more_than_the_rate_passes(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SECTORS * 512))
    device = BlockDevice(await open_path("io_uring-cached", tmp_path / "disk"))
    driver = PciDriver(device)
    driver.initialize()
    device.set_limits({"iops": 200, "iops_burst": 2})
    load = Load(driver, SteppedClock())
    began = time.monotonic()
    load.add(16)
    async with asyncio.timeout(60):
        while load.count() < 102:
            await asyncio.sleep(0.001)
            load.collect()
    assert time.monotonic() - began >= 0.499
    driver.transport.reset()
    await device.aclose()
