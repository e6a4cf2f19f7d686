"""cpu/contract.py: registers and complete state, moved between VMs in mid-run; the dirty log; CPUID. Every core."""

import json
import struct
import time
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

import vmm.errors
from cpu import layouts
from cpu.contract import Capability, CpuidEntry, Registers, Segment
from cpu.errors import ConfigError, CpuError, HostError, StateError
from cpu.exits import AlarmDue, Interrupted, PortIn, PortOut, Resume
from cpu.scripted import StoreStep
from cpu.state import Msr, VcpuState
from cpu.views import StateKind
from tests.support.cores import CODE, DONE, RAM, RESUME, SCRATCH, open_core
from vmm.state.payload import encode, parse

PAGE = 4096
TSC = 0x10


def test_general_registers_round_trip(core, guests):
    vcpu = guests(core).vcpus[0]
    names = [field.name for field in fields(Registers) if field.name not in ("rip", "rflags")]
    wanted = Registers(
        **{name: 0x0123_4567_89AB_CDEF ^ at << 56 for at, name in enumerate(names)}, rip=0x1234, rflags=0x246
    )
    vcpu.set_registers(wanted)
    assert vcpu.registers() == wanted


def test_system_registers_round_trip(core, guests):
    vcpu = guests(core).vcpus[0]
    data = Segment(base=0x1000, limit=0xFFFF_FFFF, selector=0x18, type=3, db=1, g=1)
    wanted = replace(
        vcpu.system_registers(),
        cs=replace(data, selector=8, type=11),
        ds=data,
        es=replace(data, base=0),
        ss=replace(data, selector=0x10),
        gdt=(0x5000, 0x7F),
        idt=(0x6000, 0x7FF),
        cr0=0x11,
        cr2=0xDEAD_BEEF,
        cr3=0x3000,
        cr4=0x20,
    )
    vcpu.set_system_registers(wanted)
    assert vcpu.system_registers() == wanted


def test_msrs_round_trip(core, guests):
    vcpu = guests(core).vcpus[0]
    lstar = 0xC000_0082
    vcpu.set_msr(lstar, 0xFFFF_FFFF_8100_0000)
    assert vcpu.msr(lstar) == 0xFFFF_FFFF_8100_0000


def test_an_unknown_msr_is_refused(real_core, guests):
    vcpu = guests(real_core).vcpus[0]
    with pytest.raises(ConfigError):
        vcpu.msr(0x1234_5678)
    with pytest.raises(ConfigError):
        vcpu.set_msr(0x1234_5678, 1)


def test_blobs_have_the_declared_layouts(real_core, guests):
    guest = guests(real_core)
    for declaration, kind, owner in (
        (layouts.Regs, StateKind.REGS, guest.vcpus[0]),
        (layouts.Sregs, StateKind.SREGS, guest.vcpus[0]),
        (layouts.Xsave, StateKind.XSAVE, guest.vcpus[0]),
        (layouts.Xcrs, StateKind.XCRS, guest.vcpus[0]),
        (layouts.Lapic, StateKind.LAPIC, guest.vcpus[0]),
        (layouts.VcpuEvents, StateKind.EVENTS, guest.vcpus[0]),
        (layouts.DebugRegs, StateKind.DEBUGREGS, guest.vcpus[0]),
        (layouts.MpState, StateKind.MP, guest.vcpus[0]),
        (layouts.PitState2, StateKind.PIT, guest.vm),
        (layouts.ClockData, StateKind.CLOCK, guest.vm),
    ):
        blob = owner.get_blob(kind)
        assert declaration.build(declaration.parse(blob)) == blob
    for chip, kind in enumerate((StateKind.PIC_MASTER, StateKind.PIC_SLAVE, StateKind.IOAPIC)):
        blob = guest.vm.get_blob(kind)
        assert layouts.Irqchip.parse(blob).chip_id == chip
        assert len(blob) == layouts.IRQCHIP_SIZE


