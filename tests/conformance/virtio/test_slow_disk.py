"""A disk that hangs: the loop goes on, a reset is complete only when nothing can touch guest memory any more."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.engines import ENGINES
from tests.support.slowdisk import SlowDisk, slow_disk
from tests.support.virtio import Driver, MmioDriver, PciDriver
from virtio.backends.file import Cache, FileBlock, Io
from virtio.constants import Status
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.driver import Buffer
from virtio.errors import ConfigError, StateError

pytestmark = [pytest.mark.root]
SIZE = 1 << 20


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowDisk]:
    try:
        with slow_disk(tmp_path / "slow", SIZE) as disk:
            yield disk
    except OSError as error:
        pytest.skip(f"needs root and FUSE: {error}")


@pytest.fixture(params=[(io, cache) for io in ENGINES for cache in ("writeback", "none")], ids="-".join)
async def device(request: pytest.FixtureRequest, slow: SlowDisk) -> BlockDevice:
    io: Io
    cache: Cache
    io, cache = request.param
    try:
        made = BlockDevice(await FileBlock.open(slow.path, cache=cache, io=io))
    except ConfigError as error:
        pytest.skip(str(error))
    assert made.engine == io
    return made


async def settled(driver: Driver, count: int) -> int:
    """Used buffers of queue 0, after the disk was asked for something that it holds."""
    used = driver.queues[0].used()
    await asyncio.sleep(0)
    return count + len(used) + len(driver.queues[0].used())


def write(driver: Driver, sector: int) -> None:
    head = driver.buffer(struct.pack("<IIQ", blk.OUT, 0, sector))
    data = (driver.allocator.take(4096, 4096), 4096)
    driver.memory.view(*data)[:] = b"w" * 4096
    driver.submit(0, [head, data], [driver.buffer(1)])


def flush(driver: Driver) -> None:
    driver.submit(0, [driver.buffer(struct.pack("<IIQ", blk.FLUSH, 0, 0))], [driver.buffer(1)])


def reads(driver: Driver, count: int, *, first: int = 0) -> list[Buffer]:
    """Make reads of 8 sectors each available, far apart, and notify; where their data goes."""
    rooms = []
    for number in range(count):
        rooms.append((driver.allocator.take(4096, 4096), 4096))
        head = driver.buffer(struct.pack("<IIQ", blk.IN, 0, first + 24 * number))
        driver.queues[0].add([head], [rooms[-1], driver.buffer(b"\xee")])
    driver.notify(0)
    return rooms


async def hanging_reads(driver: Driver, slow: SlowDisk, count: int, *, first: int = 0) -> list[Buffer]:
    """reads() of which some are with the disk, which keeps them until slow.release()."""
    slow.hold()
    rooms = reads(driver, count, first=first)
    await driver.wait(lambda: slow.waiting)
    return rooms


async def test_a_reset_waits_for_a_hanging_disk(device: BlockDevice, slow: SlowDisk) -> None:
    driver = PciDriver(device)
    driver.initialize()
    rooms = await hanging_reads(driver, slow, 40)
    driver.write_status(0)
    assert driver.read_status() != 0, "not complete: the kernel may still write into the buffers"
    assert slow.waiting
    slow.release()
    await driver.wait(lambda: driver.read_status() == 0)
    for room in rooms:
        driver.memory.view(*room)[:] = b"\xa5" * room[1]
    assert not slow.waiting
    driver.initialize()
    head = struct.pack("<IIQ", blk.IN, 0, 0)
    assert await driver.request(0, [head], [512, 1]) == slow.data[:512] + b"\0"
    assert all(driver.bytes_at(room) == b"\xa5" * room[1] for room in rooms[1:])
    driver.transport.reset()
    await device.aclose()


class Stall:
    """A processor that its write to virtio-mmio's Status keeps. What the driver does first when it goes on is to use
    its buffers for something else."""

    def __init__(self, device: BlockDevice) -> None:
        self.driver = MmioDriver(device, stall=self)
        self.count = 0
        self.rooms: list[Buffer] = []
        self.seen: list[int] = []

    def __call__(self) -> Callable[[], None]:
        self.count += 1
        return self.go_on

    def go_on(self) -> None:
        self.count -= 1
        self.seen.append(self.driver.read_status())
        for room in self.rooms:
            self.driver.memory.view(*room)[:] = b"\xa5" * room[1]


@pytest.mark.clause("2.4.1-a", "2.4.1-b")
async def test_over_mmio_a_reset_keeps_the_vcpu_until_it_is_complete(device: BlockDevice, slow: SlowDisk) -> None:
    stall = Stall(device)
    driver = stall.driver
    driver.initialize()
    assert not stall.count and not stall.seen
    stall.rooms = await hanging_reads(driver, slow, 40)
    driver.write_status(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert stall.count == 1 and driver.read_status() != 0
    driver.write_status(0)  # by another processor
    driver.write_status(Status.ACKNOWLEDGE)
    assert stall.count == 2 and slow.waiting
    slow.release()
    await driver.wait(lambda: stall.seen)
    assert stall.seen == [0, 0] and not stall.count
    driver.initialize()
    assert await driver.request(0, [struct.pack("<IIQ", blk.IN, 0, 0)], [512, 1]) == slow.data[:512] + b"\0"
    assert all(driver.bytes_at(room) == b"\xa5" * room[1] for room in stall.rooms[1:])
    driver.transport.reset()
    await device.aclose()


@pytest.mark.parametrize("transport", ["pci", "mmio"])
async def test_a_reset_becomes_complete_unwatched_and_leaves_later_requests(
    device: BlockDevice, slow: SlowDisk, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stall = Stall(device)
    driver = stall.driver if transport == "mmio" else PciDriver(device)
    driver.initialize()
    write_status = driver.write_status
    for polls in (False, True):
        await hanging_reads(driver, slow, 2, first=1024 * polls)
        driver.write_status(0)
        slow.release()
        if polls:
            while driver.read_status():
                pass
        else:
            await driver.wait(lambda: driver.transport.status == 0)
        assert not stall.count
        with monkeypatch.context() as patch:  # a driver that does not begin with a reset
            patch.setattr(driver, "write_status", lambda value: write_status(value) if value else None)
            driver.initialize()
        first = 1024 * polls + 128
        rooms = await hanging_reads(driver, slow, 30, first=first)
        for _ in range(100):
            await asyncio.sleep(0)
        slow.release()
        await driver.used(0, 30)
        for number, room in enumerate(rooms):
            assert driver.bytes_at(room) == slow.data[512 * (first + 24 * number) :][:4096]
    driver.transport.reset()
    await device.aclose()


@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("ends", [("cancel",), ("cancel", "release")], ids="-".join)
async def test_a_state_is_saved_once_the_reset_is_complete(
    device: BlockDevice, slow: SlowDisk, faulty: bool, ends: tuple[str, ...]
) -> None:
    """Also if whoever wanted to save gave that up."""
    stall = Stall(device)
    driver = stall.driver
    driver.initialize()
    await hanging_reads(driver, slow, 4)
    if faulty:
        driver.submit(0, [driver.buffer(16)])
        assert driver.needs_reset
    driver.write_status(0)
    with pytest.raises(StateError, match="a reset is not complete"):
        driver.transport.save()
    for end in ends:
        quiesced = asyncio.ensure_future(driver.transport.quiesce())
        await asyncio.wait([quiesced], timeout=0.01)
        assert not quiesced.done() and stall.count == 1
        if end == "cancel":
            quiesced.cancel()
        else:
            slow.release()
            await asyncio.wait_for(quiesced, 10)
    slow.release()
    await driver.wait(lambda: stall.seen)
    assert stall.seen == [0] and driver.transport.save().status == 0
    await device.aclose()


async def test_a_machine_that_ends_lets_nobody_go_on(device: BlockDevice, slow: SlowDisk) -> None:
    stall = Stall(device)
    driver = stall.driver
    driver.initialize()
    await hanging_reads(driver, slow, 4)
    driver.write_status(0)
    driver.transport.close()
    closing = asyncio.ensure_future(device.aclose())
    await asyncio.wait([closing], timeout=0.05)
    assert not closing.done()
    slow.release()
    await asyncio.wait_for(closing, 10)
    assert stall.count == 1 and not stall.seen


def on_disk(slow: SlowDisk) -> bytes:
    """What the file holds now."""
    with slow.path.open("rb") as file:
        return file.read()


@pytest.mark.parametrize("cache", ["writeback", "none"])
async def test_a_reset_ends_what_threads_have_not_begun(slow: SlowDisk, cache: Cache) -> None:
    """A thread takes several requests at a time; only those that the kernel has are waited for."""
    device = BlockDevice(await FileBlock.open(slow.path, cache=cache, io="threads"))
    driver = PciDriver(device)
    driver.initialize()
    slow.hold("WRITE")
    for number in range(40):
        head = driver.buffer(struct.pack("<IIQ", blk.OUT, 0, 24 * number))
        data = (driver.allocator.take(4096, 4096), 4096)
        driver.queues[0].add([head, data], [driver.buffer(1)])
    driver.notify(0)
    await driver.wait(lambda: slow.waiting)
    driver.write_status(0)
    slow.release()
    await driver.wait(lambda: driver.read_status() == 0)
    after = on_disk(slow)
    assert sum(after[12288 * number :][:4096] == bytes(4096) for number in range(40)) <= 2
    await device.aclose()


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_zeroes_that_take_long_end_with_the_device(device: BlockDevice, slow: SlowDisk, how: str) -> None:
    """A request may ask for 32 GiB of them, and this file system takes each 64 KiB from us."""
    driver = PciDriver(device)
    driver.initialize()
    slow.hold("WRITE")
    head = struct.pack("<IIQ", blk.WRITE_ZEROES, 0, 0)
    entries = b"".join(struct.pack("<QII", 128 * number, 128, 0) for number in range(8))
    driver.submit(0, [driver.buffer(head + entries + struct.pack("<QII", 1024, 1024, 0))], [driver.buffer(1)])
    await driver.wait(lambda: slow.waiting)
    driver.transport.reset()
    closing = asyncio.ensure_future(device.aclose()) if how == "close" else None
    await asyncio.sleep(0)
    slow.release()
    if closing is None:
        await driver.wait(lambda: driver.read_status() == 0)
    else:
        await asyncio.wait_for(closing, 10)
    assert on_disk(slow)[65536:] == slow.data[65536:]
    await device.aclose()


async def test_saving_waits_for_a_hanging_disk(device: BlockDevice, slow: SlowDisk) -> None:
    driver = PciDriver(device)
    driver.initialize()
    rooms = await hanging_reads(driver, slow, 40)
    quiesced = asyncio.ensure_future(driver.transport.quiesce())
    await asyncio.sleep(0)
    assert not quiesced.done()
    slow.release()
    await asyncio.wait_for(quiesced, 10)
    driver.transport.save()
    for number, room in enumerate(rooms):
        assert driver.bytes_at(room) == slow.data[24 * 512 * number :][:4096]
    driver.transport.reset()
    await device.aclose()


async def test_a_state_that_is_refused_leaves_the_requests(device: BlockDevice, slow: SlowDisk) -> None:
    """`save` before `quiesce` is a mistake that the guest does not pay for."""
    driver = PciDriver(device)
    driver.initialize()
    rooms = await hanging_reads(driver, slow, 40)
    with pytest.raises(StateError, match="in flight"):
        driver.transport.save()
    slow.release()
    await driver.used(0, 40)
    for number, room in enumerate(rooms):
        assert driver.bytes_at(room) == slow.data[24 * 512 * number :][:4096]
    driver.transport.reset()
    await device.aclose()


async def test_closing_waits_for_a_hanging_disk_beside_the_loop(device: BlockDevice, slow: SlowDisk) -> None:
    driver = PciDriver(device)
    driver.initialize()
    await hanging_reads(driver, slow, 4)
    driver.transport.reset()
    closing = asyncio.ensure_future(device.aclose())
    await asyncio.wait([closing], timeout=0.05)
    assert not closing.done(), "the loop runs, and the device is not closed"
    slow.release()
    await asyncio.wait_for(closing, 10)


@pytest.mark.clause("5.2.6.2-h")
async def test_a_flush_ends_after_the_disk_has_flushed(device: BlockDevice, slow: SlowDisk) -> None:
    driver = PciDriver(device)
    driver.initialize()
    write(driver, 0)
    await driver.used(0)
    slow.hold("FSYNC")
    flush(driver)
    await driver.wait(lambda: slow.waiting)
    assert await settled(driver, 0) == 0
    slow.release()
    await driver.used(0)
    driver.transport.reset()
    await device.aclose()


@pytest.mark.parametrize("io", ENGINES)
async def test_write_through_ends_after_the_disk_has_flushed(io: Io, slow: SlowDisk) -> None:
    """Each write, without a flush: by configuration, and because the driver did not negotiate FLUSH (5.2.6.2)."""
    for cache, features in (("writethrough", -1), ("writeback", ~blk.BlockFeature.FLUSH)):
        try:
            device = BlockDevice(await FileBlock.open(slow.path, cache=cache, io=io))  # type: ignore[arg-type]
        except ConfigError as error:
            pytest.skip(str(error))
        driver = PciDriver(device)
        driver.initialize(features)
        slow.hold("FSYNC")
        write(driver, 8)
        await driver.wait(lambda: slow.waiting)
        assert await settled(driver, 0) == 0
        slow.release()
        await driver.used(0)
        driver.transport.reset()
        await device.aclose()
