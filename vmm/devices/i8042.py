"""i8042 keyboard controller: reset pulse, self-test, command byte, and a keyboard that answers but is never pressed.

There is no second (auxiliary) port. Enough for kernels that probe without ACPI and for software that resets through it.
Specification: Intel UPI-42AH data sheet; IBM PS/2 technical reference, "Keyboard and Auxiliary Device Controller".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Annotated, ClassVar

from cpu.contract import Space
from cpu.values import U8, dataclass
from vmm.machine import layout
from vmm.machine.interfaces import Assembly, Board

DATA_PORT, COMMAND_PORT = 0x60, 0x64
# Status register
OUTPUT_FULL, SYSTEM_FLAG, LAST_WAS_COMMAND, NOT_LOCKED = 1 << 0, 1 << 2, 1 << 3, 1 << 4
# Command byte
KEYBOARD_INTERRUPT, SYSTEM, KEYBOARD_DISABLED, AUX_DISABLED, TRANSLATE = 1 << 0, 1 << 2, 1 << 4, 1 << 5, 1 << 6
COMMAND_BYTE_RESET = SYSTEM | KEYBOARD_INTERRUPT | TRANSLATE
# Output port P2: bit 0 low resets, bit 1 opens A20
RESET_LINE, A20_LINE = 1 << 0, 1 << 1

READ_COMMAND_BYTE, WRITE_COMMAND_BYTE = 0x20, 0x60
AUX_DISABLE, AUX_ENABLE, AUX_TEST = 0xA7, 0xA8, 0xA9
SELF_TEST, KEYBOARD_TEST, DISABLE_KEYBOARD, ENABLE_KEYBOARD = 0xAA, 0xAB, 0xAD, 0xAE
READ_INPUT, READ_OUTPUT, WRITE_OUTPUT, WRITE_OUTPUT_BUFFER, WRITE_AUX_OUTPUT_BUFFER, WRITE_AUX = (
    0xC0, 0xD0, 0xD1, 0xD2, 0xD3, 0xD4,
)  # fmt: skip
PULSE = 0xF0
SELF_TEST_PASSED, TEST_PASSED, AUX_CLOCK_STUCK = 0x55, 0x00, 0x01
INPUT_PORT = 0xBF
"""Keyboard not inhibited, no manufacturing jumper."""

ACK, RESEND, KEYBOARD_PASSED = 0xFA, 0xFE, 0xAA
KEYBOARD_ID = (0xAB, 0x83)
WITH_ARGUMENT = frozenset((0xED, 0xF0, 0xF3))
"""Set indicators, select scan code set, set typematic rate."""
PLAIN = frozenset((0xF4, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA))
QUEUE_LIMIT = 16


@dataclass(frozen=True, slots=True)
class I8042State:
    """The controller's registers and what waits to be read."""

    kind: ClassVar = "i8042"
    version: ClassVar = 1
    command_byte: U8
    output_port: U8
    awaiting: U8
    """The command whose argument comes next, or 0."""
    keyboard_awaiting: U8
    """The same of the keyboard."""
    queue: Annotated[bytes, range(QUEUE_LIMIT + 1)]
    last_was_command: bool
    last: U8


