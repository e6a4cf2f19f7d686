"""Legacy and firmware devices in the middle of something: saved between any two accesses, another goes on the same."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.hops import Driven, check, moves
from tests.support.pc import SECOND, Pc
from tests.support.ram import Ram
from vmm.acpi import Acpi
from vmm.config import Config
from vmm.devices import fwcfg
from vmm.devices.cpus import ASKED, INSERTED, OST, PRESENT, CpuHotplug
from vmm.devices.i8042 import I8042
from vmm.devices.pm import HALF_PERIOD, PM_TIMER_HZ, Pm
from vmm.devices.post import DelayPorts
from vmm.devices.reset import ResetControl
from vmm.devices.rtc import Rtc
from vmm.devices.testdev import TestDevice
from vmm.devices.uart import BURST, COM1, COM1_GSI, Uart
from vmm.devices.vmgenid import GenerationId
from vmm.errors import StateError
from vmm.machine import layout
from vmm.machine.layout import Layout
from vmm.pci.bus import PciBus

from .test_payload import instances

MIB = 1 << 20
MEMORY = 64 * MIB

# UART (PC16550D)

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = (COM1 + offset for offset in range(8))


def uart(driven: Driven) -> Uart:
    return Uart(driven.pc, COM1, COM1_GSI, driven.port, "com1")


def listening(driven: Driven, ier: int = 5) -> None:
    for port, value in ((LCR, 3), (IIR, 0xC7), (MCR, 0x0B), (IER, ier)):
        driven.out(port, value)


def a_fifo_that_is_half_drained(driven: Driven) -> None:
    listening(driven)
    driven.do(lambda _: driven.port.type(bytes(range(40))))
    for _ in range(44):
        driven.inp(LSR)
        driven.inp(IIR)
        driven.inp(RBR)


def a_divisor_of_which_one_half_is_written(driven: Driven) -> None:
    driven.out(IER, 2)
    driven.out(LCR, 0x83)
    driven.out(RBR, 0x34)
    driven.out(IER, 0x12)
    assert (driven.inp(RBR), driven.inp(IER)) == (0x34, 0x12)
    driven.out(LCR, 3)
    assert driven.inp(IER) == 2


def an_interrupt_that_nobody_has_looked_at(driven: Driven) -> None:
    listening(driven, 0x0F)
    for letter in b"abc":
        driven.out(RBR, letter)
    driven.do(lambda device: device.set_modem_inputs(0x20))
    driven.do(lambda device: device.send_break())
    for port in (IIR, LSR, IIR, RBR, IIR, IIR, MSR, IIR):
        driven.inp(port)


def characters_in_the_loop(driven: Driven) -> None:
    listening(driven)
    driven.out(MCR, 0x1B)
    for letter in range(20):
        driven.out(RBR, letter)
    assert driven.inp(LSR) & 2, "an overrun"
    for _ in range(17):
        driven.inp(RBR)
    driven.out(MCR, 0x0B)
    driven.inp(MSR)


def a_driver_that_begins_to_poll(driven: Driven) -> None:
    driven.do(lambda _: driven.port.type(b"typed early"))
    for _ in range(9):
        driven.inp(LSR)
    for _ in range(13):
        driven.inp(RBR)
        driven.inp(LSR)


def input_that_pauses(driven: Driven) -> None:
    listening(driven)
    driven.do(lambda _: driven.port.type(bytes(BURST + 40)))
    for _ in range(BURST + 20):
        driven.pc.inp(RBR)
    driven.advance(100_000)
    driven.inp(LSR)
    driven.advance(150_000)
    for _ in range(20):
        driven.inp(LSR)
        driven.inp(RBR)


def a_driver_that_asks_the_other_side_to_wait(driven: Driven) -> None:
    listening(driven)
    driven.out(MCR, 0x09)
    driven.do(lambda _: driven.port.type(b"later"))
    driven.inp(LSR)
    driven.out(MCR, 0x0B)
    for _ in range(6):
        driven.inp(RBR)


@moves("uart")
@pytest.mark.parametrize("drive", [
    a_fifo_that_is_half_drained, a_divisor_of_which_one_half_is_written, an_interrupt_that_nobody_has_looked_at,
    characters_in_the_loop, a_driver_that_begins_to_poll, input_that_pauses, a_driver_that_asks_the_other_side_to_wait,
])  # fmt: skip
def test_uart(drive: Callable[[Driven], None]) -> None:
    check(uart, drive)


# RTC (MC146818A)


def rtc(driven: Driven) -> Rtc:
    device = Rtc(driven.pc)
    device.attach()
    return device


def get(driven: Driven, index: int) -> int:
    driven.out(0x70, index)
    return driven.inp(0x71)


def put(driven: Driven, index: int, value: int) -> None:
    driven.out(0x70, index)
    driven.out(0x71, value)


def an_update_in_progress(driven: Driven) -> None:
    seen = set()
    for _ in range(12):
        seen.add(get(driven, 0x0A) >> 7)
        get(driven, 0)
        driven.advance(SECOND // 2 - 500_000)
    assert seen == {0, 1}


def a_date_that_is_being_set(driven: Driven) -> None:
    put(driven, 0x0B, 0x86)
    for index, value in ((7, 31), (8, 12), (9, 99), (0x32, 19), (4, 23), (2, 59), (0, 58)):
        put(driven, index, value)
    driven.advance(3 * SECOND)
    put(driven, 0x0B, 0x16)
    driven.advance(3 * SECOND)
    assert [get(driven, index) for index in (0x32, 9, 8, 7, 4, 2)] == [20, 0, 1, 1, 0, 0]
    get(driven, 0x0C)


def an_alarm_and_a_periodic_interrupt(driven: Driven) -> None:
    for index, value in ((0x0B, 0x06), (1, 5), (3, 0xC0), (5, 0xFF), (0x0A, 0x2F), (0x0B, 0x66)):
        put(driven, index, value)
    for _ in range(8):
        driven.advance(900_000_000)
        get(driven, 0x0C)


@moves("rtc")
@pytest.mark.parametrize("drive", [an_update_in_progress, a_date_that_is_being_set, an_alarm_and_a_periodic_interrupt])
def test_rtc(drive: Callable[[Driven], None]) -> None:
    check(rtc, drive)


# Keyboard controller, reset ports, delay ports


def keyboard(driven: Driven) -> I8042:
    device = I8042(driven.pc, driven.host.append)
    device.attach()
    return device


def commands_whose_arguments_are_outstanding(driven: Driven) -> None:
    for port, value in ((0x64, 0x60), (0x60, 0x45), (0x60, 0xF0), (0x60, 0), (0x60, 0xF2), (0x60, 0xED), (0x60, 2)):
        driven.out(port, value)
    while driven.inp(0x64) & 1:
        driven.inp(0x60)
    for port, value in ((0x64, 0xD1), (0x60, 3), (0x64, 0xD0), (0x64, 0xD1), (0x60, 2)):
        driven.out(port, value)
    assert driven.inp(0x60) == 3 and driven.host


@moves("i8042")
def test_keyboard_controller() -> None:
    check(keyboard, commands_whose_arguments_are_outstanding)


def reset_control(driven: Driven) -> ResetControl:
    control = ResetControl(driven.pc, lambda gpa, length: bytes(length))
    control.attach()
    PciBus(driven.pc).attach(control)
    return control


def a_reset_that_is_being_prepared(driven: Driven) -> None:
    driven.out(0xCF9, 2)
    driven.out(0xCF9, 6)
    driven.out(0xCF9, 6)
    driven.out(0x92, 1)
    driven.out(0x92, 3)
    driven.inp(0xCF9)
    driven.inp(0x92)
    assert len(driven.pc.requests) == 2


@moves("reset")
def test_reset_ports() -> None:
    check(reset_control, a_reset_that_is_being_prepared)


def delay_ports(driven: Driven) -> DelayPorts:
    device = DelayPorts(driven.pc)
    device.attach()
    return device


@moves("delay-ports")
def test_delay_ports() -> None:
    def drive(driven: Driven) -> None:
        for value in (0x55, 0xAA):
            driven.out(0x80, value)
            driven.inp(0x80)

    check(delay_ports, drive)


# ACPI (6.4)


def pm(driven: Driven) -> Pm:
    device = Pm(driven.pc)
    device.attach()
    return device


def events_that_wait_for_the_guest(driven: Driven) -> None:
    driven.out(layout.PM1_EVENT + 2, 0x101, 2)
    driven.out(layout.GPE0 + 2, 0xFFFF, 2)
    driven.do(lambda device: device.press_power_button())
    driven.do(lambda device: device.general_event(3))
    driven.inp(layout.PM1_EVENT, 2)
    driven.out(layout.PM1_EVENT, 0x100, 2)
    driven.out(layout.GPE0, 8, 2)
    driven.inp(layout.GPE0, 2)


def a_timer_about_to_turn_over(driven: Driven) -> None:
    driven.out(layout.PM1_EVENT + 2, 1, 2)
    half = HALF_PERIOD * SECOND // PM_TIMER_HZ
    for ns in (half - 1000, 5000, 1000, half, half):
        driven.advance(ns)
        driven.inp(layout.PM_TIMER, 4)
        driven.inp(layout.PM1_EVENT)
        driven.inp(layout.PM1_EVENT + 1)
        driven.out(layout.PM1_EVENT, 1, 2)


def a_power_off_written_byte_by_byte(driven: Driven) -> None:
    driven.out(layout.PM1_CONTROL, 0x14 << 8, 2)
    driven.inp(layout.PM1_CONTROL, 2)
    driven.out(layout.PM1_CONTROL + 1, 0x34)
    driven.inp(layout.PM1_CONTROL, 2)
    assert driven.pc.requests


@moves("acpi-pm")
@pytest.mark.parametrize("drive", [
    events_that_wait_for_the_guest, a_timer_about_to_turn_over, a_power_off_written_byte_by_byte,
])  # fmt: skip
def test_acpi_fixed_hardware(drive: Callable[[Driven], None]) -> None:
    check(pm, drive)


def cpu_hotplug(driven: Driven) -> CpuHotplug:
    device = CpuHotplug(40, {0, 1}, lambda: None, lambda index, on: None)
    device.on_change = lambda index, reason: driven.host.append((index, reason))
    device.attach(driven.pc)
    device.start()
    return device


def processors_that_come_and_go(driven: Driven) -> None:
    base = layout.CPU_HOTPLUG
    driven.do(lambda device: device.insert(2))
    driven.do(lambda device: device.insert(39))
    assert driven.inp(base + INSERTED, 4) == 4
    driven.out(base + INSERTED, 4, 4)
    assert driven.inp(base + INSERTED + 4, 4) == 1 << 7
    driven.do(lambda device: device.ask(1))
    driven.out(base + OST, 1 << 24 | 3 << 8 | 0x84, 4)
    driven.inp(base + ASKED, 4)
    driven.out(base + ASKED, 2, 4)
    driven.out(base + OST, 1 << 24 | 3 << 8 | 0x81, 4)
    driven.inp(base + OST, 4)
    driven.out(base + 0x18, 2, 4)
    assert driven.inp(base + PRESENT, 4) == 3 and len(driven.host) == 2


@moves("cpu-hotplug")
def test_processor_hot_plug() -> None:
    check(cpu_hotplug, processors_that_come_and_go)


# Firmware configuration: one memory for both machines, as the state of devices does not hold it.


class Memory(Ram):
    """GuestMemory's part that fw_cfg uses."""

    absent = None

    def view(self, gpa: int, length: int) -> bytes:
        return self.read(gpa, length)

    def here(self, gpa: int, length: int) -> bool:
        return True

    def written(self, gpa: int, length: int) -> None:
        return None


