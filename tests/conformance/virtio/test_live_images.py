"""Changes of a disk beside a driver that goes on: what it reads is what it wrote, before, during and after.

LOOPVISOR_LIVE_ROUNDS is the number of rounds (100: `make soak-images`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Literal

import pytest

from tests.support.qcow2 import our_check
from tests.support.virtio import PciDriver
from virtio import _ring
from virtio.backends import live, mirror, pace
from virtio.backends.image import ImageBlock
from virtio.backends.mirror import CopyTarget
from virtio.backends.pace import JobPace
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.errors import ConfigError, HostError, StateError
from virtio.images.chain import open_chain
from virtio.images.create import create_qcow2

ROUNDS = int(os.environ.get("LOOPVISOR_LIVE_ROUNDS", "2"))
SIZE = 8 << 20


class Guest:
    """A driver that reads and writes at random, several requests at a time, and knows what its disk holds."""

    def __init__(self, driver: PciDriver, model: bytearray, seed: int) -> None:
        self.driver, self.model = driver, model
        self.source = random.Random(seed)
        self.rounds = 0
        self.stop = False

    async def work(self) -> None:
        start = self.driver.allocator._next
        while not self.stop:
            self.driver.allocator._next = start
            await self.round()
            self.rounds += 1

    async def round(self) -> None:
        sent, at = [], self.source.randrange(len(self.model) // 1024)
        for _ in range(6):
            count = self.source.choice((1, 8, 8, 40, 130))
            at += self.source.choice((0, 1, 300))
            if (at + count) * 512 > len(self.model):
                break
            kind = self.source.choice((blk.IN, blk.IN, blk.OUT, blk.OUT, blk.OUT, blk.WRITE_ZEROES))
            sent.append((kind, at, count, *self.send(kind, at, count)))
            at += count
        if not sent:
            return
        await self.driver.used(0, len(sent), timeout=60)
        for kind, at, count, data, status in sent:
            assert self.driver.bytes_at(status) == b"\0", (kind, at, count)
            part = slice(at * 512, (at + count) * 512)
            if kind == blk.IN:
                assert self.driver.bytes_at(data) == self.model[part], (at, count)
            else:
                self.model[part] = bytes(count * 512) if kind == blk.WRITE_ZEROES else self.driver.bytes_at(data)

    def send(self, kind: int, sector: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        driver = self.driver
        status, head = driver.buffer(b"\xee"), driver.buffer(struct.pack("<IIQ", kind, 0, sector))
        if kind == blk.WRITE_ZEROES:
            data = driver.buffer(struct.pack("<QII", sector, count, self.source.randrange(2)))
        else:
            data = (driver.allocator.take(count * 512, 512), count * 512)
        if kind == blk.OUT:
            driver.memory.view(*data)[:] = self.source.randbytes(count * 512)
        if kind == blk.IN:
            driver.submit(0, [head], [data, status])
        else:
            driver.submit(0, [head, data], [status])
        return data, status


KINDS = [
    ("io_uring", {}),
    ("threads", {"cluster_size": 16384, "extended_l2": True}),
    ("auto", {"cluster_size": 1024, "version": 2}),
]


@pytest.fixture(params=KINDS, ids=str)
async def guest(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Guest]:
    """On a qcow2 image over a raw one with holes, which is shorter than the disk."""
    io, options = request.param
    if io == "io_uring" and _ring.BlockEngine.io_uring_error():
        pytest.skip("needs io_uring")
    source = random.Random(1)
    base = source.randbytes(3 << 20) + bytes(2 << 20) + source.randbytes(1 << 20)
    (tmp_path / "base").write_bytes(base)
    create_qcow2(str(tmp_path / "top"), SIZE, backing="base", backing_format="raw", **options)
    backend = await ImageBlock.open_image(tmp_path / "top", format="qcow2", io=io)
    driver = PciDriver(BlockDevice(backend))
    driver.initialize()
    made = Guest(driver, bytearray(base.ljust(SIZE, b"\0")), 2)
    yield made
    driver.transport.reset()
    await driver.transport.device.aclose()


async def beside(guest: Guest, change: Callable[[live.LiveDisk], Awaitable[None]]) -> None:
    """Make a change while the guest works, which it does before and after as well."""
    guest.stop = False
    working = asyncio.create_task(guest.work())
    device = guest.driver.transport.device
    assert isinstance(device, BlockDevice)
    try:

        async def rounds(more: int) -> None:
            end = guest.rounds + more
            while guest.rounds < end and not working.done():
                await asyncio.sleep(0.001)

        await rounds(5)
        if not working.done():
            await change(device)
            await rounds(5)
    finally:
        guest.stop = True
        await working


async def finish(guest: Guest, path: Path, format: Literal["raw", "qcow2"] = "qcow2") -> bytes:
    """Close the disk; what is in the image then, which is consistent."""
    guest.driver.transport.reset()
    await guest.driver.transport.device.aclose()
    if format == "qcow2":
        report = our_check(path)
        assert report.clean, report.problems
    with open_chain(path, format=format, read_only=True) as chain:
        data = bytearray(chain.size)
        chain.image.read(0, data)
    return bytes(data)


async def test_internal_snapshots(guest: Guest, tmp_path: Path) -> None:
    names: list[str] = []
    for number in range(ROUNDS):

        async def change(disk: live.LiveDisk, name: str = f"s{number}") -> None:
            await live.snapshot(disk, name)

        await beside(guest, change)
        names.append(f"s{number}")
        if number % 2:
            await beside(guest, lambda disk: live.delete_snapshot(disk, names.pop(0)))
    assert await finish(guest, tmp_path / "top") == guest.model


async def test_a_snapshot_holds_what_was_there(guest: Guest, tmp_path: Path) -> None:
    """Taken while nothing is in flight, it is the disk of that moment."""
    await beside(guest, lambda disk: asyncio.sleep(0))
    then = bytes(guest.model)
    device = guest.driver.transport.device
    assert isinstance(device, BlockDevice)
    await live.snapshot(device, "then")
    await beside(guest, lambda disk: asyncio.sleep(0.01))
    assert await finish(guest, tmp_path / "top") == guest.model
    with open_chain(tmp_path / "top", format="qcow2", read_only=True, snapshot="then") as chain:
        data = bytearray(chain.size)
        chain.image.read(0, data)
    assert data == then


async def test_stream(guest: Guest, tmp_path: Path) -> None:
    """The image needs its backing file no more, and the file is let go."""
    steps: list[int] = []
    await beside(guest, lambda disk: live.stream(disk, lambda done, total: steps.append(done)))
    assert steps[-1] == SIZE
    (tmp_path / "base").unlink()
    assert await finish(guest, tmp_path / "top") == guest.model
    device = guest.driver.transport.device
    assert isinstance(device, BlockDevice)


async def test_commit(guest: Guest, tmp_path: Path) -> None:
    """What the image held is in the backing file, which is not written any more afterwards."""
    for _ in range(ROUNDS):
        await beside(guest, live.commit)
    quiet = bytes(guest.model)
    device = guest.driver.transport.device
    assert isinstance(device, BlockDevice)
    await live.commit(device)
    assert (tmp_path / "base").read_bytes() == quiet
    await beside(guest, lambda disk: asyncio.sleep(0))
    assert (tmp_path / "base").read_bytes() == quiet
    assert await finish(guest, tmp_path / "top") == guest.model


async def test_covers_committed_again(guest: Guest, tmp_path: Path) -> None:
    """An image over the present one: that one stays as it was; then the new one goes into it."""
    for number in range(ROUNDS):
        path = tmp_path / f"over{number}"
        await beside(guest, lambda disk: live.cover(disk, str(path)))  # noqa: B023
        await beside(guest, live.commit)
    assert await finish(guest, tmp_path / f"over{ROUNDS - 1}") == guest.model


async def test_covers_committed_and_dropped(guest: Guest, tmp_path: Path) -> None:
    """The disk goes on with the backing file; what was above it holds nothing and reads the same."""
    device = guest.driver.transport.device
    assert isinstance(device, BlockDevice)
    backend = device.backend
    assert isinstance(backend, ImageBlock)
    for number in range(2 * ROUNDS):
        path = tmp_path / f"over{number}"
        await beside(guest, lambda disk: live.cover(disk, str(path)))  # noqa: B023
        assert backend.path == path
        with open_chain(tmp_path / "top", read_only=True):
            with pytest.raises(ConfigError, match="used by others"):
                await live.commit(device)
        with pytest.raises(ConfigError, match="in use"):
            open_chain(tmp_path / "top")
        await beside(guest, lambda disk: live.commit(disk, drop=True))
        assert backend.path == tmp_path / "top" == Path(backend.chain.top.path)
        with open_chain(path, alone=True, read_only=True) as alone:
            assert {kind for _, kind, _, _ in alone.image.map(0, SIZE)} == {"hole"}
    assert await finish(guest, tmp_path / "top") == guest.model


@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_mirror(guest: Guest, tmp_path: Path, format: Literal["raw", "qcow2"]) -> None:
    """From one file to the next under writes; each old file is whole at the switch, and free afterwards."""
    before = tmp_path / "top"
    for number in range(ROUNDS):
        steps: list[tuple[int, int]] = []
        path = tmp_path / f"mirror{number}"
        into = CopyTarget(str(path), format)
        await beside(guest, lambda disk: mirror.mirror(disk, into, lambda *at: steps.append(at)))  # noqa: B023
        assert steps[-1] == (SIZE, SIZE)
        with open_chain(before, read_only=False):
            pass
        before = path
    assert await finish(guest, before, format) == guest.model


async def test_a_mirror_follows_until_it_is_told_to_switch(guest: Guest, tmp_path: Path) -> None:
    async def wait(disk: live.LiveDisk) -> None:
        switch = mirror.Changeover(now=False)
        task = asyncio.create_task(mirror.mirror(disk, CopyTarget(str(tmp_path / "m"), "raw"), switch=switch))
        await asyncio.wait_for(switch.ready.wait(), 60)
        rounds = guest.rounds
        while guest.rounds < rounds + 20:
            await asyncio.sleep(0)
        assert not task.done() and disk.backend.path == tmp_path / "top"
        switch.wanted.set()
        await task
        assert disk.backend.path == tmp_path / "m"

    await beside(guest, wait)
    assert await finish(guest, tmp_path / "m", "raw") == guest.model


async def test_a_shallow_mirror_shares_the_backing_file(guest: Guest, tmp_path: Path) -> None:
    new, made_before = tmp_path / "shallow", tmp_path / "there"
    await beside(guest, lambda disk: mirror.mirror(disk, CopyTarget(str(new), shallow=True)))
    create_qcow2(str(made_before), SIZE, backing="base", backing_format="raw")
    await beside(guest, lambda disk: mirror.mirror(disk, CopyTarget(str(made_before), shallow=True, there=True)))
    for path in (new, made_before):
        with open_chain(path, read_only=True, active=False) as chain:
            assert [layer.path for layer in chain.layers][1:] == [str(tmp_path / "base")]

    async def refused(disk: live.LiveDisk) -> None:
        with pytest.raises(ConfigError, match="no backing file"):
            await mirror.mirror(disk, CopyTarget(str(tmp_path / "raw"), "raw", shallow=True))
        assert not (tmp_path / "raw").exists()

    await beside(guest, refused)
    assert await finish(guest, made_before) == guest.model


async def test_a_mirror_into_an_image_that_is_there(guest: Guest, tmp_path: Path) -> None:
    path, small = tmp_path / "there", tmp_path / "small"
    path.write_bytes(random.Random(5).randbytes(SIZE))  # of which nothing may be left
    small.write_bytes(bytes(SIZE // 2))

    async def refused(disk: live.LiveDisk) -> None:
        for target, why in ((small, "has .* bytes, and the disk"), (tmp_path / "absent", "is not there")):
            with pytest.raises(ConfigError, match=why):
                await mirror.mirror(disk, CopyTarget(str(target), "raw", there=True))
        assert small.stat().st_size == SIZE // 2

    await beside(guest, refused)
    await beside(guest, lambda disk: mirror.mirror(disk, CopyTarget(str(path), "raw", there=True)))
    assert await finish(guest, path, "raw") == guest.model


async def test_a_mirror_that_ends_apart_is_a_copy_of_that_moment(guest: Guest, tmp_path: Path) -> None:
    switch = mirror.Changeover(now=False)

    async def ready(disk: live.LiveDisk) -> asyncio.Task[None]:
        task = asyncio.create_task(mirror.mirror(disk, CopyTarget(str(tmp_path / "m"), "raw"), switch=switch))
        await asyncio.wait_for(switch.ready.wait(), 60)
        return task

    copying: list[asyncio.Task[None]] = []

    async def followed(disk: live.LiveDisk) -> None:
        copying.append(await ready(disk))

    await beside(guest, followed)
    switch.apart = True  # the guest is idle, so there is a moment to compare with
    switch.wanted.set()
    await copying[0]
    moment = bytes(guest.model)

    async def goes_on(disk: live.LiveDisk) -> None:
        assert disk.backend.path == tmp_path / "top"

    await beside(guest, goes_on)
    assert (tmp_path / "m").read_bytes() == moment != guest.model
    with open_chain(tmp_path / "m", format="raw", read_only=False):
        pass  # nobody holds it
    assert await finish(guest, tmp_path / "top") == guest.model


async def test_a_job_goes_as_fast_as_it_may(guest: Guest, tmp_path: Path) -> None:
    async def slow(disk: live.LiveDisk) -> None:
        for work in (
            lambda tell, speed: live.stream(disk, tell, speed),
            lambda tell, speed: mirror.mirror(disk, CopyTarget(str(tmp_path / "m")), tell, pace=speed),
        ):
            told: list[int] = []
            begun = asyncio.Event()

            def tell(done: int, _: int) -> None:
                told.append(done)  # noqa: B023
                begun.set()  # noqa: B023

            speed = JobPace(1)  # one step of it takes most of a day
            task = asyncio.create_task(work(tell, speed))
            await asyncio.wait_for(begun.wait(), 60)
            assert not task.done() and told[-1] < SIZE
            speed.speed = 0
            await asyncio.wait_for(task, 60)

    await beside(guest, slow)
    assert await finish(guest, tmp_path / "m") == guest.model


async def test_a_mirror_that_ends_early_leaves_the_disk_as_it_was(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "STEP", 1 << 20)
    path = tmp_path / "m"

    async def cancelled(disk: live.LiveDisk) -> None:
        for switch in (mirror.Changeover(), mirror.Changeover(now=False)):
            seen = asyncio.Event()
            task = asyncio.create_task(mirror.mirror(disk, CopyTarget(str(path)), lambda *_: seen.set(), switch))  # noqa: B023
            await asyncio.wait([asyncio.ensure_future(seen.wait()), task], return_when=asyncio.FIRST_COMPLETED)
            if not switch.wanted.is_set():
                await asyncio.wait_for(switch.ready.wait(), 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not path.exists()

    await beside(guest, cancelled)

    async def failing(disk: live.LiveDisk) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        with monkeypatch.context() as patch:
            patch.setattr(mirror._Copy, "_move", full)
            with pytest.raises(HostError, match="No space|no space"):
                await mirror.mirror(disk, CopyTarget(str(path)))
        assert not path.exists()
        (tmp_path / "there").write_bytes(b"mine")
        with pytest.raises(ConfigError, match="is there already"):
            await mirror.mirror(disk, CopyTarget(str(tmp_path / "there")))
        with pytest.raises((ConfigError, HostError), match="no-such-directory"):
            await mirror.mirror(disk, CopyTarget(str(tmp_path / "no-such-directory" / "m")))

    await beside(guest, failing)
    assert (tmp_path / "there").read_bytes() == b"mine"
    assert await finish(guest, tmp_path / "top") == guest.model


async def test_resize(guest: Guest, tmp_path: Path) -> None:
    for _ in range(ROUNDS):
        size = len(guest.model) + (5 << 20)
        await beside(guest, lambda disk: live.resize(disk, size))  # noqa: B023
        guest.model.extend(bytes(5 << 20))
        assert struct.unpack("<Q", guest.driver.transport.device.config()[:8])[0] == size // 512
        await beside(guest, lambda disk: asyncio.sleep(0))
    assert await finish(guest, tmp_path / "top") == guest.model


async def test_cancelled_in_the_middle(guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream and a commit that are cancelled leave the disk right, and can be begun again."""
    monkeypatch.setattr(pace, "STEP", 1 << 20)
    for call in (live.stream, live.commit):

        async def some(disk: live.LiveDisk) -> None:
            seen = asyncio.Event()
            task = asyncio.create_task(call(disk, lambda *_: seen.set()))  # type: ignore[operator]  # noqa: B023
            await asyncio.wait([asyncio.ensure_future(seen.wait()), task], return_when=asyncio.FIRST_COMPLETED)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        await beside(guest, some)
    await beside(guest, live.stream)
    assert await finish(guest, tmp_path / "top") == guest.model


