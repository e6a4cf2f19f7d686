"""What both transports do with status, features, queues and configuration space (2.1 to 2.5, 3.1)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.support.virtio import Driver, MmioDriver, PciDriver
from virtio.backends.net import MemoryNet
from virtio.constants import Feature, Status
from virtio.device import Activation, Device
from virtio.devices.net import NetDevice, NetFeature
from virtio.driver import F_NEXT
from virtio.errors import ConfigError, GuestError, HostError, StateError
from virtio.packed import reference_ring
from virtio.queue import Queue

from .conftest import Connect


class Echo(Device):
    """Returns what it reads; a device as a user writes one."""

    device_id = 42
    device_features = 0b101
    queue_sizes = (16, 8)

    def __init__(self) -> None:
        super().__init__()
        self.space = bytearray(b"\x11\x22\x33\x44\x55\x66\x77\x88")

    def config(self) -> bytes:
        return bytes(self.space)

    def config_written(self, offset: int, data: bytes) -> None:
        self.space[offset : offset + len(data)] = data

    async def serve(self, queues: Sequence[Queue]) -> None:
        async for chain in queues[0]:
            data = chain.read()
            if data == b"fail":
                raise HostError("the backend is gone")
            chain.write(data[::-1])
            queues[0].complete(chain)


async def test_a_device_of_one_coroutine(connect: Connect) -> None:
    driver = connect(Echo())
    driver.initialize()
    assert await driver.request(0, [b"abc", b"def"], [4, 4]) == b"fedcba"
    for _ in range(40):
        assert await driver.request(0, [b"again"], [16]) == b"niaga"


async def test_the_reference_ring_serves_a_device(connect: Connect) -> None:
    driver = connect(Echo(), ring_factory=reference_ring)
    driver.initialize()
    assert await driver.request(0, [b"abc"], [4]) == b"cba"


@pytest.mark.clause("2.2.2-b", "6.2-a")
async def test_initialization_is_the_specified_sequence(connect: Connect) -> None:
    """3.1.1: status bits only in order; 2.2: features are fixed by FEATURES_OK."""
    driver = connect(Echo())
    driver.write_status(Status.DRIVER)
    assert driver.read_status() == 0, "DRIVER without ACKNOWLEDGE"
    driver.write_status(Status.ACKNOWLEDGE)
    driver.write_status(Status.ACKNOWLEDGE | Status.DRIVER_OK)
    assert driver.read_status() == Status.ACKNOWLEDGE
    driver.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    offered = driver.read_features()
    assert offered & Feature.VERSION_1 and offered & 0xFF == 0b101
    driver.write_features(offered | 0b10)
    driver.write_status(driver.read_status() | Status.FEATURES_OK)
    assert not driver.read_status() & Status.FEATURES_OK, "2.2.2: a feature that was not offered"
    driver.write_features(offered & ~Feature.VERSION_1)
    driver.write_status(driver.read_status() | Status.FEATURES_OK)
    assert not driver.read_status() & Status.FEATURES_OK, "6.2: VERSION_1 is needed"
    driver.write_features(offered)
    driver.write_status(driver.read_status() | Status.FEATURES_OK)
    assert driver.read_status() & Status.FEATURES_OK
    driver.write_features(0)
    assert driver.transport.driver_features == offered
    driver.write_status(Status.DRIVER_OK)
    assert driver.read_status() == 15, "a bit cannot be cleared but by reset"


class Demanding(Echo):
    """Its feature 0 means nothing without feature 2."""

    feature_requirements = {0b1: 0b100}


@pytest.mark.clause("2.2.2-b")
async def test_a_feature_is_not_accepted_without_what_it_requires(connect: Connect) -> None:
    driver = connect(Demanding())
    driver.write_status(Status.ACKNOWLEDGE)
    driver.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    for features, accepted in ((0b1, False), (0b100, True)):
        driver.write_features(features | Feature.VERSION_1)
        driver.write_status(driver.read_status() | Status.FEATURES_OK)
        assert bool(driver.read_status() & Status.FEATURES_OK) == accepted


async def wrong_devices() -> list[Device]:
    lonely, reserved, odd, large = Demanding(), Echo(), Echo(), Echo()
    lonely.device_features = 0b1
    reserved.device_features = 1 << 37
    odd.queue_sizes = (16, 24)
    large.queue_sizes = (1 << 16,)
    return [lonely, reserved, odd, large]


@pytest.mark.clause("2.2.2-a", "6.2-c", "4.1.4.3.1-i")
async def test_a_device_cannot_be_declared_against_the_specification(connect: Connect) -> None:
    """A feature without another, a transport's feature (37 is SR_IOV), a queue size that split rings cannot have."""
    for device in await wrong_devices():
        with pytest.raises(ConfigError):
            connect(device)
    assert not connect(Echo()).read_features() & 1 << 37


