"""The command `vmm` as a user runs it: in a pipe, on a pseudo-terminal, and killed."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any, Self

VMM = [sys.executable, "-c", "from cli.main import main; main()"]
ROOT = Path(__file__).resolve().parents[2]


def environment(runtime: Path) -> dict[str, str]:
    """The process's environment, with a runtime directory of the test's own."""
    return {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)}


def vmm(
    runtime: Path, *arguments: str, timeout: float = 60.0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(
        [*VMM, *arguments], env=environment(runtime), capture_output=True, text=True, timeout=timeout, **options
    )


def not_ignored() -> None:
    """In a child before it becomes a command: signals are as in a terminal, whatever runs the tests."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Session:
    """A command on a pseudo-terminal."""

    def __init__(self, runtime: Path, *arguments: str) -> None:
        """`vmm` with these arguments."""
        self._start([*VMM, *arguments], environment(runtime), None)

    @classmethod
    def of(cls, command: list[str], environment: dict[str, str], folder: Path) -> Self:
        """Any command."""
        session = cls.__new__(cls)
        program = shutil.which(command[0], path=environment["PATH"]) or command[0]
        session._start([program, *command[1:]], environment, folder)
        return session

    def _start(self, command: list[str], environment: dict[str, str], folder: Path | None) -> None:
        self.master, slave = pty.openpty()
        self.terminal = os.ttyname(slave)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LEADER, *command], cwd=folder,
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        self.seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self.master)
        os.close(self._slave)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, wanted: bytes, timeout: float = 30.0) -> None:
        """Read until `wanted` has come."""
        end = time.monotonic() + timeout
        while wanted not in self.seen:
            left = end - time.monotonic()
            ready = select.select([self.master], [], [], max(left, 0))[0]
            assert ready, f"{wanted!r} did not come; the terminal shows {self.seen[-500:]!r}"
            self.seen += os.read(self.master, 4096)
        self.seen = self.seen[self.seen.index(wanted) + len(wanted) :]

    def resize(self, rows: int, columns: int) -> None:
        """The window's size; the foreground processes get SIGWINCH if it changes."""
        termios.tcsetwinsize(self.master, (rows, columns))

    def wait(self, timeout: float = 30.0) -> int:
        """Read on until the command ends; its exit status."""
        end = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < end, f"the command did not end; the terminal shows {self.seen[-500:]!r}"
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 4096)
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 4096)
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """The terminal is as it was before the command."""
        return termios.tcgetattr(self._slave) == self.before

    def give_back(self) -> None:
        """Set the terminal as it was before the command."""
        termios.tcsetattr(self._slave, termios.TCSANOW, self.before)

    def hang_up(self) -> None:
        """Close the terminal; the session is not to be used any more."""
        os.close(self._slave)
        os.close(self.master)

    def kill(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


# Makes the terminal the session's controlling one, then becomes the command.
_LEADER = (
    "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Background:
    """`vmm run … --console none` in the background, until the block ends."""

    def __init__(self, runtime: Path, *arguments: str, **options: Any) -> None:
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.DEVNULL)
        options.setdefault("preexec_fn", not_ignored)
        self.process = subprocess.Popen(
            [*VMM, "run", *arguments], env=environment(runtime), stderr=subprocess.PIPE, text=True, **options
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=20)


def wait_for(condition: Any, timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.01)
