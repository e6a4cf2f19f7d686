"""Execution cores for conformance tests: one program, run as a script or as machine code, and the loop that serves it.

A `Program` is a list of accesses. The scripted core performs it as it stands; other cores get it as 32-bit supervisor
code without paging at CODE, whose reads are stored at ANSWERS.
"""

from __future__ import annotations

import mmap
import select
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from cpu import select as choice
from cpu.contract import Registers, Segment, System, VmConfig
from cpu.cpuid import for_vcpu
from cpu.exits import (
    AlarmDue,
    CompleteRead,
    Entry,
    Exit,
    Interrupted,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Posted,
    Resume,
    Shutdown,
)
from cpu.scripted import ScriptedVcpu, StoreStep
from cpu.vm import CoreVcpu, CoreVm
from tests.support.patience import PATIENCE

CODE = 0x2000
ANSWERS = 0x8000
STACK = 0x7000
SCRATCH = 0x9000
RAM = 1 << 20
MMIO = 0xE000_0000
DONE = 0xFF0
"""The port whose write ends a program."""
DEADLINE_S = 20.0 * PATIENCE

RESUME = Resume()
Step = PortIn | PortOut | MmioRead | MmioWrite | StoreStep | Shutdown
Item = tuple[int, Exit] | Posted | AlarmDue

CORES = [
    pytest.param("scripted", id="scripted"),
    pytest.param("kvm", id="kvm", marks=pytest.mark.kvm),
    pytest.param("soft", id="soft"),
]
REAL_CORES = CORES[1:]


def open_core(name: str) -> System:
    """The core `name`, or a visible skip that says why there is none."""
    found = choice.probe(name)
    if not found.available:
        pytest.skip(f"{name}: {found.reason}")
    return choice.open_system(choice.Choice(name, found, ""))


def assemble(steps: Sequence[Step]) -> bytes:
    """32-bit code for `steps`; EDI walks over the answers. Ends in a write to DONE and an endless loop."""
    code = b"\xbf" + struct.pack("<I", ANSWERS)  # mov edi, ANSWERS
    keep = bytes.fromhex("8907 83c704")  # mov [edi], eax; add edi, 4
    for step in (*steps, PortOut(DONE, 1, 0)):
        match step:
            case PortOut(port, size, value):
                code += b"\xba" + struct.pack("<I", port) + b"\xb8" + struct.pack("<I", value)
                code += {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}[size]
            case PortIn(port, size):
                code += b"\xba" + struct.pack("<I", port) + b"\x31\xc0"  # xor eax, eax
                code += {1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}[size] + keep
            case MmioWrite(address, size, value) | StoreStep(address, size, value):
                code += b"\xb8" + struct.pack("<I", value)
                code += {1: b"\xa2", 2: b"\x66\xa3", 4: b"\xa3"}[size] + struct.pack("<I", address)
            case MmioRead(address, size):
                code += b"\x31\xc0"
                code += {1: b"\xa0", 2: b"\x66\xa1", 4: b"\xa1"}[size] + struct.pack("<I", address) + keep
            case Shutdown():
                code += b"\x0f\x0b"  # ud2, and there is no IDT
    return code + b"\xeb\xfe"


