"""virtio-pci (4.1): capabilities, common configuration, notification, ISR, MSI-X vectors, the access window."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from tests.support.virtio import PciDriver
from virtio.backends.block import MemoryBlock
from virtio.backends.char import MemoryChar
from virtio.backends.net import MemoryNet
from virtio.backends.vsock import MemoryVsock
from virtio.constants import Feature
from virtio.devices.blk import BlockDevice
from virtio.devices.console import ConsoleDevice, Port
from virtio.devices.net import NetDevice
from virtio.devices.rng import EntropyDevice
from virtio.devices.vsock import VsockDevice
from virtio.fake import FakeMemory
from virtio.pci import CAP_COMMON, CAP_DEVICE, CAP_ISR, CAP_NOTIFY, CAP_PCI, NO_VECTOR, PciTransport


@pytest.fixture
async def driver() -> AsyncIterator[PciDriver]:
    made = PciDriver(EntropyDevice(lambda length: b"r" * length))
    yield made
    made.pci.reset()
    await made.transport.device.aclose()


@pytest.mark.clause("4.1.2.1-a", "4.1.2.1-b", "4.1.4.3.1-b", "4.1.4.4.1-a", "4.1.4.5.1-a", "4.1.4.6-a", "4.1.4.9.1-a")
async def test_identity_and_capabilities(driver: PciDriver) -> None:
    """4.1.2.1 and 4.1.4."""
    pci = driver.pci
    assert (pci.vendor_id, pci.device_id, pci.revision >= 1, pci.subsystem_id >= 0x40) == (0x1AF4, 0x1044, True, True)
    kinds = [capability[3] for capability in pci.capabilities]
    assert kinds == [CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI]


DEVICES = {
    "entropy": (lambda: EntropyDevice(bytes), 1),
    "block": (lambda: BlockDevice(MemoryBlock(512), queues=16), 16),
    "net": (lambda: NetDevice(MemoryNet(), b"\x52\x54\0\0\0\1"), 3),
    "console": (lambda: ConsoleDevice([Port(MemoryChar()), *(Port(MemoryChar(), f"p{i}") for i in range(30))]), 64),
    "vsock": (lambda: VsockDevice(MemoryVsock()), 3),
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.clause(
    "4.1.4.2-a", "4.1.4.3.1-a", "4.1.4.4.1-b", "4.1.4.4.1-c", "4.1.4.4.1-d", "4.1.4.4.1-e", "4.1.4.6.1-a",
    "4.1.5.1.2.1-a",
)
async def test_structures_lie_where_a_driver_needs_them(name: str) -> None:
    """4.1.4.2 to 4.1.4.6.1: lengths, alignment, every queue's notification address within its structure."""
    make, queues = DEVICES[name]
    driver = PciDriver(make())
    pci = driver.pci
    for body, capability in zip(pci.capabilities, driver.caps.values(), strict=True):
        assert capability.cap_len == len(body) == {CAP_NOTIFY: 20, CAP_PCI: 20}.get(capability.cfg_type, 16)
        if capability.cfg_type != CAP_PCI:
            bar = next(bar for bar in pci.bars if bar.index == capability.bar)
            assert capability.length and capability.offset + capability.length <= bar.size
            assert capability.offset % 4 == 0
    assert driver.multiplier in (4**power for power in range(8))
    notify = driver.caps[CAP_NOTIFY]
    assert driver.get("num_queues") == queues and notify.length >= 2
    for index in range(queues):
        driver.set("queue_select", index)
        assert driver.get("queue_notify_off") * driver.multiplier + 2 <= notify.length
    assert driver.caps[CAP_DEVICE].length >= len(pci.device.config())
    assert pci.msix.vectors == queues + 1
    await pci.device.aclose()


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


@pytest.mark.clause("4.1.4.5.1-b", "4.1.4.5.1-c", "4.1.4.5.1-d", "4.1.4.5.1-e")
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
    driver.host.msix_enabled = True
    driver.transport.device.config_changed()
    assert not driver.host.intx
    driver.host.msix_enabled = False
    assert driver.host.status, "4.1.4.5.1: the OR of all bits, also of those set while MSI-X was enabled"
    assert driver.pci.bar_read(isr.bar, isr.offset, 1) == 2
    assert not driver.host.status
    await driver.request(0, [], [2])
    driver.write_status(0)
    assert not driver.host.status and driver.pci.bar_read(isr.bar, isr.offset, 1) == 0