class I8042:
    """Ports 0x60 and 0x64; interrupts by IRQ 1; `reset(source)` when the guest pulses the reset line."""

    state_type = I8042State

    def __init__(self, board: Board, reset: Callable[[str], None]) -> None:
        self._board = board
        self._irq = board.irq_line(layout.KEYBOARD_GSI)
        self._reset_machine = reset
        self.reset()

    def attach(self) -> None:
        self._board.map(Space.PORT, DATA_PORT, 1, _Port(self._read_data, self._write_data), "i8042 data")
        self._board.map(Space.PORT, COMMAND_PORT, 1, _Port(self._read_status, self._write_command), "i8042 command")

    def reset(self) -> None:
        self._command_byte = COMMAND_BYTE_RESET
        self._output_port = RESET_LINE | A20_LINE
        self._awaiting = 0
        """Controller command whose data byte comes next; 0: data goes to the keyboard."""
        self._keyboard_awaiting = 0
        self._queue: deque[int] = deque()
        self._last_was_command = False
        self._last = 0
        self._update()

    def _read_status(self) -> int:
        return (
            (OUTPUT_FULL if self._queue else 0)
            | (SYSTEM_FLAG if self._command_byte & SYSTEM else 0)
            | (LAST_WAS_COMMAND if self._last_was_command else 0)
            | NOT_LOCKED
        )

    def _read_data(self) -> int:
        if self._queue:
            self._last = self._queue.popleft()
            self._irq.set(False)  # the line falls with the buffer, so that the next byte makes an edge
            self._update()
        return self._last

    def _update(self) -> None:
        self._irq.set(bool(self._queue) and bool(self._command_byte & KEYBOARD_INTERRUPT))

    def _put(self, *values: int) -> None:
        for value in values:
            if len(self._queue) < QUEUE_LIMIT:
                self._queue.append(value)
        self._update()

    def _write_command(self, value: int) -> None:
        self._last_was_command = True
        self._awaiting = 0
        match value:
            case _ if READ_COMMAND_BYTE <= value < 0x40:
                self._put(self._command_byte if value == READ_COMMAND_BYTE else 0)
            case _ if WRITE_COMMAND_BYTE <= value < 0x80:
                self._awaiting = value
            case 0xA7 | 0xA8:
                pass  # no second port: its disable bit stays as it is, by which drivers see that
            case 0xA9:
                self._put(AUX_CLOCK_STUCK)
            case 0xAA:
                self._command_byte |= SYSTEM
                self._put(SELF_TEST_PASSED)
            case 0xAB:
                self._put(TEST_PASSED)
            case 0xAD:
                self._command_byte |= KEYBOARD_DISABLED
            case 0xAE:
                self._command_byte &= ~KEYBOARD_DISABLED
            case 0xC0:
                self._put(INPUT_PORT)
            case 0xD0:
                self._put(self._output_port)
            case 0xD1 | 0xD2 | 0xD3 | 0xD4:
                self._awaiting = value
            case _ if value >= PULSE and not value & RESET_LINE:
                self._reset_machine("the keyboard controller")
            case _:
                pass
        self._update()

    def _write_data(self, value: int) -> None:
        self._last_was_command = False
        awaiting, self._awaiting = self._awaiting, 0
        match awaiting:
            case 0:
                self._to_keyboard(value)
            case _ if awaiting == WRITE_COMMAND_BYTE:
                self._command_byte = value | AUX_DISABLED
            case 0xD1:
                self._output_port = value | RESET_LINE
                if not value & RESET_LINE:
                    self._reset_machine("the keyboard controller")
            case 0xD2:
                self._put(value)
            case _:
                pass  # the second port, or controller memory that is not there
        self._update()

    def _to_keyboard(self, value: int) -> None:
        """PS/2 keyboard commands; every byte is acknowledged."""
        if self._keyboard_awaiting:
            command, self._keyboard_awaiting = self._keyboard_awaiting, 0
            self._put(ACK)
            if command == 0xF0 and value == 0:
                self._put(2)  # the scan code set in use
        elif value == 0xFF:
            self._queue.clear()
            self._put(ACK, KEYBOARD_PASSED)
        elif value == 0xEE:
            self._put(0xEE)
        elif value == 0xF2:
            self._put(ACK, *KEYBOARD_ID)
        elif value in WITH_ARGUMENT:
            self._keyboard_awaiting = value
            self._put(ACK)
        elif value in PLAIN:
            self._put(ACK)
        else:
            self._put(RESEND)

    def save(self) -> I8042State:
        return I8042State(
            self._command_byte, self._output_port, self._awaiting, self._keyboard_awaiting, bytes(self._queue),
            self._last_was_command, self._last,
        )  # fmt: skip

    def restore(self, state: I8042State) -> None:
        self._command_byte, self._output_port = state.command_byte, state.output_port
        self._awaiting, self._keyboard_awaiting = state.awaiting, state.keyboard_awaiting
        self._queue = deque(state.queue)
        self._last_was_command, self._last = state.last_was_command, state.last
        self._update()


class _Port:
    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read, self._write = read, write

    def read(self, offset: int, size: int) -> int:
        return self._read()

    def write(self, offset: int, size: int, value: int) -> None:
        self._write(value)


def attach(assembly: Assembly) -> None:
    device = I8042(assembly.board, assembly.services.reset.trigger)
    device.attach()
    assembly.add("i8042", device)
