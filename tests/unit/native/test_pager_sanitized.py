"""vmm/native/pager.c and serve.c as a program of their own, under ThreadSanitizer and AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ["tests/support/pager/pager_test.c", *(f"vmm/native/{name}.c" for name in ("pager", "serve", "crc"))]
ROUNDS = int(os.environ.get("LOOPVISOR_PAGER_ROUNDS", "3"))


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_pages_come_while_they_are_touched(tmp_path: Path, sanitizer: str) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = tmp_path / "pager"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-fsanitize={sanitizer}"]
    made = subprocess.run([compiler, *flags, "-o", str(program), *SOURCES], cwd=ROOT, capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip(f"the compiler has no sanitizer {sanitizer}")
    assert not made.returncode, made.stderr
    for seed in range(ROUNDS):
        done = subprocess.run(
            [program, str(seed), str(seed * 2 % 7)], capture_output=True, text=True, timeout=300,
            env={"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"},
        )  # fmt: skip
        if done.returncode == 77:
            pytest.skip(done.stdout)
        if "unexpected memory mapping" in done.stderr:  # more random addresses than the sanitizer's library knows
            pytest.skip(done.stderr.splitlines()[0])
        assert not done.returncode and "every byte right" in done.stdout, done.stdout + done.stderr
