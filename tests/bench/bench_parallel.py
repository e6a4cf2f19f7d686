"""Several vCPUs of the software core with a host thread each (--parallel on), beside one vCPU, or one thread for all.

Two compute jobs at once on two vCPUs, beside one alone, with --parallel on and off in turn. `make -j2` of a small C
project in a Debian guest with two vCPUs, beside `make` in one with one vCPU; the same disk under QEMU with a TCG thread
for each vCPU, by turns. fio in a guest with two vCPUs, with --parallel on and off. The figures are throughput, as a
multiple of what stands beside it. At last, how soon interrupts and kicks reach two busy vCPUs
(tests/support/soft_latency.c). On a host with one processor, or a busy one, none of it says anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import vmm
from images import builder, built
from tests.bench.guestpair import FIO, Guest, build_root, laps, ours_with
from tests.soak import sources
from tests.support import programs, soft_programs
from vmm.vm import VirtualMachine

Row = Mapping[str, object]
ROUNDS = int(os.environ.get("BENCH_PARALLEL_ROUNDS", "5"))
GOAL, MAKE_GOAL = 1.8, 1.5
JOB = "awk 'BEGIN { for (i = 0; i < 400000; i++) s += i * i % 7; print s > \"/dev/null\" }'"
IMAGE = "debian-work"
RECIPE = Path(__file__).parents[1] / "soak/state_guest" / f"{IMAGE}.toml"
LATENCIES = 2000
"""Of each kind."""
FILES, FUNCTIONS = 6, 2
"""Of the project that is compiled."""
INIT = """#!/bin/sh
export PATH=/usr/bin:/bin:/usr/sbin:/sbin
mount -t proc p /proc; mount -t tmpfs t /tmp
stty -echo
mount -o ro /dev/vdb /mnt && cp -r /mnt/src /tmp/src && cd /tmp/src && make -s -j2 >/dev/null && echo BENCH ready 0
while read kind jobs rest; do
    [ "$kind" = make ] || break
    make -s clean; begin=$(date +%s%N)
    make -s -j$jobs >/dev/null && echo BENCH make $((($(date +%s%N) - begin) / 1000000))
done
sync; echo o >/proc/sysrq-trigger; sleep 60
"""


async def seconds(vm: VirtualMachine, command: str) -> float:
    begin = time.monotonic()
    await vm.exec("sh", "-c", command, timeout=600)
    return time.monotonic() - begin


async def measure() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"on": [], "off": []}
    for mode in found:
        async with vmm.run("linux", core="soft", cpus=2, parallel=mode, console="none") as vm:
            await seconds(vm, JOB)
            for _ in range(ROUNDS):
                one = await seconds(vm, JOB)
                two = await seconds(vm, f"{JOB} & {JOB} & wait")
                found[mode].append(2 * one / two)
    return found


def jobs() -> Iterator[Row]:
    """Two independent compute jobs."""
    name = "two jobs on two vCPUs, throughput of one"
    found = asyncio.run(measure())
    load = f"load {os.getloadavg()[0]:.1f}"
    yield {"name": f"{name}, --parallel on", "value": statistics.median(found["on"]), "unit": "×", "goal": GOAL,
           "better": "more", "note": load}  # fmt: skip
    yield {"name": f"{name}, off", "value": statistics.median(found["off"]), "unit": "×", "note": load}


def compiling_disks(folder: Path, root: Path) -> tuple[Path, Path]:
    """A copy of Debian's disk that has INIT, and one with the project."""
    copy, tree = folder / "root.img", folder / "tree"
    subprocess.run(["cp", "--sparse=always", root, copy], check=True)
    (folder / "bench.sh").write_text(INIT)
    for request in (f"write {folder}/bench.sh bench.sh", "set_inode_field bench.sh mode 0100755"):
        subprocess.run(["debugfs", "-w", "-R", request, copy], check=True, capture_output=True)
    tree.mkdir()
    sources.make(tree / "src", 1, FILES, FUNCTIONS)
    return copy, programs.image(tree, folder / "project.img", "16M")


def compiling_commands(folder: Path) -> dict[tuple[str, int], list[str | Path]]:
    """By program and number of vCPUs."""
    image = built.current(IMAGE)
    if image is None:
        image = builder.build(str(RECIPE), None)
    kernel, initrd = image.directory / "vmlinuz", image.directory / "initrd"
    disk, project = compiling_disks(folder, image.directory / "root.img")
    append = "root=/dev/vda rw quiet init=/bench.sh"
    commands = {}
    for cpus in (1, 2):
        disks = [folder / f"{who}{cpus}.img" for who in ("ours", "qemu")]
        for path in disks:
            subprocess.run(["cp", "--sparse=always", disk, path], check=True)
        ours: list[str | Path] = [Path(sys.executable).with_name("vmm"), "run", "--core", "soft", "--kernel", kernel]
        ours += ["--initrd", initrd, "--append", append, "--memory", "512M", "--cpus", str(cpus), "--net", "none"]
        ours += ["--parallel", "on" if cpus > 1 else "off", "--disk", f"{disks[0]},format=raw"]
        ours += ["--disk", f"{project},format=raw,ro"]
        theirs: list[str | Path] = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"]
        theirs += ["-m", "512", "-smp", str(cpus), "-no-reboot", "-nographic", "-nodefaults", "-serial", "stdio"]
        theirs += ["-kernel", kernel, "-initrd", initrd, "-append", f"{append} console=ttyS0"]
        for path, more in ((disks[1], ""), (project, ",readonly=on")):
            theirs += ["-drive", f"file={path},if=virtio,format=raw,cache=writeback{more}"]
        commands["ours", cpus] = ours
        if shutil.which("qemu-system-x86_64"):
            commands["qemu", cpus] = theirs
    return commands