def fw_cfg(memory: Memory) -> Callable[[Driven], Any]:
    from tests.support.pc import FakeAssembly

    def make(driven: Driven) -> Any:
        assembly = FakeAssembly(Config(memory=MEMORY, cpus=3), memory, driven.pc)
        assembly.services.acpi = Acpi(Layout(MEMORY), 3, memory.write)
        fwcfg.attach(assembly)
        return assembly.get("fw_cfg")

    return make


def an_item_that_is_half_read(driven: Driven) -> None:
    driven.out(0x510, 0x19, 2)
    count = int.from_bytes(bytes(driven.inp(0x511) for _ in range(4)), "big")
    assert count > 1
    for _ in range(70):
        driven.inp(0x511)
    driven.out(0x510, 3, 2)
    assert bytes(driven.inp(0x511) for _ in range(8)) == MEMORY.to_bytes(8, "little")


@moves("fw-cfg")
def test_firmware_configuration() -> None:
    memory = Memory(MEMORY)

    def dma_of_which_one_half_of_the_address_is_written(driven: Driven) -> None:
        memory.write(0x2000, bytes(64))
        memory.write(0x1000, struct.pack(">IIQ", 8 << 0 | 2, 3, 0x2000))
        driven.out(0x510, 0, 2)
        driven.out(0x514, 0, 4)
        driven.out(0x518, 0x100000, 4)
        for _ in range(3):
            driven.inp(0x511)
        driven.host.append(memory.read(0x2000, 8))

    check(fw_cfg(memory), an_item_that_is_half_read)
    check(fw_cfg(memory), dma_of_which_one_half_of_the_address_is_written)


