"""Progress on a terminal, on standard error: a bar while an image is built and a machine boots. Nothing in pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

MIB = 1 << 20
WIDTH = 20
BOOT = {
    "enter": "building the machine",
    "resume": "booting: kernel",
    "init": "booting: drivers, root file system",
    "root": "booting: system",
}
"""Moment of the timeline -> what then begins. Each takes an equal part of the bar."""
LAST = ("agent", "end", "first console byte")
"""Moments at which there is nothing more to show."""


def width(descriptor: int) -> int:
    """A terminal's columns; 0 if it does not say."""
    try:
        return os.get_terminal_size(descriptor).columns
    except OSError:
        return 0


class ProgressLine:
    """One line that is drawn again and again."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._drawn = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """A `total` of a MiB and more is bytes, else steps; with the last step the line goes."""
        if not self._terminal:
            return
        if done >= total and total < MIB:
            self.clear()
            return
        filled = WIDTH * min(done, total) // max(total, 1)
        amount = f"{done / MIB:6.1f} of {total / MIB:.1f} MiB  " if total >= MIB else ""
        line = f"[{'=' * filled:<{WIDTH}}] {amount}{what}"
        columns = width(2)
        line = line[: columns - 1] if columns else line  # a longer one would not be drawn over
        if line != self._drawn:
            self._write("\r" + line.ljust(len(self._drawn)))
            self._drawn = line

    def clear(self) -> None:
        """Remove the line, before anything else is written there."""
        if self._drawn:
            self._write("\r" + " " * len(self._drawn) + "\r")
            self._drawn = ""

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            self._terminal = False  # nobody sees it


def boot_progress() -> tuple[Callable[[str], None], Callable[[], None]]:
    """(what a timeline's `on_mark` may be, the line's removal)"""
    line, steps, over = ProgressLine(), list(BOOT), False

    def marked(name: str) -> None:
        nonlocal over
        if name in LAST:
            over = True
            line.clear()
        elif name in BOOT and not over:
            line(BOOT[name], steps.index(name) + 1, len(steps) + 1)

    return marked, line.clear
