"""virtio-mmio: a queue that the driver stopped, or did not use so far, is set up after DRIVER_OK (4.2.2, 4.2.3.2)."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests.support.virtio import MmioDriver
from virtio.backends.net import MemoryNet, NetBackend
from virtio.backends.sockets import DatagramNet
from virtio.devices.net import NetDevice
from virtio.driver import driver_queue

from .test_transport import Held


def stop(driver: MmioDriver, index: int) -> int:
    driver.set(0x030, index)
    driver.set(0x044, 0)
    return driver.get(0x044)


@pytest.mark.clause("4.2.2-a")
@pytest.mark.parametrize("packed", [False, True])
async def test_a_queue_that_was_stopped_is_used_again(packed: bool) -> None:
    """4.2.2: QueueReady reads back what was written, and 1 says that the device can execute requests from the queue.
    With new addresses and another size it is a new ring."""
    device = Held()
    driver = MmioDriver(device, packed=packed)
    driver.initialize()
    device.go.set()
    for size in (4, 8, 2):
        assert stop(driver, 0) == 0
        driver.queues[0] = driver_queue(driver.allocator, size, driver.features)
        driver.configure_queue(0, driver.queues[0])
        for _ in range(3 * size):
            assert await driver.request(0, [], [4]) == b"late"
    driver.set(0x044, 0)
    driver.set(0x044, 1)
    assert driver.get(0x044) == 1, "the last value written"
    await driver.transport.quiesce()
    assert [queue.enabled for queue in driver.transport.save().queues] == [True, True]
    driver.transport.resume()
    await device.aclose()


async def test_a_queue_is_not_begun_anew_while_its_chains_are_out() -> None:
    """4.2.2.2: the driver "MUST read the value back to ensure synchronization"; one that does not wait gets no new
    ring."""
    device = Held()
    driver = MmioDriver(device)
    driver.initialize()
    driver.submit(0, [], [driver.buffer(4)])
    await driver.wait(lambda: device.taken)
    assert stop(driver, 0) == 1
    driver.set(0x044, 1)
    driver.set(0x038, 4)
    device.go.set()
    await driver.used(0)
    assert driver.get(0x044) == 0
    await device.aclose()


@pytest.mark.parametrize("area", ["desc", "driver", "device"])
async def test_a_queue_that_is_set_up_again_where_it_cannot_be(area: str) -> None:
    driver = MmioDriver(Held())
    driver.initialize()
    assert stop(driver, 0) == 0
    queue = driver_queue(driver.allocator, 8, driver.features)
    setattr(queue, area, 1)
    with contextlib.suppress(AssertionError):
        driver.configure_queue(0, queue)
    assert driver.get(0x044) == 0 and driver.needs_reset


@pytest.mark.parametrize("kind", ["memory", "socket"])
async def test_every_queue_of_a_card_begins_late(kind: str) -> None:
    """A driver that sets its queues up after DRIVER_OK, or again: frames go both ways."""
    backend: NetBackend
    far = None
    if kind == "memory":
        backend, peer = MemoryNet.pair()
        sent = backend.sent
    else:
        far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        backend = DatagramNet(near)
    driver = MmioDriver(NetDevice(backend, b"\x52\x54\0\0\0\1"))
    driver.initialize(0)
    frame = b"frame".ljust(60)
    for _ in range(3):
        for index in range(len(driver.queues)):
            assert stop(driver, index) == 0
        for index in range(2):
            driver.queues[index] = driver_queue(driver.allocator, 8, driver.features)
            driver.configure_queue(index, driver.queues[index])
        driver.submit(1, [driver.buffer(bytes(12) + frame)])
        await driver.used(1)
        if far is None:
            await driver.wait(lambda: sent)
            assert sent.pop() == frame
            await peer.send(frame)
        else:
            assert far.recv(100) == frame
            far.send(frame)
        assert (await driver.request(0, [], [200]))[12:] == frame
    await driver.transport.device.aclose()
    if far is not None:
        far.close()
