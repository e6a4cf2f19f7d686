"""Resets that the guest asks for: port 0x92, the reset control register 0xCF9, and the keyboard controller's pulse.

A kernel that panics with `reboot=panic_warm` leaves the warm-boot flag (0x1234 at 0x472 in the BIOS data area), and no
other reset does: so a panic is told from a reboot without a device driver in the guest.
Specification: PC/AT system control port A; Intel 82371SB 2.4.3 (reset control register); IBM PC/AT BIOS data area.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

from cpu.contract import Space
from cpu.values import dataclass
from vmm.machine import layout
from vmm.machine.interfaces import Assembly, Board

PORT_A = 0x92
PORT_A_RESET, PORT_A_A20 = 1 << 0, 1 << 1
HARD_RESET, CPU_RESET = 1 << 1, 1 << 2
WARM_BOOT = 0x1234


@dataclass(frozen=True, slots=True)
class ResetState:
    """The reset control register and system control port A."""

    kind: ClassVar = "reset"
    version: ClassVar = 1
    control: Annotated[int, range(8)]
    port_a: Annotated[int, range(4)]


class ResetControl:
    """All ways to reset lead to `trigger`. The device at 0xCF9 itself; port 0x92 is mapped by `attach()`."""

    state_type = ResetState

    def __init__(self, board: Board, read_memory: Callable[[int, int], bytes]) -> None:
        self._board = board
        self._read_memory = read_memory
        self._control = 0
        self._port_a = PORT_A_A20

    def attach(self) -> None:
        """Port 0x92. 0xCF9 lies inside PCI's configuration address, which passes byte accesses on to us."""
        self._board.map(Space.PORT, PORT_A, 1, _PortA(self), "system control port a")

    def trigger(self, source: str) -> None:
        """The guest asked for a reset through `source`."""
        flag = int.from_bytes(self._read_memory(layout.WARM_BOOT_FLAG, 2), "little")
        if flag == WARM_BOOT:
            self._board.request("crash", f"the guest panicked (reset by {source} with the warm-boot flag)")
        else:
            self._board.request("reset", f"the guest reset itself by {source}")

    def read(self, offset: int, size: int) -> int:
        """0xCF9."""
        return self._control

    def write(self, offset: int, size: int, value: int) -> None:
        """A 0 to 1 transition of RCPU starts a reset."""
        before, self._control = self._control, value & (HARD_RESET | CPU_RESET)
        if value & CPU_RESET and not before & CPU_RESET:
            self.trigger("port 0xcf9")

    def read_port_a(self) -> int:
        return self._port_a

    def write_port_a(self, value: int) -> None:
        """A20 is kept as written and has no effect: the address line is always open."""
        before, self._port_a = self._port_a, value & (PORT_A_RESET | PORT_A_A20)
        if value & PORT_A_RESET and not before & PORT_A_RESET:
            self.trigger("port 0x92")

    def reset(self) -> None:
        self._control, self._port_a = 0, PORT_A_A20

    def save(self) -> ResetState:
        return ResetState(self._control, self._port_a)

    def restore(self, state: ResetState) -> None:
        self._control = state.control & (HARD_RESET | CPU_RESET)
        self._port_a = state.port_a


class _PortA:
    def __init__(self, control: ResetControl) -> None:
        self._control = control

    def read(self, offset: int, size: int) -> int:
        return self._control.read_port_a()

    def write(self, offset: int, size: int, value: int) -> None:
        self._control.write_port_a(value)


def attach(assembly: Assembly) -> None:
    control = ResetControl(assembly.board, assembly.memory.read)
    control.attach()
    assembly.add("reset", control)
    assembly.services.reset = control
