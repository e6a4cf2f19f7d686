"""PCI Local Bus 3.0 and the ECAM, as a driver sees them, against a fake function. Tests are named by section."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pc import Pc
from virtio.pci_function import BarSpec, MsixSpec, PciHost
from vmm.errors import ConfigError, StateError
from vmm.machine import layout
from vmm.pci.bus import PciBus, PciBusState
from vmm.pci.hotplug import ASKED, EJECT, INSERTED, OST_EVENT, OST_STATUS, PRESENT, PciHotplug
from vmm.pci.msi import Msi

VENDOR_CAPABILITY = bytes([0x09, 0, 8, 1, 2, 3, 4, 5])


@dataclass(frozen=True, slots=True)
class FakeState:
    kind: ClassVar = "fake"
    version: ClassVar = 1
    memory: Annotated[bytes, range(16385)]


class Fake:
    state_type = FakeState
    """A function with an I/O BAR, a 32-bit and a 64-bit memory BAR (the last with MSI-X), and scratch memory."""

    vendor_id, device_id, revision, class_code = 0x1AF4, 0x1042, 1, 0x01_80_00
    subsystem_vendor_id, subsystem_id = 0x1AF4, 0x40

    def __init__(self, *, msix: bool = True, capabilities: Sequence[bytes] = (VENDOR_CAPABILITY,)) -> None:
        self.bars: Sequence[BarSpec] = (
            BarSpec(0, 32, "io"), BarSpec(1, 4096), BarSpec(4, 16384, "mem64", prefetchable=True)
        )
        self.capabilities = capabilities
        self.msix = MsixSpec(4, 4, 0, 4, 0x800) if msix else None
        self.memory = bytearray(16384)
        self.moves: list[tuple[int | None, ...]] = []
        self.placed: dict[int, int] = {}
        self.resets = 0
        self.window: list[tuple[int, int, int]] = []

    def attach(self, host: PciHost) -> None:
        self.host: Any = host

    def bar_read(self, index: int, offset: int, size: int) -> int:
        return int.from_bytes(self.memory[offset : offset + size], "little")

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        self.memory[offset : offset + size] = value.to_bytes(size, "little")

    def messages_changed(self) -> None:
        self.messages = [self.host.msix_message(vector) for vector in range(self.msix.vectors)] if self.msix else []

    def bars_changed(self) -> None:
        self.moves.append(tuple(self.host.bar_address(bar.index) for bar in self.bars))

    def config_read(self, offset: int, size: int) -> int | None:
        return 0x5A if offset == self.placed[0] + 7 and size == 1 else None

    def config_write(self, offset: int, size: int, value: int) -> bool:
        self.window.append((offset, size, value))
        return offset == self.placed[0] + 7

    def capability_placed(self, capability: int, offset: int) -> None:
        self.placed[capability] = offset

    def reset(self) -> None:
        self.resets += 1

    def save(self) -> FakeState:
        return FakeState(bytes(self.memory))

    def restore(self, state: FakeState) -> None:
        self.memory[:] = state.memory


class Guest:
    """A driver's view: configuration access by either mechanism."""

    def __init__(self, pc: Pc, ecam: bool) -> None:
        self.pc, self.ecam = pc, ecam

    def get(self, device: int, offset: int, size: int, function: int = 0, bus: int = 0) -> int:
        if self.ecam:
            return self.pc.read(layout.ECAM.start | bus << 20 | device << 15 | function << 12 | offset, size)
        self.pc.out(0xCF8, 1 << 31 | bus << 16 | device << 11 | function << 8 | offset & 0xFC, 4)
        return self.pc.inp(0xCFC + (offset & 3), size)

    def put(self, device: int, offset: int, size: int, value: int) -> None:
        if self.ecam:
            self.pc.write(layout.ECAM.start | device << 15 | offset, value, size)
            return
        self.pc.out(0xCF8, 1 << 31 | device << 11 | offset & 0xFC, 4)
        self.pc.out(0xCFC + (offset & 3), value, size)

    def capabilities(self, device: int) -> Iterator[tuple[int, int]]:
        at, seen = self.get(device, 0x34, 1), 0
        while at and seen < 48:
            yield self.get(device, at, 1), at
            at, seen = self.get(device, at + 1, 1), seen + 1


