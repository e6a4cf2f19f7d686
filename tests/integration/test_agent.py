"""The guest agent's real binary, run as a process of the host, against the host's side in vmm/guest/agent.py."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import pwd
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

import pytest

import images.builder
from vmm.errors import ConfigError, GuestError
from vmm.guest.agent import Agent
from vmm.guest.frames import CREDIT, EXIT, MAX_FRAME, PART, RESIZE, SIGNAL, START, STDIN, STDOUT, WINDOW, frame, start
from vmm.guest.process import BUFFER

BINARY = Path(images.builder.__file__).parent / "init" / "guest-init.bin"
pytestmark = pytest.mark.skipif(not Path("/root").is_dir() or not os.access("/root", os.X_OK),
                                reason="the agent starts programs in /root, which this user cannot enter")


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@contextlib.asynccontextmanager
async def link() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    ours, theirs = socket.socketpair()
    with theirs:
        agent = subprocess.Popen([BINARY, "serve", str(theirs.fileno())], pass_fds=[theirs.fileno()])
    try:
        yield await asyncio.open_connection(sock=ours)
    finally:
        ours.close()
        await asyncio.to_thread(agent.wait, 10)


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with contextlib.AsyncExitStack() as stack:
        yield Agent(lambda: stack.enter_async_context(link()))


async def test_output_and_status(agent: Agent) -> None:
    result = await agent.exec("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.status, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
    with pytest.raises(GuestError, match="status 7: err"):
        result.check()


async def test_a_large_input_comes_back_whole(agent: Agent) -> None:
    data = os.urandom(3_000_000)
    result = await agent.exec("cat", input=data, timeout=60)
    assert result.stdout == data


async def test_a_program_that_does_not_read_its_input(agent: Agent) -> None:
    result = await agent.exec("sh", "-c", "exec <&-; sleep 0.1; exit 3", input=bytes(500_000), timeout=60)
    assert result.status == 3


@contextlib.contextmanager
def raw_agent(*arguments: str) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """The agent with a program on it, and our end of the connection."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, subprocess.Popen([BINARY, "serve", str(theirs.fileno())], pass_fds=[theirs.fileno()]) as agent:
            theirs.close()
            ours.settimeout(60)
            for data in start(arguments, {}, "", "", None):
                ours.sendall(data)
            yield ours, agent
            ours.close()
            assert agent.wait(60) == 0


