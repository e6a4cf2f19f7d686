"""Disks that come, go and move under a Debian guest that verifies them, over and over:
`python -m tests.soak.disks [ATTACHES [CHANGES [SEED [CORE]]]]`, by default 100 and 1,000 rounds.

In the guest fio writes to one disk past the page cache and verifies what it reads all the while.

- An attach round: another disk comes (raw and qcow2 in turn), the guest writes to it and reads it back while fio goes
  on, and gives it up when it is asked; the bytes are in the file then. Every tenth is pulled amid its writes.
- A round of changes: the disk under fio gets a snapshot and, after a while, a commit back; every 25th is a mirror into
  another file and every 40th a commit that is cancelled and begun again. `qemu-img check`, where it is installed, looks
  at the files every 50 rounds.

A round fails for what fio finds, trouble in the guest's log, bytes that are not in a file, or descriptors that are not
given back. At the end the disk's file has what the guest reads. What failed stays in the directory that is printed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vmm
from tests.support import programs
from tests.support.qcow2 import our_check
from virtio.images.chain import open_chain
from virtio.images.create import create_qcow2, create_raw
from vmm.config import Disk

MIB = 1 << 20
SIZE = 64 * MIB
COMING = 32 * MIB
SECONDS = 300.0
"""After which a step that says nothing has failed: a deadline, far beyond what a busy host takes."""
TROUBLE = re.compile(
    "BUG|WARNING|Oops|Call Trace|lockup|general protection|segfault|hung_task|blocked for more|I/O error"
)
FIO = (
    "chroot /tools /usr/bin/fio --name=v --filename=/dev/$1 --direct=1 --ioengine=libaio --iodepth=8 --size=48M"
    " --bsrange=4k-128k"
    " --rw=randwrite --verify=crc32c --do_verify=1 --verify_backlog=64 --verify_fatal=1 --verify_state_save=0 --minimal"
)
WORK = f"""
n=0
while [ ! -e /stop ]; do
  n=$((n + 1))
  {FIO} --randseed=$n >/fio.out 2>&1 || {{ cat /fio.out >/bad; break; }}
  echo $n >/loops
done
echo >/stopped
"""


def say(text: str) -> None:
    """To whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Failure(Exception):
    """A round found something."""


