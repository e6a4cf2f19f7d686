"""fio and iperf3 in a Debian kernel on the software core, and the same kernel, disk and tap under QEMU's TCG.

By turns (guestpair), BENCH_GUEST_LAPS times each, with one vCPU, the same cache mode, and a disk that is clean and in
the page cache at the start of each turn; on the host as it is, and beside one process that only calculates. Shown are
our median and the median of the turns' ratios. Takes about four minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.guestpair import FIO, IPERF, NEEDED, busy, laps, pair, report, taps
from tests.support import programs

SIZE_MIB = 256


def rows() -> Iterator[dict[str, object]]:
    """Each measurement on our core, and its ratio to QEMU's."""
    missing = programs.missing(NEEDED)
    if missing:
        yield {"name": "guest fio and iperf3", "value": None, "unit": "", "note": f"not here: {', '.join(missing)}"}
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, taps() as nets:
        folder = Path(name)
        disks = [folder / "ours.img", folder / "theirs.img"]
        for disk in disks:
            disk.write_bytes(os.urandom(SIZE_MIB << 20))
        labels = {**FIO, **IPERF} if nets else FIO
        if not nets:
            yield {"name": "guest iperf3", "value": None, "unit": "", "note": "needs root for a tap"}
        with pair(folder, disks, "raw", nets) as guests:
            for wanted in (False, True):
                with busy(wanted):
                    found = laps(guests, list(labels), disks, SIZE_MIB)
                yield from report(found, labels, ", one processor busy" if wanted else "")


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
