"""Ports that software writes only to spend time or to show progress: 0x80 (POST code) and 0xED. Writes are posted
and dropped; 0x80 reads back the last value, as the DMA page register's scratch byte does. No other state.

Four bytes at once at 0x80 are no POST code: our /init writes MARKS that way, for the machine's timeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from cpu.contract import Space
from cpu.values import U8, dataclass
from vmm.machine.interfaces import Assembly, Board

PORTS = (0x80, 0xED)
MARKS = (b"init", b"root")
"""/init runs; its root file system is mounted (images/init/init.c)."""


@dataclass(frozen=True, slots=True)
class DelayPortsState:
    """The byte written last."""

    kind: ClassVar = "delay-ports"
    version: ClassVar = 1
    last: U8


class DelayPorts:
    state_type = DelayPortsState

    def __init__(self, board: Board) -> None:
        self._board = board
        self._last = 0

    def attach(self) -> None:
        """Claim the ports."""
        for port in PORTS:
            self._board.map(Space.PORT, port, 1, self, f"delay port {port:#x}")
            self._board.post(Space.PORT, port, 1, self, 0)

    def read(self, offset: int, size: int) -> int:
        return self._last

    def write(self, offset: int, size: int, value: int) -> None:
        self._last = value

    def posted(self, offset: int, size: int, data: bytes) -> None:
        self._last = data[-1]

    def save(self) -> DelayPortsState:
        return DelayPortsState(self._last)

    def restore(self, state: DelayPortsState) -> None:
        self._last = state.last


class BootMarks:
    """The four-byte writes. No state."""

    def __init__(self, mark: Callable[[str], None]) -> None:
        self._mark = mark

    def posted(self, offset: int, size: int, data: bytes) -> None:
        """`data` may hold several writes."""
        for at in range(0, len(data), size):
            if data[at : at + size] in MARKS:
                self._mark(data[at : at + size].decode())


def attach(assembly: Assembly) -> None:
    """Both ports, and the marks."""
    device = DelayPorts(assembly.board)
    device.attach()
    assembly.board.post(Space.PORT, PORTS[0], 4, BootMarks(assembly.mark), 0)
    assembly.add("delay-ports", device)
