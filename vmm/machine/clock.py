"""The clock of one machine: its core's time (real or virtual), and timers on it. Loop thread."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol


class TimeSource(Protocol):
    """The part of cpu.contract.Vm that keeps time."""

    def now_ns(self) -> int: ...
    def set_alarm(self, deadline_ns: int | None) -> None: ...


class Timer:
    """A pending call (vmm.machine.interfaces.TimerHandle)."""

    __slots__ = ("callback", "cancelled", "deadline_ns")

    def __init__(self, deadline_ns: int, callback: Callable[[], None]) -> None:
        self.deadline_ns = deadline_ns
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class MachineClock:
    """Time since the machine's start, wall time from `epoch_ns` on, and timers in order of (deadline, creation).

    Cancelled timers are dropped when they reach the front or when they outnumber the live ones, so a guest that
    re-arms a timer at will does not make the queue grow.
    """

    def __init__(self, source: TimeSource, epoch_ns: int) -> None:
        self._source = source
        self._queue: list[tuple[int, int, Timer]] = []
        self._count = 0
        self._alarm: int | None = None
        self.epoch_ns = epoch_ns
        self.now_ns = source.now_ns

    def wall_ns(self) -> int:
        return self.epoch_ns + self._source.now_ns()

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> Timer:
        """Run `callback` on the loop once now_ns() >= deadline_ns, also if that is past already."""
        if len(self._queue) >= 64 and sum(entry[2].cancelled for entry in self._queue) * 2 > len(self._queue):
            self._queue = [entry for entry in self._queue if not entry[2].cancelled]
            heapq.heapify(self._queue)
        timer = Timer(deadline_ns, callback)
        self._count += 1
        heapq.heappush(self._queue, (deadline_ns, self._count, timer))
        if self._queue[0][2] is timer:
            self._set_alarm(deadline_ns)
        return timer

    def expire(self) -> None:
        """Run what is due and set the core's alarm for the next (on AlarmDue)."""
        self._alarm = None
        now = self._source.now_ns()
        due = []
        while self._queue and (self._queue[0][2].cancelled or self._queue[0][0] <= now):
            due.append(heapq.heappop(self._queue)[2])
        for timer in due:
            if not timer.cancelled:
                timer.callback()
        if self._queue:
            self._set_alarm(self._queue[0][0])

    def _set_alarm(self, deadline_ns: int) -> None:
        if deadline_ns != self._alarm:
            self._alarm = deadline_ns
            self._source.set_alarm(deadline_ns)
