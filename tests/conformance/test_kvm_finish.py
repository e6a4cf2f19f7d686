"""What the host's KVM gives up the software core finishes: on the same registers and memory, through the same devices.

x87 and MMX instructions with operands in MMIO are ones that no KVM's emulator knows; a KVM without VT-x or SVM
interprets supervisor code and lacks others besides (test names that say "supervisor").
"""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from cpu.exits import InternalError, MmioRead, MmioWrite, Shutdown
from tests.conformance.test_core_dirty import pages
from tests.support.assemble import assemble
from tests.support.cores import CODE, DONE, MMIO, SCRATCH, STACK, open_core, set_flat, set_long

pytestmark = pytest.mark.kvm
IDT, GDT = 0x5000, 0x6000
LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
END = f"mov ${DONE:#x}, %edx; out %al, (%dx); 1: jmp 1b"


@pytest.fixture
def kvm():
    system = open_core("kvm")
    yield system
    system.close()


def code(text: str, bits: int = 32, at: int = CODE) -> bytes:
    return assemble(f".att_syntax prefix\n{text}\n{END}\n", at, bits)


def finished(guest) -> int:
    return guest.vm.stats()["finished"]


def gate(guest, vector: int, handler: str, at: int) -> None:
    """A 32-bit interrupt gate to `handler`."""
    body = assemble(f".att_syntax prefix\n{handler}\n", at, 32)
    guest.memory[at : at + len(body)] = body
    struct.pack_into("<3Q", guest.memory, GDT, 0, 0xCF9B000000FFFF, 0xCF93000000FFFF)
    struct.pack_into("<HHBBH", guest.memory, IDT + 8 * vector, at & 0xFFFF, 8, 0, 0x8E, at >> 16)
    vcpu = guest.vcpus[0]
    vcpu.set_system_registers(replace(vcpu.system_registers(), gdt=(GDT, 0x17), idt=(IDT, 0x7FF)))


def word(guest, at: int = SCRATCH) -> int:
    return struct.unpack_from("<I", guest.memory, at)[0]


def test_operands_in_mmio(kvm, guests):
    """The access is the device's, of the instruction's own width; the result is in the FPU that KVM goes on with."""
    guest = guests(kvm)
    text = f"fninit; fildl {MMIO:#x}; fiaddl {MMIO + 4:#x}; fistpl {SCRATCH:#x}; fildl {MMIO:#x}; fistpl {MMIO + 8:#x}"
    guest.load_code(code(text))
    guest.go()
    seen = guest.run(lambda read: {MMIO: 1000, MMIO + 4: 337}[read.address])
    assert [exit for _, exit in seen] == [
        MmioRead(MMIO, 4), MmioRead(MMIO + 4, 4), MmioRead(MMIO, 4), MmioWrite(MMIO + 8, 4, 1000),
    ]  # fmt: skip
    assert word(guest) == 1337
    assert finished(guest) >= 4


def test_one_of_them_can_be_named(kvm, guests):
    """The bytes of the instruction, and no more of them; nothing before the first."""
    guest = guests(kvm)
    assert guest.vm.last_finished() == b""
    guest.load_code(code(f"fninit; fildl {MMIO:#x}", at=CODE))
    guest.go()
    guest.run(lambda _: 7)
    # Where the host's KVM does not interpret supervisor code, FILD from a device is the first that it gives up.
    assert guest.vm.last_finished().hex() in ("db05" + struct.pack("<I", MMIO).hex(), "dbe3")


def test_state_is_whole_behind_it(kvm, guests):
    """General registers, flags, SSE and x87 registers survive that some are the core's doing."""
    guest = guests(kvm)
    guest.load_code(code(f"fninit; fld1; fildl {MMIO:#x}; stc; mov $0x1234, %ebx; fistpl {SCRATCH:#x}; sbb %ecx, %ecx"))
    guest.go()
    guest.run(lambda _: 7)
    registers, state = guest.vcpus[0].registers(), guest.vcpus[0].state()
    assert (registers.rbx, registers.rcx, word(guest)) == (0x1234, 0xFFFF_FFFF, 7)
    one = bytes.fromhex("0000000000000080ff3f")
    assert state.xsave[32:42] == one


def test_supervisor_arithmetic(kvm, guests):
    guest = guests(kvm)
    loop = "fninit; fld1; mov $200, %ecx; 2: fadd %st, %st(0); fmul %st, %st(0); fsqrt; dec %ecx; jnz 2b"
    guest.load_code(code(f"{loop}; fld1; fld1; faddp; fistpl {SCRATCH:#x}"))
    guest.go()
    assert guest.run() == []
    assert word(guest) == 2


def test_supervisor_instructions_that_cpuid_hides(kvm, guests):
    """As on a processor, which has them all the same."""
    guest = guests(kvm)
    guest.load_code(code(f"mov $0x80000f01, %ebx; popcnt %ebx, %eax; mov %eax, {SCRATCH:#x}"))
    guest.go()
    assert guest.run() == []
    assert word(guest) == 6


def test_supervisor_int3_goes_through_the_guests_table(kvm, guests):
    """The handler finds the address behind INT3, and IRET goes back there."""
    guest = guests(kvm)
    guest.load_code(code(f"int3; 3: mov $3b, %eax; mov %eax, {SCRATCH + 4:#x}"))
    gate(guest, 3, f"mov (%esp), %eax; mov %eax, {SCRATCH:#x}; iret", 0x3000)
    guest.go()
    assert guest.run() == []
    assert word(guest) == word(guest, SCRATCH + 4) == CODE + 1


