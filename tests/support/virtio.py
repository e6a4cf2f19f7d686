"""The driver's side of a virtio device over its transport's registers: initialization as 3.1.1 tells it, and
requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tests.support.patience import PATIENCE
from virtio import mmio
from virtio.constants import Feature, Status
from virtio.device import Device
from virtio.driver import Allocator, AnyDriverQueue, Buffer, Used, driver_queue
from virtio.fake import FakeMemory
from virtio.layouts import PciCapability, PciCommonConfig, fields
from virtio.mmio import MmioTransport
from virtio.pci import PciTransport
from virtio.transport import Transport

MEMORY = 8 << 20
BASE = 0x10000
COMMON = fields(PciCommonConfig)


class Driver:
    """A driver of one device. Subclasses know the registers."""

    transport: Transport

    def __init__(self, memory: FakeMemory | None = None) -> None:
        self.memory = memory or FakeMemory(MEMORY, BASE)
        self.allocator = Allocator(self.memory, self.memory.base, self.memory.base + len(self.memory.bytes))
        self.queues: list[AnyDriverQueue] = []
        self.interrupted = asyncio.Event()
        self.features = 0

    # what the transport's kind decides

    def read_status(self) -> int:
        raise NotImplementedError

    def write_status(self, value: int) -> None:
        raise NotImplementedError

    def read_features(self) -> int:
        raise NotImplementedError

    def write_features(self, value: int) -> None:
        raise NotImplementedError

    def queue_size_max(self, index: int) -> int:
        raise NotImplementedError

    def configure_queue(self, index: int, queue: AnyDriverQueue) -> None:
        raise NotImplementedError

    def notify(self, index: int) -> None:
        raise NotImplementedError

    def config_read(self, offset: int, size: int) -> int:
        raise NotImplementedError

    def config_write(self, offset: int, size: int, value: int) -> None:
        raise NotImplementedError

    # 3.1.1 Driver Requirements: Device Initialization

    def initialize(
        self,
        wanted: int = -1,
        *,
        sizes: Sequence[int] | None = None,
        go: bool = True,
        spoil: Callable[[AnyDriverQueue], object] | None = None,
    ) -> None:
        """Reset, negotiate `wanted` of what is offered (default: all), lay out every queue, set DRIVER_OK. `spoil` may
        change a queue before the device hears of it."""
        self.write_status(0)
        assert self.read_status() == 0
        self.write_status(Status.ACKNOWLEDGE)
        self.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self.features = self.read_features() & (wanted | Feature.VERSION_1)
        for feature, needed in self.transport.device.feature_requirements.items():
            # 2.2.1: "and MUST NOT accept a feature which requires another feature which was not accepted."
            if needed & ~self.features:
                self.features &= ~int(feature)
        self.write_features(self.features)
        self.write_status(self.read_status() | Status.FEATURES_OK)
        assert self.read_status() & Status.FEATURES_OK
        self.allocator.free_all()
        self.queues = []
        index = 0
        while size := self.queue_size_max(index):
            if sizes is not None:
                size = sizes[index]
            queue = driver_queue(self.allocator, size, self.features)
            if spoil is not None:
                spoil(queue)
            self.configure_queue(index, queue)
            self.queues.append(queue)
            index += 1
        if go:
            self.write_status(self.read_status() | Status.DRIVER_OK)

    # Requests

    def buffer(self, data: bytes | int) -> Buffer:
        """A buffer with these bytes, or of that many zeroes."""
        content = bytes(data)
        return self.allocator.put(content), len(content)

    def bytes_at(self, buffer: Buffer) -> bytes:
        return bytes(self.memory.view(*buffer))

    def submit(self, index: int, readable: Sequence[Buffer] = (), writable: Sequence[Buffer] = (), **kw: Any) -> int:
        head = self.queues[index].add(readable, writable, **kw)
        if self.queues[index].needs_notification():
            self.notify(index)
        return head

    async def wait(self, condition: Callable[[], Any], timeout: float = 10) -> Any:
        """Wait until `condition()` is true; it is looked at after every interrupt and every turn of the
        loop."""
        async with asyncio.timeout(timeout * PATIENCE):
            while not (result := condition()):
                self.interrupted.clear()
                waiter = asyncio.ensure_future(self.interrupted.wait())
                await asyncio.wait([waiter], timeout=0.002)
                waiter.cancel()
        return result

    async def used(self, index: int, count: int = 1, timeout: float = 10) -> list[Used]:
        """Wait for `count` used buffers."""
        found: list[Used] = []

        def collect() -> bool:
            found.extend(self.queues[index].used())
            return len(found) >= count

        await self.wait(collect, timeout)
        return found

    async def request(
        self, index: int, readable: Sequence[bytes] = (), writable: Sequence[int] = (), **kw: Any
    ) -> bytes:
        """Submit one buffer and wait for it; the bytes the device says it wrote."""
        spaces = [self.buffer(length) for length in writable]
        self.submit(index, [self.buffer(data) for data in readable], spaces, **kw)
        (used,) = await self.used(index)
        return b"".join(self.bytes_at(space) for space in spaces)[: used.length]

    def adopt(self, other: Driver) -> None:
        """Go on as the same driver in a machine whose memory is a copy of `other`'s."""
        self.features = other.features
        self.allocator = other.allocator.moved(self.memory)
        self.queues = [queue.moved(self.allocator) for queue in other.queues]

    @property
    def needs_reset(self) -> bool:
        return bool(self.read_status() & Status.DEVICE_NEEDS_RESET)