def test_input_on_its_way_does_not_take_the_outcome_along() -> None:
    """The program ends at once; input that is on its way then still finds a reader, and then comes the end."""
    with raw_agent("sh", "-c", "exit 3") as (ours, _):
        for _ in range(WINDOW // MAX_FRAME):
            ours.sendall(frame(STDIN, bytes(MAX_FRAME)))
        seen = b""
        while not seen.endswith(frame(EXIT, b"\0\3")):
            data = ours.recv(100)
            assert data
            seen += data


def test_input_is_credited_as_it_is_taken() -> None:
    with raw_agent("sh", "-c", "head -c 200000 >/dev/null; echo; sleep 60") as (ours, _):
        ours.sendall(frame(STDIN, bytes(MAX_FRAME)) * 4)
        seen, credit, wanted = bytearray(), 0, frame(STDOUT, b"\n")
        while wanted not in seen or credit < 190_000 - WINDOW // 4:
            seen += ours.recv(4096)
            credit = sum(int.from_bytes(seen[at + 5 : at + 9], "little")
                         for at in range(0, len(seen), 1) if seen[at : at + 5] == frame(CREDIT, bytes(4))[:5])
        assert 190_000 - WINDOW // 4 <= credit <= 4 * MAX_FRAME
        ours.sendall(frame(SIGNAL, b"\x0f"))


async def test_signals_are_not_stuck_behind_input(agent: Agent) -> None:
    """A program that never reads, with more input than fits anywhere."""
    async with await agent.start_process("sleep", "60") as process:
        writing = asyncio.create_task(process.write(bytes(4 * WINDOW)))
        while process._window:
            await asyncio.sleep(0)
        await process.send_signal(15)
        assert await asyncio.wait_for(process.wait(), 30) == 128 + 15
        await asyncio.wait_for(writing, 30)


async def test_signals_are_not_stuck_behind_output(agent: Agent, tmp_path: Path) -> None:
    """Nobody reads what the program writes without end."""
    async with await agent.start_process("sh", "-c", f"echo $$ >{tmp_path}/pid; exec cat /dev/zero") as process:
        while process.stdout._size < BUFFER:
            await asyncio.sleep(0.01)
        await process.send_signal(9)
        pid = int((tmp_path / "pid").read_text())
        async with asyncio.timeout(30):
            while is_running(pid):
                await asyncio.sleep(0.01)
        await process.stdout.read_all()
        assert await process.wait() == 128 + 9


async def test_the_status_does_not_wait_for_what_is_left_behind(agent: Agent, tmp_path: Path) -> None:
    """All that the program wrote itself comes; what it left runs on, can write, and nobody hears it."""
    os.mkfifo(tmp_path / "gate")
    script = f"head -c 100000 /dev/zero; (read x <{tmp_path}/gate; echo late && touch {tmp_path}/wrote) & exit 5"
    async with asyncio.timeout(60):
        result = await agent.exec("sh", "-c", script)
        assert (result.status, result.stdout) == (5, bytes(100_000))
        await asyncio.to_thread((tmp_path / "gate").write_text, "\n")
        while not (tmp_path / "wrote").exists():
            await asyncio.sleep(0.01)


async def test_the_status_on_a_terminal_does_not_wait_either(agent: Agent) -> None:
    async with asyncio.timeout(60):
        script = "trap '' HUP; sleep 300 & echo $!; exit 6"
        async with await agent.start_process("sh", "-c", script, terminal=(5, 5)) as process:
            pid = int(await process.stdout.read_all())
            assert await process.wait() == 6
    os.kill(pid, 9)


async def test_environment_and_directory(agent: Agent) -> None:
    result = await agent.exec("sh", "-c", 'pwd; echo "$NAME"', cwd="/tmp", env={"NAME": "a b"})
    assert result.text == "/tmp\na b"
    assert (await agent.exec("true", cwd="/no/such")).status == 126


async def test_what_is_given_wins_over_the_agents_environment(agent: Agent, tmp_path: Path) -> None:
    """Each variable is there once, and PATH counts for finding the program too."""
    (tmp_path / "hi").write_text("#!/bin/sh\necho mine\n")
    (tmp_path / "hi").chmod(0o755)
    given = {"HOME": "/tmp", "PATH": f"{tmp_path}:/usr/bin:/bin", "USER": "me", "TERM": "dumb", "EMPTY": ""}
    lines = (await agent.exec("env", env=given)).text.splitlines()
    names = [line.partition("=")[0] for line in lines]
    assert sorted(set(names)) == sorted(names)
    assert {f"{name}={value}" for name, value in given.items()} <= set(lines)
    assert (await agent.exec("hi", env=given)).text == "mine"
    assert (await agent.exec("hi")).status == 127
    assert (await agent.exec("hi", env={"PATH": ":/bin"}, cwd=str(tmp_path))).text == "mine"


async def test_bytes_arrive_as_they_are(agent: Agent, tmp_path: Path) -> None:
    """Also as os.fsdecode makes text of them."""
    odd, text = b"a\xff\xc5b", "żółć"
    shown = await agent.exec("printf", "%s|%s|%s", odd, odd.decode("utf-8", "surrogateescape"), text)
    assert shown.stdout == b"|".join((odd, odd, text.encode()))
    assert (await agent.exec("sh", "-c", 'printf %s "$V"', env={"V": odd})).stdout == odd
    place = os.fsencode(tmp_path) + b"/" + odd
    os.mkdir(place)
    assert (await agent.exec("pwd", "-P", cwd=place)).stdout == place + b"\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(odd)).write_bytes(odd)
    await agent.copy_in(tmp_path / "in", place + b"/copy")
    assert os.listdir(place + b"/copy") == [odd]
    await agent.copy_out(place + b"/copy", tmp_path / "back")
    assert os.listdir(os.fsencode(tmp_path / "back")) == [odd]
    await agent.copy_out(place + b"/copy/" + odd, tmp_path / os.fsdecode(odd + b"2"))
    assert (tmp_path / os.fsdecode(odd + b"2")).read_bytes() == odd
    for wrong in ("\ud800", "a\0b"):
        with pytest.raises(ConfigError):
            await agent.exec("true", wrong)


def test_names_in_an_archive_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    """In the locale C without UTF-8, as `LC_ALL=C PYTHONUTF8=0` has it."""
    program = """
import os, sys
from io import BytesIO
from pathlib import Path
from vmm.guest.files import _send_directory
from vmm.guest.untar import unpack
archive = bytearray()
_send_directory(Path(sys.argv[1]), archive.extend)
unpack(BytesIO(archive), Path(sys.argv[2]))
"""
    names = ["żółć".encode(), b"\xff", "ż".encode() * 90]
    (tmp_path / "in").mkdir()
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_bytes(b"")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program, tmp_path / "in", tmp_path / "out"], env=environment, check=True)
    assert sorted(os.listdir(os.fsencode(tmp_path / "out"))) == sorted(names)