@moves("testdev")
def test_test_device() -> None:
    def drive(driven: Driven) -> None:
        driven.out(0x2005, 1)
        driven.out(0x2009, 1)
        driven.out(0xE0, 0x1234_5678, 4)
        driven.write(0xFF00_0010, 3)
        driven.out(0x2005, 0)
        driven.inp(0xE2, 2)
        driven.read(0xFF00_0010)

    check(lambda driven: TestDevice(driven.pc, lambda gpa, length: None), drive)


@moves("generation-id")
def test_generation_id() -> None:
    """The same machine goes on: the value that stands in memory is the one that was renewed before."""
    memory = Ram(MIB)

    def make(driven: Driven) -> GenerationId:
        events = Pm(driven.pc)
        source = iter(bytes([value]) * 16 for value in range(1, 9))
        return GenerationId(memory.write, lambda count: next(source), events)

    def drive(driven: Driven) -> None:
        driven.do(lambda device: device.populate())
        for _ in range(3):
            driven.do(lambda device: driven.host.append(memory.read(layout.VM_GENERATION_ID, 16)))

    check(make, drive)


# Any state that the declarations allow: the component takes it, or says StateError, and serves any access afterwards.

MAKERS: list[tuple[Callable[[Driven], Any], list[int]]] = [
    (uart, [*range(COM1, COM1 + 8)]), (rtc, [0x70, 0x71]), (keyboard, [0x60, 0x64]), (reset_control, [0x92, 0xCF9]),
    (delay_ports, [0x80]), (pm, [layout.PM_BASE + at for at in range(0, 16)]),
    (cpu_hotplug, [layout.CPU_HOTPLUG + at for at in range(0, 32, 4)]), (fw_cfg(Memory(MEMORY)), [0x510, 0x511, 0x518]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "ports"), MAKERS, ids=lambda value: getattr(value, "__name__", ""))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_state_that_is_well_formed_is_taken_or_refused(
    make: Callable[[Driven], Any], ports: list[int], data: st.DataObject
) -> None:
    driven = Driven(make, ())
    state = data.draw(instances(driven.component.state_type))
    try:
        driven.component.restore(state)
    except StateError:
        return
    for port in data.draw(st.lists(st.sampled_from(ports), max_size=12)):
        driven.inp(port)
        driven.out(port, data.draw(st.integers(0, 255)))
        driven.pc.clock.advance(SECOND // 3)
    driven.hop()


def test_what_was_typed_before_a_uart_goes_on_is_received() -> None:
    """The console's other end may have input before the machine is made, and a driver that listens waits for an
    interrupt."""
    first, second = Driven(uart, ()), Driven(uart, ())
    listening(first)
    state = first.component.save()
    second.port.typed += b"early"
    second.pc = Pc()
    second.component = uart(second)
    assert not second.pc.levels.get(COM1_GSI)
    second.component.restore(state)
    assert second.pc.levels[COM1_GSI]
    assert bytes(second.inp(RBR) for _ in range(5)) == b"early"
