"""vCPUs that run at the same time keep the memory model, locked operations, changed code: tests/support/soft_litmus.c.

LOOPVISOR_LITMUS gives the number of rounds of a campaign; otherwise those of a program take a second at most.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from cpu.direct import support
from tests.conformance.test_soft_roms import CPUS, assemble
from tests.support import soft_programs
from tests.support.patience import PATIENCE

ROUNDS = int(os.environ.get("LOOPVISOR_LITMUS", "20000"))
NATIVE_ROUNDS = ROUNDS if "LOOPVISOR_LITMUS" in os.environ else 400
SECONDS = "86400" if "LOOPVISOR_LITMUS" in os.environ else "1"


def printed(program: Path, rounds: int, *more: str | Path) -> str:
    """What the litmus programs print, which find nothing."""
    run = subprocess.run(
        [program, str(rounds), SECONDS, *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=(200 + ROUNDS / 100) * PATIENCE,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("hot", [False, True], ids=["", "translated"])
def test_nothing_forbidden_is_seen(hot: bool) -> None:
    """Every litmus program, also when every block is translated at once."""
    sanitize = bool(os.environ.get("SOFT_SANITIZE"))
    program = soft_programs.build("soft_litmus", sanitize=sanitize, hot=hot and not sanitize)
    assert printed(program, ROUNDS).count("ok ") == 31


@pytest.mark.parametrize("how", ["native", "mixed"])
def test_nothing_forbidden_is_seen_natively(how: str) -> None:
    """The programs run directly, on all vCPUs or on every second one."""
    if not support().available:
        pytest.skip(f"direct execution: {support().reason}")
    program = soft_programs.build("soft_litmus")
    runner = soft_programs.ROOT / "cpu/runner/runner.bin"
    text = printed(program, NATIVE_ROUNDS, "all", how, runner)
    assert text.count("ok ") == 30
    stops = re.search(r"^\d+ us natively, (\d+) stops$", text, re.MULTILINE)
    assert stops is not None and int(stops[1]) > 100


@pytest.mark.slow
def test_threads_do_not_race_for_the_cores_own_structures(tmp_path: Path) -> None:
    """ThreadSanitizer finds nothing, in the litmus programs and in firmware images with several processors."""
    programs = [soft_programs.build(name, threads=True) for name in ("soft_litmus", "soft_boot")]
    commands = [[programs[0], "5000", "1"]]
    for name in ("smp", "smc_smp"):
        options = ["--parallel", "--memory", "64", "--timeout", f"{60 * PATIENCE:.0f}", "--cpus", str(CPUS[name])]
        commands.append([programs[1], *options, "--bios", assemble(name, tmp_path)])
    for command in commands:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200 * PATIENCE)
        assert "ThreadSanitizer" not in run.stderr, run.stderr
        assert run.returncode == (0 if command is commands[0] else 1)
