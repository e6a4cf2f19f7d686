"""Block requests on the thread of the vCPU that makes them (virtio/native/blk_direct.c).

test_block_engines.py holds what is done there equal to all other paths; here is who does what, and what happens when
the loop's thread is at the same queues.
"""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.answering import AnsweringDriver, Asked, VcpuThread, reads_at_once
from virtio.backends.file import FileBlock
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.driver import Buffer

SECTORS = 2048
QUEUES = 2


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = random.Random(3).randbytes(SECTORS * 512)
    (tmp_path / "disk").write_bytes(data)
    return data


@pytest.fixture
def at_once(tmp_path: Path) -> None:
    if not reads_at_once(tmp_path):
        pytest.skip(f"the file system of {tmp_path} does not read from the page cache alone (RWF_NOWAIT)")


@pytest.fixture
async def driver(content: bytes, tmp_path: Path) -> AsyncIterator[AnsweringDriver]:
    backend = await FileBlock.open(tmp_path / "disk", io="threads")
    made = AnsweringDriver(BlockDevice(backend, queues=QUEUES))
    made.initialize()
    yield made
    made.transport.reset()
    await made.transport.device.aclose()
    made.close()


def add(driver: AnsweringDriver, kind: int, sector: int, data: Buffer | None, queue: int = 0) -> Buffer:
    """The request's status byte."""
    status = driver.buffer(b"\xee")
    head = driver.buffer(struct.pack("<IIQ", kind, 0, sector))
    readable = [head, data] if kind == blk.OUT and data is not None else [head]
    writable = [data, status] if kind == blk.IN and data is not None else [status]
    driver.queues[queue].add(readable, writable)
    return status


def device(driver: AnsweringDriver) -> BlockDevice:
    found = driver.transport.device
    assert isinstance(found, BlockDevice)
    return found


@pytest.mark.usefixtures("at_once")
async def test_reads_and_writes_are_over_when_the_doorbell_is(driver: AnsweringDriver, content: bytes) -> None:
    space = driver.buffer(4096)
    status = add(driver, blk.IN, 8, space)
    assert driver.ask(0)
    assert driver.bytes_at(status) == b"\0"
    assert driver.bytes_at(space) == content[4096:8192]
    assert driver.told
    new = driver.buffer(b"\x5a" * 4096)
    first, second = add(driver, blk.OUT, 8, new), add(driver, blk.IN, 8, space)
    if not driver.ask(0):  # the file system had to be asked whether it writes without waiting
        await driver.wait(lambda: driver.bytes_at(first) == b"\0")
        first, second = add(driver, blk.OUT, 8, new), add(driver, blk.IN, 8, space)
        assert driver.ask(0)
    assert driver.bytes_at(first) == driver.bytes_at(second) == b"\0"
    assert driver.bytes_at(space) == b"\x5a" * 4096
    assert device(driver).counters["failures"] == 0


async def test_what_may_take_long_is_the_loops(driver: AnsweringDriver, content: bytes) -> None:
    space = driver.buffer(4096)
    flush, read = add(driver, blk.FLUSH, 0, None), add(driver, blk.IN, 8, space)
    assert not driver.ask(0)
    assert driver.bytes_at(flush) == driver.bytes_at(read) == b"\xee"
    driver.notify(0)
    await driver.wait(lambda: driver.bytes_at(flush) == driver.bytes_at(read) == b"\0")
    assert driver.bytes_at(space) == content[4096:8192]


