"""The PCI bus in the middle of something: saved between any two accesses, another goes on the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conformance.test_pci import VENDOR_CAPABILITY, Events, Fake
from tests.support.hops import Driven, check, moves
from vmm.errors import StateError
from vmm.machine import layout
from vmm.pci.bus import PciBus
from vmm.pci.hotplug import ASKED, EJECT, INSERTED, OST_EVENT, OST_STATUS, PRESENT, PciHotplug
from vmm.pci.msi import Msi

BAR4 = 0xC900_0000
"""Where the driver puts the BAR with the MSI-X structures."""


def bus(driven: Driven) -> PciBus:
    made = PciBus(driven.pc)
    made.add(Fake())
    made.add(Fake(msix=False))
    made.attach()
    hotplug = PciHotplug(made, Events())
    hotplug.on_eject = driven.host.append
    hotplug.on_refused = lambda device, reason: driven.host.append((device, reason))
    hotplug.attach(driven.pc)
    made.hotplug = hotplug
    return made


def address(driven: Driven, device: int, offset: int) -> None:
    driven.out(0xCF8, 1 << 31 | device << 11 | offset & 0xFC, 4)


def get(driven: Driven, device: int, offset: int, size: int = 4) -> int:
    address(driven, device, offset)
    return driven.inp(0xCFC + (offset & 3), size)


def put(driven: Driven, device: int, offset: int, value: int, size: int = 4) -> None:
    address(driven, device, offset)
    driven.out(0xCFC + (offset & 3), value, size)


def a_bar_that_is_being_sized(driven: Driven) -> None:
    for offset, wanted in ((0x10, 0xFFFF_FFE1), (0x14, 0xFFFF_F000), (0x20, 0xFFFF_C00C), (0x24, 0xFFFF_FFFF)):
        old = get(driven, 1, offset)
        put(driven, 1, offset, 0xFFFF_FFFF)
        assert get(driven, 1, offset) == wanted
        put(driven, 1, offset, old)
    put(driven, 1, 4, 2, 2)
    put(driven, 1, 0x14, 0xC800_0000)
    driven.write(0xC800_0008, 0x1234)
    assert driven.read(0xC800_0008) == 0x1234


def a_vector_that_is_half_written_and_one_that_waits(driven: Driven) -> None:
    put(driven, 1, 4, 6, 2)
    put(driven, 1, 0x20, BAR4)
    put(driven, 1, 0x24, 0)
    at = get(driven, 1, 0x34, 1)
    while get(driven, 1, at, 1) != 0x11:
        at = get(driven, 1, at + 1, 1)
    put(driven, 1, at + 2, 0x8000, 2)
    table = BAR4 + (get(driven, 1, at + 4) & ~7)
    pending = BAR4 + (get(driven, 1, at + 8) & ~7)
    for index, value in enumerate((0xFEE0_0000, 0, 0x77, 1)):
        driven.write(table + 16 + 4 * index, value)
    driven.do(lambda component: component.slots[1].function.host.signal_msix(1))
    assert driven.read(pending) == 2
    driven.write(table + 16 + 12, 0)
    assert driven.pc.messages == [(0xFEE0_0000, 0x77)]
    put(driven, 1, at + 2, 0xC000, 2)
    driven.do(lambda component: component.slots[1].function.host.signal_msix(1))
    put(driven, 1, at + 2, 0x8000, 2)
    assert len(driven.pc.messages) == 2


def a_line_that_is_raised(driven: Driven) -> None:
    driven.do(lambda component: component.slots[2].function.host.set_intx(True))
    get(driven, 2, 6, 2)
    put(driven, 2, 4, 0x400, 2)
    put(driven, 2, 4, 0, 2)
    driven.do(lambda component: component.slots[2].function.host.set_intx(False))
    get(driven, 2, 6, 2)


def a_function_that_is_asked_for(driven: Driven) -> None:
    base = layout.PCI_HOTPLUG
    driven.do(lambda component: component.hotplug.ask(2))
    driven.do(lambda component: component.hotplug.inserted(1))
    assert driven.inp(base + ASKED, 4) == 4
    driven.out(base + ASKED, 4, 4)
    driven.inp(base + INSERTED, 4)
    driven.out(base + INSERTED, 2, 4)
    driven.out(base + OST_EVENT, 2 << 16 | 3, 4)
    driven.out(base + OST_STATUS, 0x84, 4)
    driven.out(base + OST_EVENT, 2 << 16 | 3, 4)
    driven.out(base + OST_STATUS, 0x81, 4)
    driven.out(base + EJECT, 4, 4)
    driven.inp(base + PRESENT, 4)
    assert driven.host == [(2, "the device is in use"), 2]


@moves("pci", "pci-function")
@pytest.mark.parametrize("drive", [
    a_bar_that_is_being_sized, a_vector_that_is_half_written_and_one_that_waits, a_line_that_is_raised,
    a_function_that_is_asked_for,
])  # fmt: skip
def test_pci(drive: Callable[[Driven], None]) -> None:
    check(bus, drive)


def with_msi(driven: Driven) -> PciBus:
    made = PciBus(driven.pc)
    made.add(Fake(msix=False, capabilities=(VENDOR_CAPABILITY, Msi.body(4))))
    made.attach()
    return made


@moves("pci-function")
def test_messages_that_are_masked() -> None:
    """6.8.1: MSI."""

    def drive(driven: Driven) -> None:
        at = get(driven, 1, 0x34, 1)
        while get(driven, 1, at, 1) != 5:
            at = get(driven, 1, at + 1, 1)
        put(driven, 1, 4, 4, 2)
        for offset, value, size in ((4, 0xFEE0_3000, 4), (0xC, 0x60, 2), (2, 0x21, 2), (0x10, 0xF, 4)):
            put(driven, 1, at + offset, value, size)
        driven.do(lambda component: component.slots[1].function.host.signal_msi(1))
        assert get(driven, 1, at + 0x14) == 2
        put(driven, 1, at + 0x10, 0)
        assert driven.pc.messages == [(0xFEE0_3000, 0x61)]

    check(with_msi, drive)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=20),
    device=st.sampled_from(["1", "2"]),
    accesses=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 0xFFFF_FFFF)), max_size=6),
)
def test_any_configuration_space_is_taken_or_refused(
    config: list[tuple[int, int]], device: str, accesses: list[tuple[int, int]]
) -> None:
    """A saved configuration space is hostile."""
    import dataclasses

    driven = Driven(bus, ())
    state = driven.component.save()
    slot = state.slots[device]
    changed = bytearray(slot.config)
    for at, value in config:
        changed[at] = value
    slots = {**state.slots, device: dataclasses.replace(slot, config=bytes(changed))}
    try:
        driven.component.restore(dataclasses.replace(state, slots=slots))
    except StateError:
        return
    for offset, value in accesses:
        put(driven, int(device), 4 * offset, value)
        get(driven, int(device), 4 * offset)
    driven.hop()
