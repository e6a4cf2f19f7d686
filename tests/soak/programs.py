"""The host's own programs in a guest, with --direct on, with off, and here: `python -m tests.soak.programs [NAME…]`.

What they print must be the same. The guest has the host's root directory as a share, so all three run the same files;
only /tmp is a directory of the guest's own. What is not installed here, or fails already here, is named and left out.
Status 0: nothing differs. Programs that ask for the processor's features see those of the guest's model; the host's C
library is told to make no use of what that has not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import vmm
from cpu.direct import support
from tests.support.counted import counters
from tests.support.patience import PATIENCE
from vmm.config import Share

SOURCES = Path(__file__).parent / "programs_guest"
WORK = "/mnt"
"""Where both see what was built for this."""
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX,-AVX512F",
}
CASE_SECONDS = 600.0
CASES: Mapping[str, str] = dict(
    re.findall(r"^([\w-]+)\)\n +: (\w+)$", (SOURCES / "cases.sh").read_text(), re.MULTILINE)
)
"""The program that each case needs."""
PREPARE = "mount -t tmpfs t /host/tmp; mount -t proc p /host/proc; mount -t devtmpfs d /host/dev"


def build(folder: Path) -> set[str]:
    """Fill the folder; the names of cases that cannot be built here."""
    flags = ["-std=gnu11", "-O1", "-g", "-pthread"]
    without: set[str] = set()

    def made(command: list[str | Path], *cases: str) -> None:
        if shutil.which(str(command[0])) is None or subprocess.run(command, capture_output=True).returncode:
            without.update(cases)

    guest = Path(__file__).parent / "guest"
    made(["gcc", *flags, "-static", "-o", folder / "small", SOURCES / "small.c"], "gdb", "strace")
    made(["gcc", *flags, "-o", folder / "dynamic", SOURCES / "small.c"], "valgrind", "ltrace")
    for bits in ("64", "32"):
        for name in ("kernel", "small"):
            static = ["gcc", f"-m{bits}", *flags, "-static", "-o", folder / f"{name}{bits}"]
            made([*static, SOURCES / f"{name}.c"], f"{name}{bits}")
    made(["javac", "-d", folder, SOURCES / "Work.java"], "java", "java-interpreted", "java-compiled")
    for name in ("work.js", "work.lua", "Work.java", "cases.sh"):
        shutil.copy(SOURCES / name, folder / name)
    shutil.copytree(guest, folder / "project", ignore=shutil.ignore_patterns("*.sh"))
    return without


def script(case: str, work: str) -> str:
    return f"mkdir -p /tmp/case && cd /tmp/case && rm -rf ./* .git && W={work} sh {work}/cases.sh {case}"


def here(case: str, folder: Path) -> str:
    """What the case prints on this host, in a directory /tmp of its own."""
    words = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f"mount -t tmpfs t /tmp && mount --bind {folder} {WORK} && {script(case, WORK)}",
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=CASE_SECONDS, errors="replace"
    )
    return done.stdout + (done.stderr if done.returncode else "") + f"status {done.returncode}\n"


@asynccontextmanager
async def guest(direct: Any, folder: Path) -> AsyncIterator[vmm.VirtualMachine]:
    """A guest that has this host's root directory, and the folder."""
    shares = [Share(path=Path("/"), mount="/host", readonly=True), Share(path=folder, mount="/work", readonly=True)]
    async with vmm.run("linux", core="soft", nets=[], memory="2G", shares=shares, direct=direct) as machine:
        await machine.exec("sh", "-c", f"{PREPARE}; mount --bind /work /host{WORK}", check=True)
        yield machine


async def in_guest(machine: vmm.VirtualMachine, case: str) -> tuple[str, float, int]:
    """What the case prints, seconds, native stops. env is named by its path, since busybox would be env itself, and
    then the shell and whatever else it can be."""
    environment = (f"{key}={value}" for key, value in ENVIRONMENT.items())
    words = ("chroot", "/host", "/usr/bin/env", "-i", *environment, "sh", "-c", script(case, WORK))
    stops = (await counters(machine))["native-stops"]
    begin = time.monotonic()
    try:
        result = await machine.exec(*words, timeout=CASE_SECONDS * PATIENCE)
    except TimeoutError:
        return "did not end\n", time.monotonic() - begin, 0
    seconds = time.monotonic() - begin
    text = result.stdout.decode(errors="replace")
    text += result.stderr.decode(errors="replace") if result.status else ""
    return f"{text}status {result.status}\n", seconds, (await counters(machine))["native-stops"] - stops


async def compare(case: str, folder: Path, on: vmm.VirtualMachine, off: vmm.VirtualMachine) -> bool:
    """Run the case here and in both, and print what differs; whether nothing does."""
    native = await asyncio.to_thread(here, case, folder)
    status = native.splitlines()[-1]
    if status != "status 0":
        sys.stdout.write(f"{case}: left out, here already it ends with {status}\n")
        return True
    text, seconds, stops = await in_guest(on, case)
    other, other_seconds, _ = await in_guest(off, case)
    wrong = [f"on beside off, {difference(text, other)}"] if text != other else []
    wrong += [f"on beside the host, {difference(text, native)}"] if text != native else []
    verdict = "; ".join(wrong) or "equal"
    last = text.splitlines()[-1]
    sys.stdout.write(f"{case}: {verdict} ({last}, {stops} stops, {seconds:.1f} s; off {other_seconds:.1f} s)\n")
    return not wrong


def difference(ours: str, theirs: str) -> str:
    """The first lines that differ."""
    mine, other = ours.splitlines(), theirs.splitlines()
    for i in range(max(len(mine), len(other))):
        left, right = (lines[i] if i < len(lines) else "(nothing)" for lines in (mine, other))
        if left != right:
            return f"line {i + 1}: {left[:160]!r} instead of {right[:160]!r}"
    return ""


async def run(names: list[str]) -> int:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        folder = Path(place)
        folder.chmod(0o755)
        without = build(folder)
        cases = [name for name in CASES if not names or name in names]
        for case in list(cases):
            if case in without or shutil.which(CASES[case]) is None:
                sys.stdout.write(f"{case}: left out, its program or compiler is not here\n")
                cases.remove(case)
        bad = 0
        async with guest("on", folder) as on, guest("off", folder) as off:
            for case in cases:
                bad += not await compare(case, folder, on, off)
                sys.stdout.flush()
            for name, machine in (("on", on), ("off", off)):
                log = (await machine.exec("dmesg", timeout=60 * PATIENCE)).text
                if trouble := re.findall(r".*(?:Oops|BUG:|WARNING:|Call Trace).*", log):
                    bad += 1
                    sys.stdout.write(f"kernel log, {name}: {trouble[0]}\n")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.programs", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0 or not support().available:
        why = f"direct execution: {support().reason}" if os.geteuid() == 0 else "needs root, for mounts"
        sys.stdout.write(f"cannot run here: {why}\n")
        return 1
    return asyncio.run(run(arguments.names))


if __name__ == "__main__":
    sys.exit(main())
