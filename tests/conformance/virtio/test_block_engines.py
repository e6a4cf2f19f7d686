"""Every path that a block request may take does the same: io_uring, threads, coroutines, a vCPU's own thread; cached,
O_DIRECT, snapshot, qcow2."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.answering import AnsweringDriver
from tests.support.engines import PATHS, open_path
from tests.support.virtio import Driver, PciDriver
from virtio.backends.block import BlockBackend
from virtio.backends.file import FileBlock, SnapshotBlock
from virtio.backends.image import ImageBlock
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.driver import Buffer

SECTORS = 2048
QUEUES = 2
HALF_START = 64 << 10
"""Where buffers begin in either half of the memory: behind the queues."""


VCPU = "vcpu "
"""In front of a path: the vCPU's thread is asked first."""


@pytest.fixture(params=[*PATHS, f"{VCPU}io_uring-cached", f"{VCPU}threads-qcow2"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> BlockBackend:
    (tmp_path / "disk").write_bytes(random.Random(3).randbytes(SECTORS * 512))
    return await open_path(request.param.removeprefix(VCPU), tmp_path / "disk")


@pytest.fixture
async def driver(request: pytest.FixtureRequest, backend: BlockBackend) -> AsyncIterator[Driver]:
    asks = request.node.callspec.params["backend"].startswith(VCPU)
    made = (AnsweringDriver if asks else PciDriver)(BlockDevice(backend, queues=QUEUES))
    made.initialize()
    yield made
    made.transport.reset()
    await made.transport.device.aclose()
    if isinstance(made, AnsweringDriver):
        made.close()


@dataclass
class Sent:
    """A request of the driver's: where it is on disk, and its buffers."""

    kind: int
    sector: int
    count: int
    data: list[Buffer]
    status: Buffer


def pieces(source: random.Random, driver: Driver, length: int) -> list[Buffer]:
    """A buffer of `length` bytes in one or several segments, some of which no O_DIRECT takes as they are."""
    if source.random() < 0.3:
        driver.allocator.take(source.choice((1, 7, 512)), 1)
    cuts = sorted(source.randrange(length) for _ in range(source.choice((0, 0, 1, 3))))
    if source.random() < 0.5:
        cuts = [cut // 512 * 512 for cut in cuts]
        driver.allocator.take(0, 4096)
    bounds = [0, *(cut for cut in cuts if cut), length]
    return [(driver.allocator.take(b - a, 1), b - a) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def send(driver: Driver, source: random.Random, kind: int, sector: int, count: int) -> Sent:
    status = driver.buffer(b"\xee")
    head = driver.buffer(struct.pack("<IIQ", kind, 0, sector if kind in (blk.IN, blk.OUT) else 0))
    data: list[Buffer] = []
    if kind in (blk.IN, blk.OUT):
        data = pieces(source, driver, count * 512)
    elif kind in (blk.DISCARD, blk.WRITE_ZEROES):
        middle = source.randrange(count + 1)
        flags = source.randrange(2) if kind == blk.WRITE_ZEROES else 0
        parts = ((sector, middle, flags), (sector + middle, count - middle, flags))
        data = [driver.buffer(b"".join(struct.pack("<QII", *part) for part in parts))]
    if kind == blk.OUT:
        for gpa, length in data:
            driver.memory.view(gpa, length)[:] = source.randbytes(length)
    queue = source.randrange(QUEUES)
    if kind == blk.IN:
        driver.queues[queue].add([head], [*data, status])
    else:
        driver.queues[queue].add([head, *data], [status])
    return Sent(kind, sector, count, data, status)


async def finish(driver: Driver, sent: list[Sent]) -> None:
    for index in range(QUEUES):
        driver.notify(index)
    await driver.wait(lambda: all(driver.bytes_at(item.status) != b"\xee" for item in sent), 30)
    for index in range(QUEUES):
        driver.queues[index].used()


def content(driver: Driver, item: Sent) -> bytes:
    return b"".join(driver.bytes_at(part) for part in item.data)


async def test_requests_and_bytes_are_counted(driver: Driver) -> None:
    source = random.Random(5)
    await finish(driver, [send(driver, source, blk.IN, 8, 16), send(driver, source, blk.IN, SECTORS, 1)])
    await finish(driver, [send(driver, source, blk.OUT, sector, 8) for sector in (0, 8, 16)])
    await finish(driver, [send(driver, source, blk.FLUSH, 0, 0)])
    assert driver.transport.device.counters == {
        "reads": 1,
        "bytes_read": 8192,
        "writes": 3,
        "bytes_written": 12288,
        "flushes": 1,
        "failures": 1,
    }


async def test_a_model_of_sectors(driver: Driver, backend: BlockBackend, tmp_path: Path) -> None:
    """Random requests in flight together, of which none meets another one's sectors, against a bytearray."""
    original = (tmp_path / "disk").read_bytes()
    model = bytearray(original)
    source = random.Random(11)
    base = driver.allocator._next
    unit = backend.block_size // 512
    for _ in range(20):
        driver.allocator._next = base
        sent, sector = [], 0
        while len(sent) < 90:
            if source.random() < 0.5:  # else adjacent to the one before: to be merged
                sector += source.choice((1, 8, 40)) * unit
            count = source.choice((1, 1, 2, 8, 24)) * unit
            if sector + count > SECTORS:
                break
            kind = source.choice((blk.IN, blk.IN, blk.OUT, blk.OUT, blk.OUT, blk.WRITE_ZEROES, blk.FLUSH, blk.DISCARD))
            sent.append(send(driver, source, kind, sector, count))
            sector += count
        await finish(driver, sent)
        again: list[tuple[int, int]] = []
        for item in sent:
            assert driver.bytes_at(item.status) == b"\0", item
            part = slice(item.sector * 512, (item.sector + item.count) * 512)
            if item.kind == blk.IN:
                assert content(driver, item) == model[part], item
            elif item.kind == blk.OUT:
                model[part] = content(driver, item)
            elif item.kind == blk.WRITE_ZEROES:
                model[part] = bytes(item.count * 512)
            elif item.kind == blk.DISCARD:
                again.append((item.sector, item.count))  # what it reads as is nobody's promise
        driver.allocator._next = base
        written = [send(driver, source, blk.OUT, *where) for where in again]
        await finish(driver, written)
        for item in written:
            model[item.sector * 512 : (item.sector + item.count) * 512] = content(driver, item)
    driver.allocator._next = base
    whole = [send(driver, source, blk.IN, sector, 128) for sector in range(0, SECTORS, 128)]
    await finish(driver, whole)
    assert b"".join(content(driver, item) for item in whole) == model
    if isinstance(backend, SnapshotBlock | ImageBlock):
        assert (tmp_path / "disk").read_bytes() == original
    elif isinstance(backend, FileBlock):
        assert (tmp_path / "disk").read_bytes() == model


async def test_more_than_fits_in_flight(driver: Driver, backend: BlockBackend) -> None:
    """Two full queues at once; none is lost, and none is answered twice."""
    source = random.Random(5)
    sent = [send(driver, source, blk.OUT, 8 * number, 1) for number in range(140)]
    for index in range(QUEUES):
        driver.notify(index)
    used = 0

    def all_used() -> bool:
        nonlocal used
        used += sum(len(queue.used()) for queue in driver.queues)
        return used >= len(sent)

    await driver.wait(all_used, 30)
    assert used == len(sent)
    assert all(driver.bytes_at(item.status) == b"\0" for item in sent)


async def test_a_file_that_became_shorter(driver: Driver, backend: BlockBackend, tmp_path: Path) -> None:
    """What lies past its end is an I/O error, and the memory of such a read holds nothing of the host's."""
    if not isinstance(backend, FileBlock):
        pytest.skip("needs a file")
    os.truncate(tmp_path / "disk", 64 * 512)
    source = random.Random(1)
    inside, across, outside = (send(driver, source, blk.IN, sector, 8) for sector in (0, 60, 128))
    for item in (across, outside):
        for part in item.data:
            driver.memory.view(*part)[:] = b"\x55" * part[1]
    await finish(driver, [inside, across, outside])
    assert driver.bytes_at(inside.status) == bytes([blk.OK])
    for item in (across, outside):
        assert driver.bytes_at(item.status) == bytes([blk.IOERR])
        assert content(driver, item) == bytes(8 * 512)


async def test_writes_that_the_host_refuses(driver: Driver, backend: BlockBackend, tmp_path: Path) -> None:
    """A descriptor that does not take writes: I/O errors for the guest, and reads go on."""
    if type(backend).__name__ not in ("FileBlock", "Uncached"):
        pytest.skip("needs a file that is written")
    assert isinstance(backend, FileBlock)
    read_only = os.open(tmp_path / "disk", os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if backend.cache == "none" else 0))
    broken = type(backend)(read_only, SECTORS * 512, read_only=False, cache=backend.cache)
    broken.io = backend.io
    other = PciDriver(BlockDevice(broken, queues=QUEUES))
    other.initialize()
    source = random.Random(2)
    before = (tmp_path / "disk").read_bytes()
    wrong = [send(other, source, kind, 8, 8) for kind in (blk.OUT, blk.WRITE_ZEROES)]
    fine = [send(other, source, kind, 8, 8) for kind in (blk.IN, blk.FLUSH, blk.DISCARD)]
    await finish(other, wrong + fine)
    assert [other.bytes_at(item.status) for item in wrong] == [bytes([blk.IOERR])] * 2
    assert [other.bytes_at(item.status) for item in fine] == [bytes([blk.OK])] * 3
    assert (tmp_path / "disk").read_bytes() == before
    other.transport.reset()
    await other.transport.device.aclose()


async def test_reset_at_any_moment(driver: Driver, backend: BlockBackend) -> None:
    """2.4.1: once device status reads 0, the memory of abandoned requests is not touched; the device works again."""
    source = random.Random(4)
    memory = driver.memory
    half = len(memory.bytes) // 2
    untouched = b"\xa5" * (half - HALF_START)
    for turn in range(30):
        start = HALF_START + half * (turn % 2)
        driver.allocator._next = memory.base + start
        sent = [send(driver, source, source.choice((blk.IN, blk.OUT)), 8 * number, 8) for number in range(40)]
        for index in range(QUEUES):
            driver.notify(index)
        if turn % 3:
            await driver.wait(lambda: any(driver.bytes_at(item.status) != b"\xee" for item in sent))  # noqa: B023
        driver.write_status(0)
        await driver.wait(lambda: driver.read_status() == 0)
        memory.bytes[start : start + len(untouched)] = untouched
        if turn:
            other = HALF_START + half * ((turn + 1) % 2)
            assert memory.bytes[other : other + len(untouched)] == untouched
        driver.initialize()
    driver.allocator._next = memory.base + HALF_START
    probe = send(driver, source, blk.IN, 0, 8)
    await finish(driver, [probe])
    assert driver.bytes_at(probe.status) == b"\0"


WRITER = """
import asyncio, struct, sys
from pathlib import Path
from tests.support.engines import open_path
from tests.support.virtio import PciDriver
from virtio.devices.blk import BlockDevice, FLUSH, OUT

async def main():
    driver = PciDriver(BlockDevice(await open_path(sys.argv[1], Path(sys.argv[2]))))
    driver.initialize()
    base, number = driver.allocator._next, 0
    while True:
        driver.allocator._next = base
        statuses = []
        for _ in range(8):
            number += 1
            data = (driver.allocator.take(4096, 4096), 4096)
            driver.memory.view(*data)[:] = b"%08d" % number * 512
            statuses.append(driver.buffer(1))
            driver.submit(0, [driver.buffer(struct.pack("<IIQ", OUT, 0, 8 * (number % 200))), data], [statuses[-1]])
        await driver.used(0, 8)
        await driver.request(0, [struct.pack("<IIQ", FLUSH, 0, 0)], [1])
        print(number, flush=True)

asyncio.run(main())
"""


@pytest.mark.clause("5.2.6.2-h")
@pytest.mark.parametrize(
    "path",
    [name for name in PATHS if not name.endswith(("snapshot", "qcow2", "qcow2uncached")) and name != "coroutines"],
)
async def test_what_was_flushed_survives_kill_9(path: str, tmp_path: Path) -> None:
    """A writer that says up to which record it has flushed is killed at no particular moment."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(SECTORS * 512))
    await (await open_path(path, image)).aclose()  # skips what is not here
    source = random.Random(6)
    for _ in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, path, image, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
        )
        assert process.stdout is not None
        async with asyncio.timeout(60):
            for _ in range(source.randrange(1, 60)):
                flushed = int(await process.stdout.readline())
            process.kill()
            for line in (await process.stdout.read()).splitlines(keepends=True):
                flushed = int(line) if line.endswith(b"\n") else flushed
            await process.wait()
        data = image.read_bytes()
        for number in range(max(1, flushed - 191), flushed + 1):
            at = 4096 * (number % 200)
            found = data[at : at + 4096]
            assert found == b"%08d" % number * 512 or int(found[:8]) > flushed, number
