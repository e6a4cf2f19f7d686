"""The tests in several processes of pytest: each runs once, and what fails or dies is known and runs again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.command import ROOT

FILES = {
    "test_a.py": "def test_1(): pass\ndef test_2(): pass\n",
    "test_b.py": "import os\ndef test_1(): assert os.path.exists('mended')\n",
    "test_c.py": "import os\ndef test_1():\n    assert os.path.exists('mended') or os.kill(os.getpid(), 9)\n"
    "def test_2(): pass\n",
    "test_d.py": "import pytest\ndef test_1(): pytest.skip('no reason')\n",
}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_every_test_runs_once_and_what_failed_or_died_again(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    done = run(tmp_path, "tests.support.lanes", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^== process [12] of 2 died \(SIGKILL\) in test_c.py::test_1$", done.stdout, re.M), done.stdout
    (tmp_path / "mended").touch()
    again = run(tmp_path, "pytest", "-q", "--last-failed", "--last-failed-no-failures", "none")
    assert again.returncode == 0 and re.search(r"^3 passed", again.stdout, re.M), again.stdout
    done = run(tmp_path, "tests.support.lanes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "together: 5 passed, 0 failed, 1 skipped"
    none = run(tmp_path, "pytest", "-q", "--last-failed", "--last-failed-no-failures", "none")
    assert "no tests ran" in none.stdout or "deselected" in none.stdout
