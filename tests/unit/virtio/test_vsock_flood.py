"""Socket device (5.10) under floods: what waits is bounded, a reset is complete at once, a full table is waited for."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from virtio.backends import vsock as backends
from virtio.backends.vsock import MemoryVsock, UnixVsock, VsockBackend
from virtio.devices.vsock import VsockDevice
from virtio.devices.vsock_host import CONNECTIONS_MAX, HOST_PLACES
from virtio.devices.vsock_stream import REFUSALS_MAX, Op

from .conftest import Connect
from .test_vsock import CID, HEADER, Guest, Packet, echo

ECHO, NOBODY = 1025, 9
TASKS_MAX = 40
"""The device's own (two queues, dials, the one that closes) and the test's."""


class Flooder:
    """A driver that sends packets as fast as the device takes them and gives no receive buffers unless told to."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.slots = [driver.allocator.take(HEADER.size) for _ in range(128)]
        self.number = 0

    async def send(self, guest: int, host: int, op: int, turns: int = 1) -> bool:
        """False: the device takes no more."""
        queue = self.driver.queues[1]
        queue.used()
        slot = self.slots[self.number % len(self.slots)]
        packet = HEADER.pack(CID, 2, guest, host, 0, 1, op, 3 if op == Op.SHUTDOWN else 0, 1 << 20, 0)
        self.driver.memory.view(slot, len(packet))[:] = packet
        try:
            self.driver.submit(1, [(slot, len(packet))])
        except MemoryError:
            return False
        self.number += 1
        for _ in range(turns):
            await asyncio.sleep(0)
        return True


async def device_of(backend: VsockBackend, connect: Connect) -> tuple[VsockDevice, Any]:
    device = VsockDevice(backend, CID)
    await device.start()
    driver = connect(device)
    driver.initialize()
    return device, driver


async def test_requests_that_nobody_answers(connect: Connect) -> None:
    """To ports where nobody listens, without a buffer for the answers."""
    _, driver = await device_of(MemoryVsock(), connect)
    flooder = Flooder(driver)
    for port in range(20 * REFUSALS_MAX):
        if not await flooder.send(1000 + port, NOBODY, Op.REQUEST):
            break
    assert len(asyncio.all_tasks()) < TASKS_MAX
    assert flooder.number < CONNECTIONS_MAX + REFUSALS_MAX + 2 * driver.queues[1].size
    driver.write_status(0)
    assert driver.read_status() == 0
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) < TASKS_MAX


async def test_requests_taken_back(connect: Connect) -> None:
    """Each is followed by a RST, so that nothing stops the flood; nothing is left of it either."""
    device, driver = await device_of(MemoryVsock(), connect)
    flooder = Flooder(driver)
    for port in range(1000):
        assert await flooder.send(port, NOBODY, Op.REQUEST, turns=port % 4)
        assert await flooder.send(port, NOBODY, Op.RST, turns=port % 3)
        assert len(asyncio.all_tasks()) < TASKS_MAX
    await driver.wait(lambda: not device._places.taken)
    assert device._outbox.first() is None


async def test_connections_beyond_the_table(connect: Connect) -> None:
    """The guest gets what it may have, the rest is refused. A reset with all of them open is complete at once, and
    their ends on the host are closed soon."""
    ended = 0

    async def until_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal ended
        await reader.read()
        ended += 1

    backend = MemoryVsock()
    backend.listen(ECHO, until_end)
    device, driver = await device_of(backend, connect)
    guest = Guest(driver)
    answers = []
    for port in range(CONNECTIONS_MAX + 10):
        guest.send(port, ECHO, Op.REQUEST)
        answers.append((await guest.receive())[0].op)
    assert answers.count(Op.RESPONSE) == CONNECTIONS_MAX - HOST_PLACES
    assert answers.count(Op.RST) == HOST_PLACES + 10
    driver.write_status(0)
    assert driver.read_status() == 0
    await driver.wait(lambda: ended == CONNECTIONS_MAX - HOST_PLACES and not device._places.taken)
    driver.initialize()
    guest = Guest(driver)
    guest.send(1, ECHO, Op.REQUEST)
    await guest.expect(Op.RESPONSE)


async def test_one_credit_update_is_owed(connect: Connect) -> None:
    """However often the guest asks."""
    backend = MemoryVsock()
    backend.listen(ECHO, echo)
    _, driver = await device_of(backend, connect)
    flooder = Flooder(driver)
    await flooder.send(7, ECHO, Op.REQUEST)
    for _ in range(500):
        assert await flooder.send(7, ECHO, Op.CREDIT_REQUEST)
    await flooder.send(8, NOBODY, Op.RW)
    room = driver.buffer(4096)
    seen: list[int] = []
    while Op.RST not in seen:
        driver.submit(0, [], [room])
        await driver.used(0)
        seen.append(Packet(*HEADER.unpack_from(driver.bytes_at(room))).op)
    assert seen[0] == Op.RESPONSE and len(seen) <= 3


