"""The state of a VM and its vCPUs, as typed values that every core gives and takes.

The dataclasses are declarations: their annotations say what each field may be (`Annotated[int, range(n)]`, lengths of
bytes and tuples likewise, Literal), so that vmm/state/payload.py writes, checks and documents them. The same field has
the same meaning on every core; what one core alone has is in `extra` and `core`, which another leaves alone.

Below them: between these values and the structures of the KVM API (cpu/layouts.py), in which the native cores
speak. Values that came from a file are checked there and by the core: ConfigError, HostError, nothing else.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from cpu.contract import CpuidEntry, Registers, SystemRegisters
from cpu.errors import ConfigError, HostError
from cpu.registers import pack_registers, pack_system, pack_values, unpack_system, values_of
from cpu.values import I64, U8, U16, U32, U64, dataclass
from cpu.views import CORE_HEAD, EXTRA, MSR_ENTRY, MSRS_HEAD, REGS, StateKind

if TYPE_CHECKING:
    from cpu.vm import CoreVcpu, CoreVm

XSAVE_BYTES: Final = 4096
XSAVE_LEAST: Final = 576
"""The legacy region and the header (SDM 1, 13.4)."""
MAX_CPUID: Final = 256
MAX_MSRS: Final = 1024
MAX_VCPUS: Final = 64

MP_STATES: Final = ("runnable", "uninitialized", "init-received", "halted", "sipi-received")
"""KVM_MP_STATE_*, by number (KVM API 4.38)."""
MpState = Literal["runnable", "uninitialized", "init-received", "halted", "sipi-received"]


@dataclass(frozen=True, slots=True)
class Msr:
    """One model-specific register."""

    index: U32
    value: U64


@dataclass(frozen=True, slots=True)
class Events:
    """What is under way or waits (struct kvm_vcpu_events, KVM API 4.31). `flags` says which of the optional fields hold
    something; a core ignores those it has no use for."""

    exception_injected: U8
    exception_vector: U8
    exception_has_error_code: U8
    exception_pending: U8
    exception_error_code: U32
    interrupt_injected: U8
    interrupt_vector: U8
    interrupt_soft: U8
    interrupt_shadow: U8
    nmi_injected: U8
    nmi_pending: U8
    nmi_masked: U8
    sipi_vector: U32
    flags: U32
    smm: U8
    smi_pending: U8
    smm_inside_nmi: U8
    latched_init: U8
    triple_fault: U8
    exception_has_payload: U8
    exception_payload: U64


@dataclass(frozen=True, slots=True)
class DebugRegisters:
    """DR0 to DR3, DR6, DR7."""

    db: tuple[U64, U64, U64, U64]
    dr6: U64
    dr7: U64


@dataclass(frozen=True, slots=True)
class SoftVcpu:
    """What only the software core has of a vCPU, for a run under the virtual clock to go on to the last bit."""

    mwait_until_ns: U64 | None
    held_breakpoints: U8
    """Data breakpoints that a load of SS holds back to the end of the next instruction."""
    fcs: U16
    fds: U16
    pdptes: tuple[U64, U64, U64, U64] | None
    """PAE paging: the registers that loading CR3 filled."""


@dataclass(frozen=True, slots=True)
class VcpuState:
    """A vCPU. `xsave` is in the standard format (SDM 1, 13.4), less zeros at its end; `lapic`: the register page."""

    kind: ClassVar = "vcpu"
    version: ClassVar = 1
    cpuid: Annotated[tuple[CpuidEntry, ...], range(MAX_CPUID + 1)]
    registers: Registers
    system: SystemRegisters
    pending_interrupt: U8 | None
    """An external interrupt that was taken from its controller and is not delivered yet."""
    xcr0: U64
    xsave: Annotated[bytes, range(XSAVE_LEAST, XSAVE_BYTES + 1)]
    msrs: Annotated[tuple[Msr, ...], range(MAX_MSRS + 1)]
    lapic: Annotated[bytes, range(1024, 1025)]
    events: Events
    debug: DebugRegisters
    mp_state: MpState
    extra: SoftVcpu | None = None


@dataclass(frozen=True, slots=True)
class Pic:
    """An 8259A and its ELCR (struct kvm_pic_state)."""

    last_irr: U8
    irr: U8
    imr: U8
    isr: U8
    priority_add: U8
    irq_base: U8
    read_reg_select: U8
    poll: U8
    special_mask: U8
    init_state: U8
    auto_eoi: U8
    rotate_on_auto_eoi: U8
    special_fully_nested_mode: U8
    init4: U8
    elcr: U8
    elcr_mask: U8


@dataclass(frozen=True, slots=True)
class Ioapic:
    """The I/O APIC (struct kvm_ioapic_state); `irr`: levels of its pins."""

    base_address: U64
    register_select: U32
    id: U32
    irr: U32
    redirections: Annotated[tuple[U64, ...], range(24, 25)]


@dataclass(frozen=True, slots=True)
class PitChannel:
    """A counter of the 8254 (struct kvm_pit_channel_state). `age_ns`: how long ago its count was loaded, for which
    KVM has no use: it loads the count anew."""

    count: U32
    latched_count: U16
    count_latched: U8
    status_latched: U8
    status: U8
    read_state: U8
    write_state: U8
    write_latch: U8
    rw_mode: U8
    mode: U8
    bcd: U8
    gate: U8
    age_ns: U64
    next_count: U32
    """Written, and loaded when the period ends; 0: none."""


@dataclass(frozen=True, slots=True)
class Pit:
    """The 8254 and the speaker's bit of port 0x61 (flags of struct kvm_pit_state2)."""

    channels: tuple[PitChannel, PitChannel, PitChannel]
    flags: U32


