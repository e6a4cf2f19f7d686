"""cpu/contract.py: a state that was saved on one core runs on in another, and back, in the middle of a program; what a
core lacks is refused by name."""

import functools
import struct
from dataclasses import replace

import pytest

from cpu.contract import Capability, CpuidEntry, Segment, VmConfig
from cpu.cpuid import for_vcpu
from cpu.errors import ConfigError, HostError
from cpu.exits import Interrupted, MmioWrite
from cpu.model import V2, V3, common, lacking, table, unavailable
from cpu.state import Msr
from tests.support.assemble import assemble
from tests.support.cores import CODE, MMIO, RESUME, STACK, make, open_core, set_long

USER, USER_STACK, TABLES = 0x4_0000, 0x5_F000, 0x1_0000
IDT, GDT, TSS = 0x5000, 0x6000, 0x6800

# Each round: integers, SSE2 and x87 go on from the round before. Every 64th INT 0x80 counts at CPL 0 (where KVM can do
# that) and MMIO tells the results. After 4096 rounds it tells -1.
PROGRAM = f"""
    .att_syntax prefix
    mov $1, %rbx
    xor %ecx, %ecx
    cvtsi2sd %rbx, %xmm0
    fninit
    fld1
    mov $0x3ff0000000100000, %rax
    movq %rax, %xmm1
again:
    imul $0x19660d, %rbx, %rbx
    add $0x3c6ef35f, %rbx
    mulsd %xmm1, %xmm0
    addsd %xmm1, %xmm0
    cvtsi2sd %rcx, %xmm2
    addsd %xmm2, %xmm0
    pshufd $0x4e, %xmm0, %xmm3
    paddq %xmm0, %xmm3
    fld1
    faddp
    fld %st(0)
    fsqrt
    faddp
    inc %ecx
    test $63, %cl
    jnz again
    INTERRUPT
    mov ${MMIO:#x}, %edx
    movq %xmm0, %rax
    xor %rbx, %rax
    movq %xmm3, %rsi
    add %rsi, %rax
    mov %eax, (%rdx)
    shr $32, %rax
    mov %eax, (%rdx)
    sub $16, %rsp
    fstl (%rsp)
    mov (%rsp), %rax
    add $16, %rsp
    mov %eax, (%rdx)
    mov {USER + 0x2000:#x}, %eax
    mov %eax, (%rdx)
    cmp $4096, %ecx
    jb again
    movl $-1, (%rdx)
1:  jmp 1b
"""
HANDLER = f"""
    .att_syntax prefix
    incl {USER + 0x2000:#x}
    iretq
"""


# The same at CPL 0, in 32-bit mode without paging.
SUPERVISOR = f"""
    .att_syntax prefix
    xor %ebx, %ebx
    mov $1, %eax
1:  inc %ebx
    lea 7(%eax,%eax,4), %eax
    xor %ebx, %eax
    push %eax
    pop 0x9000
    test $255, %bl
    jnz 1b
    mov %eax, {MMIO:#x}
    cmp $65536, %ebx
    jb 1b
    movl $-1, {MMIO:#x}
2:  jmp 2b
"""


# Sixteen YMM registers and MXCSR (its rounding, and its flags, which gather) go on from round to round; for half of the
# time the upper halves are in their initial state. Every 64th round MMIO tells words of some, upper halves included.
VECTORS = f"""
    .att_syntax prefix
    mov $1, %ebx
    xor %ecx, %ecx
    vmovd %ebx, %xmm0
    vpbroadcastd %xmm0, %ymm0
    .irp n, 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vpslld $\\n, %ymm0, %ymm\\n
    .endr
again:
    .irp n, 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vpaddd %ymm\\n, %ymm0, %ymm0
    vpermq $0x39, %ymm0, %ymm0
    vpxor %ymm0, %ymm\\n, %ymm\\n
    .endr
    vcvtdq2ps %ymm3, %ymm4
    inc %ecx
    test $63, %cl
    jnz again
    mov ${MMIO:#x}, %edx
    .irp n, 0,4,9,15
    vmovd %xmm\\n, (%rdx)
    vextracti128 $1, %ymm\\n, %xmm8
    vmovd %xmm8, (%rdx)
    .endr
    stmxcsr -8(%rsp)
    mov -8(%rsp), %eax
    mov %eax, (%rdx)
    and $0x1fc0, %eax
    xor $0x2000, %eax
    mov %eax, -8(%rsp)
    ldmxcsr -8(%rsp)
    test $1023, %ecx
    jnz again
    vzeroupper
2:  paddd %xmm1, %xmm0
    pxor %xmm0, %xmm15
    inc %ecx
    test $63, %cl
    jnz 2b
    movd %xmm15, (%rdx)
    test $1023, %ecx
    jnz 2b
    cmp $8192, %ecx
    jb again
    movl $-1, (%rdx)
1:  jmp 1b
"""


