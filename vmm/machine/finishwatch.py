"""Warns when the host's KVM gives up so many of a guest's instructions that the machine is slow. Loop thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cpu.contract import Vm

INTERVAL_S = 1.0
LIMIT = 500
"""Instructions a second above which it warns. Each takes 0.3 ms, so that these are a seventh of a processor's time."""
QUIET_S = 300.0
"""Seconds between two warnings, at least."""


class FinishWatch:
    """Looks at the counter of finished instructions once a second."""

    def __init__(
        self,
        vm: Vm,
        stats: Callable[[], dict[str, int]],
        warn: Callable[[str], None],
        *,
        limit: int = LIMIT,
        quiet: float = QUIET_S,
    ) -> None:
        """`stats` counts the instructions as "finished" until the machine is closed. `warn` gets one line; the next one
        no sooner than `quiet` seconds later."""
        self._vm, self._stats, self._warn, self._limit, self._quiet = vm, stats, warn, limit, quiet
        self._timer: asyncio.TimerHandle | None = None
        self._seen, self._at = 0, time.monotonic()
        self._said: float | None = None

    def start(self) -> None:
        self._at = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._look)

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Look no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        count, now = self._stats().get("finished"), time.monotonic()
        if count is None:
            return
        rate = (count - self._seen) / (now - self._at)
        self._seen, self._at = count, now
        if rate > self._limit and (self._said is None or now - self._said >= self._quiet):
            self._said = now
            one = self._vm.last_finished().hex(" ") or "unreadable"
            self._warn(
                f"the host's KVM gave up {rate:.0f} instructions in a second, {count} in all, and the software core "
                f"executed them, slowly; one is {one}; without KVM: --core soft"
            )
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._look)
