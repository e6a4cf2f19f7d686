"""The requests of a share that the vCPU's own thread answers: which, when not, and how that ends."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.answering import reads_at_once
from tests.support.fuse import HIPRIO, REQUESTS, FuseDriver, share
from tests.support.vcpu import VcpuDriver
from virtio.devices.fs import FsDevice
from virtio.fs import messages as m
from virtio.fs.messages import ROOT_ID, Opcode

LOCAL = {"ext2/ext3", "xfs", "btrfs", "f2fs", "tmpfs", "overlayfs"}
"""File systems that wait for no other machine, as virtio/native/fs_nodes.c knows them, by the names of stat(1)."""


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A folder of which a vCPU's thread may answer requests."""
    found = subprocess.run(
        ["stat", "-f", "-c", "%T", tmp_path], check=True, capture_output=True, text=True
    ).stdout.strip()
    if found not in LOCAL:
        pytest.skip(f"{tmp_path} is on a file system that may be another machine's: {found}")
    return tmp_path


@pytest.fixture
async def fuse(local: Path) -> AsyncIterator[FuseDriver]:
    driver = await share(local, kind=VcpuDriver)
    assert vcpu(driver).answered, "the vCPU's thread has taken nothing"
    yield driver
    await driver.driver.transport.device.aclose()
    vcpu(driver).close()


def vcpu(fuse: FuseDriver) -> VcpuDriver:
    assert isinstance(fuse.driver, VcpuDriver)
    return fuse.driver


def device(fuse: FuseDriver) -> FsDevice:
    return cast("FsDevice", fuse.driver.transport.device)


async def left_to_others(fuse: FuseDriver, opcode: int, node: int, body: bytes, room: int = 4096) -> bytes:
    """What is answered, if not by the vCPU's thread: the loop interrupts then."""
    before = len(vcpu(fuse).host.messages)
    reply = await fuse.ask(opcode, node, body, room)
    assert len(vcpu(fuse).host.messages) == before + 1, f"{Opcode(opcode).name} was answered by the vCPU's thread"
    return reply


async def test_the_vcpu_answers_what_is_quick(fuse: FuseDriver, tmp_path: Path) -> None:
    loop, left = len(vcpu(fuse).host.messages), vcpu(fuse).left
    if not reads_at_once(tmp_path):
        loop += 1  # the one read is the pool's
    entry, handle = await fuse.create("new", mode=0o640)
    assert await fuse.write(entry.nodeid, handle, b"content") == 7
    assert await fuse.read(entry.nodeid, handle, 4096) == b"content"
    await fuse.setattr(entry.nodeid, 1, mode=0o4600)
    await fuse.release(entry.nodeid, handle)
    assert (await fuse.lookup("new")).nodeid == entry.nodeid
    await fuse.mkdir("folder")
    await fuse.remove("new")
    await fuse.forget(entry.nodeid, 2)
    await fuse.refused(errno.ENOENT, Opcode.LOOKUP, ROOT_ID, b"new\0")
    assert sorted(os.listdir(tmp_path)) == ["folder"]
    assert len(vcpu(fuse).host.messages) == loop and vcpu(fuse).left == left, "the loop had a part in it"
    assert await vcpu(fuse).wait(lambda: vcpu(fuse).direct)
    counters = device(fuse).counters
    assert counters["bytes_written"] == counters["bytes_read"] == 7 and counters["requests"] > 10


def test_both_packages_declare_the_same_answerer() -> None:
    root = Path(__file__).parents[3]
    one, two = ((root / package / "native/answerer.h").read_text().split("#ifndef")[1] for package in ("cpu", "virtio"))
    assert one == two


