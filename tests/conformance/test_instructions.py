"""User-mode instructions against the host's processor: registers, flags, memory and faults of a seeded sample.

The long campaign over many seeds is ``python -m tests.support.oracle --seconds 3600``.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.support import oracle

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 host")


@pytest.fixture(scope="module")
def program() -> Path:
    return oracle.build()


def test_fpu_operations(program: Path) -> None:
    """x87, MMX and SSE to SSE4.2 operations do what the host does, bit for bit, without the decoder in between."""
    result = oracle.run(program, "direct", "--fpu", "--per-slot", "20")
    assert result.compared > 15_000
    assert result.differences == 0, result.report


@pytest.mark.parametrize("mode", ["64", "32"])
def test_software_core(program: Path, mode: str) -> None:
    """Every opcode in every operand form, also what is undefined or faults, in 64-bit and in compatibility mode."""
    result = oracle.run(program, "core", "--mode", mode, "--per-slot", "25")
    assert result.compared > 100_000
    assert result.differences == 0, result.report


@pytest.mark.parametrize("mode", ["64", "32"])
def test_programs(program: Path, mode: str) -> None:
    """What the decoder makes of instructions together: unread flags, fused comparisons, linked and repeated blocks."""
    result = oracle.run(program, "core", "--mode", mode, "--programs", "20000")
    assert result.differences == 0, result.report
