"""Block device: requests over both paths (5.2.6), options, reset and state."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from virtio import _ring
from virtio.backends.block import BlockBackend, MemoryBlock
from virtio.backends.file import FileBlock, SnapshotBlock
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.errors import ConfigError, HostError, StateError

from .conftest import Connect

SECTORS = 256
Make = Any


def image(path: Path) -> bytes:
    content = b"".join(bytes([i & 0xFF]) * 512 for i in range(SECTORS))
    path.write_bytes(content)
    return content


@pytest.fixture(params=["engine", "snapshot", "coroutines"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlockBackend]:
    content = image(tmp_path / "disk")
    if request.param == "engine":
        yield await FileBlock.open(tmp_path / "disk")
    elif request.param == "snapshot":
        yield await SnapshotBlock.open(tmp_path / "disk")
        assert (tmp_path / "disk").read_bytes() == content
    else:
        memory = MemoryBlock(SECTORS * 512)
        memory.data[:] = content
        yield memory


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


async def transfer(driver: Any, kind: int, sector: int, payload: bytes = b"", space: int = 0) -> tuple[int, bytes]:
    readable = [header(kind, sector)] + ([payload] if payload else [])
    answer = await driver.request(0, readable, ([space] if space else []) + [1])
    return answer[-1], answer[:-1]


async def test_read_write_flush(connect: Connect, backend: BlockBackend) -> None:
    driver = connect(BlockDevice(backend))
    driver.initialize()
    assert await transfer(driver, blk.IN, 3, space=1024) == (blk.OK, b"\3" * 512 + b"\4" * 512)
    assert await transfer(driver, blk.OUT, 4, b"new!" * 128) == (blk.OK, b"")
    assert await transfer(driver, blk.FLUSH, 0) == (blk.OK, b"")
    assert await transfer(driver, blk.IN, 3, space=1024) == (blk.OK, b"\3" * 512 + b"new!" * 128)
    assert await transfer(driver, blk.IN, SECTORS - 1, space=512) == (blk.OK, b"\xff" * 512)


@pytest.mark.clause("2.7.4.1-a")
async def test_any_layout_of_a_request(connect: Connect, backend: BlockBackend) -> None:
    """2.7.4.1: "The device MUST NOT make assumptions about the particular arrangement of descriptors"."""
    driver = connect(BlockDevice(backend))
    driver.initialize()
    whole = header(blk.OUT, 9) + b"a" * 512
    answer = await driver.request(0, [whole[:3], whole[3:17], whole[17:]], [1])
    assert answer == b"\0"
    head = header(blk.IN, 9)
    answer = await driver.request(0, [head[:10], head[10:]], [100, 300, 113])
    assert answer == b"a" * 512 + b"\0"
    answer = await driver.request(0, [head], [512, 1], indirect=True)
    assert answer == b"a" * 512 + b"\0"


async def test_requests_outside_the_disk_are_io_errors(connect: Connect, backend: BlockBackend) -> None:
    driver = connect(BlockDevice(backend))
    driver.initialize()
    for sector, length in (
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (2**64 - 1, 512),
        (2**55, 512),
        (0, 100),
        (0, 0),
    ):
        status, _ = await transfer(driver, blk.IN, sector, space=length)
        assert status == blk.IOERR
        status, _ = await transfer(driver, blk.OUT, sector, bytes(length))
        assert status == blk.IOERR
    assert (await transfer(driver, 99, 0, space=512))[0] == blk.UNSUPP
    assert (await transfer(driver, blk.IN, 0, space=512))[0] == blk.OK, "the device lives"


async def test_get_id(connect: Connect, backend: BlockBackend) -> None:
    driver = connect(BlockDevice(backend, serial="disk-0"))
    driver.initialize()
    assert await transfer(driver, blk.GET_ID, 0, space=20) == (blk.OK, b"disk-0".ljust(20, b"\0"))
    assert (await transfer(driver, blk.GET_ID, 0, space=19))[0] == blk.IOERR


@pytest.mark.clause("5.2.6.2-c", "5.2.6.2-d", "5.2.6.2-e")
async def test_discard_and_write_zeroes(connect: Connect, backend: BlockBackend) -> None:
    """5.2.6.2: flags and bounds."""
    driver = connect(BlockDevice(backend))
    driver.initialize()

    async def zeroes(kind: int, *entries: tuple[int, int, int]) -> int:
        return (await transfer(driver, kind, 0, b"".join(struct.pack("<QII", *entry) for entry in entries)))[0]

    assert await zeroes(blk.WRITE_ZEROES, (1, 2, 0), (8, 1, 1)) == blk.OK
    _, data = await transfer(driver, blk.IN, 0, space=512 * 10)
    assert [data[512 * i] for i in range(10)] == [0, 0, 0, 3, 4, 5, 6, 7, 0, 9]
    assert await zeroes(blk.DISCARD, (20, 8, 0)) == blk.OK
    assert await zeroes(blk.DISCARD, (20, 8, 1)) == blk.UNSUPP
    assert await zeroes(blk.DISCARD, (20, 8, 2)) == blk.UNSUPP
    assert await zeroes(blk.WRITE_ZEROES, (20, 8, 4)) == blk.UNSUPP
    assert await zeroes(blk.WRITE_ZEROES, (SECTORS - 1, 2, 0)) == blk.IOERR
    assert await zeroes(blk.WRITE_ZEROES, (2**64 - 1, 2, 0)) == blk.IOERR
    assert await zeroes(blk.WRITE_ZEROES, (0, 2**32 - 1, 0)) == blk.IOERR
    assert await zeroes(blk.DISCARD, *[(0, 1, 0)] * 33) == blk.IOERR
    assert (await transfer(driver, blk.DISCARD, 0, b"short"))[0] == blk.IOERR
    assert await zeroes(blk.WRITE_ZEROES, (5, 0, 0)) == blk.OK


async def test_discard_needs_its_feature(connect: Connect, backend: BlockBackend) -> None:
    driver = connect(BlockDevice(backend))
    driver.initialize(~(blk.BlockFeature.DISCARD | blk.BlockFeature.WRITE_ZEROES))
    for kind in (blk.DISCARD, blk.WRITE_ZEROES):
        assert (await transfer(driver, kind, 0, struct.pack("<QII", 0, 1, 0)))[0] == blk.UNSUPP


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.clause("5.2.6.2-a", "5.2.6.2-b")
async def test_read_only(connect: Connect, native: bool, tmp_path: Path) -> None:
    """5.2.6.2: "MUST set the status byte to VIRTIO_BLK_S_IOERR for a write request if ...
    VIRTIO_BLK_F_RO"."""
    content = image(tmp_path / "disk")
    backend: BlockBackend
    if native:
        backend = await FileBlock.open(tmp_path / "disk", read_only=True)
    else:
        backend = MemoryBlock(SECTORS * 512, read_only=True)
    driver = connect(BlockDevice(backend))
    driver.initialize()
    assert driver.read_features() & blk.BlockFeature.RO
    assert (await transfer(driver, blk.OUT, 0, b"x" * 512))[0] == blk.IOERR
    assert (await transfer(driver, blk.IN, 0, space=512))[0] == blk.OK
    assert (tmp_path / "disk").read_bytes() == content


