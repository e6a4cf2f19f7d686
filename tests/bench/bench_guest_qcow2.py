"""fio in a Debian kernel on qcow2 disks, and the same under QEMU's TCG with its qcow2; else as bench_guest_io.

Three kinds: every cluster has its place; none has; all are read from a raw backing file. Of the last two each turn that
writes has a part of the disk that nobody wrote to before. Takes about ten minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from tests.bench.guestpair import FIO, LAPS, NEEDED, busy, laps, pair, report
from tests.support import programs
from vmm import disks

PART_MIB = 128
"""Of the disk, for each turn."""
PARTS = 1 + 2 * 2 * (1 + LAPS)
"""The first is read; two loads, two kinds of writing, one turn that does not count."""


def make(kind: str, folder: Path, path: Path) -> None:
    """An image of this kind."""
    if kind == "qcow2":
        disks.convert(folder / "data.img", str(path))
    else:
        backing = "data.img" if kind == "qcow2 over raw" else None
        disks.create_disk(str(path), PARTS * PART_MIB << 20, backing=backing)


def rows() -> Iterator[dict[str, object]]:
    """Each measurement on our core, and its ratio to QEMU's."""
    missing = programs.missing(NEEDED)
    if missing:
        yield {"name": "guest fio on qcow2", "value": None, "unit": "", "note": f"not here: {', '.join(missing)}"}
        return
    for kind in ("qcow2", "empty qcow2", "qcow2 over raw"):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
            folder = Path(name)
            parts = {"qcow2": 1, "empty qcow2": 0, "qcow2 over raw": PARTS}[kind]
            with open(folder / "data.img", "wb") as file:
                for _ in range(parts):
                    file.write(os.urandom(PART_MIB << 20))
            images = [folder / "ours.qcow2", folder / "theirs.qcow2"]
            for path in images:
                make(kind, folder, path)
            files = images if kind == "qcow2" else [*images, folder / "data.img"]
            first = None if kind == "qcow2" else count(PART_MIB, PART_MIB)
            with pair(folder, images, "qcow2", None) as guests:
                for wanted in (False, True):
                    with busy(wanted):
                        found = laps(guests, list(FIO), files, PART_MIB, first)
                    yield from report(found, FIO, f", {kind}" + (", one processor busy" if wanted else ""))


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