@pytest.mark.clause("4.1.4.3.1-i")
async def test_queue_sizes_are_powers_of_two_for_split_rings(connect: Connect) -> None:
    driver = connect(Echo())
    driver.write_status(Status.ACKNOWLEDGE)
    driver.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    packed = driver.read_features() & Feature.RING_PACKED
    driver.write_features(driver.read_features())
    for accepted in (False, True):
        if accepted:
            driver.write_status(driver.read_status() | Status.FEATURES_OK)
        driver.transport.queue_select = 0
        driver.transport.set_queue_size(5)
        assert driver.transport.queues[0].size == (5 if accepted and packed else 16)
    driver.write_status(0)
    assert driver.queue_size_max(0) == 16


@pytest.mark.clause("2.1.2-a", "4.2.2.1-g")
async def test_nothing_before_driver_ok(connect: Connect) -> None:
    """2.1.2: the device MUST NOT consume buffers before DRIVER_OK."""
    driver = connect(Echo())
    driver.initialize(go=False)
    room = driver.buffer(4)
    driver.queues[0].add([driver.buffer(b"x")], [room])
    before = bytes(driver.memory.bytes)
    driver.notify(0)
    for _ in range(3):
        await asyncio.sleep(0)
    assert bytes(driver.memory.bytes) == before and not driver.interrupted.is_set()
    assert not driver.transport.device.is_active
    driver.write_status(driver.read_status() | Status.DRIVER_OK)
    driver.notify(0)
    await driver.used(0)
    assert driver.bytes_at(room) == b"x\0\0\0"


@pytest.mark.clause("2.7.10.2-c")
async def test_notifications_that_make_no_sense_are_ignored(connect: Connect) -> None:
    driver = connect(Echo())
    driver.notify(0)
    driver.initialize()
    for _ in range(5):
        driver.notify(1)
        driver.notify(0)
        await asyncio.sleep(0)
    assert driver.queues[0].used() == []
    assert await driver.request(0, [b"ok"], [4]) == b"ko"
    driver.notify(0)
    assert await driver.request(0, [b"ok"], [4]) == b"ko"
    driver.transport.notify(99)
    assert not driver.needs_reset


@pytest.mark.clause("2.4.1-a", "2.4.1-b", "4.1.4.3.1-f")
async def test_reset_abandons_and_starts_over(connect: Connect) -> None:
    """2.4.1: after reset no notifications and no access to the queues."""
    driver = connect(Echo())
    driver.initialize()
    room = driver.buffer(4)
    driver.submit(0, [driver.buffer(b"x")], [room])
    driver.write_status(0)
    assert driver.read_status() == 0
    driver.interrupted.clear()
    before = bytes(driver.memory.bytes)
    driver.notify(0)
    driver.transport.device.config_changed()
    for _ in range(5):
        await asyncio.sleep(0)
    assert bytes(driver.memory.bytes) == before and not driver.interrupted.is_set()
    assert driver.bytes_at(room) == bytes(4)
    driver.initialize()
    assert await driver.request(0, [b"abc"], [4]) == b"cba"