@pytest.mark.parametrize(("readable", "writable"), [([b"x" * 15], [513]), ([header(0)], []), ([], [513])])
async def test_a_request_without_its_parts_needs_a_reset(
    connect: Connect, backend: BlockBackend, readable: list[bytes], writable: list[int]
) -> None:
    driver = connect(BlockDevice(backend))
    driver.initialize()
    driver.submit(0, [driver.buffer(data) for data in readable], [driver.buffer(size) for size in writable])
    assert driver.needs_reset
    driver.initialize()
    assert (await transfer(driver, blk.IN, 0, space=512))[0] == blk.OK


async def test_many_requests_in_flight_on_several_queues(connect: Connect, tmp_path: Path) -> None:
    image(tmp_path / "disk")
    driver = connect(BlockDevice(await FileBlock.open(tmp_path / "disk"), queues=3, queue_size=64))
    driver.initialize()
    assert driver.config_read(34, 2) == 3
    expected = []
    for turn in range(4):
        for index in range(3):
            for slot in range(16):
                data = driver.buffer(bytes([turn * 48 + index * 16 + slot]) * 512)
                sector = turn * 48 + index * 16 + slot
                expected.append(driver.bytes_at(data))
                status = driver.buffer(1)
                driver.submit(index, [driver.buffer(header(blk.OUT, sector)), data], [status])
        for index in range(3):
            assert len(await driver.used(index, 16)) == 16
    assert (tmp_path / "disk").read_bytes()[: 192 * 512] == b"".join(expected)


