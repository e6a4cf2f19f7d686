"""Privileged behaviour held against QEMU's emulation: `python -m tests.fuzz.system SECONDS [SEED]`.

Every program (tests/fuzz/system_programs.py) runs three times on the software core: with the real clock, with the
virtual one, and moved to a fresh VM every 5 us; all print the same. QEMU runs it too, and Bochs where it is installed;
each prints the same but where it is known to differ from the manuals: then the manual decides, and the step says which.
What QEMU does not do as the manuals say Bochs mostly does. What breakpoints hit is computed, and when NMIs and
interrupts are taken.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.fuzz.legacy_programs import LegacyMaker
from tests.fuzz.nmi_programs import NmiMaker
from tests.fuzz.program_maker import ProgramMaker
from tests.fuzz.system_programs import Maker, build
from tests.fuzz.timer_programs import TimerMaker
from tests.support import bochs, soft_programs
from tests.support.patience import PATIENCE

MAKERS: dict[str, type[Maker] | type[LegacyMaker] | type[NmiMaker] | type[TimerMaker]] = {
    "long": Maker,
    "legacy": LegacyMaker,
    "nmi": NmiMaker,
    "timer": TimerMaker,
}
CLOCKS: dict[str, tuple[str, ...]] = {
    "real": (),
    "virtual": ("--virtual", "100000000"),
    "hops": ("--virtual", "100000000", "--hop", "5000"),
}


def on_core(boot: Path, image: Path, clock: str) -> str:
    run = subprocess.run(
        [boot, "--memory", "64", "--timeout", f"{60 * PATIENCE:.0f}", *CLOCKS[clock], "--bios", image],
        capture_output=True,
        timeout=90 * PATIENCE,
        check=False,
    )
    return run.stdout.decode(errors="replace")


def on_qemu(image: Path) -> str | None:
    """What QEMU prints; None where there is no QEMU."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        return None
    output = image.with_suffix(".qemu")
    output.write_text("")
    try:
        subprocess.run(
            [
                qemu,
                "-M",
                "pc",
                "-accel",
                "tcg",
                "-cpu",
                "max,vendor=AuthenticAMD,la57=off",
                "-m",
                "64",
                "-display",
                "none",
                "-monitor",
                "none",
                "-serial",
                "none",
                "-no-reboot",
                "-bios",
                image,
                "-debugcon",
                f"file:{output}",
                "-device",
                "isa-debug-exit,iobase=0xf4,iosize=1",
            ],
            timeout=30 * PATIENCE,
            check=False,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        pass  # what it printed until then is compared
    return output.read_text(errors="replace")


def on_bochs(image: Path, folder: Path) -> str | None:
    """What Bochs prints, as a processor of AMD's; None where there is no Bochs."""
    if bochs.program() is None:
        return None
    settings = (f"romimage: file={image}", "port_e9_hack: enabled=1")
    emulator = bochs.start(folder, settings, model="ryzen", memory_mib=64)
    output, deadline = folder / "output", time.monotonic() + 60 * PATIENCE
    try:
        # It does not end by itself; what it printed until the deadline is compared.
        while "\nend\n" not in output.read_text(errors="replace") and time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                emulator.wait(0.2)
                break
    finally:
        emulator.kill()
        emulator.wait()
    return output.read_text(errors="replace")


def steps(output: str) -> dict[int, list[str]]:
    """The lines of each step, by its number."""
    found: dict[int, list[str]] = {}
    current: list[str] = []
    for line in output.splitlines():
        match = re.match(r"@(\d+) (.*)", line)
        if match:
            current = found.setdefault(int(match[1]), [])
            line = match[2]
        elif line == "end":
            current = []
        current.append(line)
    return found


def plain(line: str) -> str:
    """A line without what QEMU 7.2 gets wrong everywhere: the EXT bit and the IDT's index in error codes (SDM vol. 3,
    6.13), P beside RSVD in a page fault's (SDM vol. 3, 4.7), and SS, which an IST without a change of CPL leaves alone
    (APM vol. 2, 8.9.4)."""
    if match := re.match(r"(.*\*0000000[a-d] )(\w{8})(.*)", line):  # legacy: a line's first words are vector and error
        return f"{match[1]}{int(match[2], 16) & ~1:x}{match[3]}"
    match = re.match(r"(.*)\*(00\w\w)e(\w{4})(.*)", line)
    if match is None:
        return line
    vector, error, rest = int(match[2], 16), int(match[3], 16), match[4]
    if 10 <= vector <= 13:
        error = 2 if error & 2 else error & ~1
    elif vector == 14 and error & 8:
        error &= ~1
    return f"{match[1]}*{vector}e{error:x}{re.sub(r' 0018....(....) ', r' 0018 ....', rest)}"


def differences(maker: ProgramMaker, ours: str, theirs: str | None, third: str | None = None) -> list[str]:
    """What is wrong with what the software core printed, a line a step: beside QEMU, and beside Bochs."""
    here, there, beyond = steps(ours), steps(theirs or ""), steps(third or "")
    wrong = []
    for number, lines in here.items():
        expected, said = maker.hits.get(number), maker.expected.get(number)
        if said is not None and lines != said:
            wrong.append(f"step {number}: {lines}, but must be {said}")
        if expected is not None:
            found = [int(line.split("#ffff0ff")[1][:1], 16) for line in lines if "#ffff0ff" in line]
            if found != expected:
                wrong.append(f"step {number}: breakpoints {expected} must hit, {found} did: {lines}")
        elif (
            number in there
            and number not in maker.unlike
            and list(map(plain, lines)) != list(map(plain, there[number]))
        ):
            wrong.append(f"step {number}: {lines}, but QEMU {there[number]}")
        elif number in beyond and number not in maker.bochs_unlike and lines != beyond[number]:
            wrong.append(f"step {number}: {lines}, but Bochs {beyond[number]}")
    return wrong


def check(kind: str, seed: int, folder: Path, boot: Path, *, oracle: bool = True) -> list[str]:
    """Everything that is wrong with the program of `seed` of a kind in MAKERS."""
    maker = MAKERS[kind](seed, MAKERS[kind].STEPS)
    image = build(maker, seed, folder)
    outputs = {clock: on_core(boot, image, clock) for clock in CLOCKS}
    wrong = [f"with {clock} it prints something else" for clock, text in outputs.items() if text != outputs["real"]]
    if "end" not in outputs["real"].splitlines():
        wrong.append(f"it does not come to its end: {outputs['real'].splitlines()[-2:]}")
    theirs, third = (on_qemu(image), on_bochs(image, folder)) if oracle else (None, None)
    return wrong + differences(maker, outputs["real"], theirs, third)


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    boot = soft_programs.build("soft_boot")
    deadline, programs, failed = time.monotonic() + seconds, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < deadline:
            for kind in MAKERS:
                for line in check(kind, seed, Path(folder), boot):
                    sys.stdout.write(f"{kind}, seed {seed}: {line}\n")
                    failed += 1
                programs += 1
            seed += 1
    sys.stdout.write(f"{programs} programs, {failed} differences\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
