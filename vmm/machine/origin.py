"""How a machine begins: it boots, or it goes on from a saved state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpu.values import dataclass
from vmm.machine.memory import GuestMemory


@dataclass(frozen=True, slots=True)
class Boot:
    """From its configuration: fresh memory, tables and kernel loaded."""


@dataclass(frozen=True, slots=True)
class Restore:
    """From a state that vmm.machine.saving.save() gave, once."""

    state: Any
    """vmm.machine.saving.MachineState, as vmm.state.payload.encode() writes it; the builder parses it."""
    memory: Callable[[], GuestMemory]
    """Makes the memory with its content. Called in a thread."""
    epoch_ns: int
    """The guest's wall clock at its core's time 0, ns since 1970."""


@dataclass(frozen=True, slots=True)
class SavedDisk:
    """What a restored disk starts from: an overlay's data, and the bitmap of the sectors that it holds."""

    path: Path
    sectors: bytes


@dataclass(frozen=True, slots=True)
class Saved:
    """Everything that a machine goes on from."""

    origin: Restore
    disks: Mapping[str, SavedDisk]
    """Overlays by the disk's name."""
    console: Any
    """vmm.console.hub.ConsoleRingState, encoded; None: an empty console."""


Origin = Boot | Restore
BOOT = Boot()
