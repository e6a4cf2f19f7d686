"""A network's definition: its XML both ways, and the changes that clients make to it piece by piece. Pure."""

from __future__ import annotations

import ipaddress
import os
import re
import uuid
from dataclasses import dataclass, field, replace
from xml.etree.ElementTree import Element

from vmm.errors import ConfigError
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.wire import NetworkRef
from vmm.libvirt.xmltree import Reader, add, malformed, parse, serialise, unsupported
from vmm.network.bridge import NAME as INTERFACE
from vmm.network.bridge import Bridge
from vmm.network.dhcp import Plan

NAME = re.compile(r"[^/\0.\s][^/\0\n]{0,49}")
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
DOMAIN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?")
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
MODES = ("nat", "route", "open", "bridge")
UNITS = {"seconds": 1, "minutes": 60, "hours": 3600}
MAX_HOSTS = 4096


@dataclass(frozen=True)
class HostEntry:
    """A guest that always has the same address."""

    mac: str
    address: str
    name: str = ""


@dataclass(frozen=True)
class NetworkSpec:
    """One definition."""

    name: str
    uuid: uuid.UUID
    title: str = ""
    mode: str = ""
    """nat, route, open: a bridge of ours; bridge: one that the host has; "": a bridge of ours, cut off."""
    bridge: str = ""
    """Its name; "": one is chosen when the network is defined."""
    mac: str = ""
    stp: bool = True
    delay: int = 0
    mtu: int = 0
    domain: str = ""
    domain_local: bool = False
    names: bool = True
    """Whether the guests' questions for names are passed on, where they reach other networks."""
    address: ipaddress.IPv4Interface | None = None
    ranges: tuple[tuple[str, str], ...] = ()
    hosts: tuple[HostEntry, ...] = ()
    seconds: int = 3600
    dhcp: bool = False
    metadata: str = field(default="", compare=False)

    @property
    def ref(self) -> NetworkRef:
        """As clients know it."""
        return NetworkRef(self.name, self.uuid.bytes)

    @property
    def host_bridge(self) -> Bridge | None:
        """What it is on the host; None: a bridge that others made."""
        if self.mode == "bridge":
            return None
        return Bridge(self.bridge, self.uuid, self.mac, self.mode, self.address, self.stp, self.delay, self.mtu)

    def plan(self) -> Plan | None:
        """What its guests are given; None: it has no address to serve from. Raises ConfigError."""
        routed = self.mode in ("nat", "route", "open")
        # Who is cut off asks nobody outside for names either.
        if self.address is None or not (self.dhcp or (self.names and routed)):
            return None
        start, end = self.ranges[0] if self.ranges else (str(self.address.ip), str(self.address.ip))
        return Plan(
            address=self.address,
            start=ipaddress.IPv4Address(start),
            end=ipaddress.IPv4Address(end),
            hosts={host.mac: (host.address, host.name) for host in self.hosts},
            router=routed,
            name_server=self.names and routed,
            domain=self.domain,
            mtu=self.mtu,
            seconds=self.seconds,
        )

    def xml(self, connections: int = 0) -> str:
        """As libvirt writes it."""
        root = Element("network", {"connections": str(connections)} if connections else {})
        add(root, "name", self.name)
        add(root, "uuid", str(self.uuid))
        if self.title:
            add(root, "title", self.title)
        if self.metadata:
            root.append(parse(f"<metadata>{self.metadata}</metadata>", "metadata"))
        if self.mode:
            add(root, "forward", mode=self.mode)
        if self.mode == "bridge":
            add(root, "bridge", name=self.bridge)
            return serialise(root)
        if self.bridge:
            add(root, "bridge", name=self.bridge, stp="on" if self.stp else "off", delay=self.delay)
        if self.mtu:
            add(root, "mtu", size=self.mtu)
        if self.mac:
            add(root, "mac", address=self.mac)
        if self.domain:
            add(root, "domain", name=self.domain, localOnly="yes" if self.domain_local else None)
        if not self.names:
            add(root, "dns", enable="no")
        if self.address is not None:
            self._address(root, self.address)
        return serialise(root)

    def _address(self, root: Element, address: ipaddress.IPv4Interface) -> None:
        element = add(root, "ip", address=str(address.ip), netmask=str(address.netmask))
        if not self.dhcp:
            return
        dhcp = add(element, "dhcp")
        for start, end in self.ranges:
            item = add(dhcp, "range", start=start, end=end)
            if self.seconds != 3600:
                add(item, "lease", expiry=self.seconds, unit="seconds")
        for host in self.hosts:
            add(dhcp, "host", mac=host.mac, name=host.name or None, ip=host.address)


