"""Socket device (5.10): connections both ways, credit, shutdown, refusal; the UNIX-socket mapping."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from virtio.backends.vsock import MemoryVsock, UnixVsock, VsockBackend
from virtio.devices.vsock import BUFFER, VsockDevice
from virtio.devices.vsock_stream import REFUSALS_MAX, Op
from virtio.errors import ConfigError

from .conftest import Connect

CID = 5
HEADER = struct.Struct("<QQIIIHHIII")


class Packet(NamedTuple):
    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


class Guest:
    """A guest's vsock driver: keeps receive buffers offered, keeps packets apart."""

    def __init__(self, driver: Any, alloc: int = 1 << 20) -> None:
        self.driver = driver
        self.alloc = alloc
        self.forwarded = 0
        self.rooms: dict[int, Any] = {}
        self._arrived: list[bytes] = []
        self._slots = [driver.allocator.take(HEADER.size + 32768) for _ in range(8)]
        for _ in range(32):
            self._offer()

    def _offer(self) -> None:
        room = self.driver.buffer(4096)
        self.rooms[self.driver.submit(0, [], [room])] = room

    def send(self, src: int, dst: int, op: int, data: bytes = b"", **more: int) -> None:
        fields = {
            "src_cid": CID,
            "dst_cid": 2,
            "src_port": src,
            "dst_port": dst,
            "len": len(data),
            "type": 1,
            "op": op,
            "flags": 0,
            "buf_alloc": self.alloc,
            "fwd_cnt": self.forwarded,
        } | more
        self.driver.queues[1].used()
        packet = HEADER.pack(*fields.values()) + data
        slot = self._slots.pop(0)
        self._slots.append(slot)
        self.driver.memory.view(slot, len(packet))[:] = packet
        self.driver.submit(1, [(slot, len(packet))])

    def poll(self) -> bool:
        """Whether a packet is there."""
        for used in self.driver.queues[0].used():
            self._arrived.append(self.driver.bytes_at(self.rooms.pop(used.id))[: used.length])
        return bool(self._arrived)

    async def receive(self) -> tuple[Packet, bytes]:
        await self.driver.wait(self.poll)
        data = self._arrived.pop(0)
        self._offer()
        packet = Packet(*HEADER.unpack_from(data))
        assert (packet.src_cid, packet.dst_cid, packet.type) == (2, CID, 1)
        assert packet.len == len(data) - HEADER.size
        return packet, data[HEADER.size :]

    async def expect(self, op: Op) -> tuple[Packet, bytes]:
        packet, data = await self.receive()
        assert packet.op == op, packet
        return packet, data


@pytest.fixture(params=["memory", "unix"])
async def world(request: pytest.FixtureRequest, tmp_path: Path, connect: Connect) -> AsyncIterator[Any]:
    """(guest, open to guest, listen on host) over each backend."""
    backend: VsockBackend
    if request.param == "memory":
        backend = memory = MemoryVsock()

        async def listen(port: int, handler: Any) -> None:
            memory.listen(port, handler)

        opener = memory.open
    else:
        backend = UnixVsock(tmp_path / "v")
        servers = []

        async def listen(port: int, handler: Any) -> None:
            servers.append(await asyncio.start_unix_server(handler, tmp_path / f"v_{port}"))

        async def opener(port: int) -> Any:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
            writer.write(b"CONNECT %d\n" % port)
            answer = await reader.readline()
            if answer != b"OK %d\n" % port:
                writer.close()
                raise ConnectionRefusedError
            return reader, writer

    device = VsockDevice(backend, CID)
    await device.start()
    driver = connect(device)
    driver.initialize()
    assert driver.config_read(0, 8) == CID
    yield Guest(driver), opener, listen
    if request.param == "unix":
        for server in servers:
            server.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.mark.clause("5.10.6.3.2-b", "5.10.6.5-a")
async def test_the_guest_connects_and_echoes(world: Any) -> None:
    guest, _, listen = world
    await listen(1025, echo)
    guest.send(77, 1025, Op.REQUEST)
    packet, _ = await guest.expect(Op.RESPONSE)
    assert (packet.src_port, packet.dst_port, packet.buf_alloc) == (1025, 77, BUFFER)
    guest.send(77, 1025, Op.RW, b"hello host")
    packet, data = await guest.expect(Op.RW)
    assert data == b"hello host" and packet.fwd_cnt == 10
    guest.send(77, 1025, Op.SHUTDOWN, flags=2)
    packet, _ = await guest.expect(Op.SHUTDOWN)
    assert (packet.flags, packet.buf_alloc, packet.fwd_cnt) == (2, BUFFER, 10)
    packet, _ = await guest.expect(Op.RST)
    assert (packet.buf_alloc, packet.fwd_cnt) == (BUFFER, 10)