@pytest.mark.clause("4.1.1-a", "4.1.4.5.1-d", "4.1.5.1.2.1-a")
async def test_on_a_real_bus() -> None:
    """The function behind a PCI bus, as a guest finds it: identity, BARs, the capabilities, the status bit, MSI-X."""
    from tests.support.pc import Pc
    from vmm.machine import layout
    from vmm.pci.bus import PciBus

    machine = Pc()
    bus = PciBus(machine)
    memory = FakeMemory(1 << 20, 0)
    function = PciTransport(EntropyDevice(lambda length: b"r" * length), memory)
    bus.add(cast(Any, function))
    bus.attach()

    def config(offset: int, size: int) -> int:
        return machine.read(layout.ECAM.start | 1 << 15 | offset, size)

    def put(offset: int, size: int, value: int) -> None:
        machine.write(layout.ECAM.start | 1 << 15 | offset, value, size)

    assert (config(0, 2), config(2, 2), config(0x2E, 2) >= 0x40) == (0x1AF4, 0x1044, True)
    put(4, 2, 6)
    base = (config(0x20, 4) & ~15) | config(0x24, 4) << 32
    assert base == function._host.bar_address(4)  # type: ignore[union-attr]
    found, at = {}, config(0x34, 1)
    while at:
        kind = config(at, 1)
        found[kind if kind != 9 else (9, config(at + 3, 1))] = at
        assert at % 4 == 0
        at = config(at + 1, 1)
    assert set(found) == {0x11, *((9, number) for number in range(1, 6))}
    assert config(found[0x11] + 2, 2) & 0x7FF == 1, "Table Size is the number of vectors less one"
    for value in (1, 3, 11, 15):
        machine.write(base + 20, value, 1)
        if value == 3:
            for word in range(2):
                machine.write(base + 8, word, 4)
                machine.write(base, word, 4)
                machine.write(base + 12, machine.read(base + 4, 4), 4)
    assert machine.read(base + 20, 1) == 15
    function.device.config_changed()
    gsi = layout.intx_gsi(1, 0)
    assert config(6, 2) & 8 and machine.levels[gsi]
    assert machine.read(base + 0x1000, 1) == 2
    assert not config(6, 2) & 8 and not machine.levels[gsi]
    put(found[0x11] + 2, 2, 0x8000)
    function.device.config_changed()
    assert not machine.levels[gsi], "NO_VECTOR, and the pin is quiet with MSI-X"
    put(found[0x11] + 2, 2, 0)
    assert config(6, 2) & 8 and machine.levels[gsi], "the OR of all bits in ISR status"
    window = found[9, 5]
    put(window + 4, 1, 4)
    put(window + 8, 4, 20)
    put(window + 12, 4, 1)
    assert config(window + 16, 1) == 15
    bus.reset()
    await function.device.aclose()


@pytest.mark.clause(
    "4.1.5.1.2.1-b", "4.1.5.1.2.1-c", "4.1.5.1.2.1-d", "4.1.5.1.2.1-e", "4.1.5.1.2.1-f", "4.1.5.3.1-a", "4.1.5.4.1-a"
)
async def test_vectors(driver: PciDriver) -> None:
    """4.1.5.1.2.1: NO_VECTOR until mapped, if a mapping fails, and after a reset."""
    for name in ("config_msix_vector", "queue_msix_vector"):
        assert driver.get(name) == NO_VECTOR
    driver.initialize()
    for vectors in ((0, 1), (1, 0), (0, 0), (1, 1)):
        driver.set("config_msix_vector", vectors[0])
        driver.set("queue_select", 0)
        driver.set("queue_msix_vector", vectors[1])
        driver.host.messages.clear()
        driver.transport.device.config_changed()
        await driver.request(0, [], [4])
        assert driver.host.messages == list(vectors)
    driver.host.messages.clear()
    for name in ("config_msix_vector", "queue_msix_vector"):
        driver.set("queue_select", 0)
        for value, result in ((1, 1), (2, NO_VECTOR), (0, 0), (NO_VECTOR, NO_VECTOR)):
            driver.set(name, value)
            assert driver.get(name) == result
    await driver.request(0, [], [4])
    driver.transport.device.config_changed()
    assert driver.host.messages == [] and not driver.host.intx
    driver.set("queue_msix_vector", 1)
    driver.set("config_msix_vector", 0)
    driver.write_status(0)
    driver.set("queue_select", 0)
    assert driver.get("queue_msix_vector") == driver.get("config_msix_vector") == NO_VECTOR


@pytest.mark.clause("4.1.4.3.1-c", "4.1.4.3.1-h")
async def test_common_configuration(driver: PciDriver) -> None:
    """4.1.4.3.1"""
    assert driver.get("num_queues") == 1
    driver.set("queue_select", 7)
    assert driver.get("queue_size") == 0 and driver.get("queue_enable") == 0
    for name in ("queue_size", "queue_msix_vector", "queue_enable", "queue_desc"):
        driver.set(name, 1)
    driver.set("device_feature_select", 1)
    assert driver.get("device_feature") & Feature.VERSION_1 >> 32
    for beyond in (2, 3, 4, 9, 0xFFFFFFFF):
        driver.set("device_feature_select", beyond)
        assert driver.get("device_feature") == 0
    driver.set("device_feature_select", 0)
    assert driver.get("device_feature") == driver.pci.features & 0xFFFFFFFF
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


@pytest.mark.clause("4.1.4.9.1-b", "4.1.4.9.1-c", "4.1.4.9-a")
async def test_the_access_window(driver: PciDriver) -> None:
    """4.1.4.9.1: accesses to pci_cfg_data are accesses to the BAR."""
    assert driver.pci.config_read(0x60, 4) is None
    driver.pci.capability_placed(4, 0x50)
    access = window(driver, 0x50)
    access(4, 20, 1, 1)
    assert driver.read_status() == 1
    assert access(4, 20, 1) == 1
    assert access(4, 18, 2) == 1, "num_queues"
    assert driver.pci.config_read(0x54, 1) == 4 and driver.pci.config_read(0x60, 1) == 1, "what the read brought"
    driver.pci.config_write(0x54, 4, 0xFFFFFF04)
    assert driver.pci.config_read(0x54, 4) == 4, "id and padding are not the driver's"
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