async def test_the_host_waits_for_a_place(connect: Connect) -> None:
    """More connections at once than the table holds: all are made, each when another has ended."""
    count = CONNECTIONS_MAX + 40
    backend = MemoryVsock()
    _, driver = await device_of(backend, connect)
    guest, flooder = Guest(driver), Flooder(driver)
    done = 0

    async def visit() -> None:
        nonlocal done
        reader, writer = await backend.open(1024)
        assert await reader.read() == b""
        writer.close()
        done += 1

    visits = [asyncio.ensure_future(visit()) for _ in range(count)]
    requests = 0
    while done < count:
        await driver.wait(lambda: guest.poll() or done == count)
        if done < count:
            packet, _ = await guest.receive()
            if packet.op == Op.REQUEST:
                requests += 1
                await flooder.send(packet.dst_port, packet.src_port, Op.RESPONSE, turns=3)
                await flooder.send(packet.dst_port, packet.src_port, Op.SHUTDOWN, turns=3)
    await asyncio.gather(*visits)
    assert requests == done == count


async def test_who_waits_for_a_place_hears_of_a_reset(connect: Connect) -> None:
    backend = MemoryVsock()
    _, driver = await device_of(backend, connect)
    opening = [asyncio.ensure_future(backend.open(1024)) for _ in range(CONNECTIONS_MAX + 20)]
    await asyncio.sleep(0)
    opening[-1].cancel()
    driver.write_status(0)
    results = await asyncio.wait_for(asyncio.gather(*opening, return_exceptions=True), 10)
    assert all(isinstance(result, ConnectionError) for result in results[:-1])
    assert isinstance(results[-1], asyncio.CancelledError)


async def test_a_listener_whose_backlog_is_full(connect: Connect, tmp_path: Path) -> None:
    """It has much to do and is not dead: the guest's connection waits for it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / f"v_{ECHO}"))
        listener.listen(0)
        listener.setblocking(False)
        before = []
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            before.append(client)
            try:
                client.connect(str(tmp_path / f"v_{ECHO}"))
            except BlockingIOError:
                break
        _, driver = await device_of(UnixVsock(tmp_path / "v"), connect)
        guest = Guest(driver)
        guest.send(1, ECHO, Op.REQUEST)
        await driver.used(1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not guest.poll()
        for _ in before:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                break
        await guest.expect(Op.RESPONSE)
        for client in before:
            client.close()


async def test_more_clients_than_are_served(connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait in the socket's backlog, and are served when others have gone."""
    monkeypatch.setattr(backends, "CLIENTS_MAX", 2)
    _, driver = await device_of(UnixVsock(tmp_path / "v"), connect)
    guest = Guest(driver)
    clients = [await asyncio.open_unix_connection(tmp_path / "v") for _ in range(5)]
    for _, writer in clients:
        writer.write(b"CONNECT 77\n")

    async def finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        answer = await reader.readline()
        writer.close()
        return answer

    answers = asyncio.gather(*(finish(*client) for client in clients))
    while not answers.done():
        await driver.wait(lambda: guest.poll() or answers.done())
        if not answers.done():
            packet, _ = await guest.receive()
            if packet.op in (Op.REQUEST, Op.SHUTDOWN):
                answer = Op.RESPONSE if packet.op == Op.REQUEST else Op.SHUTDOWN
                guest.send(77, packet.src_port, answer, flags=3 * (answer == Op.SHUTDOWN))
    assert await answers == [b"OK 77\n"] * len(clients)


class Raising(MemoryVsock):
    async def dial(self, port: int) -> Any:
        raise RuntimeError("a mistake")


class Nonsense(MemoryVsock):
    async def dial(self, port: int) -> Any:
        return b"no", "streams"


@pytest.mark.parametrize("kind", [Raising, Nonsense])
async def test_a_backend_that_breaks_its_contract(
    connect: Connect, caplog: pytest.LogCaptureFixture, kind: type[MemoryVsock]
) -> None:
    """The guest's connection is refused, the device goes on, the log names the class."""
    _, driver = await device_of(kind(), connect)
    guest = Guest(driver)
    with caplog.at_level(logging.WARNING):
        for port in range(20):
            guest.send(port, ECHO, Op.REQUEST)
            await guest.expect(Op.RST)
    assert not driver.needs_reset
    warnings = [record.getMessage() for record in caplog.records if kind.__name__ in record.getMessage()]
    assert 0 < len(warnings) <= 8
