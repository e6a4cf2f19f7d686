"""Direct execution: on the software core, 64-bit programs of the guest run natively in processes beside this one.

What the core does is in cpu/soft/direct/; the program that those processes begin as is cpu/runner/.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cpu import _core
from cpu.errors import HostError
from cpu.values import dataclass

if TYPE_CHECKING:
    from cpu.contract import Vm

_PROGRAM = Path(__file__).parent / "runner" / "runner.bin"


@dataclass(frozen=True, slots=True)
class Support:
    """Whether this host can execute guest programs directly."""

    available: bool
    reason: str
    """Why not; empty if it can."""
    cpuid_faults: bool = False
    """CPUID comes back to the core. Else breakpoints stop code before it, or its pages run in the core."""
    breakpoints: bool = False
    """The host gives a runner execution breakpoints (perf_event_open)."""


@cache
def support() -> Support:
    """Found out once, by starting a runner and ending it: some 2 ms. *any thread*"""
    result, why = _core.direct_probe(str(_PROGRAM))
    if result >= 0:
        return Support(True, "", bool(result & 1), bool(result & 2))
    step, _, reason = why.partition(": ")
    if result in (-errno.EPERM, -errno.EINVAL, -errno.ENOSYS):
        reason += "; this container or host forbids it, or has it not"
    return Support(False, f"{step}: {reason}")


def enable(vm: Vm, fd: int, memory: Sequence[tuple[memoryview, int]], *, always: bool = False) -> None:
    """Let the VM's programs run natively. `memory`: buffers of its slots and where they are in `fd`, which is mapped
    shared. `always`: also where it does not pay. HostError if the host or the core cannot."""
    if not isinstance(vm, _core.Vm):
        raise HostError("direct execution: this core has none")
    vm.set_direct(fd, list(memory), os.fspath(_PROGRAM), always)


def disable(vm: Vm) -> None:
    """For good: memory is about to be mapped otherwise. vCPUs must be parked. Nothing if it never was on."""
    if isinstance(vm, _core.Vm):
        vm.set_direct(-1, [], "", False)
