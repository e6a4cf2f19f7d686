"""Checksum and segmentation offload, and several queues (5.1.6.2 to 5.1.6.5): over a tap in effigy, and over taps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from virtio.backends.net import FdNet, Framing
from virtio.backends.tap import TapNet
from virtio.devices import net
from virtio.devices.net import DATA_VALID, GSO_NONE, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, NetDevice, NetFeature, parse_mac
from virtio.errors import ConfigError
from virtio.packed import reference_ring

from .conftest import Connect

MAC, FAR = parse_mac("52:54:00:12:34:56"), parse_mac("02:00:00:00:00:01")
ETHERTYPE = 0x88B5
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
_layout = struct.Struct("<BBHHHHH")


class Header(NamedTuple):
    """struct virtio_net_hdr"""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        return _layout.pack(*self)


def split(data: bytes) -> tuple[Header, bytes]:
    return Header(*_layout.unpack(data[:12])), data[12:]


def ones_sum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(version: int, protocol: int, length: int) -> bytes:
    addresses = bytes((10, 0, 0, 1, 10, 0, 0, 2)) if version == 4 else bytes(15) + b"\1" + bytes(15) + b"\2"
    return addresses + (
        struct.pack("!BBH", 0, protocol, length) if version == 4 else struct.pack("!IHBB", length, 0, 0, protocol)
    )


def tcp(payload: bytes, version: int = 4, *, partial: bool = False, ports: tuple[int, int] = (1000, 2000)) -> bytes:
    """A TCP segment in an Ethernet frame, its checksum that of the pseudo header if `partial`."""
    segment = struct.pack("!HHIIBBHHH", *ports, 7, 9, 5 << 4, 0x10, 1000, 0, 0) + payload
    start = ones_sum(pseudo(version, 6, len(segment)))
    check = start if partial else ~ones_sum(start.to_bytes(2, "big") + segment) & 0xFFFF
    segment = segment[:16] + check.to_bytes(2, "big") + segment[18:]
    if version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 6, 0) + bytes((10, 0, 0, 1, 10, 0, 0, 2))
        head = head[:10] + (~ones_sum(head) & 0xFFFF).to_bytes(2, "big") + head[12:]
        return MAC + FAR + b"\x08\x00" + head + segment
    head = struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
    return MAC + FAR + b"\x86\xdd" + head + segment


def checksum_is_right(frame: bytes, version: int = 4) -> bool:
    segment = frame[34 if version == 4 else 54 :]
    return ones_sum(pseudo(version, 6, len(segment)) + segment) == 0xFFFF


class FakeTap(FdNet):
    """A tap as its descriptor looks: one frame per read, behind a virtio_net_hdr."""

    offloads = TapNet.offloads

    def __init__(self) -> None:
        one, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.negotiated: int | None = None
        self.kernel.setblocking(False)
        super().__init__([one.detach()], Framing.TAP)

    def set_offloads(self, features: int) -> None:
        self.negotiated = features

    async def aclose(self) -> None:
        await super().aclose()
        self.kernel.close()


@pytest.fixture(params=["c", "python"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"ring_factory": reference_ring} if request.param == "python" else {}


async def received(tap: FakeTap) -> tuple[Header, bytes]:
    return split(await asyncio.wait_for(asyncio.get_running_loop().sock_recv(tap.kernel, 70_000), 10))


def offer(driver: Any, count: int, size: int = 70_000) -> list[tuple[int, int]]:
    rooms = [driver.buffer(size) for _ in range(count)]
    for room in rooms:
        driver.submit(0, [], [room])
    return rooms


@pytest.mark.clause("5.1.6.2.2-a", "5.1.6.2.2-b", "5.1.6.2.2-c", "5.1.6.2.2-d")
async def test_the_drivers_header_is_taken_as_far_as_it_means_something(
    connect: Connect, options: dict[str, Any]
) -> None:
    tap = FakeTap()
    driver = connect(NetDevice(tap, MAC), **options)
    driver.initialize()
    assert tap.negotiated == TapNet.offloads
    frame = tcp(b"payload", partial=True)
    wrong_checksum = tcp(b"payload")[:-1] + b"!"
    for header, data, expected in (
        (Header(flags=0xFE, csum_start=34, csum_offset=16), frame, Header()),
        (Header(flags=0xFF, csum_start=34, csum_offset=16), frame, Header(NEEDS_CSUM, 0, 0, 0, 34, 16)),
        (Header(csum_start=60_000, csum_offset=2, num_buffers=9), wrong_checksum, Header()),
        (Header(hdr_len=0xFFFF), frame, Header(hdr_len=len(frame))),
        (
            Header(NEEDS_CSUM, GSO_TCPV4, 1, 1000, 34, 16),
            tcp(b"x" * 5000, partial=True),
            Header(NEEDS_CSUM, GSO_TCPV4, 1, 1000, 34, 16),
        ),
    ):
        packed = driver.buffer(header.pack() + data)
        driver.submit(1, [(packed[0], 5), (packed[0] + 5, 30), (packed[0] + 35, packed[1] - 35)])
        assert await received(tap) == (expected, data)


@pytest.mark.clause(
    "5.1.6.4.1-e", "5.1.6.4.1-f", "5.1.6.4.1-g", "5.1.6.4.1-h", "5.1.6.4.1-l", "5.1.6.4.1-m", "5.1.6.4.1-n"
)
@pytest.mark.parametrize(
    "without",
    [
        NetFeature(0),
        NetFeature.GUEST_TSO4,
        NetFeature.GUEST_TSO6,
        NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6,
    ],
)
async def test_the_driver_gets_no_header_that_it_did_not_agree_to(
    connect: Connect, options: dict[str, Any], without: NetFeature
) -> None:
    """Whatever a backend says: a frame is cleaned of what is informative, and lost if it needs the rest."""
    tap = FakeTap()
    driver = connect(NetDevice(tap, MAC), **options)
    driver.initialize(~without)
    assert tap.negotiated == TapNet.offloads & ~without
    loop = asyncio.get_running_loop()
    rooms = offer(driver, 16)
    plain, four, six = tcp(b"plain"), tcp(b"4" * 4000, partial=True), tcp(b"6" * 4000, 6, partial=True)
    checksum = not without & NetFeature.GUEST_CSUM
    sent = [
        (Header(), plain, Header()),
        (Header(DATA_VALID | 4 | 0x80, csum_start=3), plain, Header(DATA_VALID if checksum else 0)),
        (Header(NEEDS_CSUM, 0, 0, 0, 34, 16), plain, Header(NEEDS_CSUM, 0, 0, 0, 34, 16) if checksum else None),
        (
            Header(NEEDS_CSUM, GSO_TCPV4, 54, 1000, 34, 16),
            four,
            None if without & NetFeature.GUEST_TSO4 else Header(NEEDS_CSUM, GSO_TCPV4, 54, 1000, 34, 16),
        ),
        (
            Header(NEEDS_CSUM, GSO_TCPV6, 74, 1000, 54, 16),
            six,
            None if without & NetFeature.GUEST_TSO6 else Header(NEEDS_CSUM, GSO_TCPV6, 74, 1000, 54, 16),
        ),
        (Header(0, GSO_TCPV4, 54, 1000), four, None),  # no segmentation without a checksum to complete
        (Header(NEEDS_CSUM, 3, 42, 1000, 34, 6), plain, None),  # UFO, which is not offered
        (Header(NEEDS_CSUM, GSO_TCPV4 | 0x80, 54, 1000, 34, 16), four, None),  # ECN, which is not either
        (Header(NEEDS_CSUM, 0x55, 54, 1000, 34, 16), four, None),
        (Header(), plain[:-1] + b".", Header()),
    ]
    expected = []
    for header, frame, seen in sent:
        await loop.sock_sendall(tap.kernel, header.pack() + frame)
        if seen is not None:
            expected.append((seen._replace(num_buffers=1), frame))
    used = await driver.used(0, len(expected))
    got = [split(driver.bytes_at(room)[: buffer.length]) for room, buffer in zip(rooms, used, strict=False)]
    assert got == expected


async def test_the_mtu_is_of_frames_without_segmentation_offload(connect: Connect, options: dict[str, Any]) -> None:
    tap = FakeTap()
    tap.mtu = 1500
    driver = connect(NetDevice(tap, MAC), **options)
    driver.initialize()
    rooms = offer(driver, 2)
    loop = asyncio.get_running_loop()
    big = tcp(b"4" * 4000, partial=True)
    await loop.sock_sendall(tap.kernel, Header().pack() + big)
    await loop.sock_sendall(tap.kernel, Header(NEEDS_CSUM, GSO_TCPV4, 54, 1000, 34, 16).pack() + big)
    (used,) = await driver.used(0)
    assert split(driver.bytes_at(rooms[0])[: used.length])[0].gso_type == GSO_TCPV4


# Real taps


class Far:
    """The host's side of a tap: a packet socket that gives and takes a virtio_net_hdr (10 bytes) with each frame."""

    def __init__(self, name: str, ethertype: int = 3) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.socket.bind((name, ethertype))
        self.socket.setblocking(False)

    def send(self, frame: bytes, header: Header = Header()) -> None:  # noqa: B008 - a value
        self.socket.send(header.pack()[:10] + frame)

    async def receive(self) -> tuple[Header, bytes]:
        """The next frame of the guest's."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            while True:
                data = await loop.sock_recv(self.socket, 70_000)
                if data[16:22] in (MAC, FAR):
                    return Header(*_layout.unpack(data[:10] + b"\0\0")), data[10:]


@pytest.fixture
async def tap(request: pytest.FixtureRequest) -> AsyncIterator[tuple[TapNet, Far]]:
    """A tap of `request.param` queues, up, and its far side. The interface goes with its descriptors."""
    try:
        backend = TapNet("lvtest%d", queues=getattr(request, "param", 1))
    except ConfigError as error:
        pytest.skip(str(error))
    with contextlib.suppress(OSError):
        Path("/proc/sys/net/ipv6/conf", backend.name, "disable_ipv6").write_text("1")
    await backend.configure()
    far = Far(backend.name)
    yield backend, far
    far.socket.close()


async def frames(driver: Any, rooms: list[tuple[int, int]], count: int, queue: int = 0) -> list[tuple[Header, bytes]]:
    """`count` frames between our two addresses, in the order in which they came."""
    found: list[tuple[Header, bytes]] = []
    while len(found) < count:
        for buffer in await driver.used(queue):
            header, data = split(driver.bytes_at(rooms.pop(0))[: buffer.length])
            if data[:6] in (MAC, FAR) and data[6:12] in (MAC, FAR):
                found.append((header, data))
    return found


@pytest.mark.root
@pytest.mark.clause("5.1.6.4.1-i", "5.1.6.4.1-o")
async def test_what_the_host_did_not_check_is_not_called_valid(
    connect: Connect, tap: tuple[TapNet, Far], options: dict[str, Any]
) -> None:
    backend, far = tap
    driver = connect(NetDevice(backend, MAC), **options)
    driver.initialize()
    rooms = offer(driver, 4, 2000)
    wrong = tcp(b"payload")[:-1] + b"!"
    far.send(wrong)
    assert await frames(driver, rooms, 1) == [(Header(num_buffers=1), wrong)]


@pytest.mark.root
async def test_frames_both_ways(connect: Connect, tap: tuple[TapNet, Far], options: dict[str, Any]) -> None:
    backend, far = tap
    driver = connect(NetDevice(backend, MAC), **options)
    driver.initialize()
    sent = FAR + MAC + ETHERTYPE.to_bytes(2, "big") + b"from the guest".ljust(50, b".")
    driver.submit(1, [driver.buffer(Header().pack() + sent)])
    assert await far.receive() == (Header(), sent)
    answer = MAC + FAR + ETHERTYPE.to_bytes(2, "big") + b"to the guest".ljust(50, b".")
    rooms = offer(driver, 16, 2000)
    far.send(answer)
    assert await frames(driver, rooms, 1) == [(Header(num_buffers=1), answer)]


@pytest.mark.root
@pytest.mark.parametrize("hdr_len", [0, 1, 54, 66, 0xFFFF])
@pytest.mark.clause("5.1.6.2.2-c")
async def test_the_kernel_takes_large_segments(
    connect: Connect, tap: tuple[TapNet, Far], options: dict[str, Any], hdr_len: int
) -> None:
    """A frame of 30 KB goes to the host's stack as one, whatever hdr_len says."""
    backend, far = tap
    driver = connect(NetDevice(backend, MAC), **options)
    driver.initialize()
    frame = tcp(os.urandom(30_000), partial=True)
    driver.submit(1, [driver.buffer(Header(NEEDS_CSUM, GSO_TCPV4, hdr_len, 1448, 34, 16).pack() + frame)])
    header, data = await far.receive()
    assert data == frame
    assert (header.flags & NEEDS_CSUM, header.gso_type, header.gso_size) == (NEEDS_CSUM, GSO_TCPV4, 1448)