def vectors(guest, _):
    """VECTORS at CPL 3, with XCR0 for AVX."""
    set_user(guest, VECTORS)
    vcpu = guest.vcpus[0]
    old = vcpu.system_registers()
    vcpu.set_system_registers(replace(old, cr4=old.cr4 | 1 << 18))
    vcpu.set_state(replace(vcpu.state(), xcr0=7))


def supervisor(guest, _):
    guest.load_code(assemble(SUPERVISOR, CODE, 32))


def user(guest, interrupts):
    """PROGRAM at CPL 3."""
    set_user(guest, PROGRAM.replace("INTERRUPT", "int $0x80" if interrupts else ""))


def set_user(guest, program):
    """A program at CPL 3, with an interrupt gate for INT 0x80."""
    set_long(guest, b"\xf4")
    memory, vcpu = guest.memory, guest.vcpus[0]
    for offset in (0x0000, 0x1000, 0x1000 + 8 * (MMIO >> 30), 0x2000, 0x3000 + 8 * (MMIO >> 21 & 511)):
        memory[TABLES + offset] |= 4  # for user mode
    code, handler = assemble(program, USER, 64), assemble(HANDLER, CODE, 64)
    memory[USER : USER + len(code)] = code
    memory[CODE : CODE + len(handler)] = handler
    struct.pack_into("<HHBBHII", memory, IDT + 16 * 0x80, CODE, 8, 0, 0xEE, 0, 0, 0)
    struct.pack_into("<5Q", memory, GDT, 0, 0xAF9B000000FFFF, 0xCF93000000FFFF, 0xCFF3000000FFFF, 0xAFFB000000FFFF)
    struct.pack_into("<Q", memory, TSS + 4, STACK)
    data = Segment(limit=0xFFFF_FFFF, selector=0x1B, type=3, dpl=3, db=1, g=1)
    old = vcpu.system_registers()
    vcpu.set_system_registers(
        replace(
            old,
            cs=replace(data, selector=0x23, type=11, db=0, l=1), ss=data, ds=data, es=data, fs=data, gs=data,
            gdt=(GDT, 0x27), idt=(IDT, 0xFFF), cr4=old.cr4 | 0x600,
            tr=replace(old.tr, base=TSS, limit=0x67, selector=0, type=11, s=0, present=1, unusable=0),
        )
    )  # fmt: skip
    vcpu.set_registers(replace(vcpu.registers(), rip=USER, rsp=USER_STACK, rflags=0x202))


def fixed_rate(system):
    """Of KVM's TSC, which not every host scales; 0: this core takes any."""
    if system.name != "kvm":
        return 0
    guest = make(system)
    khz = guest.vm.state().tsc_khz
    guest.close()
    return khz


