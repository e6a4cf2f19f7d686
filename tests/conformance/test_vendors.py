"""The rules by which the software core is compared with a host of another vendor than its guest sees.

An Intel host is made of this one: natively executed results are changed wherever the table
(tests/support/oracle/vendors.c) says that an Intel processor may do something else. The rules for Intel hosts accept
all of that, those for AMD hosts do not, and neither accept a wrong result.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.support import oracle, soft_programs

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 host")
INTEL = ("--rules", "intel", "--host", "intel")
SHIFT, MISC, LEGACY, X87, FAST, STATE = (
    f"cpu/soft/{name}.c"
    for name in ("interp/exec_shift", "interp/exec_misc", "interp/exec_legacy", "fpu/x87", "fpu/x87_fast", "fpu/state")
)
TABLE = "cpu/soft/ops/table.h"
MUTANTS = {
    "carry of MUL": (
        SHIFT, "uint64_t over = (UINT(bits))(r >> (bits)) != 0;", "uint64_t over = r == 0;", "0", "0xF7", "64",
    ),
    "carry of SHR": (
        SHIFT, "cf = (bits) < 32 && n > (bits) ? 0 : (uint64_t)a >> (n - 1) & 1;", "cf = 0;", "0", "0xC1", "64",
    ),
    "carry of BT": (
        MISC, "unsigned bit = REG8(u->r1) & (u->size * 8u - 1);\n    flags_set_co(c, v >> bit & 1, flag_of(c));",
        "unsigned bit = REG8(u->r1) & (u->size * 8u - 1);\n    flags_set_co(c, v >> bit & 2, flag_of(c));",
        "1", "0xAB", "64",
    ),
    "zero flag of BSF": (
        TABLE, "ctzll(v) : 0;\n    c->lf[0] = v ? r | 0x100 : 0;", "ctzll(v) : 0;\n    c->lf[0] = 1;",
        "1", "0xBC", "64",
    ),
    "a zero source of LZCNT": (TABLE, "- (64 - bits) : bits", "- (64 - bits) : bits - 1", "1", "0xBD", "64"),
    "a digit of DAA": (MISC, "if (old > 0x99 || flag_cf(c)) {", "if (old > 0x9A || flag_cf(c)) {", "0", "0x27", "32"),
    "low half of PUSH DS": (
        LEGACY, "push(c, u->size, c->seg[u->aux].selector)", "push(c, u->size, c->seg[u->aux].selector ^ 1u)",
        "0", "0x1E", "32",
    ),
    "conditions of FCOM": (
        FAST, "leave(f, status(), CC);\n    while", "leave(f, status(), C1);\n    while", "0", "0xD8", "64",
    ),
    "what FNSTSW stores": (
        X87, "memcpy(ctx->mem, &ctx->fpu->sw, 2);", "memcpy(ctx->mem, &ctx->fpu->cw, 2);", "0", "0xDD", "64",
    ),
    "tags of FXSAVE": (STATE, "put(image, 4, &tag, 2);", "put(image, 5, &tag, 1);", "1", "0xAE", "64"),
}  # fmt: skip
"""Wrong results: file, what stands there, what then does; map, opcode and mode of the instruction."""
DAILY = {"carry of SHR", "conditions of FCOM"}
"""One of integers and one of the x87; the other mutants are a campaign."""


@pytest.fixture(scope="module")
def program() -> Path:
    return oracle.build()


@pytest.mark.parametrize("mode", ["64", "32"])
def test_an_intel_hosts_results_are_accepted(program: Path, mode: str) -> None:
    result = oracle.run(program, "core", "--mode", mode, "--per-slot", "10", *INTEL)
    assert result.compared > 40_000
    assert result.differences == 0, result.report
    assert result.not_compared < result.compared / 12


@pytest.mark.parametrize("mode", ["64", "32"])
def test_an_intel_hosts_results_with_a_vex_prefix_are_accepted(program: Path, mode: str) -> None:
    result = oracle.run(program, "core", "--vex", "--mode", mode, "--per-slot", "6", *INTEL)
    assert result.compared > 60_000
    assert result.differences == 0, result.report
    assert result.not_compared < result.compared / 500


@pytest.mark.parametrize("mode", ["64", "32"])
def test_programs_for_every_vendor_read_nothing_undefined(program: Path, mode: str) -> None:
    """Run instruction by instruction, every undefined flag another value: the results are the core's."""
    result = oracle.run(program, "core", "--mode", mode, "--programs", "3000", *INTEL)
    assert result.differences == 0, result.report


def test_an_intel_hosts_fpu_is_accepted(program: Path) -> None:
    result = oracle.run(program, "direct", "--fpu", "--per-slot", "10", *INTEL)
    assert result.compared > 5_000
    assert result.differences == 0, result.report


def test_rules_for_amd_hosts_refuse_it(program: Path) -> None:
    """So the Intel host made here differs from this one, and the rules for AMD compare everything."""
    result = oracle.run(program, "core", "--per-slot", "3", "--rules", "amd", "--host", "intel")
    assert result.differences > result.compared / 10
    result = oracle.run(program, "core", "--programs", "100", "--rules", "amd", "--host", "intel")
    assert result.differences > 50


def test_the_table_is_documented(program: Path) -> None:
    page = Path(__file__).parents[2] / "docs/processor.md"
    assert oracle.differences_table(program) in page.read_text()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_a_mutant_changes_is_there(mutant: str) -> None:
    source, old, *_ = MUTANTS[mutant]
    assert (soft_programs.ROOT / source).read_text().count(old) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=() if name in DAILY else pytest.mark.campaign) for name in MUTANTS]
)
def test_rules_for_intel_hosts_refuse_a_wrong_result(tmp_path: Path, mutant: str) -> None:
    source, old, new, map_, opcode, mode = MUTANTS[mutant]
    wrong = soft_programs.build_mutant("oracle", source, old, new, tmp_path)
    arguments = ("core", "--map", map_, "--opcode", opcode, "--mode", mode, "--per-slot", "200", *INTEL)
    assert oracle.run(wrong, *arguments).differences > 0
    right = oracle.run(oracle.build(), *arguments)
    assert right.differences == 0, right.report
