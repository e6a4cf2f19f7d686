"""The processor and its interrupt controllers in the middle of something, on the software core with the virtual clock:
saved between any two instructions of a program, a fresh VM goes on to the same end, to the last bit.

Each program says which fields of a state it is about. A field that is the same at every instruction would prove
nothing, so each of them has to change while the program runs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cpu.contract import System, VmConfig
from cpu.debug import Debugging
from cpu.exits import Debug, Interrupted, PortOut
from cpu.state import VcpuState, VmState
from tests.support.assemble import assemble
from tests.support.cores import ANSWERS, CODE, DONE, RESUME, STACK, Guest, make, open_core, set_flat
from tests.support.hops import moves
from vmm.state.payload import encode, parse

GDT, IDT = 0x6000, 0x6800
MARK = 0x10
VECTORS = range(0x60)

BEGIN = f"""
    .macro keep
        mov [edi], eax
        add edi, 4
    .endm
    .macro outb port, value
        mov dx, \\port
        mov al, \\value
        out dx, al
    .endm
    .macro inb port
        xor eax, eax
        mov dx, \\port
        in al, dx
        keep
    .endm
    .macro put address, value
        mov dword ptr [\\address], \\value
    .endm
    .macro get address
        mov eax, dword ptr [\\address]
        keep
    .endm
    .macro wrmsr32 index, low, high=0
        mov ecx, \\index
        mov eax, \\low
        mov edx, \\high
        wrmsr
    .endm
    .macro rdmsr32 index
        mov ecx, \\index
        rdmsr
        keep
        mov eax, edx
        keep
    .endm
    mov edi, {ANSWERS:#x}
"""
END = f"""
    cli
    mov dx, {DONE:#x}
    out dx, al
    1: jmp 1b
common:
    push eax
    push edx
    mov eax, [esp + 8]
    keep
    cmp eax, 16
    jne 3f
    fnclex
3:  cmp eax, 0x20
    jb 2f
    END_OF_INTERRUPT
2:  pop edx
    pop eax
    add esp, 4
    iretd
"""
NO_EOI = ".macro END_OF_INTERRUPT\n.endm\n"
LAPIC_EOI = ".macro END_OF_INTERRUPT\nput 0xfee000b0, 0\n.endm\n"
PIC_EOI = ".macro END_OF_INTERRUPT\noutb 0x20, 0x0b\ninb 0x20\noutb 0x20, 0xa0\n.endm\n"
PIC = """
    outb 0x20, 0x11
    outb 0x21, 0x20
    outb 0x21, 4
    outb 0x21, 1
    outb 0xa0, 0x11
    outb 0xa1, 0x28
    outb 0xa1, 2
    outb 0xa1, 1
    outb 0x21, 0xfe
    outb 0xa1, 0xff
"""

PIC_BEING_INITIALISED = (
    PIC_EOI
    + PIC
    + """
    outb 0x21, 0xfa
    inb 0x21
    outb 0x20, 0x0a
    inb 0x20
    outb 0x20, 0x6b
    outb 0xa0, 0x68
    outb 0xa0, 0x0b
    inb 0xa0
    outb 0x4d0, 0x20
    outb 0x4d1, 0x04
    outb 0x20, 0x0c
    inb 0x20
    outb 0x20, 0x11
    inb 0x21
    outb 0x21, 0x40
    outb 0x21, 4
    outb 0x21, 3
    inb 0x21
"""
)
PIC_IN_SERVICE = (
    PIC_EOI
    + PIC
    + """
    put 0xfee000f0, 0x1ff
    put 0xfee00350, 0x700
    outb 0x43, 0x30
    outb 0x40, 20
    outb 0x40, 0
    mov ecx, 40
3:  loop 3b
    outb 0x20, 0x0a
    inb 0x20
    sti
    nop
    nop
    outb 0x43, 0x34
    outb 0x40, 12
    outb 0x40, 0
    hlt
    hlt
    cli
    outb 0x20, 0x0a
    inb 0x20
"""
)
PIT_HALF_READ = (
    NO_EOI
    + """
    outb 0x43, 0x34
    outb 0x40, 0x34
    outb 0x40, 0x12
    outb 0x43, 0x00
    inb 0x40
    inb 0x40
    inb 0x40
    inb 0x40
    outb 0x43, 0xc2
    inb 0x40
    inb 0x40
    inb 0x40
    outb 0x61, 1
    outb 0x43, 0xb6
    outb 0x42, 0x10
    outb 0x42, 0x00
    inb 0x61
    outb 0x42, 0x99
    outb 0x43, 0x80
    inb 0x42
    outb 0x42, 0x01
    inb 0x42
    outb 0x43, 0x71
    outb 0x41, 0x50
    outb 0x41, 0x02
    outb 0x43, 0xd4
    inb 0x41
    inb 0x41
    inb 0x61
    outb 0x61, 0
    inb 0x42
"""
)
IOAPIC_EOI = """.macro END_OF_INTERRUPT
    put 0xfec00000, 0x1a
    get 0xfec00010
    put 0xfec00010, 0x18030
    put 0xfee000b0, 0
    .endm
"""
IOAPIC_ADDRESSED = (
    IOAPIC_EOI
    + PIC
    + """
    outb 0x21, 0xff
    put 0xfee000f0, 0x1ff
    put 0xfec00000, 0x1b
    put 0xfec00010, 0
    put 0xfec00000, 0x1a
    put 0xfec00010, 0x8030
    get 0xfec00010
    put 0xfec00000, 0
    put 0xfec00010, 0x05000000
    get 0xfec00010
    sti
    nop
    nop
    put 0xfec00000, 0x1a
    get 0xfec00010
    put 0xfec00010, 0x18030
    get 0xfec00010
    cli
    put 0xfec00000, 0x14
    put 0xfec00010, 0x31
    outb 0x43, 0x30
    outb 0x40, 3
    outb 0x40, 0
    mov ecx, 20
3:  loop 3b
    get 0xfec00010
    sti
    nop
"""
)
LAPIC_WITH_MUCH_TO_DO = (
    LAPIC_EOI
    + """
    put 0xfee000f0, 0x1ff
    put 0xfee00080, 0x40
    put 0xfee00320, 0x20030
    put 0xfee003e0, 3
    put 0xfee00380, 5
    put 0xfee00300, 0x44051
    put 0xfee00300, 0x44031
    put 0xfee00370, 0x1003f
    get 0xfee00390
    get 0xfee00220
    get 0xfee00210
    sti
    nop
    get 0xfee000a0
    put 0xfee00080, 0
    nop
    hlt
    cli
    get 0xfee00390
    put 0xfee00320, 0x10030
    put 0xfee00310, 0x01000000
    get 0xfee00310
    put 0xfee00280, 0
    get 0xfee00280
    put 0xfee00320, 0x40032
    rdtsc
    add eax, 60
    mov ecx, 0x6e0
    wrmsr
    rdmsr32 0x6e0
    sti
    hlt
    cli
"""
)
X2APIC = """.macro END_OF_INTERRUPT
    push ecx
    wrmsr32 0x80b, 0
    pop ecx
    .endm
    mov ecx, 0x1b
    rdmsr
    or eax, 0xc00
    wrmsr
    wrmsr32 0x80f, 0x1ff
    wrmsr32 0x830, 0x4031, 0
    wrmsr32 0x83f, 0x52
    rdmsr32 0x802
    sti
    nop
    nop
    cli
"""
FPU_WITH_AN_EXCEPTION = (
    NO_EOI
    + f"""
    mov eax, cr4
    or eax, 0x40600
    mov cr4, eax
    mov eax, cr0
    or eax, 0x22
    mov cr0, eax
    xor ecx, ecx
    xgetbv
    keep
    mov eax, 3
    xor edx, edx
    xsetbv
    fninit
    fldpi
    fld1
    fldl2e
    fdecstp
    push 0x360
    fldcw [esp]
    fldz
    fld1
    fdivrp
    nop
    nop
    fnstsw ax
    keep
    movd xmm5, eax
    pshufd xmm5, xmm5, 0
    push 0x1fbf
    ldmxcsr [esp]
    addps xmm5, xmm5
    fwait
    fnclex
    fnsave [{ANSWERS + 0x400}]
    frstor [{ANSWERS + 0x400}]
    fstp tbyte ptr [{ANSWERS + 0x500}]
    fninit
    movd mm3, eax
    paddb mm3, mm3
    movd eax, mm3
    keep
    emms
    stmxcsr [{ANSWERS + 0x510}]
    fxsave [{ANSWERS + 0x600}]
"""
)
SYSTEM_REGISTERS = (
    NO_EOI
    + f"""
    push 0x8d5
    popfd
    wrmsr32 0x174, 8
    wrmsr32 0x175, 0x1234, 5
    wrmsr32 0xc0000103, 77
    wrmsr32 0x277, 0x00070106, 0x00070406
    wrmsr32 0xc0000102, 0x5000
    rdmsr32 0x175
    mov eax, 0x12345
    mov cr2, eax
    mov esi, {CODE}
    mov ecx, 5
    push edi
    mov edi, {ANSWERS + 0x400}
    cld
    rep movsb
    pop edi
    sgdt [{ANSWERS + 0x440}]
    mov eax, 16
    mov fs, eax
    mov eax, cr2
    keep
    rdtsc
    keep
    xor ecx, ecx
    mov eax, 1
    cpuid
    keep
    mov eax, ecx
    keep
    rdrand eax
    keep
    rdrand eax
    keep
    pushfd
    pop eax
    keep
"""
)
DEBUG_REGISTERS = (
    NO_EOI
    + f"""
    mov eax, {ANSWERS + 0x400}
    mov dr0, eax
    mov eax, {ANSWERS + 0x404}
    mov dr3, eax
    mov eax, 0xf00f03c3
    mov dr7, eax
    put {ANSWERS + 0x400}, 1
    mov eax, dr6
    keep
    mov ax, ss
    push eax
    mov eax, 0xffff0ff0
    mov dr6, eax
    pop ss
    put {ANSWERS + 0x400}, 2
    mov eax, {ANSWERS + 0x400}
    mov cx, 16
    mov [eax + 8], cx
    mov dword ptr [{ANSWERS + 0x400}], 16
    mov ss, word ptr [{ANSWERS + 0x400}]
    nop
    nop
    mov eax, dr6
    keep
    mov eax, 0x400
    mov dr7, eax
    int3
    pushfd
    or dword ptr [esp], 0x100
    popfd
    nop
    nop
    pushfd
    and dword ptr [esp], 0xfffffeff
    popfd
    nop
"""
)
NMI_WITHIN_NMI = (
    LAPIC_EOI
    + """
    put 0xfee000f0, 0x1ff
    push offset nested
    mov eax, offset nested
    mov word ptr [0x6810], ax
    shr eax, 16
    mov word ptr [0x6816], ax
    put 0xfee00300, 0x44400
    nop
    put 0xfee00300, 0x44031
    sti
    nop
    nop
    jmp 4f
nested:
    push eax
    mov eax, 0x99
    keep
    cmp edi, 0x8008
    ja 5f
    put 0xfee00300, 0x44400
    nop
5:  pop eax
    nop
    iretd
4:  nop
"""
)
MWAIT = (
    LAPIC_EOI
    + f"""
    put 0xfee000f0, 0x1ff
    put 0xfee00320, 0x30
    put 0xfee003e0, 0xb
    put 0xfee00380, 50
    mov eax, {ANSWERS + 0x400}
    xor ecx, ecx
    xor edx, edx
    monitor
    xor eax, eax
    mov ecx, 1
    mwait
    sti
    nop
    cli
    get 0xfee00390
"""
)
PAE = (
    NO_EOI
    + """
    mov eax, 0x20000
    mov dword ptr [0x20000], 0x21001
    mov dword ptr [0x20018], 0x22001
    mov dword ptr [0x21000], 0x83
    mov dword ptr [0x22ff8], 0xffe00083
    mov cr3, eax
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov dword ptr [0x20018], 0
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    mov dword ptr [0x20000], 0
    nop
    nop
    mov eax, cr3
    keep
    and eax, 0x7fffffff
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    nop
"""
)
PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a PIC that is being initialised": (PIC_BEING_INITIALISED, ("core.pic_master", "core.pic_slave")),
    "a PIC with an interrupt in service": (PIC_IN_SERVICE, ("core.pic_master", "core.pit", "vcpu.events")),
    "a PIT whose counters are half read and half written": (PIT_HALF_READ, ("core.pit",)),
    "an I/O APIC that is addressed, and a level in service": (IOAPIC_ADDRESSED, ("core.ioapic", "vcpu.lapic")),
    "a local APIC with its timer, IRR and ISR": (LAPIC_WITH_MUCH_TO_DO, ("vcpu.lapic", "vcpu.msrs", "vcpu.mp_state")),
    "a local APIC in x2APIC mode": (X2APIC, ("vcpu.lapic", "vcpu.system")),
    "an x87 with an exception that waits": (FPU_WITH_AN_EXCEPTION, ("vcpu.xsave", "vcpu.xcr0", "vcpu.extra")),
    "registers, a string instruction, RDRAND": (
        SYSTEM_REGISTERS, ("vcpu.registers", "vcpu.system", "vcpu.msrs", "core.core", "core.clock_ns"),
    ),
    "debug registers and held breakpoints": (DEBUG_REGISTERS, ("vcpu.debug", "vcpu.events", "vcpu.extra")),
    "an NMI within an NMI's handler": (NMI_WITHIN_NMI, ("vcpu.events",)),
    "a monitor that waits": (MWAIT, ("vcpu.lapic",)),
    "PAE paging whose tables changed since": (PAE, ("vcpu.extra", "vcpu.system")),
}  # fmt: skip


def load(guest: Guest, source: str) -> None:
    """Flat protected mode, gates for the first vectors, line 5 high."""
    stubs = "".join(f"v{vector}: push {vector}\njmp common\n" for vector in VECTORS)
    table = ".balign 4\n" + "".join(f".long v{vector}\n" for vector in VECTORS)
    code = assemble(source.partition(".endm\n")[0] + ".endm\n" + BEGIN + source.partition(".endm\n")[2] + END + stubs
                    + table, CODE)  # fmt: skip
    guest.memory[CODE : CODE + len(code)] = code
    set_flat(guest.vcpus[0], CODE)
    struct.pack_into("<3Q", guest.memory, GDT, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
    for vector, address in zip(VECTORS, struct.unpack(f"<{len(VECTORS)}I", code[-4 * len(VECTORS) :]), strict=True):
        struct.pack_into("<HHHH", guest.memory, IDT + 8 * vector, address & 0xFFFF, 8, 0x8E00, address >> 16)
    vcpu = guest.vcpus[0]
    vcpu.set_system_registers(
        replace(vcpu.system_registers(), gdt=(GDT, 23), idt=(IDT, 8 * len(VECTORS) - 1), cr0=0x31)
    )
    vcpu.set_registers(replace(vcpu.registers(), rsp=STACK))
    guest.vm.set_irq(5, True)


CONFIG = VmConfig(virtual_clock=True, seed=12)
STEP = Debugging(step=True)
SOON = 20
"""Instructions after a hop, after which states are compared; after every eighth hop it is at the program's end."""
Saved = tuple[str, bytes]


def saved(guest: Guest) -> Saved:
    """As a file would have it."""
    states = [encode(guest.vm.state()), *(encode(vcpu.state()) for vcpu in guest.vcpus)]
    return json.dumps(states), bytes(guest.memory)


def restored(system: System, what: Saved) -> Guest:
    text, memory = what
    vm, *vcpus = json.loads(text)
    guest = make(system, config=replace(CONFIG, vcpus=len(vcpus)))
    guest.memory[:] = memory
    guest.vm.set_state(parse(VmState, "core", vm))
    for vcpu, state in zip(guest.vcpus, vcpus, strict=True):
        vcpu.set_state(parse(VcpuState, f"vcpu {vcpu.index}", state))
    return guest


@pytest.fixture
def soft() -> Iterator[System]:
    system = open_core("soft")
    yield system
    system.close()


def step(guest: Guest) -> bool:
    """One instruction; False when the program is at its end."""
    guest.vcpus[0].resume(RESUME)
    _, exit_ = guest.next_exit()
    if isinstance(exit_, PortOut) and exit_.port == DONE:
        return False
    assert isinstance(exit_, Debug), exit_
    return True


def fields_of(text: str) -> dict[str, str]:
    vm, vcpu, *_ = json.loads(text)
    return {
        **{f"core.{name}": json.dumps(value) for name, value in vm["fields"].items()},
        **{f"vcpu.{name}": json.dumps(value) for name, value in vcpu["fields"].items()},
    }


@moves(*(field for _, fields in PROGRAMS.values() for field in fields), "core", "vcpu")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_goes_on_from_any_of_its_instructions(soft: System, name: str) -> None:
    source, about = PROGRAMS[name]
    guest = make(soft, config=CONFIG)
    load(guest, source)
    guest.vcpus[0].set_debug(STEP)
    states = [saved(guest)]
    while step(guest):
        states.append(saved(guest))
    wanted = saved(guest)
    guest.close()
    assert len(states) > 20 and wanted[1][ANSWERS : ANSWERS + 0x800] != bytes(0x800), "it told something"
    for field in about:
        assert len({fields_of(text)[field] for text, _ in states}) > 1, f"{field} never changes"
    for at, state in enumerate(states):
        last = len(states) if at % 8 == 0 else min(at + SOON, len(states))
        guest = restored(soft, state)
        try:
            same(saved(guest), state, f"{name}: restored before instruction {at}")
            guest.vcpus[0].set_debug(STEP)
            for _ in range(at, last):
                step(guest)
            same(saved(guest), [*states, wanted][last], f"{name}: before instruction {last} after a hop before {at}")
        finally:
            guest.close()


def same(found: Saved, wanted: Saved, what: str) -> None:
    if found != wanted:
        one, other = fields_of(found[0]), fields_of(wanted[0])
        differ = [f"{key}: {one[key]} instead of {value}" for key, value in other.items() if one[key] != value]
        raise AssertionError(f"{what}: {'; '.join(differ) or 'memory'}")


STARTED = 0x3000
"""Where the second processor begins, in real mode."""
SECOND = """
    .code16
    mov ax, cs
    mov ds, ax
    inc byte ptr [0x80]
    hlt
    inc byte ptr [0x80]
    .code32
"""
FIRST = (
    LAPIC_EOI
    + f"""
    put 0xfee000f0, 0x1ff
    put 0xfee00310, 0x01000000
    put 0xfee00300, 0x4500
    get 0xfee00300
    pause
    nop
    put 0xfee00300, {0x4600 | STARTED >> 12:#x}
    nop
    pause
    get {STARTED + 0x80:#x}
    put 0xfee00300, 0x4500
    pause
    nop
    put 0xfee00300, {0x4600 | STARTED >> 12:#x}
    put 0xfee00300, {0x4600 | STARTED >> 12:#x}
    pause
    get {STARTED + 0x80:#x}
    put 0xfee00300, 0x4500
    put 0xfee00300, {0x4600 | STARTED >> 12:#x}
    nop
    pause
    get {STARTED + 0x80:#x}
    pause
    put 0xfee00300, 0x4400
    nop
    pause
    get {STARTED + 0x80:#x}
"""
)


def watched(guest: Guest) -> bool:
    """One instruction of the first processor, and whatever the second one does meanwhile; then both are parked."""
    guest.vcpus[1].resume(RESUME)
    if not step(guest):
        return False
    guest.vcpus[1].kick()
    assert guest.next_exit() == (1, Interrupted())
    return True


@moves("vcpu.mp_state", "core.core")
def test_a_processor_that_is_being_started(soft: System) -> None:
    """INIT, SIPI and HLT of a second processor, saved between any two instructions of the first."""

    def begin() -> Guest:
        guest = make(soft, config=replace(CONFIG, vcpus=2))
        load(guest, FIRST)
        code = assemble(SECOND, STARTED)
        guest.memory[STARTED : STARTED + len(code)] = code
        return guest

    def finished(guest: Guest) -> Saved:
        guest.vcpus[0].set_debug(STEP)
        while watched(guest):
            pass
        guest.vcpus[1].kick()
        assert guest.next_exit() == (1, Interrupted())
        return saved(guest)

    guest = begin()
    guest.vcpus[0].set_debug(STEP)
    states = [saved(guest)]
    while watched(guest):
        states.append(saved(guest))
    guest.vcpus[1].kick()
    assert guest.next_exit() == (1, Interrupted())
    wanted = saved(guest)
    guest.close()
    seen = {json.loads(text)[2]["fields"]["mp_state"] for text, _ in states}
    assert seen >= {"init-received", "sipi-received", "halted"}, seen
    assert wanted[1][STARTED + 0x80] == 3, "it was started three times"
    for at, state in enumerate(states):
        guest = restored(soft, state)
        try:
            same(saved(guest), state, f"restored before instruction {at}")
            same(finished(guest), wanted, f"the end after a hop before instruction {at}")
        finally:
            guest.close()
