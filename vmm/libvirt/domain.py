"""One domain: its definition, what it runs with, and the states and reasons in which it can be. Loop thread."""

from __future__ import annotations

import asyncio
import enum
import uuid
from typing import Any, NamedTuple

from vmm.libvirt.errors import Code, LibvirtError, not_running
from vmm.libvirt.format import Live, domain_xml
from vmm.libvirt.spec import Spec
from vmm.libvirt.wire import DomainRef
from vmm.management.registry import RegistryEntry


class DomainState(enum.IntEnum):
    """virDomainState."""

    RUNNING = 1
    PAUSED = 3
    SHUTDOWN = 4
    SHUTOFF = 5
    CRASHED = 6


class DomainReason(enum.IntEnum):
    """virDomainRunningReason, virDomainPausedReason and virDomainShutoffReason, as far as they happen here."""

    UNKNOWN = 0
    BOOTED = 1
    FROM_ANOTHER_HOST = 2
    RESTORED = 3
    UNPAUSED = 5
    BY_USER = 1
    STARTING_UP = 11
    WAS_SHUTDOWN = 1
    WAS_DESTROYED = 2
    WAS_CRASHED = 3
    WAS_MIGRATED = 4
    WAS_SAVED = 5
    WAS_FAILED = 6
    WAS_FROM_SNAPSHOT = 7
    WITH_DAEMON = 8


ENDS = {
    "shutdown": (DomainReason.WAS_SHUTDOWN, 0),
    "reset": (DomainReason.WAS_SHUTDOWN, 0),
    "exit": (DomainReason.WAS_SHUTDOWN, 0),
    "halted": (DomainReason.WAS_SHUTDOWN, 0),
    "killed": (DomainReason.WAS_DESTROYED, 1),
    "signal": (DomainReason.WAS_DESTROYED, 1),
    "crash": (DomainReason.WAS_CRASHED, 2),
    "migrated": (DomainReason.WAS_MIGRATED, 3),
    "triple-fault": (DomainReason.WAS_CRASHED, 2),
    "guest-error": (DomainReason.WAS_CRASHED, 2),
}
"""By how a machine ended: virDomainShutoffReason and virDomainEventStoppedDetailType. Everything else has failed."""
FAILED = (DomainReason.WAS_FAILED, 5)


class How(NamedTuple):
    """How a machine came to run: virDomainRunningReason and virDomainEventStartedDetailType."""

    reason: int
    detail: int


BOOTED, RESTORED, FROM_SNAPSHOT = How(1, 0), How(3, 2), How(4, 3)
GUEST_SHUTDOWN = 1
"""virDomainEventShutdownDetailType: the guest did it."""
STARTED_MIGRATED = 1
"""virDomainEventStartedDetailType."""


class Domain:
    """One domain."""

    def __init__(self, name: str, identity: uuid.UUID) -> None:
        self.name = name
        self.uuid = identity
        self.persistent: Spec | None = None
        self.live: Spec | None = None
        """What it runs with; None while it does not."""
        self.id = -1
        self.core = ""
        self.state = DomainState.SHUTOFF
        self.reason: int = DomainReason.UNKNOWN
        self.updated = False
        """The definition was changed while it runs."""
        self.entry: RegistryEntry | None = None
        self.pid = 0
        self.end: str | None = None
        """Why it ended last."""
        self.lock = asyncio.Lock()
        """Held by whoever starts or ends it."""
        self.follower: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()
        self.extra: dict[str, Any] = {}
        """Of the present run: what other modules remember (console holders, a job)."""

    @property
    def active(self) -> bool:
        return self.live is not None

    @property
    def ref(self) -> DomainRef:
        """As clients know it."""
        return DomainRef(self.name, self.uuid.bytes, self.id)

    @property
    def spec(self) -> Spec:
        """What it runs with, else what is defined. Raises LibvirtError: a transient domain that ended meanwhile."""
        spec = self.live or self.persistent
        if spec is None:
            raise LibvirtError(Code.NO_DOMAIN, f"no domain with matching name '{self.name}': it has ended")
        return spec

    def xml(self, emulator: str, *, inactive: bool = False) -> str:
        """Its XML; `inactive`: what the next start will use. Raises LibvirtError: it is gone."""
        if self.live is not None and not (inactive and self.persistent is not None):
            return domain_xml(self.live, emulator, None if inactive else Live(self.id, self.core))
        return domain_xml(self.persistent or self.spec, emulator)

    def running_entry(self) -> RegistryEntry:
        """Raises LibvirtError if it does not run."""
        if self.entry is None or self.live is None:
            raise not_running()
        return self.entry