@dataclass(frozen=True, slots=True)
class SoftVm:
    """What only the software core has of a VM. With another `seed` and `position` 0 a copy draws other numbers."""

    seeded: bool
    seed: U64
    position: U64
    """Bytes drawn from the seed's stream."""
    turn: U32
    """The vCPU whose turn it is."""
    turn_left: I64
    """Instructions left of that turn."""
    now_ns: U64
    instructions: Annotated[tuple[U64, ...], range(1, MAX_VCPUS + 1)]
    """Retired, by vCPU: with the virtual clock this is the time."""


@dataclass(frozen=True, slots=True)
class VmState:
    """What all vCPUs share."""

    kind: ClassVar = "core"
    version: ClassVar = 1
    pic_master: Pic
    pic_slave: Pic
    ioapic: Ioapic
    pit: Pit | None
    clock_ns: U64
    """kvmclock's time; on the software core it is the core's."""
    tsc_khz: U64
    """Rate of the guest's TSC; 0: unknown."""
    core: SoftVm | None = None


# ---- the structures of the KVM API ----

_XCRS = struct.Struct("<IIIIQ")  # nr_xcrs flags; the first entry: xcr reserved value
_XCRS_BYTES = 392
_EVENTS = struct.Struct("<4BI 4B 3Bx II 4B B26xBQ".replace(" ", ""))
_DEBUGREGS = struct.Struct("<7Q72x")  # db[4] dr6 dr7 flags
_IRQCHIP_BYTES = 520
_PIC = struct.Struct("<II16B")  # chip_id pad, kvm_pic_state
_IOAPIC = struct.Struct("<IIQIIII24Q")  # chip_id pad, kvm_ioapic_state
_PIT_CHANNEL = struct.Struct("<IH10Bq")
_PIT_END = struct.Struct("<I9I")  # flags reserved[9]
_CLOCK = struct.Struct("<QIIQQ16x")
_U64 = struct.Struct("<Q")
_X87_INITIAL = b"\x7f\x03" + bytes(22)
_MXCSR_INITIAL = b"\x80\x1f\0\0"
_TSC = 0x10
_TSC_TOLERANCE = 1_000_000_000  # ticks: KVM takes TSCs that are less than a second apart for equal ones
_MWAIT, _PAE, _HELD_SHIFT = 1, 2, 8  # EXTRA_* of cpu/soft/run/state.c