@pytest.mark.parametrize(
    ("declaration", "kind", "fill"),
    [
        (layouts.VcpuEvents, StateKind.EVENTS, 64),
        (layouts.DebugRegs, StateKind.DEBUGREGS, 128),
        (layouts.MpState, StateKind.MP, 4),
        (layouts.Sregs, StateKind.SREGS, 312),
    ],
)
def test_typed_fields_are_those_of_the_declared_layouts(guests, declaration, kind, fill):
    """The scripted core keeps whatever it is given."""
    system = open_core("scripted")
    vcpu = guests(system).vcpus[0]
    blob = bytes(at % 251 for at in range(1, fill + 1)) if kind != StateKind.MP else b"\3\0\0\0"
    vcpu.set_blob(kind, blob)
    declared, state = declaration.parse(blob), vcpu.state()
    if kind == StateKind.EVENTS:
        e = state.events
        assert (e.exception_vector, e.exception_error_code) == (declared.exception.nr, declared.exception.error_code)
        assert (e.interrupt_soft, e.interrupt_shadow) == (declared.interrupt.soft, declared.interrupt.shadow)
        assert (e.nmi_injected, e.nmi_pending, e.nmi_masked) == (
            declared.nmi.injected, declared.nmi.pending, declared.nmi.masked,
        )  # fmt: skip
        assert (e.sipi_vector, e.flags, e.smm, e.latched_init, e.triple_fault) == (
            declared.sipi_vector, declared.flags, declared.smi.smm, declared.smi.latched_init, declared.triple_fault,
        )  # fmt: skip
        assert (e.exception_has_payload, e.exception_payload) == (
            declared.exception_has_payload, declared.exception_payload,
        )  # fmt: skip
    elif kind == StateKind.DEBUGREGS:
        assert (list(state.debug.db), state.debug.dr6, state.debug.dr7) == (declared.db, declared.dr6, declared.dr7)
    elif kind == StateKind.MP:
        assert state.mp_state == "halted"
    else:
        assert state.system.tr.selector == declared.tr.selector
        assert state.system.idt == (declared.idt.base, declared.idt.limit)
        assert (state.system.cr4, state.system.apic_base) == (declared.control.cr4, declared.control.apic_base)


def test_states_are_payloads(core, guests):
    """They go through a file as they are, and what such a file holds is checked."""
    guest = guests(core)
    vcpu, vm = guest.vcpus[0].state(), guest.vm.state()
    for state in (vcpu, vm):
        assert parse(type(state), "core", json.loads(json.dumps(encode(state)))) == state
    guest.vm.set_state(vm)
    guest.vcpus[0].set_state(vcpu)
    wrong = encode(vcpu)
    wrong["fields"]["registers"]["rax"] = 1 << 64
    with pytest.raises(vmm.errors.StateError, match="^vcpu 0: registers: rax: "):
        parse(VcpuState, "vcpu 0", wrong)


def test_a_vm_without_a_pit_has_no_state_of_one(core, guests):
    with_pit, without = guests(core).vm, guests(core, pit=False).vm
    state = without.state()
    assert state.pit is None
    without.set_state(state)
    with pytest.raises(ConfigError):
        without.set_state(with_pit.state())
    with pytest.raises(ConfigError):
        with_pit.set_state(state)


@pytest.mark.parametrize("change", [
    {"lapic": b""}, {"lapic": bytes(1023)}, {"lapic": bytes(1025)}, {"xsave": bytes(4097)}, {"pending_interrupt": 256},
    {"xcr0": 1 << 64}, {"xcr0": -1}, {"mp_state": "dead"},
    {"msrs": (Msr(1 << 32, 0),)}, {"msrs": (Msr(0x10, 1 << 64),)},
    {"registers": Registers(rax=1 << 64)}, {"registers": Registers(rip=-1)},
])  # fmt: skip
def test_a_state_that_cannot_be_is_refused(core, guests, change):
    vcpu = guests(core).vcpus[0]
    with pytest.raises(ConfigError):
        vcpu.set_state(replace(vcpu.state(), **change))


def filled(value, filler):
    """A value of the same shape whose numbers are the largest that their fields take, or a pattern."""
    if is_dataclass(value):
        hints = get_type_hints(type(value), include_extras=True)
        return replace(
            value, **{f.name: filled_field(getattr(value, f.name), hints[f.name], filler) for f in fields(value)}
        )
    return value


