"""ACPI fixed hardware: PM1 event and control registers, the PM timer, GPE0, the power button, soft-off.

Specification: ACPI 6.4, 4.8.1 (PM timer), 4.8.3 (fixed hardware registers), 4.8.4 (general purpose events). The machine
is always in ACPI mode: there is no SMI command port and SCI_EN is always set. Loop thread.
"""

from __future__ import annotations

from typing import ClassVar

from cpu.contract import Space
from cpu.values import U16, dataclass
from vmm.machine import layout
from vmm.machine.bus import Register, RegisterMap
from vmm.machine.interfaces import Assembly, Board, TimerHandle

PM_TIMER_HZ = 3_579_545
SECOND = 1_000_000_000
TIMER_BITS = 32
HALF_PERIOD = 1 << TIMER_BITS - 1

# 4.8.3.1.1 PM1 status, 4.8.3.1.2 PM1 enable
TIMER, BUS_MASTER, GLOBAL, POWER_BUTTON, SLEEP_BUTTON, RTC, WAKE = (
    1 << 0, 1 << 4, 1 << 5, 1 << 8, 1 << 9, 1 << 10, 1 << 15,
)  # fmt: skip
STATUS_BITS = TIMER | BUS_MASTER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC | WAKE
ENABLE_BITS = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC
# 4.8.3.2.1 PM1 control
SCI_ENABLE, BUS_MASTER_RELOAD, GLOBAL_RELEASE, SLEEP_TYPE_SHIFT, SLEEP_ENABLE = 1 << 0, 1 << 1, 1 << 2, 10, 1 << 13
CONTROL_BITS = BUS_MASTER_RELOAD | 7 << SLEEP_TYPE_SHIFT
SLEEP_TYPE_S5 = 5
"""What \\_S5 in the DSDT gives."""


@dataclass(frozen=True, slots=True)
class PmState:
    """The event and control registers; the PM timer is the machine's clock."""

    kind: ClassVar = "acpi-pm"
    version: ClassVar = 1
    status: U16
    enable: U16
    control: U16
    gpe_status: U16
    gpe_enable: U16


class Pm:
    """All fixed registers at PM_BASE; events reach the guest by the SCI (GSI 9, level, active high)."""

    state_type = PmState

    def __init__(self, board: Board) -> None:
        self._board = board
        self._clock = board.clock
        self._sci = board.irq_line(layout.SCI_GSI)
        self._timer: TimerHandle | None = None
        base = layout.PM_BASE
        self._registers = RegisterMap(
            layout.PM_SIZE,
            [
                Register("PM1_STS", layout.PM1_EVENT - base, 2, self._read_status, self._clear_status, lambda: 0),
                Register("PM1_EN", layout.PM1_EVENT - base + 2, 2, lambda: self._enable, self._write_enable),
                Register("PM1_CNT", layout.PM1_CONTROL - base, 2, self._read_control, self._write_control),
                Register("PM_TMR", layout.PM_TIMER - base, 4, self._read_timer),
                Register("GPE0_STS", layout.GPE0 - base, 2, lambda: self._gpe_status, self._clear_gpe, lambda: 0),
                Register("GPE0_EN", layout.GPE0 - base + 2, 2, lambda: self._gpe_enable, self._write_gpe_enable),
            ],
            gap=0,
        )
        self.read, self.write = self._registers.read, self._registers.write
        self.reset()

    def attach(self) -> None:
        self._board.map(Space.PORT, layout.PM_BASE, layout.PM_SIZE, self, "acpi pm")

    def reset(self) -> None:
        self._status = self._enable = self._control = 0
        self._gpe_status = self._gpe_enable = 0
        self._toggles_seen = self._toggles()
        self._update()

    # Events from the machine.

    def press_power_button(self) -> None:
        """Somebody pressed the power button: the guest is asked to shut down (4.8.2.2.1)."""
        self._status |= POWER_BUTTON
        self._update()

    def general_event(self, number: int) -> None:
        """Raise general purpose event `number` (0 to 15): the guest runs \\_GPE._Exx."""
        self._gpe_status |= 1 << number
        self._update()

    # PM timer (4.8.1)

    def _ticks(self) -> int:
        return self._clock.now_ns() * PM_TIMER_HZ // SECOND

    def _toggles(self) -> int:
        return self._ticks() // HALF_PERIOD

    def _read_timer(self) -> int:
        return self._ticks() & (1 << TIMER_BITS) - 1

    # PM1

    def _read_status(self) -> int:
        # 4.8.3.1.1: TMR_STS "gets set anytime the most significant bit of a 24/32-bit counter changes"
        if self._toggles() != self._toggles_seen:
            self._toggles_seen = self._toggles()
            self._status |= TIMER
        return self._status

    def _clear_status(self, value: int) -> None:
        """Write one to clear; bits that are partly written are not touched."""
        self._read_status()
        self._status &= ~value
        self._update()

    def _write_enable(self, value: int) -> None:
        self._enable = value & ENABLE_BITS
        self._update()

    def _read_control(self) -> int:
        return self._control | SCI_ENABLE

    def _write_control(self, value: int) -> None:
        self._control = value & CONTROL_BITS
        if value & SLEEP_ENABLE and value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_S5:
            self._board.request("shutdown", "the guest powered itself off")

    # GPE0

    def _clear_gpe(self, value: int) -> None:
        self._gpe_status &= ~value
        self._update()

    def _write_gpe_enable(self, value: int) -> None:
        self._gpe_enable = value
        self._update()

    def _update(self) -> None:
        """The SCI line, and the alarm for the next timer event if anyone waits for it."""
        status = self._read_status()
        self._sci.set(bool(status & self._enable & ENABLE_BITS or self._gpe_status & self._gpe_enable))
        if self._enable & TIMER and not status & TIMER:
            if self._timer is None:
                next_toggle = (self._toggles_seen + 1) * HALF_PERIOD
                self._timer = self._clock.call_at(-(-next_toggle * SECOND // PM_TIMER_HZ), self._timer_due)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timer_due(self) -> None:
        self._timer = None
        self._update()

    def save(self) -> PmState:
        return PmState(self._read_status(), self._enable, self._control, self._gpe_status, self._gpe_enable)

    def restore(self, state: PmState) -> None:
        self._toggles_seen = self._toggles()
        self._status, self._enable = state.status & STATUS_BITS, state.enable & ENABLE_BITS
        self._control = state.control & CONTROL_BITS
        self._gpe_status, self._gpe_enable = state.gpe_status, state.gpe_enable
        self._update()


def attach(assembly: Assembly) -> None:
    device = Pm(assembly.board)
    device.attach()
    assembly.add("pm", device)
    assembly.services.pm = device
