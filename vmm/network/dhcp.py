"""The dynamic host configuration protocol (RFC 2131, options of RFC 2132), the server's side. Sans-I/O.

    server = DhcpServer(plan)
    reply = server.answer(datagram, now)        # None: nothing is to be said
    server.leases(now)                          # who has which address
    server.take_changes()                       # the leases that are new or over since it was asked last

Guests write the datagrams, so everything in them is hostile: what is malformed is dropped, the table holds no more than
the plan has addresses, and an address that was only offered is free again after OFFER_SECONDS.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vmm.errors import ConfigError

BOOTREQUEST, BOOTREPLY = 1, 2
ETHERNET = 1
COOKIE = b"\x63\x82\x53\x63"
OFFER_SECONDS = 60.0
DECLINED_SECONDS = 600.0
"""How long an address is left alone that a guest found in use."""
MAX_ADDRESSES = 1 << 16
MAX_OPTION = 255
_FIXED = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")


class Option(enum.IntEnum):
    """RFC 2132."""

    MASK = 1
    ROUTER = 3
    NAME_SERVER = 6
    HOST_NAME = 12
    DOMAIN = 15
    MTU = 26
    BROADCAST = 28
    REQUESTED = 50
    LEASE_TIME = 51
    KIND = 53
    SERVER = 54
    RENEWAL = 58
    REBINDING = 59
    CLIENT = 61
    END = 255


class DhcpKind(enum.IntEnum):
    """Of a message (RFC 2132, 9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


@dataclass(frozen=True)
class Plan:
    """What one network gives to its guests."""

    address: ipaddress.IPv4Interface
    """The server's own."""
    start: ipaddress.IPv4Address
    end: ipaddress.IPv4Address
    """The last one that is given away."""
    hosts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By MAC: an address that is always that guest's, and a name for it, "" for none."""
    router: bool = True
    """Whether the server is the way to other networks."""
    name_server: bool = True
    """Whether the server answers for names."""
    domain: str = ""
    mtu: int = 0
    """0: the guest's own idea."""
    seconds: int = 3600

    def __post_init__(self) -> None:
        network = self.address.network
        fixed = [ipaddress.IPv4Address(address) for address, _ in self.hosts.values()]
        for address in (self.start, self.end, *fixed):
            if address not in network:
                raise ConfigError(f"dhcp: {address} is not in the network {network}")
        if int(self.end) < int(self.start) or int(self.end) - int(self.start) >= MAX_ADDRESSES:
            raise ConfigError(f"dhcp: {self.start} to {self.end} is not a range of at most {MAX_ADDRESSES} addresses")
        if len(set(fixed)) != len(fixed):
            raise ConfigError("dhcp: two hosts have the same address")


@dataclass
class Lease:
    """An address that a guest has. `expires`: seconds since 1970."""

    mac: str
    address: str
    expires: float
    hostname: str = ""
    client: str = ""
    """The client's identifier, in hexadecimal digits with colons."""


@dataclass(frozen=True)
class _Message:
    kind: int
    xid: int
    flags: int
    current: bytes
    relay: bytes
    hardware: bytes
    mac: str
    options: dict[int, bytes]


def parse(data: bytes) -> _Message | None:
    """A client's message; None if it is none that concerns a server on this network."""
    if len(data) < _FIXED.size:
        return None
    op, kind, length, _, xid, _, flags, current, _, _, relay, hardware, _, _, cookie = _FIXED.unpack_from(data)
    if op != BOOTREQUEST or kind != ETHERNET or length != 6 or cookie != COOKIE or hardware[0] & 1:
        return None
    options: dict[int, bytes] = {}
    at = _FIXED.size
    while at < len(data) and data[at] != Option.END:
        if data[at] == 0:  # padding
            at += 1
            continue
        if at + 1 >= len(data) or at + 2 + data[at + 1] > len(data):
            return None
        options[data[at]] = options.get(data[at], b"") + data[at + 2 : at + 2 + data[at + 1]]  # RFC 3396
        at += 2 + data[at + 1]
    found = options.get(Option.KIND, b"")
    if len(found) != 1:
        return None
    mac = ":".join(f"{byte:02x}" for byte in hardware[:6])
    return _Message(found[0], xid, flags, current, relay, hardware, mac, options)


class DhcpServer:
    """The addresses of one network and who has them."""

    def __init__(self, plan: Plan, known: Iterable[Lease] = ()) -> None:
        """`known`: the leases that a server before this one gave."""
        self.plan = plan
        self._leases: dict[str, Lease] = {}
        self._offers: dict[str, Lease] = {}
        self._declined: dict[str, float] = {}
        self._changes: dict[str, Lease] = {}
        for lease in known:
            self._leases[lease.mac] = lease

    def leases(self, now: float) -> list[Lease]:
        """Those that hold."""
        return [lease for lease in self._leases.values() if lease.expires > now]

    def take_changes(self) -> list[Lease]:
        """What became of leases since the last call: at most one for each guest, which expired in 1970 if it is over. A
        lease that was renewed to the same second is none."""
        changes, self._changes = list(self._changes.values()), {}
        return changes

    def replan(self, plan: Plan) -> None:
        """Other hosts or another range from now on; who has an address that it may keep keeps it."""
        self.plan = plan

    def answer(self, data: bytes, now: float) -> bytes | None:
        """What to broadcast to the client that sent this."""
        message = parse(data)
        if message is None or message.relay != bytes(4):
            return None
        match message.kind:
            case DhcpKind.DISCOVER:
                return self._discovered(message, now)
            case DhcpKind.REQUEST:
                return self._requested(message, now)
            case DhcpKind.DECLINE:
                self._refused(message, now)
            case DhcpKind.RELEASE:
                self._released(message)
            case DhcpKind.INFORM:
                return self._reply(message, DhcpKind.ACK, bytes(4), message.current)
        return None

    # Inside.

    def _discovered(self, message: _Message, now: float) -> bytes | None:
        address = self._choose(message, now)
        if address is None:
            return None
        self._offers[message.mac] = Lease(message.mac, address, now + OFFER_SECONDS)
        return self._reply(message, DhcpKind.OFFER, ipaddress.IPv4Address(address).packed)

    def _requested(self, message: _Message, now: float) -> bytes | None:
        chosen = message.options.get(Option.SERVER)
        if chosen is not None and chosen != self.plan.address.ip.packed:
            self._offers.pop(message.mac, None)  # another server's offer was taken
            return None
        wanted = message.options.get(Option.REQUESTED, message.current)
        if len(wanted) != 4:
            return None
        address = str(ipaddress.IPv4Address(wanted))
        if address != self._choose(message, now):
            # The only server of its network may refuse what it knows nothing of (4.3.2).
            return self._reply(message, DhcpKind.NAK, bytes(4))
        self._offers.pop(message.mac, None)
        name = message.options.get(Option.HOST_NAME, b"")
        client = message.options.get(Option.CLIENT, b"")
        lease = Lease(
            message.mac,
            address,
            now + self.plan.seconds,
            _host_name(name) or self.plan.hosts.get(message.mac, ("", ""))[1],
            ":".join(f"{byte:02x}" for byte in client[:64]),
        )
        before = self._leases.get(message.mac)
        if before is None or replace(before, expires=int(before.expires)) != replace(lease, expires=int(lease.expires)):
            self._leases[message.mac] = self._changes[message.mac] = lease
        return self._reply(message, DhcpKind.ACK, ipaddress.IPv4Address(address).packed)

    def _refused(self, message: _Message, now: float) -> None:
        wanted = message.options.get(Option.REQUESTED, b"")
        lease = self._leases.get(message.mac)
        if lease is not None and len(wanted) == 4 and str(ipaddress.IPv4Address(wanted)) == lease.address:
            self._end(lease)
            self._declined[lease.address] = now + DECLINED_SECONDS

    def _released(self, message: _Message) -> None:
        lease = self._leases.get(message.mac)
        if lease is not None and ipaddress.IPv4Address(lease.address).packed == message.current:
            self._end(lease)

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.mac]
        self._changes[lease.mac] = replace(lease, expires=0.0)

    def _choose(self, message: _Message, now: float) -> str | None:
        """The one address that this client may have now: its own, the one that it had, the one that it asks for, or a
        free one."""
        if message.mac in self.plan.hosts:
            return self.plan.hosts[message.mac][0]
        taken = self._taken(message.mac, now)
        wanted = message.options.get(Option.REQUESTED, b"")
        before = [table[message.mac].address for table in (self._leases, self._offers) if message.mac in table]
        if len(wanted) == 4:
            before.append(str(ipaddress.IPv4Address(wanted)))
        for address in before:
            if self.plan.start <= ipaddress.IPv4Address(address) <= self.plan.end and address not in taken:
                return address
        first, count = int(self.plan.start), int(self.plan.end) - int(self.plan.start) + 1
        # A guest without a lease gets the same address again, if it is free.
        begin = int.from_bytes(hashlib.sha256(message.hardware[:6]).digest()[:4]) % count
        for step in range(count):
            address = str(ipaddress.IPv4Address(first + (begin + step) % count))
            if address not in taken:
                return address
        return None

    def _taken(self, mac: str, now: float) -> set[str]:
        """Addresses that are others', or nobody's; forgets what has expired."""
        for table in (self._leases, self._offers):
            for other in [key for key, lease in table.items() if lease.expires <= now]:
                if table is self._offers or len(self._leases) > MAX_ADDRESSES:
                    del table[other]
        self._declined = {address: until for address, until in self._declined.items() if until > now}
        network = self.plan.address.network
        taken = {str(self.plan.address.ip), str(network.network_address), str(network.broadcast_address)}
        taken |= self._declined.keys()
        taken |= {address for owner, (address, _) in self.plan.hosts.items() if owner != mac}
        for table in (self._leases, self._offers):
            taken |= {lease.address for other, lease in table.items() if other != mac and lease.expires > now}
        return taken

    def _reply(self, message: _Message, kind: DhcpKind, yours: bytes, current: bytes = bytes(4)) -> bytes:
        plan = self.plan
        server = plan.address.ip.packed
        options: list[tuple[int, bytes]] = [(Option.KIND, bytes([kind])), (Option.SERVER, server)]
        if kind != DhcpKind.NAK:
            network = plan.address.network
            if yours != bytes(4):
                options += [
                    (Option.LEASE_TIME, struct.pack("!I", plan.seconds)),
                    (Option.RENEWAL, struct.pack("!I", plan.seconds // 2)),
                    (Option.REBINDING, struct.pack("!I", plan.seconds * 7 // 8)),
                ]
            options += [(Option.MASK, network.netmask.packed), (Option.BROADCAST, network.broadcast_address.packed)]
            if plan.router:
                options.append((Option.ROUTER, server))
            if plan.name_server:
                options.append((Option.NAME_SERVER, server))
            if plan.domain:
                options.append((Option.DOMAIN, plan.domain.encode()[:MAX_OPTION]))
            if plan.mtu:
                options.append((Option.MTU, struct.pack("!H", plan.mtu)))
            name = plan.hosts.get(message.mac, ("", ""))[1]
            if name:
                options.append((Option.HOST_NAME, name.encode()[:MAX_OPTION]))
        head = _FIXED.pack(
            BOOTREPLY, ETHERNET, 6, 0, message.xid, 0, message.flags & 0x8000, current, yours, server, bytes(4),
            message.hardware, b"", b"", COOKIE,
        )  # fmt: skip
        body = b"".join(bytes([code, len(value)]) + value for code, value in options) + bytes([Option.END])
        return (head + body).ljust(300, b"\0")  # BOOTP's smallest, which old relays and clients want


def _host_name(data: bytes) -> str:
    """A guest's name for itself, as far as it is one."""
    text = data[:63].decode("ascii", "replace").rstrip("\0").partition(".")[0]
    return text if text and all(char.isalnum() or char == "-" for char in text) and text.isascii() else ""


def plan_from(values: Mapping[str, Any]) -> Plan:
    """A plan from what `plan_values` made. Raises ConfigError."""
    try:
        return Plan(
            address=ipaddress.IPv4Interface(values["address"]),
            start=ipaddress.IPv4Address(values["start"]),
            end=ipaddress.IPv4Address(values["end"]),
            hosts={str(mac): (str(address), str(name)) for mac, (address, name) in values["hosts"].items()},
            router=bool(values["router"]),
            name_server=bool(values["name_server"]),
            domain=str(values["domain"]),
            mtu=int(values["mtu"]),
            seconds=int(values["seconds"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"dhcp: no plan: {error}") from error


def plan_values(plan: Plan) -> dict[str, Any]:
    """As JSON."""
    return {
        "address": str(plan.address),
        "start": str(plan.start),
        "end": str(plan.end),
        "hosts": {mac: list(host) for mac, host in plan.hosts.items()},
        "router": plan.router,
        "name_server": plan.name_server,
        "domain": plan.domain,
        "mtu": plan.mtu,
        "seconds": plan.seconds,
    }
