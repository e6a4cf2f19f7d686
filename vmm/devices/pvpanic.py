"""pvpanic: the guest says that it panicked (ACPI device QEMU0001).

Specification: QEMU's docs/specs/pvpanic: one byte; a read gives the supported events, a write reports one.
"""

from __future__ import annotations

from cpu.contract import Space
from vmm.machine import layout
from vmm.machine.interfaces import Assembly, Board

PANICKED, CRASH_LOADED = 1 << 0, 1 << 1
SUPPORTED = PANICKED | CRASH_LOADED


class PvPanic:
    """A panic ends the machine as crashed, unless a crash kernel is about to take over. No state."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def attach(self) -> None:
        self._board.map(Space.PORT, layout.PVPANIC, 1, self, "pvpanic")

    def read(self, offset: int, size: int) -> int:
        return SUPPORTED

    def write(self, offset: int, size: int, value: int) -> None:
        if value & PANICKED:
            self._board.request("crash", "the guest reported a panic (pvpanic)")


def attach(assembly: Assembly) -> None:
    device = PvPanic(assembly.board)
    device.attach()
    assembly.add("pvpanic", device)
