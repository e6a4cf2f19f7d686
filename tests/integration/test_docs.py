"""Every code block of the documentation runs.

Python blocks run as scripts (those with `async def test_…` under pytest); in console blocks the lines that begin with
`$ ` run in a shell, together with the lines after them that begin with `> `, and what stands below a command must be
its output. TOML blocks are configurations. A comment before a block says what else there is to it:

    <!-- not run: reason -->          it is skipped with that reason
    <!-- on a terminal: text -->      its command runs on a terminal; the text is typed when a prompt `# ` stands there
    <!-- on several terminals -->     a machine in the background (`&`) and consoles attached to it, which Ctrl-] leaves
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from images import builder, guests
from images.built import current
from tests.support import passt
from tests.support.command import Session, wait_for

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<how>[^>]+) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
BOOT = 600.0


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    body: str
    how: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("body"))
            yield Block(page.name, line, match["kind"], match["body"], match["how"] or "")


CODE = [block for block in blocks() if block.kind in ("python", "console", "toml")]


@pytest.fixture(scope="module", autouse=True)
def linux_image() -> None:
    if current("linux") is None:
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
    how, _, text = block.how.partition(": ")
    if how == "not run":
        pytest.skip(text)
    if "--net user" in block.body or 'nets=["user"]' in block.body:
        passt.need()
    plain = {"python": run_python, "console": run_console, "toml": run_toml}[block.kind]
    special = {"on a terminal": partial(run_on_a_terminal, text), "on several terminals": run_on_several_terminals}
    (special[how] if how else plain)(block.body, tmp_path, environment)


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


def steps(body: str) -> list[tuple[str, str]]:
    """(command, the output that stands below it)"""
    found: list[tuple[str, str]] = []
    for line in textwrap.dedent(body).splitlines():
        if line.startswith("$ "):
            found.append((line[2:].split("   #")[0].rstrip(), ""))
        elif (line + " ").startswith("> ") and found and not found[-1][1]:
            found[-1] = (f"{found[-1][0]}\n{line[2:]}", "")
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def kernel_files(folder: Path) -> None:
    """What the README calls the reader's own: bzImage, initrd, root.img."""
    built = current("linux")
    assert built is not None
    for theirs, ours in (("bzImage", "vmlinuz"), ("initrd", "initrd"), ("root.img", "root.img")):
        subprocess.run(["cp", "--sparse=always", built.directory / ours, folder / theirs], check=True)


def run_on_a_terminal(typed: str, body: str, folder: Path, environment: dict[str, str]) -> None:
    ((command, _),) = steps(body)
    if command.startswith("make"):
        if not (ROOT / ".venv/bin/vmm").exists():
            pytest.skip("the tests do not run in make's environment")
        folder = ROOT
    else:
        kernel_files(folder)
    with Session.of(["bash", "-c", command], environment, folder) as session:
        session.expect(b"# ", BOOT)
        session.type(f"{typed}\n".encode())
        assert session.wait(BOOT) == 0, session.seen
        assert session.restored


def runs(environment: dict[str, str]) -> bool:
    """There is a machine."""
    return b"running" in subprocess.run(["vmm", "ps"], env=environment, capture_output=True, check=True).stdout


def run_on_several_terminals(body: str, folder: Path, environment: dict[str, str]) -> None:
    background: list[subprocess.Popen[bytes]] = []
    try:
        for command, _ in steps(body):
            if command.endswith("&"):
                words = shlex.split(command.removesuffix("&"))
                background.append(subprocess.Popen(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL))
                wait_for(partial(runs, environment))
            elif command.startswith("vmm console"):
                with Session.of(shlex.split(command), environment, folder) as session:
                    session.expect(b"attached; Ctrl-] detaches", BOOT)
                    session.expect(b"# ", BOOT)
                    session.type(b"\x1d")
                    assert session.wait() == 0
            else:
                subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True, timeout=BOOT)
        assert [process.wait(BOOT) for process in background] == [0] * len(background)
    finally:
        for process in background:
            process.kill()
            process.wait()


def run_console(body: str, folder: Path, environment: dict[str, str]) -> None:
    for command, wanted in steps(body):
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
