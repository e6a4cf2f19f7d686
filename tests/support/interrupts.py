"""A protected-mode guest that idles and tells of one interrupt: pieces of its machine code, and running it."""

from __future__ import annotations

import select
import struct
from dataclasses import replace

from cpu.exits import PortOut
from tests.support.cores import CODE, RESUME, STACK, Guest

IDT = 0x5000
GDT = 0x4F00
HANDLER = 0x3000
LAPIC = 0xFEE0_0000
IOAPIC = 0xFEC0_0000
READY, FIRED = 0x20A, 0x20B
VECTOR = 0x40


def out(port: int, size: int = 1) -> bytes:
    return b"\xba" + struct.pack("<I", port) + {1: b"\xee", 4: b"\xef"}[size]


def mov(address: int, value: int) -> bytes:
    """mov dword [address], value"""
    return b"\xc7\x05" + struct.pack("<II", address, value)


def port(number: int, value: int) -> bytes:
    return b"\xb0" + bytes([value]) + b"\xba" + struct.pack("<I", number) + b"\xee"


EOI_LAPIC = mov(LAPIC + 0xB0, 0)
EOI_PIC = port(0x20, 0x20)
# ICW1 to ICW4, master at vector 0x40; only IRQ 4 (vector 0x44) unmasked.
PIC = b"".join(
    port(*pair)
    for pair in [
        (0x20, 0x11), (0x21, VECTOR), (0x21, 4), (0x21, 1),
        (0xA0, 0x11), (0xA1, 0x70), (0xA1, 2), (0xA1, 1),
        (0x21, 0xEF), (0xA1, 0xFF),
    ]
)  # fmt: skip
MASK_PIC = port(0x21, 0xFF) + port(0xA1, 0xFF)
LVT0_EXTINT = mov(LAPIC + 0x350, 0x700)
LAPIC_ON = mov(LAPIC + 0xF0, 0x1FF)


def redirect(pin: int, low: int) -> bytes:
    """Program an IOAPIC entry: destination APIC 0, physical."""
    return (
        mov(IOAPIC, 0x10 + 2 * pin + 1) + mov(IOAPIC + 0x10, 0) + mov(IOAPIC, 0x10 + 2 * pin) + mov(IOAPIC + 0x10, low)
    )


def prepare(guest: Guest, setup: bytes, eoi: bytes, *, vector: int = VECTOR, told: int = FIRED) -> None:
    """Protected-mode guest: `setup`, then READY, then idles with interrupts on; the handler writes to
    port `told` and `eoi`s."""
    vcpu = guest.vcpus[0]
    flat_code, flat_data = 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
    struct.pack_into("<3Q", guest.memory, GDT, 0, flat_code, flat_data)
    gate = HANDLER & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (HANDLER >> 16) << 48
    struct.pack_into("<Q", guest.memory, IDT + 8 * vector, gate)
    start = setup + out(READY)
    idle = CODE + len(start)
    guest.load_code(start + b"\xfb\xf4\xeb\xfd")  # sti; 1: hlt; jmp 1b
    # The handler drops its frame and goes on idling: some KVMs cannot interpret IRET in protected mode.
    handler = out(told) + eoi + b"\x83\xc4\x0c"  # add esp, 12
    handler += b"\xe9" + struct.pack("<i", idle - (HANDLER + len(handler) + 5))
    guest.memory[HANDLER : HANDLER + len(handler)] = handler
    vcpu.set_system_registers(replace(vcpu.system_registers(), gdt=(GDT, 23), idt=(IDT, 0x7FF)))
    vcpu.set_registers(replace(vcpu.registers(), rsp=STACK))
    guest.go()
    assert guest.next_exit() == (0, PortOut(READY, 1, guest.vcpus[0].registers().rax & 0xFF))
    vcpu.resume(RESUME)


def fired(guest: Guest) -> None:
    index, exit_ = guest.next_exit()
    assert isinstance(exit_, PortOut)
    assert (index, exit_.port) == (0, FIRED)
    guest.vcpus[0].resume(RESUME)


def silent(guest: Guest) -> bool:
    return not select.select([guest.vm.fileno()], [], [], 0.05)[0] or guest.vm.take() == []