def ready(command: list[str | Path], attempts: int) -> Guest:
    """A guest that has booted. Raises TimeoutError, EOFError."""
    for left in reversed(range(attempts)):
        guest = Guest(command)
        try:
            guest.wait_ready()
            return guest
        except TimeoutError:
            guest.end()
            if not left:
                raise
    raise AssertionError("no attempt")


def compiling() -> Iterator[Row]:
    """`make`, one job on one vCPU and two on two."""
    missing = programs.missing(("gcc", "make", "debugfs", "mke2fs"))
    if missing:
        yield {"name": "make -j2", "value": None, "note": f"needs {', '.join(missing)}"}
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, contextlib.ExitStack() as stack:
        guests = {}
        for which, command in compiling_commands(Path(name)).items():
            # One after the other. QEMU's guests sometimes stand still while they boot.
            guests[which] = ready(command, attempts=3 if which[0] == "qemu" else 1)
            stack.callback(guests[which].end)
        took: dict[tuple[str, int], list[float]] = {which: [] for which in guests}
        for _ in range(ROUNDS):
            for (who, cpus), guest in guests.items():
                ms = guest.measure("make", cpus)
                if ms:
                    took[who, cpus].append(ms / 1000)
    for who, label in (("ours", "--parallel on"), ("qemu", "QEMU's multi-threaded TCG")):
        one, two = took.get((who, 1)), took.get((who, 2))
        if not one or not two:
            yield {"name": f"make -j2 on two vCPUs, {label}", "value": None, "note": "no result"}
            continue
        ratio = statistics.median(a / b for a, b in zip(one, two, strict=True))
        row: dict[str, object] = {"name": f"make -j2 on two vCPUs, throughput of one, {label}", "value": ratio}
        if who == "ours":
            row["goal"] = MAKE_GOAL
        note = f"{statistics.median(one):.1f} s and {statistics.median(two):.1f} s"
        yield row | {"unit": "×", "better": "more", "note": note}
    if took.get(("qemu", 2)) and took["ours", 2]:
        ratio = statistics.median(a / b for a, b in zip(took["ours", 2], took["qemu", 2], strict=True))
        yield {"name": "make -j2 on two vCPUs, time beside QEMU's", "value": ratio, "unit": "×", "goal": 1.0}


def disks() -> Iterator[Row]:
    """fio in two guests with two vCPUs each, one thread for both and a thread for each."""
    missing = programs.missing(("fio", "iperf3", "mke2fs"))
    if missing:
        yield {"name": "fio", "value": None, "note": f"needs {', '.join(missing)}"}
        return
    from images import catalog

    image = catalog.resolve("linux", build=True)
    assert image.initrd is not None
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        root, guests, data = build_root(folder), [], []
        for mode in ("on", "off"):
            own, disk = folder / f"root-{mode}.img", folder / f"data-{mode}.img"
            shutil.copyfile(root, own)
            disk.write_bytes(bytes(256 << 20))
            data.append(disk)
            command = ours_with(image.kernel, image.initrd, own, disk, None, "raw")
            guests.append(Guest([*command, "--cpus", "2", "--parallel", mode]))
            stack.callback(guests[-1].end)
        for guest in guests:
            guest.wait_ready()
        for kind, pairs in laps((guests[0], guests[1]), list(FIO), data, 256).items():
            label, unit = FIO[kind]
            ratio = statistics.median(on / off for on, off in pairs)
            note = f"{statistics.median(off for _, off in pairs):.0f} {unit} with off"
            yield {"name": f"{label}, two vCPUs, on beside off", "value": ratio, "unit": "×", "goal": 1.0,
                   "better": "more", "note": note}  # fmt: skip


def latencies() -> Iterator[Row]:
    """Of interrupts and kicks to two vCPUs that calculate, and that copy."""
    program = soft_programs.build("soft_latency")
    printed = subprocess.run([program, "2", str(LATENCIES)], check=True, capture_output=True, text=True).stdout
    for line in printed.splitlines():
        name, count, median, p99, p999, longest, over = line.split()
        note = f"median {median} us, p99 {p99}, longest {longest}; {over} of {count} beyond 1 ms"
        row = {"name": f"{name}, 99.9th percentile", "value": float(p999) / 1000, "unit": "ms", "goal": 1.0}
        yield row | {"note": note}


def rows() -> Iterator[Row]:
    if len(os.sched_getaffinity(0)) < 2:
        yield {"name": "two vCPUs", "value": None, "note": "needs two processors"}
        return
    yield from jobs()
    yield from compiling()
    yield from disks()
    yield from latencies()
