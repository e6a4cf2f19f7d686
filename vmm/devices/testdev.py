"""Devices for processor test suites: interrupt lines that they drive, memory of an I/O device, and a port that makes
the processor forget a page. Only with `testdev`.

Ports and addresses are those of QEMU's pc-testdev, as kvm-unit-tests use them; the exit port of the same suites is
vmm/devices/debug.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

from cpu.contract import Space
from cpu.values import dataclass
from vmm.machine.interfaces import Assembly, Board, IrqLine
from vmm.machine.lines import GSI_COUNT

LINES = 0x2000
"""A port for each GSI: a write of anything but 0 raises the line, 0 lowers it."""
IO_RAM, IO_RAM_SIZE = 0xE0, 4
FLUSH = 0xE4
"""A 32-bit write of a guest-physical address: whatever is kept about that page is to be forgotten."""
MEMORY, MEMORY_SIZE = 0xFF00_0000, 0x1_0000
"""Memory that is a device's, so that each access leaves the processor."""
PAGE = 4096


class Ram:
    """`size` bytes that keep what was written, for accesses of any width."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.data[offset : offset + size] = value.to_bytes(size, "little")


class _Lines:
    def __init__(self, lines: list[IrqLine]) -> None:
        self._lines = lines
        self.levels = [False] * len(lines)

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.levels[offset] = bool(value)
        self._lines[offset].set(bool(value))


class _Flush:
    def __init__(self, written: Callable[[int, int], None]) -> None:
        self._written = written

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._written(value & ~(PAGE - 1), PAGE)


def exactly(count: int) -> range:
    """The lengths that a state's field may have."""
    return range(count, count + 1)


@dataclass(frozen=True, slots=True)
class TestDeviceState:
    """Levels of the lines, the I/O RAM, the memory."""

    __test__ = False

    kind: ClassVar = "testdev"
    version: ClassVar = 1
    levels: Annotated[tuple[bool, ...], exactly(GSI_COUNT)]
    ports: Annotated[bytes, exactly(IO_RAM_SIZE)]
    memory: Annotated[bytes, exactly(MEMORY_SIZE)]


class TestDevice:
    """All of it. `written(gpa, length)` makes the core forget what it keeps about a range."""

    __test__ = False
    state_type = TestDeviceState

    def __init__(self, board: Board, written: Callable[[int, int], None]) -> None:
        self._lines = _Lines([board.irq_line(gsi) for gsi in range(GSI_COUNT)])
        self._ports, self._memory = Ram(IO_RAM_SIZE), Ram(MEMORY_SIZE)
        board.map(Space.PORT, LINES, GSI_COUNT, self._lines, "testdev lines")
        board.map(Space.PORT, IO_RAM, IO_RAM_SIZE, self._ports, "testdev I/O RAM")
        board.map(Space.PORT, FLUSH, 4, _Flush(written), "testdev flush")
        board.map(Space.MMIO, MEMORY, MEMORY_SIZE, self._memory, "testdev memory")

    def reset(self) -> None:
        for offset in range(GSI_COUNT):
            self._lines.write(offset, 1, 0)
        for ram in (self._ports, self._memory):
            ram.data[:] = bytes(len(ram.data))

    def save(self) -> TestDeviceState:
        return TestDeviceState(tuple(self._lines.levels), bytes(self._ports.data), bytes(self._memory.data))

    def restore(self, state: TestDeviceState) -> None:
        for offset, level in enumerate(state.levels):
            self._lines.write(offset, 1, level)
        self._ports.data[:], self._memory.data[:] = state.ports, state.memory


def attach(assembly: Assembly) -> None:
    """Component "testdev", where it was asked for."""
    if assembly.config.testdev:
        assembly.add("testdev", TestDevice(assembly.board, assembly.memory.written))