@pytest.mark.clause("5.10.6.1.2-a")
async def test_the_tx_queue_is_served_without_rx_buffers(connect: Connect) -> None:
    """5.10.6.1.2: as long as there are resources to hold the answers; then it stops, and goes on with the rx queue."""
    driver = connect(VsockDevice(MemoryVsock(), CID))
    driver.initialize()
    slots = [driver.allocator.take(HEADER.size) for _ in range(64)]

    def refused(port: int) -> None:
        """A packet that will be answered with RST."""
        slot = slots[port % len(slots)]
        driver.memory.view(slot, HEADER.size)[:] = HEADER.pack(CID, 2, port, 9, 0, 1, Op.RW, 0, 4096, 0)
        driver.submit(1, [(slot, HEADER.size)])

    for port in range(REFUSALS_MAX):
        refused(port)
        await driver.used(1)
    for port in range(REFUSALS_MAX, REFUSALS_MAX + 40):
        refused(port)
        for _ in range(5):
            await asyncio.sleep(0)
    assert len(driver.queues[1].used()) < 40, "nothing grows without bound"
    answered = []
    room = driver.buffer(100)
    while len(answered) < REFUSALS_MAX + 40:
        driver.submit(0, [], [room])
        await driver.used(0)
        answered.append(HEADER.unpack_from(driver.bytes_at(room))[3])
    assert answered == list(range(REFUSALS_MAX + 40))


async def test_ports_are_used_again_at_once(world: Any) -> None:
    """What is left of a connection that the guest ended does not reach the next one with the same ports."""
    guest, _, listen = world

    async def patient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await echo(reader, writer)
        writer.close()

    await listen(1025, patient)
    for number in range(10):
        guest.send(77, 1025, Op.REQUEST)
        await guest.expect(Op.RESPONSE)
        guest.send(77, 1025, Op.RW, b"%d" % number)
        _, data = await guest.expect(Op.RW)
        assert data == b"%d" % number
        guest.send(77, 1025, Op.RW, b"on its way")
        for _ in range(number):
            await asyncio.sleep(0)
        guest.send(77, 1025, Op.RST)
        await guest.driver.used(1)
        while guest.poll():
            guest._arrived.clear()
            guest._offer()


async def test_the_host_connects_and_echoes(world: Any) -> None:
    guest, opener, _ = world
    opening = asyncio.ensure_future(opener(1024))
    packet, _ = await guest.expect(Op.REQUEST)
    assert packet.dst_port == 1024
    guest.send(1024, packet.src_port, Op.RESPONSE)
    reader, writer = await asyncio.wait_for(opening, 10)
    writer.write(b"hello guest")
    _, data = await guest.expect(Op.RW)
    assert data == b"hello guest"
    guest.send(1024, packet.src_port, Op.RW, b"and back")
    assert await asyncio.wait_for(reader.readexactly(8), 10) == b"and back"
    guest.send(1024, packet.src_port, Op.SHUTDOWN, flags=3)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    while (await guest.receive())[0].op != Op.RST:
        pass


@pytest.mark.clause("5.10.6.5-a")
async def test_refusals(world: Any) -> None:
    guest, opener, _ = world
    guest.send(77, 9999, Op.REQUEST)
    packet, _ = await guest.expect(Op.RST)
    assert (packet.src_port, packet.dst_port) == (9999, 77)
    opening = asyncio.ensure_future(opener(1024))
    packet, _ = await guest.expect(Op.REQUEST)
    guest.send(1024, packet.src_port, Op.RST)
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(opening, 10)


@pytest.mark.clause("5.10.6.4.2-b")
async def test_packets_that_belong_nowhere(world: Any) -> None:
    """5.10.6.4.2, 5.10.6.5: answered with RST, except RST itself."""
    guest, _, _ = world
    for op, wrong in (
        (1, {"src_cid": 9}),
        (1, {"dst_cid": 7}),
        (1, {"type": 2}),
        (5, {}),
        (99, {}),
        (1, {"len": 1000}),
    ):
        guest.send(1, 2, op, **wrong)
        await guest.expect(Op.RST)
    guest.send(1, 2, Op.RST)
    guest.send(1, 2, Op.CREDIT_REQUEST)
    await guest.expect(Op.RST)
    assert not guest.driver.needs_reset


@pytest.mark.clause("5.10.6.3.2-a")
async def test_credit_of_the_guest_is_respected(world: Any) -> None:
    """5.10.6.3.2: RW only when the peer has sufficient free buffer space."""
    guest, _, listen = world
    guest.alloc = 1000

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * 5000)
        await writer.drain()
        writer.close()

    await listen(1025, flood)
    guest.send(77, 1025, Op.REQUEST)
    await guest.expect(Op.RESPONSE)
    got = 0
    while got < 5000:
        packet, data = await guest.receive()
        if packet.op != Op.RW:
            continue
        got += len(data)
        assert got - guest.forwarded <= 1000
        if got - guest.forwarded == 1000 or got == 5000:
            guest.forwarded = got
            guest.send(77, 1025, Op.CREDIT_UPDATE)


