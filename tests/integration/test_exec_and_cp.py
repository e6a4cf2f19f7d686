"""`vmm exec` and `vmm cp`: what docker users try first, in a machine of another process; and its control socket."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import VMM, Background, Session, environment, vmm, wait_for
from tests.support.debian import PATIENCE
from vmm.guest.frames import VERSION

pytestmark = [pytest.mark.debian, pytest.mark.usefixtures("linux")]
BOOT = 90 * PATIENCE


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory, linux: object) -> Iterator[Path]:
    """The machine `box`, whose guest runs. The first command waits until it is up, and says so if that takes long."""
    folder = tmp_path_factory.mktemp("run")
    words = ["linux", "--core", "soft", "--name", "box", "--console", "none", "--net", "none"]
    with Background(folder, *words) as machine:
        wait_for(lambda: (folder / "loopvisor/box/info.json").exists() or machine.process.poll() is not None)
        status, output, said = box(folder, "box", "echo", "up")
        assert (status, output) == (0, b"up\n") and said in (b"", b"vmm: box: waiting for the guest's agent\n")
        yield folder


def box(runtime: Path, *words: str | bytes, data: bytes | None = None) -> tuple[int, bytes, bytes]:
    """`vmm exec` with these words: status, output, errors."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    command = [*VMM, "exec", *words]
    done = subprocess.run(command, env=environment(runtime), capture_output=True, timeout=BOOT, **options)
    return done.returncode, done.stdout, done.stderr


def running(runtime: Path, what: str) -> bool:
    return box(runtime, "box", "pidof", what)[0] == 0


def test_status_streams_and_what_is_given(runtime: Path) -> None:
    assert box(runtime, "box", "sh", "-c", "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")
    assert box(runtime, "-e", "A=b c", "-w", "/tmp", "box", "--", "sh", "-c", 'pwd; echo "$A"')[1] == b"/tmp\nb c\n"
    assert box(runtime, "-u", "nobody", "box", "id", "-un") == (0, b"nobody\n", b"")
    assert box(runtime, "box", "printf", b"a\xffb")[1] == b"a\xffb"
    assert box(runtime, "box", "no-such")[0] == 127
    assert box(runtime, "box", "/etc") == (126, b"", b"agent: /etc: permission denied\n")
    assert box(runtime, "box", "sh", "-c", "kill -9 $$")[0] == 137


def test_input_only_with_i(runtime: Path) -> None:
    data = os.urandom(1_000_000)
    assert box(runtime, "-i", "box", "cat", data=data) == (0, data, b"")
    assert box(runtime, "box", "cat", data=b"not for it") == (0, b"", b"")


def test_a_terminal_in_the_guest(runtime: Path) -> None:
    """Raw, with a size that follows; Ctrl-C is the program's; our terminal is given back."""
    script = "trap 'echo caught' INT; tty; stty size; read a || read a; echo \"<$a>\""
    with Session(runtime, "exec", "-it", "box", "sh", "-c", script) as session:
        session.expect(b"/dev/pts/", BOOT)
        session.expect(b"24 80\r\n")  # ours does not say
        session.resize(33, 77)
        session.type(b"\x03")
        session.expect(b"caught")
        session.type(b"word\r")
        session.expect(b"<word>")
        assert session.wait(BOOT) == 0
        assert session.restored
    script = 'echo up; until [ "$(stty size)" = "44 99" ]; do sleep 0.05; done; echo resized; exit 3'
    with Session(runtime, "exec", "-it", "box", "sh", "-c", script) as session:
        session.expect(b"up\r\n", BOOT)
        session.resize(44, 99)
        session.expect(b"resized", BOOT)
        assert session.wait(BOOT) == 3


def test_signals(runtime: Path) -> None:
    """SIGINT goes to the program; what ends us ends the program, and the terminal is given back."""
    with Session(runtime, "exec", "box", "sh", "-c", "echo up; exec sleep 1111") as session:
        session.expect(b"up\r\n", BOOT)
        session.kill(signal.SIGINT)
        assert session.wait(BOOT) == 130
    for number, options in ((signal.SIGTERM, ["-it"]), (signal.SIGKILL, []), (signal.SIGHUP, [])):
        with Session(runtime, "exec", *options, "box", "sh", "-c", "echo up; exec sleep 2222") as session:
            session.expect(b"up\r\n", BOOT)
            assert running(runtime, "sleep")
            session.kill(number)
            assert session.wait(BOOT) == (-9 if number == signal.SIGKILL else 128 + number)
            assert session.restored
        deadline = time.monotonic() + BOOT
        while running(runtime, "sleep"):
            assert time.monotonic() < deadline


