"""What both transports do with status, features, queues and configuration space (2.1 to 2.5, 3.1)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.virtio import MmioDriver, PciDriver
from virtio.constants import Feature, Status
from virtio.device import Device
from virtio.driver import F_NEXT
from virtio.errors import HostError, StateError
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


@pytest.mark.clause("2.2.2-b")
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


@pytest.mark.clause("2.1.2-a", "4.2.2.1-e")
async def test_nothing_before_driver_ok(connect: Connect) -> None:
    """2.1.2: the device MUST NOT consume buffers before DRIVER_OK."""
    driver = connect(Echo())
    driver.initialize(go=False)
    room = driver.buffer(4)
    driver.queues[0].add([driver.buffer(b"x")], [room])
    driver.notify(0)
    assert not driver.transport.device.is_active
    driver.write_status(driver.read_status() | Status.DRIVER_OK)
    driver.notify(0)
    await driver.used(0)
    assert driver.bytes_at(room) == b"x\0\0\0"


async def test_notifications_that_make_no_sense_are_ignored(connect: Connect) -> None:
    driver = connect(Echo())
    driver.notify(0)
    driver.initialize()
    driver.notify(1)
    assert await driver.request(0, [b"ok"], [4]) == b"ko"


@pytest.mark.clause("2.4.1-a", "2.4.1-b", "4.1.4.3.1-e")
async def test_reset_abandons_and_starts_over(connect: Connect) -> None:
    """2.4.1: after reset no notifications and no access to the queues."""
    driver = connect(Echo())
    driver.initialize()
    room = driver.buffer(4)
    driver.submit(0, [driver.buffer(b"x")], [room])
    driver.write_status(0)
    assert driver.read_status() == 0
    await asyncio.sleep(0)
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


async def test_driver_faults_do_not_flood_the_log(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    driver = connect(Echo())
    for _ in range(30):
        driver.initialize(go=False)
        driver.transport.queues[0].desc = 0x10
        driver.write_status(driver.read_status() | Status.DRIVER_OK)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 8


@pytest.mark.clause("2.5.3-a")
async def test_configuration_space(connect: Connect) -> None:
    """2.5: any width; beyond the structure reads give zero and writes are ignored."""
    device = Echo()
    driver = connect(device)
    driver.initialize()
    assert driver.config_read(0, 1) == 0x11
    assert driver.config_read(2, 2) == 0x4433
    assert driver.config_read(4, 4) == 0x88776655
    assert driver.config_read(8, 4) == 0
    driver.config_write(1, 1, 0xAB)
    driver.config_write(6, 4, 0xFFFFFFFF)
    assert device.space.hex() == "11ab334455667788"


@pytest.mark.clause("4.1.4.3.1-d", "4.2.2.1-d")
async def test_a_configuration_change_is_seen_and_notified(connect: Connect) -> None:
    """2.5: a new generation, and a configuration change notification once the driver is there."""
    device = Echo()
    driver = connect(device)
    before = driver.transport.config_generation
    device.config_changed()
    assert driver.transport.config_generation != before
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
    wrongs: list[dict[str, Any]] = [{"version": 2}, {"device_id": 7}, {"features": 1 << 60}, {"queues": []}]
    for wrong in wrongs:
        with pytest.raises(StateError):
            connect(Echo()).transport.restore(state | wrong)


@pytest.mark.clause("4.2.2.1-a", "4.2.2.1-b", "4.2.2.1-c")
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
    await driver.transport.device.aclose()


@pytest.mark.clause("2.2.2-a")
async def test_features_that_need_others_come_with_them(connect: Connect) -> None:
    """5.1.3.1, 5.2.3.1: no device offers a feature without the one it requires."""
    from virtio.backends.block import MemoryBlock
    from virtio.backends.net import MemoryNet
    from virtio.devices.blk import BlockDevice
    from virtio.devices.net import Feature as Net
    from virtio.devices.net import NetDevice

    backend = MemoryNet()
    backend.offloads = int(Net.CSUM | Net.HOST_TSO4 | Net.GUEST_CSUM | Net.GUEST_TSO4)
    requires = {
        Net.HOST_TSO4: Net.CSUM,
        Net.HOST_TSO6: Net.CSUM,
        Net.GUEST_TSO4: Net.GUEST_CSUM,
        Net.GUEST_TSO6: Net.GUEST_CSUM,
        Net.MQ: Net.CTRL_VQ,
        Net.CTRL_MAC_ADDR: Net.CTRL_VQ,
    }
    offered = connect(NetDevice(backend, b"\x52\x54\0\0\0\1")).read_features()
    for feature, needed in requires.items():
        assert not offered & feature or offered & needed
    assert connect(BlockDevice(MemoryBlock(512))).read_features()


@pytest.mark.clause("4.1.4.3.1-c", "4.1.4.3.1-f", "2.7.8.2-a")
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
