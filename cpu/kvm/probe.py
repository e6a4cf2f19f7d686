"""What this /dev/kvm can really do, found out by running a few instructions on it.

A KVM without hardware virtualization below it (kvm-pvm) interprets supervisor code and lacks instructions and paging
modes that stock kernels use; nothing in its capabilities tells.
"""

from __future__ import annotations

import mmap
import select
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cpu.contract import Capability, Registers, Segment, VmConfig
from cpu.exits import Exit, PortOut, Resume

if TYPE_CHECKING:
    from cpu.kvm.system import KvmSystem

PORT = 0xF4
DEADLINE_S = 2.0
_CODE = 0x2000
_ALWAYS = frozenset({Capability.REAL_MODE, Capability.DIRTY_LOG, Capability.IRQFD, Capability.NMI})

# fninit; fld1; fadd st, st0; out 0xf4, al: x87 arithmetic in supervisor mode, as kernels' own checks do it.
_FPU = bytes.fromhex("dbe3 d9e8 d8c0 e6f4")
# out 0xf4, al
_OUT = bytes.fromhex("e6f4")


def examine(system: KvmSystem) -> frozenset[Capability]:
    """The capabilities of this KVM: a few milliseconds, unless the host's processor says that it is the usual one."""
    if has_hardware():
        return _ALWAYS | {Capability.PAE_PAGING, Capability.STOCK_KERNELS}
    found = set(_ALWAYS)
    if isinstance(run(system, _FPU, paging=False), PortOut):
        found.add(Capability.STOCK_KERNELS)
    if isinstance(run(system, _OUT, paging=True), PortOut):
        found.add(Capability.PAE_PAGING)
    return frozenset(found)


def has_hardware() -> bool:
    """Whether the processor offers VT-x or SVM to this system, so that /dev/kvm is kvm-intel's or kvm-amd's."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return not {"vmx", "svm"}.isdisjoint(line.split())
    except OSError:
        pass
    return False


def run(system: KvmSystem, code: bytes, *, paging: bool) -> Exit | None:
    """The first exit of `code` in 32-bit supervisor mode, with identity paging or without; None: none in time."""
    vm = system.create_vm(VmConfig())
    memory = mmap.mmap(-1, 4 << 12)
    try:
        memory[_CODE : _CODE + len(code)] = code
        memory[0x1000:0x1004] = (0x83).to_bytes(4, "little")  # a 4 MiB page at 0: present, writable, PS
        vm.set_memory_slot(0, 0, memoryview(memory))
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid(system.supported_cpuid())
        flat = Segment(limit=0xFFFF_FFFF, selector=16, db=1, g=1)
        vcpu.set_system_registers(
            replace(
                vcpu.system_registers(),
                cs=replace(flat, selector=8, type=11), ds=flat, es=flat, fs=flat, gs=flat, ss=flat,
                cr0=0x8000_0011 if paging else 0x11, cr3=0x1000, cr4=0x10,
            )
        )  # fmt: skip
        vcpu.set_registers(Registers(rip=_CODE, rsp=_CODE))
        vcpu.resume(Resume())
        deadline = time.monotonic() + DEADLINE_S
        while (left := deadline - time.monotonic()) > 0 and select.select([vm.fileno()], [], [], left)[0]:
            for item in vm.take():
                if isinstance(item, tuple):
                    return item[1]
        return None
    finally:
        vm.close()
        memory.close()
