"""A machine without devices for tests and benches of a core: RAM, vCPUs, a console port, the end through port 0xf4.

It uses nothing but cpu/contract.py, and no event loop: `run()` waits on the VM's descriptor.
"""

from __future__ import annotations

import mmap
import select
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cpu.contract import Registers, System, SystemRegisters, Vcpu, VmConfig
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
)
from cpu.state import VcpuState, VmState
from tests.support.patience import PATIENCE
from vmm.boot import BootState, load

CONSOLES = (0xE9, 0x3F8)
END = 0xF4
ALL_ONES = 0xFFFFFFFFFFFFFFFF


class TooLate(Exception):
    """A condition did not come true before its deadline."""


@dataclass
class Bare:
    """Owns a VM, its RAM and its vCPUs; `with Bare(...)` closes them."""

    system: System
    config: VmConfig = field(default_factory=VmConfig)
    memory: int = 16 << 20
    console: bytearray = field(default_factory=bytearray)
    ended: int | None = None
    """What the guest wrote to port 0xf4; -1: any other end (see `exits`)."""
    exits: list[tuple[int, Exit]] = field(default_factory=list)
    """Exits that are not answered here."""
    log: Callable[[int], None] | None = None
    """Called with every console byte as it arrives."""

    def __post_init__(self) -> None:
        self.size = self.memory
        # As vmm/machine/memory.py maps it. Shared memory has no huge pages: benches would measure page faults.
        self.ram = mmap.mmap(-1, self.memory, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):
            self.ram.madvise(mmap.MADV_HUGEPAGE)
        self.vm = self.system.create_vm(self.config)
        self.vm.set_memory_slot(0, 0, memoryview(self.ram))
        self.vcpus: list[Vcpu] = [self.vm.create_vcpu(index) for index in range(self.config.vcpus)]
        cpuid = self.system.supported_cpuid()
        for vcpu in self.vcpus:
            vcpu.set_cpuid(cpuid)
        self.alarms = 0

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.vm.close()
        self.ram.close()

    # vmm.boot.LoadMemory
    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.ram[gpa : gpa + len(data)] = bytes(data)

    def read(self, gpa: int, length: int) -> bytes:
        return self.ram[gpa : gpa + length]

    def boot(self, kernel: Path, cmdline: str = "") -> BootState:
        """Load an ELF guest and set vCPU 0 to its entry."""
        state = load(self, kernel, cmdline=cmdline)
        self.enter(state.registers, state.system_registers)
        return state

    def code(self, address: int, code: bytes, *, bits: int = 32, vcpu: int = 0) -> None:
        """Raw code at `address`, entered by `vcpu` in real mode (16) or flat protected mode (32)."""
        from vmm.boot.state import protected_mode, real_mode

        self.write(address, code)
        if bits == 16:
            self.enter(*real_mode(Registers(rip=address & 0xF, rsp=0x7000), cs=address >> 4), vcpu)
        else:
            self.enter(Registers(rip=address, rsp=0x7000), protected_mode(self), vcpu)

    def enter(self, registers: Registers, system: SystemRegisters, vcpu: int = 0) -> None:
        self.vcpus[vcpu].set_system_registers(system)
        self.vcpus[vcpu].set_registers(registers)

    def start(self) -> None:
        for vcpu in self.vcpus:
            vcpu.resume(Resume())

    def answer(self, index: int, exit: Exit) -> Entry | None:
        match exit:
            case PortOut(port=port, value=value) if port in CONSOLES:
                self.console.append(value & 0xFF)
                if self.log is not None:
                    self.log(value & 0xFF)
                return Resume()
            case PortOut(port=port, value=value) if port == END:
                self.ended = value
                return None
            case PortOut(port=0x64, value=0xFE):
                self.ended = 0xFE
                return None
            case PortIn(port=0x3FD):
                return CompleteRead(0x60)
            case PortIn() | MmioRead():
                return CompleteRead(ALL_ONES)
            case PortOut() | MmioWrite():
                return Resume()
            case _:
                self.exits.append((index, exit))
                return None

    def turn(self) -> None:
        """Handle what the core has to say now."""
        for item in self.vm.take():
            if isinstance(item, Posted):
                self.console += item.data
            elif isinstance(item, AlarmDue):
                self.alarms += 1
            else:
                entry = self.answer(*item)
                if entry is not None:
                    self.vcpus[item[0]].resume(entry)

    def run(self, until: Callable[[Bare], bool] | None = None, timeout: float = 20.0) -> None:
        """Turn until the guest ended, an exit is left unanswered, or `until` holds. TooLate after `timeout` seconds
        (times PATIENCE)."""
        poll = select.poll()
        poll.register(self.vm.fileno(), select.POLLIN)
        deadline = time.monotonic() + timeout * PATIENCE
        known = len(self.exits)
        while True:
            if until is not None and until(self):
                return
            if until is None and (self.ended is not None or len(self.exits) > known):
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise TooLate(f"console so far: {bytes(self.console)!r}, exits: {self.exits}")
            poll.poll(left * 1000 if until is None else min(left * 1000, 2))  # `until` may look at memory
            self.turn()

    def pause(self, *indices: int, timeout: float = 20.0) -> None:
        """Park these vCPUs (all running ones if none are named) with Interrupted, which is taken off `exits`."""
        wanted = set(indices or range(len(self.vcpus)))
        for index in wanted:
            self.vcpus[index].kick()

        def parked(bare: Bare) -> bool:
            return wanted <= {index for index, exit in bare.exits if isinstance(exit, Interrupted)}

        self.run(parked, timeout)
        self.exits = [(i, exit) for i, exit in self.exits if i not in wanted or not isinstance(exit, Interrupted)]

    def state(self) -> tuple[VmState, list[VcpuState], bytes]:
        """Complete state of a paused machine."""
        return self.vm.state(), [vcpu.state() for vcpu in self.vcpus], self.ram[:]

    def set_state(self, state: tuple[VmState, list[VcpuState], bytes]) -> None:
        vm, vcpus, ram = state
        self.ram[:] = ram
        self.vm.memory_written(0, len(ram))
        self.vm.set_state(vm)
        for vcpu, saved in zip(self.vcpus, vcpus, strict=True):
            vcpu.set_state(saved)
