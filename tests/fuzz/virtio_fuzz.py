"""Hostile drivers against every virtio device for a given time: `python -m tests.fuzz.virtio_fuzz SECONDS [SEED]`.

The campaigns are those of tests/property/test_virtio_devices.py; a failure prints the device, transport and seed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.property.test_virtio_devices import DEVICES, both_disks, campaign


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    first = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFFFFFF
    logging.disable(logging.WARNING)
    end = time.monotonic() + seconds
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in itertools.count(first):
            for name in DEVICES:
                for kind in ("pci", "mmio"):
                    if time.monotonic() >= end:
                        sys.stdout.write(f"virtio: {done} campaigns from seed {first}, nothing but GuestError\n")
                        return 0
                    try:
                        asyncio.run(campaign(name, kind, seed, Path(folder)))
                    except BaseException:
                        sys.stdout.write(f"virtio: {name} over {kind}, seed {seed} failed\n")
                        raise
                    done += 1
            asyncio.run(both_disks(seed, Path(folder)))
    return 1


if __name__ == "__main__":
    sys.exit(main())