def run(systems, cpuid, program, interrupts, hops):
    """What the program tells, and how many hops there were: after each write at most one, to the next of `systems`."""
    guest, told, done = make(systems[0], config=VmConfig(tsc_khz=max(map(fixed_rate, systems)))), [], 0
    guest.vcpus[0].set_cpuid(for_vcpu(cpuid, 0, 1))
    program(guest, interrupts)
    guest.go()
    try:
        while True:
            if done < hops and len(told) >= 12 * done:
                guest.vcpus[0].kick()
            _, exit_ = guest.next_exit()
            match exit_:
                case MmioWrite(address, 4, 0xFFFF_FFFF) if address == MMIO:
                    return told, done
                case MmioWrite(address, 4, value) if address == MMIO:
                    told.append(value)
                case Interrupted() if done < hops:
                    done += 1
                    vm, vcpu = guest.vm.state(), guest.vcpus[0].state()
                    after = make(systems[done % len(systems)], config=VmConfig())
                    after.memory[:] = guest.memory[:]
                    guest.close()
                    guest = after
                    guest.vm.set_state(vm)
                    guest.vcpus[0].set_state(vcpu)
                    restored = guest.vcpus[0].state()
                    for field in ("registers", "system", "xsave", "debug", "mp_state", "cpuid", "pending_interrupt"):
                        assert getattr(restored, field) == getattr(vcpu, field), field
                case Interrupted():
                    pass
                case _:
                    raise AssertionError(f"{exit_} on {guest.system.name} after {done} hops")
            guest.vcpus[0].resume(RESUME)
    finally:
        guest.close()


@functools.cache
def expected(program, interrupts, model="v2"):
    system = open_core("soft")
    try:
        return run([system], table(model, system.supported_cpuid()), program, interrupts, 0)[0]
    finally:
        system.close()


@pytest.mark.kvm
@pytest.mark.parametrize("names", [("kvm", "soft"), ("soft", "kvm"), ("kvm",), ("soft",)], ids="-".join)
@pytest.mark.parametrize("program", [user, supervisor])
def test_hops_between_cores_change_nothing(names, program):
    systems = [open_core(name) for name in names]
    try:
        cpuid = common(*(table("v2", system.supported_cpuid()) for system in systems))
        interrupts = all(Capability.STOCK_KERNELS in system.capabilities() for system in systems)
        told, hops = run(systems, cpuid, program, interrupts, 14)
    finally:
        for system in systems:
            system.close()
    assert hops == 14
    assert told == expected(program, interrupts)


@pytest.mark.kvm
@pytest.mark.parametrize("names", [("kvm", "soft"), ("soft", "kvm"), ("kvm",), ("soft",)], ids="-".join)
def test_hops_of_a_guest_with_avx_change_nothing_or_are_refused_by_name(names):
    systems = [open_core(name) for name in names]
    try:
        tables = [system.supported_cpuid() for system in systems]
        if lacking(V3, tables[0]):
            pytest.skip(f"{names[0]} has no AVX2, AES or another part of v3 here")
        if lacks := [name for other in tables for name in unavailable("v3", other)]:
            with pytest.raises(HostError, match=f"was told of what this core lacks: .*{lacks[0]}"):
                run(systems, table("v3", tables[0]), vectors, False, 14)
            return
        told, hops = run(systems, common(*(table("v3", other) for other in tables)), vectors, False, 14)
    finally:
        for system in systems:
            system.close()
    assert hops == 14
    assert told == expected(vectors, False, "v3")


def test_what_a_core_lacks_is_refused_by_name(core, guests):
    guest = guests(core)
    vcpu = guest.vcpus[0]
    state = vcpu.state()
    leaf7 = CpuidEntry(7, 0, 1, 0, 1 << 16 | 1 << 31, 0, 1 << 24)
    more = (*(entry for entry in state.cpuid if entry.function != 7), leaf7)
    with pytest.raises(HostError) as caught:
        vcpu.set_state(replace(state, cpuid=more))
    assert "the guest was told of what this core lacks: " in str(caught.value)
    if not guest.scripted:
        assert "CPUID 7.0.edx bit 24" in str(caught.value)
    assert vcpu.state().cpuid == state.cpuid


