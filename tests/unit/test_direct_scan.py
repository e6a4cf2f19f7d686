"""cpu/soft/direct/scan.c: where in a page an instruction could begin that would show the host's processor."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
END = 4096
"""Of a page."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan"
    sources = [ROOT / "tests/support/direct/scan.c", ROOT / "cpu/soft/direct/scan.c"]
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'cpu'}"]
    subprocess.run(["gcc", *flags, *sources, "-o", path], check=True)
    return path


@pytest.mark.parametrize(
    ("host", "line", "found"),
    [
        ("", "- 100 0fa2 -", "100"),
        ("cpuid", "- 100 0fa2 -", ""),
        ("", "- 100 b80fa2c390 -", "101"),
        ("", "- 100 f2480fa2 -", "102 101 100"),
        ("", "- 100 2e6666480fa2 -", "many"),
        ("", "- 100 0fa20fa20fa20fa2 -", "100 102 104 106"),
        ("", "- 100 0fa20fa20fa20fa20fa2 -", "many"),
        ("", f"- {END - 1} 0f a2", f"{END - 1}"),
        ("", f"- {END - 1} 0f -", ""),
        ("", "900f 0 a2 -", "-1"),
        ("", "- 0 a2 -", ""),
        ("", "4866 0 0fa2 -", "0 -1 -2"),
        ("", f"- {END - 2} 6648 0fa2", f"{END - 1} {END - 2}"),
        ("", "0fa2 0 90 -", ""),
        ("", "- 0 90 0fa2", ""),
        ("", "- 100 0f01d0 -", "100"),
        ("", "- 100 0f01d4 -", "100"),
        ("", "- 100 0f01f9 -", ""),
        ("", "- 100 0f03c1 -", "100"),
        ("", "- 100 0f0301 -", ""),
        ("", "- 100 f30fc7f8 -", "101 100"),
        ("", "- 100 0fc7f0 -", ""),
        ("", "- 100 0fae00 -", "100"),
        ("", "- 100 0fae08 -", "100"),
        ("", "- 100 0fae10 -", ""),
        ("", "- 100 0fae20 -", "100"),
        ("", "- 100 0faee8 -", ""),
        ("", "- 100 0f34 -", ""),
        ("sysenter", "- 100 0f34 -", "100"),
        ("", "- 100 d580a2 -", ""),
        ("rex2", "- 100 d580a2 -", "100"),
        ("rex2", "- 100 d500a2 -", ""),
        ("rex2", "- 100 66d5ff01d0 -", "101 100"),
        ("rex2", f"- {END - 2} d580 a2", f"{END - 2}"),
        ("rex2", "- 100 d50fa2 -", "101"),
    ],
)
def test_instructions_that_see_the_host_are_found_wherever_they_could_begin(
    program: Path, host: str, line: str, found: str
) -> None:
    """CPUID, XGETBV, VMFUNC, LSL, RDPID, FXSAVE to XSAVE, SYSENTER; in constants, behind prefixes, over an edge."""
    answer = subprocess.run([program, *host.split()], input=line, text=True, stdout=subprocess.PIPE, check=True)
    assert answer.stdout == found + "\n"