async def test_cancelled_at_any_moment(guest: Guest, tmp_path: Path) -> None:
    """Also while images are exchanged: the disk is right, and what is done next succeeds."""
    device = guest.driver.transport.device
    assert isinstance(device, BlockDevice)
    backend = device.backend
    assert isinstance(backend, ImageBlock)
    source = random.Random(3)

    async def some(disk: live.LiveDisk) -> None:
        for number in range(16 * ROUNDS):
            path, depth = str(tmp_path / f"new{number}"), len(backend.chain.layers)
            match source.choice("CM" if depth == 1 else "D" if depth > 4 else "CCDDM"):
                case "C":
                    work = live.cover(disk, path)
                case "D":
                    work = live.commit(disk, drop=True)
                case _:
                    work = mirror.mirror(device, CopyTarget(path, source.choice(("raw", "qcow2"))))
            task = asyncio.ensure_future(work)
            await asyncio.wait([task], timeout=source.choice((0.0, 0.001, 0.004, 0.02, 5)))
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()
            assert [layer.read_only for layer in backend.chain.layers[:2]] in ([False], [False, True])

    await beside(guest, some)
    top = backend.chain.top
    assert await finish(guest, Path(top.path), top.format) == guest.model


async def test_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(SIZE))
    device = BlockDevice(await ImageBlock.open_image(tmp_path / "raw", format="raw"))
    for call in (live.stream, live.commit):
        with pytest.raises(ConfigError, match="raw"):
            await call(device)
    with pytest.raises(ConfigError, match="raw"):
        await live.snapshot(device, "x")
    with pytest.raises(ConfigError, match="only grows"):
        await live.resize(device, SIZE // 2)
    await live.resize(device, 2 * SIZE)
    assert device.capacity == 2 * SIZE
    await device.aclose()
    device = BlockDevice(await ImageBlock.open_image(tmp_path / "raw", snapshot=True))
    with pytest.raises(StateError, match="snapshot disk"):
        await live.resize(device, 4 * SIZE)
    await device.aclose()
