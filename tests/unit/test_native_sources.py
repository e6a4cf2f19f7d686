"""What C sources must not call, for reasons that a compiler cannot know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OF_VCPUS = ("cpu/native", "cpu/soft", "virtio/native")
READS_TSC = ("clock_gettime", "gettimeofday", "rdtsc", "time(NULL", "ADAPTIVE")
MAY = {
    "cpu/soft/run/clock.c": ("clock_gettime(CLOCK_MONOTONIC",),  # what all others call
    "cpu/soft/direct/kick.c": ("clock_gettime((clockid_t)",),  # a process's time is a system call always
    "cpu/native/loop_internal.h": ("clock_gettime(CLOCK_MONOTONIC_COARSE",),  # reads no TSC
    "cpu/soft/run/backend.c": ("clock_gettime(CLOCK_REALTIME, &until",),  # the loop's thread
    "cpu/native/scripted.c": ("clock_gettime(CLOCK_MONOTONIC",),  # executes nothing natively
}
GUESTS = ("h_rdtsc", "soft_rdtsc", "SYS_clock_gettime")  # the guest's own instruction; a system call


def calls(path: Path) -> Iterator[str]:
    """Each line outside comments that reads the TSC and may not."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    allowed = MAY.get(str(path.relative_to(ROOT)), ()) + GUESTS
    for line in text.splitlines():
        if any(name in line for name in READS_TSC) and not any(piece in line for piece in allowed):
            yield f"{path.relative_to(ROOT)}: {line.strip()}"


def test_what_a_vcpus_thread_executes_reads_no_tsc() -> None:
    """It may have given it up: cpu/soft/hostclock.h."""
    sources = [path for folder in OF_VCPUS for path in (ROOT / folder).rglob("*.[ch]")]
    assert len(sources) > 100
    assert [line for path in sources for line in calls(path)] == []