@pytest.fixture(params=["ports", "ecam"])
def ecam(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "ecam")


def build(ecam: bool = False, *functions: Fake) -> tuple[Pc, PciBus, Guest]:
    pc = Pc()
    bus = PciBus(pc)
    for function in functions:
        bus.add(function)
    bus.attach()
    return pc, bus, Guest(pc, ecam)


def test_3_2_2_3_absent_functions_read_as_all_ones(ecam: bool) -> None:
    _, _, guest = build(ecam, Fake())
    assert guest.get(0, 0, 4) == 0x0008_1B36
    assert guest.get(2, 0, 4) == 0xFFFF_FFFF
    assert guest.get(1, 0, 4, function=1) == 0xFFFF_FFFF
    assert guest.get(1, 0, 4, bus=1) == 0xFFFF_FFFF


def test_3_2_2_3_2_only_a_dword_reaches_config_address() -> None:
    pc, _, _ = build(False, Fake())
    pc.out(0xCF8, 1 << 31 | 1 << 11, 4)
    pc.out(0xCF8, 0x12, 1)
    pc.out(0xCFA, 0xFFFF, 2)
    assert pc.inp(0xCF8, 4) == 1 << 31 | 1 << 11
    pc.out(0xCF8, 1 << 11, 4)
    assert pc.inp(0xCFC, 4) == 0xFFFF_FFFF, "without the enable bit it is an ordinary port access"


@pytest.mark.clause("4.1.1-a")
def test_6_1_header_identifies_the_function_in_all_access_sizes(ecam: bool) -> None:
    _, _, guest = build(ecam, Fake())
    assert [guest.get(1, offset, 2) for offset in (0, 2)] == [0x1AF4, 0x1042]
    assert guest.get(1, 8, 4) == 0x0180_0001
    assert guest.get(1, 0x0B, 1) == 0x01
    assert guest.get(1, 0x2C, 4) == 0x0040_1AF4
    assert guest.get(1, 0x0E, 1) == 0, "type 0, single function"
    assert guest.get(1, 0x3D, 1) == 1
    guest.put(1, 0, 4, 0)
    assert guest.get(1, 0, 4) == 0x1042_1AF4


def test_6_2_2_command_has_only_its_implemented_bits(ecam: bool) -> None:
    _, _, guest = build(ecam, Fake())
    guest.put(1, 4, 2, 0xFFFF)
    assert guest.get(1, 4, 2) == 0x0547


@pytest.mark.clause("4.1.1-a")
def test_6_2_5_1_sizing(ecam: bool) -> None:
    _, _, guest = build(ecam, Fake())
    for offset in (0x10, 0x14, 0x20, 0x24):
        guest.put(1, offset, 4, 0xFFFF_FFFF)
    assert guest.get(1, 0x10, 4) == 0xFFFF_FFE1
    assert guest.get(1, 0x14, 4) == 0xFFFF_F000
    assert guest.get(1, 0x20, 4) == 0xFFFF_C00C
    assert guest.get(1, 0x24, 4) == 0xFFFF_FFFF
    guest.put(1, 0x18, 4, 0xFFFF_FFFF)
    assert guest.get(1, 0x18, 4) == 0


def test_6_2_5_1_bars_decode_where_they_are_put_and_only_when_enabled(ecam: bool) -> None:
    function = Fake()
    pc, _, guest = build(ecam, function)
    first = guest.get(1, 0x14, 4)
    assert layout.MMIO32.start <= first < layout.MMIO32.end
    assert pc.read(first) == 0xFFFF_FFFF
    guest.put(1, 4, 2, 2)
    pc.write(first + 8, 0x1234_5678)
    assert pc.read(first + 8) == 0x1234_5678
    guest.put(1, 0x14, 4, 0xC800_0000)
    assert pc.read(0xC800_0008) == 0x1234_5678 and pc.read(first + 8) == 0xFFFF_FFFF
    guest.put(1, 0x20, 4, 0)
    guest.put(1, 0x24, 4, 0x20)
    assert function.host.bar_address(4) == 0x20_0000_0000
    assert pc.read(0x20_0000_1008) == 0
    guest.put(1, 4, 2, 1)
    assert pc.read(0xC800_0008) == 0xFFFF_FFFF
    io = guest.get(1, 0x10, 4) & ~3
    assert pc.inp(io + 8, 4) == 0x1234_5678
    assert function.moves[-1] == (io, None, None)