@pytest.mark.clause("5.2.5.2-a", "5.2.5.2-c")
async def test_configuration_space(connect: Connect, backend: BlockBackend) -> None:
    """5.2.4"""
    driver = connect(BlockDevice(backend))
    driver.initialize()
    assert driver.features & blk.BlockFeature.CONFIG_WCE and driver.features & blk.BlockFeature.FLUSH
    assert driver.config_read(33, 1) == 0 and [driver.config_read(at, 1) for at in (57, 58, 59)] == [0, 0, 0]
    assert driver.config_read(0, 8) == SECTORS
    assert driver.config_read(12, 4) == 254, "seg_max leaves room for header and status"
    assert driver.config_read(20, 4) == 512
    topology = [driver.config_read(offset, size) for offset, size in ((24, 1), (25, 1), (26, 2), (28, 4))]
    assert topology == [3, 0, 8, 0], "blocks of 2**3 sectors, aligned, and 8 of them at least; no best size"
    assert driver.config_read(32, 1) == 1
    driver.config_write(32, 1, 0)
    assert driver.config_read(32, 1) == 0
    driver.config_write(0, 4, 7)
    assert driver.config_read(0, 8) == SECTORS
    assert (await transfer(driver, blk.OUT, 0, b"x" * 512))[0] == blk.OK
    if isinstance(backend, MemoryBlock):
        assert backend.flushes == 1, "write-through"


@pytest.mark.clause("5.2.5.2-b")
async def test_writeback_needs_flush(connect: Connect, backend: BlockBackend) -> None:
    """5.2.5.2: it starts as 0, for as long as the driver does without; it can be read from FEATURES_OK on."""
    driver = connect(BlockDevice(backend))
    for wanted, expected in ((~blk.BlockFeature.FLUSH, 0), (-1, 1), (~blk.BlockFeature.FLUSH, 0)):
        driver.initialize(wanted, go=False)
        assert driver.config_read(32, 1) == expected


