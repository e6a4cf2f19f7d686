"""What a debugger asks of a core: breakpoints, steps, what a vCPU did last. Frozen values and how they are packed.

Apart from cpu/contract.py because only debuggers import it. Layouts: struct lv_debug, lv_trace_entry and lv_past_exit
of cpu/native/loop.h.
"""

from __future__ import annotations

import enum
import struct

from cpu.exits import (
    Debug,
    Exit,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Shutdown,
    SystemEvent,
)
from cpu.values import dataclass

MAX_POINTS = 1024
MAX_LENGTH = 1 << 20
_HEAD = struct.Struct("<II")
_POINT = struct.Struct("<QII")
_TRACE = struct.Struct("<QQII")
_PAST = struct.Struct("<QQQIBBBB")
_CLASSES: tuple[type[Exit], ...] = (
    PortIn, PortOut, MmioRead, MmioWrite, Halt, Shutdown, SystemEvent, FailEntry, InternalError, Debug, Interrupted,
)  # fmt: skip


class PointKind(enum.IntEnum):
    """What stops at a point. READ alone is known to cores with Capability.BREAKPOINTS; others take it as ACCESS."""

    EXECUTE = 0
    WRITE = 1
    READ = 2
    ACCESS = 3


@dataclass(frozen=True, slots=True)
class Point:
    """A breakpoint (before the instruction at `address` is executed) or a watched range (after an instruction touched
    it). Linear addresses; `length` in bytes, at most MAX_LENGTH, without meaning for EXECUTE."""

    kind: PointKind
    address: int
    length: int = 1


@dataclass(frozen=True, slots=True)
class Debugging:
    """What one vCPU is debugged with."""

    step: bool = False
    """Park with Debug after one instruction, or when an interrupt or exception was delivered to the vCPU before it
    (KVM: after the first instruction of its handler). Points do not stop the instruction that is stepped (KVM: they
    do)."""
    frozen: bool = False
    """Execute nothing although resumed, until kicked. For running some vCPUs alone: with the virtual clock time goes on
    only while every vCPU is resumed."""
    hold_interrupts: bool = False
    """Deliver neither interrupts nor NMIs, unless the vCPU sleeps in HLT (KVM: Linux 5.16 and later)."""
    int3: bool = False
    """INT3 parks with Debug (exception 3, rip at the INT3), and the guest gets no #BP."""
    give_int3: bool = False
    """The guest gets the #BP of the INT3 at its rip. (KVM; another core lets it run on without `int3`.)"""
    points: tuple[Point, ...] = ()

    def pack(self) -> bytes:
        """struct lv_debug."""
        flags = self.step | self.frozen << 1 | self.hold_interrupts << 2 | self.int3 << 3 | self.give_int3 << 4
        points = b"".join(_POINT.pack(point.address, point.length, point.kind) for point in self.points)
        return _HEAD.pack(flags, len(self.points)) + points


class TraceKind(enum.IntEnum):
    """What an entry of a trace is about."""

    BLOCK = 0
    """Straight-line code: to its end, or to a fault in it."""
    STEP = 1
    """One instruction."""
    EVENT = 2
    """An interrupt or exception was delivered."""


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """Something that a vCPU executed. `address`: linear, of the first instruction (EVENT: of the interrupted one);
    `instructions`: that the vCPU had retired before; `count`: how often in a row (EVENT: the vector)."""

    kind: TraceKind
    address: int
    instructions: int
    count: int


@dataclass(frozen=True, slots=True)
class PastExit:
    """An exit that was: of which class of cpu.exits, `address` its port or guest-physical address (no access: rip),
    `value` what was written or read. `waits`: it is not answered yet; `core`: the core answered by itself (posted,
    shadow, ioeventfd), `repeats` times in a row. `age_ns`: how long ago the last time was (`core`: to within
    milliseconds)."""

    kind: type[Exit]
    address: int
    size: int
    value: int
    repeats: int
    age_ns: int
    waits: bool
    core: bool


def unpack_trace(blob: bytes) -> list[TraceEntry]:
    """An array of struct lv_trace_entry."""
    return [
        TraceEntry(TraceKind(kind), address, instructions, count)
        for address, instructions, count, kind in _TRACE.iter_unpack(blob)
    ]


def unpack_past(now: int, blob: bytes) -> list[PastExit]:
    """An array of struct lv_past_exit, with what CLOCK_MONOTONIC says now."""
    return [
        PastExit(_CLASSES[kind], address, size, value, repeats, max(0, now - ns), done == 0, done == 2)
        for ns, address, value, repeats, kind, size, done, _ in _PAST.iter_unpack(blob)
    ]
