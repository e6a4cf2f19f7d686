"""Who may use an image together: machines of ours and QEMU's programs, each way round."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from virtio.backends.file import FileBlock, SnapshotBlock, open_locked
from virtio.backends.image import ImageBlock
from virtio.backends.lock import ImageLock
from virtio.devices.blk import BlockDevice
from virtio.errors import ConfigError

MIB = 1 << 20


def qemu(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    return path


@contextmanager
def qemu_io(disk: Path, *options: str, format: str = "raw") -> Iterator[None]:
    """qemu-io that has the image open."""
    with subprocess.Popen(
        [qemu("qemu-io"), "-f", format, *options, str(disk)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("read 0 512\n")
        for line in process.stdout:
            if "ops" in line:
                break
            assert "can't open" not in line, line
        yield
        process.stdin.close()


@contextmanager
def qemu_system(disk: Path, *, readonly: bool = False) -> Iterator[None]:
    """A QEMU machine that has the image as its disk and stands still."""
    with subprocess.Popen(
        [qemu("qemu-system-x86_64"), "-M", "pc", "-accel", "tcg", "-display", "none", "-nodefaults", "-S",
         "-qmp", "stdio", "-drive", f"file={disk},format=raw,if=virtio,readonly={'on' if readonly else 'off'}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write('{"execute": "qmp_capabilities"}\n')
        assert "QMP" in process.stdout.readline()
        assert "return" in process.stdout.readline()  # it answers once its machine is there
        yield
        process.terminate()


def refuses_to_open(disk: Path, *options: str) -> bool:
    """qemu-io does not get the image."""
    done = subprocess.run(
        [qemu("qemu-io"), "-f", "raw", *options, "-c", "read 0 512", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        assert "lock" in done.stderr
    return done.returncode != 0


def test_what_we_write_qemu_does_not(disk: Path) -> None:
    fd = open_locked(str(disk), read_only=False)
    assert refuses_to_open(disk)
    resize = [qemu("qemu-img"), "resize", "-q", "-f", "raw", str(disk), "2M"]
    assert subprocess.run(resize, capture_output=True).returncode
    os.close(fd)
    assert not refuses_to_open(disk)
    assert not subprocess.run(resize, capture_output=True).returncode


def test_what_we_read_qemu_may_read(disk: Path) -> None:
    fd = open_locked(str(disk), read_only=True)
    assert refuses_to_open(disk)
    assert not refuses_to_open(disk, "-r")
    with qemu_system(disk, readonly=True):
        pass
    os.close(fd)


@pytest.mark.parametrize("read_only", [False, True])
def test_what_qemu_writes_we_do_not_touch(disk: Path, read_only: bool) -> None:
    for user in (qemu_io(disk), qemu_system(disk)):
        with user, pytest.raises(ConfigError, match="disk: in use by another program, such as QEMU"):
            open_locked(str(disk), read_only=read_only)
        os.close(open_locked(str(disk), read_only=read_only))


def test_what_a_qemu_machine_reads_we_read_and_do_not_write(disk: Path) -> None:
    with qemu_system(disk, readonly=True):
        os.close(open_locked(str(disk), read_only=True))
        with pytest.raises(ConfigError, match="in use by another program, such as QEMU, which does not share it"):
            open_locked(str(disk), read_only=False)


@pytest.mark.parametrize(("first", "second", "fits"), [(True, True, True), (True, False, False), (False, True, False)])
def test_readers_of_ours_share_and_writers_do_not(disk: Path, first: bool, second: bool, fits: bool) -> None:
    fd = open_locked(str(disk), read_only=first)
    if fits:
        os.close(open_locked(str(disk), read_only=second))
    else:
        with pytest.raises(ConfigError, match="disk: in use by another machine"):
            open_locked(str(disk), read_only=second)
    os.close(fd)
    os.close(open_locked(str(disk), read_only=second))


def test_without_flock_too_the_bytes_exclude(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs that lock as QEMU does, and each that comes second is refused."""
    monkeypatch.setattr("virtio.backends.lock.fcntl.flock", lambda *_: None)
    first, second = (os.open(disk, os.O_RDWR) for _ in range(2))
    one, two = ImageLock(first, "a", read_only=False), ImageLock(second, "b", read_only=False)
    one.take()
    with pytest.raises(ConfigError, match="b: in use"):
        two.take()
    assert not two.held
    one.give_up()
    two.take()
    with pytest.raises(ConfigError, match="a: in use"):
        one.take()
    os.close(first)
    os.close(second)


