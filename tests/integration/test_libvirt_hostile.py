"""Clients that flood, stall, send garbage or leave harm only themselves."""

import asyncio
import logging
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fuzz.libvirt_fuzz import campaign
from tests.support.libvirtd import tiny
from tests.support.rpc import RpcClient
from vmm.libvirt import rpc
from vmm.libvirt.client import MAX_CALLS
from vmm.libvirt.daemon import MAX_GREETING_CLIENTS, Daemon, Settings
from vmm.libvirt.events import LifecycleEvent
from vmm.libvirt.rpc import RpcHeader, RpcKind, RpcStatus
from vmm.libvirt.wire import DomainRef, Signature

HOSTNAME, REGISTER = 59, 316


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    settings = Settings(("/bin/false",), "/usr/bin/vmm", tmp_path / "state", tmp_path / "s")
    async with Daemon(settings, ("qemu",)) as running:
        yield running


async def connect(daemon: Daemon) -> RpcClient:
    return await RpcClient.connect(str(daemon.socket))


async def served(daemon: Daemon) -> None:
    """A new client is greeted and answered."""
    client = await (await connect(daemon)).open()
    reply = await asyncio.wait_for(client.call(HOSTNAME), 20)
    client.close()
    assert reply.header.status == RpcStatus.OK


async def until(condition: object, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def test_a_short_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("vmm.libvirt"), "propagate", False)
    rounds, _, _ = await campaign(2.0, 1, tmp_path)
    assert rounds > 0


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 27),
        struct.pack(">I", 0xFFFF_FFFF),
        struct.pack(">I", rpc.MAX_GREETING + 1),
        bytes(64),
    ],
)
async def test_garbage_ends_the_connection(daemon: Daemon, data: bytes) -> None:
    client = await connect(daemon)
    client.writer.write(data)
    assert await asyncio.wait_for(client.reader.read(), 20) == b""
    client.close()
    await served(daemon)


async def test_nothing_is_served_before_the_greeting(daemon: Daemon) -> None:
    client = await connect(daemon)
    reply = await client.call(HOSTNAME)
    assert reply.header.status == RpcStatus.ERROR and b"connection not open" in reply.body
    client.close()


async def test_clients_that_only_connect_are_few(daemon: Daemon) -> None:
    idle = [await connect(daemon) for _ in range(MAX_GREETING_CLIENTS + 20)]
    await until(lambda: sum(client.reader.at_eof() for client in idle) == 20)
    for client in idle[:50]:
        client.close()
    await until(lambda: len(daemon._clients) <= MAX_GREETING_CLIENTS - 50)
    await served(daemon)
    for client in idle:
        client.close()


async def test_a_thousand_connections_opened_and_left(daemon: Daemon) -> None:
    for _ in range(20):
        clients = await asyncio.gather(*[connect(daemon) for _ in range(50)])
        for client in clients:
            client.close()
    await until(lambda: not daemon._clients)
    await served(daemon)


async def test_a_flood_is_worked_off_a_few_at_a_time(daemon: Daemon) -> None:
    client = await (await connect(daemon)).open()
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, *(len(one._calls) for one in daemon._clients.values()))
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    wanted = {client.send(282, bytes(20) + bytes(8)) for _ in range(300)}
    while wanted:
        wanted.discard((await asyncio.wait_for(client.message(), 20)).header.serial)
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    client.close()
    assert 0 < most <= MAX_CALLS


async def test_who_does_not_read_answers_is_not_read_from(daemon: Daemon) -> None:
    for number in range(40):
        daemon.domains.define(
            daemon.domains.read(tiny(f"d{number}", extra=f"<description>{'x' * 20_000}</description>"))
        )
    dom = next(iter(daemon.domains.all())).ref
    client = await (await connect(daemon)).open()
    client.writer.transport.set_write_buffer_limits(high=1 << 16)
    client.reader._limit = 1 << 10  # type: ignore[attr-defined]  # the test reads no more than that ahead
    body = Signature("dom:domain flags:uint").write((dom, 0))
    sent = 0
    try:
        async with asyncio.timeout(2.0):
            while True:
                client.send(14, body)
                sent += 1
                await client.writer.drain()
    except TimeoutError:
        pass
    server = next(iter(daemon._clients.values()))
    assert server._writer.transport.get_write_buffer_size() < 4 << 20
    await served(daemon)
    client.close()


async def test_who_does_not_read_events_is_cut_off(daemon: Daemon) -> None:
    client = await (await connect(daemon)).open()
    reply = await client.call(REGISTER, Signature("event:int dom:domain?").write((0, None)))
    assert reply.header.status == RpcStatus.OK
    ref = DomainRef("x" * 100_000, bytes(16), -1)
    for _ in range(400):
        daemon.events.lifecycle(ref, LifecycleEvent.DEFINED, 0)
        await asyncio.sleep(0)
    await until(lambda: not daemon._clients)
    await served(daemon)
    client.close()


async def test_large_messages_share_a_budget(daemon: Daemon) -> None:
    """Announced bytes take memory only as they come, and few clients' at a time; small calls pass beside them."""
    clients = [await (await connect(daemon)).open() for _ in range(12)]
    for client in clients:
        client.writer.write(struct.pack(">I", rpc.MAX_MESSAGE))
        client.writer.write(rpc.pack(RpcHeader(rpc.REMOTE, 1, HOSTNAME, RpcKind.CALL, 9, 0), bytes(100_000))[4:])
    await served(daemon)
    for client in clients:
        client.close()
    await until(lambda: not daemon._clients)
    async with daemon.budget.reserved(1 << 40):  # all of it is back
        pass


async def test_a_keepalive_ping_is_answered(daemon: Daemon) -> None:
    client = await (await connect(daemon)).open()
    client.writer.write(rpc.pack(RpcHeader(rpc.KEEPALIVE, 1, rpc.PING, RpcKind.EVENT, 0, 0)))
    header = (await asyncio.wait_for(client.message(), 20)).header
    assert (header.program, header.procedure, header.kind) == (rpc.KEEPALIVE, rpc.PONG, RpcKind.EVENT)
    client.close()


async def test_unknown_programs_versions_and_procedures_are_named(daemon: Daemon) -> None:
    client = await (await connect(daemon)).open()
    for header, text in (
        (RpcHeader(0x1234, 1, 1, 0, 50, 0), b"Cannot find program"),
        (RpcHeader(rpc.REMOTE, 2, 1, 0, 51, 0), b"program version 2"),
        (RpcHeader(rpc.REMOTE, 1, 9999, 0, 52, 0), b"unknown procedure: 9999"),
        (RpcHeader(rpc.REMOTE, 1, 453, 0, 53, 0), b"not supported by the connection driver: vir"),
    ):
        client.writer.write(rpc.pack(header))
        reply = await asyncio.wait_for(client.message(), 20)
        assert reply.header.status == RpcStatus.ERROR and text in reply.body
    client.close()
