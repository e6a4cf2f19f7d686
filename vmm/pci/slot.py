"""One function in its slot: what the guest sees of it, and what it sees of the bus (virtio.pci_function.PciHost).

Joins configuration space, BAR decoding, MSI-X, MSI and INTx. Loop thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from cpu.contract import Space
from cpu.values import dataclass
from virtio.pci_function import BarSpec, PciFunction
from vmm.errors import ConfigError, StateError
from vmm.machine.interfaces import Board, IrqLine
from vmm.pci import config as cfg
from vmm.pci.config import ConfigSpace, FunctionIdentity
from vmm.pci.msi import Msi, Msix, MsixState

if TYPE_CHECKING:
    from vmm.pci.bus import PciBus


@dataclass(frozen=True, slots=True)
class SlotState:
    """A function as the bus sees it, and what it says of itself."""

    kind: ClassVar = "pci-function"
    version: ClassVar = 1
    config: Annotated[bytes, range(cfg.SIZE, cfg.SIZE + 1)]
    intx: bool
    msix: MsixState | None
    function: object


@dataclasses.dataclass(slots=True)
class Bar:
    """A BAR: where it should decode and where the machine's bus has it now (None: nowhere)."""

    spec: BarSpec
    mapped: int | None = None

    @property
    def space(self) -> Space:
        return Space.PORT if self.spec.kind == "io" else Space.MMIO


