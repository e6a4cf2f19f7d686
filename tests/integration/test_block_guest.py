"""Disks of a Debian guest over both transports and by both engines: fio with verification, features, durability.

On each core that runs stock kernels.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmm
from images import catalog
from tests.support import linuximage, programs
from tests.support.debian import PATIENCE
from vmm.config import Disk

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(bool(programs.missing(["e2fsck", "debugfs"])), reason="e2fsprogs is not installed"),
]
SECONDS = 120 * PATIENCE
sh = functools.partial(linuximage.sh, seconds=SECONDS)
MIB = 1 << 20

WAYS = [
    ("pci", "io_uring", "writeback"),
    ("mmio", "io_uring", "none"),
    ("pci", "threads", "none"),
    ("mmio", "threads", "writethrough"),
]
"""(transport, engine, cache)."""
ways = pytest.mark.parametrize("way", WAYS, ids="-".join)
Way = tuple[str, str, str]


def disk(path: Path, way: Way, **options: Any) -> Disk:
    """A disk of that way; the test is skipped where the host lacks it."""
    transport, io, cache = way
    if io == "io_uring":
        from virtio._ring import BlockEngine

        if BlockEngine.io_uring_error():
            pytest.skip("needs io_uring")
    if cache == "none":
        try:
            os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
        except OSError:
            pytest.skip("needs a file system with O_DIRECT")
    return Disk(path=path, transport=transport, io=io, cache=cache, **options)  # type: ignore[arg-type]


def root_copy(folder: Path) -> tuple[catalog.Image, Path]:
    """The image, and a copy of its root disk to write to."""
    found = linuximage.need()
    assert found.disk is not None
    path = folder / "root.img"
    shutil.copyfile(found.disk, path)
    return found, path


async def disks_by_id(vm: vmm.VirtualMachine) -> dict[str, str]:
    """id -> name in the guest. The id is what GET_ID returned."""
    lines = await sh(vm, "cd /sys/block; for d in vd?; do echo $(cat $d/serial) $d; done")
    return dict(line.split() for line in lines.splitlines())


async def with_tools(vm: vmm.VirtualMachine) -> dict[str, str]:
    """Mount the disk with the id "tools"; all disks by id."""
    names = await disks_by_id(vm)
    await sh(vm, programs.MOUNT.format(device=names["tools"]))
    return names


def fsck(path: Path) -> None:
    """Clean, without repairs."""
    done = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def replay(path: Path) -> None:
    """Replay the journal, as the next mount would; nothing else may need repair."""
    subprocess.run(["e2fsck", "-E", "journal_only", "-y", path], capture_output=True, timeout=SECONDS)
    fsck(path)


def file_of(path: Path, name: str) -> bytes:
    """A file of an ext4 image."""
    return subprocess.run(["debugfs", "-R", f"cat {name}", path], capture_output=True, timeout=SECONDS).stdout


FIO = (
    "chroot /tools /usr/bin/fio --name=x --direct=1 --ioengine=libaio --iodepth=32 --verify_state_save=0 "
    "--verify_fatal=1 --randseed=5 --minimal "
)


@ways
@pytest.mark.skipif(bool(programs.missing(["fio"])), reason="fio is not installed")
async def test_fio_verifies(tmp_path: Path, stock_core: Any, way: Way) -> None:
    """Random and sequential writes that fio reads back, and its own proof that it would have seen a wrong byte."""
    linuximage.need()
    data = tmp_path / "data"
    data.write_bytes(random.Random(1).randbytes(16 * MIB))
    tools = programs.tools(tmp_path, ["fio"])
    disks = (Disk(path=tools, readonly=True, id="tools"), disk(data, way, id="data"))
    async with vmm.run("linux", core=stock_core, disks=disks, timeout=3 * SECONDS) as vm:
        names = await with_tools(vm)
        fio = f"{FIO} --filename=/dev/{names['data']} "
        await sh(vm, f"{fio} --rw=randread --bs=4k --size=2M --io_size=2M")
        await sh(vm, f"{fio} --rw=randwrite --bs=4k --size=4M --verify=crc32c --do_verify=1")
        await sh(vm, f"{fio} --rw=write --bs=512k --offset=8M --size=8M --verify=crc32c --do_verify=1")
        await sh(vm, f"{fio} --rw=randwrite --bs=4k --size=4M --verify=crc32c --verify_only=1")
        await sh(vm, "sync")
        with data.open("r+b") as file:  # a byte of the payload of some block
            file.seek(40 * 4096 + 2000)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            os.fsync(file.fileno())
        wrong = await vm.exec(
            "sh", "-c", f"{fio} --rw=randwrite --bs=4k --size=4M --verify=crc32c --verify_only=1", timeout=SECONDS
        )
        assert wrong.status != 0, "fio did not see the changed byte"


@ways
@pytest.mark.skipif(bool(programs.missing(["blkdiscard", "fallocate"])), reason="util-linux is not installed")
async def test_what_a_disk_can_do(tmp_path: Path, stock_core: Any, way: Way) -> None:
    """Discard, write-zeroes, topology, serial number, cache mode and queues, as Linux sees them."""
    linuximage.need()
    data = tmp_path / "data"
    content = random.Random(2).randbytes(8 * MIB)
    data.write_bytes(content)
    tools = programs.tools(tmp_path, ["blkdiscard", "fallocate"])
    disks = (Disk(path=tools, readonly=True, id="tools"), disk(data, way, id="serial-number-0123", queues=3))
    async with vmm.run("linux", core=stock_core, cpus=2, disks=disks, timeout=SECONDS) as vm:
        names = await with_tools(vm)
        name = names["serial-number-0123"]
        facts = (
            "logical_block_size physical_block_size minimum_io_size optimal_io_size "
            "discard_max_bytes write_zeroes_max_bytes write_cache"
        )
        seen = await sh(vm, f"cd /sys/block/{name}/queue; for i in {facts}; do echo $i $(cat $i); done; ls ../mq")
        lines = dict(line.split(maxsplit=1) for line in seen.splitlines() if " " in line)
        logical = int(lines["logical_block_size"])
        assert logical in (512, 4096)
        assert lines["physical_block_size"] == lines["minimum_io_size"] == "4096"
        assert lines["optimal_io_size"] == "0"
        assert int(lines["discard_max_bytes"]) > 0 and int(lines["write_zeroes_max_bytes"]) > 0
        assert lines["write_cache"] == ("write through" if way[2] == "writethrough" else "write back")
        assert [line for line in seen.splitlines() if " " not in line] == ["0", "1"], "a queue for each vCPU"
        await sh(vm, f"chroot /tools /usr/bin/blkdiscard -o {MIB} -l {MIB} /dev/{name}")
        await sh(vm, f"chroot /tools /usr/bin/blkdiscard -z -o {3 * MIB} -l {MIB} /dev/{name}")
        await sh(vm, f"chroot /tools /usr/bin/fallocate -p -o {5 * MIB} -l {MIB} /dev/{name}")
        both = f"for i in 0 1; do taskset $((i + 1)) dd if=/dev/{name} bs=64k count=16 iflag=direct | md5sum; done"
        sums = [line.split()[0] for line in (await sh(vm, f"{both} 2>/dev/null")).splitlines()]
        assert sums == [hashlib.md5(content[:MIB]).hexdigest()] * 2, "through both queues"
        for mode in ("write through", "write back"):
            cache_type = f"/sys/block/{name}/cache_type"
            assert await sh(vm, f"echo {mode} > {cache_type}; cat {cache_type}") == f"{mode}\n", "the driver may choose"
    after = data.read_bytes()
    for start, zero in ((0, False), (2, False), (3, True), (4, False), (5, True), (6, False)):
        part = slice(start * MIB, (start + 1) * MIB)
        assert after[part] == (bytes(MIB) if zero else content[part]), start
    if way[2] != "none":
        assert data.stat().st_blocks * 512 <= 7 * MIB, "what was discarded or punched takes no space"


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.skipif(bool(programs.missing(["fio"])), reason="fio is not installed")
async def test_a_root_file_system_survives_poweroff(tmp_path: Path, stock_core: Any, transport: str) -> None:
    """fio writes and verifies files on the root file system; after poweroff it is clean and holds them."""
    found, root = root_copy(tmp_path)
    tools = programs.tools(tmp_path, ["fio"])
    async with vmm.VirtualMachine(
        kernel=found.kernel,
        initrd=found.initrd,
        append="root=/dev/vda rw",
        disks=(
            Disk(path=root, id="root", transport=transport),  # type: ignore[arg-type]
            Disk(path=tools, id="tools", readonly=True, transport=transport),  # type: ignore[arg-type]
        ),
        agent=True,
        core=stock_core,
        timeout=3 * SECONDS,
    ) as vm:
        vm.resume()
        await with_tools(vm)
        await sh(vm, f"{FIO} --directory=/root --nrfiles=8 --size=4M --rw=randrw --bs=4k --verify=crc32c --do_verify=1")
        await sh(vm, "for i in 1 2 3 4 5; do mkdir -p /d$i; cp /bin/busybox /d$i/; done; echo kept > /note")
        want = (await sh(vm, "md5sum /x.0.3")).split()[0]
        await sh(vm, "for i in tmp root dev proc sys; do umount /tools/$i; done; umount /tools")
        await vm.stop(timeout=SECONDS)
    fsck(root)
    assert file_of(root, "/note") == b"kept\n"
    assert hashlib.md5(file_of(root, "/x.0.3")).hexdigest() == want


RECORDS = """
( j=0; while true; do
    j=$((j+1)); mkdir -p /busy/$((j%7)); cp /bin/busybox /busy/$((j%7))/$((j%3)); rm -rf /busy/$(((j+3)%7))
done ) &
i=0
while true; do
    i=$((i+1))
    printf '%08d' $i | dd of=/dev/LOG bs=512 seek=$i conv=notrunc,sync,fsync 2>/dev/null
    printf '%08d\\n' $i | dd of=/journal bs=9 seek=$((i-1)) conv=notrunc,fsync 2>/dev/null
    echo record $i is durable