def test_two_bars_in_one_place_first_come_first_served_then_the_other() -> None:
    one, two = Fake(), Fake()
    pc, _, guest = build(False, one, two)
    for device in (1, 2):
        guest.put(device, 0x14, 4, 0xC800_0000)
        guest.put(device, 4, 2, 2)
    assert (one.host.bar_address(1), two.host.bar_address(1)) == (0xC800_0000, None)
    guest.put(1, 0x14, 4, 0xC900_0000)
    assert (one.host.bar_address(1), two.host.bar_address(1)) == (0xC900_0000, 0xC800_0000)


@pytest.mark.clause("4.1.1-a")
def test_6_7_capability_chain(ecam: bool) -> None:
    function = Fake()
    _, _, guest = build(ecam, function)
    assert guest.get(1, 6, 2) & 0x10
    chain = list(guest.capabilities(1))
    assert [kind for kind, _ in chain] == [0x11, 0x09]
    assert all(at % 4 == 0 and at >= 0x40 for _, at in chain)
    at = function.placed[0]
    assert chain[1][1] == at
    assert [guest.get(1, at + index, 1) for index in range(2, 7)] == [8, 1, 2, 3, 4]
    assert guest.get(1, at + 7, 1) == 0x5A, "a register with behaviour"
    guest.put(1, at + 2, 1, 0xFF)
    assert guest.get(1, at + 2, 1) == 8, "everything else is read-only"
    assert list(guest.capabilities(0)) == []


@pytest.mark.clause("4.1.1-a", "4.1.4.5.1-d")
def test_6_2_3_intx_level_disable_and_status(ecam: bool) -> None:
    function = Fake(msix=False)
    pc, _, guest = build(ecam, function)
    gsi = layout.intx_gsi(1, 0)
    assert guest.get(1, 0x3C, 1) == gsi
    function.host.set_intx(True)
    assert pc.levels[gsi] and guest.get(1, 6, 2) & 8
    guest.put(1, 4, 2, 0x400)
    assert not pc.levels[gsi] and guest.get(1, 6, 2) & 8
    guest.put(1, 4, 2, 0)
    assert pc.levels[gsi]
    function.host.set_intx(False)
    assert not pc.levels[gsi] and not guest.get(1, 6, 2) & 8


def test_intx_of_two_functions_on_one_gsi_is_ored() -> None:
    functions = [Fake() for _ in range(3)]
    pc, _, _ = build(False, *functions)
    gsi = layout.intx_gsi(1, 0)
    assert gsi == layout.intx_gsi(3, 0)
    functions[0].host.set_intx(True)
    functions[2].host.set_intx(True)
    functions[0].host.set_intx(False)
    assert pc.levels[gsi]
    functions[2].host.set_intx(False)
    assert not pc.levels[gsi]


class MsixGuest:
    def __init__(self, pc: Pc, guest: Guest, device: int = 1) -> None:
        self.pc, self.guest, self.device = pc, guest, device
        self.at = next(at for kind, at in guest.capabilities(device) if kind == 0x11)
        table = guest.get(device, self.at + 4, 4)
        assert table & 7 == 4
        bar = guest.get(device, 0x20, 4) & ~15 | guest.get(device, 0x24, 4) << 32
        self.table = bar + (table & ~7)
        self.pba = bar + (guest.get(device, self.at + 8, 4) & ~7)
        guest.put(device, 4, 2, 6)

    def vector(self, number: int, address: int, data: int, masked: bool = False) -> None:
        for index, value in enumerate((address & 0xFFFF_FFFF, address >> 32, data, int(masked))):
            self.pc.write(self.table + 16 * number + 4 * index, value)

    def control(self, value: int) -> None:
        self.guest.put(self.device, self.at + 2, 2, value)