def read_network(text: str) -> NetworkSpec:
    """A definition. Raises LibvirtError for what is wrong, and for what is not here."""
    root = Reader(parse(text, "network"))
    root.ignore("connections", "ipv6", "trustGuestRxFilters")
    name_part, uuid_part = root.child("name"), root.child("uuid")
    name = name_part.text() if name_part is not None else ""
    if not NAME.fullmatch(name):
        raise malformed(f"<network>: {name!r} is no name; it has 1 to 50 characters and no '/'")
    try:
        identity = uuid.UUID(uuid_part.text()) if uuid_part is not None else uuid.uuid4()
    except ValueError:
        raise malformed("<network/uuid>: malformed uuid element") from None
    spec = NetworkSpec(name, identity)
    if title := root.child("title"):
        spec = replace(spec, title=title.text())
    if metadata := root.child("metadata"):
        metadata.take_all()
        spec = replace(spec, metadata="".join(serialise(child) for child in metadata.element))
    spec = _forward(root, spec)
    spec = _bridge(root, spec)
    if domain := root.child("domain"):
        spec = replace(
            spec,
            domain=domain.needed("name"),
            domain_local=domain.choice("localOnly", ("yes", "no"), "no") == "yes",
        )
        if not DOMAIN.fullmatch(spec.domain):
            raise malformed(f"<domain name='{spec.domain}'>: no domain's name")
    if dns := root.child("dns"):
        spec = replace(spec, names=dns.choice("enable", ("yes", "no"), "yes") == "yes")
    addresses = list(root.children("ip"))
    if len(addresses) > 1:
        raise unsupported("<network>: a network has one <ip> here")
    for address in addresses:
        spec = _address(address, spec)
    root.done()
    if spec.mode == "bridge" and addresses:
        raise unsupported("<forward mode='bridge'>: the host's bridge has the host's addresses; leave <ip> out")
    if spec.mode in ("nat", "route") and spec.address is None:
        raise malformed(f"<forward mode='{spec.mode}'>: <ip> is missing")
    checked(spec)
    return spec


def checked(spec: NetworkSpec) -> NetworkSpec:
    """Raises LibvirtError if its addresses do not fit each other."""
    try:
        spec.plan()
    except (ConfigError, ValueError) as error:
        raise malformed(f"<network {spec.name}>: {error}") from error
    return spec


def _forward(root: Reader, spec: NetworkSpec) -> NetworkSpec:
    forward = root.child("forward")
    if forward is None:
        return spec
    mode = forward.choice("mode", MODES, "nat") or "nat"
    if (nat := forward.child("nat")) and (port := nat.child("port")):
        # The whole range of ports is what translation takes anyway.
        port.choice("start", ("1024",))
        port.choice("end", ("65535",))
    return replace(spec, mode=mode)


def _bridge(root: Reader, spec: NetworkSpec) -> NetworkSpec:
    if bridge := root.child("bridge"):
        name = bridge.attribute("name", "") or ""
        if name and "%d" not in name and not INTERFACE.fullmatch(name):
            raise malformed(f"<bridge name='{name}'>: an interface's name has 1 to 15 letters, digits, '-', '_' or '.'")
        spec = replace(spec, bridge="" if "%d" in name else name)
        if spec.mode != "bridge":
            spec = replace(
                spec,
                stp=bridge.choice("stp", ("on", "off"), "on") == "on",
                delay=_number(bridge, "delay", 0, 30),
            )
    if spec.mode == "bridge" and not spec.bridge:
        raise malformed("<forward mode='bridge'>: <bridge name='…'/> is missing")
    if mtu := root.child("mtu"):
        spec = replace(spec, mtu=_number(mtu, "size", 68, 65535))
    if mac := root.child("mac"):
        address = mac.needed("address").lower()
        if not MAC.fullmatch(address) or int(address[:2], 16) & 1:
            raise malformed(f"<mac address='{address}'>: no unicast MAC address")
        spec = replace(spec, mac=address)
    if not spec.mac and spec.mode != "bridge":
        spec = replace(spec, mac="52:54:00:" + ":".join(f"{byte:02x}" for byte in os.urandom(3)))
    return spec


def _number(item: Reader, name: str, low: int, high: int) -> int:
    text = item.attribute(name, str(low)) or ""
    if not re.fullmatch(r"[0-9]{1,6}", text) or not low <= int(text) <= high:
        raise malformed(f"<{item.path} {name}='{text}'>: {low} to {high} is allowed")
    return int(text)


