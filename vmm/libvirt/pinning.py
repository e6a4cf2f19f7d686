"""On which of the host's processors the threads of a machine run.

A vCPU's thread is called "vcpu" and its number; where the software core runs all of them in one thread, that is called
"vcpu" alone. Everything else of the process is what libvirt calls the emulator. The kernel knows where each thread may
run, and is asked; what a definition says is put into effect when the machine starts, and again whenever its threads are
others, as after a reboot. Loop thread.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmm.errors import HostError, os_reason
from vmm.libvirt.cpusets import cpu_text
from vmm.libvirt.domain import Domain
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.spec import Pins

VCPU = re.compile(r"vcpu([0-9]*)")


class MachineThreads(NamedTuple):
    """Of one process, by their numbers. `shared`: that of all vCPUs, if they have one together, else 0. `workers`: the
    kernel's own, which it makes for io_uring."""

    vcpus: dict[int, int]
    shared: int
    others: list[int]
    workers: list[int]

    def of(self, vcpu: int) -> int:
        """The thread that runs a vCPU; 0: none does."""
        return self.vcpus.get(vcpu, self.shared)


def threads_of(pid: int) -> MachineThreads:
    """Those that are there now; none of a process that has gone."""
    vcpus: dict[int, int] = {}
    shared = 0
    others: list[int] = []
    workers: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                name = (task / "comm").read_text().strip()
                match = VCPU.fullmatch(name)
                if match is None:
                    (workers if name.startswith("iou-") else others).append(int(task.name))
                elif match[1]:
                    vcpus[int(match[1])] = int(task.name)
                else:
                    shared = int(task.name)
    return MachineThreads(vcpus, shared, sorted(others), sorted(workers))


def affinity(thread: int) -> frozenset[int]:
    """Where it may run; nowhere if it has gone."""
    try:
        return frozenset(os.sched_getaffinity(thread))
    except OSError:
        return frozenset()


def check(domain: Domain, pins: Pins) -> None:
    """That a running machine can have this. Raises LibvirtError."""
    threads = threads_of(domain.pid)
    if pins.vcpus and threads.shared and domain.spec.config.most_cpus > 1:
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED,
            "the software core runs all processors of this machine in one thread, so they have no place of their own; "
            "run it on kvm, or with parallel='on' in <loopvisor:machine>",
        )


def apply(pid: int, pins: Pins, present: frozenset[int]) -> None:
    """Have the threads that are there run where they are to. `present`: the host's processors, for those that may run
    anywhere. Raises HostError."""
    threads = threads_of(pid)
    wanted = dict(pins.vcpus)
    for vcpu, thread in threads.vcpus.items():
        _move(thread, wanted.get(vcpu, present))
    if threads.shared:
        _move(threads.shared, wanted.get(0, present))
    if pins.emulator is not None:
        for thread in threads.others:
            _move(thread, pins.emulator)
        for thread in threads.workers:
            with suppress(HostError):  # kernels before Linux 6.3 let nobody move these
                _move(thread, pins.emulator)


def _move(thread: int, cpus: frozenset[int]) -> None:
    if affinity(thread) in (cpus, frozenset()):
        return
    try:
        os.sched_setaffinity(thread, cpus)
    except ProcessLookupError:
        pass
    except OSError as error:
        raise HostError(f"processors {cpu_text(cpus)}: {os_reason(error)}") from error
