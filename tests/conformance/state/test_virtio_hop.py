"""Virtio devices in the middle of something: a driver that is setting one up, and requests that are in flight.

tests/unit/virtio/test_state.py does the same with every device in mid-traffic, packet by packet.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fuse import share
from tests.support.hops import moves
from tests.support.virtio import DRIVERS, Driver, MmioDriver
from tests.unit.virtio.test_policed import GUEST, MAC, SERVER, ip, question, resolve, tcp, udp
from tests.unit.virtio.test_vsock import CID, Guest, Op
from virtio.backends.policed import PolicedNet
from virtio.backends.rules import Egress, parse
from virtio.backends.sockets import StreamNet
from virtio.backends.vsock import MemoryVsock
from virtio.device import Device
from virtio.devices.balloon import BalloonDevice
from virtio.devices.fs import FsDevice
from virtio.devices.net import NetDevice
from virtio.devices.rng import EntropyDevice
from virtio.devices.vsock import VsockDevice
from virtio.fs import messages as m
from virtio.fs.messages import Opcode
from vmm.state.payload import decode, encode

PAGE = 4096


def begin(kind: str, device: Device) -> Any:
    """A driver that has not touched the device yet, and remembers how it was made."""
    driver: Any = DRIVERS[kind](device)
    driver.make = DRIVERS[kind]
    return driver


async def hop(driver: Driver, fresh: Callable[[], Device]) -> None:
    """The same driver goes on with another device, over the same memory."""
    await asyncio.wait_for(driver.transport.quiesce(), 60)
    device = driver.transport.device
    take_over(driver, fresh)
    await device.aclose()


def take_over(driver: Driver, fresh: Callable[[], Device]) -> None:
    """The part of `hop` after it drained."""
    text = json.dumps(encode(driver.transport.save()))
    other: Any = getattr(driver, "make", MmioDriver)(fresh(), memory=driver.memory)
    other.transport.restore(decode(other.transport, "device", json.loads(text)))
    for name in ("transport", "mmio", "pci", "host"):
        if hasattr(other, name):
            setattr(driver, name, getattr(other, name))
    other.transport.resume()


@moves("virtio-mmio", "virtio-pci", "virtio-device")
@pytest.mark.parametrize("kind", DRIVERS)
async def test_a_driver_that_sets_a_device_up(kind: str) -> None:
    """A hop before any register write of the whole way from reset to the first request, and before every one."""

    def fresh() -> Device:
        return EntropyDevice(lambda count: b"s" * count)

    async def run(at: int | None) -> tuple[int, bytes]:
        """The number of writes, and what the driver got. `at`: the write with a hop before it; None: each has one."""
        driver = begin(kind, fresh())
        writes, plain = 0, driver.set
        old: list[Device] = []

        def write(*arguments: Any) -> None:
            nonlocal writes
            if at is None or at == writes:
                old.append(driver.transport.device)
                take_over(driver, fresh)
            writes += 1
            plain(*arguments)

        driver.set = write
        driver.initialize()
        driver.set = plain
        got = await driver.request(0, [], [8])
        for device in (*old, driver.transport.device):
            await device.aclose()
        return writes, got

    writes, wanted = await run(-1)
    assert writes > 10 and wanted == b"s" * 8
    for at in range(writes):
        assert await run(at) == (writes, wanted), f"a hop before write {at}"
    assert await run(None) == (writes, wanted)


@moves("virtio-net")
@pytest.mark.parametrize("kind", DRIVERS)
async def test_a_card_whose_guest_was_told_addresses(kind: str) -> None:
    """What the policy opened by a name stays open over each hop, and all else closed; with the question in flight it is
    asked again."""
    far: StreamNet

    def fresh() -> NetDevice:
        nonlocal far
        near, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        far = StreamNet(there)
        policy = Egress(parse("files.example.org:443"), ())
        return NetDevice(PolicedNet(StreamNet(near), MAC, policy, resolve=resolve), MAC)

    driver = begin(kind, fresh())
    driver.initialize()
    room = driver.buffer(2000)
    driver.submit(0, [], [room])
    driver.submit(1, [driver.buffer(bytes(12) + ip(udp(53, question("files.example.org")), "198.18.0.53"))])
    (used,) = await driver.used(0, timeout=30)
    assert ipaddress.ip_address(SERVER).packed in driver.bytes_at(room)[: used.length]
    for number in range(3):
        before = far
        await hop(driver, fresh)
        await before.aclose()
        for port, target, source in ((80, SERVER, GUEST), (443, SERVER, "192.0.2.77"), (443, "203.0.113.1", GUEST)):
            driver.submit(1, [driver.buffer(bytes(12) + ip(tcp(port), target, source, 6))])
        good = ip(tcp(443, source=5000 + number), SERVER, protocol=6)
        driver.submit(1, [driver.buffer(bytes(12) + good)])
        assert await asyncio.wait_for(far.receive(), 30) == good
    driver.transport.reset()
    await driver.transport.device.aclose()
    await far.aclose()


@moves("virtio-fs")
async def test_a_share_with_requests_in_flight(tmp_path: Path) -> None:
    """Each write is done once and answered once, and what was open stays open."""
    fuse = await share(tmp_path)
    entry, handle = await fuse.create("file")
    rooms, sent = [], 0
    for _ in range(4):
        for _ in range(10):
            body = m.WriteIn.build({"fh": handle, "offset": 512 * sent, "size": 512, "write_flags": 0, "lock_owner": 0,
                                    "flags": 0, "padding": 0}) + bytes([sent]) * 512  # fmt: skip
            rooms.append(fuse.driver.buffer(64))
            message = fuse.message(Opcode.WRITE, entry.nodeid, body)
            fuse.driver.submit(1, [fuse.driver.buffer(message)], [rooms[-1]])
            sent += 1
        await hop(fuse.driver, lambda: FsDevice(tmp_path, "shared"))
    answered = 0
    async with asyncio.timeout(60):
        while answered < sent:
            answered += len(fuse.driver.queues[1].used())
            await asyncio.sleep(0)
    assert [struct.unpack_from("<IiQI", fuse.driver.bytes_at(room))[3] for room in rooms] == [512] * sent
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([number]) * 512 for number in range(sent))
    assert await fuse.read(entry.nodeid, handle, 4) == bytes(4)
    await fuse.driver.transport.device.aclose()


@moves("virtio-balloon")
@pytest.mark.parametrize("kind", DRIVERS)
async def test_a_balloon_that_is_being_filled(kind: str) -> None:
    """A target that the driver has not reached, statistics that it was not asked for yet: the other device goes on."""
    driver = begin(kind, BalloonDevice())
    driver.initialize()
    device = driver.transport.device
    device.set_target(3)
    pages = [driver.allocator.take(PAGE, PAGE) for _ in range(3)]
    for number, at in enumerate(pages):
        driver.memory.view(at, PAGE)[:] = b"x" * PAGE
        driver.submit(0, [driver.buffer(struct.pack("<I", at // PAGE))])
        await hop(driver, BalloonDevice)
        assert driver.config_read(0, 4) == 3 and driver.config_read(4, 4) == number
        await driver.used(0)
        assert bytes(driver.memory.view(at, PAGE)) == bytes(PAGE)
        driver.config_write(4, 4, number + 1)
    driver.submit(2, [driver.buffer(struct.pack("<HQ", 4, 5000))])
    await driver.wait(lambda: driver.transport.device.statistics)
    await hop(driver, BalloonDevice)
    asking: Awaitable[Any] = asyncio.create_task(driver.transport.device.refresh(60))
    await driver.used(2)
    driver.submit(2, [driver.buffer(struct.pack("<HQ", 4, 6000))])
    assert (await asking)["free"] == 6000
    assert driver.transport.device.actual == 3
    await driver.transport.device.aclose()


@moves("virtio-vsock")
@pytest.mark.parametrize("kind", DRIVERS)
async def test_a_connection_that_is_half_closed(kind: str) -> None:
    """The guest said that it sends no more. It is told that the connection is gone (5.10.6.7), and its port is free."""
    seen: list[bytes] = []

    async def service(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            seen.append(data)
        writer.write(b"answer")
        await writer.drain()
        await asyncio.Event().wait()

    def fresh() -> Device:
        backend = MemoryVsock()
        backend.listen(1025, service)
        return VsockDevice(backend, CID)

    driver = begin(kind, fresh())
    driver.initialize()
    guest = Guest(driver)
    guest.send(77, 1025, Op.REQUEST)
    await guest.expect(Op.RESPONSE)
    guest.send(77, 1025, Op.RW, b"all there is")
    guest.send(77, 1025, Op.SHUTDOWN, flags=2)
    await driver.wait(lambda: b"".join(seen) == b"all there is")
    room = driver.buffer(8)
    await hop(driver, fresh)
    driver.submit(2, [], [room])
    await driver.used(2)
    assert driver.bytes_at(room)[:4] == bytes(4)
    while guest.poll():
        guest._arrived.clear()
    guest.send(77, 1025, Op.REQUEST)
    await guest.expect(Op.RESPONSE)
    guest.send(77, 1025, Op.RW, b"again")
    await driver.wait(lambda: b"".join(seen) == b"all there isagain")
    await driver.transport.device.aclose()
