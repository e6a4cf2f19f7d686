"""How a machine begins: it boots, or it goes on from a saved state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu.values import dataclass
from vmm.machine.memory import GuestMemory

if TYPE_CHECKING:
    from vmm.guest.identity import Identity


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
    seed: int | None = None
    """Chance goes on from another seed than the saved machine's."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """From a state that is still on its way: the machine is built like it, with empty memory, and waits."""

    epoch_ns: int
    """The guest's wall clock at its core's time 0, ns since 1970."""


@dataclass(frozen=True, slots=True)
class ArrivingDisk:
    """A disk that is still another's: its files are opened, but neither locked nor written."""

    exclusive: bool
    """Somebody else has its lock; if not, it is no shared file."""


@dataclass(frozen=True, slots=True)
class SavedDisk:
    """What a restored disk starts from: an overlay's data, and the bitmap of the sectors that it holds."""

    path: Path
    sectors: bytes


@dataclass(frozen=True, slots=True)
class Touched:
    """Pages that a restored machine used first. Later restores of the same snapshot read them ahead."""

    pages: bytes | None
    """A bitmap over all of RAM, region after region in whole 64-bit words; None: not recorded yet."""
    record: Callable[[bytes], None]
    """Keep such a bitmap. Blocks."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Everything that a machine goes on from."""

    origin: Restore | Arrival
    disks: Mapping[str, SavedDisk | ArrivingDisk]
    """Overlays by the disk's name, and disks that are to be taken later."""
    console: Any
    """vmm.console.hub.ConsoleRingState, encoded; None: an empty console."""
    identity: Identity | None = None
    """Who the machine is as a copy of the saved one; None: it is the same machine to the last bit."""
    source: str = ""
    """Where it came from, for people."""
    touched: Touched | None = None


Origin = Boot | Restore | Arrival
BOOT = Boot()
