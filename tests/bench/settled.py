"""Waits until memory that machines give back when they sleep has been given back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SECONDS = 3.0
"""So long nothing must have become less: a kernel's timers wake a machine every second or so, and it gives memory back
a quarter of a second after it sleeps again (cpu/soft/run/vm.c)."""
LESS = 64 << 10
"""Bytes that count as less."""


async def settled(measure: Callable[[], T], amount: Callable[[T], int]) -> T:
    """What `measure` finds when the bytes that `amount` takes of it have become no less for SECONDS."""
    least = amount(measure())
    since = time.monotonic()
    while time.monotonic() - since < SECONDS:
        await asyncio.sleep(0.2)
        now = amount(measure())
        if now <= least - LESS:
            least, since = now, time.monotonic()
    return measure()
