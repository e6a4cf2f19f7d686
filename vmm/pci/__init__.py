"""PCI: bus 0 with its host bridge, configuration space, BARs and interrupts. `attach` is the builder's part."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vmm.machine import layout

if TYPE_CHECKING:
    from cpu.contract import Vm
    from vmm.machine.interfaces import Assembly


def level_trigger(vm: Vm) -> None:
    """What firmware does for guests that use the PIC: the SCI and PCI's interrupts are level-triggered there (ELCR,
    EISA; 82371SB 2.5.1), so that functions can share one."""
    state = vm.state()
    elcr = state.pic_slave.elcr
    for gsi in {layout.SCI_GSI, *layout.PCI_INTX_GSIS}:
        elcr |= 1 << gsi - 8
    vm.set_state(replace(state, pic_slave=replace(state.pic_slave, elcr=elcr)))


def attach(assembly: Assembly) -> None:
    """The bus, as component "pci"; later parts add their functions to it with `services.pci.add(function)`."""
    from vmm.pci.bus import PciBus

    bus = PciBus(assembly.board)
    bus.attach(assembly.services.reset)
    assembly.add("pci", bus)
    assembly.services.pci = bus