class Campaign:
    """One guest and its disks."""

    def __init__(self, vm: vmm.VirtualMachine, folder: Path, seed: int) -> None:
        self.vm, self.folder = vm, folder
        self.chance = random.Random(seed)
        self.seed = seed
        self.seen = 0

    async def sh(self, script: str) -> str:
        result = await self.vm.exec("sh", "-c", script, timeout=SECONDS)
        if result.status:
            raise Failure(f"{script}: status {result.status}: {result.text} {result.stderr!r}")
        return result.text

    async def begin(self) -> None:
        """fio begins."""
        names = await self.sh(
            "for d in /sys/block/vd*; do echo $(cat $d/serial) ${d##*/}; done"
        )
        disks = dict(line.split() for line in names.splitlines() if len(line.split()) == 2)
        await self.sh(programs.MOUNT.format(device=disks["tools"]))
        self.work = disks["work"]
        await self.sh(f"cat >/work.sh <<'E'\n{WORK}E\nsh /work.sh {self.work} >/dev/null 2>&1 &")
        await self.loops(1)

    async def loops(self, more: int) -> None:
        """Until fio has verified so many more times."""
        begun = int(await self.sh("cat /loops 2>/dev/null || echo 0"))
        deadline = time.monotonic() + SECONDS
        while int(await self.sh("cat /loops 2>/dev/null || echo 0")) < begun + more:
            await self.healthy()
            if time.monotonic() > deadline:
                raise Failure("fio does not get on")
            await asyncio.sleep(0.05)

    async def healthy(self) -> None:
        """fio has found nothing, nor has the kernel."""
        bad = await self.sh("cat /bad 2>/dev/null; true")
        if bad:
            raise Failure(f"fio: {bad[-500:]}")
        log = (await self.sh("dmesg")).splitlines()
        trouble = [line for line in log if TROUBLE.search(line)]
        if trouble:
            raise Failure("the guest's log: " + "; ".join(trouble[:5]))

    # Disks that come and go.

    async def attach_round(self, number: int) -> str:
        """How the disk went."""
        path = self.folder / f"coming-{number % 4}.img"
        path.unlink(missing_ok=True)
        kind = "raw" if number % 2 else "qcow2"
        (create_raw if kind == "raw" else create_qcow2)(str(path), COMING)
        made = await self.vm.attach(Disk(path=path, format=kind), timeout=SECONDS)
        find = f"for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = {made.id} ] && echo ${{d##*/}}; done"
        name = (await self.sh(f"until [ -n \"$({find})\" ]; do sleep 0.01; done; d=$({find});"
                              " while [ ! -b /dev/$d ]; do sleep 0.01; done; echo $d")).split()[-1]  # fmt: skip
        if number % 10 == 9:
            # Opened before the disk goes: a name that is not there any more would become a file.
            write = "(dd if=/dev/urandom bs=64k count=400 conv=fsync >&3; true) 2>/dev/null >/dev/null &"
            await self.sh(f"exec 3<>/dev/{name}; {write}")
            how = await self.vm.detach(made.id, force=True, timeout=0)
            gone = f"while [ -e /sys/block/{name} ]; do sleep 0.01; done"
            await self.sh(gone)
            # What was pulled on purpose may be told of, and nothing else.
            await self.sh("dmesg -c >/dev/null")
        else:
            at = self.chance.randrange(COMING // 65536 - 16)
            sums = await self.sh(
                f"dd if=/dev/urandom of=/piece bs=64k count=16 2>/dev/null;"
                f"dd if=/piece of=/dev/{name} bs=64k seek={at} conv=fsync 2>/dev/null;"
                f"echo 3 >/proc/sys/vm/drop_caches;"
                f"dd if=/dev/{name} bs=64k skip={at} count=16 2>/dev/null | sha256sum; sha256sum </piece"
            )
            read, wrote = (line.split()[0] for line in sums.splitlines())
            if read != wrote:
                raise Failure("the guest reads something else than it wrote")
            how = await self.vm.detach(made.id, timeout=SECONDS)
            with open_chain(path, format=kind, read_only=True) as chain:
                piece = bytearray(MIB)
                chain.image.read(at * 65536, piece)
            if hashlib.sha256(piece).hexdigest() != wrote:
                raise Failure(f"{path} has something else than the guest wrote")
            if kind == "qcow2" and not our_check(path).clean:
                raise Failure(f"{path} is not consistent")
        if any(device["id"] == made.id for device in self.vm.attached()):
            raise Failure(f"{made.id} is there after it was detached")
        return how

    # The disk under fio.

    async def change_round(self, number: int) -> str:
        """What was done."""
        disk = self.vm.disks["work"]
        if number % 25 == 24:
            before = Path(disk.chain[0])
            target = self.folder / f"mirror-{number}.img"
            await disk.mirror(target, format="raw" if number % 50 == 49 else "qcow2")
            if disk.chain != [str(target)]:
                raise Failure(f"after a mirror the disk is {disk.chain}")
            before.unlink()
            return "mirror"
        top = self.folder / f"top-{number}.qcow2"
        await disk.snapshot(top)
        await asyncio.sleep(self.chance.random() * 0.2)
        if number % 40 == 39:
            job = disk.start_commit()
            await asyncio.sleep(self.chance.random() * 0.05)
            await job.cancel()
            if job.state == "done":
                top.unlink()
                return "commit"
        await disk.commit()
        if len(disk.chain) != 1:
            raise Failure(f"after a commit the disk is {disk.chain}")
        with open_chain(top, alone=True, read_only=True) as alone:
            if {kind for _, kind, _, _ in alone.image.map(0, SIZE)} != {"hole"}:
                raise Failure(f"{top} still holds something after its commit")
        top.unlink()
        return "snapshot and commit"

    def check_files(self) -> None:
        """By another program."""
        path = Path(self.vm.disks["work"].chain[0])
        if shutil.which("qemu-img") and self.vm.present.disks[-1].format != "raw":
            done = subprocess.run(
                ["qemu-img", "check", "-U", "-f", "qcow2", path], capture_output=True, text=True, timeout=SECONDS
            )
            # 3: clusters are claimed that the tables, which we keep in memory, do not name yet.
            if done.returncode not in (0, 3):
                raise Failure(f"qemu-img check {path}: {done.stdout[-300:]}{done.stderr[-300:]}")

    async def end(self) -> None:
        """fio stops; the file has what the guest reads."""
        await self.sh("echo >/stop; until [ -e /stopped ]; do sleep 0.1; done")
        await self.healthy()
        seen = (await self.sh(f"echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/{self.work}")).split()[0]
        part = next(disk for disk in self.vm.present.disks if disk.id == "work")
        path, format = part.path, part.format
        self.vm.kill()
        await self.vm.wait()
        with open_chain(path, format=None if format == "auto" else format, read_only=True) as chain:
            data = bytearray(chain.size)
            chain.image.read(0, data)
            if chain.top.format == "qcow2" and not our_check(path).clean:
                raise Failure(f"{path} is not consistent at the end")
        if hashlib.sha256(data).hexdigest() != seen:
            raise Failure(f"{path} has something else than the guest reads")


def descriptors() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))


