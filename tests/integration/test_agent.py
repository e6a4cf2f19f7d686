"""The guest agent's real binary, run as a process of the host, against the host's side in vmm/agent.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import images.builder
from vmm.agent import EXEC, Agent
from vmm.errors import ConfigError, GuestError

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
    with pytest.raises(ConfigError, match="cannot read .*gone: No such file"):
        await agent.copy_in(tmp_path / "gone", "/x")


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
