"""Hostile programs in a guest whose user code runs natively: `python -m tests.fuzz.direct_fuzz [SECONDS [SEED]]`, root.

Rounds of tests/support/direct/hostile.c in one guest after the other, by turns with --direct on and auto. Seen from
outside, by tests/fuzz/direct_watch.py: which system calls the host carries out for runners, and what they have mapped.
Fails if a runner makes another call than those of its beginning and those it is for, has anything mapped that is not
its own or is the guest kernel's, or something of another program's or the kernel's was reached in the guest; if the
machine or an honest program in it does not go on, its kernel complains, or processes, descriptors or threads are left.
Prints how long the loop was kept (its own work, and as time passed), beside the same while the guest only computes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cpu.direct
import vmm
from tests.support.patience import PATIENCE
from tests.support.stalls import StallWatch, resident
from vmm.config import Share

SOURCES = Path(__file__).parents[1] / "support" / "direct"
FLAGS = ["-O1", "-static", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-mno-red-zone", "-falign-functions=4096"]
ROUND, ROUNDS = 20, 6
"""Seconds of attacks in a round; rounds in a guest."""
NAME = f"runner-{os.getpid()}"[:15]
"""Of the processes here, so that others' are not counted."""
SETSID, UNFILTERED, MAPPING, BEGINNING = 112, {335, 336}, {9, 10, 11, 16}, {35, 292}
"""System calls of x86-64: setsid, by which a mapper begins; what Linux passes by every filter; mmap, mprotect, munmap
and ioctl; nanosleep, until the other half is ready, and dup3, if it must, of which the mapper's filter allows neither
later."""
TROUBLE = re.compile(r"Oops|BUG:|WARNING:|Call Trace")
APPEND = "nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
"""These complain of time that passes while this host has no processor for the guest."""
HONEST = "n=0; while sleep 0.1; do n=$((n+1)); echo $n >/tmp/beat.new; mv /tmp/beat.new /tmp/beat; done"
CONTROL = "end=$(($(cut -d. -f1 /proc/uptime) + {})); while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do :; done"


def problems_of_calls(calls: dict[str, dict[str, int]], least: dict[bool, Counter[int]]) -> list[str]:
    """Calls that a runner makes beside those that one without guest code makes (`least`, by whether it is a mapper)."""
    found = []
    for pid, numbers in calls.items():
        count = Counter({int(number): n for number, n in numbers.items()})
        mapper = SETSID in count
        usual = MAPPING | BEGINNING if mapper else UNFILTERED
        more = {number: n for number, n in (count - least[mapper]).items() if number not in usual}
        if more:
            found.append(f"{'mapper' if mapper else 'guest half'} {pid} made other calls (number: how often): {more}")
    return found


@contextlib.asynccontextmanager
async def watched(into: dict[str, Any]) -> AsyncIterator[asyncio.StreamWriter]:
    """What tests.fuzz.direct_watch has seen meanwhile, in `into`; its input, which wants one line."""
    words = (sys.executable, "-m", "tests.fuzz.direct_watch", str(os.getpid()), NAME)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, limit=1 << 26)
    assert process.stdin is not None and process.stdout is not None
    try:
        if await process.stdout.readline() != b"ready\n":
            raise SystemExit("no trace of system calls here: this needs root and tracefs")
        yield process.stdin
    finally:
        process.stdin.close()
        line = await process.stdout.readline()
        await process.wait()
    into.update(json.loads(line))


