"""VM generation ID: 16 bytes that change when a machine is resumed from a snapshot or cloned, so that the guest
reseeds its random number generator.

Specification: Virtual Machine Generation ID (Microsoft, 2012). The DSDT gives the address; general purpose event 5 says
that the value changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

from cpu.values import dataclass
from virtio.protocols import RandomSource
from vmm.devices.pm import Pm
from vmm.machine import layout
from vmm.machine.interfaces import Assembly

SIZE = 16


@dataclass(frozen=True, slots=True)
class GenerationState:
    """The identifier."""

    kind: ClassVar = "generation-id"
    version: ClassVar = 1
    value: Annotated[bytes, range(SIZE, SIZE + 1)]


class GenerationId:
    """`populate` writes the first value, `renew` a new one with the event."""

    state_type = GenerationState

    def __init__(self, write: Callable[[int, bytes], None], random: RandomSource, pm: Pm) -> None:
        self._write, self._random, self._pm = write, random, pm
        self._value = random(SIZE)

    def populate(self) -> None:
        """Write the value."""
        self._write(layout.VM_GENERATION_ID, self._value)

    def renew(self) -> None:
        """The machine goes on from a state that may go on elsewhere too."""
        self._value = self._random(SIZE)
        self.populate()
        self._pm.general_event(layout.GENERATION_EVENT)

    def save(self) -> GenerationState:
        return GenerationState(self._value)

    def restore(self, state: GenerationState) -> None:
        """The same machine goes on (a migration): no new value. A clone calls renew() afterwards."""
        self._value = state.value
        self.populate()


def attach(assembly: Assembly) -> None:
    assert assembly.services.pm is not None
    device = GenerationId(assembly.memory.write, assembly.board.random, assembly.services.pm)
    assembly.add("generation-id", device)
    assembly.services.generation_id = device
