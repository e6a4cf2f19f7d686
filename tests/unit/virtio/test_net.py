"""Network device (5.1) over every kind of backend: frames both ways, mergeable buffers, link, loss of the peer."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import passt
from tests.support.virtio import AnyDriverQueue, Driver, MmioDriver
from virtio.backends.net import FRAME_MAX, MemoryNet, NetBackend, PcapNet
from virtio.backends.sockets import DatagramNet, StreamNet
from virtio.backends.sockets import connect as connect_socket
from virtio.devices import net
from virtio.devices.net import NetDevice, parse_mac
from virtio.errors import ConfigError, HostError

from .conftest import Connect

MAC = parse_mac("52:54:00:12:34:56")
HEADER = bytes(12)


class Peer:
    """The far end of a backend: sends frames to the guest, sees the guest's."""

    def __init__(self, backend: NetBackend, far: NetBackend) -> None:
        self.backend = backend
        self.far = far

    async def send(self, frame: bytes) -> None:
        await self.far.send(frame)

    async def receive(self) -> bytes:
        return await asyncio.wait_for(self.far.receive(), 10)


def memory_peer(tmp_path: Path) -> Peer:
    return Peer(*MemoryNet.pair())


def stream_peer(tmp_path: Path) -> Peer:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Peer(StreamNet(one), StreamNet(two))


def datagram_peer(tmp_path: Path) -> Peer:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return Peer(DatagramNet(one), DatagramNet(two))


def pcap_peer(tmp_path: Path) -> Peer:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Peer(PcapNet(StreamNet(one), tmp_path / "frames.pcap"), StreamNet(two))


PEERS: dict[str, Callable[[Path], Peer]] = {
    "memory": memory_peer,
    "stream": stream_peer,
    "datagram": datagram_peer,
    "pcap": pcap_peer,
}


@pytest.fixture(params=PEERS)
async def peer(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Peer]:
    made = PEERS[request.param](tmp_path)
    yield made
    await made.far.aclose()


def frame(number: int, length: int) -> bytes:
    return struct.pack(">I", number) + bytes((number + i) & 0xFF for i in range(length - 4))


def offer(driver: Any, count: int, size: int) -> list[tuple[int, int]]:
    rooms = [driver.buffer(size) for _ in range(count)]
    for room in rooms:
        driver.submit(0, [], [room])
    return rooms


async def test_frames_from_the_guest(connect: Connect, peer: Peer) -> None:
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize()
    for number, length in enumerate((60, 1514, 65000)):
        sent = frame(number, length)
        driver.submit(1, [driver.buffer(HEADER + sent[:20]), driver.buffer(sent[20:])])
        assert await peer.receive() == sent
        await driver.used(1)
    counters = driver.transport.device.counters
    assert (counters["sent"], counters["bytes_sent"], counters["received"]) == (3, 60 + 1514 + 65000, 0)


@pytest.mark.clause("5.1.6.3.2-a")
async def test_frames_to_the_guest(connect: Connect, peer: Peer) -> None:
    """5.1.6.4.1: a header of zeroes with num_buffers 1."""
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize()
    rooms = offer(driver, 4, 2000)
    frames = [frame(number, 100 * number + 60) for number in range(4)]
    for sent in frames:
        await peer.send(sent)
    used = await driver.used(0, 4)
    for room, sent, buffer in zip(rooms, frames, used, strict=True):
        assert driver.bytes_at(room)[: buffer.length] == HEADER[:10] + b"\1\0" + sent
    counters = driver.transport.device.counters
    assert (counters["received"], counters["bytes_received"], counters["sent"]) == (4, sum(map(len, frames)), 0)


@pytest.mark.clause("5.1.6.3.2-a", "5.1.6.4.1-b", "5.1.6.4.1-c", "5.1.6.4.1-d")
async def test_mergeable_buffers(connect: Connect, peer: Peer) -> None:
    """5.1.6.4.1: num_buffers tells over how many buffers a packet is spread; all but the last are full."""
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize()
    sent = frame(7, 5000)
    await peer.send(sent)
    rooms = offer(driver, 3, 1500)
    await asyncio.sleep(0.01)
    assert driver.queues[0].used() == [], "not before all of it fits"
    rooms += offer(driver, 1, 1500)
    await driver.wait(driver.interrupted.is_set)
    used = driver.queues[0].used()
    assert [buffer.length for buffer in used] == [1500, 1500, 1500, 512], "all of them together"
    data = b"".join(driver.bytes_at(room)[: buffer.length] for room, buffer in zip(rooms, used, strict=True))
    assert data == HEADER[:10] + b"\4\0" + sent


