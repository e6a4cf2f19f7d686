"""The console on a socket: replay, several clients, one that is stuck, input that waits, and the log file."""

from __future__ import annotations

import asyncio
import os
import pty
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmm.console.hub import INPUT_HIGH, REPLAY, RING, ConsoleClosed, ConsoleHub, ConsoleLog, ConsoleReader
from vmm.console.server import MAX_CLIENTS, ConsoleServer
from vmm.errors import ConfigError


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ConsoleServer]:
    server = ConsoleServer(ConsoleHub(), tmp_path / "console.sock")
    await server.start()
    yield server
    server.hub.close()
    await server.aclose()
    assert not server.path.exists()


async def connect(server: ConsoleServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    before = len(server.clients)
    reader, writer = await asyncio.open_unix_connection(server.path)
    async with asyncio.timeout(10):
        while len(server.clients) == before:
            await asyncio.sleep(0)
    return reader, writer


async def test_late_client_gets_the_last_64_kib(server: ConsoleServer) -> None:
    text = b"".join(b"%07d\n" % number for number in range(50_000))
    server.hub.write(text)
    reader, writer = await connect(server)
    assert await reader.readexactly(REPLAY) == text[-REPLAY:]
    server.hub.write(b"live")
    assert await reader.readexactly(4) == b"live"
    writer.close()


async def test_a_stuck_client_blocks_neither_the_guest_nor_the_others(server: ConsoleServer) -> None:
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(str(server.path))
        reader, writer = await connect(server)
        block = bytes(range(256)) * 64
        received = 0
        for _ in range(1500):
            server.hub.write(block)
            received += len(await reader.readexactly(len(block)))
        assert received == 1500 * len(block) > 20 * RING
        assert len(server.hub._ring) <= 2 * RING
        assert len(server.clients) == 2
        writer.close()
        # When it reads again it learns what it missed, and then sees what is new.
        stuck.setblocking(False)
        loop = asyncio.get_running_loop()
        seen = b""
        async with asyncio.timeout(10):
            while b" bytes skipped]" not in seen:
                seen = seen[-100:] + await loop.sock_recv(stuck, 1 << 16)


async def test_input_of_all_clients_reaches_the_guest(server: ConsoleServer) -> None:
    writers = [(await connect(server))[1] for _ in range(3)]
    for index, writer in enumerate(writers):
        writer.write(b"%d" % index)
    received = b""
    async with asyncio.timeout(10):
        while len(received) < 3:
            received += server.hub.read(10)
            await asyncio.sleep(0)
    assert sorted(received) == list(b"012")
    for writer in writers:
        writer.close()


async def test_a_paste_waits_for_the_guest_and_arrives_whole(server: ConsoleServer) -> None:
    _, writer = await connect(server)
    text = bytes(index % 251 for index in range(1_000_000))
    writer.write(text)
    received = bytearray()
    async with asyncio.timeout(30):
        while len(received) < len(text):
            assert len(server.hub._input) <= INPUT_HIGH + (256 << 10)
            received += server.hub.read(16_000)
            await asyncio.sleep(0)
    assert bytes(received) == text
    writer.close()


async def test_half_closed_client_still_watches(server: ConsoleServer) -> None:
    reader, writer = await connect(server)
    writer.write_eof()
    server.hub.write(b"after eof")
    assert await reader.readexactly(9) == b"after eof"
    writer.close()


async def test_last_words_reach_the_client(server: ConsoleServer) -> None:
    reader, writer = await connect(server)
    server.hub.write(b"x" * 50_000 + b"last words")
    server.hub.close()
    assert (await reader.read(-1)).endswith(b"last words")
    writer.close()


async def test_too_many_clients_are_told(server: ConsoleServer) -> None:
    sockets = [socket.socket(socket.AF_UNIX) for _ in range(MAX_CLIENTS + 1)]
    try:
        loop = asyncio.get_running_loop()
        for each in sockets[:-1]:
            each.connect(str(server.path))
            async with asyncio.timeout(10):
                while len(server.clients) < sockets.index(each) + 1:
                    await asyncio.sleep(0)
        sockets[-1].connect(str(server.path))
        sockets[-1].setblocking(False)
        assert await loop.sock_recv(sockets[-1], 100) == b"vmm: too many clients\r\n"
        assert len(server.clients) == MAX_CLIENTS
    finally:
        for each in sockets:
            each.close()


async def test_two_servers_cannot_share_a_path(server: ConsoleServer) -> None:
    with pytest.raises(ConfigError, match="another program listens there"):
        await ConsoleServer(ConsoleHub(), server.path).start()
    assert server.path.exists()


async def test_log_that_cannot_be_written_stops_with_a_warning(tmp_path: Path) -> None:
    """A full disk is the log's end, not the machine's."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    hub = ConsoleHub()
    warnings: list[str] = []
    ConsoleLog(hub, full, 1 << 20, warnings.append)
    hub.write(b"text")
    hub.write(b"more")
    assert warnings == ["console log: /dev/full: no space left on device; logging stops"]


async def test_a_disk_that_fills_within_a_write_is_told(tmp_path: Path) -> None:
    hub = ConsoleHub()
    warnings: list[str] = []
    ConsoleLog(hub, tmp_path / "log", 1 << 20, warnings.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
    try:
        hub.write(b"0123456789")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "log").read_bytes() == b"012345"
    assert warnings == [f"console log: {tmp_path}/log: file too large; logging stops"]


async def test_a_device_as_log_keeps_its_name() -> None:
    """/dev/null too, which root could rename."""
    master, slave = pty.openpty()
    path = Path(os.ttyname(slave))
    hub = ConsoleHub()
    warnings: list[str] = []
    log = ConsoleLog(hub, path, 4, warnings.append)
    hub.write(b"0123456789")
    assert os.read(master, 100) == b"0123456789" and warnings == [] and path.is_char_device()
    log.close()
    os.close(master)
    os.close(slave)


async def test_a_pipe_as_log_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="console log: .*/pipe: is a pipe"):
        ConsoleLog(ConsoleHub(), tmp_path / "pipe", 4096, lambda text: None)


async def test_closing_a_reader_ends_who_reads() -> None:
    hub = ConsoleHub()
    first, second = ConsoleReader(hub, lossless=True), ConsoleReader(hub)
    reading, expecting = asyncio.create_task(first.read()), asyncio.create_task(second.expect("never", timeout=None))
    await asyncio.sleep(0)
    first.close()
    second.close()
    async with asyncio.timeout(10):
        assert await reading == b""
        with pytest.raises(ConsoleClosed):
            await expecting
    hub.write(b"more")
    assert await first.read() == b"" and [chunk async for chunk in second] == []


async def test_input_goes_to_the_port_that_wrote_last() -> None:
    """A kernel's shell sits on the serial port or on hvc0: where its prompt came from, there its input goes."""
    hub = ConsoleHub()
    serial, hvc, log = hub.port(), hub.port(), hub.port()
    called: list[str] = []
    serial.set_receiver(lambda: called.append("serial"))
    hvc.set_receiver(lambda: called.append("hvc"))
    hub.feed(b"a")
    assert called == ["serial"] and hvc.read(9) == b"" and serial.read(9) == b"a"
    hvc.write(b"prompt")
    log.write(b"takes no input")
    hub.feed(b"b")
    assert called == ["serial", "hvc"] and serial.read(9) == b"" and hvc.read(9) == b"b"
    hub.feed(b"c")
    serial.write(b"login:")
    assert called[-1] == "serial" and serial.read(9) == b"c"
    assert hub.output(0, 99) == b"prompttakes no inputlogin:"


async def test_readers_are_independent() -> None:
    hub = ConsoleHub()
    first, second = ConsoleReader(hub), ConsoleReader(hub)
    hub.write(b"abc")
    assert await first.read() == b"abc"
    assert (await second.expect("b"))[0] == b"b"
    assert await second.read() == b"c"
    hub.write(b"x" * (3 * RING))
    hub.write(b"y")
    await first.read(10)
    assert first.skipped > 0
    hub.close()
