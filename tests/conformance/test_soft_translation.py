"""Host code for hot blocks does what the interpreter does: everything ends in the same state, to the last byte.

The same programs are built to translate blocks at once, and late (few blocks of a short program). Random programs in
every mode (the fuzz target's: with the virtual clock they are functions of their seed) must leave equal registers,
memory and instruction counts, and the firmware images must print the same.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conformance.test_soft_roms import CPUS, ENDS, NAMES, ROMS, assemble
from tests.support import oracle, soft_programs

CASES = 400


def hashes(program: Path, seed: int, count: int) -> list[str]:
    done = subprocess.run([program, "--list", str(seed), str(count)], capture_output=True, text=True, timeout=300,
                          check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("seed", [1, 10_000_019])
def test_random_programs_end_in_the_same_state(seed: int) -> None:
    interpreted = hashes(soft_programs.build("soft_fuzz"), seed, CASES)
    translated = hashes(soft_programs.build("soft_fuzz", hot=True), seed, CASES)
    assert len(interpreted) == CASES
    assert [pair for pair in zip(interpreted, translated, strict=True) if pair[0] != pair[1]] == []


@pytest.mark.parametrize("name", NAMES)
def test_firmware_images(tmp_path: Path, name: str) -> None:
    """The images of test_soft_roms.py, among them the one that modifies itself."""
    program = soft_programs.build("soft_boot", hot=True)
    run = subprocess.run([program, "--memory", "64", "--timeout", "60", "--cpus", str(CPUS.get(name, 1)), "--bios",
                          assemble(name, tmp_path)], capture_output=True, text=True, timeout=90, check=False)
    assert run.stdout == (ROMS / f"{name}.expected").read_text()
    assert run.returncode == ENDS.get(name, 1), run.stderr


@pytest.mark.parametrize("hot", [1, pytest.param(2, marks=pytest.mark.campaign)], ids=["blocks", "loops"])
@pytest.mark.parametrize("mode", ["64", "32"])
def test_vectors_of_avx(mode: str, hot: int) -> None:
    """Host code keeps YMM registers in the host's: every instruction, and programs of several, loops among them, end as
    on the host's processor."""
    program = soft_programs.build("oracle", hot=hot)
    result = oracle.run(program, "core", "--vex", "--mode", mode, "--per-slot", "2")
    assert result.compared > 20_000
    assert result.differences == 0, result.report
    result = oracle.run(program, "core", "--vex", "--mode", mode, "--programs", "5000")
    assert result.differences == 0, result.report
