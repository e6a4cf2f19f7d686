"""The software core's C interface: DMA into code, wake, interrupts from other threads, dirty log, slots, debugging.

The checks are tests/support/soft_api.c, which says what each is about.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support import soft_programs
from tests.support.patience import PATIENCE


@pytest.mark.parametrize("hot", [False, True], ids=["", "translated"])
def test_c_interface(hot: bool) -> None:
    """Every check of the program passes, also when every block is translated at once."""
    sanitize = bool(os.environ.get("SOFT_SANITIZE"))
    program = soft_programs.build("soft_api", sanitize=sanitize, hot=hot and not sanitize)
    run = subprocess.run([program, "all", str(20 * PATIENCE)], capture_output=True, text=True, timeout=300 * PATIENCE,
                         check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("\nok ") == 17
