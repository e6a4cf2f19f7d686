"""What is to be run: the programs that x86/unittests.cfg of a kvm-unit-tests tree names, and how each ends.

The tree is the developer's: fetched and built outside this project (`./configure && make` there), run unmodified.
"""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

DEFAULT_TIMEOUT = 90.0
"""Seconds; kvm-unit-tests' own for programs whose entry says nothing."""
PASSED, FAILED, SKIPPED = 1, 3, 77
"""Exit statuses by isa-debug-exit of what the programs write (v << 1 | 1)."""


@dataclass(frozen=True)
class Program:
    """An entry of unittests.cfg."""

    name: str
    file: Path
    arguments: str
    cpus: int
    qemu: tuple[str, ...]
    """Further parameters for QEMU."""
    timeout: float

    @property
    def memory(self) -> str:
        """Guest memory as the entry wishes it, else QEMU's default."""
        if "-m" in self.qemu:
            wish = self.qemu[self.qemu.index("-m") + 1].upper()
            return wish if wish[-1:] in "GM" else f"{wish}M"
        return "128M"

    @property
    def cmdline(self) -> str:
        """As QEMU's multiboot loader gives it: the program's path first."""
        return f"{self.file} {self.present}".strip()

    @property
    def present(self) -> str:
        """The arguments, with the time that one of them asks for."""
        return re.sub(r"`date \+%s`", str(int(time.time())), self.arguments)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    verdict: str
    """"pass", "skip", "fail", "abort" or "timeout"."""
    summary: str
    """The program's own count, or its last line."""
    seconds: float
    output: str

    @property
    def skipped(self) -> str:
        """Why the program did nothing, in its own words."""
        found = re.findall(r"^SKIP: (.*)$", self.output, re.MULTILINE)
        if found:
            return str(found[-1])
        lines = [line for line in self.output.splitlines() if line.strip() and not line.startswith("SUMMARY:")]
        return lines[-1][:100] if lines else ""

    @property
    def failures(self) -> list[str]:
        """The checks that failed, as the program names them."""
        return re.findall(r"^(?:FAIL|XPASS): (.*)$", self.output, re.MULTILINE)


def programs(tree: Path) -> list[Program]:
    """Every entry of `tree`/x86/unittests.cfg whose program was built. Raises FileNotFoundError if there is none."""
    listing = tree / "x86" / "unittests.cfg"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing}: no such file; give the folder of a kvm-unit-tests tree")
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
    parser.read_string(listing.read_text())
    found = []
    for name in parser.sections():
        entry = parser[name]
        file = tree / "x86" / entry.get("file", "")
        if entry.get("arch", "x86_64") != "x86_64" or not file.is_file():
            continue
        arguments = entry.get("test_args", "").strip("'\"")
        found.append(
            Program(
                name, file, arguments, int(entry.get("smp", "1")), tuple(shlex.split(entry.get("qemu_params", ""))),
                float(entry.get("timeout", DEFAULT_TIMEOUT)),
            )
        )  # fmt: skip
    if not found:
        raise FileNotFoundError(f"{tree}/x86: none of the programs is there; run ./configure && make in {tree}")
    return found


def _run(command: list[str], timeout: float) -> Result:
    begun = time.monotonic()
    try:
        run = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
            check=False,
        )  # fmt: skip
        output, status = run.stdout, run.returncode
    except subprocess.TimeoutExpired as error:
        output, status = error.stdout or b"", None
    seconds = time.monotonic() - begun
    text = output.decode("utf-8", "replace").replace("\r", "")
    counts = re.findall(r"^SUMMARY: (.*)$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip()]
    summary = counts[-1] if counts else lines[-1][:100] if lines else "no output"
    verdict = {None: "timeout", PASSED: "pass", FAILED: "fail", SKIPPED: "skip"}.get(status, "abort")
    return Result(verdict, summary, seconds, text)


def on_loopvisor(program: Program, *, virtual: bool = False) -> Result:
    """The program on the software core. With the virtual clock guest time follows instructions, so a busy host does
    not change what the program measures; it may then take three times as long."""
    options = ("--clock", "virtual", "--epoch", str(int(time.time()))) if virtual else ()
    command = [
        sys.executable, "-c", "from cli.main import main; main()", "run", "--core", "soft", "--testdev",
        "--kernel", str(program.file), "--cmdline", program.cmdline, "--cpus", str(program.cpus),
        "--memory", program.memory, *options,
    ]  # fmt: skip
    return _run(command, program.timeout * (3 if virtual else 1))


def on_qemu(program: Program) -> Result | None:
    """The program on QEMU's emulation, called as the suite does; None where there is no QEMU."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        return None
    parameters: list[str] = []
    for word in program.qemu:
        if word != "-enable-kvm":
            parameters.append(re.sub(r"^host\b", "max", word))
    command = [
        qemu, "-no-reboot", "-nodefaults", "-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-display", "none", "-serial", "stdio", "-device", "pci-testdev", "-machine", "accel=tcg", "-kernel",
        str(program.file), "-append", program.present, "-smp", str(program.cpus), *parameters,
    ]  # fmt: skip
    return _run(command, program.timeout)