done
"""
MACHINE = """
import asyncio, sys, vmm
async def main():
    async with vmm.VirtualMachine(kernel={kernel!r}, initrd={initrd!r}, append='root=/dev/vda rw', agent=True,
                                  core={core!r}, timeout={seconds}, disks=({root!r}, {log!r})) as vm:
        vm.resume()
        log = (await vm.exec('sh', '-c', 'cd /sys/block; grep -l ^log$ */serial')).stdout.decode().split('/')[0]
        process = await vm.start_process('sh', '-c', {records!r}.replace('LOG', log))
        async for part in process.stdout:
            sys.stdout.write(part.decode()); sys.stdout.flush()
asyncio.run(main())
"""


@ways
@pytest.mark.clause("5.2.6.2-h")
async def test_what_was_flushed_survives_kill_9(tmp_path: Path, stock_core: Any, way: Way) -> None:
    """A log-structured writer in the guest says which records it has flushed, to a disk and to a file of a busy root
    file system; the VMM is killed; they are there, and after the journal's replay the file system is clean."""
    found, root = root_copy(tmp_path)
    log = tmp_path / "log.img"
    log.write_bytes(bytes(4 * MIB))
    disk(root, way)
    script = MACHINE.format(
        kernel=str(found.kernel),
        initrd=str(found.initrd),
        core=stock_core,
        seconds=SECONDS,
        root="{},id=root,transport={},io={},cache={}".format(root, *way),
        log="{},id=log,transport={},io={},cache={}".format(log, *way),
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
    data = log.read_bytes()
    for number in range(1, last + 1):
        assert data[512 * number : 512 * number + 8] == b"%08d" % number
    replay(root)
    journal = file_of(root, "/journal").splitlines()
    assert journal[:last] == [b"%08d" % number for number in range(1, last + 1)]
