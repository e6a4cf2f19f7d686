"""`vmm doctor`: which execution core would run, why, and what would make it better."""

from __future__ import annotations

import json as json_text
import os
import sys
from typing import Any

from cli.errors import EXIT_HOST
from vmm.convert import MIB
from vmm.cores import diagnose, models
from vmm.errors import VmmError

FINISHES = (
    "what this KVM gives up the software core executes, slowly; vmm ps --json counts it as finished, and above 500 in "
    "a second the machine says so"
)


def report(*, json: bool) -> int:
    """Print it; the exit status is 0 if stock kernels can run, else 4."""
    try:
        diagnosis = diagnose()
        failure = ""
    except VmmError as error:
        diagnosis, failure = None, str(error)
    facts: dict[str, Any] = {
        "cores": [
            {
                "name": name,
                "available": probe.available,
                "capabilities": sorted(item.value for item in probe.capabilities),
                "reason": probe.reason,
                "cure": probe.cure,
                "finishes": FINISHES if name == "kvm" and probe.available else "",
                "models": models(name) if probe.available else {},
            }
            for name, probe in (diagnosis.probes.items() if diagnosis else ())
        ],
        "stock_kernels": diagnosis.stock if diagnosis else "",
        "small_guests": diagnosis.small if diagnosis else "",
        "cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "runtime_directory": _runtime(),
        "passt": _found("passt"),
        "direct": _direct(),
    }
    if json:
        sys.stdout.write(json_text.dumps(facts) + "\n")
    else:
        _print(facts, failure)
    return 0 if facts["stock_kernels"] else EXIT_HOST


def _print(facts: dict[str, Any], failure: str) -> None:
    lines = [f"host: {facts['cpus']} CPUs, {facts['memory'] // MIB} MiB"]
    for core in facts["cores"]:
        lines.append(f"core {core['name']}: {'yes' if core['available'] else 'no'}: {core['reason']}")
        if core["cure"]:
            lines.append(f"    to improve: {core['cure']}")
        if core["finishes"]:
            lines.append(f"    finishes: {core['finishes']}")
        for model, why_not in core["models"].items():
            if why_not:
                lines.append(f"    no CPU model {model}: it lacks {', '.join(why_not)}")
        if core["models"]:
            has = [model for model, why_not in core["models"].items() if not why_not]
            lines.append(f"    CPU models: {', '.join(has)}")
        if core["capabilities"]:
            lines.append(f"    can: {', '.join(core['capabilities'])}")
    if facts["stock_kernels"]:
        lines.append(f"a stock kernel runs on: {facts['stock_kernels']}")
        lines.append(f"a small test guest runs on: {facts['small_guests']}")
    else:
        lines.append(f"no stock kernel can run here: {failure}")
    direct = facts["direct"]
    can = "CPUID faults" if direct["cpuid_faults"] else "CPUID does not fault"
    can += ", breakpoints" if direct["breakpoints"] else ", no breakpoints: code that sees the host stays in the core"
    lines.append(f"direct execution: {'yes: ' + can if direct['available'] else 'no: ' + direct['reason']}")
    lines.append(f"runtime directory: {facts['runtime_directory']}")
    passt = facts["passt"] or "not installed; --net user needs it: apt-get install passt"
    lines.append(f"passt: {passt}")
    sys.stdout.write("\n".join(lines) + "\n")


def _runtime() -> str:
    from vmm.management.registry import runtime_directory

    try:
        return str(runtime_directory())
    except VmmError as error:
        return str(error)


def _direct() -> dict[str, Any]:
    from vmm.machine.direct import host_support

    return host_support()


def _found(program: str) -> str:
    import shutil

    return shutil.which(program) or ""