async def test_many_and_long_arguments(agent: Agent) -> None:
    count = await agent.exec("sh", "-c", "echo $# ${#1}", "sh", *["x" * 100_000] * 15, *["y"] * 5000, env={"A": "b"})
    assert count.text == "5015 100000"
    for arguments, message in (
        (("true", "x" * 131_072), "'x.*…': 131072 bytes; one argument or variable has at most 131071"),
        (("true", *["x" * 100_000] * 21), "22 arguments and variables take 21000"),
    ):
        with pytest.raises(ConfigError, match=message):
            await agent.exec(*arguments)
    for name in ("", "A=B"):
        with pytest.raises(ConfigError, match="is no name of a variable"):
            await agent.exec("true", env={name: "x"})


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
async def test_users(agent: Agent) -> None:
    shown = await agent.exec("sh", "-c", 'id -u; id -g; id -G; echo "$HOME $USER"; pwd', user="nobody")
    entry, user = pwd.getpwnam("nobody"), "nobody"
    home = entry.pw_dir if os.path.isdir(entry.pw_dir) else "/"
    assert shown.text.splitlines() == [str(entry.pw_uid), str(entry.pw_gid), str(entry.pw_gid),
                                       f"{entry.pw_dir} {user}", home]
    tty = grp.getgrnam("tty").gr_gid
    assert (await agent.exec("sh", "-c", "id -u; id -g", user="4711:tty")).text.split() == ["4711", str(tty)]
    assert (await agent.exec("id", "-u", user=str(entry.pw_uid))).text == str(entry.pw_uid)
    for wrong in ("no-such-user", "root:no-such-group", "4294967296"):
        failed = await agent.exec("true", user=wrong)
        assert failed.status == 126 and b"/etc/" in failed.stderr