def filled_field(value, hint, filler):
    if isinstance(value, int) and get_origin(hint) is Annotated:
        allowed = get_args(hint)[1]
        return min(int.from_bytes(filler * 8, "little"), allowed.stop - 1)
    if isinstance(value, bytes):
        return filler * len(value)
    if isinstance(value, tuple):
        return tuple(int.from_bytes(filler * 8, "little") if isinstance(v, int) else filled(v, filler) for v in value)
    return filled(value, filler)


def test_garbage_in_a_state_raises_nothing_but_cpu_errors(core, guests):
    guest = guests(core)
    vcpu = guest.vcpus[0]
    state, vm = vcpu.state(), guest.vm.state()
    for filler in (b"\xff", b"\x5a", b"\1"):
        for original, owner in ((state, vcpu), (vm, guest.vm)):
            garbage = filled(original, filler)
            for field in fields(original):
                if field.name in ("cpuid", "tsc_khz"):
                    continue
                try:
                    owner.set_state(replace(original, **{field.name: getattr(garbage, field.name)}))
                except CpuError:
                    pass


# xor eax, eax; xor ebx, ebx; 1: inc ebx; lea eax, [eax*4+eax+7]; xor eax, ebx; mov [SCRATCH], eax; out 0x10, al when
# (ebx & 0xff) == 0; until ebx == 4096; then DONE
COUNT = bytes.fromhex(
    "31c0 31db 43 8d448007 31d8 a300900000 f7c3ff000000 7507 ba10000000 ef 90 81fb00100000 75dd baf00f0000 ef ebfe"
)


def expected():
    a, outs = 0, []
    for b in range(1, 4097):
        a = (a * 5 + 7 & 0xFFFF_FFFF) ^ b
        if not b & 0xFF:
            outs.append(a)
    return outs, a


def test_a_run_that_hops_through_fresh_vms_yields_the_same_result(real_core, guests):
    """Kick, save, restore into a new VM over the same memory bytes, run on: as if nothing had happened."""
    outs, final = [], None
    guest = guests(real_core)
    guest.load_code(COUNT)
    guest.go()
    hops = 0
    while final is None:
        if hops < 30:  # a kick is owed after each write at the latest, so there are at least as many as half of them
            guest.vcpus[0].kick()
        index, exit_ = guest.next_exit()
        match exit_:
            case PortOut(0x10, 4, value):
                outs.append(value)
                guest.vcpus[index].resume(RESUME)
            case PortOut(port, 4, value) if port == DONE:
                final = value
            case Interrupted():
                hops += 1
                after = guests(real_core)
                after.memory[:] = guest.memory[:]
                after.vm.set_state(guest.vm.state())
                after.vcpus[0].set_state(guest.vcpus[0].state())
                guest = after
                guest.go()
            case _:
                raise AssertionError(exit_)
    assert hops >= 8
    assert (outs, final) == expected()


def test_a_kick_completes_the_read_before_the_state_is_saved(real_core, guests):
    """resume(answer) then kick(): the state holds the answer and does not ask again."""
    guest = guests(real_core)
    guest.load([PortIn(0x60, 4), PortOut(0x10, 1, 1)])
    guest.go()
    assert guest.next_exit() == (0, PortIn(0x60, 4))
    from cpu.exits import CompleteRead

    guest.vcpus[0].resume(CompleteRead(0x1122_3344))
    guest.vcpus[0].kick()
    index, exit_ = guest.next_exit()
    while not isinstance(exit_, Interrupted):  # it may have reached the write first
        assert exit_ == PortOut(0x10, 1, 1)
        guest.vcpus[0].resume(Resume())
        index, exit_ = guest.next_exit()
    other = guests(real_core)
    other.memory[:] = guest.memory[:]
    other.vcpus[0].set_state(guest.vcpus[0].state())
    other.go()
    assert (0, PortIn(0x60, 4)) not in other.run()
    assert other.answers == [0x1122_3344]