@pytest.mark.root
@pytest.mark.clause("5.1.6.4.1-i", "5.1.6.4.1-j", "5.1.6.4.1-k", "5.1.6.4.1-m")
@pytest.mark.parametrize("version", [4, 6])
async def test_large_segments_to_the_guest(
    connect: Connect, tap: tuple[TapNet, Far], options: dict[str, Any], version: int
) -> None:
    """A frame whose checksum has not left the host comes with its pseudo header's sum and where to complete it."""
    backend, far = tap
    driver = connect(NetDevice(backend, MAC), **options)
    driver.initialize()
    rooms = offer(driver, 4)
    start, kind = (34, GSO_TCPV4) if version == 4 else (54, GSO_TCPV6)
    frame = tcp(os.urandom(20_000), version, partial=True)
    far.send(frame, Header(NEEDS_CSUM, kind, start + 20, 1400, start, 16))
    ((header, data),) = await frames(driver, rooms, 1)
    assert data == frame
    assert (header.flags, header.gso_type, header.gso_size) == (NEEDS_CSUM, kind, 1400)
    assert (header.csum_start, header.csum_offset, header.num_buffers) == (start, 16, 1)
    assert int.from_bytes(data[start + 16 : start + 18], "big") == ones_sum(pseudo(version, 6, len(data) - start))
    complete = ~ones_sum(data[start:]) & 0xFFFF
    assert checksum_is_right(data[: start + 16] + complete.to_bytes(2, "big") + data[start + 18 :], version)


