"""What a machine tells those who follow `VirtualMachine.events()`: frozen values, one class per kind."""

from __future__ import annotations

import asyncio

from cpu.values import dataclass
from vmm.lifecycle import Outcome, State


@dataclass(frozen=True, slots=True)
class StateChanged:
    state: State


@dataclass(frozen=True, slots=True)
class Rebooted:
    """The guest rebooted and the machine was started again in place."""

    detail: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that a person should hear about; the machine goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Migrating:
    """How far a migration has come; bytes and bytes a second."""

    phase: str
    """One of vmm.migration.precopy.PHASES."""
    sent: int
    remaining: int
    rate: int
    dirty_rate: int
    rounds: int
    throttle: int
    """Per cent of the time that vCPUs are kept from running."""
    expected_downtime_ms: int
    downtime_ms: int = 0
    """How long the machine stood still, once it runs at the other side."""


@dataclass(frozen=True, slots=True)
class ConsoleBreak:
    """The guest sent a break on its serial line."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A device came."""

    id: str
    kind: str
    """disk or net."""
    slot: int
    """Its device number on the PCI bus."""


@dataclass(frozen=True, slots=True)
class Detached:
    """A device is gone, and its file or network is free."""

    id: str
    by: str
    """guest: it gave the device up, asked or not; force: the device was pulled."""


@dataclass(frozen=True, slots=True)
class DetachRefused:
    """The guest did not give up a device that it was asked for; the device stays."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class DiskJobChanged:
    """A job on a disk went on, or is over."""

    disk: str
    kind: str
    """commit, stream or mirror."""
    state: str
    """running, ready (a mirror that follows every write), done, cancelled or failed."""
    done: int
    """Bytes."""
    total: int
    detail: str = ""
    """Why it failed."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event."""

    outcome: Outcome


Event = (
    StateChanged
    | Rebooted
    | Warned
    | ConsoleBreak
    | Attached
    | Detached
    | DetachRefused
    | DiskJobChanged
    | Migrating
    | Ended
)
QUEUE_LIMIT = 1024
"""Events kept for a follower that does not fetch them; then the oldest go."""


class EventStream:
    """An async iterator of events; ends after `Ended`."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._over = False

    def put(self, event: Event) -> None:
        """Add an event; the oldest goes if nobody fetches them."""
        if self._queue.qsize() >= QUEUE_LIMIT:
            self._queue.get_nowait()
        self._queue.put_nowait(event)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        event = await self._queue.get()
        self._over = isinstance(event, Ended)
        return event
