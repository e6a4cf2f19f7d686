"""PCI: bus 0 with its host bridge, configuration space, BARs and interrupts. `attach` is the builder's part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.interfaces import Assembly


def attach(assembly: Assembly) -> None:
    """The bus, as component "pci"; later parts add their functions to it with `get("pci").add(function)`."""
    from vmm.pci.bus import PciBus

    bus = PciBus(assembly.machine)
    bus.attach(assembly.get("reset"))
    assembly.add("pci", bus)
