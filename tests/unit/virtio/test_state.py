"""save and restore of every device in mid-traffic, into a fresh device over a copy of memory, on every transport.

What was taken before `save` is answered before it; what was not is answered by the other device. Nothing is lost,
nothing is done twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.hops import moves
from tests.support.virtio import Driver
from virtio.backends.block import BlockBackend, MemoryBlock
from virtio.backends.char import MemoryChar
from virtio.backends.file import FileBlock
from virtio.backends.net import MemoryNet, NetBackend
from virtio.backends.sockets import DatagramNet, StreamNet
from virtio.backends.vsock import MemoryVsock
from virtio.constants import Status
from virtio.device import Device
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.devices.console import ConsoleDevice, ControlEvent, Port
from virtio.devices.net import NetDevice, parse_mac
from virtio.devices.rng import EntropyDevice
from virtio.devices.vsock import VsockDevice
from virtio.driver import F_NEXT
from virtio.errors import HostError, StateError
from virtio.queue import Queue
from vmm.state.payload import decode, encode

from .conftest import Connect
from .test_vsock import CID, Guest, Op

MAC = parse_mac("52:54:00:12:34:56")
HOPS = 4


async def move(connect: Connect, driver: Driver, fresh: Callable[[], Awaitable[Device]]) -> Driver:
    """Drain, save, close the device; restore into a fresh one. What the old one does afterwards must not count."""
    await asyncio.wait_for(driver.transport.quiesce(), 10)
    return await hand_over(connect, driver, fresh)


async def hand_over(connect: Connect, driver: Driver, fresh: Callable[[], Awaitable[Device]]) -> Driver:
    """The part of `move` after it drained."""
    state = driver.transport.save()
    text = json.dumps(encode(state))
    memory = bytes(driver.memory.bytes)
    for index in range(len(driver.queues)):
        driver.transport.notify(index)
    await driver.transport.device.aclose()
    assert bytes(driver.memory.bytes) == memory, "a device that was saved does not touch memory"
    other = connect(await fresh())
    other.memory.bytes[:] = memory
    other.transport.restore(decode(other.transport, "device", json.loads(text)))
    other.adopt(driver)
    other.transport.resume()
    return other


async def turns(count: int) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


# Block


class Slow(MemoryBlock):
    """Takes a random number of the loop's turns for each request."""

    async def write(self, offset: int, data: bytes) -> None:
        await turns(random.randrange(20))
        await super().write(offset, data)


@moves("virtio-blk")
@pytest.mark.parametrize("kind", ["engine", "coroutines"])
async def test_block(connect: Connect, kind: str, tmp_path: Path) -> None:
    """Writes on two queues: each sector is written once, each request answered once."""
    sectors = 512
    (tmp_path / "disk").write_bytes(bytes(sectors * 512))
    slow = Slow(sectors * 512)
    written: list[int] = []

    async def fresh() -> Device:
        backend: BlockBackend = slow if kind == "coroutines" else await FileBlock.open(tmp_path / "disk")
        return BlockDevice(backend, queues=2, queue_size=256)

    driver = connect(await fresh())
    driver.initialize()
    driver.config_write(32, 1, 0)
    answered = 0
    statuses = []
    for hop in range(HOPS):
        for number in range(32):
            sector = hop * 32 + number
            request = [
                driver.buffer(struct.pack("<IIQ", blk.OUT, 0, sector)),
                driver.buffer(sector.to_bytes(4, "little") * 128),
            ]
            status = driver.buffer(b"\xff")
            statuses.append(status)
            driver.submit(number % 2, request, [status])
            written.append(sector)
            if number % 8 == 7:
                await turns(hop)
        answered += sum(len(queue.used()) for queue in driver.queues)
        driver = await move(connect, driver, fresh)
        assert driver.config_read(32, 1) == 0, "the cache mode moves too"
    async with asyncio.timeout(10):
        while answered < len(written):
            answered += sum(len(queue.used()) for queue in driver.queues)
            await turns(1)
    assert all(driver.bytes_at(status) == b"\0" for status in statuses)
    data = bytes(slow.data) if kind == "coroutines" else (tmp_path / "disk").read_bytes()
    for sector in written:
        assert data[512 * sector : 512 * sector + 512] == sector.to_bytes(4, "little") * 128


# Network


