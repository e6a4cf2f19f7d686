"""What a network card saves, and what earlier versions of it did. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from virtio.backends.learned import PolicyState
from virtio.limits import CARD, LimitState
from virtio.state import U16


@dataclass(frozen=True, slots=True)
class NetStateV1:
    """A network card that has no limits of its own."""

    kind: ClassVar = "virtio-net"
    version: ClassVar = 1
    mac: Annotated[bytes, range(6, 7)]
    link: bool
    pairs: U16


Limits = Annotated[tuple[LimitState, ...], range(len(CARD), len(CARD) + 1)]


@dataclass(frozen=True, slots=True)
class NetFields:
    """What every version from the second on has."""

    mac: Annotated[bytes, range(6, 7)]
    link: bool
    pairs: U16
    limits_in: Limits | None
    """None: those of the configuration."""
    limits_out: Limits | None
    peer_lost: bool
    """The link is down because the other end went away: a machine that goes on elsewhere has another."""


@dataclass(frozen=True, slots=True)
class NetStateV2(NetFields):
    """A network card of which no connections are known."""

    kind: ClassVar = "virtio-net"
    version: ClassVar = 2
    previous: ClassVar = NetStateV1

    @classmethod
    def upgrade(cls, old: NetStateV1) -> Self:
        """Limits were not part of it: those of the configuration stand."""
        return cls(old.mac, old.link, old.pairs, None, None, False)


CONNECTIONS_MAX = 4096
"""That are watched (virtio/native/flows.h)."""
Connections = Annotated[tuple[Annotated[bytes, range(50, 51)], ...], range(CONNECTIONS_MAX + 1)]


@dataclass(frozen=True, slots=True)
class NetStateV3(NetFields):
    """A network card whose policy knows nothing of its guest."""

    kind: ClassVar = "virtio-net"
    version: ClassVar = 3
    previous: ClassVar = NetStateV2
    connections: Connections

    @classmethod
    def upgrade(cls, old: NetStateV2) -> Self:
        """Connections were not part of it."""
        return cls(old.mac, old.link, old.pairs, old.limits_in, old.limits_out, old.peer_lost, ())


@dataclass(frozen=True, slots=True)
class NetState(NetFields):
    """A network card: its address, whether its cable is in, the queue pairs that the driver uses, and the limits of
    frames that come in and go out, in the order of limits.CARD."""

    kind: ClassVar = "virtio-net"
    version: ClassVar = 4
    previous: ClassVar = NetStateV3
    connections: Connections
    """TCP connections that end in the backend: the addresses of each (virtio/native/flows.h)."""
    policy: PolicyState | None
    """What the policy before it knows; None: it has none."""

    @classmethod
    def upgrade(cls, old: NetStateV3) -> Self:
        """What a policy knows was not part of it."""
        return cls(old.mac, old.link, old.pairs, old.limits_in, old.limits_out, old.peer_lost, old.connections, None)