async def run(attaches: int, changes: int, seed: int, core: str, folder: Path) -> None:
    """The whole campaign. Raises Failure."""
    tools = programs.tools(folder, ["fio"])
    create_qcow2(str(folder / "work.qcow2"), SIZE)
    disks = [Disk(path=tools, readonly=True, id="tools"), Disk(path=folder / "work.qcow2", format="qcow2", id="work")]
    async with vmm.run("linux", core=core, memory="256M", nets=[], disks=disks) as vm:
        campaign = Campaign(vm, folder, seed)
        await campaign.begin()
        for name, rounds, step in (
            ("attach", attaches, campaign.attach_round), ("change", changes, campaign.change_round),
        ):  # fmt: skip
            counts: dict[str, int] = {}
            begun, least = time.monotonic(), 0
            for number in range(rounds):
                how = await step(number)
                counts[how] = counts.get(how, 0) + 1
                await campaign.healthy()
                if number == 9:
                    least = descriptors()
                elif number > 9 and descriptors() > least + 8:
                    raise Failure(f"{descriptors()} descriptors are open, {least} were after ten rounds")
                if number % 50 == 49 and name == "change":
                    campaign.check_files()
                if number % 10 == 9 or number == rounds - 1:
                    loops = (await campaign.sh("cat /loops")).strip()
                    done = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
                    took = time.monotonic() - begun
                    say(f"{name} {number + 1}/{rounds}: {done}; fio verified {loops} times; {took:.0f} s")
        await campaign.loops(1)
        await campaign.end()


def main() -> int:
    words = sys.argv[1:]
    attaches, changes = int(words[0]) if words else 100, int(words[1]) if len(words) > 1 else 1000
    seed, core = int(words[2]) if len(words) > 2 else 1, words[3] if len(words) > 3 else "soft"
    if programs.missing(["fio", "mke2fs"]):
        say(f"needs {', '.join(programs.missing(['fio', 'mke2fs']))}")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="soak-disks-"))
    try:
        asyncio.run(run(attaches, changes, seed, core, folder))
    except BaseException as error:
        say(f"failed: {type(error).__name__}: {error}\nseed {seed}; the files are in {folder}")
        if isinstance(error, Failure | vmm.VmmError):
            return 1
        raise
    shutil.rmtree(folder)
    say(f"{attaches} attach rounds and {changes} rounds of changes: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
