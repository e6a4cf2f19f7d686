"""Tables in columns, for `vmm ps` and `vmm images ls`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cli.progress import width


def lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row as a line, its cells below those of the first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """On standard output. On a terminal the head is bold and no line is longer than the window is wide."""
    shown = lines(rows)
    if sys.stdout.isatty():
        columns = width(1)
        shown = [line[:columns] if columns else line for line in shown]
        shown[0] = f"\x1b[1m{shown[0]}\x1b[0m"
    sys.stdout.write("\n".join(shown) + "\n")