@moves("virtio-net")
@pytest.mark.parametrize("kind", ["datagrams", "memory"])
async def test_network(connect: Connect, kind: str) -> None:
    """Frames both ways, each exactly once and in order; link, MAC address and negotiated offloads move."""
    near: NetBackend
    far: NetBackend
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    if kind == "memory":
        near, far = MemoryNet.pair()
    else:
        far = DatagramNet(ends[1])

    async def fresh() -> Device:
        return NetDevice(near if kind == "memory" else DatagramNet(ends[0].dup()), MAC)

    driver = connect(await fresh())
    driver.initialize()
    assert await driver.request(2, [b"\1\1" + b"\2\0\0\0\0\7"], [1]) == b"\0"
    got: list[int] = []
    rooms = [driver.buffer(200) for _ in range(128)]
    for room in rooms:
        driver.submit(0, [], [room])
    for hop in range(HOPS):
        for number in range(30):
            frame = struct.pack(">I", hop * 30 + number).ljust(60, b".")
            driver.submit(1, [driver.buffer(bytes(12) + frame)])
            await far.send(frame)
            if number % 7 == hop:
                await turns(hop)
        driver = await move(connect, driver, fresh)
        got += [int.from_bytes(driver.bytes_at(rooms.pop(0))[12:16], "big") for _ in driver.queues[0].used()]
        assert driver.config_read(0, 1) == 2 and driver.config_read(5, 1) == 7, "the MAC address the driver chose"
    while len(got) < HOPS * 30:
        got += [int.from_bytes(driver.bytes_at(rooms.pop(0))[12:16], "big") for _ in await driver.used(0)]
    assert got == list(range(HOPS * 30))
    for number in range(HOPS * 30):
        assert (await asyncio.wait_for(far.receive(), 10))[:4] == struct.pack(">I", number)
    await far.aclose()
    for end in ends:
        end.close()


async def test_a_link_that_is_down_stays_down(connect: Connect) -> None:
    device = NetDevice(MemoryNet(), MAC)
    driver = connect(device)
    driver.initialize()
    device.set_link(False)

    async def fresh() -> Device:
        return NetDevice(MemoryNet(), MAC)

    driver = await move(connect, driver, fresh)
    assert driver.config_read(6, 2) == 0


