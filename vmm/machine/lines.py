"""Interrupt lines of a machine: several owners of one GSI are ORed, and the core hears only of changes."""

from __future__ import annotations

from collections.abc import Callable

from vmm.errors import ConfigError

GSI_COUNT = 24
"""Inputs of the IOAPIC; 0 to 15 reach the PIC too."""


class Line:
    """One owner's view of a GSI (vmm.machine.interfaces.IrqLine)."""

    __slots__ = ("_change", "_gsi", "level")

    def __init__(self, gsi: int, change: Callable[[int, bool], None]) -> None:
        self._gsi = gsi
        self._change = change
        self.level = False

    def set(self, level: bool) -> None:
        if level != self.level:
            self.level = level
            self._change(self._gsi, level)


class InterruptLines:
    """All lines of one machine. `drive(gsi, level)` is the core's input (Vm.set_irq). Loop thread."""

    def __init__(self, drive: Callable[[int, bool], None]) -> None:
        self._drive = drive
        self._raised = [0] * GSI_COUNT

    def line(self, gsi: int) -> Line:
        """A new owner of a GSI."""
        if not 0 <= gsi < GSI_COUNT:
            raise ConfigError(f"GSI {gsi} is outside 0 to {GSI_COUNT - 1}")
        return Line(gsi, self._change)

    def disconnect(self) -> None:
        """The core is going: nothing reaches it any more."""
        self._drive = lambda _gsi, _level: None

    def _change(self, gsi: int, level: bool) -> None:
        before = self._raised[gsi]
        self._raised[gsi] = after = before + (1 if level else -1)
        if not before or not after:
            self._drive(gsi, level)
