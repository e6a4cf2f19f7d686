"""What a PCI function and the bus that it sits on promise each other: the function's declarations, and two Protocols.

virtio's PCI transport is a function, and so are the bus' own devices; a PCI layer implements PciHost. All of it is
confined to the loop thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class BarSpec:
    """One base address register: kind and size (a power of two, bytes)."""

    index: int
    size: int
    kind: Literal["mem32", "mem64", "io"] = "mem32"
    prefetchable: bool = False


@dataclass(frozen=True, slots=True)
class MsixSpec:
    """Where a function's MSI-X table and pending bits are. The PCI layer emulates both."""

    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int


class PciHost(Protocol):
    """What a PCI function gets from the bus it sits on."""

    def signal_msix(self, vector: int) -> None:
        """Send, or set pending if the vector or the function is masked; nothing while MSI-X is off."""

    def msix_message(self, vector: int) -> tuple[int, int] | None:
        """(address, data) of the message that signal_msix would send now; None if it would send nothing."""

    @property
    def msix_enabled(self) -> bool:
        """The guest has switched MSI-X on."""

    def set_intx(self, level: bool) -> None:
        """Raise or lower the function's interrupt pin."""

    def bar_address(self, index: int) -> int | None:
        """Where the BAR decodes now; None while decoding is off."""

    def ioeventfd(
        self,
        space: Any,
        address: int,
        size: int,
        match: int | None,
        callback: Callable[[], None],
        answerer: object = None,
    ) -> Callable[[], None]:
        """Call `callback` when the guest writes `match` (None: anything) to an address within a BAR: `size` bytes, in
        space 0 (ports) or 1 (memory), the values of cpu.contract.Space. `answerer`, a capsule (native/answerer.h), may
        be asked first, on the vCPU's thread. Returns what undoes it."""


class PciFunction(Protocol):
    """One PCI function, as a device describes itself. One that has a state also has `state_type`, `save` and
    `restore`."""

    vendor_id: int
    device_id: int
    revision: int
    class_code: int
    """24 bits: class, subclass, programming interface."""
    subsystem_vendor_id: int
    subsystem_id: int
    bars: Sequence[BarSpec]
    capabilities: Sequence[bytes]
    """Bodies: capability id, a byte for the next pointer (filled by the PCI layer), the rest."""
    msix: MsixSpec | None

    def attach(self, host: PciHost) -> None:
        """The function is on this bus from now on."""

    def bar_read(self, index: int, offset: int, size: int) -> int:
        """A read of `size` bytes at an offset into the BAR."""

    def bar_write(self, index: int, offset: int, size: int, value: int) -> None:
        """A write, likewise."""

    def messages_changed(self) -> None:
        """What `msix_message` says may have changed."""

    def bars_changed(self) -> None:
        """A BAR moved, or decoding went on or off (drop and redo ioeventfds)."""

    def config_read(self, offset: int, size: int) -> int | None:
        """A capability register with behaviour (virtio's PCI access window); None: plain configuration space."""

    def config_write(self, offset: int, size: int, value: int) -> bool:
        """True: consumed."""

    def capability_placed(self, capability: int, offset: int) -> None:
        """Capability number `capability` stands at this configuration-space offset."""

    def reset(self) -> None:
        """The bus was reset."""
