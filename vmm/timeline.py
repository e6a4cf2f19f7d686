"""When a machine did what: moments by the host's monotonic clock, and the phases that lie between them.

Host moments are taken where they happen. Guest moments are what the host sees of the guest: its first exit, its first
console byte, the words that our /init writes to port 0x80 (vmm/devices/post.py), the agent's hello on vsock. Loop
thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

PHASES: tuple[tuple[str, str, str, str], ...] = (
    ("python", "host", "exec", "begin"),
    ("image", "host", "begin", "configured"),
    ("loop", "host", "configured", "enter"),
    ("build", "host", "enter", "built"),
    ("unpack", "host", "load", "loaded"),
    ("kernel", "guest", "resume", "init"),
    ("init", "guest", "init", "root"),
    ("system", "guest", "root", "agent"),
    ("command", "guest", "command", "status"),
    ("close", "host", "end", "closed"),
)
"""(phase, where it is spent, the moment at which it begins, the moment at which it ends)"""
ALONE = ("first exit", "first console byte", "first output")
"""Moments that no phase begins or ends with."""


class Phase(NamedTuple):
    """Seconds since the timeline's first moment; `where` the time is spent: "host" or "guest"."""

    name: str
    where: str
    begin: float
    end: float
    processor: float
    """Seconds of processor time that all threads of this process took meanwhile."""


class Moment(NamedTuple):
    """`seconds` since the timeline's first moment."""

    name: str
    seconds: float


class Timeline:
    """The moments of a machine's start and end. Of each name the first counts, so reboots in place change nothing."""

    def __init__(self) -> None:
        self._moments: dict[str, tuple[int, int]] = {}
        """When, and how much processor time the process had taken by then, ns."""
        self.on_mark: Callable[[str], None] | None = None
        """Called with the name of each moment when it comes."""

    def mark(self, name: str, at: tuple[int, int] | None = None) -> None:
        """It happens now, or happened `at` a moment that now() told."""
        if name not in self._moments:
            self._moments[name] = now() if at is None else at
            if self.on_mark is not None:
                self.on_mark(name)

    @property
    def moments(self) -> list[Moment]:
        """Every moment so far, in order."""
        ordered = sorted(self._moments.items(), key=lambda item: item[1][0])
        return [Moment(name, (at - ordered[0][1][0]) / 1e9) for name, (at, _) in ordered]

    def phases(self) -> list[Phase]:
        """The phases of which both ends are known, in order of their beginning."""
        at = dict(self.moments)

        def processor(begin: str, end: str) -> float:
            return (self._moments[end][1] - self._moments[begin][1]) / 1e9

        known = [entry for entry in PHASES if entry[2] in at and entry[3] in at]
        found = [Phase(name, where, at[a], at[b], processor(a, b)) for name, where, a, b in known]
        return sorted(found, key=lambda phase: phase.begin)

    def to_dict(self) -> dict[str, Any]:
        """{"moments": {name: seconds}, "phases": [{"name", "where", "begin", "end", "processor"}]}, for JSON."""
        return {"moments": dict(self.moments), "phases": [phase._asdict() for phase in self.phases()]}


def now() -> tuple[int, int]:
    """This moment: of time.monotonic_ns(), and of time.process_time_ns()."""
    return time.monotonic_ns(), time.process_time_ns()


def process_start() -> tuple[int, int]:
    """When this process was started; the kernel tells it in clock ticks, so up to 10 ms early. Raises OSError without
    /proc."""
    import os

    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])  # proc(5): starttime, the 22nd field
    since_boot = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - since_boot), 0
