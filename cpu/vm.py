"""Vm and Vcpu of the native cores (cpu/contract.py): the typed part over `cpu._core`'s hot part.

What is hot (take, resume, kick, shadows, interrupts) is inherited from C as it is. Here: registers and complete
states, which are blobs in the layouts of the KVM API for every core. Must not know which core it runs on.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from cpu import _core
from cpu.contract import CpuidEntry, Registers, SystemRegisters, VmConfig
from cpu.errors import ConfigError, HostError
from cpu.registers import pack_registers, pack_system, unpack_system
from cpu.views import CPUID_ENTRY, MSR_ENTRY, MSRS_HEAD, REGS, StateKind

if TYPE_CHECKING:
    from cpu.debug import Debugging, PastExit, TraceEntry
    from cpu.state import VcpuState, VmState

_MSRS_A_CALL = 500  # cpu/native/pyvcpu.c's buffer
_AT_POWER_UP = {0x9E: 0x30000, 0x4B56_4D05: 1, 0xC000_0104: 1 << 32}
"""SMBASE, KVM's poll control, the ratio of nested guests' TSCs; other registers hold 0."""


def pack_cpuid(entries: Sequence[CpuidEntry]) -> bytes:
    """An array of struct kvm_cpuid_entry2."""
    return b"".join(
        CPUID_ENTRY.pack(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx, 0, 0, 0) for e in entries
    )


def unpack_cpuid(blob: bytes) -> list[CpuidEntry]:
    return [CpuidEntry(*fields[:7]) for fields in CPUID_ENTRY.iter_unpack(blob)]


class CoreVcpu(_core.Vcpu):
    """One virtual processor. Made by CoreVm.create_vcpu()."""

    _vm: CoreVm

    cpuid: tuple[CpuidEntry, ...] = ()
    """As set_cpuid() set it."""

    def registers(self) -> Registers:
        return Registers(*REGS.unpack(self.get_blob(StateKind.REGS)))

    def set_registers(self, registers: Registers) -> None:
        self.set_blob(StateKind.REGS, pack_registers(registers))

    def system_registers(self) -> SystemRegisters:
        return unpack_system(self.get_blob(StateKind.SREGS))[0]

    def set_system_registers(self, registers: SystemRegisters) -> None:
        """An interrupt that is already on its way into the vCPU stays."""
        pending = unpack_system(self.get_blob(StateKind.SREGS))[1]
        self.set_blob(StateKind.SREGS, pack_system(registers, pending))

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        self.set_cpuid_blob(pack_cpuid(entries))
        self.cpuid = tuple(entries)

    def msr(self, index: int) -> int:
        """ConfigError if the vCPU has no such MSR."""
        done, blob = self.get_blob(StateKind.MSRS, MSRS_HEAD.pack(1, 0) + MSR_ENTRY.pack(index, 0, 0))
        if done != 1:
            raise ConfigError(f"MSR {index:#x} cannot be read")
        return int(MSR_ENTRY.unpack_from(blob, MSRS_HEAD.size)[2])

    def set_msr(self, index: int, value: int) -> None:
        """ConfigError if the vCPU has no such MSR or refuses the value."""
        if self.set_blob(StateKind.MSRS, MSRS_HEAD.pack(1, 0) + MSR_ENTRY.pack(index, 0, value)) != 1:
            raise ConfigError(f"MSR {index:#x} cannot be set to {value:#x}")

    def set_debug(self, debugging: Debugging) -> None:
        self.set_debug_blob(debugging.pack())

    def trace(self) -> list[TraceEntry]:
        from cpu.debug import unpack_trace

        return unpack_trace(self.trace_blob())

    def past_exits(self) -> list[PastExit]:
        from cpu.debug import unpack_past

        return unpack_past(*self.past_blob())

    def state(self) -> VcpuState:
        from cpu.state import save_vcpu

        return save_vcpu(self)

    def set_state(self, state: VcpuState) -> None:
        from cpu.model import lacking
        from cpu.state import restore_vcpu

        supported = self._vm.supported_cpuid
        missing = lacking(state.cpuid, supported()) if state.cpuid and supported is not None else []
        if missing:
            raise HostError(f"the guest was told of what this core lacks: {', '.join(missing)}")
        restore_vcpu(self, state)

    def msrs_blob(self) -> bytes:
        """struct kvm_msrs of every MSR worth saving that this vCPU can read."""
        known = self._vm.msr_indices
        entries = b""
        at = 0
        while at < len(known):
            part = known[at : at + _MSRS_A_CALL]
            ask = MSRS_HEAD.pack(len(part), 0) + b"".join(MSR_ENTRY.pack(index, 0, 0) for index in part)
            done, blob = self.get_blob(StateKind.MSRS, ask)
            entries += blob[MSRS_HEAD.size : MSRS_HEAD.size + done * MSR_ENTRY.size]
            at += done
            if done < len(part):  # the kernel stops at the first that this CPUID does not have
                known = self._vm.msr_indices = (*known[:at], *known[at + 1 :])
        return MSRS_HEAD.pack(len(entries) // MSR_ENTRY.size, 0) + entries

    def set_msrs_of(self, entries: list[tuple[int, int]]) -> None:
        """Set (index, value) in order, as state() lists them. HostError if this core lacks one that holds something."""
        while entries:
            part = entries[:_MSRS_A_CALL]
            try:
                packed = b"".join(MSR_ENTRY.pack(index, 0, value) for index, value in part)
            except struct.error as error:
                raise ConfigError(f"no MSR holds that: {error}") from error
            done = self.set_blob(StateKind.MSRS, MSRS_HEAD.pack(len(part), 0) + packed)
            if done < len(part):
                index, value = part[done]
                # Another core may list MSRs that this one lacks; as at power-up they hold nothing.
                if value != _AT_POWER_UP.get(index, 0):
                    raise HostError(f"cannot restore MSR {index:#x} = {value:#x} on this core")
                done += 1
            entries = entries[done:]


class CoreVm(_core.Vm):
    """One virtual machine on a native core. Made by System.create_vm()."""

    msr_indices: tuple[int, ...]
    supported_cpuid: Callable[[], Sequence[CpuidEntry]] | None
    """What the core can show at most; None: anything."""
    _tsc_khz: int

    def __new__(
        cls,
        core: str,
        config: VmConfig,
        *,
        supported_cpuid: Callable[[], Sequence[CpuidEntry]] | None = None,
        system_fd: int = -1,
        msr_indices: Sequence[int] = (),
    ) -> Self:
        self = super().__new__(
            cls,
            core,
            vcpus=config.vcpus,
            virtual_clock=config.virtual_clock,
            virtual_ips=config.virtual_ips,
            epoch_ns=time.time_ns() if config.epoch_ns is None else config.epoch_ns,
            seed=config.seed,
            system_fd=system_fd,
            pit=config.pit,
            finish=config.finish,
            parallel=config.parallel,
        )
        self.msr_indices = tuple(msr_indices)
        self.supported_cpuid = supported_cpuid
        self._tsc_khz = config.tsc_khz
        return self

    def create_vcpu(self, index: int) -> CoreVcpu:
        """ConfigError if the index is not below VmConfig.vcpus or exists."""
        vcpu = CoreVcpu(self, index)
        vcpu._vm = self
        if self._tsc_khz:
            self.set_tsc_khz(self._tsc_khz)
        return vcpu

    def tsc_khz(self) -> int:
        """The rate of the guests' TSC, of vCPUs that are parked; 0: unknown."""
        return int(struct.unpack("<Q", self.get_blob(StateKind.TSC))[0])

    def set_tsc_khz(self, khz: int) -> None:
        """The rate of the guests' TSC, of vCPUs that are there and parked. HostError if the core cannot have it."""
        try:
            self.set_blob(StateKind.TSC, struct.pack("<Q", khz))
        except (HostError, ConfigError, struct.error) as error:
            have = struct.unpack("<Q", self.get_blob(StateKind.TSC))[0]
            raise HostError(
                f"the guest's TSC ticks at {khz} kHz; this core has {have} and cannot scale it"
            ) from error

    def state(self) -> VmState:
        from cpu.state import save_vm

        return save_vm(self)

    def set_state(self, state: VmState) -> None:
        from cpu.state import restore_vm

        restore_vm(self, state)