@pytest.mark.root
@pytest.mark.clause("5.1.6.4.1-e", "5.1.6.4.1-f", "5.1.6.4.1-h", "5.1.6.4.1-l")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("checksum", [True, False])
async def test_without_segmentation_offload_the_host_cuts(
    connect: Connect, tap: tuple[TapNet, Far], options: dict[str, Any], version: int, checksum: bool
) -> None:
    """And completes the checksums, if the driver does not do that either."""
    backend, far = tap
    driver = connect(NetDevice(backend, MAC), **options)
    driver.initialize(~(NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6 | (0 if checksum else NetFeature.GUEST_CSUM)))
    rooms = offer(driver, 16, 2000)
    start, kind = (34, GSO_TCPV4) if version == 4 else (54, GSO_TCPV6)
    payload = os.urandom(7000)
    far.send(tcp(payload, version, partial=True), Header(NEEDS_CSUM, kind, start + 20, 1400, start, 16))
    got = await frames(driver, rooms, 5)
    assert b"".join(data[start + 20 :] for _, data in got) == payload
    for header, data in got:
        assert header.gso_type == GSO_NONE
        if checksum and header.flags & NEEDS_CSUM:
            data = data[: start + 16] + (~ones_sum(data[start:]) & 0xFFFF).to_bytes(2, "big") + data[start + 18 :]
        else:
            assert header.flags == 0
        assert checksum_is_right(data, version)


