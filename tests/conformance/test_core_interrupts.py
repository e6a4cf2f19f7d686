"""cpu/contract.py: lines, messages, irqfds with and without resampling, NMI. Cores that execute instructions; what the
scripted core records is at the end."""

import os
import select
import struct
from dataclasses import replace

import pytest

from cpu.contract import Capability, MsiRoute
from cpu.errors import ConfigError
from cpu.exits import PortOut
from cpu.scripted import LineChange, Message
from tests.support.cores import CODE, DEADLINE_S, RESUME, STACK

IDT = 0x5000
GDT = 0x4F00
HANDLER = 0x3000
LAPIC = 0xFEE0_0000
IOAPIC = 0xFEC0_0000
READY, FIRED = 0x20A, 0x20B
VECTOR = 0x40


def out(port, size=1):
    return b"\xba" + struct.pack("<I", port) + {1: b"\xee", 4: b"\xef"}[size]


def mov(address, value):
    """mov dword [address], value"""
    return b"\xc7\x05" + struct.pack("<II", address, value)


def port(number, value):
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


def redirect(pin, low):
    """Program an IOAPIC entry: destination APIC 0, physical."""
    return (
        mov(IOAPIC, 0x10 + 2 * pin + 1) + mov(IOAPIC + 0x10, 0) + mov(IOAPIC, 0x10 + 2 * pin) + mov(IOAPIC + 0x10, low)
    )


def prepare(guest, setup, eoi, *, vector=VECTOR):
    """Protected-mode guest: `setup`, then READY, then idles with interrupts on; the handler writes FIRED and `eoi`s."""
    vcpu = guest.vcpus[0]
    flat_code, flat_data = 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
    struct.pack_into("<3Q", guest.memory, GDT, 0, flat_code, flat_data)
    gate = HANDLER & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (HANDLER >> 16) << 48
    struct.pack_into("<Q", guest.memory, IDT + 8 * vector, gate)
    start = setup + out(READY)
    idle = CODE + len(start)
    guest.load_code(start + b"\xfb\xf4\xeb\xfd")  # sti; 1: hlt; jmp 1b
    # The handler drops its frame and goes on idling: some KVMs cannot interpret IRET in protected mode.
    handler = out(FIRED) + eoi + b"\x83\xc4\x0c"  # add esp, 12
    handler += b"\xe9" + struct.pack("<i", idle - (HANDLER + len(handler) + 5))
    guest.memory[HANDLER : HANDLER + len(handler)] = handler
    vcpu.set_system_registers(replace(vcpu.system_registers(), gdt=(GDT, 23), idt=(IDT, 0x7FF)))
    vcpu.set_registers(replace(vcpu.registers(), rsp=STACK))
    guest.go()
    assert guest.next_exit() == (0, PortOut(READY, 1, guest.vcpus[0].registers().rax & 0xFF))
    vcpu.resume(RESUME)


def fired(guest):
    index, exit_ = guest.next_exit()
    assert isinstance(exit_, PortOut)
    assert (index, exit_.port) == (0, FIRED)
    guest.vcpus[0].resume(RESUME)


def silent(guest):
    return not select.select([guest.vm.fileno()], [], [], 0.05)[0] or guest.vm.take() == []


def test_a_line_reaches_the_pic(real_core, guests):
    guest = guests(real_core)
    prepare(guest, LAPIC_ON + LVT0_EXTINT + PIC, EOI_PIC, vector=VECTOR + 4)
    for _ in range(3):
        guest.vm.set_irq(4, True)
        fired(guest)
        guest.vm.set_irq(4, False)
    assert silent(guest)


def test_a_line_reaches_the_ioapic(real_core, guests):
    guest = guests(real_core)
    prepare(guest, MASK_PIC + LAPIC_ON + redirect(5, VECTOR), EOI_LAPIC)
    for _ in range(3):
        guest.vm.set_irq(5, True)
        fired(guest)
        guest.vm.set_irq(5, False)
    assert silent(guest)


def test_gsi_0_is_pin_2_of_the_ioapic(real_core, guests):
    guest = guests(real_core)
    prepare(guest, MASK_PIC + LAPIC_ON + redirect(2, VECTOR), EOI_LAPIC)
    guest.vm.set_irq(0, True)
    fired(guest)
    guest.vm.set_irq(0, False)


def test_a_level_line_fires_as_long_as_it_is_up(real_core, guests):
    guest = guests(real_core)
    level = 1 << 15
    prepare(guest, MASK_PIC + LAPIC_ON + redirect(5, VECTOR | level), EOI_LAPIC)
    guest.vm.set_irq(5, True)
    fired(guest)
    fired(guest)
    guest.vm.set_irq(5, False)


