"""virtio over PCI, modern (virtio 1.2, 4.1): one PCI function, described to a PCI layer by structure.

BAR 4 holds the common, ISR, device and notification structures, each on its own page; BAR 1 the MSI-X table,
which the PCI layer emulates. The transport is a pci_function.PciFunction. Loop thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from virtio.constants import DeviceId
from virtio.device import Device
from virtio.layouts import PciCapability, PciCommonConfig, fast, fields
from virtio.pci_function import BarSpec, MsixSpec, PciHost
from virtio.protocols import DmaMemory
from virtio.state import U8, U16, TransportState
from virtio.transport import Transport

VENDOR = 0x1AF4  # 4.1.2: "Any PCI device with PCI Vendor ID 0x1AF4, and PCI Device ID 0x1000 through 0x107F"
DEVICE_BASE = 0x1040  # 4.1.2.1: "calculated by adding 0x1040 to the Virtio Device ID"
NO_VECTOR = 0xFFFF
SPACE_MMIO = 1

MSIX_BAR, BAR = 1, 4
PAGE = 0x1000
COMMON_AT, ISR_AT, DEVICE_AT, NOTIFY_AT = 0, PAGE, 2 * PAGE, 3 * PAGE
NOTIFY_MULTIPLIER = 4
CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI = 1, 2, 3, 4, 5  # 4.1.4
_capability = fast(PciCapability)
VENDOR_SPECIFIC = 0x09  # PCI Local Bus Specification 3.0, appendix H
WINDOW_DATA = _capability.size
ISR_QUEUE, ISR_CONFIG = 1, 2

CLASSES = {
    DeviceId.NET: 0x020000,
    DeviceId.BLOCK: 0x010000,
    DeviceId.CONSOLE: 0x078000,
    DeviceId.ENTROPY: 0x108000,
    DeviceId.BALLOON: 0x050000,
    DeviceId.SOCKET: 0x028000,
}
"""Class codes; other devices are 0xff0000, unclassified."""

_FIELDS = fields(PciCommonConfig)
_COMMON_SIZE = PciCommonConfig.sizeof()
_AREAS = {"queue_desc": "desc", "queue_driver": "driver", "queue_device": "device"}
_CAPABILITY = fields(PciCapability)
_WINDOW_FIXED = range(_CAPABILITY["id"][0], _CAPABILITY["offset"][0])


@dataclass(frozen=True, slots=True, kw_only=True)
class PciTransportState(TransportState):
    """A virtio-pci function; configuration space, BARs and MSI-X are the bus's."""

    kind: ClassVar = "virtio-pci"
    version: ClassVar = 1
    isr: U8
    config_vector: U16
    window: Annotated[bytes, range(4 + WINDOW_DATA, 5 + WINDOW_DATA)]


