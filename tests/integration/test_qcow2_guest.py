"""A Debian guest whose root is a qcow2 overlay over a backing file: kill -9, and QEMU on the same files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.integration.test_block_guest import MACHINE, MIB, RECORDS, SECONDS, file_of, fsck, replay, sh
from tests.support import linuximage, programs
from tests.support.qcow2 import needs_qemu_img, our_check, qemu
from vmm import disks
from vmm.config import Disk

pytestmark = [
    pytest.mark.debian,
    needs_qemu_img,
    pytest.mark.skipif(bool(programs.missing(["e2fsck", "debugfs"])), reason="e2fsprogs is not installed"),
]
WAYS = [("io_uring", "writeback", {}), ("threads", "none", {"cluster_size": 32768, "extended_l2": True})]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way[0])


def root_over(folder: Path, options: dict[str, Any]) -> tuple[Any, Path]:
    """The image "linux", and an overlay over a copy of its root disk."""
    found = linuximage.need()
    assert found.disk is not None
    shutil.copyfile(found.disk, folder / "base.img")
    top = folder / "top.qcow2"
    disks.create_disk(str(top), None, backing="base.img", **options)
    return found, top


def as_raw(path: Path) -> Path:
    """The disk in an image as a raw file."""
    made = path.with_suffix(".raw")
    disks.convert(str(path), str(made), format="raw")
    return made


def is_consistent(path: Path) -> None:
    """No errors; clusters may be lost."""
    assert our_check(path).corruptions == 0
    status, output = qemu("qemu-img", "check", path)
    assert status in (0, 3), output


@ways
async def test_what_was_flushed_survives_kill_9(tmp_path: Path, stock_core: Any, way: Any) -> None:
    """As for raw disks; and the images are consistent, with nothing to repair."""
    io, cache, options = way
    found, root = root_over(tmp_path, options)
    log = tmp_path / "log.qcow2"
    disks.create_disk(str(log), 4 * MIB, cluster_size=4096)
    base = (tmp_path / "base.img").read_bytes()
    script = MACHINE.format(
        kernel=str(found.kernel),
        initrd=str(found.initrd),
        core=stock_core,
        seconds=SECONDS,
        root=f"{root},id=root,io={io},cache={cache}",
        log=f"{log},id=log,io={io},cache={cache}",
        records=RECORDS,
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    last = 0
    async with asyncio.timeout(SECONDS):
        while last < 40:
            line = await process.stdout.readline()
            assert line, "the machine ended"
            last = int(line.split()[1])
    os.kill(process.pid, signal.SIGKILL)
    rest = await process.stdout.read()
    await process.wait()
    whole = [line for line in rest.decode().splitlines() if line.endswith("durable")]
    last = int(whole[-1].split()[1]) if whole else last
    is_consistent(root)
    is_consistent(log)
    data = as_raw(log).read_bytes()
    for number in range(1, last + 1):
        assert data[512 * number : 512 * number + 8] == b"%08d" % number
    raw = as_raw(root)
    replay(raw)
    journal = file_of(raw, "/journal").splitlines()
    assert journal[:last] == [b"%08d" % number for number in range(1, last + 1)]
    assert (tmp_path / "base.img").read_bytes() == base


def boot_by_qemu(found: Any, disk: Path, script: str) -> str:
    """Run a script in the same guest under QEMU; what it says."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("needs qemu-system-x86_64")
    command = [program, "-M", "q35", "-accel", "tcg", "-m", "256", "-display", "none", "-serial", "stdio"]
    command += ["-monitor", "none", "-no-reboot", "-nic", "none", "-kernel", found.kernel, "-initrd", found.initrd]
    command += ["-append", "console=ttyS0 root=/dev/vda rw quiet cryptomgr.notests=1"]
    command += ["-drive", f"file={disk},format=qcow2,if=virtio"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        seen = bytearray()
        deadline = time.monotonic() + SECONDS
        typed = False
        while time.monotonic() < deadline and process.poll() is None:
            if select.select([process.stdout], [], [], 1.0)[0]:
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                seen += data
            if not typed and b"~# " in seen:
                typed = True
                process.stdin.write(f"{script}; sync; poweroff -f\n".encode())
                process.stdin.flush()
        process.kill()
    return seen.decode("utf-8", "replace")


@pytest.mark.slow
async def test_qemu_and_we_take_turns(tmp_path: Path, stock_core: Any) -> None:
    """We write, QEMU boots from it and writes, we boot from that."""
    found, root = root_over(tmp_path, {})

    async def ours(script: str) -> str:
        async with vmm.VirtualMachine(
            kernel=found.kernel,
            initrd=found.initrd,
            append="root=/dev/vda rw",
            disks=(Disk(path=root, id="root"),),
            agent=True,
            core=stock_core,
            timeout=SECONDS,
        ) as vm:
            vm.resume()
            output = await sh(vm, script)
            await vm.stop(timeout=SECONDS)
        is_consistent(root)
        return output

    first = (await ours("dd if=/dev/urandom of=/ours bs=64k count=60 2>/dev/null; sync; md5sum /ours")).split()[0]
    seen = await asyncio.to_thread(
        boot_by_qemu, found, root, "md5sum /ours; dd if=/dev/urandom of=/theirs bs=64k count=60; md5sum /theirs"
    )
    assert first in seen, seen
    second = seen.split("  /theirs")[0].split()[-1]
    is_consistent(root)
    assert await ours("md5sum /ours /theirs") == f"{first}  /ours\n{second}  /theirs\n"
    assert our_check(root).clean
    raw = as_raw(root)
    fsck(raw)
    assert hashlib.md5(file_of(raw, "/theirs")).hexdigest() == second