def save_vcpu(vcpu: CoreVcpu) -> VcpuState:
    """Vcpu.state()"""
    get = vcpu.get_blob
    system, bitmap = unpack_system(get(StateKind.SREGS))
    waiting = sum(word << 64 * at for at, word in enumerate(bitmap))
    count, _, _, _, xcr0 = _XCRS.unpack_from(get(StateKind.XCRS))
    xsave = bytearray(get(StateKind.XSAVE))
    # MXCSR_MASK and what is software's: XRSTOR looks at neither (SDM 1, 10.5.1), and both are the host's own.
    xsave[28:32], xsave[464:512] = bytes(4), bytes(48)
    # A component in its initial state may be marked as in use or not (13.6). SSE's bit goes with MXCSR, too.
    if xsave[512] & 1 and xsave[:24] == _X87_INITIAL and not any(xsave[32:160]):
        xsave[512] &= ~1
    if xsave[512] & 2 and xsave[24:28] == _MXCSR_INITIAL and not any(xsave[160:416]):
        xsave[512] &= ~2
    if xsave[512] & 4 and not any(xsave[576:832]):
        xsave[512] &= ~4
    debug = _DEBUGREGS.unpack(get(StateKind.DEBUGREGS))
    events = _EVENTS.unpack(get(StateKind.EVENTS))
    mp_state = int.from_bytes(get(StateKind.MP), "little")
    extra = get(StateKind.EXTRA)
    return VcpuState(
        cpuid=vcpu.cpuid,
        registers=Registers(*REGS.unpack(get(StateKind.REGS))),
        system=system,
        pending_interrupt=waiting.bit_length() - 1 if waiting else None,
        xcr0=xcr0 if count else 1,
        xsave=bytes(xsave).rstrip(b"\0").ljust(XSAVE_LEAST, b"\0"),
        msrs=tuple(Msr(index, value) for index, _, value in MSR_ENTRY.iter_unpack(vcpu.msrs_blob()[MSRS_HEAD.size :])),
        lapic=get(StateKind.LAPIC),
        events=Events(*events),
        debug=DebugRegisters(debug[:4], debug[4], debug[5]),
        mp_state=MP_STATES[mp_state] if mp_state < len(MP_STATES) else "runnable",
        extra=_unpack_extra(extra) if extra else None,
    )


def restore_vcpu(vcpu: CoreVcpu, state: VcpuState) -> None:
    """Vcpu.set_state(). The APIC base comes before the LAPIC, and that before the TSC deadline's MSR."""
    put = vcpu.set_blob
    waiting = 0 if state.pending_interrupt is None else 1 << state.pending_interrupt
    if waiting >> 256 or len(state.xsave) > XSAVE_BYTES:
        raise ConfigError("a state holds an interrupt above 255, or more than 4096 bytes of XSAVE area")
    if state.cpuid and state.cpuid != vcpu.cpuid:
        vcpu.set_cpuid(state.cpuid)
    bitmap = tuple(waiting >> 64 * at & (1 << 64) - 1 for at in range(4))
    debug = state.debug
    if state.mp_state not in MP_STATES:
        raise ConfigError(f"no vCPU is {state.mp_state!r}")
    put(StateKind.SREGS, pack_system(state.system, bitmap))
    put(StateKind.REGS, pack_registers(state.registers))
    put(StateKind.XCRS, pack_values(_XCRS, 1, 0, 0, 0, state.xcr0).ljust(_XCRS_BYTES, b"\0"))
    put(StateKind.XSAVE, state.xsave.ljust(XSAVE_BYTES, b"\0"))
    put(StateKind.DEBUGREGS, pack_values(_DEBUGREGS, *debug.db, debug.dr6, debug.dr7, 0))
    put(StateKind.LAPIC, state.lapic)
    vcpu.set_msrs_of([(msr.index, msr.value) for msr in state.msrs])
    _check_tsc(vcpu, state)
    put(StateKind.EVENTS, pack_values(_EVENTS, *values_of(state.events)))
    put(StateKind.MP, MP_STATES.index(state.mp_state).to_bytes(4, "little"))
    if state.extra is not None:
        put(StateKind.EXTRA, _pack_extra(state.extra))


def _check_tsc(vcpu: CoreVcpu, state: VcpuState) -> None:
    """Where guests have the host's own TSC (a KVM without hardware below it), setting it does nothing."""
    for msr in state.msrs:
        if msr.index == _TSC and vcpu.msr(_TSC) + _TSC_TOLERANCE < msr.value:
            raise HostError(
                f"the guest's TSC is at {msr.value}; this core cannot set it, and its own at {vcpu.msr(_TSC)} is behind"
            )


def _unpack_extra(blob: bytes) -> SoftVcpu:
    until, flags, fcs, fds, *pdptes = EXTRA.unpack(blob)
    return SoftVcpu(
        mwait_until_ns=until if flags & _MWAIT else None,
        held_breakpoints=flags >> _HELD_SHIFT & 0xFF,
        fcs=fcs,
        fds=fds,
        pdptes=(pdptes[0], pdptes[1], pdptes[2], pdptes[3]) if flags & _PAE else None,
    )