async def pairs(driver: Any, count: int) -> None:
    assert await driver.request(4, [b"\4\0" + struct.pack("<H", count)], [1]) == b"\0"


@pytest.mark.root
@pytest.mark.parametrize("tap", [2], indirect=True)
@pytest.mark.clause("5.1.4.1-a")
async def test_several_queues_are_switched_by_the_control_queue(connect: Connect, tap: tuple[TapNet, Far]) -> None:
    backend, _ = tap
    driver = connect(NetDevice(backend, MAC))
    driver.initialize()
    assert driver.config_read(8, 2) == 2 and len(driver.queues) == 5
    answer = []
    for count in (2, 1, 0, 3, 0x8000, 2):
        answer.append(await driver.request(4, [b"\4\0" + struct.pack("<H", count)], [1]))
    assert answer == [b"\0", b"\0", b"\1", b"\1", b"\1", b"\0"]


@pytest.mark.root
@pytest.mark.parametrize("tap", [2], indirect=True)
@pytest.mark.clause("5.1.6.5.6.2-a", "5.1.6.5.6.2-b")
async def test_packets_come_only_on_the_queues_in_use(connect: Connect, tap: tuple[TapNet, Far]) -> None:
    """After a reset, and again after VQ_PAIRS_SET took a pair away: all flows on receiveq1."""
    backend, far = tap
    driver = connect(NetDevice(backend, MAC))
    for narrowed in (False, True):
        driver.initialize()
        first, second = offer(driver, 64, 200), [driver.buffer(200) for _ in range(64)]
        for room in second:
            driver.submit(2, [], [room])
        if narrowed:
            await pairs(driver, 2)
            await pairs(driver, 1)
        for port in range(40):
            far.send(tcp(b"flow", ports=(port, 80)))
        assert len(await frames(driver, first, 40)) == 40
        assert driver.queues[2].used() == []


