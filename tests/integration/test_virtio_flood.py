"""A short run of tests/fuzz/virtio_flood.py: drivers in their own processes flood each device beside a second machine.

Every reset is complete at once, the second machine answers, and memory stays within what docs/machine.md states. How
long the loop stood still is printed and not judged: `python -m tests.fuzz.virtio_flood` is for that.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fuzz.virtio_flood import MEMORY_MAX
from tests.support.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def test_floods_beside_a_second_machine() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.virtio_flood", "0.3"],
        capture_output=True, text=True, cwd=ROOT, timeout=120 * PATIENCE, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert not run.stderr
    lines = [line.split()[0] for line in run.stdout.splitlines()[2:] if not line.startswith(" ")]
    assert {"blk-file", "blk-own", "net-stream", "net-own", "console", "console-ports", "rng", "vsock"} <= set(lines)


def test_the_bound_is_what_the_manual_states() -> None:
    assert f"{MEMORY_MAX >> 20} MiB" in (ROOT / "docs" / "machine.md").read_text()