def _pack_extra(extra: SoftVcpu) -> bytes:
    flags = (_MWAIT if extra.mwait_until_ns is not None else 0) | (_PAE if extra.pdptes is not None else 0)
    pdptes = extra.pdptes or (0, 0, 0, 0)
    held = extra.held_breakpoints << _HELD_SHIFT
    return pack_values(EXTRA, extra.mwait_until_ns or 0, flags | held, extra.fcs, extra.fds, *pdptes)


def save_vm(vm: CoreVm) -> VmState:
    """Vm.state()"""
    get = vm.get_blob
    ioapic = _IOAPIC.unpack_from(get(StateKind.IOAPIC))
    pit, core = get(StateKind.PIT), get(StateKind.CORE)
    (tsc_khz,) = _U64.unpack(get(StateKind.TSC))
    return VmState(
        pic_master=Pic(*_PIC.unpack_from(get(StateKind.PIC_MASTER))[2:]),
        pic_slave=Pic(*_PIC.unpack_from(get(StateKind.PIC_SLAVE))[2:]),
        ioapic=Ioapic(ioapic[2], ioapic[3], ioapic[4], ioapic[5], ioapic[7:]),
        pit=_unpack_pit(pit) if pit else None,
        clock_ns=_CLOCK.unpack(get(StateKind.CLOCK))[0],
        tsc_khz=tsc_khz,
        core=_unpack_core(core) if core else None,
    )


def restore_vm(vm: CoreVm, state: VmState) -> None:
    """Vm.set_state()"""
    put = vm.set_blob
    io = state.ioapic
    if len(io.redirections) != 24:
        raise ConfigError("an I/O APIC has 24 redirections")
    for chip, (kind, pic) in enumerate(
        ((StateKind.PIC_MASTER, state.pic_master), (StateKind.PIC_SLAVE, state.pic_slave))
    ):
        put(kind, pack_values(_PIC, chip, 0, *values_of(pic)).ljust(_IRQCHIP_BYTES, b"\0"))
    put(
        StateKind.IOAPIC,
        pack_values(_IOAPIC, 2, 0, io.base_address, io.register_select, io.id, io.irr, 0, *io.redirections).ljust(
            _IRQCHIP_BYTES, b"\0"
        ),
    )
    if state.tsc_khz:
        vm.set_tsc_khz(state.tsc_khz)
    put(StateKind.PIT, _pack_pit(state.pit) if state.pit is not None else b"")
    put(StateKind.CLOCK, pack_values(_CLOCK, state.clock_ns, 0, 0, 0, 0))
    if state.core is not None:
        put(StateKind.CORE, _pack_core(state.core))


def _unpack_pit(blob: bytes) -> Pit:
    end = _PIT_END.unpack_from(blob, 3 * _PIT_CHANNEL.size)
    channels = []
    for at in range(3):
        values = _PIT_CHANNEL.unpack_from(blob, at * _PIT_CHANNEL.size)
        loaded = values[-1]
        # cpu/soft/irqchip/pit.c: not positive is minus the age. KVM's is CLOCK_MONOTONIC of this host.
        age = -loaded if loaded <= 0 else max(time.monotonic_ns() - loaded, 0)
        channels.append(PitChannel(*(*values[:-1], age, end[1 + at])))
    return Pit((channels[0], channels[1], channels[2]), end[0])


def _pack_pit(pit: Pit) -> bytes:
    blob = b""
    for channel in pit.channels:
        *fields, age, _ = values_of(channel)
        blob += pack_values(_PIT_CHANNEL, *fields, -min(age, (1 << 63) - 1))  # the oldest is as good as an older one
    return blob + pack_values(_PIT_END, pit.flags, *(channel.next_count for channel in pit.channels), *[0] * 6)


def _unpack_core(blob: bytes) -> SoftVm:
    seeded, seed, position, vcpus, turn, turn_left = CORE_HEAD.unpack_from(blob)
    now, *instructions = struct.unpack_from(f"<{1 + vcpus}Q", blob, CORE_HEAD.size)
    return SoftVm(bool(seeded), seed, position, turn, turn_left, now, tuple(instructions))


def _pack_core(core: SoftVm) -> bytes:
    counts = core.instructions
    if len(counts) > _SOFT_VCPUS:
        raise ConfigError(f"the software core has at most {_SOFT_VCPUS} vCPUs")
    head = pack_values(CORE_HEAD, core.seeded, core.seed, core.position, len(counts), core.turn, core.turn_left)
    words = (core.now_ns, *counts, *[0] * (_SOFT_VCPUS - len(counts)))
    return head + b"".join(pack_values(_U64, word) for word in words)


_SOFT_VCPUS = 16  # SOFT_MAX_VCPUS
