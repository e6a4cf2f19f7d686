"""Machines that are saved, killed and taken up again, over and over:
`python -m tests.soak.state [ROUNDS [SEED [CORE]]]`.

A Debian guest works all the while: fio verifies what it writes, a program is compiled (always to the same file) and
computes what it computes on the host, files are read again past the page cache, and TCP transfers go to a server on
the host and to one in the guest, each byte compared at both ends. Each round saves the machine while it runs, alone or
as an increment on the round before, kills every process of it, and goes on from the directory.

A round fails for a wrong result, trouble in the kernel's log, a counter that went back; every CHECK_ROUNDS rounds every
worker must have got on, and e2fsck must find nothing on a copy of the saved disk after its journal was played. In the
last round the file system is frozen, and e2fsck must find it clean as it is. What failed stays in the directory that
is printed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from images import built
from tests.soak import machine
from tests.soak.statechild import COUNTERS, GUEST, IMAGE, Facts, Orders
from vmm.state import manifest as manifests

PARTS = ("code", "floating", "forks", "threads", "vector")
"""Of the program that the guest compiles; each with SEEDS."""
SEEDS = 2
PLAIN = {**os.environ, "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX,-AVX512F"}
"""For programs on the host: the C library computes as it does on the guest's processor, without FMA."""
CPUS = 2
BLOB = 8 << 20
CHAIN = 8
"""Snapshots on each other at most."""
CHECK_ROUNDS = 100
ROUND_SECONDS = 2400.0
"""After which a round that says nothing has failed: a deadline, far beyond what a busy host takes."""
TROUBLE = re.compile(
    "BUG|WARNING|Oops|Call Trace|lockup|stall|general protection|segfault|hung_task|EXT4-fs error|I/O error"
    "|blocked for more|clocksource.*unstable|soft lockup"
)


class Failure(Exception):
    """A round found something."""


