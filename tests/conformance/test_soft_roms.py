"""Privileged behaviour of the software core: small firmware images, run to their end, print what they observe.

NAME.expected is what the manuals say (Intel SDM, AMD APM). QEMU's emulation runs the same images as an oracle; where
it differs from the manuals, NAME.qemu holds the differing lines. The images: roms/rom.inc says how they are made.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import soft_programs
from tests.support.patience import PATIENCE

ROMS = Path(__file__).parent / "roms"
SANITIZE = bool(os.environ.get("SOFT_SANITIZE"))
ENDS = {"triple": 3}
"""Exit status of the harness; 1 (0 written to port 0xF4) unless named here."""
CPUS = {"smp": 4, "smc_smp": 2}
NAMES = sorted(path.stem for path in ROMS.glob("*.S"))
NOT_ON_QEMU = ("apic_timer", "hypercall", "late_traps", "long_checks", "long_user", "msr", "real", "tsc_deadline")
QEMU_NAMES = [name for name in NAMES if name not in NOT_ON_QEMU]
"""QEMU 7.2 checks neither segment limits nor what long_checks.S checks, has no PCID (long_user.S) and other MSRs;
it halts for good where a trap ends HLT, and MOV SS puts off nothing (late_traps.S); a change to periodic starts the
APIC's timer again, whose interrupt comes some time after its count's end (apic_timer.S); it has no TSC deadline and
is not KVM."""


def assemble(name: str, folder: Path) -> Path:
    """Assemble and link roms/NAME.S into a 64 KiB image."""
    image = folder / f"{name}.bin"
    subprocess.run(["as", "--64", "-mx86-used-note=no", "-o", folder / f"{name}.o", f"{name}.S"], check=True, cwd=ROMS)
    subprocess.run(["ld", "-T", "rom.ld", "-o", folder / f"{name}.elf", folder / f"{name}.o"], check=True, cwd=ROMS)
    subprocess.run(["objcopy", "-O", "binary", "--gap-fill", "0", "--pad-to", "0x100000", folder / f"{name}.elf",
                    image], check=True)
    return image


@pytest.fixture(scope="session")
def soft_boot() -> Path:
    """The boot harness, built."""
    return soft_programs.build("soft_boot", sanitize=SANITIZE)


@pytest.mark.parametrize("clock", ["real", "parallel", "virtual", "hops"])
@pytest.mark.parametrize("name", NAMES)
def test_rom(soft_boot: Path, tmp_path: Path, name: str, clock: str) -> None:
    """The image prints what the manuals say, with both clocks, with threads of the processors' own, and when all state
    moves to a fresh VM every 5 us."""
    arguments = ["--memory", "64", "--timeout", f"{60 * PATIENCE:.0f}", "--cpus", str(CPUS.get(name, 1))]
    if clock == "parallel":
        arguments += ["--parallel"]
    elif clock != "real":
        arguments += ["--virtual", "100000000"]
    if clock == "hops":
        arguments += ["--hop", "5000"]
    run = subprocess.run([soft_boot, *arguments, "--bios", assemble(name, tmp_path)], capture_output=True, text=True,
                         timeout=90 * PATIENCE, check=False)
    assert run.stdout == (ROMS / f"{name}.expected").read_text()
    assert run.returncode == ENDS.get(name, 1), run.stderr


def differing(ours: str, theirs: str) -> str:
    """The lines that differ, in the form of NAME.qemu."""
    lines = difflib.ndiff(ours.splitlines(), theirs.splitlines())
    return "".join(line + "\n" for line in lines if line[0] in "+-")


@pytest.mark.qemu
@pytest.mark.parametrize("name", QEMU_NAMES)
def test_rom_on_qemu(tmp_path: Path, name: str) -> None:
    """QEMU's emulation prints the same but for its known deviations."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    output = tmp_path / "output"
    subprocess.run(
        [qemu, "-M", "pc", "-accel", "tcg", "-cpu", "max,vendor=AuthenticAMD,la57=off", "-m", "64", "-display", "none",
         "-monitor", "none", "-serial", "none", "-no-reboot", "-smp", str(CPUS.get(name, 1)),
         "-bios", assemble(name, tmp_path), "-debugcon", f"file:{output}",
         "-device", "isa-debug-exit,iobase=0xf4,iosize=1"],
        timeout=60 * PATIENCE, check=False, capture_output=True)
    known = ROMS / f"{name}.qemu"
    assert differing((ROMS / f"{name}.expected").read_text(), output.read_text()) == (
        known.read_text() if known.exists() else "")