@pytest.mark.parametrize("case", ["neither", "writethrough", "flush"])
@pytest.mark.clause("5.2.6.2-f", "5.2.6.2-g", "5.2.6.2-h")
async def test_what_is_stable_was_flushed(connect: Connect, case: str) -> None:
    """5.2.6.2, over the coroutines: a write that is to be stable completes after the backend's flush."""
    backend = MemoryBlock(SECTORS * 512)
    driver = connect(BlockDevice(backend))
    driver.initialize(~(blk.BlockFeature.FLUSH | blk.BlockFeature.CONFIG_WCE) if case == "neither" else -1)
    if case == "writethrough":
        driver.config_write(32, 1, 0)
    assert await transfer(driver, blk.OUT, 1, b"w" * 512) == (blk.OK, b"")
    assert backend.flushes == (0 if case == "flush" else 1)
    assert await transfer(driver, blk.FLUSH, 0) == (blk.OK, b"")
    assert backend.flushes == (1 if case == "flush" else 2)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device of the host's whose requests are counted."""
    image(tmp_path / "loop.img")
    made = subprocess.run(["losetup", "-f", "--show", tmp_path / "loop.img"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


@pytest.mark.root
@pytest.mark.skipif(shutil.which("losetup") is None, reason="losetup is not installed")
@pytest.mark.parametrize("case", ["neither", "writethrough", "flush"])
@pytest.mark.clause("5.2.6.2-f", "5.2.6.2-g", "5.2.6.2-h")
async def test_what_is_stable_has_left_the_host(connect: Connect, loop_device: Path, case: str) -> None:
    """5.2.6.2, over a descriptor: the host's disk has the write and a flush when the request completes."""

    def counted() -> tuple[int, int]:
        """Writes and flushes that the disk completed (Documentation/block/stat.rst of the kernel)."""
        fields = Path("/sys/block", loop_device.name, "stat").read_text().split()
        return int(fields[4]), int(fields[15])

    driver = connect(BlockDevice(await FileBlock.open(loop_device)))
    driver.initialize(~(blk.BlockFeature.FLUSH | blk.BlockFeature.CONFIG_WCE) if case == "neither" else -1)
    if case == "writethrough":
        driver.config_write(32, 1, 0)
    before = counted()
    assert await transfer(driver, blk.OUT, 1, b"w" * 512) == (blk.OK, b"")
    written = counted()
    if case == "flush":
        assert written == before, "in the page cache"
        assert await transfer(driver, blk.FLUSH, 0) == (blk.OK, b"")
        written = counted()
    assert written[0] > before[0] and written[1] > before[1]


async def test_growing_is_notified(connect: Connect) -> None:
    backend = MemoryBlock(512)
    device = BlockDevice(backend)
    driver = connect(device)
    driver.initialize()
    backend.data += bytes(512)
    backend.capacity = 1024
    device.resized()
    assert driver.interrupted.is_set()
    assert driver.config_read(0, 8) == 2
    assert (await transfer(driver, blk.IN, 1, space=512))[0] == blk.OK


class Failing(MemoryBlock):
    async def read(self, offset: int, length: int) -> bytes:
        raise OSError("the disk is on fire")

    async def flush(self) -> None:
        raise HostError("gone")


async def test_a_host_fault_is_an_io_error(connect: Connect) -> None:
    driver = connect(BlockDevice(Failing(512)))
    driver.initialize()
    assert (await transfer(driver, blk.IN, 0, space=512))[0] == blk.IOERR
    assert (await transfer(driver, blk.FLUSH, 0))[0] == blk.IOERR
    assert (await transfer(driver, blk.OUT, 0, bytes(512)))[0] == blk.OK


async def test_a_truncated_image_is_an_io_error(connect: Connect, tmp_path: Path) -> None:
    image(tmp_path / "disk")
    driver = connect(BlockDevice(await FileBlock.open(tmp_path / "disk")))
    driver.initialize()
    os.truncate(tmp_path / "disk", 512)
    assert await transfer(driver, blk.IN, 0, space=1024) == (blk.IOERR, bytes(1024))


class Slow(MemoryBlock):
    """Answers when told to."""

    def __init__(self) -> None:
        super().__init__(SECTORS * 512)
        self.go = asyncio.Event()
        self.waiting = 0

    async def read(self, offset: int, length: int) -> bytes:
        self.waiting += 1
        await self.go.wait()
        return b"z" * length


async def test_reset_with_requests_in_flight(connect: Connect) -> None:
    """2.4.1; the memory of abandoned requests is not touched again."""
    backend = Slow()
    driver = connect(BlockDevice(backend))
    driver.initialize()
    rooms = [driver.buffer(512) for _ in range(4)]
    for room in rooms:
        driver.submit(0, [driver.buffer(header(blk.IN, 0))], [room, driver.buffer(1)])
    await driver.wait(lambda: backend.waiting == 4)
    driver.write_status(0)
    assert driver.read_status() == 0
    backend.go.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(driver.bytes_at(room) == bytes(512) for room in rooms)
    driver.initialize()
    assert (await transfer(driver, blk.IN, 0, space=512))[0] == blk.OK


async def test_reset_of_the_engine_with_requests_in_flight(connect: Connect, tmp_path: Path) -> None:
    image(tmp_path / "disk")
    driver = connect(BlockDevice(await FileBlock.open(tmp_path / "disk")))
    for _ in range(20):
        driver.initialize()
        for sector in range(16):
            request = [driver.buffer(header(blk.OUT, 2 * sector)), driver.buffer(b"n" * 512)]
            driver.submit(0, request, [driver.buffer(1)])
        driver.write_status(0)
        await driver.wait(lambda: driver.read_status() == 0)
        before = bytes(driver.memory.bytes)
        await asyncio.sleep(0)
        assert bytes(driver.memory.bytes) == before
    driver.initialize()
    assert (await transfer(driver, blk.IN, 1, space=512)) == (blk.OK, b"\1" * 512)


async def test_save_drains_what_is_in_flight(connect: Connect) -> None:
    backend = Slow()
    driver = connect(BlockDevice(backend))
    driver.initialize()
    room = driver.buffer(512)
    driver.submit(0, [driver.buffer(header(blk.IN, 0))], [room, driver.buffer(1)])
    await driver.wait(lambda: backend.waiting)
    quiesced = asyncio.ensure_future(driver.transport.quiesce())
    await asyncio.sleep(0)
    assert not quiesced.done()
    backend.go.set()
    await quiesced
    assert driver.bytes_at(room) == b"z" * 512
    state = driver.transport.save()
    other = connect(BlockDevice(MemoryBlock(SECTORS * 512)))
    other.memory.bytes[:] = driver.memory.bytes
    other.transport.restore(state)
    other.adopt(driver)
    other.transport.resume()
    assert len(await other.used(0)) == 1
    assert (await transfer(other, blk.IN, 0, space=512))[0] == blk.OK
    with pytest.raises(StateError):
        connect(BlockDevice(MemoryBlock(512))).transport.restore(state)


async def test_the_engine_drains_for_save(connect: Connect, backend: BlockBackend) -> None:
    driver = connect(BlockDevice(backend))
    driver.initialize()
    for sector in range(32):
        request = [driver.buffer(header(blk.OUT, 2 * sector)), driver.buffer(b"n" * 512)]
        driver.submit(0, request, [driver.buffer(1)])
    await asyncio.wait_for(driver.transport.quiesce(), 10)
    driver.transport.save()
    assert len(driver.queues[0].used()) == 32


@pytest.mark.parametrize("kind", [blk.IN, blk.OUT])
@pytest.mark.parametrize("engine", ["io_uring", "threads", "coroutines"])
async def test_the_loop_does_not_wait_for_a_huge_request(
    connect: Connect, tmp_path: Path, engine: Any, kind: int
) -> None:
    """The same MiB many times over in one request, of a disk that the page cache holds."""
    length = 64 << 20
    (tmp_path / "disk").write_bytes(bytes(length))
    backend: BlockBackend
    if engine == "coroutines":
        backend = MemoryBlock(length)
    else:
        if engine == "io_uring" and _ring.BlockEngine.io_uring_error():
            pytest.skip("no io_uring here")
        backend = await FileBlock.open(tmp_path / "disk", io=engine)
    driver = connect(BlockDevice(backend))
    driver.initialize()
    data, status = [driver.buffer(1 << 20)] * 64, driver.buffer(b"\xff")
    request = driver.buffer(header(kind))
    if kind == blk.IN:
        driver.submit(0, [request], [*data, status], indirect=True)
    else:
        driver.submit(0, [request, *data], [status], indirect=True)
    for _ in range(3 if engine == "coroutines" else 1):
        assert not driver.queues[0].used()
        await asyncio.sleep(0)
    await driver.used(0)
    assert driver.bytes_at(status) == b"\0"


async def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        await FileBlock.open(tmp_path / "none")
    with pytest.raises(ConfigError):
        await FileBlock.open(tmp_path)
    (tmp_path / "small").write_bytes(b"x")
    with pytest.raises(ConfigError, match="smaller"):
        await FileBlock.open(tmp_path / "small")
    image(tmp_path / "disk")
    with pytest.raises(ConfigError, match="cache"):
        await FileBlock.open(tmp_path / "disk", cache="unsafe")  # type: ignore[arg-type]
    first = await FileBlock.open(tmp_path / "disk")
    with pytest.raises(ConfigError, match="in use"):
        await FileBlock.open(tmp_path / "disk")
    await first.aclose()
    for mode in ("writeback", "writethrough"):
        again = await FileBlock.open(tmp_path / "disk", cache=mode)  # type: ignore[arg-type]
        await again.aclose()


async def test_cache_none_is_o_direct(connect: Connect) -> None:
    """On a file system that has it; guest buffers need no alignment."""
    path = Path.cwd() / f".o-direct-{os.getpid()}"
    image(path)
    try:
        try:
            backend = await FileBlock.open(path, cache="none")
        except ConfigError as error:
            pytest.skip(str(error))
        driver = connect(BlockDevice(backend))
        driver.initialize()
        size = backend.block_size
        driver.allocator.take(3, 1)
        assert (await transfer(driver, blk.OUT, 8, b"d" * size))[0] == blk.OK
        answer = await driver.request(0, [header(blk.IN, 8)], [100, size - 100, 1])
        assert answer == b"d" * size + b"\0"
    finally:
        path.unlink()