@pytest.mark.clause("4.1.1-a")
def test_6_8_2_msix_table_and_messages(ecam: bool) -> None:
    function = Fake()
    pc, _, guest = build(ecam, function)
    msix = MsixGuest(pc, guest)
    assert guest.get(1, msix.at + 2, 2) == 3, "four vectors, disabled"
    assert pc.read(msix.table + 12) == 1, "6.8.2.9: masked after reset"
    msix.vector(0, 0xFEE0_1000, 0x41)
    msix.vector(1, 0xFEE0_2000, 0x42)
    assert pc.read(msix.table, 8) == 0xFEE0_1000
    function.host.signal_msix(0)
    assert pc.messages == [] and not function.host.msix_enabled
    msix.control(0x8000)
    assert function.host.msix_enabled
    function.host.signal_msix(1)
    function.host.signal_msix(0)
    function.host.signal_msix(4)
    assert pc.messages == [(0xFEE0_2000, 0x42), (0xFEE0_1000, 0x41)]


def test_6_8_3_4_msix_masking_and_pending_bits() -> None:
    function = Fake()
    pc, _, guest = build(False, function)
    msix = MsixGuest(pc, guest)
    msix.vector(2, 0xFEE0_0000, 0x50, masked=True)
    msix.vector(3, 0xFEE0_0000, 0x51)
    msix.control(0x8000)
    function.host.signal_msix(2)
    function.host.signal_msix(2)
    assert pc.read(msix.pba, 8) == 4 and pc.messages == []
    pc.write(msix.pba, 0)
    assert pc.read(msix.pba) == 4, "6.8.2.10: read-only"
    pc.write(msix.table + 16 * 2 + 12, 0)
    assert pc.messages == [(0xFEE0_0000, 0x50)] and pc.read(msix.pba) == 0
    msix.control(0xC000)
    function.host.signal_msix(3)
    assert len(pc.messages) == 1 and pc.read(msix.pba) == 8
    msix.control(0x8000)
    assert pc.messages[1:] == [(0xFEE0_0000, 0x51)]


def test_6_8_2_accesses_of_other_sizes_are_undefined_and_harmless() -> None:
    pc, _, guest = build(False, Fake())
    msix = MsixGuest(pc, guest)
    pc.write(msix.table + 1, 0xAA, 1)
    pc.write(msix.table + 2, 0xAAAA_AAAA, 4)
    assert pc.read(msix.table) == 0


def test_6_8_3_3_msix_keeps_the_pin_quiet() -> None:
    function = Fake()
    pc, _, guest = build(False, function)
    msix = MsixGuest(pc, guest)
    function.host.set_intx(True)
    msix.control(0x8000)
    assert not pc.levels[layout.intx_gsi(1, 0)]
    msix.control(0)
    assert pc.levels[layout.intx_gsi(1, 0)]


def test_6_2_2_without_bus_master_no_message() -> None:
    function = Fake()
    pc, _, guest = build(False, function)
    msix = MsixGuest(pc, guest)
    msix.vector(0, 0xFEE0_0000, 1)
    msix.control(0x8000)
    guest.put(1, 4, 2, 2)
    function.host.signal_msix(0)
    assert pc.messages == []


def test_6_8_1_msi_with_per_vector_masking() -> None:
    function = Fake(msix=False, capabilities=(VENDOR_CAPABILITY, Msi.body(4)))
    pc, _, guest = build(False, function)
    at = next(at for kind, at in guest.capabilities(1) if kind == 5)
    assert guest.get(1, at + 2, 2) == 0x0184, "four vectors, 64 bits, per-vector masking"
    guest.put(1, 4, 2, 4)
    guest.put(1, at + 4, 4, 0xFEE0_3003)
    guest.put(1, at + 0xC, 2, 0x60)
    guest.put(1, at + 2, 2, 0x21)
    function.host.signal_msi(3)
    assert pc.messages == [(0xFEE0_3000, 0x63)]
    guest.put(1, at + 0x10, 4, 0xFFFF_FFFF)
    assert guest.get(1, at + 0x10, 4) == 0xF
    function.host.signal_msi(1)
    assert guest.get(1, at + 0x14, 4) == 2 and len(pc.messages) == 1
    guest.put(1, at + 0x10, 4, 0)
    assert pc.messages[1:] == [(0xFEE0_3000, 0x61)] and guest.get(1, at + 0x14, 4) == 0