async def test_the_umask_of_the_vcpus_thread_is_its_own(fuse: FuseDriver, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        await fuse.create("open", mode=0o666)
        assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o666
        (tmp_path / "host").touch()
        assert stat.S_IMODE((tmp_path / "host").stat().st_mode) == 0o600
    finally:
        os.umask(before)


async def test_what_may_take_long_is_left_to_the_devices_threads(fuse: FuseDriver, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    (tmp_path / "cold").write_bytes(b"x" * 8192)
    node, cold = (await fuse.lookup("large")).nodeid, (await fuse.lookup("cold")).nodeid
    handle, folder = await fuse.open(node, os.O_RDWR), await fuse.opendir()
    await left_to_others(fuse, Opcode.READ, node, fuse.read_body(handle, 1 << 20, 0), 1 << 20)
    await left_to_others(fuse, Opcode.READDIRPLUS, ROOT_ID, fuse.read_body(folder, 4096, 0))
    await left_to_others(fuse, Opcode.FSYNC, node, m.FsyncIn.build({"fh": handle, "flags": 0, "padding": 0}))
    names = [one.name for one in m.SetattrIn.subcons]
    shorter = m.SetattrIn.build(dict.fromkeys(names, 0) | {"valid": 8, "size": 10})
    await left_to_others(fuse, Opcode.SETATTR, node, shorter)
    await left_to_others(fuse, Opcode.OPEN, node, m.OpenIn.build({"flags": os.O_TRUNC | os.O_WRONLY, "open_flags": 0}))
    reader = await fuse.open(cold)
    with (tmp_path / "cold").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert await fuse.read(cold, reader, 8192) == b"x" * 8192, "what the page cache had not is read all the same"
    assert await fuse.read(cold, reader, 8192, 8000) == b"x" * 192


async def test_masked_interrupts_are_the_loops(fuse: FuseDriver) -> None:
    driver = vcpu(fuse)
    driver.host.masked = True
    driver.pci.messages_changed()
    before, left = len(driver.host.messages), driver.left
    await fuse.getattr(ROOT_ID)
    assert len(driver.host.messages) == before + 1 and driver.left == left + 1
    driver.host.masked = False
    driver.pci.messages_changed()
    await fuse.getattr(ROOT_ID)
    assert len(driver.host.messages) == before + 1


async def test_nothing_is_answered_while_paused_or_after_a_reset(fuse: FuseDriver) -> None:
    driver = vcpu(fuse)
    await driver.transport.quiesce()
    state = device(fuse).save_device()
    left, answered = driver.left, driver.answered
    space = driver.buffer(120)
    body = m.GetattrIn.build({"flags": 0, "dummy": 0, "fh": 0})
    driver.submit(REQUESTS, [driver.buffer(fuse.message(Opcode.GETATTR, ROOT_ID, body))], [space])
    assert driver.left == left + 1 and driver.answered == answered
    assert not list(driver.queues[REQUESTS].used())
    driver.transport.resume()
    await driver.used(REQUESTS)
    assert device(fuse).save_device() == state
    await fuse.getattr(ROOT_ID)
    assert driver.answered == answered + 1
    driver.write_status(0)
    driver.notify(REQUESTS)
    assert driver.left == left + 2
    driver.initialize()
    await fuse.init()
    answered = driver.answered
    await fuse.getattr(ROOT_ID)
    assert driver.answered == answered + 1


async def test_a_broken_ring_is_found_by_the_loop(fuse: FuseDriver) -> None:
    driver: Any = vcpu(fuse)
    driver.queues[HIPRIO].add([(1 << 50, 40)], [])
    driver.notify(HIPRIO)
    await driver.wait(lambda: driver.needs_reset)
    left = driver.left
    driver.notify(REQUESTS)
    assert driver.left == left + 1, "a device that needs a reset answers nothing"


async def test_a_batch_longer_than_a_turn(fuse: FuseDriver) -> None:
    driver = vcpu(fuse)
    body = m.GetattrIn.build({"flags": 0, "dummy": 0, "fh": 0})
    for _ in range(60):
        driver.queues[REQUESTS].add([driver.buffer(fuse.message(Opcode.GETATTR, ROOT_ID, body))], [driver.buffer(120)])
    driver.notify(REQUESTS)
    assert len(await driver.used(REQUESTS, 60)) == 60