def test_time_goes_on_from_where_it_was(core, guests):
    """The core's clock, the guest's TSC and the alarm, in a VM whose host was never up for that long."""
    guest = guests(core)
    state, vcpu_state = guest.vm.state(), guest.vcpus[0].state()
    day = 86_400 * 10**9
    other = guests(core)
    began = time.monotonic_ns()
    extra = {"core": replace(state.core, now_ns=10_000 * day)} if state.core is not None else {}
    other.vm.set_state(replace(state, clock_ns=10_000 * day, **extra))
    ahead = replace(vcpu_state, msrs=tuple(Msr(m.index, 1 << 50) if m.index == TSC else m for m in vcpu_state.msrs))
    sets_tsc = True
    try:
        other.vcpus[0].set_state(ahead)
    except HostError as error:  # a KVM without hardware below it
        assert f"the guest's TSC is at {1 << 50}; this core cannot set it" in str(error)
        assert core.name == "kvm" and Capability.STOCK_KERNELS not in core.capabilities()
        sets_tsc = False
    now, tsc = other.vm.now_ns(), other.vcpus[0].msr(TSC)
    passed = time.monotonic_ns() - began
    assert 10_000 * day <= now <= 10_000 * day + passed
    if not guest.scripted:
        assert not sets_tsc or 1 << 50 <= tsc <= (1 << 50) + passed * state.tsc_khz // 1_000_000 + 1_000_000
        assert now <= other.vm.state().clock_ns
    other.vm.set_alarm(now + 2_000_000)
    assert other.take() == [AlarmDue()]
    assert other.vm.now_ns() >= now + 2_000_000
    other.vm.set_alarm(5)  # long ago
    assert other.take() == [AlarmDue()]


KVMCLOCK = 0x4B56_4D01  # MSR_KVM_SYSTEM_TIME_NEW: the address of struct pvclock_vcpu_time_info, bit 0: in use
FLAGS = SCRATCH + 29
GUEST_STOPPED = 2


@pytest.mark.parametrize("virtual", [False, True])
def test_a_guest_is_told_that_it_stood_still(real_core, guests, virtual):
    if virtual and Capability.VIRTUAL_CLOCK not in real_core.capabilities():
        pytest.skip("this core has no virtual clock")
    guest = guests(real_core, virtual_clock=virtual)
    vcpu = guest.vcpus[0]
    vcpu.stood_still()  # no kvmclock: nobody to tell
    guest.load([PortOut(0x10, 1, turn) for turn in range(4)])
    vcpu.set_msr(KVMCLOCK, SCRATCH | 1)
    guest.go()
    told = []
    for turn in range(4):
        assert guest.next_exit() == (0, PortOut(0x10, 1, turn))
        told.append(bool(guest.memory[FLAGS] & GUEST_STOPPED))
        if turn == 1:
            vcpu.stood_still()
        if turn == 2:
            guest.memory[FLAGS] &= ~GUEST_STOPPED  # as the guest does it
        vcpu.resume(RESUME)
    assert told == [False, False, not virtual, False]
    assert int.from_bytes(guest.memory[SCRATCH : SCRATCH + 4], "little") % 2 == 0


def test_what_a_guest_was_told_stays_until_it_looks(real_core, guests):
    """The page is published anew meanwhile."""
    guest = guests(real_core)
    vcpu = guest.vcpus[0]
    guest.load([PortOut(0x10, 1, 0), PortOut(0x10, 1, 1), PortOut(0x10, 1, 2)])
    vcpu.set_msr(KVMCLOCK, SCRATCH | 1)
    guest.go()
    assert guest.next_exit() == (0, PortOut(0x10, 1, 0))
    vcpu.stood_still()
    vcpu.resume(RESUME)
    assert guest.next_exit() == (0, PortOut(0x10, 1, 1))
    vcpu.set_msr(TSC, vcpu.msr(TSC) + (1 << 40))
    vcpu.resume(RESUME)
    assert guest.next_exit() == (0, PortOut(0x10, 1, 2))
    assert guest.memory[FLAGS] & GUEST_STOPPED


def test_only_a_parked_vcpu_stood_still(core, guests):
    guest = guests(core)
    guest.load([])
    guest.go()
    with pytest.raises(StateError):
        guest.vcpus[0].stood_still()
    assert guest.run() == []