def expected(folder: Path) -> str:
    """What the guest's program must print, by the host's: lines of part, seed and digest."""
    machine.prepare(folder)
    lines = []
    for part in PARTS:
        for seed in range(1, SEEDS + 1):
            command = [folder / "work", part, str(seed)]
            printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=PLAIN).stdout
            kept = b"".join(line for line in printed.splitlines(keepends=True) if b"@" not in line)
            lines.append(f"{part} {seed} {hashlib.sha256(kept).hexdigest()}  -\n")
    return "".join(lines)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the process and all that it started; they are gone afterwards."""
    pids = family(process.pid)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    deadline = time.monotonic() + 30
    for pid in pids[1:]:
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
            if time.monotonic() > deadline:
                raise Failure(f"process {pid} outlives SIGKILL")
            time.sleep(0.01)


def child(orders: Orders) -> Facts:
    """What one process saw before all of it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.soak.statechild", json.dumps(dataclasses.asdict(orders))], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        if not select.select([process.stdout], [], [], ROUND_SECONDS)[0]:
            raise Failure(f"nothing happened for {ROUND_SECONDS:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise Failure(f"the process ended with status {process.wait()}")
        return Facts(**json.loads(line))
    finally:
        kill_all(process)
        process.stdout.close()


def saved_disk(snapshot: Path, raw: Path) -> None:
    """The disk that a snapshot holds as an overlay, as a raw image."""
    manifest, _ = manifests.read(snapshot)
    entry = manifest.disks["disk0"]
    sectors = (snapshot / "disks" / "disk0.sectors").read_bytes()
    subprocess.run(["cp", "--sparse=always", entry.files[0].path, raw], check=True)
    with raw.open("r+b") as disk, (snapshot / "disks" / "disk0.overlay").open("rb") as overlay:
        sector, count = 0, entry.capacity // 512
        while sector < count:
            if not sectors[sector // 8]:
                sector = (sector // 8 + 1) * 8
                continue
            end = sector
            while end < count and sectors[end // 8] >> end % 8 & 1:
                end += 1
            if end > sector:
                overlay.seek(sector * 512)
                disk.seek(sector * 512)
                disk.write(overlay.read((end - sector) * 512))
            sector = end + 1


def check_disk(snapshot: Path, raw: Path, *, journal: bool) -> None:
    """Failure if e2fsck finds anything on the saved disk; with `journal`, after its journal was played."""
    saved_disk(snapshot, raw)
    for command, most in ((["e2fsck", "-fp"], 1), (["e2fsck", "-fn"], 0)) if journal else ((["e2fsck", "-fn"], 0),):
        result = subprocess.run([*command, raw], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if result.returncode > most:
            raise Failure(f"{' '.join(command)} ends with status {result.returncode}: {result.stdout[-2000:]!r}")
    raw.unlink()


def check_facts(facts: Facts) -> None:
    """Failure for what no round may show."""
    trouble = TROUBLE.search(facts.log)
    if facts.wrong or trouble:
        raise Failure(f"{facts.wrong or trouble}\n{facts.log[-4000:]}")
    for name in COUNTERS:
        if facts.after[name][0] < facts.before[name][0]:
            raise Failure(f"{name} went back: {facts.before[name]}, then {facts.after[name]}")


class Soak:
    """All rounds, in a directory of their own."""

    def __init__(self, folder: Path, rounds: int, seed: int, core: str) -> None:
        self._folder, self._rounds, self._core = folder, rounds, core
        self._source = random.Random(seed)
        self._port = self._source.randrange(20000, 30000)
        self._last, self._chain = "", 0
        self._marks = dict.fromkeys(COUNTERS, 0)
        self._received = 0
        self._stills: list[float] = []
        self._things = folder / "things"

    def run(self) -> str:
        """One line about what was done; Failure."""
        self._things.mkdir()
        (self._things / "expected").write_text(expected(self._folder / "host"))
        (self._things / "blob").write_bytes(self._source.randbytes(BLOB))
        facts = Facts()
        for number in range(self._rounds + 1):
            try:
                facts = self._round(number)
                if number and number % CHECK_ROUNDS == 0:
                    self._got_on(facts)
                    if number < self._rounds:
                        check_disk(Path(self._last), self._folder / "disk", journal=True)
            except Failure as failure:
                raise Failure(f"round {number}: {failure}") from failure
            if number % 10 == 0:
                sys.stdout.write(f"{time.strftime('%H:%M:%S')} round {number}: {self._told(facts)}\n")
                sys.stdout.flush()
        check_disk(Path(self._last), self._folder / "disk", journal=False)
        return f"{self._rounds} rounds: nothing wrong; {self._told(facts)}; e2fsck finds nothing"

    def _round(self, number: int) -> Facts:
        final = number == self._rounds
        target = self._folder / f"s{number}"
        base = self._last if 0 < self._chain < CHAIN and not final and self._source.random() < 0.8 else ""
        seconds = 0.1 + self._source.random() / 2 + (20 if not self._last else 0)
        facts = child(
            Orders(self._last, str(target), base, seconds, self._port, str(self._things), self._core, CPUS, final)
        )
        check_facts(facts)
        self._chain = self._chain + 1 if base else 1
        if not base:
            for old in self._folder.glob("s[0-9]*"):
                if old != target:
                    shutil.rmtree(old)
        self._last = str(target)
        self._received += facts.received
        self._stills.append(facts.stood_still_ms)
        return facts

    def _got_on(self, facts: Facts) -> None:
        for name in COUNTERS:
            if facts.after[name][0] <= self._marks[name]:
                raise Failure(f"{name} has not got on for {CHECK_ROUNDS} rounds: {facts.after[name]}")
            self._marks[name] = facts.after[name][0]

    def _told(self, facts: Facts) -> str:
        done = ", ".join(f"{name} {' '.join(map(str, facts.after[name]))}" for name in COUNTERS)
        stills = self._stills[1:] or self._stills
        return (
            f"{done}; the host compared {self._received >> 20} MiB; stood still "
            f"{statistics.median(stills):.1f} ms (median), {max(stills):.1f} (longest)"
        )


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFFFFFF
    if built.current(IMAGE) is None:
        from images import builder

        builder.build(str(GUEST / f"{IMAGE}.toml"), None)
    folder = Path(tempfile.mkdtemp(prefix="loopvisor-soak-", dir="/var/tmp"))
    sys.stdout.write(f"seed {seed}\n")
    try:
        sys.stdout.write(Soak(folder, rounds, seed, sys.argv[3] if len(sys.argv) > 3 else "auto").run() + "\n")
    except Failure as failure:
        sys.stdout.write(f"{failure}\nkept: {folder}\n")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