@pytest.mark.usefixtures("at_once")
async def test_nothing_is_taken_from_a_queue_that_is_not_lent(driver: AnsweringDriver) -> None:
    disk, space = device(driver), driver.buffer(4096)
    status = add(driver, blk.IN, 8, space)
    disk.pause()
    assert not driver.ask(0)
    disk.set_limits({"iops": 1000})
    disk.resume()  # which looks at the queues
    await driver.wait(lambda: driver.bytes_at(status) == b"\0")
    status = add(driver, blk.IN, 8, space)
    assert not driver.ask(0)
    disk.set_limits({"iops": 0})
    disk.track(bytearray(SECTORS))
    assert not driver.ask(0)
    disk.track(None)
    driver.host.masked = True
    driver.pci.messages_changed()
    assert not driver.ask(0)
    assert driver.bytes_at(status) == b"\xee"
    driver.host.masked = False
    driver.pci.messages_changed()
    assert driver.ask(0)
    assert driver.bytes_at(status) == b"\0"


@pytest.mark.usefixtures("at_once")
async def test_no_other_processor_is_used_for_small_requests(driver: AnsweringDriver) -> None:
    """The vCPU's thread is asked of them whether or not one is free; of large ones, and of several writes at a time,
    only where none is."""

    async def make(kind: int, turns: int, size: int = 4096, together: int = 1) -> Asked:
        base = driver.allocator._next
        for _ in range(turns):
            driver.allocator._next = base
            made = [add(driver, kind, 0, driver.buffer(size)) for _ in range(together)]
            driver.notify(0)
            await driver.wait(lambda: all(driver.bytes_at(status) == b"\0" for status in made), 30)  # noqa: B023
            driver.queues[0].used()
        driver.allocator._next = base
        return driver.asked(1)

    assert driver.asked(0) is driver.asked(1) is Asked.IF_CROWDED
    assert await make(blk.IN, 40) is Asked.LATER
    assert await make(blk.IN, 40, 256 << 10) is Asked.IF_CROWDED
    assert await make(blk.IN, 40) is Asked.LATER
    assert await make(blk.IN, 20, together=8) is Asked.LATER
    assert await make(blk.OUT, 20, together=8) is Asked.IF_CROWDED
    assert await make(blk.OUT, 60) is Asked.LATER
    add(driver, blk.FLUSH, 0, None)
    driver.notify(0)
    await driver.used(0)
    assert driver.asked(0) is Asked.LATER  # which has nothing to do with it


async def test_requests_beside_the_loop(driver: AnsweringDriver, content: bytes) -> None:
    """A vCPU's thread rings all the time while the loop answers the same queues, pauses them, and resets the device:
    every request is answered once, none is lost, and none is answered after a reset."""
    disk, source = device(driver), random.Random(7)
    base = driver.allocator._next
    vcpu = VcpuThread(driver, QUEUES)
    try:
        for turn in range(60):
            driver.allocator._next = base
            reads = []
            for _ in range(60):
                sector, space = source.randrange(SECTORS // 8) * 8, driver.buffer(4096)
                reads.append((sector, space, add(driver, blk.IN, sector, space, source.randrange(QUEUES))))
            flush = add(driver, blk.FLUSH, 0, None)
            disk.queue_notified(turn % QUEUES)
            disk.pause()
            await disk.quiesce()
            assert all(not queue.in_flight for queue in disk.active.queues)
            disk.resume()
            statuses = [flush, *(status for _, _, status in reads)]
            await driver.wait(lambda: all(driver.bytes_at(status) == b"\0" for status in statuses), 30)  # noqa: B023
            for sector, space, _ in reads:
                assert driver.bytes_at(space) == content[sector * 512 :][:4096]
            used = sum(len(queue.used()) for queue in driver.queues)
            assert used == len(statuses)
            if turn % 10 == 9:
                late = [add(driver, blk.IN, 8 * number, driver.buffer(4096)) for number in range(60)]
                driver.write_status(0)
                await driver.wait(lambda: driver.read_status() == 0)
                before = [driver.bytes_at(status) for status in late]
                assert not driver.ask(0)
                assert [driver.bytes_at(status) for status in late] == before
                driver.allocator._next = base
                driver.initialize()
                base = driver.allocator._next
    finally:
        vcpu.end()
    assert vcpu.answered
