"""One soak: boot a vmlinux to a shell on the UART, run rounds for a while, compare them with the host's.

Loop thread. Knows nothing of pytest but what tests/support/debian.py does: it skips when Debian's files are missing.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import vmm
from images.tree import Tree
from tests.support import debian
from vmm.boot import linux
from vmm.boot.unpack import unpack_cached
from vmm.config import Direct, Parallel
from vmm.lifecycle import Outcome, Reason

GUEST = Path(__file__).parent / "guest"
SCRIPTS = ("round.sh", "workers.sh")
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
WARNING = 4
"""Kernel log levels up to this one are failures (include/linux/kern_levels.h)."""
TROUBLE = re.compile(r"Oops|BUG|WARNING:|Call Trace|stall|lockup|hung|general protection|segfault", re.IGNORECASE)
PROMPT = rb"soak-shell# "
SHELL = re.compile(r"soak-shell# |\x1b\[[0-9;]*[A-Za-z]|\r")
"""What the shell and its line editor write between the lines."""
GUEST_VENDOR = "AuthenticAMD"
"""Of the processor that the software core shows on every host (cpu/soft/system/cpuid.c)."""
VENDOR = re.compile(r"\d+ \w+\.\w+@(\w+) ")
"""A result that only the processors of one vendor have to have (guest/work.h)."""
BOOT_SECONDS, ROUND_SECONDS = 240.0, 600.0
"""Deadlines: from start to the shell; for the rounds under way to end, here and in the guest."""


@dataclass(slots=True)
class Result:
    """What one soak found. `problems` is empty if everything was as on the host."""

    rounds: int = 0
    lines: int = 0
    boot_seconds: float = 0.0
    seconds: float = 0.0
    instructions: int = 0
    problems: list[str] = field(default_factory=list)


def prepare(folder: Path) -> None:
    """Fill a folder with what rounds need: `work`, `busybox`, the scripts."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(GUEST.glob("*.c"))
    subprocess.run(["gcc", *FLAGS, "-o", folder / "work", *sources, "-lm"], check=True)
    shutil.copy(debian.busybox(), folder / "busybox")
    for name in SCRIPTS:
        shutil.copy(GUEST / name, folder / name)


def initramfs(folder: Path) -> Path:
    """The prepared folder as /soak of an initramfs with a shell."""
    tree = Tree()
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        tree.directory(name)
    tree.character_device("dev/console", 5, 1)
    for name in ("work", "busybox", *SCRIPTS):
        tree.file(f"soak/{name}", (folder / name).read_bytes(), 0o755)
    tree.file("init", (GUEST / "init.sh").read_bytes(), 0o755)
    path = folder / "initramfs"
    path.write_bytes(tree.cpio())
    return path


def vmlinux(meta: str, folder: Path) -> Path:
    """The ELF kernel out of the bzImage of a Debian meta package."""
    path = folder / f"{meta}.vmlinux"
    if not path.exists():
        image = memoryview(debian.kernel(meta).read_bytes())
        path.write_bytes(unpack_cached(linux.parse(image, meta).payload))
    return path


