"""The tiny guests say the same on another machine: QEMU as the oracle."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from images import guests

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = [pytest.mark.qemu, pytest.mark.skipif(not QEMU, reason="qemu-system-x86_64 is not installed")]


def run(name: str, append: str = "", stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    path = str(guests.path(name))
    boot = ["-drive", f"format=raw,file={path}"] if name == "real" else ["-kernel", path, "-append", append]
    return subprocess.run(
        [str(QEMU), "-M", "pc", "-accel", "tcg", "-m", "64", *boot, "-nodefaults", "-serial", "stdio"]
        + ["-display", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"],
        input=stdin, capture_output=True, timeout=60, check=False,
    )


@pytest.mark.parametrize(("name", "append", "output"), [
    ("hello", "", b"Hello from guest mode!\n"),
    ("real", "", b"Hello from real mode!\n"),
    ("protected", "", b"Hello from protected mode!\n"),
    ("long", "", b"Hello from long mode!\n"),
    ("user", "", b"Hello from user mode!\n"),
    ("timer", "5", b"5 ticks\n"),
    ("dirty", "99", b"99 pages dirtied\n"),
    ("flood", "70", bytes(range(0x30, 0x6F)) + b"\n012345"),
])
def test_output(name: str, append: str, output: bytes) -> None:
    done = run(name, append)
    assert (done.returncode, done.stdout) == (0, output)


def test_exit_code() -> None:
    assert run("exit", "7").returncode == 15