def _address(item: Reader, spec: NetworkSpec) -> NetworkSpec:
    item.choice("family", ("ipv4",))
    address, mask, prefix = item.needed("address"), item.attribute("netmask"), item.attribute("prefix")
    item.choice("localPtr", ("no",))
    try:
        found = ipaddress.IPv4Interface(f"{address}/{mask or prefix or 24}")
        if found.network.prefixlen > 30:
            raise ValueError("a network of at least four addresses is needed")
    except ValueError as error:
        raise unsupported(f"<ip address='{address}'>: {error}; networks here are IPv4") from None
    spec = replace(spec, address=found)
    dhcp = item.child("dhcp")
    if dhcp is None:
        return spec
    ranges = []
    for one in dhcp.children("range"):
        ranges.append((one.needed("start"), one.needed("end")))
        if lease := one.child("lease"):
            unit = UNITS[lease.choice("unit", tuple(UNITS), "minutes") or "minutes"]
            spec = replace(spec, seconds=max(_number(lease, "expiry", 0, 999_999) * unit, 120))
    if len(ranges) > 1:
        raise unsupported("<dhcp>: one <range> is given away here")
    hosts = tuple(read_host(host) for host in dhcp.children("host"))
    if len(hosts) > MAX_HOSTS:
        raise malformed(f"<dhcp>: {len(hosts)} hosts; at most {MAX_HOSTS} are taken")
    return replace(spec, ranges=tuple(ranges), hosts=hosts, dhcp=True)


def read_host(item: Reader) -> HostEntry:
    """<host mac ip name>. Raises LibvirtError."""
    mac, name = item.needed("mac").lower(), item.attribute("name", "") or ""
    address = item.needed("ip")
    if not MAC.fullmatch(mac):
        raise malformed(f"<host mac='{mac}'>: no MAC address")
    if name and not HOST_NAME.fullmatch(name):
        raise malformed(f"<host name='{name}'>: no host's name")
    try:
        return HostEntry(mac, str(ipaddress.IPv4Address(address)), name)
    except ValueError:
        raise malformed(f"<host ip='{address}'>: no IPv4 address") from None


MODIFY, DELETE, ADD_LAST, ADD_FIRST = 1, 2, 3, 4
"""virNetworkUpdateCommand."""
SECTION_HOST, SECTION_RANGE = 4, 5
"""virNetworkUpdateSection: the two that change here."""


def updated(spec: NetworkSpec, command: int, section: int, text: str) -> NetworkSpec:
    """With one host or the range changed. Raises LibvirtError."""
    if spec.address is None:
        text = f"network '{spec.name}' has no <ip>, so it gives no addresses"
        raise LibvirtError(Code.OPERATION_INVALID, text, From.NETWORK)
    if section == SECTION_HOST:
        return checked(replace(spec, hosts=_hosts(spec, command, text), dhcp=True))
    if section == SECTION_RANGE and command in (DELETE, ADD_LAST, ADD_FIRST):
        item = Reader(parse(text, "range"))
        pair = (item.needed("start"), item.needed("end"))
        item.done()
        if command == DELETE and pair not in spec.ranges or command != DELETE and spec.ranges:
            what = "no such range is there" if command == DELETE else "one range is there already"
            raise LibvirtError(Code.OPERATION_INVALID, f"<range start='{pair[0]}'>: {what}", From.NETWORK)
        return checked(replace(spec, ranges=() if command == DELETE else (pair,), dhcp=True))
    raise LibvirtError(
        Code.OPERATION_UNSUPPORTED, "of a network, ip-dhcp-host and ip-dhcp-range change piece by piece", From.NETWORK
    )


def _hosts(spec: NetworkSpec, command: int, text: str) -> tuple[HostEntry, ...]:
    item = Reader(parse(text, "host"))
    mac = item.needed("mac").lower()
    there = [host for host in spec.hosts if host.mac == mac]
    others = tuple(host for host in spec.hosts if host.mac != mac)
    if command == DELETE:
        item.take_all()
        if not there:
            raise LibvirtError(Code.OPERATION_INVALID, f"couldn't locate a host with mac {mac}", From.NETWORK)
        return others
    host = read_host(item)
    item.done()
    if command == MODIFY:
        if not there:
            raise LibvirtError(Code.OPERATION_INVALID, f"couldn't locate a host with mac {mac}", From.NETWORK)
        return tuple(host if old.mac == mac else old for old in spec.hosts)
    if there:
        raise LibvirtError(Code.OPERATION_INVALID, f"there is an existing dhcp host entry for {mac}", From.NETWORK)
    if len(others) >= MAX_HOSTS:
        raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_HOSTS} hosts are as many as a network takes", From.NETWORK)
    return (*others, host) if command == ADD_LAST else (host, *others)