@pytest.mark.root
@pytest.mark.parametrize("tap", [2], indirect=True)
@pytest.mark.clause("5.1.6.5.6-a")
async def test_flows_are_steered_to_the_queue_that_they_were_sent_on(connect: Connect, tap: tuple[TapNet, Far]) -> None:
    backend, far = tap
    driver = connect(NetDevice(backend, MAC))
    driver.initialize()
    await pairs(driver, 2)
    rooms = [[driver.buffer(200) for _ in range(64)] for _ in range(2)]
    for pair in range(2):
        for room in rooms[pair]:
            driver.submit(2 * pair, [], [room])

    def reply(port: int) -> bytes:
        frame = tcp(b"answer", ports=(80, port))
        return frame[:26] + frame[30:34] + frame[26:30] + frame[34:]  # the addresses change places

    for turn in range(3):
        for pair in (1, 0):
            ports = range(1000 * pair + 100 * turn, 1000 * pair + 100 * turn + 5)
            for port in ports:
                frame = tcp(b"request", ports=(port, 80))
                driver.submit(2 * pair + 1, [driver.buffer(Header().pack() + FAR + MAC + frame[12:])])
                await far.receive()
            for port in ports:
                far.send(reply(port))
            got = await frames(driver, rooms[pair], 5, 2 * pair)
            assert [int.from_bytes(data[36:38], "big") for _, data in got] == list(ports)
            assert driver.queues[2 - 2 * pair].used() == []


def test_header_lengths() -> None:
    assert net.HEADER == len(Header().pack()) == 12
