"""How much memory this process has, part by part, as the kernel counts it (proc(5), smaps)."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping of the process: its addresses, and bytes."""

    start: int
    end: int
    pss: int
    """Its pages, each divided by how many mappings share it."""
    private: int
    """Pages that no other mapping has."""


def mappings(pid: int | str = "self") -> Iterator[Mapping]:
    """Every mapping of a process."""
    bounds, values = (0, 0), dict[str, int]()
    for line in [*Path(f"/proc/{pid}/smaps").read_text().splitlines(), "0-0 "]:
        if match := _RANGE.match(line):
            if values:
                private = values["Private_Clean"] + values["Private_Dirty"]
                yield Mapping(*bounds, values["Pss"], private)
            bounds, values = (int(match[1], 16), int(match[2], 16)), {}
        else:
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                values[name] = int(value[:-3]) << 10


def address(view: memoryview) -> int:
    """Where a writable buffer stands."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def split(found: Iterable[Mapping], ranges: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(PSS of what is outside the address ranges, private bytes inside)."""
    spans = list(ranges)
    outside = inside = 0
    for mapping in found:
        if any(start <= mapping.start < end for start, end in spans):
            inside += mapping.private
        else:
            outside += mapping.pss
    return outside, inside
