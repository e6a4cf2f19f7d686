"""`python -m tests.kut TREE [NAME...]`: a developer's build of kvm-unit-tests on the software core, beside QEMU.

Prints a line a program: how it ended here, how on QEMU, and the reason of what is not a pass. Ends with status 1 if a
program fails here without a reason that stands in REASONS. `--logs FOLDER` keeps what the programs print. What fails
without a reason is run again with the virtual clock: several programs time themselves, and a busy host spoils that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.kut.programs import Result, on_loopvisor, on_qemu, programs

REASONS = {
    "pmu": "counts events: the counters' registers are there, but count nothing (the suite wants KVM's enable_pmu)",
    "vmware_backdoors": "wants VMware's backdoor ports and RDPMC indices (the suite wants a KVM parameter for it)",
    "s3": "wants ACPI's S3, which this machine's DSDT does not offer (no \\_S3 object)",
    "intel_iommu": "wants QEMU's intel-iommu and edu devices",
}
"""Programs that may fail, and why. What CPUID does not announce the programs skip by themselves."""


def reason(name: str, ours: Result) -> str:
    """What is said of a program that did not pass here."""
    if ours.verdict == "pass":
        return ""
    if ours.verdict == "skip":
        return ours.skipped
    if name in REASONS:
        return REASONS[name]
    return f"UNEXPLAINED: {'; '.join(ours.failures[:3]) or ours.summary}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kut", description=__doc__)
    parser.add_argument("tree", type=Path, help="the folder of kvm-unit-tests, configured and built")
    parser.add_argument("names", nargs="*", help="programs of unittests.cfg; all by default")
    parser.add_argument("--no-qemu", action="store_true", help="only the software core")
    parser.add_argument("--logs", type=Path, help="a folder for what the programs print")
    arguments = parser.parse_intermixed_args()
    try:
        chosen = programs(arguments.tree.resolve())
    except FileNotFoundError as error:
        print(f"tests.kut: {error}", file=sys.stderr)
        return 2
    known = {program.name for program in chosen}
    if unknown := [name for name in arguments.names if name not in known]:
        print(f"tests.kut: no program is called {unknown[0]!r}; there are {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    unexplained, counts = 0, {"ours": 0, "theirs": 0, "all": 0}
    print(f"{'program':<30} {'here':<8} {'QEMU':<8} {'seconds':>12}  what it says")
    for program in chosen:
        if arguments.names and program.name not in arguments.names:
            continue
        ours = on_loopvisor(program)
        note = ""
        if reason(program.name, ours).startswith("UNEXPLAINED"):
            again = on_loopvisor(program, virtual=True)
            if again.verdict == "pass":
                note = f" (with the virtual clock; with the real one: {'; '.join(ours.failures[:3]) or ours.verdict})"
                ours = again
        theirs = None if arguments.no_qemu else on_qemu(program)
        if arguments.logs:
            arguments.logs.mkdir(parents=True, exist_ok=True)
            (arguments.logs / program.name).write_text(ours.output)
            if theirs is not None:
                (arguments.logs / f"{program.name}.qemu").write_text(theirs.output)
        said = reason(program.name, ours)
        unexplained += said.startswith("UNEXPLAINED")
        counts["all"] += 1
        counts["ours"] += ours.verdict == "pass"
        counts["theirs"] += theirs is not None and theirs.verdict == "pass"
        times = f"{ours.seconds:.1f}" + (f" / {theirs.seconds:.1f}" if theirs is not None else "")
        there = theirs.verdict if theirs is not None else ""
        print(f"{program.name:<30} {ours.verdict:<8} {there:<8} {times:>12}  {said or ours.summary}{note}", flush=True)
    print(f"{counts['ours']} of {counts['all']} pass here, {counts['theirs']} on QEMU; {unexplained} unexplained")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
