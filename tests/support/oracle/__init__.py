"""The native instruction oracle: build it, run it.

The C program (see oracle.h) generates instructions and compares the host's processor with the software core. The tests
run a seeded sample; ``python -m tests.support.oracle --seconds 3600`` is the long campaign: it takes new seeds in both
modes until the time is over, and prints every difference with what reproduces it.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = Path(__file__).resolve().parent
FLAGS = ["-std=gnu11", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-parentheses", "-fno-strict-aliasing",
         "-foptimize-sibling-calls", "-mno-red-zone", "-pthread"]
BUILD_TIMEOUT_S = 300


@dataclass(frozen=True)
class Result:
    """What one run compared; `report` holds the differences, as text."""

    compared: int
    differences: int
    report: str


def build(folder: Path, *, core: bool) -> Path:
    """Compile the oracle into `folder`: with the whole software core, or with its FPU operations alone."""
    sources = sorted((ROOT / "cpu/soft/fpu").glob("*.c")) + sorted(SOURCES.glob("*.c"))
    if core:
        core_files = (ROOT / "cpu/soft").glob("*.c")
        # backend.c binds the core to the thread loop; the oracle uses soft.h.
        sources += sorted(path for path in core_files if path.name != "backend.c")
        sources += sorted((ROOT / "cpu/soft/irqchip").glob("*.c"))
    else:
        sources.remove(SOURCES / "core.c")
    flags = [*FLAGS, f"-I{ROOT / 'cpu'}", f"-I{SOURCES}", *(["-DORACLE_CORE"] if core else [])]

    def compile_one(source: Path) -> Path:
        target = folder / (str(source.relative_to(ROOT)).replace(os.sep, "_") + ".o")
        # The core's execution loop relies on sibling calls, so it is built as the package builds it.
        optimise = [] if source.parent == SOURCES else ["-O2"]
        subprocess.run(["gcc", *flags, *optimise, "-c", source, "-o", target], check=True, timeout=BUILD_TIMEOUT_S)
        return target

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "oracle"
    subprocess.run(["gcc", "-pthread", *objects, "-o", program], check=True, timeout=BUILD_TIMEOUT_S)
    return program


def run(program: Path, backend: str, *arguments: str, timeout_s: float = 120) -> Result:
    """Run the oracle. Raises RuntimeError if it did not finish (a hang or crash of one of the two sides)."""
    done = subprocess.run([program, backend, *arguments], capture_output=True, text=True, timeout=timeout_s)
    words = done.stdout.splitlines()[-1].split() if done.stdout else []
    if done.returncode not in (0, 1) or len(words) != 4 or words[0] != "compared":
        raise RuntimeError(f"the oracle ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return Result(int(words[1]), int(words[3]), done.stdout)
