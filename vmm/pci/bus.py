"""PCI bus 0: the host bridge, configuration access by ports 0xCF8/0xCFC and by ECAM, BAR placement.

Specification: PCI Local Bus 3.0, 3.2.2.3.2 (configuration mechanism #1); PCI Express Base 7.2.2 (ECAM). There is no
firmware, so that the bus assigns BARs and interrupt lines itself; the guest may move them. Loop thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cpu.contract import Space
from virtio.pci_function import BarSpec, MsixSpec, PciFunction, PciHost
from vmm.errors import ConfigError, StateError
from vmm.machine import layout
from vmm.machine.bus import BusDevice
from vmm.machine.interfaces import Board
from vmm.pci import config as cfg
from vmm.pci.slot import Slot, SlotState
from vmm.state.fields import U32

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
ENABLE = 1 << 31
DEVICES = 32


class HostBridge:
    """Function 00:00.0: an identity and nothing else."""

    vendor_id, device_id, revision, class_code = 0x1B36, 0x0008, 0, 0x06_00_00
    """QEMU's generic PCI Express host bridge: known to drivers as one without quirks."""
    subsystem_vendor_id, subsystem_id = 0x1AF4, 0x1100

    def __init__(self) -> None:
        self.bars: Sequence[BarSpec] = ()
        self.capabilities: Sequence[bytes] = ()
        self.msix: MsixSpec | None = None

    def attach(self, host: PciHost) -> None: ...
    def bars_changed(self) -> None: ...
    def capability_placed(self, capability: int, offset: int) -> None: ...
    def reset(self) -> None: ...
    def bar_write(self, index: int, offset: int, size: int, value: int) -> None: ...

    def bar_read(self, index: int, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def config_read(self, offset: int, size: int) -> int | None:
        return None

    def config_write(self, offset: int, size: int, value: int) -> bool:
        return False

class _Address:
    """0xCF8: only 4-byte accesses are to it (3.2.2.3.2: "any other types of accesses ... have no effect"); so the
    range is declared 4 bytes long, and byte accesses to the reset register within it (0xCF9) are passed to `reset`."""

    def __init__(self) -> None:
        self.address = 0
        self.reset: BusDevice | None = None

    def read(self, offset: int, size: int) -> int:
        if size == 4:
            return self.address
        if self.reset is not None and (offset, size) == (1, 1):
            return self.reset.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            self.address = value & 0x80FF_FFFC
        elif self.reset is not None and (offset, size) == (1, 1):
            self.reset.write(0, 1, value)

    def posted(self, offset: int, size: int, data: bytes) -> None:
        self.write(offset, size, int.from_bytes(data[-size:], "little"))


class _Data:
    def __init__(self, bus: PciBus, address: _Address) -> None:
        self._bus, self._address = bus, address

    def _target(self, offset: int) -> tuple[int, int] | None:
        address = self._address.address
        return (address >> 8 & 0xFFFF, (address & 0xFC) + offset) if address & ENABLE else None

    def read(self, offset: int, size: int) -> int:
        target = self._target(offset)
        return (1 << 8 * size) - 1 if target is None else self._bus.config_read(*target, size)

    def write(self, offset: int, size: int, value: int) -> None:
        target = self._target(offset)
        if target is not None:
            self._bus.config_write(*target, size, value)


class _Ecam:
    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        if size == 8:
            return self.read(offset, 4) | self.read(offset + 4, 4) << 32
        return self._bus.config_read(offset >> 12, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 8:
            self.write(offset, 4, value & 0xFFFF_FFFF)
            self.write(offset + 4, 4, value >> 32)
        else:
            self._bus.config_write(offset >> 12, offset & 0xFFF, size, value)


@dataclass(frozen=True, slots=True)
class PciBusState:
    """The configuration address register, and every function by its device number."""

    kind: ClassVar = "pci"
    version: ClassVar = 1
    address: U32
    slots: dict[str, object]


class PciBus:
    """Bus 0. `add` functions, then `attach`; both before the first vCPU runs."""

    state_type = PciBusState

    def __init__(self, board: Board) -> None:
        self._board = board
        self._slots: dict[int, Slot] = {}
        self._address = _Address()
        self.add(HostBridge(), device=0)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(self._slots[number] for number in sorted(self._slots))

    def add(self, function: PciFunction, *, device: int | None = None) -> int:
        """Put a function into a slot (the next free one) and give its BARs addresses; returns the device number.
        Raises ConfigError if all 32 are taken or the BARs do not fit."""
        if device is None:
            device = next((number for number in range(DEVICES) if number not in self._slots), DEVICES)
        if device >= DEVICES or device in self._slots:
            raise ConfigError("PCI: no free slot; a machine has 31 for devices, use the mmio transport for the others")
        line = None
        if device:
            line = self._board.irq_line(layout.intx_gsi(device, 0))
        self._slots[device] = Slot(self, self._board, function, device, line)
        self._assign()
        return device

    def attach(self, reset: BusDevice | None = None) -> None:
        """Put the configuration mechanisms on the machine's buses. `reset`: the one-byte device at 0xCF9."""
        self._address.reset = reset
        board = self._board
        board.map(Space.PORT, CONFIG_ADDRESS, 4, self._address, "pci configuration address")
        board.post(Space.PORT, CONFIG_ADDRESS, 4, self._address, 0)
        board.map(Space.PORT, CONFIG_DATA, 4, _Data(self, self._address), "pci configuration data")
        board.map(Space.MMIO, layout.ECAM.start, layout.ECAM.size, _Ecam(self), "pci ecam")

    def _assign(self) -> None:
        """What firmware does: addresses for all BARs (largest first), interrupt lines; decoding stays off."""
        windows = {"io": (layout.PCI_IO, layout.PCI_IO.start), "mem": (layout.MMIO32, layout.MMIO32.start)}
        every = [(bar, slot) for slot in self.slots for bar in slot.bars]
        for bar, slot in sorted(every, key=lambda item: -item[0].spec.size):
            kind = "io" if bar.spec.kind == "io" else "mem"
            window, at = windows[kind]
            least = 4096 if kind == "mem" else 32
            at = -(-at // bar.spec.size) * bar.spec.size
            if at + bar.spec.size > window.end:
                raise ConfigError(f"PCI: the BARs of slot {slot.device} do not fit into {window.size:#x} bytes")
            slot.config.set_bar(bar.spec, at)
            windows[kind] = (window, at + max(bar.spec.size, least))
        for slot in self.slots:
            if slot.device:
                slot.config.put(cfg.INTERRUPT_LINE, 1, layout.intx_gsi(slot.device, 0))

    def _slot(self, function: int) -> Slot | None:
        """`function`: bus, device and function number in 16 bits."""
        return self._slots.get(function >> 3) if function & 7 == 0 else None

    def config_read(self, function: int, offset: int, size: int) -> int:
        slot = self._slot(function)
        # 3.2.2.3.4: a read of a function that is not there ends by master abort: all ones.
        return (1 << 8 * size) - 1 if slot is None else slot.read(offset, size)

    def config_write(self, function: int, offset: int, size: int, value: int) -> None:
        slot = self._slot(function)
        if slot is not None:
            slot.write(offset, size, value)

    def remap(self) -> None:
        """Decoding changed somewhere: first take away, then put (so that two BARs may swap places), then tell."""
        changed = [slot for slot in self.slots if slot.unmap_moved()]
        changed += [slot for slot in self.slots if slot.map_wanted() and slot not in changed]
        for slot in changed:
            slot.function.bars_changed()

    def reset(self) -> None:
        """A machine reset: everything as after `attach`."""
        self._address.address = 0
        for slot in self.slots:
            slot.reset()
        self._assign()
        self.remap()

    def state_parts(self) -> Mapping[str, Any]:
        """The components behind the `object` fields of its state."""
        return {"slots": {str(slot.device): slot for slot in self.slots}}

    def save(self) -> PciBusState:
        return PciBusState(self._address.address, {str(slot.device): slot.save() for slot in self.slots})

    def restore(self, state: PciBusState) -> None:
        """StateError, before anything changes, if the state is of other devices."""
        pairs: list[tuple[Slot, SlotState]] = []
        if set(state.slots) != {str(slot.device) for slot in self.slots}:
            raise StateError("PCI: the saved state is of a machine with other devices")
        for slot in self.slots:
            saved = state.slots[str(slot.device)]
            assert isinstance(saved, SlotState)
            slot.check(saved)
            pairs.append((slot, saved))
        self._address.address = state.address & 0x80FF_FFFC
        for slot, saved in pairs:
            slot.restore(saved)
        self.remap()
        for slot, saved in pairs:
            slot.restore_function(saved)
