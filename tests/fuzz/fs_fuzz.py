"""Hostile drivers of a shared directory for a time, under sanitizers: `python -m tests.fuzz.fs_fuzz SECONDS [SEED]`.

FUSE messages that are whole, broken, cut, long, about nodes and files that exist or not, many at a time, answered by
the device's threads or by one that plays the vCPU, with resets in the midst, while the host renames directories and
puts links in their place. Failures: a change or a byte of anything outside the directory, a device that breaks by a
ring that is right, descriptors or memory without bound, a sanitizer's report. FUZZ_PLAIN=1: without sanitizers.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from tests.fuzz import sanitized

BUILD = sanitized.ROOT / "build" / "fs-fuzz"
CANARY = b"OUTSIDE-OF-THE-SHARE"
BATCH = 24
SESSION = 4000
"""Messages to one device."""
DESCRIPTORS = 600
GROWTH = 512 << 20
NAMES = (
    b"a",
    b"b",
    b"file",
    b"link",
    b"up",
    b"deep",
    b"..",
    b".",
    b"",
    b"a/b",
    b"../outside",
    b"/etc/passwd",
    b"x" * 255,
    b"x" * 256,
)
OPCODES = (*range(1, 52), 0, 4096, 1 << 31)
OPEN_FLAGS = (
    0,
    1,
    2,
    os.O_TRUNC,
    os.O_APPEND | 1,
    os.O_CREAT,
    os.O_DIRECT,
    os.O_PATH,
    os.O_TMPFILE,
    os.O_DIRECTORY,
    0xFFFFFFFF,
)
NUMBERS = (
    0,
    1,
    2,
    7,
    255,
    4096,
    65536,
    1 << 20,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)


class Guest:
    """What a hostile driver knows: nodes and files that it was told of."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.nodes, self.files = [1], [0]
        self.unique = 0

    def number(self) -> int:
        source = self.source
        return source.choice(NUMBERS) if source.random() < 0.7 else source.getrandbits(64)

    def node(self) -> int:
        return self.source.choice(self.nodes) if self.source.random() < 0.9 else self.number()

    def file(self) -> int:
        return self.source.choice(self.files) if self.source.random() < 0.9 else self.number()

    def name(self) -> bytes:
        text = self.source.choice(NAMES if self.source.random() < 0.6 else NAMES[:6])
        return text + (b"\0" if self.source.random() < 0.97 else b"")

    def body(self, opcode: int) -> bytes:
        source = self.source
        u32, u64 = (lambda: self.number() & 0xFFFFFFFF), self.number
        mode = source.choice((0o100644, 0o100755, 0o10644, 0o140644, 0o20666, 0o60666, 0o40755, 0o104711, u32()))
        size, offset = (
            source.choice((0, 1, 100, 4096, 70000, 1 << 20, u32())),
            source.choice((0, 1, 4096, 1 << 20, u64())),
        )
        match opcode:
            case 1 | 10 | 11:
                return self.name()
            case 2:
                return struct.pack("<Q", source.choice((1, 1, u64())))
            case 3:
                return struct.pack("<IIQ", source.choice((0, 1)), 0, self.file())
            case 4:
                times = struct.pack("<QQQIII", u64(), u64(), u64(), u32(), u32(), u32())
                head = struct.pack(
                    "<IIQQQ", source.getrandbits(12), 0, self.file(), source.choice((0, 10, 1 << 20, u64())), 0
                )
                return head + times + struct.pack("<IIIII", mode & 0o7777, 0, source.choice((0, 1000, u32())), u32(), 0)
            case 6:
                return self.name() + source.choice(
                    (b"../outside/secret\0", b"/\0", b"\0", b"x" * 5000 + b"\0", b"file")
                )
            case 8:
                return struct.pack("<IIII", mode, u32(), 0, 0) + self.name()
            case 9:
                return struct.pack("<II", mode & 0o7777, 0) + self.name()
            case 12:
                return struct.pack("<Q", self.node()) + self.name() + self.name()
            case 45:
                return (
                    struct.pack("<QII", self.node(), source.choice((0, 1, 2, 4, u32())), 0) + self.name() + self.name()
                )
            case 13:
                return struct.pack("<Q", self.node()) + self.name()
            case 14 | 27:
                return struct.pack("<II", source.choice(OPEN_FLAGS), u32())
            case 35:
                return struct.pack("<IIII", source.choice(OPEN_FLAGS), mode, 0, u32()) + self.name()
            case 15 | 28 | 44:
                return struct.pack("<QQIIQII", self.file(), offset, size, 0, 0, 0, 0)
            case 16:
                data = source.randbytes(source.choice((0, 1, 100, 5000)))
                size = source.choice((len(data), len(data), u32()))
                return (
                    struct.pack("<QQIIQII", self.file(), min(offset, 1 << 22), size, source.choice((0, 1)), 0, 0, 0)
                    + data
                )
            case 18 | 29:
                return struct.pack("<QIIQ", self.file(), 0, 0, 0)
            case 20 | 30:
                return struct.pack("<QII", self.file(), source.choice((0, 1)), 0)
            case 21:
                name = source.choice(
                    (b"user.x", b"security.capability", b"trusted.y", b"system.posix_acl_access", b"user.")
                )
                value = source.randbytes(source.choice((0, 10, 60000)))
                return (
                    struct.pack("<II", source.choice((len(value), u32())), source.choice((0, 1, 2, 7)))
                    + name
                    + b"\0"
                    + value
                )
            case 22 | 23:
                return struct.pack("<II", source.choice((0, 10, 65536, u32())), 0) + b"user.x\0"
            case 26:
                return struct.pack("<IIII", source.choice((7, 7, 7, 8, 0)), source.choice((31, 38, 5, u32())), 0, u32())
            case 42:
                count = source.choice((0, 1, 3, u32()))
                return struct.pack("<II", count, 0) + b"".join(struct.pack("<QQ", self.node(), 1) for _ in range(3))
            case 43:
                length = (
                    min(source.choice((0, 4096, 1 << 20, u64())), 1 << 22)
                    if source.random() < 0.9
                    else -1 & (1 << 64) - 1
                )
                return struct.pack(
                    "<QQQII", self.file(), min(offset, 1 << 22), length, source.choice((0, 1, 3, u32())), 0
                )
            case 46:
                return struct.pack("<QQII", self.file(), offset, source.choice((3, 4, 0, u32())), 0)
            case 47:
                return struct.pack(
                    "<QQQQQQQ", self.file(), offset, self.node(), self.file(), min(offset, 1 << 22), size, 0
                )
        return source.randbytes(source.randrange(100))

    def message(self) -> tuple[int, bytes]:
        source = self.source
        opcode = source.choice(OPCODES) if source.random() < 0.98 else source.getrandbits(32)
        if opcode in (26, 38) and source.random() < 0.9:
            opcode = 44
        body = self.body(opcode)
        if source.random() < 0.05:
            body = body[: source.randrange(len(body) + 1)] if source.random() < 0.5 else body + source.randbytes(50)
        self.unique += 1
        length = 40 + len(body) if source.random() < 0.97 else source.getrandbits(32)
        head = struct.pack("<IIQQIIIHH", length, opcode, self.unique, self.node(), source.choice((0, 1000)), 0, 1, 0, 0)
        return opcode, head + body

    def learn(self, opcode: int, reply: bytes) -> None:
        if len(reply) < 24 or struct.unpack_from("<i", reply, 4)[0]:
            return
        if opcode in (1, 6, 8, 9, 13, 35):
            self.nodes.append(struct.unpack_from("<Q", reply, 16)[0])
        if opcode in (14, 27):
            self.files.append(struct.unpack_from("<Q", reply, 16)[0])
        if opcode == 35 and len(reply) >= 160:
            self.files.append(struct.unpack_from("<Q", reply, 144)[0])
        if len(self.nodes) > 300:
            del self.nodes[1:100]
        if len(self.files) > 200:
            del self.files[1:60]


