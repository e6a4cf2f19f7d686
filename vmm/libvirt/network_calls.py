"""Procedures about networks."""

from __future__ import annotations

from typing import NamedTuple

from vmm.libvirt.client import Call
from vmm.libvirt.domain_calls import AFFECT_CONFIG, AFFECT_LIVE, at_least_zero, check_flags
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.network_xml import read_network
from vmm.libvirt.networks import Network, Networks
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.storage import any_of
from vmm.libvirt.wire import NetworkRef

calls = Procedures()

XML_INACTIVE = 1
IPV4 = 0
"""virIPAddrType."""


def _all(call: Call) -> Networks:
    networks: Networks = call.daemon.networks
    return networks


def _network(call: Call, net: NetworkRef) -> Network:
    return _all(call).of(net)


@calls.query(283, "connect_list_all_networks", "need:int flags:uint", "nets:network<16384> count:uint")
async def connect_list_all_networks(call: Call, need: int, flags: int) -> tuple[list[NetworkRef], int]:
    found = []
    for network in _all(call).all():
        persistent, autostart = network.persistent is not None, _all(call).autostart(network)
        groups = (
            {1: not network.active, 2: network.active},
            {4: persistent, 8: not persistent},
            {16: autostart, 32: not autostart},
        )
        if any_of(groups, flags):
            found.append(network.ref)
    return (found if need else []), len(found)


def _names(call: Call, *, active: bool) -> list[str]:
    return [network.name for network in _all(call).all() if network.active == active]


@calls.query(52, "connect_num_of_networks", "", "count:int")
async def connect_num_of_networks(call: Call) -> int:
    return len(_names(call, active=True))


@calls.query(38, "connect_list_networks", "max:int", "names:string<16384>")
async def connect_list_networks(call: Call, max: int) -> list[str]:
    return _names(call, active=True)[: at_least_zero(max)]


@calls.query(50, "connect_num_of_defined_networks", "", "count:int")
async def connect_num_of_defined_networks(call: Call) -> int:
    return len(_names(call, active=False))


@calls.query(36, "connect_list_defined_networks", "max:int", "names:string<16384>")
async def connect_list_defined_networks(call: Call, max: int) -> list[str]:
    return _names(call, active=False)[: at_least_zero(max)]


@calls.query(46, "network_lookup_by_name", "name:string", "net:network")
async def network_lookup_by_name(call: Call, name: str) -> NetworkRef:
    return _all(call).named(name).ref


@calls.query(47, "network_lookup_by_uuid", "uuid:uuid", "net:network")
async def network_lookup_by_uuid(call: Call, uuid: bytes) -> NetworkRef:
    return _all(call).with_uuid(uuid).ref


@calls.query(43, "network_get_xml_desc", "net:network flags:uint", "xml:string")
async def network_get_xml_desc(call: Call, net: NetworkRef, flags: int) -> str:
    check_flags(flags, XML_INACTIVE)
    network = _network(call, net)
    if flags & XML_INACTIVE and network.persistent is not None:
        return network.persistent.xml()
    users = sum(_all(call).uses(domain.spec, network) for domain in call.daemon.domains.all() if domain.active)
    return network.spec.xml(users)


@calls.query(44, "network_get_autostart", "net:network", "autostart:int")
async def network_get_autostart(call: Call, net: NetworkRef) -> int:
    return int(_all(call).autostart(_network(call, net)))


@calls.change(48, "network_set_autostart", "net:network autostart:int")
async def network_set_autostart(call: Call, net: NetworkRef, autostart: int) -> None:
    _all(call).set_autostart(_network(call, net), on=bool(autostart))


@calls.query(152, "network_is_active", "net:network", "active:int")
async def network_is_active(call: Call, net: NetworkRef) -> int:
    return int(_network(call, net).active)


@calls.query(153, "network_is_persistent", "net:network", "persistent:int")
async def network_is_persistent(call: Call, net: NetworkRef) -> int:
    return int(_network(call, net).persistent is not None)


@calls.query(45, "network_get_bridge_name", "net:network", "name:string")
async def network_get_bridge_name(call: Call, net: NetworkRef) -> str:
    # "" for user networking: an error, which libvirtd answers with, would end Ansible's facts about all networks.
    return _network(call, net).spec.bridge


class LeaseAnswer(NamedTuple):
    """A lease as clients know it; `expires`: seconds since 1970."""

    interface: str
    expires: int
    type: int
    mac: str
    iaid: str | None
    address: str
    prefix: int
    hostname: str | None
    client: str | None


@calls.query(
    341, "network_get_dhcp_leases", "net:network mac:string? need:int flags:uint", "leases:lease<65536> count:uint"
)
async def network_get_dhcp_leases(
    call: Call, net: NetworkRef, mac: str | None, need: int, flags: int
) -> tuple[list[LeaseAnswer], int]:
    check_flags(flags, 0)
    network = _network(call, net)
    address = network.spec.address
    found = [
        LeaseAnswer(
            network.spec.bridge, int(lease.expires), IPV4, lease.mac, None, lease.address,
            address.network.prefixlen, lease.hostname or None, lease.client or None,
        )
        for lease in _all(call).leases(network)
        if address is not None and (mac is None or mac.lower() == lease.mac)
    ]  # fmt: skip
    return (found if need else []), len(found)


@calls.change(39, "network_create", "net:network")
async def network_create(call: Call, net: NetworkRef) -> None:
    network = _network(call, net)
    await _all(call).start(network)
    # Machines that were in it while it was away come back into it.
    for domain in call.daemon.domains.all():
        if domain.live is not None and _all(call).uses(domain.live, network):
            await _all(call).plug(domain.live)


@calls.change(42, "network_destroy", "net:network")
async def network_destroy(call: Call, net: NetworkRef) -> None:
    await _all(call).destroy(_network(call, net))


@calls.change(49, "network_undefine", "net:network")
async def network_undefine(call: Call, net: NetworkRef) -> None:
    _all(call).undefine(_network(call, net))


@calls.change(41, "network_define_xml", "xml:string", "net:network")
async def network_define_xml(call: Call, xml: str) -> NetworkRef:
    return _all(call).define(read_network(xml)).ref


@calls.change(432, "network_define_xml_flags", "xml:string flags:uint", "net:network")
async def network_define_xml_flags(call: Call, xml: str, flags: int) -> NetworkRef:
    check_flags(flags, 1)  # to validate, which is always done
    return _all(call).define(read_network(xml)).ref


@calls.change(40, "network_create_xml", "xml:string", "net:network")
async def network_create_xml(call: Call, xml: str) -> NetworkRef:
    return (await _all(call).create(read_network(xml))).ref


@calls.change(437, "network_create_xml_flags", "xml:string flags:uint", "net:network")
async def network_create_xml_flags(call: Call, xml: str, flags: int) -> NetworkRef:
    check_flags(flags, 1)
    return (await _all(call).create(read_network(xml))).ref


@calls.change(291, "network_update", "net:network command:uint section:uint parent:int xml:string flags:uint")
async def network_update(
    call: Call, net: NetworkRef, command: int, section: int, parent: int, xml: str, flags: int
) -> None:
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG)
    network = _network(call, net)
    live, config = bool(flags & AFFECT_LIVE), bool(flags & AFFECT_CONFIG)
    if not live and not config:
        live, config = network.active, not network.active
    if parent not in (-1, 0):
        raise LibvirtError(
            Code.INVALID_ARG, f"network '{network.name}' has one <ip>, not number {parent}", From.NETWORK
        )
    _all(call).update(network, command, section, xml, live=live, config=config)
