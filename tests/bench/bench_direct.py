"""Programs of this host in a Linux guest on the software core: with direct execution, without it, and natively.

The guest has the host's root directory as a share and a directory in memory for what programs write, so both run the
same binaries. Processor time is this process's and its runners', without the guest's start; where the host is busy it
says more than the wall clock. Rows are ratios: of the time with --direct off, and of the time natively.
"""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import vmm
from vmm.config import Share

PYTHON = """
import json, re, hashlib, random
r = random.Random(5)
d = [{"a": r.random(), "b": str(r.random())} for i in range(20000)]
e = json.loads(json.dumps(d)); e.sort(key=lambda x: x["b"])
print(len(re.findall("[0-9]+", json.dumps(e))), hashlib.sha256(json.dumps(e).encode()).hexdigest())
"""
PERL = r"""
my %h; for my $i (1..300000) { $h{$i % 1000} .= chr(65 + $i % 26); }
my $n = 0; for (sort keys %h) { $n += length($h{$_}); $n++ while $h{$_} =~ /ABC/g } print "$n\n";
"""
PROGRAMS: dict[str, tuple[str, ...]] = {
    "sha256": ("sh", "-c", "head -c 60000000 /dev/zero | sha256sum"),
    "python work": ("python3", "-c", PYTHON),
    "python start": ("python3", "-c", "print(1)"),
    "perl": ("perl", "-e", PERL),
    "xz -1": ("sh", "-c", "head -c 6000000 /usr/bin/python3.11 | xz -1 | md5sum"),
    "gzip": ("sh", "-c", "head -c 6000000 /usr/bin/python3.11 | gzip | md5sum"),
    "100 forks": ("sh", "-c", "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i + 1)); done; echo done"),
    "find": ("sh", "-c", "find /usr/share/doc | wc -l"),
}
PREPARE = "mount -t tmpfs t /host/tmp; mount -t proc p /host/proc; mount -t devtmpfs d /host/dev"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C"}


def used() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


async def in_guest(direct: Any) -> dict[str, tuple[float, float, str]]:
    """By program: seconds of processor time, seconds of the wall clock, what it printed."""
    shares = [Share(path=Path("/"), mount="/host", readonly=True)]
    found = {}
    async with vmm.run("linux", core="soft", nets=[], memory="1G", shares=shares, direct=direct) as machine:
        await machine.exec("sh", "-c", PREPARE, check=True)
        for name, words in PROGRAMS.items():
            command = (
                "chroot",
                "/host",
                "env",
                "-i",
                *(f"{key}={value}" for key, value in ENVIRONMENT.items()),
                *words,
            )
            before, native, begin = used(), machine.stats()["native-ns"], time.monotonic()
            result = await machine.exec(*command, timeout=600)
            seconds = used() - before + (machine.stats()["native-ns"] - native) / 1e9
            found[name] = seconds, time.monotonic() - begin, result.text.strip()
    return found


def on_host() -> dict[str, tuple[float, float, str]]:
    found = {}
    for name, words in PROGRAMS.items():
        before, begin = os.times(), time.monotonic()
        text = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False).stdout
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        found[name] = seconds, time.monotonic() - begin, text.strip()
    return found


def rows() -> Iterator[Mapping[str, object]]:
    """A ratio each of processor time, with the wall clock's as a note."""
    from cpu.direct import support

    if not support().available:
        yield {"name": "direct execution", "value": None, "note": support().reason}
        return
    auto, off, host = asyncio.run(in_guest("auto")), asyncio.run(in_guest("off")), on_host()
    for name, (seconds, wall, text) in auto.items():
        same = text == off[name][2] == host[name][2]
        note = f"wall {wall / off[name][1]:.2f}; {'same output' if same else 'OUTPUT DIFFERS'}"
        yield {
            "name": f"{name}: auto beside off",
            "value": seconds / off[name][0],
            "unit": "×",
            "goal": 1.05,
            "note": note,
        }
        yield {"name": f"{name}: auto beside native", "value": seconds / max(host[name][0], 0.001), "unit": "×"}
