"""ACPI: the tables of one machine. `attach` is the builder's part; other parts tell it what they added.

The tables are written once, right before the first instruction, into reserved memory below 1 MiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import ConfigError
from vmm.machine import layout
from vmm.machine.layout import GENERATION_EVENT, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Set

    from vmm.machine.interfaces import Assembly

__all__ = ["GENERATION_EVENT", "Acpi", "attach"]


class Acpi:
    """What the tables describe. `write(address, bytes)` fills guest memory."""

    def __init__(self, memory: Layout, cpus: int, write: Callable[[int, bytes], None]) -> None:
        self._memory, self._cpus, self._write = memory, cpus, write
        self._virtio_mmio: list[int] = []
        self._terms: list[bytes] = []
        self._events: dict[int, bytes] = {}
        self._present: Set[int] | None = None

    @property
    def rsdp(self) -> int:
        """Guest-physical address of the root pointer."""
        return layout.ACPI.start

    def add_virtio_mmio(self, index: int) -> None:
        """Describe the virtio-mmio window `index` (layout.virtio_mmio). Before start()."""
        layout.virtio_mmio(index)
        self._virtio_mmio.append(index)

    def describe_processors(self, cpus: int, present: Set[int]) -> None:
        """There can be so many processors, and others are present when the guest boots; somebody else's terms describe
        them. Before start()."""
        self._cpus, self._present = cpus, present

    def add_terms(self, *terms: bytes) -> None:
        """More of the definition block, as vmm.acpi.aml encodes it. Before start()."""
        self._terms += terms

    def add_event(self, number: int, *body: bytes) -> None:
        """What the guest does when it hears of general purpose event `number` (vmm.devices.pm.Pm.general_event raises
        it): the body of \\_GPE._Exx. It runs once for any number of events, so what happened stands in registers.
        Before start(). Raises ConfigError if the event is taken."""
        if number in self._events or number == GENERATION_EVENT:
            raise ConfigError(f"ACPI: general purpose event {number} is taken")
        self._events[number] = b"".join(body)

    def tables(self) -> list[tuple[str, int, bytes]]:
        """(signature, guest-physical address, bytes) of every table."""
        from vmm.acpi import tables  # a restored machine has them in its memory
        from vmm.acpi.dsdt import dsdt

        described = self._cpus if self._present is None else 0
        absent = set() if self._present is None else set(range(self._cpus)) - self._present
        body = dsdt(self._memory, described, self._virtio_mmio, self._terms, self._events)
        return tables.place(self._cpus, body, absent)

    def populate(self) -> None:
        """Write all tables. The builder calls it when every part is attached."""
        for _, address, data in self.tables():
            self._write(address, data)


def attach(assembly: Assembly) -> None:
    """Component "acpi", and the root pointer for the boot loader."""
    memory = Layout(assembly.memory.size)
    acpi = Acpi(memory, assembly.config.cpus, assembly.memory.write)
    assembly.add("acpi", acpi)
    assembly.services.acpi = acpi
    assembly.rsdp = acpi.rsdp
