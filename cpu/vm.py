"""Vm and Vcpu of the native cores (cpu/contract.py): the typed part over `cpu._core`'s hot part.

What is hot (take, resume, kick, shadows, interrupts) is inherited from C as it is. Here: registers and complete
states, which are blobs in the layouts of the KVM API for every core. Must not know which core it runs on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from cpu import _core
from cpu.contract import CpuidEntry, Registers, Segment, SystemRegisters, VcpuState, VmConfig, VmState
from cpu.errors import ConfigError, HostError
from cpu.views import CPUID_ENTRY, DTABLE, MSR_ENTRY, MSRS_HEAD, REGS, SEGMENT, SREGS_CONTROL, StateKind

_MSRS_A_CALL = 500  # cpu/native/pyvcpu.c's buffer
_CONTROL = 8 * SEGMENT.size + 2 * DTABLE.size


def _pack_segment(s: Segment) -> bytes:
    return SEGMENT.pack(
        s.base, s.limit, s.selector, s.type, s.present, s.dpl, s.db, s.s, s.l, s.g, s.avl, s.unusable, 0
    )


def _unpack_segment(blob: bytes, offset: int) -> Segment:
    return Segment(*SEGMENT.unpack_from(blob, offset)[:12])


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

    def registers(self) -> Registers:
        return Registers(*REGS.unpack(self.get_blob(StateKind.REGS)))

    def set_registers(self, registers: Registers) -> None:
        r = registers
        self.set_blob(
            StateKind.REGS,
            REGS.pack(
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
                r.r14, r.r15, r.rip, r.rflags,
            ),
        )  # fmt: skip

    def system_registers(self) -> SystemRegisters:
        blob = self.get_blob(StateKind.SREGS)
        segments = [_unpack_segment(blob, at * SEGMENT.size) for at in range(8)]
        gdt = DTABLE.unpack_from(blob, 8 * SEGMENT.size)
        idt = DTABLE.unpack_from(blob, 8 * SEGMENT.size + DTABLE.size)
        control = SREGS_CONTROL.unpack_from(blob, _CONTROL)
        cs, ds, es, fs, gs, ss, tr, ldt = segments
        return SystemRegisters(
            cs, ds, es, fs, gs, ss, tr, ldt, (gdt[0], gdt[1]), (idt[0], idt[1]), *control[:7]
        )  # fmt: skip

    def set_system_registers(self, registers: SystemRegisters) -> None:
        """An interrupt that is already on its way into the vCPU stays."""
        r = registers
        pending = SREGS_CONTROL.unpack_from(self.get_blob(StateKind.SREGS), _CONTROL)[7:]
        segments = (r.cs, r.ds, r.es, r.fs, r.gs, r.ss, r.tr, r.ldt)
        blob = (
            b"".join(_pack_segment(segment) for segment in segments)
            + DTABLE.pack(*r.gdt, 0, 0, 0)
            + DTABLE.pack(*r.idt, 0, 0, 0)
            + SREGS_CONTROL.pack(r.cr0, r.cr2, r.cr3, r.cr4, r.cr8, r.efer, r.apic_base, *pending)
        )
        self.set_blob(StateKind.SREGS, blob)

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        self.set_cpuid_blob(pack_cpuid(entries))

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

    def state(self) -> VcpuState:
        """Complete only between instructions: parked by Interrupted, or fresh."""
        get = self.get_blob
        return VcpuState(
            regs=get(StateKind.REGS),
            sregs=get(StateKind.SREGS),
            xsave=get(StateKind.XSAVE),
            xcrs=get(StateKind.XCRS),
            msrs=self._msrs(),
            lapic=get(StateKind.LAPIC),
            events=get(StateKind.EVENTS),
            debugregs=get(StateKind.DEBUGREGS),
            mp_state=get(StateKind.MP),
        )

    def set_state(self, state: VcpuState) -> None:
        """The vCPU must have its CPUID already. APIC base before the LAPIC, and that before the TSC deadline MSR."""
        put = self.set_blob
        put(StateKind.SREGS, state.sregs)
        put(StateKind.REGS, state.regs)
        put(StateKind.XCRS, state.xcrs)
        put(StateKind.XSAVE, state.xsave)
        put(StateKind.DEBUGREGS, state.debugregs)
        put(StateKind.LAPIC, state.lapic)
        self._set_msrs(state.msrs)
        put(StateKind.EVENTS, state.events)
        put(StateKind.MP, state.mp_state)

    def _msrs(self) -> bytes:
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

    def _set_msrs(self, blob: bytes) -> None:
        entries = [fields for fields in MSR_ENTRY.iter_unpack(blob[MSRS_HEAD.size :])]
        while entries:
            part = entries[:_MSRS_A_CALL]
            done = self.set_blob(
                StateKind.MSRS, MSRS_HEAD.pack(len(part), 0) + b"".join(MSR_ENTRY.pack(*fields) for fields in part)
            )
            if done < len(part):
                index, _, value = part[done]
                # Another core may list MSRs that this one lacks; at zero they hold nothing.
                if value:
                    raise HostError(f"cannot restore MSR {index:#x} = {value:#x} on this core")
                done += 1
            entries = entries[done:]


class CoreVm(_core.Vm):
    """One virtual machine on a native core. Made by System.create_vm()."""

    msr_indices: tuple[int, ...]

    def __new__(cls, core: str, config: VmConfig, *, system_fd: int = -1, msr_indices: Sequence[int] = ()) -> Self:
        self = super().__new__(
            cls,
            core,
            vcpus=config.vcpus,
            virtual_clock=config.virtual_clock,
            virtual_ips=config.virtual_ips,
            epoch_ns=config.epoch_ns,
            seed=config.seed,
            system_fd=system_fd,
            pit=config.pit,
        )
        self.msr_indices = tuple(msr_indices)
        return self

    def create_vcpu(self, index: int) -> CoreVcpu:
        """ConfigError if the index is not below VmConfig.vcpus or exists."""
        vcpu = CoreVcpu(self, index)
        vcpu._vm = self
        return vcpu

    def state(self) -> VmState:
        get = self.get_blob
        return VmState(
            pic_master=get(StateKind.PIC_MASTER),
            pic_slave=get(StateKind.PIC_SLAVE),
            ioapic=get(StateKind.IOAPIC),
            pit=get(StateKind.PIT),
            clock=get(StateKind.CLOCK),
            core=get(StateKind.CORE),
        )

    def set_state(self, state: VmState) -> None:
        put = self.set_blob
        put(StateKind.PIC_MASTER, state.pic_master)
        put(StateKind.PIC_SLAVE, state.pic_slave)
        put(StateKind.IOAPIC, state.ioapic)
        put(StateKind.PIT, state.pit)
        put(StateKind.CLOCK, state.clock)
        if state.core:
            put(StateKind.CORE, state.core)
