"""Finds out what this /dev/kvm can really do, by running a few instructions on it.

A KVM without hardware virtualization below it (kvm-pvm) interprets supervisor code and lacks instructions and paging
modes that stock kernels use; nothing in its capabilities tells so.
"""

from __future__ import annotations

import mmap
import os
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
_ALWAYS = frozenset({Capability.REAL_MODE, Capability.DIRTY_LOG, Capability.IRQFD, Capability.NMI, Capability.DEBUG})

# fninit; fld1; fadd st, st0; out 0xf4, al. Kernels check the FPU by such x87 arithmetic in supervisor mode.
_FPU = bytes.fromhex("dbe3 d9e8 d8c0 e6f4")
# out 0xf4, al
_OUT = bytes.fromhex("e6f4")


def examine(system: KvmSystem) -> frozenset[Capability]:
    """The capabilities of this KVM. They are found out once after each boot of the host, which takes 60 ms, mostly for
    closing VMs; a file in the user's cache keeps them."""
    if has_hardware():
        return _ALWAYS | {Capability.PAE_PAGING, Capability.STOCK_KERNELS}
    known = _recall()
    if known is None:
        known = _examine(system)
        _remember(known)
    return known | _ALWAYS


def _examine(system: KvmSystem) -> frozenset[Capability]:
    found = set(_ALWAYS)
    if isinstance(run(system, _FPU, paging=False), PortOut):
        found.add(Capability.STOCK_KERNELS)
    if isinstance(run(system, _OUT, paging=True), PortOut):
        found.add(Capability.PAE_PAGING)
    return frozenset(found)


def _boot() -> str:
    """What kept capabilities hold for: this boot of the host, and this /dev/kvm (a module that is loaded anew makes
    another)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"1 {file.read().strip()} {os.stat('/dev/kvm').st_ctime_ns}"


def _file() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "loopvisor", "kvm-capabilities")


def _recall() -> frozenset[Capability] | None:
    try:
        with open(_file(), encoding="ascii") as file:
            boot, _, names = file.read(4096).partition("\n")
        return frozenset(Capability(name) for name in names.split()) if boot == _boot() else None
    except (OSError, ValueError):
        return None


def _remember(capabilities: frozenset[Capability]) -> None:
    path = _file()
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(temporary, "w", encoding="ascii") as file:
            file.write(_boot() + "\n" + " ".join(sorted(capabilities)) + "\n")
        os.replace(temporary, path)
    except OSError:  # a read-only home: examine again next time
        pass


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
    """Run `code` in 32-bit supervisor mode, with identity paging or without. Returns its first exit; None: there was
    none within DEADLINE_S."""
    vm = system.create_vm(VmConfig(finish=False))
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
