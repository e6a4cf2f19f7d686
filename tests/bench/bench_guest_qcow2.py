"""fio in a Debian kernel on qcow2 disks, and the same under QEMU's TCG with its qcow2; else as bench_guest_io.

Three kinds: every cluster has its place; none has; all are read from a raw backing file. The images are made anew for
each turn. Needs fio, mke2fs and QEMU on the host.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.bench_guest_io import LAPS, MEASURED, build_root, ours, parse, qemu, settle
from tests.support import programs
from vmm import disks

SIZE = 256 << 20


def kinds(folder: Path) -> dict[str, Callable[[str], None]]:
    """What makes an image of each kind at a path."""
    raw = str(folder / "data.img")
    return {
        "qcow2": lambda path: disks.convert(raw, path),
        "empty qcow2": lambda path: disks.create_disk(path, SIZE),
        "qcow2 over raw": lambda path: disks.create_disk(path, SIZE, backing="data.img"),
    }


def rows() -> Iterator[dict[str, object]]:
    """Each measurement on our core, under TCG, and the ratio."""
    missing = programs.missing(("fio", "iperf3", "mke2fs", "qemu-system-x86_64"))
    if missing:
        yield {"name": "guest fio on qcow2", "value": None, "unit": "", "note": f"not here: {', '.join(missing)}"}
        return
    from images import catalog

    image = catalog.resolve("linux", build=True)
    assert image.initrd is not None
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        root, data = build_root(folder), folder / "data.img"
        data.write_bytes(os.urandom(SIZE))
        for kind, make in kinds(folder).items():
            pairs: list[tuple[dict[str, float], dict[str, float]]] = []
            for _ in range(LAPS):
                both = []
                for run in ("ours", "qemu"):
                    disk = folder / "disk"
                    make(str(disk))
                    subprocess.run(["sync", disk], check=True)
                    settle(root, data, disk)
                    arguments = (image.kernel, image.initrd, root, disk, None, "qcow2")
                    both.append(parse(asyncio.run(ours(*arguments)) if run == "ours" else qemu(*arguments)))
                pairs.append((both[0], both[1]))
            for key, (label, unit) in MEASURED.items():
                found = [(one[key], two[key]) for one, two in pairs if one.get(key) and two.get(key)]
                if found:
                    mine, theirs = (statistics.median(values) for values in zip(*found, strict=True))
                    yield {"name": f"{label}, {kind}", "value": mine, "unit": unit, "better": "more"}
                    yield {
                        "name": f"{label}, {kind}, ratio to QEMU TCG",
                        "value": round(statistics.median(one / two for one, two in found), 2),
                        "unit": "×",
                        "better": "more",
                        "goal": 1.0,
                        "note": f"{theirs} there",
                    }


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
