"""A shared directory does what the host's file system does, and nothing outside it (virtio 1.2, 5.11)."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import random
import resource
import signal
import stat
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fuse import FuseDriver, FuseError, names, share
from tests.support.vcpu import VcpuDriver
from tests.support.virtio import MmioDriver
from virtio.devices.fs import FsDevice
from virtio.errors import ConfigError, HostError, StateError
from virtio.fs import messages as m
from virtio.fs.messages import ROOT_ID, Opcode

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
MODE, UID, GID, SIZE, ATIME, MTIME = 1, 2, 4, 8, 16, 32


@pytest.fixture(params=[MmioDriver, VcpuDriver], ids=["loop", "vcpu"])
async def fuse(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[FuseDriver]:
    """Answered by the device's threads, and by the vCPU's where that may be."""
    (tmp_path / "share").mkdir()
    (tmp_path / "secret").write_text("outside")
    driver = await share(tmp_path / "share", kind=request.param)
    yield driver
    await driver.driver.transport.device.aclose()
    if isinstance(driver.driver, VcpuDriver):
        driver.driver.close()


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return tmp_path / "share"


def refusal(number: int) -> pytest.RaisesExc[FuseError] | object:
    return pytest.raises(FuseError, match=os.strerror(number).replace("(", r"\(").replace(")", r"\)"))


async def test_the_session_is_negotiated(tmp_path: Path) -> None:
    fuse = await share(tmp_path, begin=False)
    await fuse.refused(errno.EPROTO, Opcode.GETATTR, ROOT_ID, bytes(16))
    newer = m.InitOut.parse(
        await fuse.ask(Opcode.INIT, 0, m.InitIn.build({"major": 8, "minor": 0, "max_readahead": 0, "flags": 0}))
    )
    assert (newer.major, newer.minor) == (m.MAJOR, m.MINOR)
    with refusal(errno.EPROTO):
        await fuse.init(minor=30)
    out = await fuse.init(flags=1 << 13 | 1 << 4)
    assert out.flags == 1 << 13 and out.max_write == out.max_pages * 4096
    assert stat.S_ISDIR((await fuse.getattr(ROOT_ID)).mode)
    await fuse.driver.transport.device.aclose()


@pytest.mark.clause("5.11.4.2-a")
async def test_configuration_space_has_the_tag(tmp_path: Path) -> None:
    device = FsDevice(tmp_path, "näher")
    assert device.config() == "näher".encode().ljust(36, b"\0") + b"\1\0\0\0"
    await device.aclose()
    for tag in ("", "x" * 37, "a\0b"):
        with pytest.raises(ConfigError, match="tag"):
            FsDevice(tmp_path, tag)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a directory"):
        FsDevice(tmp_path / "file", "tag")
    with pytest.raises(HostError, match="No such file"):
        FsDevice(tmp_path / "missing", "tag")


@pytest.mark.clause("5.11.6.4.1-a")
async def test_files_are_made_written_and_read(fuse: FuseDriver, host: Path) -> None:
    entry, handle = await fuse.create("new", mode=0o600)
    data = random.Random(1).randbytes(200_000)
    assert await fuse.write(entry.nodeid, handle, data, 10) == len(data)
    assert (host / "new").read_bytes() == bytes(10) + data
    assert await fuse.read(entry.nodeid, handle, 1 << 18, 5) == bytes(5) + data
    assert await fuse.read(entry.nodeid, handle, 4096, 1 << 40) == b""
    attr = await fuse.getattr(entry.nodeid)
    assert attr.size == len(data) + 10 and stat.S_IMODE(attr.mode) == 0o600 and attr.ino == (host / "new").stat().st_ino
    await fuse.release(entry.nodeid, handle)
    with refusal(errno.EBADF):
        await fuse.read(entry.nodeid, handle, 10)
    reader = await fuse.open(entry.nodeid)
    with refusal(errno.EBADF):
        await fuse.write(entry.nodeid, reader, b"x")
    with refusal(errno.EEXIST):
        await fuse.create("new", flags=os.O_RDWR | os.O_EXCL)
    again, handle = await fuse.create("new", flags=os.O_RDWR | os.O_TRUNC)
    assert again.nodeid == entry.nodeid and (host / "new").stat().st_size == 0
    await fuse.write(again.nodeid, handle, b"abc")
    appender = await fuse.open(entry.nodeid, os.O_WRONLY | os.O_APPEND)
    await fuse.write(entry.nodeid, appender, b"def", 0)
    assert (host / "new").read_bytes() == b"abcdef"
    await fuse.write(entry.nodeid, appender, b"XY", 0, flags=1)  # a page that the guest's cache writes back
    assert (host / "new").read_bytes() == b"XYcdef"


async def test_the_umask_of_the_host_is_not_applied(fuse: FuseDriver, host: Path) -> None:
    before = os.umask(0o077)
    try:
        await fuse.create("open", mode=0o666)
        await fuse.mkdir("wide", mode=0o1777)
        await fuse.mknod("pipe", stat.S_IFIFO | 0o666)
    finally:
        os.umask(before)
    assert stat.S_IMODE((host / "open").stat().st_mode) == 0o666
    assert stat.S_IMODE((host / "wide").stat().st_mode) == 0o1777
    assert stat.S_IMODE((host / "pipe").stat().st_mode) == 0o666


async def test_directories_are_listed(fuse: FuseDriver, host: Path) -> None:
    wanted = {f"file-{number:04}-{'x' * (number % 50)}" for number in range(900)}
    for name in wanted:
        (host / name).touch()
    handle = await fuse.opendir()
    assert set(await fuse.readdir(handle)) == wanted | {".", ".."}
    found = await fuse.readdir(handle, plus=True)
    assert set(found) == wanted | {".", ".."}
    assert found["."].nodeid == found[".."].nodeid == 0
    name = next(iter(wanted))
    assert found[name].attr.ino == (host / name).stat().st_ino
    assert (await fuse.lookup(name)).nodeid == found[name].nodeid
    with refusal(errno.EINVAL):
        await fuse.readdir(handle, size=16)
    await fuse.release(ROOT_ID, handle, directory=True)
    with refusal(errno.EBADF):
        await fuse.readdir(handle)


async def test_names_are_changed(fuse: FuseDriver, host: Path) -> None:
    one, _ = await fuse.create("one")
    two, _ = await fuse.create("two")
    folder = await fuse.mkdir("folder")
    with refusal(errno.EEXIST):
        await fuse.rename("one", "two", flags=NOREPLACE)
    await fuse.rename("one", "two", flags=EXCHANGE)
    assert (await fuse.lookup("one")).nodeid == two.nodeid and (await fuse.lookup("two")).nodeid == one.nodeid
    with refusal(errno.EINVAL):
        await fuse.rename("one", "two", flags=WHITEOUT)
    await fuse.rename("two", "inner", target=folder.nodeid)
    assert (await fuse.lookup("inner", folder.nodeid)).nodeid == one.nodeid
    assert (await fuse.link(one.nodeid, "hard")).nodeid == one.nodeid
    assert (host / "hard").samefile(host / "folder/inner")
    link = await fuse.symlink("soft", "../secret")
    assert await fuse.readlink(link.nodeid) == b"../secret" and os.readlink(host / "soft") == "../secret"
    with refusal(errno.ENOTEMPTY):
        await fuse.remove("folder", directory=True)
    await fuse.remove("inner", folder.nodeid)
    await fuse.remove("folder", directory=True)
    assert sorted(path.name for path in host.iterdir()) == ["hard", "one", "soft"]


async def test_an_open_file_lives_on_without_its_name(fuse: FuseDriver, host: Path) -> None:
    entry, handle = await fuse.create("brief")
    await fuse.remove("brief")
    await fuse.write(entry.nodeid, handle, b"still here")
    assert await fuse.read(entry.nodeid, handle, 100) == b"still here"
    assert (await fuse.getattr(entry.nodeid)).nlink == 0
    other, _ = await fuse.create("brief")
    assert other.nodeid != entry.nodeid
    await fuse.rename("brief", "over")
    (host / "brief").write_text("the host's")
    assert (await fuse.lookup("brief")).nodeid not in (entry.nodeid, other.nodeid)


async def test_attributes_are_set(fuse: FuseDriver, host: Path) -> None:
    entry, handle = await fuse.create("file")
    attr = await fuse.setattr(
        entry.nodeid, MODE | SIZE | ATIME | MTIME, mode=0o4711, size=12345, atime=1, mtime=2, mtimensec=5
    )
    found = (host / "file").stat()
    assert stat.S_IMODE(found.st_mode) == stat.S_IMODE(attr.mode) == 0o4711
    assert (found.st_size, found.st_atime_ns, found.st_mtime_ns) == (12345, 10**9, 2 * 10**9 + 5)
    await fuse.setattr(entry.nodeid, SIZE | 64, size=3, fh=handle)
    assert (host / "file").stat().st_size == 3
    with refusal(errno.EBADF):
        await fuse.setattr(entry.nodeid, SIZE | 64, size=3, fh=handle + 1)
    link = await fuse.symlink("link", "file")
    await fuse.setattr(link.nodeid, MTIME, mtime=7)
    assert (host / "link").lstat().st_mtime == 7
    with refusal(errno.EOPNOTSUPP):
        await fuse.setattr(link.nodeid, MODE, mode=0o777)
    with refusal(errno.EINVAL):
        await fuse.setattr(ROOT_ID, SIZE, size=0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
async def test_owners_are_the_guests_if_this_process_is_roots(fuse: FuseDriver, host: Path) -> None:
    fuse.uid, fuse.gid = 1234, 4321
    entry, _ = await fuse.create("mine", mode=0o2755)
    found = (host / "mine").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o2755)
    await fuse.setattr(entry.nodeid, UID | GID, uid=7, gid=8)
    assert ((host / "mine").stat().st_uid, (host / "mine").stat().st_gid) == (7, 8)
    (host / "team").mkdir()
    os.chown(host / "team", 0, 99)
    os.chmod(host / "team", 0o2777)
    await fuse.create("inner", (await fuse.lookup("team")).nodeid)
    assert (host / "team/inner").stat().st_gid == 99
    await fuse.mkdir("below", (await fuse.lookup("team")).nodeid, mode=0o4750)
    found = (host / "team/below").stat()
    assert found.st_gid == 99 and stat.S_IMODE(found.st_mode) == 0o6750


async def test_owners_are_mapped(tmp_path: Path) -> None:
    fuse = await share(tmp_path, owner=(1000, 1001))
    entry, _ = await fuse.create("file")
    assert (entry.attr.uid, entry.attr.gid) == (1000, 1001)
    assert ((tmp_path / "file").stat().st_uid, (tmp_path / "file").stat().st_gid) == (os.geteuid(), os.getegid())
    await fuse.setattr(entry.nodeid, UID | GID, uid=1000, gid=1001)
    with refusal(errno.EPERM):
        await fuse.setattr(entry.nodeid, UID, uid=5)
    await fuse.driver.transport.device.aclose()


@pytest.mark.root
async def test_an_ordinary_user_shares_what_is_theirs() -> None:
    nobody, dumpable = 65534, 4
    prctl = ctypes.CDLL(None).prctl
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "of-root").write_text("secret")
        (folder / "of-root").chmod(0o600)
        (folder / "readable").write_text("told")
        os.chown(folder, nobody, nobody)
        os.setegid(nobody)
        os.seteuid(nobody)
        prctl(dumpable, 1)  # as a process is that had this user from the start: /proc/self is its own
        try:
            fuse = await share(folder, owner=(0, 0))
            entry, handle = await fuse.create("mine", mode=0o600)
            assert (entry.attr.uid, entry.attr.gid) == (0, 0)
            await fuse.write(entry.nodeid, handle, b"text")
            below = await fuse.mkdir("below")
            await fuse.rename("mine", "moved", target=below.nodeid)
            assert (await fuse.setattr(entry.nodeid, MODE, mode=0o100644)).mode == 0o100644
            with refusal(errno.EPERM):
                await fuse.setattr(entry.nodeid, UID, uid=5)
            theirs = await fuse.lookup("readable")
            assert await fuse.read(theirs.nodeid, await fuse.open(theirs.nodeid), 10) == b"told"
            with refusal(errno.EACCES):
                await fuse.open(theirs.nodeid, os.O_WRONLY)
            secret = await fuse.lookup("of-root")
            with refusal(errno.EACCES):
                await fuse.open(secret.nodeid)
            with refusal(errno.EPERM):
                await fuse.setattr(secret.nodeid, MODE, mode=0o100666)
            await fuse.driver.transport.device.aclose()
        finally:
            os.seteuid(0)
            os.setegid(0)
            prctl(dumpable, 1)
        found = (folder / "below" / "moved").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_size) == (nobody, nobody, 0o644, 4)


async def test_extended_attributes(fuse: FuseDriver, host: Path) -> None:
    entry, _ = await fuse.create("file")
    try:
        os.setxattr(host / "file", "user.host", b"1")
    except OSError:
        pytest.skip("the file system of the temporary directory has no extended attributes")
    await fuse.setxattr(entry.nodeid, "user.a", b"value")
    assert await fuse.getxattr(entry.nodeid, "user.a") == b"value"
    assert sorted(await fuse.listxattr(entry.nodeid)) == [b"user.a", b"user.host"]
    assert m.GetxattrOut.parse(await fuse.getxattr(entry.nodeid, "user.a", 0)).size == 5
    with refusal(errno.ERANGE):
        await fuse.getxattr(entry.nodeid, "user.a", 4)
    with refusal(errno.EEXIST):
        await fuse.setxattr(entry.nodeid, "user.a", b"", os.XATTR_CREATE)
    await fuse.ask(Opcode.REMOVEXATTR, entry.nodeid, names("user.a"))
    with refusal(errno.ENODATA):
        await fuse.getxattr(entry.nodeid, "user.a")
    for name in ("security.capability", "trusted.overlay.opaque", "security.selinux"):
        with refusal(errno.EOPNOTSUPP):
            await fuse.setxattr(entry.nodeid, name, b"x")


async def test_holes_space_and_copies(fuse: FuseDriver, host: Path) -> None:
    entry, handle = await fuse.create("sparse")
    big = 1 << 41
    await fuse.write(entry.nodeid, handle, b"end", big)
    attr = await fuse.getattr(entry.nodeid)
    assert attr.size == big + 3 and attr.blocks < 1 << 16
    seek = m.LseekIn.build({"fh": handle, "offset": 0, "whence": os.SEEK_DATA, "padding": 0})
    assert m.LseekOut.parse(await fuse.ask(Opcode.LSEEK, entry.nodeid, seek)).offset > 1 << 40
    room = {"fh": handle, "offset": 0, "length": 8192, "mode": 0, "padding": 0}
    await fuse.ask(Opcode.FALLOCATE, entry.nodeid, m.FallocateIn.build(room))
    assert (host / "sparse").stat().st_blocks >= 16
    source, reader = await fuse.create("source")
    await fuse.write(source.nodeid, reader, b"0123456789")
    copy = {
        "fh_in": reader,
        "off_in": 2,
        "nodeid_out": entry.nodeid,
        "fh_out": handle,
        "off_out": 100,
        "len": 5,
        "flags": 0,
    }
    assert m.WriteOut.parse(await fuse.ask(Opcode.COPY_FILE_RANGE, source.nodeid, m.CopyIn.build(copy))).size == 5
    assert await fuse.read(entry.nodeid, handle, 5, 100) == b"23456"
    assert m.StatfsOut.parse(await fuse.ask(Opcode.STATFS, ROOT_ID)).blocks > 0
    for opcode in (Opcode.FSYNC,):
        await fuse.ask(opcode, entry.nodeid, m.FsyncIn.build({"fh": handle, "flags": 1, "padding": 0}))
    await fuse.ask(Opcode.SYNCFS, ROOT_ID, bytes(8))


async def test_a_read_only_share_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    fuse = await share(tmp_path, read_only=True)
    node = (await fuse.lookup("file")).nodeid
    handle = await fuse.open(node)
    assert await fuse.read(node, handle, 100) == b"kept"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        with refusal(errno.EROFS):
            await fuse.open(node, flags)
    changes = (
        fuse.create("new"), fuse.mkdir("new"), fuse.symlink("new", "x"), fuse.link(node, "new"), fuse.remove("file"),
        fuse.rename("file", "new"), fuse.setattr(node, MODE, mode=0), fuse.setxattr(node, "user.a", b""),
        fuse.mknod("new", stat.S_IFIFO), fuse.write(node, handle, b"x"),
    )  # fmt: skip
    for change in changes:
        with refusal(errno.EROFS):
            await change
    await fuse.driver.transport.device.aclose()
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"/etc/passwd", b"../secret"])
async def test_a_name_is_one_component(fuse: FuseDriver, host: Path, name: bytes) -> None:
    (host / "file").touch()
    node = (await fuse.lookup("file")).nodeid
    ending = name + b"\0"
    for opcode, body in (
        (Opcode.LOOKUP, ending),
        (Opcode.UNLINK, ending),
        (Opcode.RMDIR, ending),
        (Opcode.MKDIR, bytes(8) + ending),
        (Opcode.MKNOD, m.MknodIn.build({"mode": stat.S_IFREG, "rdev": 0, "umask": 0, "padding": 0}) + ending),
        (Opcode.SYMLINK, ending + b"target\0"),
        (Opcode.CREATE, bytes(16) + ending),
        (Opcode.LINK, m.LinkIn.build({"oldnodeid": node}) + ending),
        (Opcode.RENAME, m.RenameIn.build({"newdir": ROOT_ID}) + b"file\0" + ending),
        (Opcode.RENAME, m.RenameIn.build({"newdir": ROOT_ID}) + ending + b"file\0"),
    ):
        await fuse.refused(errno.EINVAL, opcode, ROOT_ID, body)
    await fuse.refused(errno.ENAMETOOLONG, Opcode.LOOKUP, ROOT_ID, b"x" * 256 + b"\0")
    await fuse.refused(errno.EINVAL, Opcode.LOOKUP, ROOT_ID, b"without end")


async def test_no_link_of_the_host_is_followed(fuse: FuseDriver, host: Path) -> None:
    (host / "file").symlink_to("../secret")
    (host / "folder").symlink_to("..")
    link = await fuse.lookup("file")
    assert stat.S_ISLNK(link.attr.mode)
    with refusal(errno.ENXIO):
        await fuse.open(link.nodeid)
    folder = await fuse.lookup("folder")
    await fuse.refused(errno.ENOTDIR, Opcode.LOOKUP, folder.nodeid, b"secret\0")
    await fuse.refused(errno.ENOTDIR, Opcode.OPENDIR, folder.nodeid, bytes(8))
    with refusal(errno.EEXIST):
        await fuse.create("file", flags=os.O_RDWR | os.O_EXCL)
    with refusal(errno.ENXIO):
        await fuse.create("file", flags=os.O_RDWR)


async def test_special_files_are_not_opened_and_no_device_is_made(fuse: FuseDriver, host: Path) -> None:
    await fuse.mknod("pipe", stat.S_IFIFO | 0o600)
    await fuse.mknod("socket", stat.S_IFSOCK | 0o600)
    for name in ("pipe", "socket"):
        with refusal(errno.ENXIO):
            await fuse.open((await fuse.lookup(name)).nodeid)
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        with refusal(errno.EPERM):
            await fuse.mknod("device", kind | 0o600, 0x0103)
    assert not (host / "device").exists()


async def test_nodes_and_files_are_only_those_that_the_guest_was_told_of(fuse: FuseDriver) -> None:
    for node in (0, 2, 1 << 63, (1 << 64) - 1):
        await fuse.refused(errno.ESTALE, Opcode.GETATTR, node, bytes(16))
        await fuse.refused(errno.ESTALE, Opcode.LOOKUP, node, b"x\0")
        await fuse.refused(errno.ESTALE, Opcode.OPEN, node, bytes(8))
    entry, handle = await fuse.create("file")
    for wrong in (handle + 1, handle ^ 1 << 32, 0, (1 << 64) - 1):
        with refusal(errno.EBADF):
            await fuse.read(entry.nodeid, wrong, 10)
    with refusal(errno.EBADF):
        await fuse.readdir(handle)
    await fuse.forget(entry.nodeid)
    await fuse.forget(entry.nodeid, 1 << 60)
    await fuse.release(entry.nodeid, handle)
    await fuse.refused(errno.ESTALE, Opcode.GETATTR, entry.nodeid, bytes(16))
    await fuse.forget(ROOT_ID, 1 << 60)
    assert (await fuse.getattr(ROOT_ID)).nlink
    nodes, descriptors, files = fuse.driver.transport.device._engine.sizes  # type: ignore[attr-defined]
    assert (nodes, descriptors, files) == (1, 0, 0)


async def test_malformed_messages_are_answered(fuse: FuseDriver) -> None:
    whole = fuse.message(Opcode.GETATTR, ROOT_ID, bytes(16))
    for data in (b"", whole[:20], whole[:40], whole + b"more"):
        reply = m.OutHeader.parse(await fuse.raw(data or b"\0"))
        assert reply.error in (-errno.EIO, -errno.EINVAL)
    await fuse.refused(errno.ENOSYS, Opcode.FLUSH, ROOT_ID, bytes(24))
    assert await fuse.raw(whole, 15) == b""  # no room for a header
    assert m.OutHeader.parse(await fuse.raw(whole, 16)).error == -errno.EINVAL  # none for the reply
    source = random.Random(5)
    for _ in range(300):
        body = source.randbytes(source.randrange(200))
        await fuse.raw(fuse.message(source.choice(list(Opcode)) % 48 or 1, source.randrange(4), body), 4096)
    await fuse.init()
    assert (await fuse.getattr(ROOT_ID)).nlink


@pytest.mark.clause("5.11.6.2.1-a")
async def test_what_is_urgent_does_not_wait_for_a_slow_file_system(fuse: FuseDriver, host: Path) -> None:
    (host / "other").touch()
    with (host / "leased").open("w") as held:
        fcntl.fcntl(held, fcntl.F_SETSIG, signal.SIGURG)  # ignored unless somebody asks for it
        try:
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"a file system without leases: {error}")
        leased, other = await fuse.walk("leased"), await fuse.walk("other")
        message = fuse.message(Opcode.OPEN, leased, m.OpenIn.build({"flags": os.O_RDONLY, "open_flags": 0}))
        for _ in range(8):  # each waits until the lease is given back
            fuse.driver.submit(1, [fuse.driver.buffer(message)], [fuse.driver.buffer(64)])
        await fuse.forget(other)
        assert not fuse.driver.queues[1].used()
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        assert len(await fuse.driver.used(1, 8, 60)) == 8


async def test_any_number_of_nodes_costs_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtio.devices.fs._descriptors", lambda: 64)
    fuse = await share(tmp_path)
    engine = fuse.driver.transport.device._engine  # type: ignore[attr-defined]
    (tmp_path / "deep/er").mkdir(parents=True)
    for number in range(500):
        (tmp_path / f"deep/er/{number}").touch()
    handle = await fuse.opendir(await fuse.walk("deep/er"))
    found = await fuse.readdir(handle, plus=True, size=65536)
    nodes, descriptors, _ = engine.sizes
    assert nodes > 500 and descriptors <= 32 + 1
    for number in range(500):
        assert (await fuse.getattr(found[str(number)].nodeid)).ino == (tmp_path / f"deep/er/{number}").stat().st_ino
    (tmp_path / "deep").rename(tmp_path / "elsewhere")
    assert (await fuse.getattr(found["3"].nodeid)).ino  # its directory still has its descriptor
    handles = []
    with refusal(errno.ENFILE):
        for _ in range(100):
            handles.append(await fuse.open(found["3"].nodeid))
    assert len(handles) == 31
    await fuse.driver.transport.device.aclose()


async def test_a_low_soft_limit_does_not_bound_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"this process may open {hard} files at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        fuse = await share(tmp_path)
        entry, _ = await fuse.create("file")
        handles = [await fuse.open(entry.nodeid) for _ in range(600)]
        assert len(set(handles)) == 600
        await fuse.driver.transport.device.aclose()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_the_host_moves_files_under_the_guest(tmp_path: Path) -> None:
    """While a guest looks names up and opens them, links and directories take each other's places."""
    inside, outside = tmp_path / "share", tmp_path / "outside"
    (inside / "a").mkdir(parents=True)
    (inside / "a/file").write_text("inside")
    outside.mkdir()
    (outside / "file").write_text("outside")
    fuse = await share(inside)
    stop = asyncio.Event()

    def race() -> None:
        while not stop.is_set():
            os.rename(inside / "a", inside / "b")
            os.symlink(outside, inside / "a")
            os.unlink(inside / "a")
            os.rename(inside / "b", inside / "a")

    racing = asyncio.create_task(asyncio.to_thread(race))
    seen = set()
    for _ in range(400):
        try:
            node = await fuse.walk("a/file")
            handle = await fuse.open(node)
        except FuseError as error:
            seen.add(error.errno)
            continue
        assert await fuse.read(node, handle, 100) == b"inside"
        await fuse.release(node, handle)
        await fuse.forget(node)
    stop.set()
    await racing
    assert seen <= {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
    await fuse.driver.transport.device.aclose()


async def test_what_create_opens_is_what_it_made(tmp_path: Path) -> None:
    """Also while the host puts another file in its place, over and over."""
    fuse = await share(tmp_path)
    stop = asyncio.Event()

    def race() -> None:
        while not stop.is_set():
            (tmp_path / "other").touch()
            os.rename(tmp_path / "other", tmp_path / "new")
            os.unlink(tmp_path / "new")

    racing = asyncio.create_task(asyncio.to_thread(race))
    try:
        for _ in range(400):
            try:
                entry, handle = await fuse.create("new", flags=os.O_RDWR | os.O_EXCL)
            except FuseError as error:
                assert error.errno == errno.EEXIST
                continue
            await fuse.setattr(entry.nodeid, SIZE | 64, size=1, fh=handle)  # EBADF if it is not open
            await fuse.release(entry.nodeid, handle)
            await fuse.forget(entry.nodeid)
    finally:
        stop.set()
        await racing
    await fuse.driver.transport.device.aclose()


async def test_a_share_survives_being_saved(tmp_path: Path) -> None:
    fuse = await share(tmp_path)
    folder = await fuse.mkdir("folder")
    entry, handle = await fuse.create("file", folder.nodeid)
    await fuse.write(entry.nodeid, handle, b"before")
    gone, lost = await fuse.create("gone")
    await fuse.rename("folder", "moved")
    await fuse.remove("gone")
    transport = fuse.driver.transport
    await transport.quiesce()
    state = transport.save()
    assert state.device.nodes[0].id == folder.nodeid  # type: ignore[attr-defined]
    await transport.device.aclose()

    again = await share(tmp_path, begin=False)
    again.driver.transport.device.restore_device(state.device)
    again.driver.initialize()
    assert await again.read(entry.nodeid, handle, 100) == b"before"
    await again.write(entry.nodeid, handle, b"BEF")
    assert (tmp_path / "moved/file").read_bytes() == b"BEFore"
    assert (await again.lookup("file", folder.nodeid)).nodeid == entry.nodeid
    with refusal(errno.ESTALE):
        await again.read(gone.nodeid, lost, 10)
    (tmp_path / "moved/file").unlink()
    (tmp_path / "moved/file").write_text("another file")
    assert (await again.lookup("file", folder.nodeid)).nodeid != entry.nodeid
    await again.driver.transport.device.aclose()


async def test_a_share_is_found_by_names_on_another_host(tmp_path: Path) -> None:
    (tmp_path / "here/folder").mkdir(parents=True)
    (tmp_path / "here/folder/file").write_text("same")
    (tmp_path / "there/folder").mkdir(parents=True)
    (tmp_path / "there/folder/file").write_text("same")
    fuse = await share(tmp_path / "here")
    node = await fuse.walk("folder/file")
    handle = await fuse.open(node)
    state = fuse.driver.transport.device.save_device()
    await fuse.driver.transport.device.aclose()
    again = await share(tmp_path / "there", begin=False)
    again.driver.transport.device.restore_device(state)
    again.driver.initialize()
    assert await again.walk("folder/file") == node  # asked anew before anything open is used
    assert await again.read(node, handle, 100) == b"same"
    assert (await again.getattr(node)).ino == (tmp_path / "there/folder/file").stat().st_ino
    await again.driver.transport.device.aclose()


async def test_a_saved_state_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    fuse = await share(tmp_path)
    folder, file = await fuse.walk("folder"), await fuse.walk("file")
    handle = await fuse.open(file, os.O_RDWR | os.O_APPEND)
    device = fuse.driver.transport.device
    assert isinstance(device, FsDevice)
    state = device.save_device()
    nodes = {node.id: node for node in state.nodes}
    for changed in (
        (nodes[file], replace(nodes[folder], parent=file)),  # a directory below a file
        (nodes[file], replace(nodes[folder], parent=77)),
        (nodes[file], replace(nodes[folder], id=0)),
        (nodes[file], replace(nodes[folder], id=ROOT_ID)),
        (nodes[file], replace(nodes[folder], id=(1 << 64) - 1)),  # the next one would have the root's number
        (nodes[file], replace(nodes[folder], name=b"..")),
    ):
        with pytest.raises(StateError, match="contradict"):
            device.restore_device(replace(state, nodes=changed))
        assert device._engine.sizes == (1, 0, 0)
    for flags in (os.O_CREAT, os.O_TMPFILE, os.O_DIRECT, os.O_PATH, 1 << 31):
        with pytest.raises(StateError, match="contradict"):
            device.restore_device(replace(state, files=(replace(state.files[0], flags=flags),)))
    last = handle | 0xFFFFFFFF << 32
    device.restore_device(replace(state, files=(replace(state.files[0], handle=last),)))
    await fuse.write(file, last, b"appended")
    await fuse.open(file)
    await fuse.open(file)
    device.restore_device(device.save_device())
    assert await fuse.read(file, last, 100) == b"appended"
    await device.aclose()


async def test_a_reset_in_the_midst_forgets_all(fuse: FuseDriver, host: Path) -> None:
    entry, handle = await fuse.create("file")
    for _ in range(50):
        body = fuse.message(Opcode.WRITE, entry.nodeid, m.WriteIn.build(
            {"fh": handle, "offset": 0, "size": 4096, "write_flags": 0, "lock_owner": 0, "flags": 0, "padding": 0}
        ) + bytes(4096))  # fmt: skip
        fuse.driver.submit(1, [fuse.driver.buffer(body)], [fuse.driver.buffer(64)])
    fuse.driver.write_status(0)
    await fuse.driver.wait(lambda: fuse.driver.read_status() == 0)
    fuse.driver.initialize()
    await fuse.refused(errno.EPROTO, Opcode.GETATTR, ROOT_ID, bytes(16))
    await fuse.init()
    with refusal(errno.EBADF):
        await fuse.read(entry.nodeid, handle, 10)
