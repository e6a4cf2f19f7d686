"""Random system-level programs on the software core: the same in every way to run them, as the manuals say, as QEMU
does it where it follows them. `python -m tests.fuzz.system` goes on where these few end.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.fuzz import system
from tests.fuzz.system_programs import Maker, build
from tests.support import soft_programs

SANITIZE = bool(os.environ.get("SOFT_SANITIZE"))


@pytest.fixture(scope="session")
def soft_boot() -> Path:
    return soft_programs.build("soft_boot", sanitize=SANITIZE)


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", system.MAKERS)
def test_program(soft_boot: Path, tmp_path: Path, kind: str, seed: int) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    assert system.check(kind, seed, tmp_path, soft_boot) == []


@pytest.mark.parametrize("seed", range(100, 103))
@pytest.mark.parametrize("kind", system.MAKERS)
def test_program_without_an_oracle(soft_boot: Path, tmp_path: Path, kind: str, seed: int) -> None:
    """What needs no QEMU: breakpoints hit what they must, and clocks and moves change nothing."""
    assert system.check(kind, seed, tmp_path, soft_boot, oracle=False) == []


def test_a_wrong_line_is_seen(soft_boot: Path, tmp_path: Path) -> None:
    """The comparison finds one changed digit in any step that it judges."""
    maker = Maker(7, Maker.STEPS)
    ours = system.on_core(soft_boot, build(maker, 7, tmp_path), "real")
    assert system.differences(maker, ours, ours) == []
    judged = [number for number in system.steps(ours) if number not in maker.unlike and number not in maker.hits]
    assert len(judged) > 25
    for number in judged:
        lines = ours.splitlines()
        at = next(index for index, line in enumerate(lines) if line.startswith(f"@{number} "))
        step, rest = lines[at].split(" ", 1)
        lines[at] = f"{step} {rest.replace('0', '1')}"
        assert system.differences(maker, ours, "\n".join(lines)) != []
