"""virtio-pci (4.1): capabilities, common configuration, notification, ISR, MSI-X vectors, the access window."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.support.virtio import PciDriver
from virtio.constants import Feature
from virtio.devices.rng import EntropyDevice
from virtio.pci import CAP_COMMON, CAP_DEVICE, CAP_ISR, CAP_NOTIFY, CAP_PCI, NO_VECTOR


@pytest.fixture
async def driver() -> AsyncIterator[PciDriver]:
    made = PciDriver(EntropyDevice(lambda length: b"r" * length))
    yield made
    made.pci.reset()
    await made.transport.device.aclose()


@pytest.mark.clause("4.1.2.1-a", "4.1.4.3.1-a", "4.1.4.4.1-a", "4.1.4.5.1-a", "4.1.4.6.1-a", "4.1.4.9.1-a")
async def test_identity_and_capabilities(driver: PciDriver) -> None:
    """4.1.2.1 and 4.1.4."""
    pci = driver.pci
    assert (pci.vendor_id, pci.device_id, pci.revision >= 1, pci.subsystem_id >= 0x40) == (0x1AF4, 0x1044, True, True)
    kinds = [capability[3] for capability in pci.capabilities]
    assert kinds == [CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI]
    for capability in driver.caps.values():
        bar = next((bar for bar in pci.bars if bar.index == capability.bar), None)
        if capability.cfg_type != CAP_PCI:
            assert bar is not None and capability.offset + capability.length <= bar.size
    assert driver.caps[CAP_COMMON].offset % 4 == 0 and driver.caps[CAP_NOTIFY].offset % 2 == 0
    assert pci.msix.vectors == 2


async def test_requests_by_ioeventfd_and_msix(driver: PciDriver) -> None:
    driver.initialize()
    room = driver.buffer(4)
    driver.queues[0].add([], [room])
    (callback,) = driver.host.notifiers.values()
    assert list(driver.host.notifiers) == [(0xC0010000 + driver.notify_address(0), 2)]
    callback()
    await driver.used(0)
    assert driver.bytes_at(room) == b"rrrr"
    assert driver.host.messages == [1]
    driver.transport.device.config_changed()
    assert driver.host.messages == [1, 0]
    assert not driver.host.intx


async def test_notifiers_follow_the_bar(driver: PciDriver) -> None:
    driver.host.addresses[4] = None
    driver.pci.bars_changed()
    assert not driver.host.notifiers
    driver.host.addresses[4] = 0x8000000000
    driver.pci.bars_changed()
    assert list(driver.host.notifiers) == [(0x8000000000 + driver.notify_address(0), 2)]


@pytest.mark.clause("4.1.4.5.1-b", "4.1.4.5.1-c", "4.1.4.5.1-e")
async def test_isr_without_msix(driver: PciDriver) -> None:
    """4.1.5.3.1, 4.1.4.5.1: the ISR status is set first, and reading it resets it and the line."""
    driver.host.msix_enabled = False
    driver.initialize()
    assert await driver.request(0, [], [2]) == b"rr"
    isr = driver.caps[CAP_ISR]
    assert driver.host.intx
    driver.transport.device.config_changed()
    assert driver.pci.bar_read(isr.bar, isr.offset, 1) == 3
    assert not driver.host.intx
    assert driver.pci.bar_read(isr.bar, isr.offset, 1) == 0


@pytest.mark.clause("4.1.5.1.2.1-a", "4.1.5.1.2.1-b", "4.1.5.1.2.1-c", "4.1.5.1.2.1-d")
async def test_vectors(driver: PciDriver) -> None:
    """4.1.5.1.2.1: NO_VECTOR until mapped, if a mapping fails, and after a reset."""
    driver.initialize()
    for name in ("config_msix_vector", "queue_msix_vector"):
        driver.set("queue_select", 0)
        for value, result in ((1, 1), (2, NO_VECTOR), (0, 0), (NO_VECTOR, NO_VECTOR)):
            driver.set(name, value)
            assert driver.get(name) == result
    await driver.request(0, [], [4])
    assert driver.host.messages == []
    driver.set("queue_msix_vector", 1)
    driver.write_status(0)
    driver.set("queue_select", 0)
    assert driver.get("queue_msix_vector") == NO_VECTOR


@pytest.mark.clause("4.1.4.3.1-b", "4.1.4.3.1-g")
async def test_common_configuration(driver: PciDriver) -> None:
    """4.1.4.3.1"""
    assert driver.get("num_queues") == 1
    driver.set("queue_select", 7)
    assert driver.get("queue_size") == 0 and driver.get("queue_enable") == 0
    for name in ("queue_size", "queue_msix_vector", "queue_enable", "queue_desc"):
        driver.set(name, 1)
    driver.set("device_feature_select", 1)
    assert driver.get("device_feature") & Feature.VERSION_1 >> 32
    driver.set("device_feature_select", 9)
    assert driver.get("device_feature") == 0
    driver.set("queue_select", 0)
    driver.set("queue_desc", 0x1234567890)
    assert driver.get("queue_desc") == 0x1234567890
    driver.pci.bar_write(4, 0x20, 8, 0xABCDEF)
    assert driver.pci.bar_read(4, 0x20, 4) == 0xABCDEF
    assert driver.pci.bar_read(4, 0x3C, 4) == 0, "beyond the structure"
    driver.pci.bar_write(4, 0x15, 2, 0xFFFF)
    assert driver.read_status() == 0, "an access across two fields does nothing"


def window(driver: PciDriver, at: int) -> Callable[..., Any]:
    def access(bar: int, offset: int, length: int, value: int | None = None) -> int:
        driver.pci.config_write(at + 4, 1, bar)
        driver.pci.config_write(at + 8, 4, offset)
        driver.pci.config_write(at + 12, 4, length)
        if value is None:
            got = driver.pci.config_read(at + 16, 4)
            assert got is not None
            return got & (1 << 8 * length) - 1
        assert driver.pci.config_write(at + 16, length, value)
        return 0

    return access


@pytest.mark.clause("4.1.4.9.1-b")
async def test_the_access_window(driver: PciDriver) -> None:
    """4.1.4.9.1: accesses to pci_cfg_data are accesses to the BAR."""
    assert driver.pci.config_read(0x60, 4) is None
    driver.pci.capability_placed(4, 0x50)
    access = window(driver, 0x50)
    access(4, 20, 1, 1)
    assert driver.read_status() == 1
    assert access(4, 20, 1) == 1
    assert access(4, 18, 2) == 1, "num_queues"
    assert driver.pci.config_read(0x50, 4) is None, "the head is plain configuration space"
    for bar, offset, length in ((4, 20, 3), (4, 21, 4), (1, 0, 4), (9, 0, 4), (4, 2**32 - 4, 4)):
        access(bar, offset, length)
        access(bar, offset, length, 0)
    assert driver.read_status() == 1


async def test_state_of_the_function(driver: PciDriver) -> None:
    driver.initialize()
    await driver.transport.quiesce()
    state = driver.pci.save()
    other = PciDriver(EntropyDevice(lambda length: b"s" * length))
    other.memory.bytes[:] = driver.memory.bytes
    other.pci.restore(state)
    other.adopt(driver)
    other.pci.resume()
    assert await other.request(0, [], [3]) == b"sss"
    assert other.host.messages == [1]
    await other.transport.device.aclose()