def test_reset_puts_everything_back() -> None:
    function = Fake()
    pc, bus, guest = build(False, function)
    before = [guest.get(1, offset, 4) for offset in range(0, 256, 4)]
    msix = MsixGuest(pc, guest)
    msix.vector(0, 1 << 32, 1)
    msix.control(0x8000)
    guest.put(1, 0x14, 4, 0xC800_0000)
    function.host.set_intx(True)
    bus.reset()
    assert [guest.get(1, offset, 4) for offset in range(0, 256, 4)] == before
    assert function.resets == 1 and not pc.levels.get(layout.intx_gsi(1, 0))


def test_state_moves_to_a_fresh_machine() -> None:
    function = Fake()
    pc, bus, guest = build(False, function)
    msix = MsixGuest(pc, guest)
    guest.put(1, 0x14, 4, 0xC800_0000)
    pc.write(0xC800_0010, 0x55AA)
    msix.vector(1, 0xFEE0_0000, 0x77, masked=True)
    msix.control(0x8000)
    function.host.signal_msix(1)
    other = Fake()
    pc2, bus2, guest2 = build(False, other)
    bus2.restore(bus.save())
    assert pc2.read(0xC800_0010) == 0x55AA
    assert other.moves and bus2.save() == bus.save()
    pc2.write(msix.table + 16 + 12, 0)
    assert pc2.messages == [(0xFEE0_0000, 0x77)]
    with pytest.raises(StateError):
        build(False)[1].restore(bus.save())


def test_slots_and_windows_are_finite() -> None:
    pc = Pc()
    bus = PciBus(pc)
    for _ in range(31):
        bus.add(Fake())
    with pytest.raises(ConfigError, match="no free slot"):
        bus.add(Fake())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 0x14F), st.sampled_from((1, 2, 4, 8)), st.integers(0, 2**64 - 1)),
        max_size=40,
    )
)
def test_any_configuration_access_is_answered(accesses: list[tuple[int, int, int, int]]) -> None:
    pc, bus, _ = build(False, Fake(), Fake(msix=False, capabilities=(VENDOR_CAPABILITY, Msi.body(8))))
    for device, offset, size, value in accesses:
        address = layout.ECAM.start | device << 15 | offset
        pc.write(address, value & (1 << 8 * size) - 1, size)
        assert 0 <= pc.read(address, size) < 1 << 8 * size
    assert struct.pack("<I", bus.config_read(8, 0, 4)) == struct.pack("<I", 0x1042_1AF4)
    bus.restore(bus.save())


class Events:
    """The ACPI block as the slots' registers know it."""

    def __init__(self) -> None:
        self.raised: list[int] = []

    def general_event(self, number: int) -> None:
        self.raised.append(number)


def plugged(*functions: Fake) -> tuple[Pc, PciBus, Guest, PciHotplug, Events]:
    pc, bus, guest = build(True, *functions)
    events = Events()
    hotplug = PciHotplug(bus, events)
    hotplug.attach(pc)
    bus.hotplug = hotplug
    return pc, bus, guest, hotplug, events


def register(pc: Pc, offset: int) -> int:
    return pc.inp(layout.PCI_HOTPLUG + offset, 4)


