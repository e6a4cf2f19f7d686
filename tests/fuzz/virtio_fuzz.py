"""Hostile drivers against every virtio device for a given time: `python -m tests.fuzz.virtio_fuzz SECONDS [SEED]`.

The campaigns are those of tests/support/hostile.py; one that fails is named by its device, transport and seed. Odd
seeds run on uvloop, even ones on asyncio's own loop. What is left open after a campaign is a failure as well.
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
from typing import Any

import uvloop

from tests.property.test_virtio_devices import both_disks
from tests.support.hostile import WORLDS, campaign

EVERY = 25
"""Campaigns between two looks for what was left open."""


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


def run(work: Coroutine[Any, Any, None], seed: int) -> None:
    """On the loop that is this seed's."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if seed % 2 else asyncio.new_event_loop) as runner:
        runner.run(work)


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    first = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFFFFFF
    logging.disable(logging.WARNING)
    end = time.monotonic() + seconds
    done = 0
    leaks = Leaks()
    with tempfile.TemporaryDirectory() as folder:
        for seed in itertools.count(first):
            for name in WORLDS:
                for kind in ("pci", "mmio"):
                    if time.monotonic() >= end:
                        sys.stdout.write(f"virtio: {done} campaigns from seed {first}, nothing but GuestError\n")
                        return 0
                    try:
                        run(campaign(name, kind, seed, Path(folder)), seed)
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
