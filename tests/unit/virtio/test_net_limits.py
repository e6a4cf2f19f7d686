"""Limits of a network card: both directions, over backends with descriptors and without, by the test's own clock."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.clocks import SteppedClock
from tests.support.virtio import Driver, PciDriver
from virtio.backends.net import Channel, MemoryNet, NetBackend
from virtio.backends.sockets import DatagramNet, StreamNet
from virtio.devices.net import NetDevice, parse_mac
from virtio.devices.netstate import NetState, NetStateV1, NetStateV2, NetStateV3
from virtio.errors import ConfigError

MAC = parse_mac("52:54:00:12:34:56")
SECOND = 1_000_000_000
HEADER = bytes(12)


def memory() -> tuple[NetBackend, NetBackend]:
    return MemoryNet.pair()


def stream() -> tuple[NetBackend, NetBackend]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return StreamNet(one), StreamNet(two)


def datagram() -> tuple[NetBackend, NetBackend]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return DatagramNet(one), DatagramNet(two)


class Wire:
    """A card whose driver always has frames to send and buffers for those that come, and the far end of its wire."""

    def __init__(self, backend: NetBackend, far: NetBackend) -> None:
        self.far = far
        self.device = NetDevice(backend, MAC)
        self.clock = self.device.clock = SteppedClock()
        self.driver: Driver = PciDriver(self.device)
        self.driver.initialize()
        self.sent = 0
        """Frames that the device took from the driver."""

    def send(self, count: int, length: int, queue: int = 1) -> None:
        for _ in range(count):
            self.driver.submit(queue, [self.driver.buffer(HEADER + bytes(length))])

    def offer(self, count: int, size: int = 2048) -> None:
        for _ in range(count):
            self.driver.submit(0, [], [self.driver.buffer(size)])

    async def settle(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)

    async def steps(self, seconds: float) -> None:
        end = self.clock.now + int(seconds * SECOND)
        await self.settle()
        while self.clock.now < end and self.clock.step():
            await self.settle()


@pytest.fixture(params=[memory, stream, datagram])
async def wire(request: pytest.FixtureRequest) -> AsyncIterator[Wire]:
    make: Callable[[], tuple[NetBackend, NetBackend]] = request.param
    made = Wire(*make())
    yield made
    made.driver.transport.reset()
    await made.device.aclose()
    await made.far.aclose()


async def drain(far: NetBackend) -> None:
    while True:
        await far.receive()


async def test_frames_out_are_exact(wire: Wire) -> None:
    reader = asyncio.create_task(drain(wire.far))
    wire.device.set_limits({"pps_out": 50, "pps_out_burst": 1})
    wire.send(120, 60)
    await wire.steps(2)
    seconds = wire.clock.now / SECOND
    assert wire.device.counters["sent"] == pytest.approx(50 * seconds, abs=2)
    assert wire.clock.fired <= wire.device.counters["sent"] + 2
    reader.cancel()


async def test_bytes_out_are_exact(wire: Wire) -> None:
    reader = asyncio.create_task(drain(wire.far))
    wire.device.set_limits({"bps_out": 10_000, "bps_out_burst": 1500})
    wire.send(40, 1000)
    await wire.steps(3)
    moved = wire.device.counters["bytes_sent"]
    assert moved == pytest.approx(10_000 * wire.clock.now / SECOND + 1500, abs=2000)
    reader.cancel()


async def test_frames_and_bytes_in_are_exact(wire: Wire) -> None:
    wire.device.set_limits({"pps_in": 20, "pps_in_burst": 1})
    wire.offer(100)
    sending = asyncio.create_task(send_all(wire.far, 100, 1000))
    await wire.steps(2)
    assert wire.device.counters["received"] == pytest.approx(20 * wire.clock.now / SECOND, abs=2)
    before, at = wire.device.counters["bytes_received"], wire.clock.now
    wire.device.set_limits({"pps_in": 0, "pps_in_burst": 0, "bps_in": 5000, "bps_in_burst": 1})
    await wire.steps(2)
    moved = wire.device.counters["bytes_received"] - before
    assert moved == pytest.approx(5000 * (wire.clock.now - at) / SECOND, abs=2100)
    assert wire.device.limits == {"bps_in": 5000, "bps_in_burst": 1}
    wire.device.set_limits({"bps_in": 0})
    await asyncio.wait_for(sending, 30)
    await wire.driver.wait(lambda: wire.device.counters["received"] == 100, 30)


async def send_all(far: NetBackend, count: int, length: int) -> None:
    for number in range(count):
        await far.send(struct.pack(">I", number) + bytes(length - 4))


async def test_the_other_direction_is_free(wire: Wire) -> None:
    wire.device.set_limits({"pps_in": 1, "pps_in_burst": 1})
    reader = asyncio.create_task(drain(wire.far))
    wire.send(50, 60)
    await wire.driver.wait(lambda: wire.device.counters["sent"] == 50, 30)
    reader.cancel()


async def test_a_machine_that_moves_waits_for_no_tokens(wire: Wire) -> None:
    wire.device.set_limits({"pps_out": 1, "pps_out_burst": 1})
    wire.send(10, 60)
    await wire.settle()
    await asyncio.wait_for(wire.driver.transport.quiesce(), 30)
    saved = wire.driver.transport.save().device
    assert saved.limits_out[0].rate == 1
    wire.driver.transport.resume()
    reader = asyncio.create_task(drain(wire.far))
    await wire.steps(12)
    assert wire.device.counters["sent"] == 10
    reader.cancel()


async def test_queues_of_a_card_have_equal_parts() -> None:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)]
    for pair in pairs:
        for end in pair:
            end.setblocking(False)
    backend = DatagramNet(pairs[0][0])
    first = backend.channels[0]
    backend.channels = [first, *(Channel(near.detach(), first.framing) for near, _ in pairs[1:])]
    wire = Wire(backend, MemoryNet.pair()[0])
    await wire.driver.request(6, [struct.pack("<BBH", 4, 0, 3)], [1])
    wire.device.set_limits({"pps_out": 100, "pps_out_burst": 1})
    for queue, depth in ((1, 90), (3, 60), (5, 40)):
        wire.send(depth, 60, queue)
    await wire.settle()
    for _ in range(90):
        assert wire.clock.step()
        for _, far in pairs:
            try:
                while far.recv(2048):
                    pass
            except BlockingIOError:
                continue
    sent = [engine.sent for engine in wire.device._engines]
    assert sum(sent) == pytest.approx(91, abs=2) and max(sent) - min(sent) <= 2, sent
    wire.driver.transport.reset()
    await wire.device.aclose()
    await wire.far.aclose()
    for _, far in pairs:
        far.close()


async def test_a_stream_of_many_small_frames_is_read_to_its_end() -> None:
    """More frames than one turn moves come in one read."""
    wire = Wire(*stream())
    wire.offer(250, 128)
    sending = asyncio.create_task(send_all(wire.far, 700, 60))
    received = 0
    async with asyncio.timeout(60):
        while received < 700:
            used = wire.driver.queues[0].used()
            received += len(used)
            wire.offer(len(used), 128)
            await asyncio.sleep(0)
    await sending
    await wire.device.aclose()
    await wire.far.aclose()


async def test_state_and_names(wire: Wire) -> None:
    values = {"pps_in": 5, "bps_out": 7000, "bps_out_burst": 9000}
    wire.device.set_limits(values)
    other = NetDevice(MemoryNet.pair()[0], MAC)
    other.restore_device(wire.device.save_device())
    assert other.limits == values and other.save_device() == wire.device.save_device()
    other.restore_device(NetState.upgrade(NetStateV3.upgrade(NetStateV2.upgrade(NetStateV1(MAC, True, 1)))))
    assert other.limits == values
    for wrong in ({"pps": 1}, {"iops_in": 1}, {"pps_in_max": 1}, {"bps_out": -1}):
        with pytest.raises(ConfigError):
            other.set_limits({"pps_in": 1, **wrong})
    assert other.limits == values
    await other.aclose()
