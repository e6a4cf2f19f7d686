"""Hosts without io_uring: an old kernel, or one whose policy forbids it. Disks work all the same."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from virtio.backends.file import FileBlock
from virtio.devices.blk import BlockDevice

PROGRAM = """
import asyncio, ctypes, struct, sys

NR_IO_URING_SETUP, AUDIT_ARCH_X86_64 = 425, 0xC000003E
code, image = int(sys.argv[1]), sys.argv[2]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
program = [
    (LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT_ARCH_X86_64), (RETURN, 0, 0, 0x7FFF0000),
    (LOAD, 0, 0, 0), (EQUAL, 0, 1, NR_IO_URING_SETUP), (RETURN, 0, 0, 0x00050000 | code), (RETURN, 0, 0, 0x7FFF0000),
]
filters = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(filters)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    sys.exit(77)

from tests.support.engines import Uncached
from tests.support.virtio import PciDriver
from virtio.devices.blk import BlockDevice
from virtio.errors import ConfigError

async def main():
    device = BlockDevice(await Uncached.open(image))
    driver = PciDriver(device)
    driver.initialize()
    head = struct.pack("<IIQ", 0, 0, 1)
    print(device.engine, (await driver.request(0, [head], [512, 1]))[:2])
    driver.transport.reset()
    await device.aclose()
    try:
        await Uncached.open(image, io="io_uring")
    except ConfigError as error:
        print(error)

asyncio.run(main())
"""


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOMEM])
def test_a_host_without_io_uring(tmp_path: Path, code: int) -> None:
    (tmp_path / "disk").write_bytes(bytes(512) + b"xy" * 256)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(code)), str(tmp_path / "disk")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[3],
    )
    if done.returncode == 77:
        pytest.skip("needs seccomp filters")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "threads b'xy'"
    assert "io_uring" in second and "io=threads" in second


async def test_a_ring_leaves_nothing_behind(tmp_path: Path) -> None:
    """Descriptors and mappings of the ring end with the device."""
    (tmp_path / "disk").write_bytes(bytes(1 << 16))

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("io_uring")

    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = mapped(), descriptors()
    device = BlockDevice(await FileBlock.open(tmp_path / "disk"))
    if device.engine != "io_uring":
        await device.aclose()
        pytest.skip("needs io_uring")
    assert mapped() > before[0] and descriptors() > before[1]
    await device.aclose()
    await asyncio.sleep(0)
    assert (mapped(), descriptors()) == before
