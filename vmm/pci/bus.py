"""PCI bus 0: the host bridge, configuration access by ports 0xCF8/0xCFC and by ECAM, BAR placement.

Specification: PCI Local Bus 3.0, 3.2.2.3.2 (configuration mechanism #1); PCI Express Base 7.2.2 (ECAM). There is no
firmware, so that the bus assigns BARs and interrupt lines itself; the guest may move them. Loop thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from cpu.contract import Space
from cpu.values import U32, dataclass
from virtio.pci_function import BarSpec, MsixSpec, PciFunction, PciHost
from vmm.errors import ConfigError, StateError
from vmm.machine import layout
from vmm.machine.bus import BusDevice
from vmm.machine.interfaces import Board
from vmm.pci import config as cfg
from vmm.pci.slot import Bar, Slot, SlotState

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
    def messages_changed(self) -> None: ...
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
    """0xCF8: it takes only 4-byte accesses (3.2.2.3.2: "any other types of accesses ... have no effect"); so the
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
class HotplugState:
    """What the guest has not heard yet: bits of device numbers; and what _OST reports on."""

    inserted: U32
    asked: U32
    ost_event: U32


@dataclass(frozen=True, slots=True)
class PciBusStateV1:
    """Before functions came and went."""

    kind: ClassVar = "pci"
    version: ClassVar = 1
    address: U32
    slots: dict[str, object]


@dataclass(frozen=True, slots=True)
class PciBusState:
    """The configuration address register, and every function by its device number."""

    kind: ClassVar = "pci"
    version: ClassVar = 2
    previous: ClassVar = PciBusStateV1
    address: U32
    slots: dict[str, object]
    hotplug: HotplugState | None
    """None: the guest's tables do not describe it."""

    @classmethod
    def upgrade(cls, old: PciBusStateV1) -> Self:
        return cls(old.address, old.slots, None)


class SlotEvents(Protocol):
    """vmm.pci.hotplug.PciHotplug, as far as the bus keeps its state."""

    known: bool

    def reset(self) -> None:
        """A machine reset."""

    def save(self) -> HotplugState:
        """What the guest has not heard yet."""

    def restore(self, state: HotplugState | None) -> None:
        """None: of a machine that had none."""

    def show(self) -> None:
        """Slots were filled or emptied."""


def _window(bar: Bar) -> str:
    return "io" if bar.spec.kind == "io" else "mem"


def _room(bar: Bar) -> int:
    """What a BAR takes: whole pages of memory, so that a guest may map each by itself."""
    return max(bar.spec.size, 4096 if _window(bar) == "mem" else 32)


class PciBus:
    """Bus 0. `attach` it before the first vCPU runs; `add` and `remove` functions then or later."""

    state_type = PciBusState

    def __init__(self, board: Board) -> None:
        self._board = board
        self._slots: dict[int, Slot] = {}
        self._address = _Address()
        self.hotplug: SlotEvents | None = None
        self.add(HostBridge(), device=0)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(self._slots[number] for number in sorted(self._slots))

    @property
    def free(self) -> int:
        """Device numbers that no function has."""
        return DEVICES - len(self._slots)

    def add(self, function: PciFunction, *, device: int | None = None) -> int:
        """Put a function into a slot (the next free one) and give its BARs addresses, which moves no other's; returns
        the device number. Raises ConfigError if all 32 are taken or the BARs do not fit."""
        if device is None:
            device = next((number for number in range(DEVICES) if number not in self._slots), DEVICES)
            if device >= DEVICES:
                raise ConfigError(
                    f"PCI: no free slot; a machine has {DEVICES - 1} for devices, use the mmio transport for the others"
                )
        if not 0 <= device < DEVICES or device in self._slots:
            raise ConfigError(f"PCI: slot {device} is taken, or none of 1 to {DEVICES - 1}")
        line = None
        if device:
            line = self._board.irq_line(layout.intx_gsi(device, 0))
        slot = Slot(self, self._board, function, device, line)
        self._place(slot)
        self._slots[device] = slot
        self._show()
        return device

    def hide(self, device: int) -> None:
        """The configuration space of a function reads as if it were not there; its BARs still answer. KeyError if there
        is none."""
        self._slots[device].hidden = True

    def remove(self, device: int) -> None:
        """Take a function out of its slot: it decodes nothing, drives no interrupt and is not found any more. KeyError
        if there is none."""
        slot = self._slots.pop(device)
        slot.detach()
        self._show()

    def _show(self) -> None:
        if self.hotplug is not None:
            self.hotplug.show()

    def attach(self, reset: BusDevice | None = None) -> None:
        """Put the configuration mechanisms on the machine's buses. `reset`: the one-byte device at 0xCF9."""
        self._address.reset = reset
        board = self._board
        board.map(Space.PORT, CONFIG_ADDRESS, 4, self._address, "pci configuration address")
        board.post(Space.PORT, CONFIG_ADDRESS, 4, self._address, 0)
        board.map(Space.PORT, CONFIG_DATA, 4, _Data(self, self._address), "pci configuration data")
        board.map(Space.MMIO, layout.ECAM.start, layout.ECAM.size, _Ecam(self), "pci ecam")

    def _assign(self) -> None:
        """What firmware does: addresses for all BARs, interrupt lines; decoding stays off."""
        placed: list[Slot] = []
        for slot in self.slots:
            self._place(slot, placed)
            placed.append(slot)

    def _place(self, slot: Slot, among: Sequence[Slot] | None = None) -> None:
        """Addresses for the BARs of one function (largest first) where `among`, by default every other function, has
        none, and its interrupt line. Raises ConfigError if they do not fit."""
        taken: dict[str, list[tuple[int, int]]] = {"io": [], "mem": []}
        for other in self.slots if among is None else among:
            for bar in other.bars:
                taken[_window(bar)].append((other.config.bar(bar.spec), _room(bar)))
        for bar in sorted(slot.bars, key=lambda bar: -bar.spec.size):
            kind = _window(bar)
            window = layout.PCI_IO if kind == "io" else layout.MMIO32
            at, step = -(-window.start // _room(bar)) * _room(bar), _room(bar)
            for start, size in sorted(taken[kind]):
                if start < at + step and at < start + size:
                    at = -(-(start + size) // step) * step
            if at + step > window.end:
                raise ConfigError(f"PCI: the BARs of slot {slot.device} do not fit into {window.size:#x} bytes")
            slot.config.set_bar(bar.spec, at)
            taken[kind].append((at, step))
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
        if self.hotplug is not None:
            self.hotplug.reset()

    def state_parts(self) -> Mapping[str, Any]:
        """The components behind the `object` fields of its state."""
        return {"slots": {str(slot.device): slot for slot in self.slots}}

    def save(self) -> PciBusState:
        known = self.hotplug is not None and self.hotplug.known
        return PciBusState(
            self._address.address,
            {str(slot.device): slot.save() for slot in self.slots},
            self.hotplug.save() if self.hotplug is not None and known else None,
        )

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
        if self.hotplug is not None:
            self.hotplug.restore(state.hotplug)
        for slot, saved in pairs:
            slot.restore(saved)
        self.remap()
        for slot, saved in pairs:
            slot.restore_function(saved)
