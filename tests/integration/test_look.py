"""What a user sees: progress on a terminal and silence in a pipe, tables that fit the window."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import struct
import termios
from pathlib import Path

import pytest

from cli.progress import ProgressLine, boot_progress
from images import builder
from tests.support.command import Background, Session, vmm, wait_for

BOOT = 120.0


def screen(seen: bytes) -> list[str]:
    """The lines of a terminal after what was written to it, as far as carriage return and newline go."""
    lines, column = [""], 0
    for char in re.sub(r"\x1b\[[0-9;]*[a-zA-Z]", "", seen.decode(errors="replace")):
        if char == "\r":
            column = 0
        elif char == "\n":
            lines.append("")
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + char + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.debian
def test_boot_progress_gives_way_to_the_guest(tmp_path: Path, linux: object) -> None:
    with Session(tmp_path, "run", "linux", "--name", "m", "--core", "soft") as session:
        seen = b""
        for wanted in (b"] building the machine", b"] booting: kernel", b"] booting: drivers, root file system"):
            session.expect(wanted, BOOT)
        session.expect(b"linux:~# ", BOOT)
        session.type(b"\x1d")
        session.wait()
        seen = session.seen
    assert b"booting" not in seen

    with Session(tmp_path, "run", "linux", "--name", "m", "--core", "soft", "--", "echo", "whole line") as session:
        assert session.wait(BOOT) == 0
        shown = [line for line in screen(session.seen) if line]
        assert b"booting: kernel" in session.seen
    assert shown == ["whole line"]


@pytest.mark.debian
@pytest.mark.parametrize("options", [[], ["--hvc", "--append", "console=hvc0"]], ids=["serial", "virtio"])
def test_the_console_has_the_size_of_its_window(tmp_path: Path, linux: object, options: list[str]) -> None:
    with Session(tmp_path, "run", "linux", "--core", "soft", *options) as session:
        session.resize(31, 101)
        session.expect(b"linux:~# ", BOOT)
        session.type(b"while sleep 0.1; do stty size; done\n")
        session.expect(b"\r\n31 101\r\n")
        session.resize(32, 102)
        session.expect(b"\r\n32 102\r\n")
        session.type(b"\x1d")
        assert session.wait() == 137


@pytest.mark.debian
@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_a_command_finds_the_network_up(tmp_path: Path, linux: object) -> None:
    found = vmm(tmp_path, "run", "linux", "--core", "soft", "--", "ip", "-4", "addr", "show", "eth0", timeout=BOOT)
    if "passt does not start" in found.stderr:
        pytest.skip(found.stderr)
    assert found.returncode == 0, found.stderr
    assert "inet " in found.stdout


@pytest.mark.debian
def test_pipes_are_quiet(tmp_path: Path, linux: object) -> None:
    done = vmm(tmp_path, "run", "linux", "--core", "soft", "--", "echo", "whole line", timeout=BOOT)
    assert (done.stdout, done.stderr) == ("whole line\n", "")
    done = vmm(tmp_path, "images", "build", "linux")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1


@pytest.mark.debian
def test_build_progress(tmp_path: Path, linux: object) -> None:
    with Session(tmp_path, "images", "build", "linux") as session:
        assert session.wait(BOOT) == 0
        assert b"] looking up packages" in session.seen
        (line,) = [line for line in screen(session.seen) if line]
    assert line.startswith(str(builder.build("linux").directory))


def test_a_message_takes_the_line_of_the_progress(tmp_path: Path) -> None:
    """No such package: the bar is gone when the reason stands there."""
    recipe = tmp_path / "mine.toml"
    kernel = '[kernel]\npackage = "no-such-package-anywhere"\nfile = "x"\n'
    recipe.write_text(f'kind = "busybox"\n{kernel}[root]\nsize_mib = 8\n')
    with Session(tmp_path, "images", "build", str(recipe)) as session:
        assert session.wait(BOOT) == 4
        assert b"] looking up packages" in session.seen
        (line,) = [line for line in screen(session.seen) if line]
    assert line.startswith("vmm: ") and "[" not in line


def written(master: int) -> bytes:
    """What has been written to the terminal."""
    seen = b""
    while select.select([master], [], [], 0.1)[0]:
        seen += os.read(master, 4096)
    return seen


def test_a_bar_counts_bytes_or_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr("cli.progress.width", lambda descriptor: os.get_terminal_size(slave).columns)
        line = ProgressLine()
        line("downloading a package with a name that is too long for this line", 5 << 20, 10 << 20)
        line("second", 2, 4)
        seen = written(master)
        assert seen.startswith(b"\r[==========          ]    5.0 of 10.0 MiB  downloading")
        assert all(len(part) < 60 for part in seen.split(b"\r"))
        assert screen(seen)[-1] == "[==========          ] second"
        line("done", 4, 4)
        assert screen(seen + written(master))[-1] == ""
        marked, clear = boot_progress()
        for name in ("enter", "resume", "first exit", "init"):
            marked(name)
        assert screen(written(master))[-1] == "[============        ] booting: drivers, root file system"
        marked("first console byte")
        marked("root")
        assert screen(written(master))[-1] == ""
        clear()
    os.close(master)


def test_tables_fit_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # images with long names may be in the user's
    (tmp_path / "run").mkdir()
    with Background(tmp_path / "run", "echo", "--name", "echo", "--console", "none") as machine:
        wait_for(lambda: (tmp_path / "run/loopvisor/echo/info.json").exists() or machine.process.poll() is not None)
        for words, heads, name in ((["images", "ls"], ["NAME", "BUILT", "SIZE", "DESCRIPTION"], "hello"),
                                   (["ps"], ["NAME", "STATE", "CORE", "CPUS"], "echo")):  # fmt: skip
            with Session(tmp_path / "run", *words) as session:
                fcntl.ioctl(session.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
                assert session.wait() == 0
                lines = [line for line in screen(session.seen) if line]
                assert session.seen.startswith(b"\x1b[1mNAME")
            assert lines[0].split()[: len(heads)] == heads
            assert all(len(line) <= 50 for line in lines)
            (row,) = [line for line in lines if line.startswith(name)]
            # What belongs to a head stands below it.
            assert row[lines[0].index(heads[1]) - 1] == " " and row[lines[0].index(heads[1])] != " "
            plain = vmm(tmp_path / "run", *words).stdout
            assert "\x1b" not in plain and plain.splitlines()[0].split()[: len(heads)] == heads