@pytest.mark.parametrize("khz", [1_000_000, 2_596_122, 3_000_000])
def test_a_soft_guests_tsc_ticks_as_it_did_where_it_came_from(guests, khz):
    """It goes on from where it was, at the rate that the guest knows, and kvmclock agrees with it."""
    system = open_core("soft")
    guest = guests(system, virtual_clock=True)
    guest.load_code(assemble(".att_syntax prefix; mov $100000, %ecx; 1: loop 1b; out %al, $0x10; 2: jmp 2b", CODE))
    vm = replace(guest.vm.state(), tsc_khz=khz, clock_ns=5_000_000_000)
    vm = replace(vm, core=replace(vm.core, now_ns=5_000_000_000))
    vcpu = guest.vcpus[0]
    state = vcpu.state()
    guest.vm.set_state(vm)
    vcpu.set_state(
        replace(state, msrs=tuple(Msr(m.index, 77 << 32 if m.index == 0x10 else m.value) for m in state.msrs))
    )
    assert guest.vm.state().tsc_khz == khz
    before, start = vcpu.msr(0x10), guest.vm.now_ns()
    assert (before, start) == (77 << 32, 5_000_000_000)
    guest.go()
    guest.next_exit()
    passed = guest.vm.now_ns() - start
    assert passed > 100_000
    assert abs(vcpu.msr(0x10) - before - passed * khz // 1_000_000) <= 1
    vcpu.set_msr(0x4B56_4D01, 0x9001)
    version, _, timestamp, system_time, mul, shift = struct.unpack_from("<IIQQIb", guest.memory, 0x9000)
    assert version and not version % 2
    delta = vcpu.msr(0x10) - timestamp
    delta = delta << shift if shift >= 0 else delta >> -shift
    assert abs((delta * mul >> 32) + system_time - guest.vm.now_ns()) < 100


def test_a_rate_that_no_tsc_has_is_refused(real_core, guests):
    guest = guests(real_core)
    state = guest.vm.state()
    for khz in (1, 999_999_999_999, (1 << 64) - 1):
        with pytest.raises(HostError, match=f"the guest's TSC ticks at {khz} kHz; this core has [0-9]+ and cannot"):
            guest.vm.set_state(replace(state, tsc_khz=khz))


@pytest.mark.parametrize("name", ["kvm", "soft"])
def test_a_models_table_is_the_same_but_for_what_the_core_lacks(name):
    system = open_core(name)
    supported = system.supported_cpuid()
    system.close()
    made = table("v2", supported)
    assert lacking(made, supported) == []
    assert lacking(made, V2) == []
    if name == "soft":
        assert lacking(V2, supported) == []
        assert made == list(V2)
    assert table("host", supported) == supported
    wide = {e.function: e.eax & 0xFF for e in table("v2", supported, address_limit=(1 << 41) + 1)}[0x8000_0008]
    assert wide == min(42, {e.function: e.eax & 0xFF for e in supported}[0x8000_0008])
    with pytest.raises(ConfigError, match="no CPU model is named 'v9'; there are v2, v3, max, host"):
        table("v9", supported)


def test_a_model_on_a_core_of_another_vendor():
    intel = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)
    supported = [
        replace(entry, ebx=intel[0], ecx=intel[1], edx=intel[2]) if entry.function in (0, 0x8000_0000) else entry
        for entry in V2
        if entry.function != 0x8000_0021
    ]
    supported = [replace(e, eax=0x000C_06F2) if e.function == 1 else e for e in supported]
    supported.append(CpuidEntry(4, 0, 1, 0x121, 2, 3, 4))
    supported = [replace(e, eax=39 | 48 << 8) if e.function == 0x8000_0008 else e for e in supported]
    made = {(e.function, e.index): e for e in table("v2", supported)}
    assert (made[0, 0].ebx, made[0, 0].ecx, made[0, 0].edx) == intel
    assert made[1, 0].eax == 0x000C_06F2
    assert made[4, 0].eax == 0x121
    assert made[0x8000_0008, 0].eax == 39 | 48 << 8
    assert common(V2, supported)[-2].eax == 39 | 48 << 8
    assert made[0x8000_0021, 0].eax == 0
    assert lacking(list(made.values()), supported) == []
    assert lacking(V2, supported) == [
        "40-bit physical addresses", "no-nested-data-breakpoints", "lfence-serializing", "null-selector-clears-base",
        "auto-ibrs", "srso-no", "tsa-sq-no", "tsa-l1-no",
    ]  # fmt: skip
