"""virtio over MMIO, version 2 (virtio 1.2, 4.2): 512 bytes of registers and a level-triggered interrupt.

A bus device: `read` and `write` with offsets into the range. Loop thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from virtio.device import Device
from virtio.protocols import DmaMemory
from virtio.state import U32, TransportState
from virtio.transport import Transport

SIZE = 0x200
QUEUE_NOTIFY = 0x050
"""The register an embedder may map to an ioeventfd for each queue: 4 bytes, the value is the queue's
index."""
CONFIG = 0x100
MAGIC = 0x74726976
VERSION = 2
VENDOR = 0x4D564C56
INT_QUEUE, INT_CONFIG = 1, 2

# 4.2.2 MMIO Device Register Layout: offset -> name. All are 32 bits wide.
READABLE = {
    0x000: "MagicValue",
    0x004: "Version",
    0x008: "DeviceID",
    0x00C: "VendorID",
    0x010: "DeviceFeatures",
    0x034: "QueueNumMax",
    0x044: "QueueReady",
    0x060: "InterruptStatus",
    0x070: "Status",
    0x0B0: "SHMLenLow",
    0x0B4: "SHMLenHigh",
    0x0B8: "SHMBaseLow",
    0x0BC: "SHMBaseHigh",
    0x0FC: "ConfigGeneration",
}
WRITABLE = {
    0x014: "DeviceFeaturesSel",
    0x020: "DriverFeatures",
    0x024: "DriverFeaturesSel",
    0x030: "QueueSel",
    0x038: "QueueNum",
    0x044: "QueueReady",
    QUEUE_NOTIFY: "QueueNotify",
    0x064: "InterruptACK",
    0x070: "Status",
    0x080: "QueueDescLow",
    0x084: "QueueDescHigh",
    0x090: "QueueDriverLow",
    0x094: "QueueDriverHigh",
    0x0A0: "QueueDeviceLow",
    0x0A4: "QueueDeviceHigh",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MmioState(TransportState):
    """A virtio-mmio device."""

    kind: ClassVar = "virtio-mmio"
    version: ClassVar = 1
    interrupt_status: U32


class MmioTransport(Transport):
    """One virtio-mmio device. `irq(level)` drives its interrupt line. `stall` keeps the processor whose write this is
    until the function that it returns is called."""

    # 4.2.2, QueueReady: "Writing one (0x1) to this register notifies the device that it can execute requests from this
    # virtual queue. Reading from this register returns the last value written to it." No clause ends that with
    # DRIVER_OK, 4.2.2.2 has the driver write 0 "to stop using the queue", and 4.2.3.2 begins a queue's configuration
    # with nothing but QueueReady reading 0. So a queue that was stopped can be set up again, with a new ring.
    QUEUES_RESTART = True

    state_type = MmioState

    def __init__(
        self,
        device: Device,
        memory: DmaMemory,
        irq: Callable[[bool], None],
        *,
        stall: Callable[[], Callable[[], None]] | None = None,
        **options: Any,
    ) -> None:
        self._irq = irq
        self._stall = stall
        self._stalled: list[Callable[[], None]] = []
        self._interrupt_status = 0
        super().__init__(device, memory, **options)

    # Interrupts (4.2.3.4)

    def signal_queue(self, index: int) -> None:
        self._raise(INT_QUEUE)

    def signal_config(self) -> None:
        self._raise(INT_CONFIG)

    def _raise(self, bit: int) -> None:
        before, self._interrupt_status = self._interrupt_status, self._interrupt_status | bit
        if not before:
            self._irq(True)

    def interrupts_reset(self) -> None:
        # 4.2.2.1: "Upon reset, the device MUST clear all bits in InterruptStatus and ready bits in the
        # QueueReady"
        if self._interrupt_status:
            self._interrupt_status = 0
            self._irq(False)

    # Reset

    def write_status(self, value: int) -> None:
        super().write_status(value)
        # 2.4.2: "The driver SHOULD consider a driver-initiated reset complete when it reads device status as 0." Only
        # with virtio-pci must it wait for that (4.1.4.3.2); Linux's driver for virtio-mmio goes on and frees buffers.
        if value == 0 and self._resetting and self._stall is not None:
            self._stalled.append(self._stall())

    def _finish_reset(self) -> None:
        super()._finish_reset()
        stalled, self._stalled = self._stalled, []
        for go_on in stalled:
            go_on()

    # Registers

    def read(self, offset: int, size: int) -> int:
        if offset >= CONFIG:
            return self.config_read_device(offset - CONFIG, size) if offset + size <= SIZE else (1 << 8 * size) - 1
        # 4.2.2.2: "The driver MUST only use 32 bit wide and aligned reads and writes to access the control
        # registers"
        name = READABLE.get(offset) if size == 4 else None
        return self._read(name) & 0xFFFFFFFF if name else 0

    def _read(self, name: str) -> int:
        match name:
            case "MagicValue":
                return MAGIC  # 4.2.2.1: "The device MUST return 0x74726976 in MagicValue."
            case "Version":
                return VERSION  # 4.2.2.1: "The device MUST return value 0x2 in Version."
            case "DeviceID":
                return self.device.device_id
            case "VendorID":
                return VENDOR
            case "DeviceFeatures":
                return self.device_feature_word()
            case "QueueNumMax":
                # 4.2.2: "or zero (0x0) if the queue is not available"
                return self.device.queue_sizes[self.queue_select] if self.queue else 0
            case "QueueReady":
                return int(self.queue_ready())
            case "InterruptStatus":
                return self._interrupt_status
            case "Status":
                return self.read_status()
            case "ConfigGeneration":
                return self.config_generation
        return 0xFFFFFFFF  # 4.2.2: no shared memory region exists: length and base read as -1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= CONFIG:
            self.config_write_device(offset - CONFIG, size, value)
            return
        name = WRITABLE.get(offset) if size == 4 else None
        if name:
            self._write(name, value)

    def _write(self, name: str, value: int) -> None:
        match name:
            case "DeviceFeaturesSel":
                self.device_feature_select = value
            case "DriverFeaturesSel":
                self.driver_feature_select = value
            case "DriverFeatures":
                self.write_driver_features(value)
            case "QueueSel":
                self.queue_select = value
            case "QueueNum":
                self.set_queue_size(value)
            case "QueueReady":
                if value & 1:
                    self.enable_queue()
                else:
                    # 4.2.2.2: "To stop using the queue the driver MUST write zero (0x0) to this QueueReady and MUST
                    # read the value back to ensure synchronization."
                    self.stop_queue()
            case "QueueNotify":
                self.notify(value)
            case "InterruptACK":
                # 4.2.2.1: the bits written are cleared
                before, self._interrupt_status = self._interrupt_status, self._interrupt_status & ~value
                if before and not self._interrupt_status:
                    self._irq(False)
            case "Status":
                self.write_status(value)
            case _:
                area = {"Desc": "desc", "Driv": "driver", "Devi": "device"}[name[5:9]]
                self.set_queue_address(area, name.endswith("High"), value)

    def _save_interrupts(self) -> dict[str, Any]:
        return {"interrupt_status": self._interrupt_status}

    def restore(self, state: TransportState) -> None:
        assert isinstance(state, MmioState)
        super().restore(state)
        self._interrupt_status = state.interrupt_status
        if self._interrupt_status:
            self._irq(True)