class PciTransport(Transport):
    """One virtio-pci function. `slot` names nothing here: the bus places it."""

    vendor_id = VENDOR
    revision = 1  # 4.1.2.1: "Non-transitional devices SHOULD have a PCI Revision ID of 1 or higher."
    subsystem_vendor_id = VENDOR
    state_type = PciTransportState

    def __init__(self, device: Device, memory: DmaMemory, **options: Any) -> None:
        self._host: PciHost | None = None
        self._undo: list[Callable[[], None]] = []
        self._isr = 0
        self._config_vector = NO_VECTOR
        self._window_at: int | None = None
        self._window = bytearray(4 + WINDOW_DATA)
        super().__init__(device, memory, **options)
        queues = len(device.queue_sizes)
        self.device_id = DEVICE_BASE + device.device_id
        self.subsystem_id = 0x40 + device.device_id
        known = device.device_id in CLASSES
        self.class_code = CLASSES[DeviceId(device.device_id)] if known else 0xFF0000
        table = 16 * (queues + 1)
        size = max(4096, 1 << (2 * table - 1).bit_length())
        self.bars: Sequence[BarSpec] = (
            BarSpec(MSIX_BAR, size),
            BarSpec(BAR, 4 * PAGE, "mem64", True),
        )
        self._vectors = queues + 1
        self.msix: MsixSpec | None = MsixSpec(self._vectors, MSIX_BAR, 0, MSIX_BAR, size // 2)
        # 4.1.4.x.1: each of the structures has at least one capability; the access window is the last
        self.capabilities: Sequence[bytes] = (
            self._capability(CAP_COMMON, COMMON_AT, _COMMON_SIZE),
            self._capability(
                CAP_NOTIFY,
                NOTIFY_AT,
                queues * NOTIFY_MULTIPLIER,
                NOTIFY_MULTIPLIER.to_bytes(4, "little"),
            ),
            self._capability(CAP_ISR, ISR_AT, 1),
            self._capability(CAP_DEVICE, DEVICE_AT, max(len(device.config()), 4)),
            self._capability(CAP_PCI, 0, 0, bytes(4)),
        )

    @staticmethod
    def _capability(kind: int, offset: int, length: int, more: bytes = b"") -> bytes:
        # cap_vndr, cap_next, cap_len, cfg_type, bar, id, offset, length (4.1.4)
        bar = BAR if length else 0
        return _capability.pack(VENDOR_SPECIFIC, 0, _capability.size + len(more), kind, bar, 0, offset, length) + more

    # Interrupts (4.1.4.5, 4.1.5.1.4 and following)

    def signal_queue(self, index: int) -> None:
        host = self._host
        if host is None:
            return
        if host.msix_enabled:
            # 4.1.5.3.1: "If MSI-X capability is enabled and queue_msix_vector is NO_VECTOR for a virtqueue, the device
            # MUST NOT deliver an interrupt for that virtqueue."
            vector = self.queues[index].vector
            if vector != NO_VECTOR:
                host.signal_msix(vector)
        else:
            # 4.1.4.5.1: "If MSI-X capability is disabled, the device MUST set the Queue Interrupt bit in ISR status
            # before sending a virtqueue notification to the driver."
            self._isr |= ISR_QUEUE
            host.set_intx(True)

    def signal_config(self) -> None:
        # 4.1.4.5.1: "The device MUST set the Device Configuration Interrupt bit in ISR status before sending a device
        # configuration change notification to the driver."
        self._isr |= ISR_CONFIG
        host = self._host
        if host is None:
            return
        # 4.1.4.5.1: "If MSI-X capability is disabled, the device MUST set the Interrupt Status bit ... to the logical
        # OR of all bits in ISR status": also of one that was set while MSI-X was enabled. The PCI layer keeps the pin
        # quiet while it is.
        host.set_intx(True)
        # 4.1.5.4.1: "If MSI-X capability is enabled and config_msix_vector is NO_VECTOR, the device MUST NOT deliver
        # an interrupt for device configuration space changes."
        if host.msix_enabled and self._config_vector != NO_VECTOR:
            host.signal_msix(self._config_vector)

    def interrupts_reset(self) -> None:
        self._config_vector = NO_VECTOR
        self._clear_isr()

    def _clear(self) -> None:
        super()._clear()
        self.messages_changed()

    def _clear_isr(self) -> int:
        isr, self._isr = self._isr, 0
        if isr and self._host is not None:
            self._host.set_intx(False)
        return isr

    # What a PCI layer calls

    def attach(self, host: PciHost) -> None:
        self._host = host

    def bars_changed(self) -> None:
        """Notifications are posted writes at one address per queue (4.1.5.2)."""
        self._drop_ioeventfds()
        base = self._host.bar_address(BAR) if self._host is not None else None
        if base is None or self._host is None:
            return
        for index in range(len(self.queues)):
            address = base + NOTIFY_AT + index * NOTIFY_MULTIPLIER
            notify, answerer = partial(self.notify, index), self.device.answerer(index)
            self._undo.append(self._host.ioeventfd(SPACE_MMIO, address, 2, None, notify, answerer))
        self.messages_changed()

    def messages_changed(self) -> None:
        """The queues' interrupts may be other messages now, or none."""
        for index, queue in enumerate(self.queues):
            message = None
            if self._host is not None and queue.vector != NO_VECTOR:
                message = self._host.msix_message(queue.vector)
            self.device.queue_message(index, message)

    def _drop_ioeventfds(self) -> None:
        undo, self._undo = self._undo, []
        for call in undo:
            call()

    def bar_read(self, index: int, offset: int, size: int) -> int:
        if index != BAR:
            return (1 << 8 * size) - 1
        page, offset = offset & ~(PAGE - 1), offset & (PAGE - 1)
        if page == COMMON_AT:
            return self._common_read(offset, size)
        if page == ISR_AT:
            # 4.1.4.5.1: "The device MUST reset ISR status to 0 on driver read."
            return self._clear_isr() if offset == 0 else 0
        if page == DEVICE_AT:
            return self.config_read_device(offset, size)
        return 0

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        if index != BAR:
            return
        page, offset = offset & ~(PAGE - 1), offset & (PAGE - 1)
        if page == COMMON_AT:
            self._common_write(offset, size, value)
        elif page == DEVICE_AT:
            self.config_write_device(offset, size, value)
        elif page == NOTIFY_AT and offset % NOTIFY_MULTIPLIER == 0:
            self.notify(offset // NOTIFY_MULTIPLIER)

    def config_read(self, offset: int, size: int) -> int | None:
        """Configuration space: the PCI access window (4.1.4.9)."""
        at = self._in_window(offset, size)
        if at is None:
            return None
        bar, where, length = self._window_target()
        if at < WINDOW_DATA or not length:
            return int.from_bytes(self._window[at : at + size], "little")
        # 4.1.4.9.1: "Upon detecting driver read access to pci_cfg_data, the device MUST execute a read access
        # of length cap.length at offset cap.offset at BAR selected by cap.bar and store the first cap.length
        # bytes in pci_cfg_data."
        data = self.bar_read(bar, where, length).to_bytes(8, "little")[:length]
        self._window[WINDOW_DATA : WINDOW_DATA + length] = data
        return int.from_bytes(self._window[at : at + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> bool:
        at = self._in_window(offset, size)
        if at is None:
            return False
        # 4.1.4.9: cap.bar, cap.length, cap.offset and pci_cfg_data are what the driver writes
        for index, byte in enumerate(value.to_bytes(size, "little"), at):
            if index not in _WINDOW_FIXED:
                self._window[index] = byte
        if at >= WINDOW_DATA:
            bar, where, length = self._window_target()
            if length:
                # 4.1.4.9.1: "Upon detecting driver write access to pci_cfg_data, the device MUST execute a
                # write access at offset cap.offset at BAR selected by cap.bar using the first cap.length
                # bytes from pci_cfg_data."
                data = self._window[WINDOW_DATA : WINDOW_DATA + length]
                self.bar_write(bar, where, length, int.from_bytes(data, "little"))
        return True

    def _in_window(self, offset: int, size: int) -> int | None:
        if self._window_at is None:
            return None
        at = offset - self._window_at
        # the capability's head stays plain configuration space
        return at if _CAPABILITY["bar"][0] <= at <= WINDOW_DATA + 4 - size else None

    def _window_target(self) -> tuple[int, int, int]:
        bar = self._window[_CAPABILITY["bar"][0]]
        where, length = (
            int.from_bytes(self._window[_CAPABILITY[name][0] :][:4], "little") for name in ("offset", "length")
        )
        # 4.1.4.9: 1, 2 or 4; 4.1.4.9.2: "The driver MUST NOT write a cap.offset which is not a multiple of cap.length"
        return bar, where, length if length in (1, 2, 4) and where % length == 0 else 0

    def capability_placed(self, capability: int, offset: int) -> None:
        """Capability number `capability` stands at this configuration-space offset."""
        if capability == len(self.capabilities) - 1:
            self._window_at = offset

    # Common configuration structure (4.1.4.3)

    @staticmethod
    def _field(offset: int, size: int) -> tuple[str, int] | None:
        for name, (at, width) in _FIELDS.items():
            if at <= offset and offset + size <= at + width:
                return name, offset - at
        return None

    def _common_read(self, offset: int, size: int) -> int:
        found = self._field(offset, size)
        if found is None:
            return 0
        name, skip = found
        return self._common_value(name) >> 8 * skip & (1 << 8 * size) - 1

    def _common_value(self, name: str) -> int:
        queue = self.queue
        match name:
            case "device_feature_select":
                return self.device_feature_select
            case "device_feature":
                # 4.1.4.3.1: "The device MUST present the feature bits it is offering in device_feature,
                # starting at bit device_feature_select * 32"
                return self.device_feature_word()
            case "driver_feature_select":
                return self.driver_feature_select
            case "driver_feature":
                # 4.1.4.3.1: "The device MUST present any valid feature bits the driver has written in
                # driver_feature"
                return self.driver_feature_word()
            case "config_msix_vector":
                return self._config_vector
            case "num_queues":
                return len(self.queues)
            case "device_status":
                return self.read_status()
            case "config_generation":
                return self.config_generation & 0xFF
            case "queue_select":
                return self.queue_select
        if queue is None:
            # 4.1.4.3.1: "The device MUST present a 0 in queue_size if the virtqueue corresponding to the
            # current queue_select is unavailable."
            return NO_VECTOR if name == "queue_msix_vector" else 0
        match name:
            case "queue_size":
                return queue.size
            case "queue_msix_vector":
                return queue.vector
            case "queue_enable":
                return int(queue.enabled)
            case "queue_notify_off":
                return self.queue_select
            case "queue_desc" | "queue_driver" | "queue_device":
                return int(getattr(queue, _AREAS[name]))
        return 0

    def _common_write(self, offset: int, size: int, value: int) -> None:
        found = self._field(offset, size)
        if found is None:
            return
        name, skip = found
        if name in _AREAS:
            if size == 8:
                self.set_queue_address(_AREAS[name], False, value & 0xFFFFFFFF)
                self.set_queue_address(_AREAS[name], True, value >> 32)
            elif size == 4:
                self.set_queue_address(_AREAS[name], skip == 4, value)
            return
        # 4.1.3.1: the driver accesses each field in its own width
        if skip or size != _FIELDS[name][1]:
            return
        match name:
            case "device_feature_select":
                self.device_feature_select = value
            case "driver_feature_select":
                self.driver_feature_select = value
            case "driver_feature":
                self.write_driver_features(value)
            case "config_msix_vector":
                self._config_vector = self._vector(value)
            case "device_status":
                self.write_status(value)
            case "queue_select":
                self.queue_select = value
            case "queue_size":
                self.set_queue_size(value)
            case "queue_msix_vector":
                if self.queue is not None:
                    self.queue.vector = self._vector(value)
                    self.messages_changed()
            case "queue_enable":
                if value == 1:
                    self.enable_queue()

    def _vector(self, value: int) -> int:
        # 4.1.5.1.2.1: "Devices MUST report mapping failures by returning the NO_VECTOR value"
        return value if value < self._vectors else NO_VECTOR

    # State

    def _save_interrupts(self) -> dict[str, Any]:
        return {"isr": self._isr, "config_vector": self._config_vector, "window": bytes(self._window)}

    def restore(self, state: TransportState) -> None:
        assert isinstance(state, PciTransportState)
        super().restore(state)
        self._isr = state.isr
        self._config_vector = state.config_vector
        self._window[:] = state.window
        self.bars_changed()
        if self._isr and self._host is not None:
            self._host.set_intx(True)