@pytest.mark.clause("5.1.6.3.2-b", "5.1.6.4.1-a")
async def test_without_mergeable_buffers_a_frame_too_large_is_lost(connect: Connect, peer: Peer) -> None:
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize(~net.NetFeature.MRG_RXBUF)
    (room,) = offer(driver, 1, 100)
    await peer.send(frame(1, 1000))
    await peer.send(frame(2, 60))
    (used,) = await driver.used(0)
    assert driver.bytes_at(room)[: used.length] == HEADER[:10] + b"\1\0" + frame(2, 60)


async def test_a_guest_without_buffers_gets_its_frames_later(connect: Connect, peer: Peer) -> None:
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize()
    for number in range(20):
        await peer.send(frame(number, 60))
    received = []
    for _ in range(20):
        (room,) = offer(driver, 1, 2000)
        await driver.used(0)
        received.append(int.from_bytes(driver.bytes_at(room)[12:16], "big"))
    assert received == list(range(20))


async def test_nonsense_from_the_guest_is_lost(connect: Connect, peer: Peer) -> None:
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize()
    driver.submit(1, [driver.buffer(b"short")])
    driver.submit(1, [driver.buffer(HEADER)])
    driver.submit(1, [], [driver.buffer(100)])
    big = driver.buffer(FRAME_MAX // 2)
    driver.submit(1, [big, big, big])
    driver.submit(1, [driver.buffer(HEADER + frame(5, 60))])
    assert await peer.receive() == frame(5, 60)
    await driver.used(1, 5)
    assert not driver.needs_reset


async def test_many_frames_both_ways(connect: Connect, peer: Peer) -> None:
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize()
    data = [driver.buffer(HEADER + frame(number, 1500)) for number in range(64)]

    async def far() -> list[int]:
        return [int.from_bytes((await peer.receive())[:4], "big") for _ in range(640)]

    counting = asyncio.ensure_future(far())
    for _ in range(10):
        for buffer in data:
            driver.submit(1, [buffer])
        await driver.used(1, 64)
    assert await asyncio.wait_for(counting, 20) == list(range(64)) * 10
    rooms = offer(driver, 64, 1600)
    for number in range(64):
        await peer.send(frame(number, 1500))
    await driver.used(0, 64)
    assert [driver.bytes_at(room)[12:] for room in rooms] == [frame(n, 1500).ljust(1588, b"\0") for n in range(64)]


async def test_link_up_and_down(connect: Connect, peer: Peer) -> None:
    """5.1.4: the status field, with a configuration change notification; nothing passes while it is down."""
    device = NetDevice(peer.backend, MAC)
    driver = connect(device)
    driver.initialize()
    assert driver.config_read(6, 2) == 1
    device.set_link(False)
    assert driver.interrupted.is_set() and driver.config_read(6, 2) == 0
    driver.submit(1, [driver.buffer(HEADER + frame(1, 60))])
    await driver.used(1)
    device.set_link(True)
    assert driver.config_read(6, 2) == 1
    driver.submit(1, [driver.buffer(HEADER + frame(2, 60))])
    assert await peer.receive() == frame(2, 60)
    (room,) = offer(driver, 1, 100)
    await peer.send(frame(3, 60))
    await driver.used(0)
    assert driver.bytes_at(room)[12:72] == frame(3, 60)


BUSY = 5000
"""Far more than one turn of the loop may take."""


async def test_a_guest_that_sends_on_while_the_link_is_down() -> None:
    """Another vCPU may fill the queue as fast as it is emptied: the loop goes on all the same."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    device = NetDevice(DatagramNet(near), MAC)
    driver = MmioDriver(device)
    driver.initialize()
    device.set_link(False)
    frame = driver.buffer(bytes(72))
    taken = 0

    def again(level: bool) -> None:
        nonlocal taken
        if level and taken < BUSY:
            driver.acknowledge()
            taken += len(driver.queues[1].used())
            driver.queues[1].add([frame])

    driver.acknowledge()
    driver.mmio._irq = again
    driver.submit(1, [frame])
    assert taken < BUSY // 2
    await driver.wait(lambda: taken >= BUSY)
    await device.aclose()
    far.close()


class Broken(MemoryNet):
    """Its link is gone."""

    async def receive(self) -> bytes:
        raise HostError("the link is gone")

    async def send(self, frame: bytes) -> None:
        raise HostError("the link is gone")


async def test_a_link_that_is_gone_is_told_once(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """A driver may set the device up any number of times."""
    device = NetDevice(Broken(), MAC)
    driver = connect(device)
    for _ in range(10):
        driver.initialize()
        driver.submit(1, [driver.buffer(bytes(72))])
        await driver.used(1)
        await driver.wait(lambda: not device.link)
    assert sum("the link is gone" in record.getMessage() for record in caplog.records) == 1


class Flood(MemoryNet):
    """A peer that always has a frame."""

    taken = 0

    async def receive(self) -> bytes:
        if self.taken == BUSY:
            await asyncio.Event().wait()
        self.taken += 1
        return bytes(60)


async def test_frames_that_always_come_leave_the_loop_its_turns(connect: Connect) -> None:
    flood = Flood()
    driver = connect(NetDevice(flood, MAC))
    driver.transport.device.set_link(False)  # type: ignore[attr-defined]
    driver.initialize()
    await driver.wait(lambda: flood.taken)
    assert flood.taken < BUSY // 2
    await driver.wait(lambda: flood.taken == BUSY)


async def control(driver: Any, data: bytes) -> bytes:
    answer: bytes = await driver.request(2, [data], [1])
    return answer


@pytest.mark.clause("5.1.6.5.4.2-a")
async def test_the_driver_announces_a_new_place(connect: Connect, peer: Peer) -> None:
    """It is asked by its configuration, and says when it does."""
    device = NetDevice(peer.backend, MAC)
    driver = connect(device)
    driver.initialize()
    await device.announce()
    assert device.config()[6] & 2
    assert await control(driver, b"\3\0") == b"\0"
    assert not device.config()[6] & 2


async def test_the_device_announces_for_a_driver_that_cannot(peer: Peer) -> None:
    """By reverse ARP, RFC 903: broadcast from the card's address, which is also what is asked for."""
    device = NetDevice(peer.backend, MAC)
    announcing = asyncio.create_task(device.announce())
    frame = await peer.receive()
    await announcing
    assert frame[:14] == b"\xff" * 6 + MAC + b"\x80\x35" and len(frame) == 60
    assert frame[14:22] == bytes((0, 1, 8, 0, 6, 4, 0, 3)) and frame[22:28] == frame[32:38] == MAC
    await device.aclose()


@pytest.mark.clause("5.1.6.5-a", "5.1.6.5.2.1-a")
async def test_control_queue(connect: Connect, peer: Peer) -> None:
    """5.1.6.5"""
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize()
    assert driver.config_read(0, 4).to_bytes(4, "little") == MAC[:4]
    assert await control(driver, b"\1\1" + b"\2\0\0\0\0\1") == b"\0"
    assert driver.config_read(0, 1) == 2
    for wrong in (b"\1\1short", b"\4\0\1\0", b"\4\0\0\0", b"\x63\0", b"\1"):
        assert await control(driver, wrong) == b"\1"
    driver.initialize()
    assert driver.config_read(0, 1) == 0x52, "a reset brings the MAC back"


async def test_reset_in_traffic(connect: Connect, peer: Peer) -> None:
    driver = connect(NetDevice(peer.backend, MAC))
    for number in range(5):
        driver.initialize()
        rooms = offer(driver, 2, 2000)
        driver.submit(1, [driver.buffer(HEADER + frame(number, 60))])
        driver.write_status(0)
        before = bytes(driver.memory.bytes)
        await peer.send(frame(number, 70))
        await asyncio.sleep(0)
        assert bytes(driver.memory.bytes) == before
        assert rooms


async def test_state_moves(connect: Connect, tmp_path: Path) -> None:
    for make in PEERS.values():
        one, two = make(tmp_path), make(tmp_path)
        driver = connect(NetDevice(one.backend, MAC))
        driver.initialize()
        offer(driver, 4, 2000)
        await one.send(frame(1, 60))
        await driver.used(0)
        await driver.transport.quiesce()
        other = connect(NetDevice(two.backend, MAC))
        other.memory.bytes[:] = driver.memory.bytes
        other.transport.restore(driver.transport.save())
        other.adopt(driver)
        other.transport.resume()
        await two.send(frame(2, 60))
        await other.used(0)
        other.submit(1, [other.buffer(HEADER + frame(3, 60))])
        assert await two.receive() == frame(3, 60)
        await one.far.aclose()
        await two.far.aclose()


@pytest.mark.parametrize("kind", ["stream", "pcap"])
async def test_the_peer_goes_away(connect: Connect, tmp_path: Path, kind: str) -> None:
    peer = PEERS[kind](tmp_path)
    device = NetDevice(peer.backend, MAC)
    driver = connect(device)
    driver.initialize()
    await peer.far.aclose()
    await driver.wait(lambda: driver.config_read(6, 2) == 0)
    driver.submit(1, [driver.buffer(HEADER + frame(1, 60))])
    await driver.used(1)
    assert not driver.needs_reset


async def test_a_peer_that_does_not_read(connect: Connect) -> None:
    """The guest's buffers wait; nothing grows, nothing is lost."""
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    far = StreamNet(two)
    driver = connect(NetDevice(StreamNet(one), MAC))
    driver.initialize()
    data = [driver.buffer(HEADER + frame(number, 60_000)) for number in range(100)]
    for buffer in data:
        driver.submit(1, [buffer])
    await asyncio.sleep(0.01)
    assert len(driver.queues[1].used()) < 100
    for number in range(100):
        assert await asyncio.wait_for(far.receive(), 10) == frame(number, 60_000)
    await far.aclose()


async def test_hostile_stream_peer(connect: Connect) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    driver = connect(NetDevice(StreamNet(one), MAC))
    driver.initialize()
    offer(driver, 1, 2000)
    two.send(struct.pack(">I", 0xFFFFFFFF) + b"x" * 100)
    await driver.wait(lambda: driver.config_read(6, 2) == 0)
    two.close()


async def test_zero_length_frames_are_skipped(connect: Connect) -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    driver = connect(NetDevice(StreamNet(one), MAC))
    driver.initialize()
    (room,) = offer(driver, 1, 2000)
    for piece in (b"\0\0\0\0", b"\0\0", b"\0\x40", frame(9, 64)[:10], frame(9, 64)[10:]):
        two.send(piece)
        await asyncio.sleep(0)
    await driver.used(0)
    assert driver.bytes_at(room)[12:76] == frame(9, 64)
    two.close()


async def test_pcap_is_what_wireshark_opens(connect: Connect, tmp_path: Path) -> None:
    one, two = MemoryNet.pair()
    backend = PcapNet(one, tmp_path / "x.pcap")
    driver = connect(NetDevice(backend, MAC))
    driver.initialize()
    driver.submit(1, [driver.buffer(HEADER + frame(1, 60))])
    assert await asyncio.wait_for(two.receive(), 10) == frame(1, 60)
    offer(driver, 1, 200)
    await two.send(frame(2, 80))
    await driver.used(0)
    await backend.aclose()
    data = (tmp_path / "x.pcap").read_bytes()
    magic, major, minor, _, _, _, link = struct.unpack_from("<IHHiIII", data)
    assert (magic, major, minor, link) == (0xA1B23C4D, 2, 4, 1)
    at, frames = 24, []
    while at < len(data):
        _, _, length, original = struct.unpack_from("<IIII", data, at)
        assert length == original
        frames.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    assert frames == [frame(1, 60), frame(2, 80)]


async def test_sockets_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ConfigError):
            await connect_socket(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(os.fspath(tmp_path / "frames"))
        backend = await connect_socket(tmp_path / "frames")
        assert isinstance(backend, DatagramNet)
        await backend.send(b"frame")
        assert listener.recv(100) == b"frame"
        await backend.aclose()
    with pytest.raises(HostError):
        await backend.send(b"late")


async def test_user_networking_answers_dhcp(connect: Connect) -> None:
    """passt gives the guest an address."""
    from virtio.backends.sockets import UserNet

    passt.need()
    backend = await UserNet.start()
    driver = connect(NetDevice(backend, MAC))
    driver.initialize()
    assert driver.config_read(10, 2) == 65520
    rooms = offer(driver, 32, 2000)
    bootp = struct.pack("!BBBBIHHIIII16s64s128sI", 1, 1, 6, 0, 7, 0, 0x8000, 0, 0, 0, 0, MAC, b"", b"", 0x63825363)
    bootp = (bootp + bytes((53, 1, 1, 255))).ljust(300, b"\0")
    udp = struct.pack("!HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack("!H", ~total & 0xFFFF) + ip[12:]
    driver.submit(1, [driver.buffer(HEADER + b"\xff" * 6 + MAC + b"\x08\x00" + ip + udp)])
    offer_seen = False
    async with asyncio.timeout(10):
        while not offer_seen:
            for buffer in await driver.used(0):
                data = driver.bytes_at(rooms.pop(0))[12 : buffer.length]
                offer_seen |= data[12:14] == b"\x08\x00" and data[34:38] == struct.pack("!HH", 67, 68)


def stop_queue(driver: MmioDriver, index: int) -> None:
    """4.2.2.2: "To stop using the queue the driver MUST write zero (0x0) to this QueueReady"."""
    driver.set(0x030, index)
    driver.set(0x044, 0)
    assert driver.get(0x044) == 0


async def transmits(driver: Driver, peer: Peer, number: int) -> None:
    sent = frame(number, 60)
    driver.submit(1, [driver.buffer(HEADER + sent)])
    assert await peer.receive() == sent
    await driver.used(1)


async def test_a_driver_that_stops_to_receive_transmits_on(peer: Peer) -> None:
    """Only virtio-mmio can stop one queue."""
    device = NetDevice(peer.backend, MAC)
    driver = MmioDriver(device)
    driver.initialize()
    (room,) = offer(driver, 1, 2000)
    await transmits(driver, peer, 1)
    stop_queue(driver, 0)
    await peer.send(frame(2, 60))
    for number in range(3, 6):
        await transmits(driver, peer, number)
    device.set_link(False)
    device.set_link(True)
    await transmits(driver, peer, 6)
    assert not driver.queues[0].used() and not any(driver.bytes_at(room))
    await driver.transport.quiesce()
    driver.transport.save()
    driver.transport.resume()
    await transmits(driver, peer, 7)
    driver.initialize()
    await transmits(driver, peer, 8)
    offer(driver, 2, 2000)
    await peer.send(frame(9, 60))
    await driver.used(0)
    driver.transport.reset()
    await device.aclose()


async def test_a_driver_that_stops_to_transmit_receives_on(peer: Peer) -> None:
    device = NetDevice(peer.backend, MAC)
    driver = MmioDriver(device)
    driver.initialize()
    stop_queue(driver, 1)
    driver.submit(1, [driver.buffer(HEADER + frame(1, 60))])
    for number in range(2, 5):
        (room,) = offer(driver, 1, 2000)
        await peer.send(frame(number, 60))
        (used,) = await driver.used(0)
        assert driver.bytes_at(room)[12 : used.length] == frame(number, 60)
    assert not driver.queues[1].used()
    driver.transport.reset()
    await device.aclose()


@pytest.mark.parametrize("enabled", [0, 1])
async def test_a_driver_that_enables_one_queue_only(
    connect: Connect, peer: Peer, enabled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = connect(NetDevice(peer.backend, MAC))
    configure = driver.configure_queue

    def configure_one(index: int, queue: AnyDriverQueue) -> None:
        if index != 1 - enabled:
            configure(index, queue)

    monkeypatch.setattr(driver, "configure_queue", configure_one)
    driver.initialize()
    driver.notify(1 - enabled)
    for number in range(3):
        if enabled == 1:
            await transmits(driver, peer, number)
        else:
            offer(driver, 1, 2000)
            await peer.send(frame(number, 60))
            await driver.used(0)


def test_mac_addresses() -> None:
    assert MAC.hex() == "525400123456"
    for wrong in ("", "52:54:00:12:34", "53:54:00:12:34:56", "52:54:00:12:34:zz", "525400123456"):
        with pytest.raises(ConfigError):
            parse_mac(wrong)


@pytest.mark.parametrize("mtu", [68, 1500, 9000, 65520, 65535])
@pytest.mark.clause("5.1.4.1-b", "5.1.4.1-c", "5.1.4.1-d", "5.1.4.1-e")
async def test_the_mtu(connect: Connect, peer: Peer, mtu: int) -> None:
    """5.1.4.1: frames up to it pass whole, both ways; larger ones are not for the driver; it never changes."""
    peer.backend.mtu = mtu
    driver = connect(NetDevice(peer.backend, MAC))
    driver.initialize()
    assert driver.config_read(10, 2) == mtu
    for size in (mtu + 14, mtu + 18):
        sent = frame(3, size) if size <= FRAME_MAX else frame(3, FRAME_MAX)
        driver.submit(1, [driver.buffer(HEADER + sent)])
        assert await peer.receive() == sent
    rooms = offer(driver, 2, 70_000)
    await peer.send(frame(1, mtu + 18))
    if mtu + 19 <= FRAME_MAX:
        await peer.send(frame(1, mtu + 19))
    await peer.send(frame(2, 60))
    used = await driver.used(0, 2)
    assert [driver.bytes_at(room)[12 : buffer.length] for room, buffer in zip(rooms, used, strict=True)] == [
        frame(1, mtu + 18), frame(2, 60)
    ]  # fmt: skip
    peer.backend.mtu = 1280
    assert driver.config_read(10, 2) == mtu
    driver.initialize()
    assert driver.config_read(10, 2) == mtu


async def test_an_impossible_mtu_is_a_mistake(peer: Peer) -> None:
    for mtu in (0, 67, 65536):
        peer.backend.mtu = mtu
        with pytest.raises(ConfigError, match="MTU"):
            NetDevice(peer.backend, MAC)
    await peer.backend.aclose()