def test_functions_come_and_go_and_no_bar_of_others_moves() -> None:
    pc, bus, guest, hotplug, events = plugged(Fake(), Fake())
    guest.put(1, 4, 2, 7)
    guest.put(2, 4, 2, 7)
    before = [(bar.spec.index, bar.mapped) for slot in bus.slots for bar in slot.bars]
    new = Fake()
    assert bus.add(new) == 3 and bus.free == 28
    hotplug.inserted(3)
    assert events.raised == [layout.PCI_EVENT]
    assert register(pc, INSERTED) == 1 << 3 and register(pc, PRESENT) == 0b1111
    pc.out(layout.PCI_HOTPLUG + INSERTED, 1 << 3, 4)
    assert register(pc, INSERTED) == 0
    guest.put(3, 4, 2, 7)
    assert None not in [bar.mapped for bar in bus.slots[3].bars]
    taken = [(bar.mapped, bar.spec.size) for slot in bus.slots for bar in slot.bars if bar.spec.kind != "io"]
    for at, (start, size) in enumerate(taken):
        for other, length in taken[:at]:
            assert start + size <= other or other + length <= start
    given: list[int] = []
    hotplug.on_eject = given.append
    pc.out(layout.PCI_HOTPLUG + EJECT, 1 << 3 | 1 << 9 | 1, 4)
    assert given == [3], "neither the host bridge nor an empty slot can go"
    bus.remove(3)
    hotplug.gone(3)
    assert new.moves[-1] == (None, None, None) and guest.get(3, 0, 4) == 0xFFFF_FFFF
    assert [(bar.spec.index, bar.mapped) for slot in bus.slots for bar in slot.bars] == before
    assert register(pc, PRESENT) == 0b111
    with pytest.raises(KeyError):
        bus.remove(3)


def test_6_3_5_ost_says_why_a_function_stays() -> None:
    pc, bus, _, hotplug, events = plugged(Fake(), Fake())
    said: list[tuple[int, str]] = []
    hotplug.on_refused = lambda device, reason: said.append((device, reason))
    hotplug.ask(2)
    assert register(pc, ASKED) == 1 << 2 and events.raised == [layout.PCI_EVENT]

    def report(device: int, event: int, status: int) -> None:
        pc.out(layout.PCI_HOTPLUG + OST_EVENT, device << 16 | event, 4)
        pc.out(layout.PCI_HOTPLUG + OST_STATUS, status, 4)

    for device, event, status in ((2, 3, 0), (2, 3, 0x84), (2, 1, 0x81), (0, 3, 0x81), (99, 3, 0x81)):
        report(device, event, status)
    assert said == []
    report(2, 3, 0x81)
    report(1, 0x103, 0xABCD_0080)
    report(1, 3, 0x77)
    assert said == [(2, "the device is in use"), (1, "it does not support that"), (1, "status 0x77")]
    hotplug.withdraw(2)
    assert register(pc, ASKED) == 0


def test_a_function_that_is_pulled_is_not_found_while_its_registers_answer() -> None:
    pc, bus, guest, hotplug, _ = plugged(Fake())
    guest.put(1, 4, 2, 7)
    bus.hide(1)
    hotplug.pulled(1)
    assert register(pc, INSERTED) == 1 and register(pc, PRESENT) == 1
    assert guest.get(1, 0, 4) == 0xFFFF_FFFF
    where = bus.slots[1].bars[1].mapped
    assert where is not None and pc.read(where, 4) == 0
    bus.remove(1)
    hotplug.gone(1)
    assert pc.read(where, 4) == 0xFFFF_FFFF and register(pc, PRESENT) == 1
    assert hotplug.unsettled == {1}, "the guest may still be about to eject it"
    pc.out(layout.PCI_HOTPLUG + EJECT, 1 << 1, 4)
    assert not hotplug.unsettled


def test_what_the_guest_has_not_heard_is_state() -> None:
    _, bus, _, hotplug, _ = plugged(Fake())
    hotplug.ask(1)
    hotplug.inserted(5)
    saved = bus.save()
    pc, other, _, again, _ = plugged(Fake())
    other.restore(saved)
    assert (register(pc, INSERTED), register(pc, ASKED)) == (1 << 5, 1 << 1) and again.known
    old = PciBusState(saved.address, saved.slots, None)
    other.restore(old)
    assert not again.known and other.save().hotplug is None, "a machine whose tables know nothing stays one"
    other.reset()
    assert register(pc, INSERTED) == 0