def dirty_pages(guest):
    bitmap = guest.vm.dirty_log(0)
    assert len(bitmap) == RAM // PAGE // 8
    return {at for at in range(RAM // PAGE) if bitmap[at // 8] >> at % 8 & 1}


def test_the_dirty_log_holds_what_vcpus_wrote_since_it_was_read(core, guests):
    guest = guests(core, log_dirty=True)
    dirty_pages(guest)
    guest.load(
        [
            StoreStep(0x20000, 4, 1),
            StoreStep(0x42FFE, 2, 2),
            PortOut(0x10, 1, 1),
            StoreStep(0x50000, 1, 3),
            StoreStep(0x20000, 1, 9),
        ]
    )
    dirty_pages(guest)  # loading is not the guest's doing, but a core may have seen its own accesses
    guest.go()
    assert guest.next_exit() == (0, PortOut(0x10, 1, 1))
    assert dirty_pages(guest) - {CODE // PAGE} == {0x20, 0x42}
    assert dirty_pages(guest) == set()
    guest.vcpus[0].resume(RESUME)
    assert guest.next_exit() == (0, PortOut(DONE, 1, 0))
    assert dirty_pages(guest) == {0x20, 0x50}


def test_the_dirty_log_can_be_turned_on_and_off(core, guests):
    guest = guests(core)
    with pytest.raises(CpuError):
        guest.vm.dirty_log(0)
    view = memoryview(guest.memory)
    guest.vm.set_memory_slot(0, 0, view, log_dirty=True)
    guest.load([StoreStep(0x30000, 4, 1)])
    dirty_pages(guest)
    guest.go()
    assert guest.run() == []
    assert 0x30 in dirty_pages(guest)
    guest.vm.set_memory_slot(0, 0, view)
    view.release()
    with pytest.raises(CpuError):
        guest.vm.dirty_log(5)


def test_a_read_only_slot_keeps_its_bytes(real_core, guests):
    """A write to it is an MMIO exit (KVM API 4.35)."""
    import mmap

    from cpu.exits import MmioWrite

    guest = guests(real_core)
    rom = mmap.mmap(-1, PAGE)
    rom[:4] = b"ROM!"
    guest.vm.set_memory_slot(1, 0x10_0000, memoryview(rom), readonly=True)
    from cpu.exits import MmioRead

    guest.load([MmioRead(0x10_0000, 4), MmioWrite(0x10_0000, 4, 0)])
    guest.go()
    assert guest.run() == [(0, MmioWrite(0x10_0000, 4, 0))]
    assert guest.answers == [int.from_bytes(b"ROM!", "little")]
    assert rom[:4] == b"ROM!"
    guest.vm.set_memory_slot(1, 0, None)
    rom.close()


def test_the_guest_sees_the_cpuid_that_was_set(real_core, guests):
    guest = guests(real_core)
    table = [entry for entry in real_core.supported_cpuid() if entry.function < 0x4000_0000]
    guest.vcpus[0].set_cpuid([*table, CpuidEntry(0x4000_0000, 0, 0, 0x4000_0001, 0x1111, 0x2222, 0x3333)])
    # mov eax, 0x40000000; cpuid; mov [SCRATCH], ebx; mov [SCRATCH + 4], ecx; mov [SCRATCH + 8], edx; DONE
    guest.load_code(bytes.fromhex("b800000040 0fa2 891d00900000 890d04900000 891508900000 baf00f0000 ee ebfe"))
    guest.go()
    assert guest.run() == []
    assert struct.unpack_from("<3I", guest.memory, SCRATCH) == (0x1111, 0x2222, 0x3333)


def test_supported_cpuid_names_leaves_once(real_core):
    entries = real_core.supported_cpuid()
    keys = [(entry.function, entry.index) for entry in entries]
    assert len(keys) == len(set(keys))
    assert {0, 1, 0x8000_0000, 0x8000_0001} <= {entry.function for entry in entries}
    leaf1 = next(entry for entry in entries if entry.function == 1)
    assert leaf1.ecx >> 31 & 1, "guests must know that they are guests"
