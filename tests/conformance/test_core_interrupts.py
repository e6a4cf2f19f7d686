"""cpu/contract.py: lines, messages, irqfds with and without resampling, NMI. Cores that execute instructions; what the
scripted core records is at the end."""

import os
import select

import pytest

from cpu.contract import Capability, MsiRoute
from cpu.errors import ConfigError
from cpu.exits import PortOut
from cpu.scripted import LineChange, MsiMessage
from tests.support.cores import DEADLINE_S, RESUME
from tests.support.interrupts import (
    EOI_LAPIC,
    EOI_PIC,
    LAPIC,
    LAPIC_ON,
    LVT0_EXTINT,
    MASK_PIC,
    PIC,
    VECTOR,
    fired,
    prepare,
    redirect,
    silent,
)


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


def test_removing_a_resampling_irqfd_lowers_its_line(real_core, guests, eventfds):
    guest = guests(real_core)
    fd = eventfds()
    guest.vm.add_irqfd(fd, 5, eventfds())
    level = 1 << 15
    prepare(guest, MASK_PIC + LAPIC_ON + redirect(5, VECTOR | level), EOI_LAPIC)
    os.eventfd_write(fd, 1)
    index, exit_ = guest.next_exit()
    assert isinstance(exit_, PortOut)
    guest.vm.remove_irqfd(fd, 5)
    guest.vcpus[index].resume(RESUME)  # and it acknowledges
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
        MsiMessage(LAPIC, 0x31),
        MsiMessage(LAPIC, VECTOR),
    ]