@pytest.mark.parametrize("make", [FileBlock.open, ImageBlock.open_image])
async def test_an_image_is_given_up_and_taken_again(disk: Path, make: object) -> None:
    backend = await make(disk)  # type: ignore[operator]
    await backend.write(0, b"x" * 512)
    await backend.deactivate()
    other = await FileBlock.open(disk)
    assert await other.read(0, 512) == b"x" * 512
    with pytest.raises(ConfigError, match="in use"):
        await backend.activate()
    await other.aclose()
    with qemu_io(disk), pytest.raises(ConfigError, match="in use"):
        await backend.activate()
    await backend.activate()
    assert refuses_to_open(disk)
    await backend.write(0, b"y" * 512)
    await backend.aclose()
    assert not refuses_to_open(disk)


async def test_a_qcow2_image_is_given_up_and_taken_again(tmp_path: Path) -> None:
    """What another program writes meanwhile is there then, and what was given up writes nothing meanwhile."""
    disk = tmp_path / "disk.qcow2"
    subprocess.run([qemu("qemu-img"), "create", "-q", "-f", "qcow2", str(disk), "4M"], check=True)
    with qemu_io(disk, format="qcow2"), pytest.raises(ConfigError, match="in use by another program"):
        await ImageBlock.open_image(disk)
    backend = await ImageBlock.open_image(disk)
    device = BlockDevice(backend)
    await backend.write(0, b"x" * 70_144)
    await backend.discard(0, 65_536)
    await backend.deactivate()
    with qemu_io(disk, format="qcow2"):
        with pytest.raises(ConfigError, match="in use"):
            await device.exchange(backend.activate)
    theirs = ["-f", "qcow2", "-c", "write -P 7 0 200k", "-c", "write -P 8 2M 100k", str(disk)]
    subprocess.run([qemu("qemu-io"), *theirs], check=True, stdout=subprocess.DEVNULL)
    await device.exchange(backend.activate)
    assert await backend.read(65_536, 512) == b"\7" * 512 and await backend.read(2 << 20, 512) == b"\10" * 512
    await backend.write(0, b"y" * 512)
    await device.aclose()
    subprocess.run([qemu("qemu-img"), "check", "-q", str(disk)], check=True)


@pytest.mark.parametrize("mode", ["ro", "rw", "snapshot"])
@pytest.mark.parametrize("kind", ["file", "image"])
async def test_the_last_sector_of_a_file_is_whole(tmp_path: Path, mode: str, kind: str) -> None:
    """Of a file that does not end with a sector, a guest sees all: zero bytes follow. Writing there makes it whole."""
    data = os.urandom(1000)
    (tmp_path / "odd").write_bytes(data)
    disk: FileBlock
    if kind == "image":
        disk = await ImageBlock.open_image(tmp_path / "odd", read_only=mode == "ro", snapshot=mode == "snapshot")
    elif mode == "snapshot":
        disk = await SnapshotBlock.open(tmp_path / "odd")
    else:
        disk = await FileBlock.open(tmp_path / "odd", read_only=mode == "ro")
    assert disk.capacity == 1024
    assert await disk.read(0, 1024) == data + bytes(24)
    if mode != "ro":
        await disk.write(512, b"w" * 512)
        assert await disk.read(0, 1024) == data[:512] + b"w" * 512
    await disk.aclose()
    left = (tmp_path / "odd").read_bytes()
    assert left == (data[:512] + b"w" * 512 if mode == "rw" else data)
