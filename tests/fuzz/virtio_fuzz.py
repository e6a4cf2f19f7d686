"""Hostile drivers against every virtio device for a given time: `python -m tests.fuzz.virtio_fuzz SECONDS [SEED]`.

The campaigns are those of tests/support/hostile.py; one that fails is named by its device, transport and seed. Odd
seeds run on uvloop, even ones on asyncio's own loop. Failures as well: what is left open after a campaign, a turn of
the loop that takes long (STALL), and memory that the process does not give back.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from tests.property.test_virtio_devices import both_disks
from tests.support.hostile import WORLDS, campaign
from tests.support.stalls import milliseconds, resident

T = TypeVar("T")

EVERY = 25
"""Campaigns between two looks for what was left open."""


WARM = 100
"""Campaigns after which the process has grown to its size."""
GROWTH = 96 << 20
"""Bytes that it may grow then. A campaign has 16 MiB of guest memory at most, twice that when it moves."""


STALL = 0.25
"""Seconds of processor time that a turn of the loop may take. Most of it is the campaign's own: it builds requests."""


class Memory:
    """What the process has, after each campaign."""

    def __init__(self) -> None:
        self.base = self.greatest = 0

    def check(self, done: int) -> None:
        if done > WARM and done % EVERY:
            return  # looking is dear, since what is garbage is thrown away first
        now = resident()
        self.greatest = max(self.greatest, now)
        if done <= WARM:
            self.base = max(self.base, now)
        elif now > self.base + GROWTH:
            raise AssertionError(f"the process has grown from {self.base >> 20} to {now >> 20} MiB")


class Leaks:
    """Descriptors, streams and tasks that were dropped instead of closed."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        warnings.simplefilter("error", ResourceWarning)
        sys.unraisablehook = self._found

    def _found(self, what: Any) -> None:
        self.seen.append(f"{what.exc_value!r} ({what.object!r})")

    def check(self) -> None:
        gc.collect()
        if self.seen:
            raise AssertionError("left open: " + "\n".join(self.seen))


def run(work: Coroutine[Any, Any, T], seed: int) -> T:
    """On the loop that is this seed's."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if seed % 2 else asyncio.new_event_loop) as runner:
        return runner.run(work)


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    first = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFFFFFF
    logging.disable(logging.WARNING)
    end = time.monotonic() + seconds
    done = 0
    leaks, memory, stalls = Leaks(), Memory(), [0.0]
    with tempfile.TemporaryDirectory() as folder:
        for seed in itertools.count(first):
            for name in WORLDS:
                for kind in ("pci", "mmio"):
                    if time.monotonic() >= end:
                        sys.stdout.write(
                            f"virtio: {done} campaigns from seed {first}, nothing but GuestError; a turn of the loop "
                            f"{milliseconds(stalls)}; memory {memory.base >> 20} MiB, later {memory.greatest >> 20}\n"
                        )
                        return 0
                    try:
                        watch = run(campaign(name, kind, seed, Path(folder)), seed)
                        stalls.append(watch.longest)
                        assert watch.longest < STALL, f"the loop stood still for {watch.longest:.3f} s\n{watch.stack}"
                        memory.check(done)
                        if done % EVERY == 0:
                            leaks.check()
                    except BaseException:
                        sys.stdout.write(f"virtio: {name} over {kind}, seed {seed} failed; what was left open may be\n")
                        sys.stdout.write(f"of one of the {EVERY} campaigns before\n")
                        raise
                    done += 1
            run(both_disks(seed, Path(folder)), seed)
    return 1


if __name__ == "__main__":
    sys.exit(main())
