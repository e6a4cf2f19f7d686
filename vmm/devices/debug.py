"""Two ports for test guests: 0xf4 ends the machine with a status, 0xe9 is a debug console (as Bochs has it)."""

from __future__ import annotations

from collections.abc import Callable

from cpu.contract import Space
from vmm.machine.interfaces import Assembly, Board

EXIT_PORT = 0xF4
DEBUG_PORT = 0xE9


class ExitPort:
    """A write of v ends the machine; `vmm run` then exits with (v << 1) | 1. Reads as all ones. No state."""

    def __init__(self, board: Board) -> None:
        self._request = board.request
        board.map(Space.PORT, EXIT_PORT, 4, self, "exit port")

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._request("shutdown", f"the guest wrote {value:#x} to the exit port", value)


class DebugPort:
    """Bytes written go to `write`; a read answers 0xe9, by which guests find it. No state."""

    def __init__(self, board: Board, write: Callable[[bytes], None]) -> None:
        self._write = write
        board.map(Space.PORT, DEBUG_PORT, 1, self, "debug port")
        board.post(Space.PORT, DEBUG_PORT, 1, self, 0)
        board.shadow(Space.PORT, DEBUG_PORT, 1).set(DEBUG_PORT)

    def read(self, offset: int, size: int) -> int:
        return DEBUG_PORT

    def write(self, offset: int, size: int, value: int) -> None:
        self._write(bytes((value,)))

    def posted(self, offset: int, size: int, data: bytes) -> None:
        self._write(data)


def attach(assembly: Assembly) -> None:
    """Both ports; the debug console's text joins the machine's debug output."""
    assembly.add("exit-port", ExitPort(assembly.board))
    assembly.add("debug-port", DebugPort(assembly.board, assembly.debug_output))
