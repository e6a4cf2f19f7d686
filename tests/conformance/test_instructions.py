"""User-mode instructions against the host's processor, natively and in a guest of its KVM: registers, flags, memory and
faults of a seeded sample. On a host that is not AMD's, what both vendors' manuals define (test_vendors.py).

The long campaign over many seeds is ``python -m tests.support.oracle --seconds 3600``.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from cpu.kvm.probe import has_hardware
from cpu.select import probe
from tests.support import oracle

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 host")


def kvm_is_an_oracle() -> bool:
    """Whether guests at CPL 3 run on a real processor (tests.rig's is QEMU's)."""
    return probe("kvm").available and "QEMU" not in Path("/proc/cpuinfo").read_text()


@pytest.fixture(scope="module")
def program() -> Path:
    return oracle.build()


def test_fpu_operations(program: Path) -> None:
    """x87, MMX and SSE to SSE4.2 operations do what the host does, bit for bit, without the decoder in between."""
    result = oracle.run(program, "direct", "--fpu", "--per-slot", "25")
    assert result.compared > 15_000
    assert result.differences == 0, result.report


@pytest.mark.parametrize("mode", ["64", "32"])
def test_software_core(program: Path, mode: str) -> None:
    """Every opcode in every operand form, also what is undefined or faults, in 64-bit and in compatibility mode."""
    result = oracle.run(program, "core", "--mode", mode, "--per-slot", "25")
    assert result.compared > 100_000
    assert result.differences == 0, result.report


@pytest.mark.parametrize("mode", ["64", "32"])
def test_instructions_with_a_vex_prefix(program: Path, mode: str) -> None:
    """BMI, and where the host has them AVX, AVX2, FMA, F16C, AES and PCLMULQDQ: every opcode with each W and length,
    upper halves of YMM registers included."""
    result = oracle.run(program, "core", "--vex", "--mode", mode, "--per-slot", "6")
    assert result.compared > 60_000
    assert result.differences == 0, result.report


def test_state_images(program: Path) -> None:
    """FXSAVE, FXRSTOR, XSAVE...: any alignment, contents and headers, of which a sample of every opcode has too few."""
    result = oracle.run(program, "core", "--map", "1", "--opcode", "0xAE", "--per-slot", "8000")
    assert result.compared > 8_000
    assert result.differences == 0, result.report


@pytest.mark.kvm
@pytest.mark.skipif(not kvm_is_an_oracle(), reason="no KVM on a processor that is not emulated itself")
def test_software_core_beside_kvm(program: Path) -> None:
    """At CPL 3 of a guest. A KVM without VT-x or SVM emulates a few instructions in software, and some of them wrongly:
    those on which the host's processor agrees with the core are counted, and must be few."""
    for mode in ("64", "32") if has_hardware() else ("64",):
        result = oracle.run(program, "kvm", "--mode", mode, "--per-slot", "3")
        assert result.compared > 10_000
        assert result.differences == 0, result.report
        assert result.alone < result.compared / 50
        result = oracle.run(program, "kvm", "--vex", "--mode", mode, "--per-slot", "1")
        assert result.differences == 0, result.report
        result = oracle.run(program, "kvm", "--mode", mode, "--programs", "3000")
        assert (result.differences, result.alone) == (0, 0), result.report


@pytest.mark.parametrize("mode", ["64", "32"])
def test_programs(program: Path, mode: str) -> None:
    """What the decoder makes of instructions together: unread flags, fused comparisons, linked and repeated blocks."""
    result = oracle.run(program, "core", "--mode", mode, "--programs", "20000")
    assert result.differences == 0, result.report
    result = oracle.run(program, "core", "--vex", "--mode", mode, "--programs", "5000")
    assert result.differences == 0, result.report