class Host:
    """The same rounds, here; each seed once."""

    def __init__(self, folder: Path, kib: int) -> None:
        self._folder, self._kib = folder, kib
        self._rounds: dict[int, asyncio.Task[Counter[str]]] = {}

    def round(self, seed: int) -> asyncio.Task[Counter[str]]:
        """The lines that a round prints, and how often each."""
        if seed not in self._rounds:
            self._rounds[seed] = asyncio.create_task(self._run(seed), name=f"soak round {seed}")
        return self._rounds[seed]

    async def _run(self, seed: int) -> Counter[str]:
        process = await asyncio.create_subprocess_exec(
            "./busybox", "sh", "round.sh", str(seed), str(self._kib), str(self._folder / f"tmp.{seed}"),
            cwd=self._folder, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Counter(output.decode().splitlines())


def of_every_vendor(lines: Counter[str]) -> Counter[str]:
    """Without the lines of one vendor."""
    return Counter({line: count for line, count in lines.items() if not VENDOR.match(line)})


class Comparison:
    """Lines from the guest, sorted by seed, each round compared when it has ended.

    Lines of one vendor count only if host and guest are of it."""

    def __init__(self, host: Host, result: Result) -> None:
        self._host, self._result = host, result
        self._lines: dict[int, Counter[str]] = {}
        self.ended = 0
        """Workers that ended."""

    async def line(self, text: str) -> None:
        """One line of the console. What is no result of a round is left alone, unless it tells of trouble."""
        match = re.fullmatch(r"(\d+) (.+)", text)
        if match is None:
            if TROUBLE.search(text):
                self._result.problems.append(f"console: {text}")
            return
        seed = int(match[1])
        if match[2] == "worker ended":
            self.ended += 1
            return
        if seed not in self._lines:
            self._host.round(seed)  # begins while the guest goes on
        lines = self._lines.setdefault(seed, Counter())
        lines[text] += 1
        if match[2] == "end":
            del self._lines[seed]
            await self._compare(seed, lines)

    async def _compare(self, seed: int, ours: Counter[str]) -> None:
        theirs = await self._host.round(seed)
        if any(match[1] != GUEST_VENDOR for match in map(VENDOR.match, theirs) if match):
            self._result.problems += [
                f"of another vendor than {GUEST_VENDOR}: {line}"
                for line in ours if (match := VENDOR.match(line)) and match[1] != GUEST_VENDOR
            ]  # fmt: skip
            ours, theirs = of_every_vendor(ours), of_every_vendor(theirs)
        self._result.rounds += 1
        self._result.lines += sum((ours & theirs).values())
        self._result.problems += [f"guest only: {line}" for line in ours - theirs]
        self._result.problems += [f"host only: {line}" for line in theirs - ours]
        self._result.problems += [line for line in ours if "FAILED" in line]

    def leftover(self) -> list[str]:
        return [f"round {seed} did not end: {sorted(lines)[-1:]}" for seed, lines in self._lines.items()]


async def soak(
    kernel: Path, initrd: Path, host: Host, *, cpus: int, seconds: float, kib: int, seed: int = 1,
    rounds: int = 0, direct: Direct = "off", parallel: Parallel = "auto",
    progress: Callable[[Result], Awaitable[None]] | None = None,
) -> Result:
    """Boot, run one worker for each vCPU for that many seconds (a round under way comes to its end), compare.

    `rounds`: of each worker at most; 0: no limit. `seed`: of the first round. `direct`, `parallel`: as the
    configuration's.
    `progress` is called after each round.
    Raises vmm.VmmError if the guest does not come to its shell or does not end its rounds.
    """
    result = Result()
    comparison = Comparison(host, result)
    config = vmm.Config(
        core="soft", kernel=kernel, initrd=initrd, cpus=cpus, memory=512 << 20, append="quiet oops=panic",
        direct=direct, parallel=parallel,
    )  # fmt: skip
    async with vmm.VirtualMachine(config) as machine:
        begin = time.monotonic()
        machine.resume()
        console = machine.console.reader(lossless=True)
        await console.expect(PROMPT, timeout=BOOT_SECONDS)
        result.boot_seconds = time.monotonic() - begin
        begin = time.monotonic()
        workers = f"sh workers.sh {seed} {cpus} {kib} {rounds}"
        await machine.console.write(f"stty -echo; cd /soak; dmesg -c >/dev/null; nproc; {workers}\n")
        await console.expect(rf"\n{cpus}\r\n", timeout=60)

        async def lines(until: str, give_up: float) -> None:
            """Compare line by line up to that text, or until that moment (time.monotonic(), s) or all workers' end."""
            while time.monotonic() < give_up and (until or comparison.ended < cpus):
                try:
                    match = await console.expect(rb"([^\n]*)\n", timeout=max(0.01, give_up - time.monotonic()))
                except TimeoutError:
                    return
                text = SHELL.sub("", match[1].decode(errors="replace"))
                before = result.rounds
                await comparison.line(text)
                if progress is not None and result.rounds != before:
                    await progress(result)
                if until and text == until:
                    return
            if until:
                raise vmm.GuestError(f"the guest did not come to {until!r} within {ROUND_SECONDS:g} s")

        await lines("", begin + seconds)
        await machine.console.write("stop\n")
        await lines("workers ended", time.monotonic() + ROUND_SECONDS)
        result.problems += comparison.leftover()
        result.seconds = time.monotonic() - begin
        result.instructions = machine.stats()["instructions"]
        await machine.console.write("dmesg -r; echo log' 'ended; poweroff -f\n")
        log = await console.expect(rb"(?s)(.*)log ended\r?\n", timeout=60)
        for line in log[1].decode(errors="replace").replace("\r", "").splitlines():
            level = re.match(r"<(\d+)>", line)
            if level and int(level[1]) & 7 <= WARNING or TROUBLE.search(line):
                result.problems.append(f"kernel log: {line}")
        outcome: Outcome = await machine.wait()
        if outcome.reason is not Reason.SHUTDOWN:
            result.problems.append(f"ended with {outcome}")
    return result
