"""Programs of the host that building needs: found with a message that names their package, and run so that they end
with this process, even if it is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from images.errors import ImageError

WARDEN = Path(__file__).resolve().parent / "warden.py"


def tool(name: str, package: str) -> str:
    """The path of a host program, also from the sbin directories; ImageError names the package that brings it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if not found:
        raise ImageError(f"{name} is missing; as root: apt-get install {package}")
    return found


@contextmanager
def guarded(
    command: list[str], *, stdin: int = subprocess.DEVNULL, stderr: int = subprocess.PIPE,
    directory: Path | None = None, environment: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """The command with pipes for its output; killed with all that it started when the block or this process ends."""
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WARDEN), str(reader), *command], pass_fds=[reader], stdin=stdin,
            stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace", cwd=directory,
            env={**os.environ, "LC_ALL": "C", **(environment or {})}, start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    try:
        yield process
    finally:
        os.close(writer)
        process.communicate()


def run(
    command: list[str], *, directory: Path | None = None, environment: dict[str, str] | None = None,
    told: Callable[[str], None] | None = None,
) -> tuple[int, str, list[str]]:
    """Run a command to its end: (exit status, standard output, lines of standard error). `told` gets each line of
    standard error as it comes; without it standard output may be large, with it not."""
    with guarded(command, directory=directory, environment=environment) as process:
        if told is None:
            out, error = process.communicate()
            return process.returncode, out, error.splitlines()
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            told(lines[-1])
        out = process.communicate()[0]
        return process.returncode, out, lines