@pytest.mark.parametrize(("words", "status", "message"), [
    (["exec", "nobody-here", "ls"], 2, "vmm: no machine is called 'nobody-here'; running: box"),
    (["exec", "box"], 2, "vmm: exec: which command? write: vmm exec box -- COMMAND…"),
    (["exec", "-it", "box", "ls"], 2, "vmm: -t: standard input is no terminal; leave -t out"),
    (["exec", "-e", "=x", "box", "ls"], 2, "vmm: env: '' is no name of a variable; write NAME=value"),
    (["cp", "a", "b"], 2, "vmm: cp: one of the two must be NAME:PATH, a path in a machine"),
    (["cp", "box:a", "box:b"], 2, "vmm: cp: copying between machines is not possible"),
    (["cp", "/no/such", "box:/"], 2, "vmm: cannot read /no/such: no such file or directory"),
    (["cp", "/dev/null", "box:/"], 2, "vmm: /dev/null: neither file, directory nor link"),
    (["cp", "/etc/passwd", "box:/no/such"], 2, "vmm: /no/such: no such directory in the guest"),
    (["cp", "/etc/passwd", "box:/no/"], 2, "vmm: /no/: no such directory in the guest"),
    (["cp", "box:/etc", "/no/such/x"], 2, "vmm: /no/such/x: no such directory on this host"),
    (["cp", "box:/no/such", "/tmp"], 3, "vmm: copying /no/such: "),
    (["cp", "/etc/apt", "box:/etc/hostname"], 2, "vmm: /etc/hostname: is a file in the guest"),
    (["cp", "-L", "box:/etc", "-"], 2, "vmm: cp: -L is not possible with a stream"),
])
def test_mistakes_are_one_line(runtime: Path, words: list[str], status: int, message: str) -> None:
    done = vmm(runtime, *words, timeout=BOOT)
    assert done.returncode == status and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_files_and_directories_both_ways(runtime: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"n\xffme")
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / odd).write_bytes(os.urandom(300_000))
    (source / "link").symlink_to("sub")
    (source / "sub" / odd).chmod(0o751)

    def cp(*words: str) -> None:
        done = vmm(runtime, "cp", *words, timeout=BOOT)
        assert (done.returncode, done.stderr) == (0, ""), words

    def is_copy(copy: Path) -> bool:
        file = copy / "sub" / odd
        return ((copy / "link").readlink() == Path("sub") and file.stat().st_mode & 0o777 == 0o751
                and file.read_bytes() == (source / "sub" / odd).read_bytes())  # fmt: skip

    cp(str(source), "box:tmp")  # relative to the root
    cp("box:/tmp/source", str(tmp_path / "back"))
    cp("box:/tmp/source", str(tmp_path / "back"))  # is there now: into it
    assert is_copy(tmp_path / "back") and is_copy(tmp_path / "back" / "source")
    cp(f"{source}/.", "box:/tmp/new")
    (tmp_path / "into").mkdir()
    cp("box:/tmp/new/.", str(tmp_path / "into"))
    assert is_copy(tmp_path / "into")
    cp(str(source / "sub" / odd), "box:/tmp/file")
    cp("box:/tmp/file", str(tmp_path / "into"))
    assert (tmp_path / "into" / "file").read_bytes() == (source / "sub" / odd).read_bytes()
    cp(str(source / "link"), "box:/tmp/alink")
    assert box(runtime, "box", "readlink", "/tmp/alink")[1] == b"sub\n"
    cp("box:/tmp/alink", str(tmp_path / "alink"))
    assert (tmp_path / "alink").readlink() == Path("sub")
    cp("-L", str(source / "link"), "box:/tmp/followed")
    assert box(runtime, "-w", "/tmp/followed", "box", "sh", "-c", "echo *")[1] == os.fsencode(odd) + b"\n"
    cp("-L", "box:/tmp/source/link", str(tmp_path / "followed"))
    assert os.listdir(tmp_path / "followed") == [odd]


