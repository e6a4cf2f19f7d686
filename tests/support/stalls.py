"""How long the loop's thread keeps others waiting, seen from another thread; and how much memory the process has."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Self

PERIOD = 0.002
STUCK = 2.0
"""Seconds after which the loop's stack is taken, so that a failure shows what it was doing."""


class StallWatch:
    """In `async with`: asks the loop for a sign of life every 2 ms, from a thread of its own.

    `longest` is the loop's own work, in seconds of its thread's processor time, so that it does not tell of other
    processes of a busy host; `longest_wall` is what a clock on the wall shows. The loop's thread itself notes when it
    answers: the watching thread may wait 5 ms (sys.getswitchinterval) for the interpreter's lock before it hears of the
    answer, and the loop does many turns meanwhile."""

    def __init__(self) -> None:
        self.longest = self.longest_wall = 0.0
        self.stack = ""
        """What the loop was doing in a stall of more than STUCK seconds."""
        self._answered = threading.Event()
        self._answer = 0.0, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._id = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._id)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        while self._thread.is_alive():
            await asyncio.sleep(PERIOD)

    def restart(self) -> tuple[float, float]:
        """(longest, longest_wall) so far; they begin anew."""
        found = self.longest, self.longest_wall
        self.longest = self.longest_wall = 0.0
        return found

    def _respond(self) -> None:
        """In the loop's thread: what its clocks show, (monotonic, processor time)."""
        self._answer = time.monotonic(), time.thread_time()
        self._answered.set()

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            self._answered.clear()
            began, worked = time.monotonic(), time.clock_gettime(self._clock)
            try:
                self._loop.call_soon_threadsafe(self._respond)
            except RuntimeError:  # the loop is closed
                return
            while not self._answered.wait(STUCK):
                if self._over.is_set():
                    return
                frame = sys._current_frames().get(self._id)
                self.stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
            self.longest = max(self.longest, self._answer[1] - worked)
            self.longest_wall = max(self.longest_wall, self._answer[0] - began)


def resident(*, collect: bool = True) -> int:
    """Bytes of memory that this process has now; with `collect`, which takes its time, without what is garbage."""
    if collect:
        gc.collect()
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def milliseconds(seconds: list[float]) -> str:
    """Median and greatest, as text."""
    return f"median {statistics.median(seconds) * 1e3:.2f} ms, longest {max(seconds) * 1e3:.2f} ms"
