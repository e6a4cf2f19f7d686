"""A clock that a test moves."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Call:
    """A timer of SteppedClock."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class SteppedClock:
    """Time stands still until `step` moves it to the next timer. virtio.protocols.DeviceClock."""

    def __init__(self) -> None:
        self.now = 0
        self.fired = 0
        """Timers that have come."""
        self._calls: list[tuple[int, int, Call]] = []
        self._count = 0

    def now_ns(self) -> int:
        return self.now

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> Call:
        self._count += 1
        call = Call(callback)
        heapq.heappush(self._calls, (deadline_ns, self._count, call))
        return call

    def step(self) -> bool:
        """On to the next timer, which is called. False: there is none."""
        while self._calls:
            deadline, _, call = heapq.heappop(self._calls)
            if call.callback is not None:
                self.now = max(self.now, deadline)
                self.fired += 1
                call.callback()
                return True
        return False
