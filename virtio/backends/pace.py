"""How fast a job moves data: so many bytes a second, which may change meanwhile. Loop thread."""

from __future__ import annotations

import asyncio
from contextlib import suppress

STEP = 16 << 20
"""Bytes that are moved before a cancellation is noticed."""
SMALLEST = 64 << 10
STEPS_A_SECOND = 8
"""Of a job that is slowed down, so that it goes evenly."""


class JobPace:
    """The speed of one job."""

    def __init__(self, speed: int = 0) -> None:
        """`speed`: bytes a second; 0: as fast as it goes."""
        self._speed = speed
        self._due = 0.0
        self._changed = asyncio.Event()

    @property
    def speed(self) -> int:
        return self._speed

    @speed.setter
    def speed(self, value: int) -> None:
        self._speed, self._due = value, 0.0
        self._changed.set()

    @property
    def step(self) -> int:
        """Bytes to be moved at once."""
        if not self._speed:
            return STEP
        return min(max(self._speed // STEPS_A_SECOND // SMALLEST * SMALLEST, SMALLEST), STEP)

    async def passed(self, count: int) -> None:
        """So many bytes were moved: until more may be."""
        now = asyncio.get_running_loop().time
        self._due = max(self._due, now()) + (count / self._speed if self._speed else 0.0)
        while self._speed and (wait := self._due - now()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)