def prepare(folder: Path) -> Path:
    """A directory to share, beside what must stay as it is."""
    share, outside = folder / "share", folder / "outside"
    shutil.rmtree(share, ignore_errors=True)
    share.mkdir()
    if not outside.exists():
        outside.mkdir()
        (outside / "secret").write_bytes(CANARY * 10)
        (outside / "file").write_bytes(CANARY)
    (share / "deep/a/b").mkdir(parents=True)
    (share / "deep/file").write_bytes(b"inside" * 1000)
    (share / "link").symlink_to("../outside/secret")
    (share / "up").symlink_to("..")
    return share


def outside(folder: Path) -> object:
    """What must not change."""
    found = []
    for path in sorted([folder, *(folder / "outside").rglob("*"), folder / "outside"]):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found.append((str(path), status.st_mode, status.st_uid, status.st_nlink, content, sorted(os.listxattr(path))))
    return found, sorted(os.listdir(folder))


def race(share: Path, stop: threading.Event) -> None:
    """The host puts links in the place of directories that the guest walks: by names in the share itself alone, for the
    guest may have made any other name a way out for the host."""
    while not stop.is_set():
        with suppress(OSError):
            os.rename(share / "deep", share / "moved")
            os.symlink("../outside", share / "deep")
            os.rename(share / "deep", share / "was")
            os.rename(share / "moved", share / "deep")
            os.unlink(share / "was")
        time.sleep(0.0005)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def session(share: Path, folder: Path, seed: int) -> int:
    """One device, one hostile driver. How many messages."""
    from tests.support.vcpu import VcpuDriver
    from tests.support.virtio import MmioDriver
    from virtio.devices.fs import FsDevice

    source = random.Random(seed)
    read_only = source.random() < 0.1
    device = FsDevice(share, "tag", read_only=read_only, cache=source.choice(("none", "auto", "always")))
    vcpu = source.random() < 0.7
    driver = VcpuDriver(device, waits=source.random() < 0.3) if vcpu else MmioDriver(device)
    driver.initialize()
    guest, sent, mark = Guest(source), 0, driver.allocator._next
    first = struct.pack("<IIQQIIIHHIIII", 56, 26, 0, 0, 0, 0, 0, 0, 0, 7, 38, 0, 0xFFFFFFFF)
    while sent < SESSION:
        pending = {}
        for number in range(source.randrange(1, BATCH)):
            opcode, data = (26, first) if not sent and not number else guest.message()
            cut = source.randrange(len(data) + 1)
            parts = [part for part in (data[:cut], data[cut:]) if part] if source.random() < 0.3 else [data]
            rooms = [source.choice((16, 144, 4096, 70000)) for _ in range(source.choice((0, 1, 1, 1, 1, 2)))]
            queue = int(source.random() < 0.95)
            spaces = [driver.buffer(room) for room in rooms]
            head = driver.submit(queue, [driver.buffer(part) for part in parts], spaces)
            pending[queue, head] = opcode, spaces
            sent += 1
        if source.random() < 0.02:
            driver.write_status(0)
            await driver.wait(lambda: driver.read_status() == 0)
            driver.initialize()
            guest, mark = Guest(source), driver.allocator._next
            driver.submit(1, [driver.buffer(first)], [driver.buffer(80)])
            await driver.used(1)
            continue
        for queue in (0, 1):
            count = sum(one == queue for one, _ in pending)
            for used in await driver.used(queue, count, 60) if count else ():
                opcode, spaces = pending[queue, used.id]
                reply = b"".join(driver.bytes_at(space) for space in spaces)[: used.length]
                assert CANARY not in reply, "bytes from outside were told"
                guest.learn(opcode, reply)
        assert not driver.needs_reset, "the device broke by a ring that is right"
        driver.allocator._next = mark  # what the queues take stays
        if isinstance(driver, VcpuDriver) and source.random() < 0.05:
            driver.host.masked = not driver.host.masked
            driver.pci.messages_changed()
    await device.aclose()
    if isinstance(driver, VcpuDriver):
        driver.close()
    return sent


