"""The guest agent's real binary, run as a process of the host, against the host's side in vmm/guest/agent.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
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
from vmm.guest.agent import EXEC, EXIT, RESIZE, STDIN, Agent

BINARY = Path(images.builder.__file__).parent / "init" / "guest-init.bin"
pytestmark = pytest.mark.skipif(not Path("/root").is_dir() or not os.access("/root", os.X_OK),
                                reason="the agent starts programs in /root, which this user cannot enter")


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


def test_input_on_its_way_does_not_take_the_outcome_along() -> None:
    """The program ends at once; more input than the connection holds still finds a reader, and then comes the end."""
    ours, theirs = socket.socketpair()
    request = struct.pack("<BHHHH", 0, 0, 0, 3, 0) + b"\0sh\0-c\0exit 3\0"
    with ours:
        with theirs, subprocess.Popen([BINARY, "serve", str(theirs.fileno())], pass_fds=[theirs.fileno()]) as agent:
            theirs.close()
            ours.settimeout(60)
            ours.sendall(struct.pack("<BI", EXEC, len(request)) + request)
            for _ in range(100):
                ours.sendall(struct.pack("<BI", STDIN, 32768) + bytes(32768))
            assert ours.recv(7, socket.MSG_WAITALL) == struct.pack("<BIBB", EXIT, 2, 0, 3)
            ours.close()
            assert agent.wait(60) == 0


async def test_environment_and_directory(agent: Agent) -> None:
    result = await agent.exec("sh", "-c", 'pwd; echo "$NAME"', cwd="/tmp", env={"NAME": "a b"})
    assert result.text == "/tmp\na b"
    assert (await agent.exec("true", cwd="/no/such")).status == 126


async def test_unknown_programs_are_127(agent: Agent) -> None:
    result = await agent.exec("no-such-program")
    assert result.status == 127 and b"no-such-program: not found" in result.stderr


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
        while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
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
    for frame in sys._current_frames().values():
        assert not any(name.endswith(("agentfiles.py", "untar.py")) for name in files_of(frame))


async def test_requests_that_cannot_be_sent(agent: Agent) -> None:
    for arguments in ((), ("a\0b",), ("x" * 70000,)):
        with pytest.raises(ConfigError):
            await agent.exec(*arguments)


@pytest.mark.parametrize("frame", [
    struct.pack("<BI", 9, 0), struct.pack("<BI", EXEC, 3) + b"abc", struct.pack("<BIBHHHH", EXEC, 9, 0, 0, 0, 9, 0),
    struct.pack("<BIBHHHH", EXEC, 9, 0, 0, 0, 0, 0), struct.pack("<BI", EXEC, 1 << 31),
])
async def test_the_agent_survives_broken_requests(frame: bytes) -> None:
    async with link() as (reader, writer):
        writer.write(frame)
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer == b"" or answer[0] == 0x84
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("frame", [
    struct.pack("<BI", 0x77, 0), struct.pack("<BI", 0x81, 1 << 20), struct.pack("<BI", 0x83, 1) + b"x", b"",
])
async def test_a_guest_that_breaks_the_protocol_is_a_guest_error(frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    agent = Agent(lambda: asyncio.open_connection(sock=ours))
    async with await agent.start_process("true") as process:
        theirs.sendall(frame)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(GuestError):
            await process.wait()
    theirs.close()