async def test_a_link_whose_other_end_went_away_is_up_again_elsewhere(connect: Connect) -> None:
    """What is down because passt died, say, is no cable that somebody pulled."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    driver = connect(NetDevice(StreamNet(near), MAC))
    driver.initialize()
    driver.interrupted.clear()
    assert driver.config_read(6, 2) & 1 == 1
    far.close()
    await driver.wait(lambda: driver.config_read(6, 2) & 1 == 0)
    ends: list[socket.socket] = []

    async def fresh() -> Device:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ends.append(far)
        return NetDevice(StreamNet(near), MAC)

    driver = await move(connect, driver, fresh)
    await asyncio.wait_for(driver.interrupted.wait(), 30)  # the guest hears of it
    assert driver.config_read(6, 2) & 1 == 1
    driver.submit(1, [driver.buffer(bytes(12) + b"x" * 60)])
    ends[0].setblocking(False)
    assert len(await asyncio.get_running_loop().sock_recv(ends[0], 1000)) == 64
    await driver.transport.device.aclose()
    ends[0].close()


# Console


@moves("virtio-console")
async def test_console(connect: Connect) -> None:
    """Output, input, messages of the control queue and open ports: every byte once and in order."""
    chars = [MemoryChar(), MemoryChar()]

    async def fresh() -> Device:
        return ConsoleDevice([Port(chars[0]), Port(chars[1], "agent", console=False)], columns=90, rows=30)

    def send(port: int, event: int, value: int) -> None:
        driver.submit(3, [driver.buffer(struct.pack("<IHH", port, event, value))])

    driver = connect(await fresh())
    driver.initialize()
    send(0, ControlEvent.DEVICE_READY, 1)
    for port in range(2):
        send(port, ControlEvent.PORT_READY, 1)
        send(port, ControlEvent.PORT_OPEN, 1)
    seen = []
    sent, typed, read = bytearray(), bytearray(), bytearray()
    for hop in range(7):
        message = await driver.request(2, [], [64])
        seen.append(struct.unpack("<IHH", message[:8])[:2])
        for number in range(10):
            text = f"line {hop}.{number};".encode()
            sent += text
            driver.submit(5, [driver.buffer(text)])
            chars[1].feed(text)
            typed += text
            await turns(hop % 3)
        for _ in range(3):  # fewer than there is: some input is in the device's hands
            read += await driver.request(4, [], [9])
        driver = await move(connect, driver, fresh)
    assert seen == [
        (0, ControlEvent.DEVICE_ADD), (1, ControlEvent.DEVICE_ADD), (0, ControlEvent.CONSOLE_PORT),
        (0, ControlEvent.RESIZE),
        (0, ControlEvent.PORT_OPEN), (1, ControlEvent.PORT_NAME), (1, ControlEvent.PORT_OPEN),
    ]  # fmt: skip
    while len(read) < len(typed):
        read += await driver.request(4, [], [50])
    assert read == typed
    await driver.wait(lambda: len(chars[1].output) == len(sent))
    assert chars[1].output == sent
    send(0, ControlEvent.DEVICE_READY, 1)
    send(0, ControlEvent.PORT_READY, 1)
    message = await driver.request(2, [], [64])
    assert struct.unpack("<IHH", message[:8])[1] == ControlEvent.CONSOLE_PORT, (
        "the ports exist on the other side as well"
    )


# Entropy


@moves("virtio-device")
@pytest.mark.parametrize("rate", [None, 200_000])
async def test_entropy(connect: Connect, rate: int | None) -> None:
    async def fresh() -> Device:
        return EntropyDevice(os.urandom, bytes_per_second=rate)

    driver = connect(await fresh())
    driver.initialize()
    answered = 0
    for hop in range(HOPS):
        for _ in range(12):
            driver.submit(0, [], [driver.buffer(64)])
        await turns(hop)
        answered += len(driver.queues[0].used())
        driver = await move(connect, driver, fresh)
    while answered < 12 * HOPS:
        answered += len(await driver.used(0))
    assert answered == 12 * HOPS


# Socket


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


@moves("virtio-vsock")
async def test_socket(connect: Connect) -> None:
    """Connections end with the machine that they were made on; the driver is told, also after two moves in a row."""

    async def fresh() -> Device:
        backend = MemoryVsock()
        backend.listen(1025, echo)
        return VsockDevice(backend, CID)

    driver = connect(await fresh())
    driver.initialize()
    guest = Guest(driver)
    guest.send(77, 1025, Op.REQUEST)
    await guest.expect(Op.RESPONSE)
    for number in range(5):
        guest.send(77, 1025, Op.RW, b"x" * (1000 * number + 1))
    await turns(2)
    for _ in range(2):
        driver = await move(connect, driver, fresh)
        assert driver.config_read(0, 8) == CID
    assert await driver.request(2, [], [8]) == bytes(4)
    driver = await move(connect, driver, fresh)
    driver.submit(2, [], [driver.buffer(8)])
    assert await driver.request(2, [], [8]) == bytes(4), "each move is told"
    guest.driver = driver
    while guest.poll():
        guest._arrived.clear()
    guest.send(78, 1025, Op.REQUEST)
    await guest.expect(Op.RESPONSE)
    guest.send(78, 1025, Op.RW, b"again")
    assert (await guest.expect(Op.RW))[1] == b"again"


# Any device


class Held(Device):
    """Answers `delay` turns of the loop later."""

    device_id = 42
    queue_sizes = (16,)

    def __init__(self, delay: int = 10) -> None:
        super().__init__()
        self.delay = delay

    async def serve(self, queues: Sequence[Queue]) -> None:
        async for chain in queues[0]:
            self.spawn(self.answer(queues[0], chain), "answer")

    async def answer(self, queue: Queue, chain: Any) -> None:
        await turns(random.randrange(self.delay))
        chain.write(chain.read())
        queue.complete(chain)


async def held() -> Device:
    return Held()


async def test_a_users_device(connect: Connect) -> None:
    driver = connect(await held())
    driver.initialize()
    answered = 0
    for _ in range(HOPS):
        rooms = [driver.buffer(8) for _ in range(8)]
        for number, room in enumerate(rooms):
            driver.submit(0, [driver.buffer(b"%8d" % number)], [room])
        await turns(3)
        driver = await move(connect, driver, held)
        found = driver.queues[0].used()
        while len(found) < 8:
            found += await driver.used(0)
        answered += len(found)
        assert [driver.bytes_at(room) for room in rooms] == [b"%8d" % number for number in range(8)]
    assert answered == 8 * HOPS


async def test_a_pause_loses_nothing(connect: Connect) -> None:
    """quiesce and resume of the same device."""
    driver = connect(await held())
    driver.initialize()
    for pause in range(5):
        rooms = [driver.buffer(1) for _ in range(8)]
        for room in rooms:
            driver.submit(0, [driver.buffer(b"x")], [room])
        await turns(pause)
        await driver.transport.quiesce()
        before = bytes(driver.memory.bytes)
        driver.notify(0)
        await turns(20)
        assert bytes(driver.memory.bytes) == before
        answered = len(driver.queues[0].used())
        driver.transport.resume()
        if answered < 8:
            answered += len(await driver.used(0, 8 - answered))
        assert answered == 8 and all(driver.bytes_at(room) == b"x" for room in rooms)


async def test_save_needs_a_drained_device(connect: Connect) -> None:
    driver = connect(Held(1000))
    driver.initialize()
    driver.submit(0, [driver.buffer(b"x")], [driver.buffer(1)])
    await turns(3)
    with pytest.raises(StateError, match="in flight"):
        driver.transport.save()


@pytest.mark.parametrize("go", [False, True])
async def test_a_device_in_the_middle_of_its_setting_up(connect: Connect, go: bool) -> None:
    driver = connect(await held())
    driver.initialize(go=False)
    driver = await move(connect, driver, held)
    assert driver.read_status() == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    if go:
        driver.write_status(driver.read_status() | Status.DRIVER_OK)
    else:
        driver.initialize()
    assert await driver.request(0, [b"abc"], [3]) == b"abc"


async def test_features_that_were_not_offered(connect: Connect) -> None:
    """Until the driver asks for FEATURES_OK it may have written anything; the state moves, and the device refuses them
    then."""

    async def entropy() -> Device:
        return EntropyDevice(random.Random(1).randbytes)

    driver = connect(await entropy())
    driver.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    driver.write_features((1 << 64) - 1)
    other = await move(connect, driver, entropy)
    other.write_status(other.read_status() | Status.FEATURES_OK)
    assert not other.read_status() & Status.FEATURES_OK
    other.initialize()
    assert await other.request(0, [], [4])


async def test_a_device_that_needs_a_reset(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """Also with chains in flight that will never be returned."""
    caplog.set_level("ERROR")
    driver = connect(Held(1000))
    driver.initialize()
    queue = driver.queues[0]
    driver.submit(0, [driver.buffer(b"x")], [driver.buffer(1)])
    await turns(3)
    at = 1 if driver.transport.driver_features >> 34 & 1 else 0
    queue.set_descriptor(at + 1, driver.memory.base, 0, F_NEXT)
    if at:
        at += 1
        queue._next += 1  # type: ignore[union-attr]
    queue.offer(at or 1)
    driver.notify(0)
    await driver.wait(lambda: driver.needs_reset)
    driver = await move(connect, driver, held)
    assert driver.needs_reset
    driver.notify(0)
    await turns(20)
    driver.initialize()
    assert await driver.request(0, [b"abc"], [3]) == b"abc"


class Breaking(Held):
    """Its host fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = asyncio.Event()

    async def serve(self, queues: Sequence[Queue]) -> None:
        self.spawn(self.fail(), "fail")
        await super().serve(queues)

    async def fail(self) -> None:
        await self.broken.wait()
        raise HostError("the backend is gone")