async def campaign(seconds: float, first: int) -> None:
    end = time.monotonic() + seconds
    total, seed, base = 0, first, 0
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="fs-fuzz-") as name:
        folder = Path(name)
        share = prepare(folder)
        before = outside(folder)
        while time.monotonic() < end:
            share = prepare(folder)
            stop = threading.Event()
            racer = threading.Thread(target=race, args=(share, stop))
            racer.start()
            try:
                total += await session(share, folder, seed)
            finally:
                stop.set()
                racer.join()
            assert outside(folder)[1] == before[1], f"seed {seed}: names outside changed"  # type: ignore[index]
            assert outside(folder)[0][1:] == before[0][1:], f"seed {seed}: something outside changed"  # type: ignore[index]
            assert descriptors() < DESCRIPTORS, f"seed {seed}: {descriptors()} descriptors"
            base = base or resident()
            assert resident() - base < GROWTH, f"seed {seed}: {resident() - base} bytes more"
            seed += 1
    print(f"{total} messages in {seed - first} sessions from seed {first}: nothing found")  # noqa: T201


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    first = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 32)
    if not sanitized.inside():
        sanitized.run(BUILD, __file__, seconds, first)
    print(f"from seed {first}", flush=True)  # noqa: T201
    asyncio.run(campaign(seconds, first))


if __name__ == "__main__":
    main()
