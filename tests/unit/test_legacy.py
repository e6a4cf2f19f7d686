"""Reset ports, keyboard controller, ACPI fixed hardware, pvpanic, generation ID."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cpu.contract import Space
from tests.support.pc import SECOND, FakeAssembly, Pc
from tests.support.ram import Ram
from vmm.devices import post, vmgenid
from vmm.devices.i8042 import I8042
from vmm.devices.pm import PM_TIMER_HZ, Pm
from vmm.devices.post import DelayPorts
from vmm.devices.pvpanic import PvPanic
from vmm.devices.reset import ResetControl
from vmm.machine import layout
from vmm.pci.bus import PciBus

PM1_STS, PM1_EN, PM1_CNT, PM_TMR = layout.PM_BASE, layout.PM_BASE + 2, layout.PM1_CONTROL, layout.PM_TIMER
GPE0_STS, GPE0_EN = layout.GPE0, layout.GPE0 + 2
SCI = layout.SCI_GSI


def reset_control(flag: int = 0) -> tuple[Pc, ResetControl]:
    pc = Pc()
    control = ResetControl(pc, lambda gpa, length: flag.to_bytes(length, "little"))
    control.attach()
    bus = PciBus(pc)
    bus.attach(control)
    return pc, control


def test_reset_control_register_resets_on_the_rising_edge_only() -> None:
    pc, _ = reset_control()
    pc.out(0xCF9, 2)
    assert pc.requests == [] and pc.inp(0xCF9) == 2
    pc.out(0xCF9, 6)
    pc.out(0xCF9, 6)
    assert [action for action, _, _ in pc.requests] == ["reset"]
    pc.out(0xCF8, 1 << 31, 4)
    assert pc.inp(0xCF8, 4) == 1 << 31, "configuration address is another register"


def test_port_92_has_a20_open_and_resets() -> None:
    pc, control = reset_control()
    assert pc.inp(0x92) == 2
    pc.out(0x92, 3)
    assert pc.requests[0][0] == "reset"
    control.restore(control.save())


def test_reset_with_the_warm_boot_flag_is_a_panic() -> None:
    pc, _ = reset_control(0x1234)
    pc.out(0xCF9, 6)
    assert pc.requests[0][0] == "crash"


class Keyboard:
    def __init__(self) -> None:
        self.pc = Pc()
        self.resets: list[str] = []
        self.device = I8042(self.pc, self.resets.append)
        self.device.attach()

    def command(self, value: int, *data: int) -> None:
        self.pc.out(0x64, value)
        for byte in data:
            self.pc.out(0x60, byte)

    def answer(self) -> list[int]:
        found = []
        while self.pc.inp(0x64) & 1:
            found.append(self.pc.inp(0x60))
        return found


def test_controller_self_tests_and_command_byte() -> None:
    keyboard = Keyboard()
    keyboard.command(0xAA)
    assert keyboard.answer() == [0x55]
    keyboard.command(0xAB)
    assert keyboard.answer() == [0]
    keyboard.command(0x60, 0x47)
    keyboard.command(0x20)
    assert keyboard.answer() == [0x67], "the second port stays disabled: there is none"
    keyboard.command(0xA8)
    keyboard.command(0x20)
    assert keyboard.answer() == [0x67]


def test_keyboard_answers_reset_identify_and_arguments() -> None:
    keyboard = Keyboard()
    for written, answer in (
        ((0xFF,), [0xFA, 0xAA]), ((0xF2,), [0xFA, 0xAB, 0x83]), ((0xED, 2), [0xFA, 0xFA]), ((0xEE,), [0xEE]),
        ((0xF0, 0), [0xFA, 0xFA, 2]), ((0xF4,), [0xFA]), ((0x01,), [0xFE]),
    ):  # fmt: skip
        for byte in written:
            keyboard.pc.out(0x60, byte)
        assert keyboard.answer() == answer


def test_output_buffer_interrupts_byte_by_byte() -> None:
    keyboard = Keyboard()
    keyboard.pc.out(0x60, 0xF2)
    keyboard.answer()
    rises = [level for gsi, level in keyboard.pc.edges if gsi == 1]
    assert rises == [True, False] * 3
    keyboard.command(0x60, 0x44)
    keyboard.pc.out(0x60, 0xF4)
    assert not keyboard.pc.levels[1]


def test_reset_pulse_and_output_port() -> None:
    keyboard = Keyboard()
    keyboard.command(0xFF)
    keyboard.command(0xD1, 0x03)
    assert keyboard.resets == []
    keyboard.command(0xFE)
    keyboard.command(0xD1, 0x02)
    assert len(keyboard.resets) == 2


def test_state_of_the_keyboard_moves() -> None:
    keyboard = Keyboard()
    keyboard.pc.out(0x60, 0xF2)
    other = Keyboard()
    other.device.restore(keyboard.device.save())
    assert other.pc.levels[1] and other.answer() == [0xFA, 0xAB, 0x83]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from((0x60, 0x64)), st.integers(0, 511)), max_size=60))
def test_any_use_of_the_keyboard_controller_is_bounded(uses: list[tuple[int, int]]) -> None:
    keyboard = Keyboard()
    for port, value in uses:
        if value < 256:
            keyboard.pc.out(port, value)
        else:
            keyboard.pc.inp(port)
    assert len(keyboard.device.save().queue) <= 16


def pm() -> tuple[Pc, Pm]:
    pc = Pc()
    device = Pm(pc)
    device.attach()
    return pc, device


def test_4_8_1_pm_timer_counts_at_3_579545_mhz() -> None:
    pc, _ = pm()
    assert pc.inp(PM_TMR, 4) == 0
    pc.clock.advance(SECOND)
    assert pc.inp(PM_TMR, 4) == PM_TIMER_HZ
    assert pc.inp(PM_TMR + 1, 1) == PM_TIMER_HZ >> 8 & 0xFF


def test_4_8_3_1_1_timer_status_at_the_toggle_of_the_highest_bit() -> None:
    pc, _ = pm()
    pc.out(PM1_EN, 1, 2)
    pc.clock.advance((1 << 31) * SECOND // PM_TIMER_HZ)
    assert not pc.levels.get(SCI)
    pc.clock.advance(SECOND)
    assert pc.levels[SCI] and pc.inp(PM1_STS, 2) & 1
    pc.out(PM1_STS, 1, 2)
    assert not pc.levels[SCI] and pc.inp(PM1_STS, 2) == 0


def test_4_8_2_2_1_power_button_status_enable_and_write_one_to_clear() -> None:
    pc, device = pm()
    device.press_power_button()
    assert pc.inp(PM1_STS, 2) == 0x100 and not pc.levels.get(SCI)
    pc.out(PM1_EN, 0x100, 2)
    assert pc.levels[SCI]
    pc.out(PM1_STS, 0x20, 2)
    assert pc.levels[SCI]
    pc.out(PM1_STS + 1, 0x01, 1)
    assert not pc.levels[SCI] and pc.inp(PM1_STS, 4) == 0x100_0000


def test_4_8_3_2_1_control_is_in_acpi_mode_and_s5_powers_off() -> None:
    pc, _ = pm()
    assert pc.inp(PM1_CNT, 2) == 1
    pc.out(PM1_CNT, 5 << 10, 2)
    assert pc.requests == []
    pc.out(PM1_CNT, 5 << 10 | 1 << 13, 2)
    assert pc.requests[0][0] == "shutdown" and not pc.inp(PM1_CNT, 2) & 1 << 13


def test_4_8_4_general_purpose_event() -> None:
    pc, device = pm()
    device.general_event(5)
    assert pc.inp(GPE0_STS, 2) == 0x20 and not pc.levels.get(SCI)
    pc.out(GPE0_EN, 0x20, 1)
    assert pc.levels[SCI]
    other = Pm(Pc())
    other.restore(device.save())
    pc.out(GPE0_STS, 0x20, 1)
    assert not pc.levels[SCI] and other.save().gpe_status == 0x20


def test_pvpanic_reports_its_events_and_ends_the_machine() -> None:
    pc = Pc()
    PvPanic(pc).attach()
    assert pc.inp(layout.PVPANIC) == 3
    pc.out(layout.PVPANIC, 2)
    assert pc.requests == []
    pc.out(layout.PVPANIC, 1)
    assert pc.requests[0][0] == "crash"


def test_four_bytes_at_the_delay_port_mark_the_boot() -> None:
    assembly = FakeAssembly(None, None)
    post.attach(assembly)
    for word in (b"init", b"root", b"evil", b"\0\0\0\0"):
        assembly.board.out(0x80, int.from_bytes(word, "little"), 4)
    posted, offset = assembly.board.posts[Space.PORT, 0x80, 4]
    posted.posted(offset, 4, b"rootinit")
    assert assembly.marks == ["init", "root", "root", "init"]


def test_delay_port_is_posted() -> None:
    pc = Pc()
    DelayPorts(pc).attach()
    pc.out(0x80, 0x55)
    assert pc.inp(0x80) == 0x55


def test_generation_id_changes_only_when_renewed() -> None:
    memory = Ram(4 << 20)
    assembly = FakeAssembly(None, memory)
    values = iter([b"a" * 16, b"b" * 16])
    assembly.board.random = lambda count: next(values)  # type: ignore[method-assign]
    assembly.services.pm = Pm(assembly.board)
    vmgenid.attach(assembly)
    device = assembly.get("generation-id")
    device.populate()
    assert memory.read(layout.VM_GENERATION_ID, 16) == b"a" * 16
    device.restore(device.save())
    assert memory.read(layout.VM_GENERATION_ID, 16) == b"a" * 16
    device.renew()
    assert memory.read(layout.VM_GENERATION_ID, 16) == b"b" * 16
    assert assembly.services.pm.save().gpe_status == 1 << 5
