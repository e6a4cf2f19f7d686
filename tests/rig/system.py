"""`python -m tests.rig.system [PROGRAMS] [SEED]`: random system-level programs on kvm-amd, beside the software core.

PROGRAMS of each kind (tests.fuzz.system.MAKERS) are made from seeds and run on the software core here, and on KVM in
the rig, where the processor of a guest is QEMU's emulation of SVM and kvm-amd together. Each step prints the same on
both, or what the model of its maker says, but for

- what QEMU does otherwise than the manuals, which it does in a guest, too (`ProgramMaker.unlike`, `system.plain`); but
  not about the timer, which is KVM's own;
- breakpoints: QEMU's VMRUN loads DR7 without enabling them (APM vol. 2, 15.5.1, has DR7 among what it loads);
- what KVM or QEMU's SVM do otherwise (`ProgramMaker.kvm_unlike`, each with its clause).

Exits with 0 if nothing differs; the last line says how many programs and steps were compared.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

from images.errors import ImageError
from tests.fuzz import system
from tests.fuzz.program_maker import ProgramMaker
from tests.fuzz.timer_programs import TimerMaker
from tests.rig.__main__ import NO_RESULT, ROOT, run
from tests.rig.guest import build
from tests.support import soft_programs

MEMORY_MIB = 2048
SECONDS_EACH = 120
"""For one program, on a busy host."""


def wrong(maker: ProgramMaker, ours: str, theirs: str) -> tuple[int, list[str]]:
    """How many steps were compared, and what of them differs, a line each."""
    here, there = system.steps(ours), system.steps(theirs)
    compared, found = 0, []
    unlike = {} if isinstance(maker, TimerMaker) else maker.unlike  # the local APIC is KVM's, and not QEMU's
    for number, lines in here.items():
        if number in unlike or number in maker.kvm_unlike or number in maker.hits or number not in there:
            continue
        compared += 1
        expected = maker.expected.get(number, lines)
        if [system.plain(line) for line in expected] != [system.plain(line) for line in there[number]]:
            found.append(f"step {number}: {expected}, but KVM {there[number]}")
    if not there:
        found.append("it printed nothing")
    return compared, found


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    begin = time.monotonic()
    boot = soft_programs.build("soft_boot")
    makers: dict[str, ProgramMaker] = {}
    ours = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            for kind, maker in system.MAKERS.items():
                name = f"{kind}-{seed}"
                makers[name] = maker(seed, maker.STEPS)
                image = system.build(makers[name], seed, Path(folder)).rename(Path(folder, f"{name}.bin"))
                ours[name] = system.on_core(boot, image, "virtual")
        python, images = shlex.quote(sys.executable), shlex.quote(folder)
        command = f"cd {shlex.quote(str(ROOT))} && {python} -m tests.support.firmware kvm {images} $RIG_REPORT"
        try:
            status, report = run(build(), command, 300 + SECONDS_EACH * len(makers), MEMORY_MIB)
        except ImageError as error:
            print(f"rig: {error}", file=sys.stderr)
            return NO_RESULT
    if status or not report:
        return status or NO_RESULT
    theirs, compared, differences = json.loads(report), 0, 0
    for name, maker in makers.items():
        steps, found = wrong(maker, ours[name], theirs[name])
        compared += steps
        differences += len(found)
        for line in found:
            print(f"{name}: {line}")
    print(f"{len(makers)} programs, {compared} steps compared, {differences} differ, {time.monotonic() - begin:.0f} s")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
