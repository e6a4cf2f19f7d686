"""Where breakpoints go: into the core, the processor's four debug registers, or guest memory as INT3.

A core with Capability.BREAKPOINTS takes all of them. Another has four debug registers, each for 1, 2, 4 or 8 aligned
bytes (SDM vol. 3, 18.2), for watched ranges and hardware breakpoints; other breakpoints are INT3 instructions, which
stand in memory only while the guest runs, and never while its state is saved or copied. A KVM that interprets
supervisor code cannot execute INT3 (it has no Capability.STOCK_KERNELS): there all are in debug registers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from cpu.contract import Capability
from cpu.debug import MAX_POINTS, Point, PointKind
from cpu.values import dataclass
from vmm.errors import ConfigError, GuestError
from vmm.machine.memory import GuestMemory

REGISTERS = 4
INT3 = b"\xcc"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A breakpoint as a debugger asks for it. `memory`: INT3 will do, at guest-physical address `gpa`."""

    point: Point
    memory: bool = False
    gpa: int | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """What each vCPU is given, and guest-physical addresses by the linear ones at which INT3 stands there."""

    points: tuple[Point, ...]
    int3: dict[int, int]


def pieces(point: Point) -> list[Point]:
    """A watched range as aligned parts of 8, 4, 2 or 1 bytes."""
    if point.kind is PointKind.EXECUTE:
        return [Point(PointKind.EXECUTE, point.address, 1)]
    found: list[Point] = []
    at, end = point.address, point.address + point.length
    while at < end and len(found) <= REGISTERS:
        size = next(size for size in (8, 4, 2, 1) if at % size == 0 and at + size <= end)
        found.append(Point(point.kind, at, size))
        at += size
    return found


def place(wanted: Iterable[Wanted], capabilities: Container[Capability]) -> Placed:
    """Raises ConfigError if there are more than a core with these capabilities has."""
    ordered = list(wanted)
    if len(ordered) > MAX_POINTS:
        raise ConfigError(f"breakpoints: {len(ordered)} are too many; {MAX_POINTS} is the limit")
    if Capability.BREAKPOINTS in capabilities:
        return Placed(tuple(each.point for each in ordered), {})
    registers: list[Point] = []
    int3: dict[int, int] = {}
    for each in ordered:
        if each.memory and each.gpa is not None and Capability.STOCK_KERNELS in capabilities:
            int3[each.point.address] = each.gpa
        else:
            registers += pieces(each.point)
    if len(registers) > REGISTERS:
        raise ConfigError(
            f"breakpoints: these breakpoints and watched ranges need {len(registers)} debug registers; "
            f"this core has {REGISTERS}"
        )
    return Placed(tuple(registers), int3)


class Patches:
    """INT3 instructions in guest memory."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._original: dict[int, bytes] = {}

    def insert(self, addresses: Iterable[int]) -> None:
        """At guest-physical addresses; what is not RAM any more is left out."""
        for gpa in addresses:
            if gpa not in self._original:
                try:
                    original = self._memory.read(gpa, 1)
                    self._memory.write(gpa, INT3)
                except GuestError:
                    continue
                self._original[gpa] = original

    def remove(self) -> None:
        """All of them, but where the guest wrote something else meanwhile."""
        for gpa, original in self._original.items():
            if self._memory.read(gpa, 1) == INT3:
                self._memory.write(gpa, original)
        self._original.clear()