async def test_a_guest_beyond_its_credit_loses_the_connection(world: Any) -> None:
    guest, _, listen = world
    hold = asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hold.wait()
        writer.close()

    await listen(1025, deaf)
    guest.send(77, 1025, Op.REQUEST)
    await guest.expect(Op.RESPONSE)
    op = 0
    for _ in range(100):
        guest.send(77, 1025, Op.RW, b"y" * 32768)
        await asyncio.sleep(0)
        if guest.poll():
            packet, _ = await guest.receive()
            op = packet.op
            if op == Op.RST:
                break
    assert op == Op.RST
    hold.set()


async def test_large_transfers_with_credit_updates(world: Any) -> None:
    guest, _, listen = world
    total = 0
    done = asyncio.Event()

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal total
        while data := await reader.read(65536):
            total += len(data)
        done.set()
        writer.close()

    await listen(1025, count)
    guest.send(77, 1025, Op.REQUEST)
    packet, _ = await guest.expect(Op.RESPONSE)
    sent, room = 0, packet.buf_alloc
    while sent < 1 << 20:
        while room < 32768:
            packet, _ = await guest.expect(Op.CREDIT_UPDATE)
            room = packet.buf_alloc - (sent - packet.fwd_cnt)
        guest.send(77, 1025, Op.RW, b"z" * 32768)
        await guest.driver.used(1)
        sent += 32768
        room -= 32768
    guest.send(77, 1025, Op.SHUTDOWN, flags=2)
    await asyncio.wait_for(done.wait(), 10)
    assert total == 1 << 20


async def test_a_packet_without_header_needs_a_reset(world: Any) -> None:
    guest, _, _ = world
    guest.driver.submit(1, [guest.driver.buffer(b"short")])
    await guest.driver.wait(lambda: guest.driver.needs_reset)


async def test_reset_closes_connections(world: Any) -> None:
    guest, opener, _ = world
    opening = asyncio.ensure_future(opener(1024))
    packet, _ = await guest.expect(Op.REQUEST)
    guest.send(1024, packet.src_port, Op.RESPONSE)
    reader, writer = await asyncio.wait_for(opening, 10)
    second = asyncio.ensure_future(opener(1024))
    await guest.expect(Op.REQUEST)
    guest.driver.write_status(0)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(second, 10)
    writer.close()
    with pytest.raises(ConnectionError):
        await opener(1024)


@pytest.mark.clause("5.10.6.7-a")
async def test_a_restored_guest_is_told(connect: Connect) -> None:
    """5.10.6.7: transport reset."""
    driver = connect(VsockDevice(MemoryVsock(), CID))
    driver.initialize()
    await driver.transport.quiesce()
    other = connect(VsockDevice(MemoryVsock(), 9))
    other.memory.bytes[:] = driver.memory.bytes
    other.transport.restore(driver.transport.save())
    other.adopt(driver)
    other.transport.resume()
    assert other.config_read(0, 8) == CID
    assert await other.request(2, [], [8]) == bytes(4)


async def test_a_connection_waits_until_the_restored_guest_has_ended_its_own(connect: Connect) -> None:
    """5.10.6.7: the driver ends every connection when it takes the event, so also one that the host begins too early. A
    machine that is paused and goes on meanwhile has not taken it yet."""
    driver = connect(VsockDevice(MemoryVsock(), CID))
    driver.initialize()
    await driver.transport.quiesce()
    device = VsockDevice(MemoryVsock(), CID)
    other = connect(device)
    other.memory.bytes[:] = driver.memory.bytes
    other.transport.restore(driver.transport.save())
    other.adopt(driver)
    guest = Guest(other)
    room = other.buffer(8)
    other.submit(2, [], [room])
    opening = asyncio.ensure_future(device.open(1024))
    other.transport.resume()
    (used,) = await other.used(2)
    assert used.length == 4
    for _ in range(2):
        await other.transport.quiesce()
        other.transport.resume()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not guest.poll()
    other.submit(2, [], [room])
    packet, _ = await guest.expect(Op.REQUEST)
    guest.send(1024, packet.src_port, Op.RESPONSE)
    _, writer = await asyncio.wait_for(opening, 30)
    writer.close()


async def test_clients_that_do_not_say_connect(tmp_path: Path) -> None:
    backend = UnixVsock(tmp_path / "v")
    device = VsockDevice(backend)
    await device.start()
    for line in (b"HELLO\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"CONNECT 1\n", b"x" * 70000):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(line)
        writer.write_eof()
        try:
            assert await asyncio.wait_for(reader.read(), 10) == b""
        except ConnectionResetError:
            pass
        writer.close()
    await device.aclose()


@pytest.mark.clause("5.10.6.4.2-a")
def test_context_ids() -> None:
    """5.10.4: 0, 1, 2, 0xffffffff and 0xffffffffffffffff are reserved, the upper 32 bits are zero."""
    for wrong in (0, 1, 2, 2**32 - 1, 2**32, 2**64 - 1):
        with pytest.raises(ConfigError):
            VsockDevice(MemoryVsock(), wrong)
    for right in (3, 2**32 - 2):
        assert int.from_bytes(VsockDevice(MemoryVsock(), right).config(), "little") == right