def test_an_exception_is_delivered_with_its_fault(kvm, guests):
    """#NM of an x87 instruction while CR0.TS is set: the handler clears it, and the instruction is run again."""
    guest = guests(kvm)
    guest.load_code(code(f"fninit; mov %cr0, %eax; or $8, %eax; mov %eax, %cr0; fildl {MMIO:#x}; fistpl {SCRATCH:#x}"))
    gate(guest, 7, f"incl {SCRATCH + 4:#x}; clts; iret", 0x3000)
    guest.go()
    guest.run(lambda _: 99)
    assert (word(guest), word(guest, SCRATCH + 4)) == (99, 1)


def test_a_triple_fault_is_one(kvm, guests):
    guest = guests(kvm)
    guest.load_code(code("mov %cr0, %eax; or $8, %eax; mov %eax, %cr0; fld1"))
    guest.go()
    assert isinstance(guest.next_exit()[1], Shutdown)


def test_the_page_is_in_the_dirty_log(kvm, guests):
    guest = guests(kvm, log_dirty=True)
    guest.load_code(code("fninit; fildl 0x40000; fistpl 0x52ffe"))
    guest.vm.dirty_log(0)
    guest.go()
    assert guest.run() == []
    assert {0x52, 0x53} <= pages(guest.vm.dirty_log(0))
    assert pages(guest.vm.dirty_log(0)) == set()


def test_the_lapic_is_kvms(kvm, guests):
    """Registers are read and written; an IPI to itself is delivered by KVM, and its EOI ends it there."""
    guest = guests(kvm)
    send, eoi = 0x8000, 0x8004
    guest.load_code(code(f"""
        movl $0x1ff, {LAPIC + 0xF0:#x}
        fninit
        fildl {LAPIC + 0x30:#x}; fistpl {SCRATCH:#x}
        fildl {SCRATCH + 0x40:#x}; fistpl {LAPIC + 0x80:#x}
        mov {LAPIC + 0x80:#x}, %eax; mov %eax, {SCRATCH + 4:#x}
        movl $0, {LAPIC + 0x80:#x}
        sti
        fildl {send:#x}; fistpl {LAPIC + 0x300:#x}
        2: cmpl $2, {SCRATCH + 8:#x}
        jae 3f
        pause
        jmp 2b
        3: mov {LAPIC + 0x30:#x}, %eax; mov %eax, {SCRATCH + 12:#x}"""))
    struct.pack_into("<II", guest.memory, send, 0x40000 | 0x51, 0)
    struct.pack_into("<I", guest.memory, SCRATCH + 0x40, 0x20)
    # The second interrupt only comes if the first has ended.
    gate(guest, 0x51, f"""
        fildl {eoi:#x}; fistpl {LAPIC + 0xB0:#x}
        incl {SCRATCH + 8:#x}
        cmpl $2, {SCRATCH + 8:#x}
        jae 1f
        movl $0x40051, {LAPIC + 0x300:#x}
        1: iret""", 0x3000)
    guest.go()
    assert guest.run() == []
    assert word(guest) == word(guest, SCRATCH + 12) != 0
    assert (word(guest, SCRATCH + 4), word(guest, SCRATCH + 8)) == (0x20, 2)


def test_what_the_kernel_alone_can_do_stays_an_error(kvm, guests):
    """The IOAPIC is KVM's, and no call makes an access to it."""
    guest = guests(kvm)
    guest.load_code(code(f"fninit; fildl {IOAPIC:#x}"))
    guest.go()
    _, exit = guest.next_exit()
    assert isinstance(exit, InternalError)
    assert exit.instruction.startswith(bytes.fromhex("db05"))


def test_what_no_core_knows_stays_an_error_or_the_guests(kvm, guests):
    """VEX: #UD is not made up for an instruction that the host's processor may well have."""
    guest = guests(kvm)
    set_long(guest, bytes.fromhex("c5f877") + code("", 64))  # vzeroupper
    guest.go()
    assert isinstance(guest.next_exit()[1], InternalError | Shutdown)


def test_it_can_be_had_without(kvm, guests):
    guest = guests(kvm, finish=False)
    guest.load_code(code(f"fninit; fildl {MMIO:#x}"))
    guest.go()
    _, exit = guest.next_exit()
    assert isinstance(exit, InternalError)
    assert finished(guest) == 0


def test_supervisor_locked_accesses_are_atomic_among_vcpus(kvm, guests):
    """Two vCPUs count in one place, with LOCK CMPXCHG16B and with locked additions that KVM itself does."""
    rounds = 300
    guest = guests(kvm, vcpus=2)
    text = f"""
        mov ${rounds}, %esi
        2: mov {SCRATCH:#x}, %rax
        mov {SCRATCH + 8:#x}, %rdx
        4: lea 1(%rax), %rbx
        lea 3(%rdx), %rcx
        lock cmpxchg16b {SCRATCH:#x}
        jnz 4b
        lock addq $5, {SCRATCH:#x}
        dec %esi
        jnz 2b"""
    for index in range(2):
        body = code(text, 64)
        set_long(guest, body)
        if index:
            continue
        system, registers = guest.vcpus[0].system_registers(), guest.vcpus[0].registers()
        set_flat(guest.vcpus[1], CODE)
        guest.vcpus[1].set_system_registers(
            replace(guest.vcpus[1].system_registers(), **{name: getattr(system, name) for name in (
                "cs", "ds", "es", "fs", "gs", "ss", "cr0", "cr3", "cr4", "efer")})
        )
        guest.vcpus[1].set_registers(replace(registers, rsp=STACK - 0x800))
    guest.go()
    assert guest.run() == []
    low, high = struct.unpack_from("<QQ", guest.memory, SCRATCH)
    assert (low, high) == (2 * rounds * 6, 2 * rounds * 3)
