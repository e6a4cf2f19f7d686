"""Every code block of the documentation runs.

Python blocks run as scripts (those with `async def test_…` under pytest); in console blocks the lines that begin with
`$ ` run in a shell, and what stands below a command must be its output. A block after `<!-- not run: reason -->` is
skipped with that reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from images import builder, guests
from tests.support import passt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    body: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("body"))
            yield Block(page.name, line, match["kind"], match["body"], match["why"])


CODE = [block for block in blocks() if block.kind in ("python", "console", "toml")]


@pytest.fixture(scope="module", autouse=True)
def linux_image() -> None:
    if builder.current("linux") is None:
        if not shutil.which("apt-get"):
            pytest.skip("the linux image cannot be built: no apt-get")
        builder.build("linux")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    values = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    values["LOOPVISOR_CACHE"] = os.environ.get("LOOPVISOR_CACHE") or str(Path.home() / ".cache" / "loopvisor")
    values["XDG_RUNTIME_DIR"] = str(tmp_path)
    return values


@pytest.mark.debian
@pytest.mark.parametrize("block", CODE, ids=str)
def test_block(block: Block, tmp_path: Path, environment: dict[str, str]) -> None:
    if block.why:
        pytest.skip(block.why)
    if "--net user" in block.body or 'nets=["user"]' in block.body:
        passt.need()
    {"python": run_python, "console": run_console, "toml": run_toml}[block.kind](block.body, tmp_path, environment)


def run_python(body: str, folder: Path, environment: dict[str, str]) -> None:
    script = folder / "test_block.py"
    script.write_text(f"def guest(name):\n    return {str(guests.HERE)!r} + f'/{{name}}.bin'\n\n" + body)
    command = [sys.executable, str(script)]
    if "async def test_" in body:
        (folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_console(body: str, folder: Path, environment: dict[str, str]) -> None:
    steps: list[tuple[str, str]] = []
    for line in textwrap.dedent(body).splitlines():
        if line.startswith("$ "):
            steps.append((line[2:].split("   #")[0].rstrip(), ""))
        elif steps:
            steps[-1] = (steps[-1][0], steps[-1][1] + line + "\n")
    for command, wanted in steps:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=300, check=False,
        )
        assert done.returncode == 0 or wanted, f"{command}: {done.stderr}"
        if wanted:
            assert done.stdout.replace("\r", "") == wanted, f"{command}: {done.stderr}"


def run_toml(body: str, folder: Path, environment: dict[str, str]) -> None:
    from vmm.config import Config

    path = folder / "config.toml"
    path.write_text(body)
    Config.load(path)
