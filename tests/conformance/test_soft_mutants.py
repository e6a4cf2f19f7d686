"""The tests of self-modifying code can fail: without any one part of the invalidation, one of them does.

Every mutant is the software core with one line changed. What must notice it is a firmware image of test_soft_roms.py
(smc: one processor; smc_smp: two), the check of DMA in tests/support/soft_api.c, or a litmus program. The daily run has
one mutant for each of them; the others are a campaign (make test-long), of which it holds that their places are there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from cpu.direct import support
from tests.conformance.test_soft_roms import CPUS, ROMS, assemble
from tests.support import soft_programs

pytestmark = pytest.mark.slow

BLOCK, JUMP, MEMORY, MMU, EVENTS, SHARED, LOCK = (
    f"cpu/soft/{name}.c"
    for name in ("run/block", "run/jump", "mmu/memory", "mmu/mmu", "run/events", "run/shared", "interp/exec_lock")
)
MUTANTS = {
    "stores are not looked at": ("smc", MEMORY, "if (slot->code_pages[first])", "if (0)"),
    "strings of several pages look at the first": (
        "smc", MMU, "while (run < size && may_write(c, slot, ++n))", "while (run < size)",
    ),
    "strings into a page of code are not told": (
        "smc", "cpu/soft/interp/string.c", "soft_written(s->c->vm, s->c, s->code, s->gpa, (unsigned)bytes);", ";",
    ),
    "the block that is written to goes on": (
        "smc", BLOCK, "bool changed = c->blocks->changed;", "bool changed = false;",
    ),
    "the end of a block counts for nothing": (
        "smc", BLOCK, "p->granules |= soft_granules(low, high);", "p->granules |= soft_granules(low, low);",
    ),
    "the other page of an instruction": ("smc", BLOCK, "struct crossing *x = p->crossings;", "struct crossing *x = 0;"),
    "the other page of an instruction moves": ("smc", BLOCK, "if (host2 != k->host2) {", "if (0) {"),
    "the other page of an instruction is not global": ("smc", JUMP, "(!crosses || soft_tlb", "(1 || soft_tlb"),
    "a page can still be written": (
        "smc", BLOCK, "if (on && !was)\n            soft_tlb_protect_page(vm, s->gpa + offset);", "",
    ),
    "a replaced translation can still write": (
        "smc", MMU, "clear_victims(c);\n    for (unsigned view = 0; view < VIEW_COUNT; view++) {\n        struct",
        "for (unsigned view = 0; view < VIEW_COUNT; view++) {\n        struct",
    ),
    "addresses still lead to the old block": ("smc", BLOCK, "k->code[0].fn = dead_entry;", ""),
    "INVLPG leaves addresses of code": ("smc", MMU, "soft_jump_cache_flush_page(c, linear);", ""),
    "another processor can still write": (
        "smc_smp", MMU, "for (unsigned n = 0; n < vm->config.vcpus; n++)\n        soft_tlb_protect(vm->vcpus[n]",
        "for (unsigned n = 0; n < 1; n++)\n        soft_tlb_protect(vm->vcpus[n]",
    ),
    "DMA is not looked at": (
        "soft_api", EVENTS, "soft_blocks_invalidate(vm->caches[0], ranges[i].gpa, ranges[i].size);", ";",
    ),
    "DMA at the end of what it wrote": (
        "soft_api", EVENTS, "soft_blocks_invalidate(vm->caches[0], ranges[i].gpa, ranges[i].size);",
        "soft_blocks_invalidate(vm->caches[0], ranges[i].gpa & ~0xFFFull, 1);",
    ),
    "vCPUs on other threads are not told": ("soft_litmus", SHARED, "post_range(vm->vcpus[i], gpa, size);", ";"),
    "vCPUs on other threads can still write": (
        "soft_litmus", SHARED, "ask_to_protect(c->vm->vcpus[i], c, host);", ";",
    ),
    "who executes a page natively is not stopped": (
        "soft_litmus natively", SHARED, "if (SOFT_UNLIKELY(executors != 0))", "if (0)",
    ),
    "runners write to pages that are to be protected": (
        "soft_litmus natively", MMU, "soft_direct_protect(c, host);", ";",
    ),
    "locked operations are none": ("soft_litmus", LOCK, "lock cmpxchg %[new]", "cmpxchg %[new]"),
    "locked operations across lines are none": (
        "soft_litmus", MEMORY, "soft_alone_begin(c);\n    return false;", "return false;",
    ),
}  # fmt: skip
DAILY = {
    "stores are not looked at", "another processor can still write", "DMA is not looked at",
    "vCPUs on other threads are not told",
}  # fmt: skip
"""One for each check, which every day has to notice it in translated code."""
SECONDS = 20
"""Long enough for what is right: a mutant that hangs has been noticed as well."""


def noticed(program: Path, check: str, folder: Path, seconds: float = 2 * SECONDS) -> bool:
    """Whether the check fails on this program, or takes longer than that."""
    if check == "soft_api":
        command = [program, "dma_into_code", "4"]
        wanted, status = None, 0
    elif check == "soft_litmus":
        command = [program, "50000", "1"]
        wanted, status = None, 0
    elif check == "soft_litmus natively":
        command = [program, "2000", "1", "hidden CPUID", "native", soft_programs.ROOT / "cpu/runner/runner.bin"]
        wanted, status = None, 0
    else:
        command = [program, "--memory", "64", "--timeout", str(SECONDS), "--cpus", str(CPUS.get(check, 1)), "--bios",
                   assemble(check, folder)]  # fmt: skip
        wanted, status = (ROMS / f"{check}.expected").read_text(), 1
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return True
    return run.returncode != status or (wanted is not None and run.stdout != wanted)


def cases() -> list[Any]:
    """(mutant, whether every block is translated at once)."""
    found = []
    for mutant in MUTANTS:
        for hot in (False, True):
            marks = () if hot and mutant in DAILY else pytest.mark.campaign
            way = "translated" if hot else "interpreted"
            found.append(pytest.param(mutant, hot, id=f"{mutant}-{way}", marks=marks))
    return found


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_a_mutant_changes_is_there(mutant: str) -> None:
    _, source, old, _ = MUTANTS[mutant]
    assert (soft_programs.ROOT / source).read_text().count(old) == 1


@pytest.mark.parametrize(("mutant", "hot"), cases())
def test_missing_invalidation_is_noticed(tmp_path: Path, mutant: str, hot: bool) -> None:
    check, source, old, new = MUTANTS[mutant]
    if "natively" in check and (not support().available or support().cpuid_faults):
        pytest.skip("needs direct execution where CPUID does not fault")
    name = check.split()[0] if check.startswith(("soft_api", "soft_litmus")) else "soft_boot"
    program = soft_programs.build_mutant(name, source, old, new, tmp_path, hot=hot)
    # On a busy host the threads of a litmus program may never run at the same time, so it gets several tries.
    tries, seconds = (10, SECONDS / 2) if check == "soft_litmus" else (1, 2 * SECONDS)
    assert any(noticed(program, check, tmp_path, seconds) for _ in range(tries))


@pytest.mark.campaign  # test_soft_roms.py, test_soft_api.py and test_soft_litmus.py say the same
@pytest.mark.parametrize("hot", [False, True], ids=["interpreted", "translated"])
@pytest.mark.parametrize("check", ["smc", "smc_smp", "soft_api", "soft_litmus"])
def test_the_core_itself_passes(tmp_path: Path, check: str, hot: bool) -> None:
    name = check if check in ("soft_api", "soft_litmus") else "soft_boot"
    assert not noticed(soft_programs.build(name, hot=hot), check, tmp_path)