async def test_a_fault_between_quiesce_and_save(connect: Connect) -> None:
    """A device that needs a reset takes no chain after the move either, so that it can move again."""
    device = Breaking()
    driver = connect(device)
    driver.initialize()
    await driver.transport.quiesce()
    driver.submit(0, [driver.buffer(b"x")], [driver.buffer(1)])
    device.broken.set()
    await driver.wait(lambda: driver.needs_reset)
    other = await hand_over(connect, driver, held)
    await turns(20)
    assert other.needs_reset and not other.queues[0].used()
    other = await move(connect, other, held)
    assert other.needs_reset
    other.initialize()
    assert await other.request(0, [b"abc"], [3]) == b"abc"


async def test_a_fault_after_quiesce_leaves_no_ports_open(connect: Connect) -> None:
    """What a driver did before the reset that it is to make does not move: it finds the ports as at first."""

    async def fresh() -> ConsoleDevice:
        return ConsoleDevice([Port(MemoryChar()), Port(MemoryChar(), "second", console=False)])

    driver = connect(await fresh())
    driver.initialize()
    driver.submit(3, [driver.buffer(struct.pack("<IHH", 0, ControlEvent.DEVICE_READY, 1))])
    await driver.used(3)
    await driver.transport.quiesce()
    driver.transport.active.fault(HostError("the backend is gone"))  # type: ignore[union-attr]
    driver = await hand_over(connect, driver, fresh)
    driver.initialize()
    room = driver.buffer(8)
    driver.submit(2, [], [room])
    driver.submit(3, [driver.buffer(struct.pack("<IHH", 0, ControlEvent.DEVICE_READY, 1))])
    await driver.used(2)
    assert driver.bytes_at(room) == struct.pack("<IHH", 0, ControlEvent.DEVICE_ADD, 1)


async def test_interrupts_that_wait(connect: Connect) -> None:
    """A notification that the driver has not seen yet is there on the other side."""
    driver = connect(await held())
    driver.initialize()
    host = getattr(driver, "host", None)
    if host is not None:
        host.msix_enabled = False
    await driver.request(0, [b"x"], [1])
    driver.transport.device.config_changed()
    pending = driver.transport.save
    await driver.transport.quiesce()
    state = pending()
    assert getattr(state, "isr", None) == 3 or getattr(state, "interrupt_status", None) == 3
    other = connect(await held())
    other.memory.bytes[:] = driver.memory.bytes
    if host is not None:
        other.host.msix_enabled = False  # type: ignore[attr-defined]
    other.transport.restore(state)
    assert other.host.intx if host is not None else other.level  # type: ignore[attr-defined]
