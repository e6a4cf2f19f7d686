"""The command line of `vmm exec` and `vmm cp`, and where a copy goes."""

from __future__ import annotations

import os

import pytest

from cli.guestaccess import ExecArguments, _environment, _place, parse_exec
from vmm.errors import ConfigError
from vmm.guest.copying import destination


@pytest.mark.parametrize(("line", "expected"), [
    ("box ls -l -- x", ExecArguments("box", ["ls", "-l", "--", "x"])),
    ("box -- ls -l", ExecArguments("box", ["ls", "-l"])),
    ("-it box sh", ExecArguments("box", ["sh"], interactive=True, terminal=True)),
    ("box -i -t -- sh", ExecArguments("box", ["sh"], interactive=True, terminal=True)),
    ("--interactive --tty box sh -i", ExecArguments("box", ["sh", "-i"], interactive=True, terminal=True)),
    ("-e A=1 -eB=2 --env C --env=D=4=5 box env", ExecArguments("box", ["env"], env=["A=1", "B=2", "C", "D=4=5"])),
    ("-w /tmp -u me:us box id", ExecArguments("box", ["id"], directory="/tmp", user="me:us")),
    ("-iw/tmp box -uroot id", ExecArguments("box", ["id"], interactive=True, directory="/tmp", user="root")),
    ("-u=root --workdir=/x -- box id", ExecArguments("box", ["id"], directory="/x", user="root")),
    ("box -", ExecArguments("box", ["-"])),
])
def test_exec_takes_dockers_command_line(line: str, expected: ExecArguments) -> None:
    assert parse_exec(line.split()) == expected


@pytest.mark.parametrize("line", ["--help", "box --help", "-h"])
def test_help_is_asked_for(line: str) -> None:
    assert parse_exec(line.split()) is None


@pytest.mark.parametrize(("line", "message"), [
    ("", "which machine"), ("-it", "which machine"), ("box", "which command.*vmm exec box --"),
    ("box --", "which command"), ("--what box ls", "unknown option --what; known are"),
    ("-x box ls", "unknown option -x"), ("-ix box ls", "unknown option -x"),
    ("--tty=yes box ls", "unknown option --tty"), ("box -e", "-e needs a value"),
])
def test_mistakes_of_exec(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_exec(line.split())


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", os.fsdecode(b"\xff"))
    monkeypatch.setenv("TERM", "vt52")
    monkeypatch.delenv("NONE", raising=False)
    assert _environment(["A=1=2", "OURS", "NONE", "EMPTY="], False) == {b"A": b"1=2", b"OURS": b"\xff", b"EMPTY": b""}
    assert _environment([], True) == {b"TERM": b"vt52"}
    assert _environment(["TERM=x"], True) == {b"TERM": b"x"}


@pytest.mark.parametrize(("text", "expected"), [
    ("box:/etc", ("box", b"/etc")), ("box:etc:x", ("box", b"etc:x")), ("/a:b", None), ("./a:b", None), ("../a:b", None),
    ("a", None), ("-", None), ("dir/a:b", None), ("b\udcff:x", None), ("box:/\udcff", ("box", b"/\xff")),
])
def test_paths_in_machines(text: str, expected: tuple[str, bytes] | None) -> None:
    assert _place(text) == expected


def test_a_machine_without_a_path() -> None:
    with pytest.raises(ConfigError, match="which path"):
        _place("box:")


@pytest.mark.parametrize(("is_directory", "source", "target", "place", "expected"), [
    (False, b"/a/f", b"/d", "directory", b"/d/f"), (False, b"/a/f", b"/d/", "directory", b"/d/f"),
    (False, b"/a/f", b"/d/g", "file", b"/d/g"), (False, b"/a/f", b"/d/g", "free", b"/d/g"),
    (False, b"/a/f", b"/d/g/", "free", None), (False, b"/a/f", b"/x/g", "nowhere", None),
    (True, b"/a/s", b"/d", "directory", b"/d/s"), (True, b"/a/s/", b"/d", "directory", b"/d/s"),
    (True, b"/a/s/.", b"/d", "directory", b"/d"), (True, b".", b"/d", "directory", b"/d"),
    (True, b"/", b"/d", "directory", b"/d"), (True, b"/a/..", b"/d", "directory", b"/d"),
    (True, b"/a/s", b"/d/n", "free", b"/d/n"), (True, b"/a/s", b"/d/n/", "free", b"/d/n/"),
    (True, b"/a/s", b"/d/f", "file", None), (True, b"/a/s/.", b"/d/f", "file", None),
    (True, b"/a/s", b"/x/n", "nowhere", None), (False, b"\xff", b"/d", "directory", b"/d/\xff"),
])
def test_where_a_copy_goes(
    is_directory: bool, source: bytes, target: bytes, place: str, expected: bytes | None
) -> None:
    if expected is not None:
        assert destination(is_directory, source, target, place, "there") == expected  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match="no such directory there|is a file there"):
        destination(is_directory, source, target, place, "there")  # type: ignore[arg-type]
