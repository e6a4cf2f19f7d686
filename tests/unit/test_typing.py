"""What a type checker says of programs that embed a machine: parts of a configuration are made without generated code
(vmm.convert.Checked), and checkers must know their fields all the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """\
import asyncio
from pathlib import Path

import vmm

disk = vmm.Disk(path=Path("root.img"), readonly=True, cache="none")
config = vmm.Config(name="a", cpus=2, memory=1 << 28, kernel=Path("k"), disks=(disk,), timeout=1.5, clock="virtual")
cpus: int = config.cpus
path: Path = config.disks[0].path
vmm.Config(cpu=2)  # call-arg
vmm.Config(cpus=[2])  # arg-type
vmm.Config(clock="sundial")  # arg-type
vmm.Config(disks=disk)  # arg-type
vmm.Config("a")  # call-arg
vmm.Disk()  # call-arg
vmm.Disk(path=Path("root.img"), cache="fast")  # arg-type
vmm.Net(kind="wireless")  # arg-type
config.cpus = 3  # misc
config.memroy  # attr-defined
text: str = config.cpus  # assignment


async def main() -> None:
    async with vmm.run("linux", memory="1G") as vm:
        status: int = (await vm.exec("true", timeout=5)).status
        text: bytes = (await vm.exec("true")).text  # assignment


asyncio.run(main())
"""


@pytest.mark.slow
def test_a_checker_knows_every_field(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", "--show-error-codes", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found: dict[int, set[str]] = {}
    for name, line, code in re.findall(r"^(.+?):(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.M):
        assert Path(name).name == program.name, done.stdout
        found.setdefault(int(line), set()).add(code)
    expected = {}
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        if match := re.search(r"  # ([a-z, -]+)$", line):
            expected[number] = set(match[1].split(", "))
    assert {line: sorted(codes) for line, codes in found.items()} == {
        line: sorted(codes) for line, codes in expected.items()
    }, done.stdout + done.stderr
