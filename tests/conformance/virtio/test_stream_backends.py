"""What every network, character and vsock backend promises (virtio.backends)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from virtio.backends.char import CharBackend, MemoryChar, SocketChar
from virtio.backends.net import MemoryNet, NetBackend, PcapNet
from virtio.backends.sockets import DatagramNet, StreamNet
from virtio.backends.vsock import MemoryVsock, Streams, UnixVsock, VsockBackend, stream_pair

SECONDS = 10


def sockets(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, kind)


@pytest.fixture(params=["memory", "stream", "datagram", "pcap"])
async def wire(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[NetBackend, NetBackend]]:
    """Two ends of a network."""
    one: NetBackend
    two: NetBackend
    match request.param:
        case "memory":
            one, two = MemoryNet.pair()
        case "stream":
            one, two = (StreamNet(end) for end in sockets(socket.SOCK_STREAM))
        case "datagram":
            one, two = (DatagramNet(end) for end in sockets(socket.SOCK_DGRAM))
        case _:
            inner, two = MemoryNet.pair()
            one = PcapNet(inner, tmp_path / "pcap")
    yield one, two
    for end in (one, two):
        await end.aclose()


async def test_frames_arrive_whole_and_in_order(wire: tuple[NetBackend, NetBackend]) -> None:
    one, two = wire
    frames = [os.urandom(length) for length in (1, 60, 1514, 9000, 65000, 14)]
    for near, far in ((one, two), (two, one)):
        for frame in frames:
            await near.send(frame)
        assert [await asyncio.wait_for(far.receive(), SECONDS) for _ in frames] == frames


async def test_a_receiver_can_be_cancelled_and_lose_nothing(wire: tuple[NetBackend, NetBackend]) -> None:
    one, two = wire
    for _ in range(3):
        waiting = asyncio.ensure_future(two.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    await one.send(b"frame")
    assert await asyncio.wait_for(two.receive(), SECONDS) == b"frame"


@pytest.fixture(params=["memory", "socket"])
async def char(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[CharBackend, Any, Any]]:
    """A backend, a way to type into it, a way to see its output."""
    if request.param == "memory":
        memory = MemoryChar()

        async def typed(data: bytes) -> None:
            memory.feed(data)

        async def seen(data: bytes) -> None:
            await memory.wait_output(data)

        yield memory, typed, seen
        await memory.aclose()
        return
    backend = await SocketChar(tmp_path / "socket").start()
    reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")

    async def typed(data: bytes) -> None:
        writer.write(data)

    async def seen(data: bytes) -> None:
        await asyncio.wait_for(reader.readuntil(data), SECONDS)

    yield backend, typed, seen
    writer.close()
    await backend.aclose()


async def test_input_and_output(char: tuple[CharBackend, Any, Any]) -> None:
    backend, typed, seen = char
    await backend.write(b"prompt$ ")
    await seen(b"prompt$ ")
    await typed(b"command\n")
    data = b""
    while data != b"command\n":
        data += await asyncio.wait_for(backend.read(), SECONDS)
    await backend.write(b"")
    await backend.write(b"x" * 200_000 + b"end")
    await backend.write(b"more")


class FakeGuest:
    """The guest's end of `open`."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.ends: list[Streams] = []

    async def open(self, port: int) -> Streams:
        self.ports.append(port)
        if port == 9:
            raise ConnectionRefusedError
        ours, theirs = await stream_pair()
        self.ends.append(ours)
        return theirs


@pytest.fixture(params=["memory", "unix"])
async def vsock(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[VsockBackend, FakeGuest, Any]]:
    """A backend, the guest's end, and a way for the host to connect."""
    guest = FakeGuest()
    backend: VsockBackend
    if request.param == "memory":
        backend = memory = MemoryVsock()
        connect = memory.open
        memory.listen(1025, answer)
        await backend.start(guest.open)
        yield backend, guest, connect
    else:
        backend = UnixVsock(tmp_path / "v")
        await backend.start(guest.open)
        server = await asyncio.start_unix_server(answer, tmp_path / "v_1025")

        async def connect(port: int) -> Streams:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
            writer.write(b"CONNECT %d\n" % port)
            if await asyncio.wait_for(reader.readline(), SECONDS) != b"OK %d\n" % port:
                writer.close()
                raise ConnectionRefusedError
            return reader, writer

        yield backend, guest, connect
        server.close()
    for _, writer in guest.ends:
        writer.close()
    await backend.aclose()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write((await reader.readline()).upper())
    writer.close()


async def test_the_guest_dials(vsock: tuple[VsockBackend, FakeGuest, Any]) -> None:
    backend, _, _ = vsock
    reader, writer = await backend.dial(1025)
    writer.write(b"hello\n")
    assert await asyncio.wait_for(reader.read(), SECONDS) == b"HELLO\n"
    writer.close()
    with pytest.raises(OSError):
        await backend.dial(1026)


async def test_the_host_connects(vsock: tuple[VsockBackend, FakeGuest, Any]) -> None:
    _, guest, connect = vsock
    reader, writer = await asyncio.wait_for(connect(1024), SECONDS)
    assert guest.ports == [1024]
    near, far = guest.ends[0]
    writer.write(b"to the guest\n")
    assert await asyncio.wait_for(near.readline(), SECONDS) == b"to the guest\n"
    far.write(b"and back\n")
    assert await asyncio.wait_for(reader.readline(), SECONDS) == b"and back\n"
    far.close()
    assert await asyncio.wait_for(reader.read(), SECONDS) == b""
    writer.close()
    with pytest.raises(OSError):
        await connect(9)