class Campaign:
    """What was found."""

    def __init__(self, folder: Path, seconds: float, seed: int) -> None:
        self.folder, self.end, self.seed = folder, time.monotonic() + seconds, seed
        self.problems: list[str] = []
        self.tried: Counter[str] = Counter()
        self.stalls: dict[str, list[tuple[float, float]]] = {"attacked": [], "computing": []}
        self.runners = self.stops = self.looks = self.mappings = self.machines = self.most_memory = self.lost = 0
        self.least: dict[bool, Counter[int]] = {}

    async def reference(self) -> None:
        """The calls of a runner in which no guest code is."""
        seen: dict[str, Any] = {}
        async with watched(seen):
            result, why = cpu.direct._core.direct_probe(str(cpu.direct._PROGRAM))
            if result < 0:
                raise SystemExit(f"direct execution: {why}")
        for numbers in seen["calls"].values():
            count = Counter({int(number): n for number, n in numbers.items()})
            self.least[SETSID in count] = count
        if set(self.least) != {False, True}:
            raise SystemExit(f"the trace does not show the two processes of a runner: {seen}")

    async def machine(self, direct: Any) -> None:
        """One guest, attacked for some rounds."""
        shares = [Share(path=self.folder, mount="/work", readonly=True)]
        options: dict[str, Any] = {
            "core": "soft",
            "nets": [],
            "memory": "512M",
            "shares": shares,
            "direct": direct,
            "append": APPEND,
        }
        seen: dict[str, Any] = {}
        async with watched(seen) as watch, vmm.run("linux", **options) as machine:
            text = (await machine.exec("cat", "/proc/iomem", timeout=120 * PATIENCE, check=True)).text
            ranges = re.findall(r"([0-9a-f]+-[0-9a-f]+) : Kernel (?:code|rodata|data)", text)
            if len(ranges) != 3:
                raise SystemExit(f"the guest does not say where its kernel is: {text}")
            await machine.exec("sh", "-c", f"({HONEST}) >/dev/null 2>&1 &", check=True)
            watch.write(" ".join(ranges).encode() + b"\n")
            await self.measured(machine, "computing", "sh", "-c", CONTROL.format(ROUND // 2))
            for _ in range(ROUNDS):
                await self.round(machine)
                if time.monotonic() > self.end or self.problems:
                    break
            log = (await machine.exec("dmesg", timeout=120 * PATIENCE)).text
            self.problems += [f"the guest's kernel: {line}" for line in log.splitlines() if TROUBLE.search(line)][:20]
            self.stops += machine.stats()["native-stops"]
        self.machines += 1
        self.runners += len(seen["calls"])
        self.looks += seen["looks"]
        self.mappings += seen["mappings"]
        self.lost += seen["lost"]
        self.problems += problems_of_calls(seen["calls"], self.least)
        self.problems += [f"mapped: {line}" for line in seen["wrong"]][:20]

    async def measured(self, machine: Any, name: str, *words: str) -> str:
        """What a program prints, while the loop is watched."""
        async with StallWatch() as watch:
            result = await machine.exec(*words, timeout=(ROUND + 120) * PATIENCE)
        self.stalls[name].append((watch.longest, watch.longest_wall))
        if watch.stack:
            self.problems.append(f"the loop stood still for more than 2 s:\n{watch.stack}")
        if result.status:
            self.problems.append(f"{' '.join(words)}: status {result.status}: {result.text[-300:]}")
        return str(result.text)

    async def round(self, machine: Any) -> None:
        before, stops = await self.beat(machine), machine.stats()["native-stops"]
        self.seed += 1
        try:
            text = await self.measured(machine, "attacked", "/work/hostile", str(self.seed), str(ROUND))
        except TimeoutError:
            self.problems.append(f"seed {self.seed}: the attacks did not end")
            return
        self.problems += [f"seed {self.seed}: {line}" for line in text.splitlines() if line.startswith("VIOLATION")]
        self.tried.update({name: int(n) for name, n in re.findall(r"^([^:\n]+): (\d+)$", text, re.MULTILINE)})
        if text.splitlines()[-1:] != ["done"]:
            self.problems.append(f"seed {self.seed}: the program that attacks did not end as it should: {text[-300:]}")
        if await self.beat(machine) <= before:
            self.problems.append(f"seed {self.seed}: another program of the guest does not go on")
        try:
            async with asyncio.timeout(60 * PATIENCE):
                while machine.stats()["native-stops"] <= stops:  # as they were when the vCPU last paused
                    await machine.exec("true")
        except TimeoutError:
            self.problems.append(f"seed {self.seed}: nothing runs natively any more")
        self.most_memory = max(self.most_memory, resident())

    async def beat(self, machine: Any) -> int:
        async with asyncio.timeout(60 * PATIENCE):
            while not (text := (await machine.exec("cat", "/tmp/beat")).text).strip():
                await asyncio.sleep(0.05)
        return int(text)

    def report(self) -> str:
        def ms(values: list[tuple[float, float]]) -> str:
            if not values:
                return "not measured"
            work, wall = ([pair[i] * 1e3 for pair in values] for i in (0, 1))
            return (
                f"{max(work):.2f} ms of its work (median {statistics.median(work):.2f}), "
                f"{max(wall):.1f} ms passed (median {statistics.median(wall):.1f})"
            )

        attacked, computing = (ms(self.stalls[name]) for name in ("attacked", "computing"))
        lines = [
            f"{sum(self.tried.values())} attacks in {self.machines} machines, {self.stops} stops; {self.runners} "
            f"processes of runners traced, {self.lost} gaps; {self.mappings} mappings looked at in {self.looks} looks",
            ", ".join(f"{name} {n}" for name, n in self.tried.items()),
            f"the loop was kept for at most: attacked {attacked}; computing {computing}",
            *self.problems,
            "nothing found" if not self.problems else f"{len(self.problems)} problems",
        ]
        return "\n".join(lines) + "\n"


def left() -> tuple[int, int, int]:
    """Descriptors, threads and children of this process; the loop's pool of threads grows as it is used."""
    pool = sum(thread.name.startswith("asyncio") for thread in threading.enumerate())
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")) - pool, len(children)


async def campaign(found: Campaign) -> None:
    await found.reference()
    before, memory = None, 0
    while time.monotonic() < found.end and not found.problems:
        await found.machine("on" if found.machines % 2 == 0 else "auto")
        now = left()
        if before is None:
            before, memory = now, resident()
        elif any(new > old for new, old in zip(now, before, strict=True)):
            found.problems.append(f"left over: descriptors, threads, children were {before}, are {now}")
    sys.stdout.write(
        f"descriptors, threads, children after the first machine {before}, after the last {left()}; "
        f"memory then {memory >> 20} MiB, now {resident() >> 20}, at most {found.most_memory >> 20}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.direct_fuzz", description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=600)
    parser.add_argument("seed", type=int, nargs="?", default=random.SystemRandom().randrange(1, 1 << 30))
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.stdout.write("cannot run here: needs root, for the kernel's trace of system calls\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "gcc",
            *FLAGS,
            f"-I{SOURCES.parents[2] / 'cpu'}",
            "-o",
            f"{folder}/hostile",
            str(SOURCES / "hostile.c"),
        ]
        subprocess.run(command, check=True)
        cpu.direct._PROGRAM = Path(shutil.copy(cpu.direct._PROGRAM, f"{folder}/{NAME}"))
        found = Campaign(Path(folder), arguments.seconds, arguments.seed)
        sys.stdout.write(f"from seed {arguments.seed}\n")
        sys.stdout.flush()
        asyncio.run(campaign(found))
    sys.stdout.write(found.report())
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