@pytest.mark.clause("2.1.2-b")
async def test_a_broken_ring_is_latched(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """2.1.2: DEVICE_NEEDS_RESET, with a configuration change notification; then a reset mends it."""
    caplog.set_level(logging.ERROR)
    driver = connect(Echo())
    driver.initialize()
    queue = driver.queues[0]
    queue.set_descriptor(0, driver.memory.base, 4, F_NEXT, 0)
    queue.offer(0)
    driver.notify(0)
    await driver.wait(lambda: driver.needs_reset)
    assert driver.interrupted.is_set()
    queue.add([driver.buffer(b"x")], [driver.buffer(4)])
    driver.notify(0)
    assert queue.used() == []
    driver.initialize()
    assert not driver.needs_reset
    assert await driver.request(0, [b"abc"], [4]) == b"cba"


async def test_a_queue_outside_memory_is_a_fault(connect: Connect) -> None:
    driver = connect(Echo())
    driver.initialize(go=False)
    driver.transport.queues[0].desc = 0x10
    driver.write_status(driver.read_status() | Status.DRIVER_OK)
    assert driver.needs_reset and not driver.transport.device.is_active


async def test_a_host_fault_in_serve_needs_a_reset_too(connect: Connect) -> None:
    driver = connect(Echo())
    driver.initialize()
    driver.submit(0, [driver.buffer(b"fail")], [driver.buffer(4)])
    await driver.wait(lambda: driver.needs_reset)


class Unplugged(Echo):
    """Its host fails before it begins."""

    def started(self, active: Activation) -> None:
        raise HostError("the interface is gone")


async def test_a_host_fault_at_driver_ok_needs_a_reset_too(connect: Connect) -> None:
    """It is the device's fault state, not the end of the machine; there, and where it is restored."""
    driver = connect(Unplugged())
    driver.initialize()
    assert driver.needs_reset
    driver = connect(Echo())
    driver.initialize()
    await driver.transport.quiesce()
    other = connect(Unplugged(), memory=driver.memory)
    other.transport.restore(driver.transport.save())
    assert other.needs_reset


async def test_driver_faults_do_not_flood_the_log(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    driver = connect(Echo())
    for _ in range(30):
        driver.initialize(go=False)
        driver.transport.queues[0].desc = 0x10
        driver.write_status(driver.read_status() | Status.DRIVER_OK)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 8


class Mistaken(Echo):
    """A mistake of the device's own."""

    async def serve(self, queues: Sequence[Queue]) -> None:
        raise ZeroDivisionError("a mistake")


async def test_nor_do_a_devices_own_mistakes(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    driver = connect(Mistaken())
    for _ in range(40):
        driver.initialize()
        await driver.wait(lambda: driver.needs_reset)
    assert 1 <= sum(record.levelname == "ERROR" for record in caplog.records) < 20


@pytest.mark.clause("2.5.2-a")
async def test_every_field_can_be_read_before_features_ok(connect: Connect) -> None:
    driver = connect(Echo())
    assert [driver.config_read(at, 1) for at in range(8)] == list(b"\x11\x22\x33\x44\x55\x66\x77\x88")
    driver.write_status(Status.ACKNOWLEDGE)
    driver.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    assert driver.config_read(4, 4) == 0x88776655


@pytest.mark.clause("4.1.3.2-a")
async def test_configuration_space(connect: Connect) -> None:
    """2.5: any width, halves of 64 bits on their own; beyond the structure reads give zero, writes are ignored."""
    device = Echo()
    driver = connect(device)
    driver.initialize()
    assert (driver.config_read(0, 4), driver.config_read(4, 4)) == (0x44332211, 0x88776655)
    assert driver.config_read(0, 1) == 0x11
    assert driver.config_read(2, 2) == 0x4433
    assert driver.config_read(4, 4) == 0x88776655
    assert driver.config_read(8, 4) == 0
    driver.config_write(1, 1, 0xAB)
    driver.config_write(6, 4, 0xFFFFFFFF)
    assert device.space.hex() == "11ab334455667788"
    driver.config_write(4, 4, 0x01020304)
    assert device.space.hex() == "11ab334404030201"


def generation(driver: Driver) -> int:
    if isinstance(driver, PciDriver):
        return driver.get("config_generation")
    assert isinstance(driver, MmioDriver)
    return driver.get(0x0FC)


@pytest.mark.parametrize("changes", [1, 2, 255, 256, 257, 512])
@pytest.mark.clause("4.1.4.3.1-e", "4.2.2.1-f")
async def test_a_driver_never_sees_halves_of_two_configurations(connect: Connect, changes: int) -> None:
    """2.5.1's loop: however often the configuration changes between two reads, another generation tells of it."""
    device = Echo()
    driver = connect(device)
    for start in range(2):
        before = generation(driver)
        assert generation(driver) == before, "without a change it stays"
        low = driver.config_read(0, 4)
        for number in range(1, changes + 1):
            device.space[:] = bytes([number & 0xFF, start + 1, number >> 8, 0]) * 2
            device.config_changed()
        high = driver.config_read(4, 4)
        assert low != high and generation(driver) != before
        before = generation(driver)
        assert driver.config_read(0, 4) == driver.config_read(4, 4) == high
        assert generation(driver) == before


async def test_a_configuration_change_is_notified(connect: Connect) -> None:
    """2.3: once the driver is there."""
    device = Echo()
    driver = connect(device)
    device.config_changed()
    assert not driver.interrupted.is_set()
    driver.initialize()
    device.config_changed()
    assert driver.interrupted.is_set()


async def test_only_sensible_queue_sizes(connect: Connect) -> None:
    driver = connect(Echo())
    driver.initialize(sizes=(4, 2))
    assert [queue.size for queue in driver.transport.queues] == [4, 2]
    assert await driver.request(0, [b"abc"], [4]) == b"cba"
    driver.write_status(0)
    for size in (0, 3, 32, 0xFFFF):
        driver.transport.queue_select = 0
        driver.transport.set_queue_size(size)
        assert driver.transport.queues[0].size == 16


async def save_and_restore(connect: Connect, driver: Any, device: Device) -> Any:
    """Quiesce, save, build a second machine from it over a copy of memory."""
    await driver.transport.quiesce()
    state = driver.transport.save()
    other = connect(device)
    other.memory.bytes[:] = driver.memory.bytes
    other.transport.restore(state)
    other.adopt(driver)
    other.transport.resume()
    return other


async def test_state_moves_to_another_machine(connect: Connect) -> None:
    driver = connect(Echo())
    driver.initialize()
    for _ in range(21):
        assert await driver.request(0, [b"abc"], [4]) == b"cba"
    await driver.transport.quiesce()
    room = driver.buffer(4)
    driver.submit(0, [driver.buffer(b"xyz")], [room])
    driver.notify(0)
    other = await save_and_restore(connect, driver, Echo())
    await other.used(0)
    assert other.bytes_at(room) == b"zyx\0", "the buffer made available before is served after"
    assert driver.bytes_at(room) == bytes(4)
    for _ in range(21):
        assert await other.request(0, [b"abc"], [4]) == b"cba"


async def test_state_of_another_device_is_refused(connect: Connect) -> None:
    driver = connect(Echo())
    state = driver.transport.save()
    wrongs: list[dict[str, Any]] = [{"device_id": 7}, {"features": 1 << 60}, {"queues": ()}]
    for wrong in wrongs:
        with pytest.raises(StateError):
            connect(Echo()).transport.restore(replace(state, **wrong))


@pytest.mark.clause("4.2.2.1-a", "4.2.2.1-b", "4.2.2.1-c", "4.2.2.1-d", "4.2.2.1-e")
async def test_mmio_registers() -> None:
    """4.2.2.1 and 4.2.3.4: magic, version, and the interrupt line follows InterruptStatus."""
    driver = MmioDriver(Echo())
    assert (driver.get(0), driver.get(4), driver.get(8)) == (0x74726976, 2, 42)
    assert driver.get(0x0B0) == driver.get(0x0B4) == 0xFFFFFFFF, "no shared memory"
    driver.set(0x030, 5)
    assert driver.get(0x034) == 0
    assert driver.mmio.read(0, 1) == 0, "4.2.2.2: registers are 32 bits wide"
    driver.initialize()
    assert not driver.level
    await driver.request(0, [b"x"], [4])
    assert driver.level and driver.get(0x060) == 1
    driver.transport.device.config_changed()
    assert driver.get(0x060) == 3
    driver.set(0x064, 1)
    assert driver.level
    driver.set(0x064, 2)
    assert not driver.level
    await driver.request(0, [b"x"], [4])
    assert driver.level
    driver.write_status(0)
    assert not driver.level and driver.get(0x060) == 0
    for index in range(2):
        driver.set(0x030, index)
        assert driver.get(0x044) == 0
    await driver.transport.device.aclose()


class Held(Device):
    """Answers when told to."""

    device_id = 42
    queue_sizes = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.taken = 0

    async def serve(self, queues: Sequence[Queue]) -> None:
        async for chain in queues[0]:
            self.taken += 1
            await self.go.wait()
            chain.write(b"late")
            queues[0].complete(chain)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.clause("4.2.2-a", "4.2.2.1-g")
async def test_a_driver_stops_one_queue(packed: bool) -> None:
    """4.2.2.2: it writes 0 to QueueReady and reads it back; 0 says that the queue is not touched any more."""
    device = Held()
    driver = MmioDriver(device, packed=packed)
    driver.initialize()
    rooms = [driver.buffer(4) for _ in range(2)]
    for room in rooms:
        driver.submit(0, [], [room])
    await driver.wait(lambda: device.taken)
    driver.set(0x030, 0)
    driver.set(0x044, 0)
    assert driver.get(0x044) == 1, "one chain is still with the device"
    device.go.set()
    await driver.used(0)
    assert driver.bytes_at(rooms[0]) == b"late"
    assert driver.get(0x044) == 0
    driver.interrupted.clear()
    before = bytes(driver.memory.bytes)
    driver.notify(0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert bytes(driver.memory.bytes) == before and not driver.interrupted.is_set() and device.taken == 1
    driver.set(0x030, 1)
    assert driver.get(0x044) == 1, "the other queue goes on"
    await driver.transport.quiesce()
    state = driver.transport.save()
    assert [queue.enabled for queue in state.queues] == [False, True]
    driver.transport.resume()
    driver.initialize()
    driver.submit(0, [], [driver.buffer(4)])
    await driver.used(0)
    await device.aclose()


@pytest.mark.clause("2.2.2-a")
async def test_features_that_need_others_come_with_them(connect: Connect) -> None:
    """5.1.3.1: the network device offers none without the one it requires, whatever its backend says."""
    for offloads in (
        NetFeature.CSUM | NetFeature.HOST_TSO4 | NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4,
        NetFeature(0),
    ):
        backend = MemoryNet()
        backend.offloads = int(offloads)
        offered = connect(NetDevice(backend, b"\x52\x54\0\0\0\1")).read_features()
        for feature, needed in NetDevice.feature_requirements.items():
            assert not offered & feature or offered & needed
    for offloads in (NetFeature.HOST_TSO4, NetFeature.GUEST_TSO6):
        backend.offloads = int(offloads)
        with pytest.raises(ConfigError):
            connect(NetDevice(backend, b"\x52\x54\0\0\0\1"))


@pytest.mark.clause("4.1.4.3.1-d", "4.1.4.3.1-g", "2.7.8.2-a")
async def test_what_the_driver_wrote_reads_back_and_ends_with_reset() -> None:
    driver = PciDriver(Echo())
    driver.initialize()
    driver.set("driver_feature_select", 0)
    assert driver.get("driver_feature") == driver.features & 0xFFFFFFFF
    assert await driver.request(0, [b"abc"], [8]) == b"cba", "the length was there when the index moved"
    driver.write_status(0)
    driver.set("queue_select", 0)
    assert driver.get("queue_enable") == 0 and driver.get("driver_feature") == 0
    await driver.transport.device.aclose()


class Failing(Echo):
    """Fails once, after `before`."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[], object] | None = None

    async def serve(self, queues: Sequence[Queue]) -> None:
        async for chain in queues[0]:
            if self.before is not None:
                before, self.before = self.before, None
                before()
                raise GuestError("too late")
            chain.write(chain.read())
            queues[0].complete(chain)


async def test_a_fault_is_not_carried_over_a_reset(connect: Connect) -> None:
    """A coroutine fails when the driver has reset the device and set it up again: that is not the new one's fault."""
    device = Failing()
    driver = connect(device)
    device.before = driver.initialize
    driver.initialize()
    driver.submit(0, [driver.buffer(b"abc")], [driver.buffer(3)])
    await driver.wait(lambda: device.before is None)
    assert await driver.request(0, [b"abc"], [3]) == b"abc"
    assert not driver.needs_reset