@dataclass
class Guest:
    """A VM of one core with RAM at 0, and what its tests need."""

    system: System
    vm: CoreVm
    memory: mmap.mmap
    vcpus: list[CoreVcpu]
    scripted: bool

    def load(self, steps: Sequence[Step], vcpu: int = 0) -> None:
        """Make a fresh vCPU perform `steps`, then write to DONE."""
        target = self.vcpus[vcpu]
        if isinstance(target, ScriptedVcpu):
            target.script(*steps, PortOut(DONE, 1, 0))
        else:
            self.load_code(assemble(steps), vcpu)

    def load_code(self, code: bytes, vcpu: int = 0, at: int = CODE) -> None:
        """32-bit supervisor code, flat segments, no paging, no IDT."""
        at += 0x1000 * 16 * vcpu
        self.memory[at : at + len(code)] = code
        set_flat(self.vcpus[vcpu], at)

    @property
    def answers(self) -> list[int]:
        """What the reads so far yielded. Parked only."""
        vcpu = self.vcpus[0]
        if isinstance(vcpu, ScriptedVcpu):
            return vcpu.answers
        count = (vcpu.registers().rdi - ANSWERS) // 4
        return list(struct.unpack_from(f"<{count}I", self.memory, ANSWERS))

    def go(self) -> None:
        for vcpu in self.vcpus:
            vcpu.resume(RESUME)

    def take(self, deadline: float | None = None) -> list[Item]:
        """Wait for and take what there is; fails the test after DEADLINE_S."""
        end = time.monotonic() + DEADLINE_S if deadline is None else deadline
        while (left := end - time.monotonic()) > 0:
            if select.select([self.vm.fileno()], [], [], left)[0] and (items := self.vm.take()):
                return items
        raise AssertionError(f"nothing happened within {DEADLINE_S} s: {self.vm.stats()}")

    def next_exit(self) -> tuple[int, Exit]:
        """The next exit, which must come alone but for posted writes."""
        while True:
            for item in self.take():
                if isinstance(item, tuple):
                    return item

    def run(self, answer: Callable[[Exit], int] = lambda _: 0, *, until: type = PortOut) -> list[Item]:
        """Serve until every vCPU wrote DONE (or exited with `until`, if not PortOut); what happened before, in order.

        The vCPUs that ended are parked. Reads are answered by `answer(exit)`.
        """
        seen: list[Item] = []
        left = len(self.vcpus)
        while left:
            for item in self.take():
                if not isinstance(item, tuple):
                    seen.append(item)
                    continue
                index, exit_ = item
                if isinstance(exit_, until) and (not isinstance(exit_, PortOut) or exit_.port == DONE):
                    left -= 1
                    continue
                seen.append(item)
                entry: Entry = RESUME
                if isinstance(exit_, PortIn | MmioRead):
                    entry = CompleteRead(answer(exit_))
                elif not isinstance(exit_, PortOut | MmioWrite | Interrupted):
                    raise AssertionError(f"unexpected {exit_}")
                self.vcpus[index].resume(entry)
        return seen

    def park(self, vcpu: int = 0) -> None:
        """Kick a running vCPU and wait until it is parked between instructions; other exits are answered with 0."""
        self.vcpus[vcpu].kick()
        while True:
            index, exit_ = self.next_exit()
            if index == vcpu and isinstance(exit_, Interrupted):
                return
            self.vcpus[index].resume(CompleteRead(0) if isinstance(exit_, PortIn | MmioRead) else RESUME)

    def close(self) -> None:
        self.vm.close()
        self.memory.close()


def set_flat(vcpu: CoreVcpu, rip: int) -> None:
    """32-bit supervisor mode, flat, no paging, ready to run at `rip`."""
    flat = Segment(limit=0xFFFF_FFFF, selector=16, type=3, db=1, g=1)
    vcpu.set_system_registers(
        replace(
            vcpu.system_registers(),
            cs=replace(flat, selector=8, type=11), ds=flat, es=flat, fs=flat, gs=flat, ss=flat,
            gdt=(0, 0), idt=(0, 0), cr0=0x11, cr3=0, cr4=0, efer=0,
        )
    )  # fmt: skip
    vcpu.set_registers(Registers(rip=rip, rsp=STACK))
    if vcpu.index:
        state = vcpu.state()
        vcpu.set_state(replace(state, mp_state="runnable"))  # no INIT and SIPI needed


def set_long(guest: Guest, code: bytes, *, at: int = CODE) -> None:
    """64-bit supervisor code on vCPU 0; the first 2 MiB and 2 MiB at MMIO are mapped to themselves."""
    vcpu = guest.vcpus[0]
    tables = 0x1_0000
    present = 3
    for offset, entry in (
        (0x0000, tables + 0x1000 | present),  # PML4
        (0x1000, tables + 0x2000 | present),  # PDPT: first GiB
        (0x1000 + 8 * (MMIO >> 30), tables + 0x3000 | present),
        (0x2000, 0x80 | present),
        (0x3000 + 8 * (MMIO >> 21 & 511), MMIO | 0x80 | present),
    ):
        struct.pack_into("<Q", guest.memory, tables + offset, entry)
    guest.memory[at : at + len(code)] = code
    data = Segment(limit=0xFFFF_FFFF, selector=16, type=3, db=1, g=1)
    vcpu.set_system_registers(
        replace(
            vcpu.system_registers(),
            cs=replace(data, selector=8, type=11, db=0, l=1), ds=data, es=data, fs=data, gs=data, ss=data,
            gdt=(0, 0), idt=(0, 0), cr0=0x8000_0011, cr3=tables, cr4=0x20, efer=0x500,
        )
    )  # fmt: skip
    vcpu.set_registers(Registers(rip=at, rsp=STACK))


def make(system: System, *, config: VmConfig | None = None, log_dirty: bool = False) -> Guest:
    """A VM with 1 MiB of RAM at 0 and all its vCPUs."""
    config = config or VmConfig()
    vm = system.create_vm(config)
    assert isinstance(vm, CoreVm)
    memory = mmap.mmap(-1, RAM)
    vm.set_memory_slot(0, 0, memoryview(memory), log_dirty=log_dirty)
    vcpus = [vm.create_vcpu(index) for index in range(config.vcpus)]
    table = system.supported_cpuid()
    for vcpu in vcpus:
        vcpu.set_cpuid(for_vcpu(table, vcpu.index, config.vcpus))
    return Guest(system, vm, memory, vcpus, system.name == "scripted")
