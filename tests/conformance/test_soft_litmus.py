"""vCPUs that run at the same time keep the memory model, locked operations, changed code: tests/support/soft_litmus.c.

LOOPVISOR_LITMUS gives the number of rounds of a campaign.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support import soft_programs
from tests.support.patience import PATIENCE

ROUNDS = int(os.environ.get("LOOPVISOR_LITMUS", "20000"))


@pytest.mark.parametrize("hot", [False, True], ids=["", "translated"])
def test_nothing_forbidden_is_seen(hot: bool) -> None:
    """Every litmus program, also when every block is translated at once."""
    sanitize = bool(os.environ.get("SOFT_SANITIZE"))
    program = soft_programs.build("soft_litmus", sanitize=sanitize, hot=hot and not sanitize)
    run = subprocess.run(
        [program, str(ROUNDS)], capture_output=True, text=True, check=False, timeout=(120 + ROUNDS / 1000) * PATIENCE
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok ") == 14