async def test_programs_that_cannot_be_run(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\x7fnot a program")
    for name, status, message in (
        ("no-such-program", 127, b"no-such-program: not found"), ("/no/such", 127, b"/no/such: not found"),
        ("/etc", 126, b"/etc: permission denied"), (str(tmp_path / "data"), 126, b"permission denied"),
    ):
        result = await agent.exec(name)
        assert result.status == status and message in result.stderr
    (tmp_path / "data").chmod(0o755)
    result = await agent.exec(str(tmp_path / "data"))
    assert result.status == 126 and b"exec format error" in result.stderr


async def test_a_full_machine_makes_programs_wait() -> None:
    """As many at once as the guest's queue holds; what is refused for want of a place comes later."""
    async with contextlib.AsyncExitStack() as stack:
        refusals, dialing, most = 40, 0, 0

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            nonlocal refusals, dialing, most
            dialing += 1
            most = max(most, dialing)
            await asyncio.sleep(0)
            dialing -= 1
            if refusals:
                refusals -= 1
                raise ConnectionRefusedError("no place")
            return await stack.enter_async_context(link())

        agent = Agent(connect)
        results = await asyncio.wait_for(asyncio.gather(*(agent.exec("echo", str(n)) for n in range(50))), 60)
        assert [result.text for result in results] == [str(n) for n in range(50)] and 1 < most <= 32


async def test_an_agent_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.guest.agent.SILENT_SECONDS", 0.05)

    async def refused() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raise ConnectionResetError("the guest refused")

    async def full() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raise ConnectionRefusedError("no place")

    with pytest.raises(GuestError, match="no place for another program in the guest within"):
        await Agent(full, patience=0.05).exec("true")
    with pytest.raises(GuestError, match="the guest's agent has ended: nobody answers"):
        await Agent(refused).exec("true")
    agent = Agent(full)
    waiting = asyncio.create_task(agent.exec("true"))
    await asyncio.sleep(0)
    agent.close()
    with pytest.raises(GuestError, match="the machine has ended"):
        await asyncio.wait_for(waiting, 30)
    agent = Agent(full, waits=True)
    agent.set_ready(1)
    with pytest.raises(GuestError, match="speaks version 1 of its protocol, this vmm version 3; build .* again"):
        await agent.exec("true")


async def test_signals(agent: Agent) -> None:
    async with await agent.start_process("sh", "-c", "echo up; sleep 60") as process:
        assert await process.stdout.read() == b"up\n"
        await process.send_signal(15)
        assert await process.wait() == 128 + 15


async def test_a_terminal_and_its_size(agent: Agent) -> None:
    async with await agent.start_process("sh", "-c", "stty size; read line; stty size", terminal=(30, 90)) as process:
        seen = b""
        while b"30 90" not in seen:
            seen += await process.stdout.read()
        await process.resize(10, 40)
        await process.write(b"\n")
        seen += await process.stdout.read_all()
        assert b"10 40" in seen
        assert await process.wait() == 0


async def test_the_console_is_told_its_size() -> None:
    """The frame that the guest's side reads, and nothing after it: the agent ends with that connection."""
    ours, theirs = socket.socketpair()
    with ours:
        agent = Agent(partial(asyncio.open_connection, sock=theirs))
        await agent.resize_console(41, 123)
        ours.settimeout(10)
        with ours.makefile("rb") as stream:
            assert stream.read() == struct.pack("<BIHH", RESIZE, 4, 41, 123)


async def test_leaving_early_kills_the_program(agent: Agent) -> None:
    async with await agent.start_process("sh", "-c", "echo $$; exec sleep 300") as process:
        pid = int(await process.stdout.read())
    async with asyncio.timeout(10):
        while is_running(pid):
            await asyncio.sleep(0.01)


async def test_a_timeout_cleans_up(agent: Agent) -> None:
    with pytest.raises(TimeoutError):
        await agent.exec("sleep", "300", timeout=0.2)


async def test_files_both_ways(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\0\xff" * 1000)
    (tmp_path / "in").chmod(0o751)
    await agent.copy_in(tmp_path / "in", str(tmp_path / "guest file"))
    assert (tmp_path / "guest file").stat().st_mode & 0o777 == 0o751
    await agent.copy_out(str(tmp_path / "guest file"), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"\0\xff" * 1000
    with pytest.raises(ConfigError, match="cannot read .*gone: no such file"):
        await agent.copy_in(tmp_path / "gone", "/x")


async def test_directories_both_ways(agent: Agent, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / ("long" * 40)).mkdir(parents=True)
    (source / "deep" / ("long" * 40) / "file").write_bytes(os.urandom(700_000))
    (source / "empty").mkdir(mode=0o750)
    (source / "script").write_text("#!/bin/sh\n")
    (source / "script").chmod(0o755)
    (source / "link").symlink_to("script")
    (source / "outside").symlink_to("/etc/passwd")
    os.mkfifo(source / "pipe")
    os.link(source / "script", source / "twin")
    await agent.copy_in(source, str(tmp_path / "there" / "new"))
    await agent.copy_out(str(tmp_path / "there" / "new"), tmp_path / "back")
    found = {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*")}
    assert found == {str(path.relative_to(source)) for path in source.rglob("*")} - {"pipe"}
    for path in source.rglob("*"):
        copy = tmp_path / "back" / path.relative_to(source)
        if path.is_symlink():
            assert copy.readlink() == path.readlink()
        elif path.is_file():
            assert copy.read_bytes() == path.read_bytes()
            assert copy.stat().st_mode & 0o777 == path.stat().st_mode & 0o777
    assert (tmp_path / "back" / "empty").stat().st_mode & 0o777 == 0o750
    await agent.copy_out(str(tmp_path / "there" / "new"), tmp_path / "back")  # over what is there already


async def test_copying_that_fails_says_why(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    with pytest.raises(GuestError, match="copying .*file to /proc/nothing: .*/proc/nothing"):
        await agent.copy_in(tmp_path / "file", "/proc/nothing")
    with pytest.raises(GuestError, match="/dev/full: .*[Nn]o space left"):
        await agent.copy_in(tmp_path / "file", "/dev/full")
    with pytest.raises(GuestError, match="copying /no/such to .*: .*No such file"):
        await agent.copy_out("/no/such", tmp_path / "x")
    with pytest.raises(ConfigError, match="cannot write .*/no/such/x.*: no such file"):
        await agent.copy_out(str(tmp_path / "file"), "/no/such/x")
    with pytest.raises(GuestError, match="more than 1000 bytes; allow more with limit="):
        await agent.copy_out(str(tmp_path / "file"), tmp_path / "x", limit=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def files_of(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


async def test_a_cancelled_copy_leaves_nothing(agent: Agent, tmp_path: Path) -> None:
    """No file, and no thread that still copies."""
    os.mkfifo(tmp_path / "endless")
    writer = os.open(tmp_path / "endless", os.O_RDWR)
    try:
        for copy in (
            lambda: agent.copy_out(str(tmp_path / "endless"), tmp_path / "target"),
            lambda: agent.copy_in("/dev/zero", "/dev/null"),
        ):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await copy()
            assert not (tmp_path / "target").exists()
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    finally:
        os.close(writer)
    for stack in sys._current_frames().values():
        assert not any(name.endswith(("files.py", "untar.py")) for name in files_of(stack))


async def test_many_tiny_frames_take_no_more_memory_than_large_ones() -> None:
    """A guest that sends a byte at a time while nobody reads; then all of it is there."""
    count = 100_000
    ours, theirs = socket.socketpair()
    agent = Agent(lambda: asyncio.open_connection(sock=ours))
    async with await agent.start_process("true") as process:
        data = frame(STDOUT, b"x") * count + frame(EXIT, b"\0\0")
        sending = asyncio.create_task(asyncio.to_thread(theirs.sendall, data))
        while process.stdout._room.is_set():
            await asyncio.sleep(0)
        assert len(process.stdout._parts) < BUFFER // 64 + 1
        assert await process.stdout.read(1) == b"x"
        assert len(await process.stdout.read_all()) == count - 1
        assert await process.wait() == 0 and process.stdout._size == 0
        await sending
    theirs.close()


async def test_requests_that_cannot_be_sent(agent: Agent) -> None:
    for arguments in ((), ("a\0b",)):
        with pytest.raises(ConfigError):
            await agent.exec(*arguments)


@pytest.mark.parametrize("request_", [
    frame(9, b""), frame(START, b"abc"), frame(START, struct.pack("<IHHII", 0, 0, 0, 9, 0)),
    frame(START, struct.pack("<IHHII", 0, 0, 0, 0, 0)), frame(START, struct.pack("<IHHII", 0, 0, 0, 1, 1 << 31)),
    struct.pack("<BI", START, 1 << 31), frame(PART, bytes(MAX_FRAME)) * 34, frame(1, bytes(9)),
])
async def test_the_agent_survives_broken_requests(request_: bytes) -> None:
    async with link() as (reader, writer):
        writer.write(request_)
        assert (await asyncio.wait_for(reader.readexactly(5), 10))[0] == 0x84
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("answer", [
    struct.pack("<BI", 0x77, 0), struct.pack("<BI", 0x81, 1 << 20), struct.pack("<BI", 0x83, 1) + b"x", b"",
])
async def test_a_guest_that_breaks_the_protocol_is_a_guest_error(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    agent = Agent(lambda: asyncio.open_connection(sock=ours))
    async with await agent.start_process("true") as process:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(GuestError):
            await process.wait()
    theirs.close()