def test_archives_as_streams(runtime: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as writer:
        member = tarfile.TarInfo("folder/file")
        member.size = 5
        writer.addfile(member, io.BytesIO(b"hello"))
    words = [*VMM, "cp", "-", "box:/tmp"]
    done = subprocess.run(words, env=environment(runtime), input=archive.getvalue(), capture_output=True, timeout=BOOT)
    assert (done.returncode, done.stderr) == (0, b"")
    for source, name in (("box:/tmp/folder", "folder/file"), ("box:/tmp/folder/.", "./file")):
        done = subprocess.run([*VMM, "cp", source, "-"], env=environment(runtime), stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=BOOT)  # fmt: skip
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as reader:
            body = reader.extractfile(name)
            assert body is not None and body.read() == b"hello"
    done = subprocess.run([*VMM, "cp", "-", "box:/no/such"], env=environment(runtime), input=bytes(5_000_000),
                          capture_output=True, timeout=BOOT)  # fmt: skip
    assert done.returncode == 3 and b"/no/such: no such directory" in done.stderr


def test_many_clients_at_once(runtime: Path) -> None:
    clients = [subprocess.Popen([*VMM, "exec", "box", "echo", str(number)], env=environment(runtime), text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for number in range(12)]  # fmt: skip
    assert [client.communicate(timeout=2 * BOOT)[0] for client in clients] == [f"{number}\n" for number in range(12)]


def control(runtime: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(BOOT)
    client.connect(str(runtime / "loopvisor/box/control.sock"))
    return client


def test_a_client_harms_only_itself(runtime: Path) -> None:
    """Other versions, connections that are never used, and clients that leave at once or never read."""
    clients = [control(runtime) for _ in range(8)]
    asked = json.dumps({"command": "agent", "version": VERSION}).encode() + b"\n"
    try:
        clients[0].sendall(b'{"command": "agent", "version": 1}\n{"command": "agent"}\n')
        answer = json.loads(clients[0].makefile("rb").readline())
        assert answer["kind"] == "ConfigError" and f"version {VERSION} of the agent's protocol" in answer["error"]
        for client in clients[1:4]:
            client.sendall(asked)  # a descriptor that nobody fetches
        for client in clients[4:]:
            client.sendall(asked)
            client.close()
        line, descriptors, _, _ = socket.recv_fds(clients[1], 65536, 4)
        assert json.loads(line) == {"ok": True, "ready": True} and len(descriptors) == 1
        with socket.socket(fileno=descriptors[0]) as given:
            given.settimeout(BOOT)
            given.sendall(b"\xff" * 100)
            assert given.recv(1)[0] == 0x84  # the agent's ERROR, and nothing else happens
        assert box(runtime, "box", "echo", "still there")[1] == b"still there\n"
    finally:
        for client in clients:
            client.close()


def test_machines_without_an_agent_or_that_stand_still(runtime: Path, tmp_path: Path) -> None:
    with Background(runtime, "echo", "--name", "echo", "--console", "none") as machine:
        wait_for(lambda: (runtime / "loopvisor/echo/info.json").exists() or machine.process.poll() is not None)
        assert box(runtime, "echo", "ls") == (
            2, b"", b"vmm: echo: this machine has no guest agent; set agent=True and run an image that has it\n"
        )
    assert vmm(runtime, "pause", "box").returncode == 0
    try:
        assert box(runtime, "box", "ls") == (2, b"", b"vmm: box: is paused; run on with: vmm resume box\n")
    finally:
        assert vmm(runtime, "resume", "box").returncode == 0


def test_the_machine_ends_meanwhile(runtime: Path) -> None:
    """The last test of this module: it ends the machine."""
    client = subprocess.Popen([*VMM, "exec", "box", "sh", "-c", "echo up; exec sleep 3333"], env=environment(runtime),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert client.stdout is not None and select.select([client.stdout], [], [], BOOT)[0]
    assert vmm(runtime, "kill", "box").returncode == 0
    assert b"vmm: the guest ended the connection before the program did\n" in client.communicate(timeout=BOOT)
    assert client.returncode == 3
