"""Watches runners from outside, for tests.fuzz.direct_fuzz: `python -m tests.fuzz.direct_watch PARENT NAME`

Until its input ends it counts the system calls that the host's kernel carries out for processes of that name (tracefs;
root), and looks again and again at what the children of PARENT of that name have mapped: nothing but their own pages
and guest memory. Its first line of input says where the guest's kernel is, as FIRST-END in bytes, hexadecimal: its
code, of which nothing may be mapped, and ranges in which nothing may be mapped writable (the vDSO and a page of zeros
are in them). At the end it prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
import threading
from collections import Counter
from pathlib import Path

from tests.support.calltrace import trace

OWN = range(0x6A00_0000_0000, 0x6A00_0000_8000)
"""Where a runner's own pages are (cpu/soft/direct/layout.h)."""
PERIOD = 0.1


class Watch:
    """What was seen so far."""

    def __init__(self, parent: str, name: str) -> None:
        self.calls: dict[str, Counter[int]] = {}
        self.lost = self.looks = self.mappings = 0
        self.wrong: list[str] = []
        self.ranges: list[range] = []
        """Of the guest's kernel: code, then others."""
        self._parent, self._name = parent, name
        self.over = threading.Event()

    def read(self, pipe: Path) -> None:
        """Count calls, until it is over and nothing comes any more."""
        fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        rest = ""
        try:
            while True:
                ready, _, _ = select.select([fd], [], [], PERIOD)
                try:
                    piece = os.read(fd, 1 << 16).decode(errors="replace") if ready else ""
                except BlockingIOError:
                    piece = ""
                if not piece and self.over.wait(PERIOD / 10):
                    return
                *lines, rest = (rest + piece).split("\n")
                for line in lines:
                    self._count(line)
        finally:
            os.close(fd)

    def _count(self, line: str) -> None:
        head, found, rest = line.partition("sys_enter: NR ")
        if found:
            pid = re.search(r"-(\d+) +[\[(]", head)
            self.calls.setdefault(pid[1] if pid else head, Counter())[int(rest.split(None, 1)[0])] += 1
        elif "LOST" in line:
            self.lost += 1

    def look(self) -> None:
        """At what each runner has mapped, until it is over."""
        while not self.over.wait(PERIOD):
            for pid in self._runners():
                self._look_at(pid)

    def _runners(self) -> list[str]:
        found: list[str] = []
        for path in Path("/proc", self._parent, "task").glob("*/children"):
            try:
                found += [
                    pid
                    for pid in path.read_text().split()
                    if Path("/proc", pid, "comm").read_text() == self._name + "\n"
                ]
            except OSError:
                continue
        return found

    def _look_at(self, pid: str) -> None:
        try:
            lines = Path("/proc", pid, "maps").read_text().splitlines()
        except OSError:
            return
        self.looks += 1
        self.mappings += len(lines)
        # One that has just begun has no guest memory yet, but what it began with.
        if any("/memfd:guest-memory" in line for line in lines):
            self.wrong += [f"{pid}: {line}" for line in lines if not self._right(line)][:20]

    def _right(self, line: str) -> bool:
        addresses, rights, offset, _, _, *name = line.split(None, 5)
        first, end = (int(part, 16) for part in addresses.split("-"))
        if name == ["[vsyscall]"] or (first in OWN and end <= OWN.stop):
            return True
        at = int(offset, 16)
        return (
            bool(name)
            and name[0].startswith("/memfd:guest-memory")
            and not any(
                at < part.stop and part.start < at + end - first and (code or "w" in rights)
                for code, part in zip((True, False, False), self.ranges, strict=False)
            )
        )


def main() -> None:
    parent, name = sys.argv[1:]
    watch = Watch(parent, name)
    with trace(name) as instance:
        threads = [
            threading.Thread(target=watch.read, args=(instance / "trace_pipe",)),
            threading.Thread(target=watch.look),
        ]
        for thread in threads:
            thread.start()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for word in sys.stdin.readline().split():
            first, end = (int(part, 16) for part in word.split("-"))
            watch.ranges.append(range(first, end + 1))
        sys.stdin.read()
        watch.over.set()
        for thread in threads:
            thread.join()
    calls = {pid: dict(count) for pid, count in watch.calls.items()}
    seen = {"lost": watch.lost, "looks": watch.looks, "mappings": watch.mappings, "wrong": watch.wrong}
    sys.stdout.write(json.dumps({"calls": calls, **seen}) + "\n")


if __name__ == "__main__":
    main()