class _Window:
    """The bus device behind one BAR: MSI-X table and PBA first, then the function."""

    def __init__(self, slot: Slot, spec: BarSpec) -> None:
        self._slot, self._index = slot, spec.index
        msix = slot.msix
        self._table = self._pba = range(0)
        if msix is not None and msix.spec.table_bar == spec.index:
            self._table = range(msix.spec.table_offset, msix.spec.table_offset + msix.table_size)
        if msix is not None and msix.spec.pba_bar == spec.index:
            self._pba = range(msix.spec.pba_offset, msix.spec.pba_offset + msix.pba_size)
        for part in (self._table, self._pba):
            if part.stop > spec.size:
                raise ConfigError(f"PCI: the MSI-X structures do not fit into BAR {spec.index}")

    def read(self, offset: int, size: int) -> int:
        msix = self._slot.msix
        if msix is not None:
            if offset in self._table:
                return msix.table_read(offset - self._table.start, size)
            if offset in self._pba:
                return msix.pba_read(offset - self._pba.start, size)
        return self._slot.function.bar_read(self._index, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        msix = self._slot.msix
        if msix is not None:
            if offset in self._table:
                msix.table_write(offset - self._table.start, size, value)
                self._slot.function.messages_changed()
                return
            if offset in self._pba:
                return  # 6.8.2.10: read-only
        self._slot.function.bar_write(self._index, offset, size, value)


class Slot:
    """A function at device number `device` of bus 0."""

    state_type = SlotState

    def __init__(self, bus: PciBus, board: Board, function: PciFunction, device: int, line: IrqLine | None) -> None:
        self._bus, self._board, self._line = bus, board, line
        self.function, self.device = function, device
        self._stateful: Any = function if hasattr(function, "state_type") else None
        identity = FunctionIdentity(
            function.vendor_id, function.device_id, function.revision, function.class_code,
            function.subsystem_vendor_id, function.subsystem_id, 0 if line is None else 1,
        )
        self.config = ConfigSpace(identity, function.bars)
        self.msix = None if function.msix is None else Msix(function.msix, self._send)
        self.msi: Msi | None = None
        self.bars = [Bar(spec) for spec in function.bars]
        self._windows = {bar.spec.index: _Window(self, bar.spec) for bar in self.bars}
        self._intx = False
        self.hidden = False
        """Its configuration space reads as if it were not there, while its BARs still answer."""
        if self.msix is not None:
            self.msix.place(self.config)
        for number, body in enumerate(function.capabilities):
            if body[:1] == bytes([cfg.CAP_MSI]):
                self.msi = Msi.from_body(bytes(body), self._send)
                offset = self.msi.place(self.config)
            else:
                offset = self.config.add_capability(bytes(body))
            function.capability_placed(number, offset)
        function.attach(self)

    def _send(self, address: int, data: int) -> None:
        # 6.2.2: without bus mastering a function may not send messages either, but software (Linux included) always
        # sets it; a message is a memory write.
        if self.config.get(cfg.COMMAND, 2) & cfg.COMMAND_MASTER:
            self._board.signal_msi(address, data)

    # PciHost: what the function calls.

    def signal_msix(self, vector: int) -> None:
        if self.msix is not None:
            self.msix.signal(vector)

    def signal_msi(self, vector: int) -> None:
        """For functions with an MSI capability."""
        if self.msi is not None:
            self.msi.signal(vector)

    @property
    def msix_enabled(self) -> bool:
        return self.msix is not None and self.msix.enabled

    def set_intx(self, level: bool) -> None:
        self._intx = level
        self._update_intx()

    def bar_address(self, index: int) -> int | None:
        for bar in self.bars:
            if bar.spec.index == index:
                return bar.mapped
        return None

    def msix_message(self, vector: int) -> tuple[int, int] | None:
        master = self.config.get(cfg.COMMAND, 2) & cfg.COMMAND_MASTER
        return self.msix.message(vector) if self.msix is not None and master else None

    def ioeventfd(
        self,
        space: Space,
        address: int,
        size: int,
        match: int | None,
        callback: Callable[[], None],
        answerer: object = None,
    ) -> Callable[[], None]:
        return self._board.ioeventfd(space, address, size, match, callback, answerer)

    # What the bus calls.

    def read(self, offset: int, size: int) -> int:
        """A guest's read of configuration space; beyond the first 256 bytes there is nothing (reads as 0)."""
        if self.hidden:
            return (1 << 8 * size) - 1
        if offset + size > cfg.SIZE:
            return 0
        if offset >= cfg.FIRST_CAPABILITY:
            value = self.function.config_read(offset, size)
            if value is not None:
                return value
        return self.config.get(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset + size > cfg.SIZE:
            return
        if offset >= cfg.FIRST_CAPABILITY and self.function.config_write(offset, size, value):
            return
        self.config.write(offset, size, value)
        end = offset + size
        if offset < cfg.STATUS and end > cfg.COMMAND:
            self._update_intx()
            self._bus.remap()
            self.function.messages_changed()
        elif offset < cfg.BARS + 24 and end > cfg.BARS:
            self._bus.remap()
        elif offset >= cfg.FIRST_CAPABILITY:
            if self.msix is not None:
                self.msix.config_written(self.config)
            if self.msi is not None:
                self.msi.config_written()
            self._update_intx()
            self.function.messages_changed()

    def wanted(self, bar: Bar) -> int | None:
        """Where the registers say that a BAR decodes."""
        enable = cfg.COMMAND_IO if bar.space is Space.PORT else cfg.COMMAND_MEMORY
        if not self.config.get(cfg.COMMAND, 2) & enable:
            return None
        # 6.2.5.1: 0 is what an unprogrammed BAR holds; nothing of this machine may decode there.
        return self.config.bar(bar.spec) or None

    def unmap_moved(self) -> bool:
        """Take BARs off the machine's buses that no longer decode where they are."""
        changed = False
        for bar in self.bars:
            if bar.mapped is not None and bar.mapped != self.wanted(bar):
                self._board.unmap(bar.space, bar.mapped)
                bar.mapped = None
                changed = True
        return changed

    def map_wanted(self) -> bool:
        """Put BARs where they should decode. A place that is taken, or outside the space, stays unmapped."""
        changed = False
        for bar in self.bars:
            wanted = self.wanted(bar)
            if wanted is None or bar.mapped == wanted:
                continue
            name = f"pci 00:{self.device:02x}.0 bar {bar.spec.index}"
            try:
                self._board.map(bar.space, wanted, bar.spec.size, self._windows[bar.spec.index], name)
            except ConfigError:
                continue
            bar.mapped = wanted
            changed = True
        return changed

    def detach(self) -> None:
        """The function is off the bus."""
        for bar in self.bars:
            if bar.mapped is not None:
                self._board.unmap(bar.space, bar.mapped)
                bar.mapped = None
        self.function.bars_changed()
        self._intx = False
        if self._line is not None:
            self._line.set(False)

    def _update_intx(self) -> None:
        """6.2.3: Interrupt Status shows the state, also while Interrupt Disable or MSI keeps the pin quiet."""
        config = self.config
        status = config.get(cfg.STATUS, 2) & ~cfg.STATUS_INTERRUPT
        config.put(cfg.STATUS, 2, status | (cfg.STATUS_INTERRUPT if self._intx else 0))
        if self._line is not None:
            quiet = (
                bool(config.get(cfg.COMMAND, 2) & cfg.COMMAND_INTX_DISABLE)
                or self.msix_enabled
                or (self.msi is not None and self.msi.enabled)
            )
            self._line.set(self._intx and not quiet)

    def reset(self) -> None:
        self.config.reset()
        if self.msix is not None:
            self.msix.reset()
        self._intx = False
        self._update_intx()
        self.function.reset()
        self.function.messages_changed()

    def state_parts(self) -> Mapping[str, Any]:
        """The component behind the `object` field of its state."""
        return {"function": self._stateful}

    def save(self) -> SlotState:
        return SlotState(
            config=bytes(self.config.data),
            intx=self._intx,
            msix=None if self.msix is None else self.msix.save(),
            function=None if self._stateful is None else self._stateful.save(),
        )

    def check(self, state: SlotState) -> None:
        """StateError unless restore() can take it."""
        if (state.msix is None) != (self.msix is None):
            raise StateError(f"PCI: slot {self.device}: the saved function has {'no ' * (state.msix is None)}MSI-X")
        own = set(range(cfg.STATUS, cfg.STATUS + 2))  # what the device changes although the guest may not
        if self.msi is not None:
            own |= set(self.msi.pending_bytes)
        for offset, mask in enumerate(self.config.mask):
            if offset not in own and (state.config[offset] ^ self.config.data[offset]) & ~mask:
                raise StateError(f"PCI: slot {self.device} held another device when the state was saved")
        if self.msix is not None and state.msix is not None:
            self.msix.check(state.msix)

    def restore(self, state: SlotState) -> None:
        """Registers and MSI-X, after check(); the bus remaps the BARs and then calls restore_function()."""
        self.config.data[:] = state.config
        self._intx = state.intx
        if self.msix is not None and state.msix is not None:
            self.msix.restore(state.msix, self.config)

    def restore_function(self, state: SlotState) -> None:
        """What the function itself keeps."""
        if self._stateful is not None:
            self._stateful.restore(state.function)
        self._update_intx()
