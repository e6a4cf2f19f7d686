"""The native instruction oracle: build it, run it.

The C program (see oracle.h) generates instructions and compares the host's processor with the software core. The tests
run a seeded sample; ``python -m tests.support.oracle --seconds 3600`` is the long campaign: it takes new seeds in both
modes until the time is over, and prints every difference with what reproduces it.

On an AMD host, the vendor that the software core shows, everything is compared; on another one what both vendors'
manuals define (vendors.h).
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support import soft_programs


@dataclass(frozen=True)
class Result:
    """What one run compared; `report` holds the differences, as text. `alone`: what KVM does unlike both others.
    `not_compared`: cases of `compared` in which the vendors' manuals have nothing in common."""

    compared: int
    differences: int
    report: str
    alone: int = 0
    not_compared: int = 0


def build() -> Path:
    """The oracle with the whole software core, built if need be."""
    return soft_programs.build("oracle")


def run(program: Path, backend: str, *arguments: str, timeout_s: float = 120) -> Result:
    """Run the oracle. Raises RuntimeError if it did not finish (a hang or crash of one of the two sides)."""
    done = subprocess.run([program, backend, *arguments], capture_output=True, text=True, timeout=timeout_s)
    words = done.stdout.splitlines()[-1].split() if done.stdout else []
    if done.returncode not in (0, 1) or len(words) != 4 or words[0] != "compared":
        raise RuntimeError(f"the oracle ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    alone = re.search(r"^KVM alone (\d+)$", done.stdout, re.MULTILINE)
    free = re.search(r"^not compared (\d+)$", done.stdout, re.MULTILINE)
    return Result(
        int(words[1]), int(words[3]), done.stdout, int(alone[1]) if alone else 0, int(free[1]) if free else 0
    )


def differences_table(program: Path) -> str:
    """The table of what AMD's and Intel's processors may do differently, as Markdown."""
    return subprocess.run([program, "vendors"], capture_output=True, text=True, check=True).stdout
