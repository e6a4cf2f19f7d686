"""Events: who wants to hear of what, and telling them, in the order in which things happened.

A client registers for a kind of event, of one domain or of all, and gets an id that its events carry; the oldest
clients register a kind once and get events without an id. Kinds that never happen here can be registered for all the
same, for clients ask for all there are. Loop thread.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.wire import DomainRef, NetworkRef, PoolRef, Signature

if TYPE_CHECKING:
    from vmm.libvirt.client import Client

MAX_REGISTRATIONS = 1024
"""Of one client."""


class DomainEvent(enum.IntEnum):
    """virDomainEventID: the kinds that clients register for."""

    LIFECYCLE = 0
    REBOOT = 1
    RTC_CHANGE = 2
    WATCHDOG = 3
    IO_ERROR = 4
    GRAPHICS = 5
    IO_ERROR_REASON = 6
    CONTROL_ERROR = 7
    BLOCK_JOB = 8
    DISK_CHANGE = 9
    TRAY_CHANGE = 10
    PMWAKEUP = 11
    PMSUSPEND = 12
    BALLOON_CHANGE = 13
    PMSUSPEND_DISK = 14
    DEVICE_REMOVED = 15
    BLOCK_JOB_2 = 16
    TUNABLE = 17
    AGENT_LIFECYCLE = 18
    DEVICE_ADDED = 19
    MIGRATION_ITERATION = 20
    JOB_COMPLETED = 21
    DEVICE_REMOVAL_FAILED = 22
    METADATA_CHANGE = 23
    BLOCK_THRESHOLD = 24
    MEMORY_FAILURE = 25
    MEMORY_DEVICE_SIZE_CHANGE = 26
    NIC_MAC_CHANGE = 27


class LifecycleEvent(enum.IntEnum):
    """virDomainEventType."""

    DEFINED = 0
    UNDEFINED = 1
    STARTED = 2
    SUSPENDED = 3
    RESUMED = 4
    STOPPED = 5
    SHUTDOWN = 6
    CRASHED = 8


class _Message(NamedTuple):
    """How an event is sent: with an id, and without one to clients that registered the old way."""

    procedure: int
    signature: Signature
    old_procedure: int | None = None
    old_signature: Signature | None = None


_DOMAIN_MESSAGES = {
    DomainEvent.LIFECYCLE: _Message(
        318, Signature("id:int dom:domain event:int detail:int"), 107, Signature("dom:domain event:int detail:int")
    ),
    DomainEvent.REBOOT: _Message(319, Signature("id:int dom:domain"), 169, Signature("dom:domain")),
    DomainEvent.METADATA_CHANGE: _Message(379, Signature("id:int dom:domain type:int uri:string?")),
    DomainEvent.MIGRATION_ITERATION: _Message(359, Signature("id:int dom:domain iteration:int")),
    DomainEvent.JOB_COMPLETED: _Message(363, Signature("id:int dom:domain params:param<64>")),
    DomainEvent.DEVICE_REMOVED: _Message(333, Signature("id:int dom:domain alias:string")),
    DomainEvent.DEVICE_ADDED: _Message(354, Signature("id:int dom:domain alias:string")),
    DomainEvent.DEVICE_REMOVAL_FAILED: _Message(367, Signature("id:int dom:domain alias:string")),
    DomainEvent.BALLOON_CHANGE: _Message(
        331, Signature("id:int dom:domain actual:uhyper"), 276, Signature("dom:domain actual:uhyper")
    ),
    DomainEvent.BLOCK_JOB: _Message(
        326,
        Signature("id:int dom:domain path:string type:int status:int"),
        241,
        Signature("dom:domain path:string type:int status:int"),
    ),
    DomainEvent.BLOCK_JOB_2: _Message(339, Signature("id:int dom:domain target:string type:int status:int")),
    DomainEvent.AGENT_LIFECYCLE: _Message(348, Signature("id:int dom:domain state:int reason:int")),
}
NETWORK_LIFECYCLE, POOL_LIFECYCLE, POOL_REFRESH = "network", "pool", "pool refresh"
_OTHER_MESSAGES = {
    NETWORK_LIFECYCLE: _Message(315, Signature("id:int net:network event:int detail:int")),
    POOL_LIFECYCLE: _Message(370, Signature("id:int pool:pool event:int detail:int")),
    POOL_REFRESH: _Message(373, Signature("id:int pool:pool")),
}


class _Registration(NamedTuple):
    kind: Any
    uuid: bytes | None
    old: bool


class Subscriptions:
    """What one client has registered for."""

    def __init__(self, hub: Hub, client: Client) -> None:
        self._hub, self._client = hub, client
        self._registered: dict[int, _Registration] = {}
        self._next_id = 1

    def add(self, kind: Any, uuid: bytes | None = None, *, old: bool = False) -> int:
        """Register; the id. Raises LibvirtError."""
        if len(self._registered) >= MAX_REGISTRATIONS:
            raise LibvirtError(Code.OPERATION_FAILED, f"this client has {MAX_REGISTRATIONS} registrations")
        number, self._next_id = self._next_id, self._next_id + 1
        self._registered[number] = _Registration(kind, uuid, old)
        return number

    def remove(self, number: int) -> None:
        """Raises LibvirtError for an id that is not registered."""
        if self._registered.pop(number, None) is None:
            raise LibvirtError(Code.INVALID_ARG, f"no event callback has the id {number}")

    def remove_old(self, kind: Any) -> None:
        """Raises LibvirtError if the kind was not registered the old way."""
        for number, registration in self._registered.items():
            if registration.old and registration.kind == kind:
                del self._registered[number]
                return
        raise LibvirtError(Code.INVALID_ARG, f"event {int(kind)} is not registered")

    def tell(self, kind: Any, message: _Message, subject: Any, details: tuple[Any, ...]) -> None:
        """Send the event, once for each registration that it concerns."""
        for number, registration in tuple(self._registered.items()):
            if registration.kind != kind or registration.uuid not in (None, subject.uuid):
                continue
            if not registration.old:
                self._client.send_event(message.procedure, message.signature, (number, subject, *details))
            elif message.old_procedure is not None and message.old_signature is not None:
                self._client.send_event(message.old_procedure, message.old_signature, (subject, *details))

    def drop_all(self) -> None:
        """The client wants no more events."""
        self._registered.clear()

    def close(self) -> None:
        """The client has gone."""
        self.drop_all()
        self._hub.forget(self)


class Hub:
    """All clients' subscriptions."""

    def __init__(self) -> None:
        self._all: dict[Subscriptions, None] = {}

    def subscriptions(self, client: Client) -> Subscriptions:
        """A client's, which it closes."""
        added = Subscriptions(self, client)
        self._all[added] = None
        return added

    def forget(self, subscriptions: Subscriptions) -> None:
        self._all.pop(subscriptions, None)

    def domain(self, kind: DomainEvent, dom: DomainRef, *details: Any) -> None:
        """Something happened to a domain."""
        self._tell(kind, _DOMAIN_MESSAGES[kind], dom, details)

    def lifecycle(self, dom: DomainRef, event: LifecycleEvent, detail: int = 0) -> None:
        """A domain's life took a turn."""
        self.domain(DomainEvent.LIFECYCLE, dom, int(event), detail)

    def other(self, kind: str, subject: NetworkRef | PoolRef, *details: Any) -> None:
        """Something happened to a network or a pool."""
        self._tell(kind, _OTHER_MESSAGES[kind], subject, details)

    def _tell(self, kind: Any, message: _Message, subject: Any, details: tuple[Any, ...]) -> None:
        for subscriptions in tuple(self._all):
            subscriptions.tell(kind, message, subject, details)