class MmioDriver(Driver):
    """Over virtio-mmio registers."""

    def __init__(self, device: Device, memory: FakeMemory | None = None, **options: Any) -> None:
        super().__init__(memory)
        self.level = False
        self.transport = self.mmio = MmioTransport(device, self.memory, self._irq, **options)

    def _irq(self, level: bool) -> None:
        self.level = level
        if level:
            self.interrupted.set()

    def get(self, offset: int) -> int:
        return self.mmio.read(offset, 4)

    def set(self, offset: int, value: int) -> None:
        self.mmio.write(offset, 4, value)

    def acknowledge(self) -> int:
        """Read InterruptStatus and write it to InterruptACK (4.2.3.4)."""
        status = self.get(0x060)
        self.set(0x064, status)
        return status

    def read_status(self) -> int:
        return self.get(0x070)

    def write_status(self, value: int) -> None:
        self.set(0x070, value)

    def read_features(self) -> int:
        value = 0
        for word in range(2):
            self.set(0x014, word)
            value |= self.get(0x010) << 32 * word
        return value

    def write_features(self, value: int) -> None:
        for word in range(2):
            self.set(0x024, word)
            self.set(0x020, value >> 32 * word & 0xFFFFFFFF)

    def queue_size_max(self, index: int) -> int:
        self.set(0x030, index)
        return self.get(0x034)

    def configure_queue(self, index: int, queue: AnyDriverQueue) -> None:
        self.set(0x030, index)
        assert self.get(0x044) == 0
        self.set(0x038, queue.size)
        for offset, address in ((0x080, queue.desc), (0x090, queue.driver), (0x0A0, queue.device)):
            self.set(offset, address & 0xFFFFFFFF)
            self.set(offset + 4, address >> 32)
        self.set(0x044, 1)
        assert self.get(0x044) == 1

    def notify(self, index: int) -> None:
        self.set(mmio.QUEUE_NOTIFY, index)

    def config_read(self, offset: int, size: int) -> int:
        return self.mmio.read(mmio.CONFIG + offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.mmio.write(mmio.CONFIG + offset, size, value)


class FakePciHost:
    """A PCI bus with one slot: BARs at fixed addresses, MSI-X messages counted by vector."""

    def __init__(self, woken: asyncio.Event) -> None:
        self.msix_enabled = True
        self.messages: list[int] = []
        self.status = False
        """The Interrupt Status bit; the pin follows it unless MSI-X is enabled."""
        self.addresses: dict[int, int | None] = {1: 0xC0000000, 4: 0xC0010000}
        self.notifiers: dict[tuple[int, int], Callable[[], None]] = {}
        self._woken = woken

    def signal_msix(self, vector: int) -> None:
        self.messages.append(vector)
        self._woken.set()

    def msix_message(self, vector: int) -> tuple[int, int] | None:
        return None

    @property
    def intx(self) -> bool:
        return self.status and not self.msix_enabled

    def set_intx(self, level: bool) -> None:
        self.status = level
        if self.intx:
            self._woken.set()

    def bar_address(self, index: int) -> int | None:
        return self.addresses[index]

    def ioeventfd(
        self,
        space: Any,
        address: int,
        size: int,
        match: int | None,
        callback: Callable[[], None],
        answerer: object = None,
    ) -> Callable[[], None]:
        assert int(space) == 1 and match is None and (address, size) not in self.notifiers
        self.notifiers[address, size] = callback
        return lambda: self.notifiers.pop((address, size)) and None


class PciDriver(Driver):
    """Over virtio-pci registers, which it finds through the capabilities as 4.1.4 tells it."""

    def __init__(self, device: Device, memory: FakeMemory | None = None, **options: Any) -> None:
        super().__init__(memory)
        self.transport = self.pci = PciTransport(device, self.memory, **options)
        self.host = FakePciHost(self.interrupted)
        self.pci.attach(self.host)
        self.pci.bars_changed()
        self.caps: dict[int, Any] = {}
        for capability in self.pci.capabilities:
            parsed = PciCapability.parse(capability)
            assert parsed.cap_len == len(capability)
            self.caps.setdefault(parsed.cfg_type, parsed)
        self.multiplier = int.from_bytes(self.pci.capabilities[1][-4:], "little")

    def get(self, name: str) -> int:
        offset, size = COMMON[name]
        return self.pci.bar_read(self.caps[1].bar, self.caps[1].offset + offset, size)

    def set(self, name: str, value: int) -> None:
        offset, size = COMMON[name]
        for part in range(0, size, 4):  # 64-bit fields as two 32-bit accesses
            width = min(size, 4)
            self.pci.bar_write(
                self.caps[1].bar, self.caps[1].offset + offset + part, width, value >> 8 * part & (1 << 8 * width) - 1
            )

    def read_status(self) -> int:
        return self.get("device_status")

    def write_status(self, value: int) -> None:
        self.set("device_status", value)

    def read_features(self) -> int:
        value = 0
        for word in range(2):
            self.set("device_feature_select", word)
            value |= self.get("device_feature") << 32 * word
        return value

    def write_features(self, value: int) -> None:
        for word in range(2):
            self.set("driver_feature_select", word)
            self.set("driver_feature", value >> 32 * word & 0xFFFFFFFF)

    def queue_size_max(self, index: int) -> int:
        self.set("queue_select", index)
        return self.get("queue_size")

    def configure_queue(self, index: int, queue: AnyDriverQueue) -> None:
        self.set("config_msix_vector", 0)
        self.set("queue_select", index)
        self.set("queue_size", queue.size)
        self.set("queue_msix_vector", index + 1)
        assert self.get("queue_msix_vector") == index + 1
        for name in ("desc", "driver", "device"):
            self.set(f"queue_{name}", getattr(queue, name))
        self.set("queue_enable", 1)
        assert self.get("queue_enable") == 1

    def notify_address(self, index: int) -> int:
        self.set("queue_select", index)
        return int(self.caps[2].offset + self.get("queue_notify_off") * self.multiplier)

    def notify(self, index: int) -> None:
        self.pci.bar_write(self.caps[2].bar, self.notify_address(index), 2, index)

    def config_read(self, offset: int, size: int) -> int:
        return self.pci.bar_read(self.caps[4].bar, self.caps[4].offset + offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.pci.bar_write(self.caps[4].bar, self.caps[4].offset + offset, size, value)


DRIVERS: dict[str, Callable[..., Driver]] = {
    "pci": PciDriver,
    "mmio": MmioDriver,
    "pci-packed": partial(PciDriver, packed=True),
    "mmio-packed": partial(MmioDriver, packed=True),
}
"""Each device test runs over every transport, and over both kinds of rings."""