def test_an_msi_fires(real_core, guests):
    guest = guests(real_core)
    prepare(guest, MASK_PIC + LAPIC_ON, EOI_LAPIC)
    for _ in range(3):
        guest.vm.signal_msi(LAPIC, VECTOR)
        fired(guest)
    assert silent(guest)


@pytest.fixture
def eventfds():
    made = []

    def factory():
        made.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return made[-1]

    yield factory
    for fd in made:
        os.close(fd)


def test_an_irqfd_sends_the_routed_msi(real_core, guests, eventfds):
    guest = guests(real_core)
    fd = eventfds()
    guest.vm.set_msi_routes([MsiRoute(30, LAPIC, 0x55), MsiRoute(24, LAPIC, VECTOR)])
    guest.vm.add_irqfd(fd, 24)
    prepare(guest, MASK_PIC + LAPIC_ON, EOI_LAPIC)
    for _ in range(3):
        os.eventfd_write(fd, 1)
        fired(guest)
    guest.vm.remove_irqfd(fd, 24)
    os.eventfd_write(fd, 1)
    assert silent(guest)
    with pytest.raises(ConfigError):
        guest.vm.remove_irqfd(-1, 24)


def test_routes_are_replaced_and_lines_stay(real_core, guests, eventfds):
    guest = guests(real_core)
    fd = eventfds()
    guest.vm.add_irqfd(fd, 24)
    prepare(guest, MASK_PIC + LAPIC_ON + redirect(5, VECTOR), EOI_LAPIC)
    os.eventfd_write(fd, 1)  # no route yet: goes nowhere
    assert silent(guest)
    guest.vm.set_msi_routes([MsiRoute(24, LAPIC, VECTOR)])
    os.eventfd_write(fd, 1)
    fired(guest)
    guest.vm.set_msi_routes([])
    os.eventfd_write(fd, 1)
    assert silent(guest)
    guest.vm.set_irq(5, True)
    fired(guest)
    guest.vm.set_irq(5, False)


def test_an_irqfd_of_a_line_pulses_it(real_core, guests, eventfds):
    guest = guests(real_core)
    fd = eventfds()
    guest.vm.add_irqfd(fd, 5)
    prepare(guest, MASK_PIC + LAPIC_ON + redirect(5, VECTOR), EOI_LAPIC)
    os.eventfd_write(fd, 1)
    fired(guest)
    assert silent(guest)


def test_a_resampling_irqfd_is_lowered_by_the_guests_eoi(real_core, guests, eventfds):
    guest = guests(real_core)
    fd, resample = eventfds(), eventfds()
    guest.vm.add_irqfd(fd, 5, resample)
    level = 1 << 15
    prepare(guest, MASK_PIC + LAPIC_ON + redirect(5, VECTOR | level), EOI_LAPIC)
    for _ in range(3):
        os.eventfd_write(fd, 1)
        fired(guest)
        assert select.select([resample], [], [], DEADLINE_S)[0]
        assert os.eventfd_read(resample) == 1
    assert silent(guest)


def test_an_nmi_fires_with_interrupts_off(real_core, guests):
    if Capability.NMI not in real_core.capabilities():
        pytest.skip(f"{real_core.name} injects no NMI")
    guest = guests(real_core)
    prepare(guest, MASK_PIC + LAPIC_ON, b"", vector=2)
    guest.vcpus[0].nmi()
    fired(guest)


@pytest.mark.parametrize("gsi", [24, 1000, 1 << 32])
def test_there_are_24_lines(core, guests, gsi):
    with pytest.raises(ConfigError):
        guests(core).vm.set_irq(gsi, True)


@pytest.mark.parametrize("gsi", [0, 23, 4096])
def test_msi_routes_have_gsis_from_24(core, guests, gsi):
    with pytest.raises(ConfigError):
        guests(core).vm.set_msi_routes([MsiRoute(gsi, LAPIC, VECTOR)])


def test_the_scripted_core_records_what_was_signalled(guests, eventfds):
    from cpu.scripted import ScriptedSystem

    guest = guests(ScriptedSystem())
    fd = eventfds()
    guest.vm.set_irq(4, True)
    guest.vm.set_irq(4, False)
    guest.vm.signal_msi(LAPIC, 0x31)
    guest.vm.set_msi_routes([MsiRoute(24, LAPIC, VECTOR)])
    guest.vm.add_irqfd(fd, 24)
    os.eventfd_write(fd, 3)
    assert guest.vm.take() == []
    assert guest.vm.interrupts == [
        LineChange(4, True),
        LineChange(4, False),
        Message(LAPIC, 0x31),
        Message(LAPIC, VECTOR),
    ]
