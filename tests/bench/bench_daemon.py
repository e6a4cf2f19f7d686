"""Many machines in one daemon: 200 defined, 50 of them running tiny guests, asked by virsh.

Times are of virsh's whole run, most of which is the program's own start; `version` is the same without looking at any
domain. The daemon's processor time is what a busy host does not change. Memory is the daemon's proportional share
(Pss).
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.libvirtd import DaemonProcess, tiny

DEFINED, RUNNING, ROUNDS = 200, 50, 20
GOAL_MS = 100.0
TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")


def processor_ms(pid: int) -> float:
    """What a process has used so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) * TICK_MS


def memory_kib(pid: int) -> int:
    """What a process holds, with its share of what several hold."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def rows() -> Iterator[dict[str, object]]:
    """The figures."""
    if shutil.which("virsh") is None:
        yield {"name": "many domains", "value": None, "note": "virsh is not installed (libvirt-clients)"}
        return
    with DaemonProcess() as daemon:
        assert daemon.process is not None
        pid = daemon.process.pid

        def virsh(command: str) -> None:
            subprocess.run(["virsh", "-q", "-c", daemon.uri(), command], stdout=subprocess.DEVNULL, check=True)

        before = memory_kib(pid)
        for number in range(DEFINED):
            (daemon.path / f"x{number}.xml").write_text(tiny(f"x{number}"))
        virsh("; ".join(f"define {daemon.path}/x{number}.xml" for number in range(DEFINED)))
        defined = memory_kib(pid)
        virsh("; ".join(f"start x{number}" for number in range(RUNNING)))
        running = memory_kib(pid)
        yield {"name": "daemon without domains", "value": before, "unit": "KiB"}
        yield {"name": "  more for each defined domain", "value": (defined - before) / DEFINED, "unit": "KiB"}
        yield {"name": "  more for each that runs", "value": (running - defined) / RUNNING, "unit": "KiB"}
        for command in ("list --all", "domstats", "version"):
            walls, used = [], processor_ms(pid)
            for _ in range(ROUNDS):
                began = time.perf_counter()
                virsh(command)
                walls.append((time.perf_counter() - began) * 1000)
            name = f"virsh {command}, {DEFINED} defined, {RUNNING} running"
            yield {"name": name, "value": statistics.median(walls), "unit": "ms", "goal": GOAL_MS}
            yield {"name": "  the least", "value": min(walls), "unit": "ms"}
            used = (processor_ms(pid) - used) / ROUNDS
            yield {"name": "  the daemon's processor time", "value": used, "unit": "ms"}
