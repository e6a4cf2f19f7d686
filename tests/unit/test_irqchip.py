"""The software core's irqchip in C against its data sheets: builds native/irqchip_test.c, runs each test in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/unit/native/irqchip_test.c"
NAMES = re.findall(r"^TEST\((\w+)\)", SOURCE.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("irqchip")
    (folder / "irqchip_tests.inc").write_text("".join(f"T({name}),\n" for name in NAMES))
    sources = sorted((ROOT / "cpu/soft/irqchip").glob("*.c"))
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
             "-fno-sanitize-recover=undefined", "-fno-strict-aliasing"]
    target = folder / "irqchip_test"
    includes = [f"-I{ROOT / 'cpu'}", f"-I{folder}"]
    subprocess.run(["gcc", *flags, *includes, "-o", target, SOURCE, *sources], check=True)
    return target


@pytest.mark.parametrize("name", NAMES)
def test_irqchip(program: Path, name: str) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
