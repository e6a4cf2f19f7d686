"""Procedures about the host's interfaces and devices, which are looked at only, and about filters and secrets, of which
there are none."""

from __future__ import annotations

import uuid as uuids
from pathlib import Path
from xml.etree.ElementTree import Element

from vmm.libvirt import host
from vmm.libvirt.client import Call
from vmm.libvirt.domain_calls import at_least_zero
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.storage import any_of
from vmm.libvirt.wire import FilterRef, InterfaceRef, NodeDeviceRef, SecretRef
from vmm.libvirt.xmltree import add, serialise

calls = Procedures()

NET = Path("/sys/class/net")

# The host's interfaces.


def interfaces() -> dict[str, tuple[str, bool]]:
    """Name to (MAC, whether it is up)."""
    found = {}
    try:
        names = sorted(path.name for path in NET.iterdir())
    except OSError:
        return {}
    for name in names:
        try:
            mac = (NET / name / "address").read_text().strip()
            flags = int((NET / name / "flags").read_text(), 16)
        except (OSError, ValueError):
            continue  # it has gone meanwhile
        found[name] = mac, bool(flags & 1)
    return found


def _interface(name: str) -> tuple[str, bool]:
    found = interfaces().get(name)
    if found is None:
        raise LibvirtError(Code.NO_INTERFACE, f"couldn't find interface named '{name}'", From.INTERFACE)
    return found


def _chosen(*, active: bool) -> list[str]:
    return [name for name, (_, up) in interfaces().items() if up == active and name != "lo"]


@calls.query(284, "connect_list_all_interfaces", "need:int flags:uint", "ifaces:interface<16384> count:uint")
async def connect_list_all_interfaces(call: Call, need: int, flags: int) -> tuple[list[InterfaceRef], int]:
    found = [
        InterfaceRef(name, mac)
        for name, (mac, up) in interfaces().items()
        if name != "lo" and any_of(({1: not up, 2: up},), flags)
    ]
    return (found if need else []), len(found)


@calls.query(126, "connect_num_of_interfaces", "", "count:int")
async def connect_num_of_interfaces(call: Call) -> int:
    return len(_chosen(active=True))


@calls.query(127, "connect_list_interfaces", "max:int", "names:string<16384>")
async def connect_list_interfaces(call: Call, max: int) -> list[str]:
    return _chosen(active=True)[: at_least_zero(max)]


@calls.query(137, "connect_num_of_defined_interfaces", "", "count:int")
async def connect_num_of_defined_interfaces(call: Call) -> int:
    return len(_chosen(active=False))


@calls.query(138, "connect_list_defined_interfaces", "max:int", "names:string<16384>")
async def connect_list_defined_interfaces(call: Call, max: int) -> list[str]:
    return _chosen(active=False)[: at_least_zero(max)]


@calls.query(128, "interface_lookup_by_name", "name:string", "iface:interface")
async def interface_lookup_by_name(call: Call, name: str) -> InterfaceRef:
    return InterfaceRef(name, _interface(name)[0])


@calls.query(129, "interface_lookup_by_mac_string", "mac:string", "iface:interface")
async def interface_lookup_by_mac_string(call: Call, mac: str) -> InterfaceRef:
    for name, (address, _) in interfaces().items():
        if address == mac.lower() and name != "lo":
            return InterfaceRef(name, address)
    raise LibvirtError(Code.NO_INTERFACE, f"couldn't find interface with MAC address '{mac}'", From.INTERFACE)


@calls.query(130, "interface_get_xml_desc", "iface:interface flags:uint", "xml:string")
async def interface_get_xml_desc(call: Call, iface: InterfaceRef, flags: int) -> str:
    mac, _ = _interface(iface.name)
    kind = "bridge" if (NET / iface.name / "bridge").exists() else "ethernet"
    root = Element("interface", {"type": kind, "name": iface.name})
    add(root, "mac", address=mac)
    return serialise(root)


@calls.query(156, "interface_is_active", "iface:interface", "active:int")
async def interface_is_active(call: Call, iface: InterfaceRef) -> int:
    return int(_interface(iface.name)[1])


# The host's devices: the computer and its network interfaces.

COMPUTER = "computer"
CAP_SYSTEM, CAP_NET = 1, 16
"""virConnectListAllNodeDeviceFlags."""


def _devices() -> dict[str, str]:
    """Name to the interface that it is, "" for the computer."""
    named = {f"net_{name}_{mac.replace(':', '_')}": name for name, (mac, _) in interfaces().items()}
    return {COMPUTER: "", **named}


def _capability(name: str) -> str:
    return "system" if name == COMPUTER else "net"


def _device(name: str) -> str:
    found = _devices().get(name)
    if found is None:
        raise LibvirtError(Code.NO_NODE_DEVICE, f"no node device with matching name '{name}'", From.NODEDEV)
    return found


@calls.query(285, "connect_list_all_node_devices", "need:int flags:uint", "devices:nodedev<65536> count:uint")
async def connect_list_all_node_devices(call: Call, need: int, flags: int) -> tuple[list[NodeDeviceRef], int]:
    capabilities = flags & 0x000F_FFFF
    found = [
        NodeDeviceRef(name)
        for name in _devices()
        if not capabilities or capabilities & (CAP_SYSTEM if name == COMPUTER else CAP_NET)
    ]
    return (found if need else []), len(found)


@calls.query(111, "node_num_of_devices", "cap:string? flags:uint", "count:int")
async def node_num_of_devices(call: Call, cap: str | None, flags: int) -> int:
    return sum(cap in (None, _capability(name)) for name in _devices())


@calls.query(112, "node_list_devices", "cap:string? max:int flags:uint", "names:string<65536>")
async def node_list_devices(call: Call, cap: str | None, max: int, flags: int) -> list[str]:
    return [name for name in _devices() if cap in (None, _capability(name))][: at_least_zero(max)]


@calls.query(113, "node_device_lookup_by_name", "name:string", "dev:nodedev")
async def node_device_lookup_by_name(call: Call, name: str) -> NodeDeviceRef:
    _device(name)
    return NodeDeviceRef(name)


@calls.query(114, "node_device_get_xml_desc", "name:string flags:uint", "xml:string")
async def node_device_get_xml_desc(call: Call, name: str, flags: int) -> str:
    interface = _device(name)
    root = Element("device")
    add(root, "name", name)
    if not interface:
        capability = add(root, "capability", type="system")
        add(add(capability, "hardware"), "uuid", str(host.host_uuid()))
        return serialise(root)
    add(root, "path", str((NET / interface).resolve()))
    add(root, "parent", COMPUTER)
    capability = add(root, "capability", type="net")
    mac, up = _interface(interface)
    add(capability, "interface", interface)
    add(capability, "address", mac)
    add(capability, "link", state="up" if up else "down")
    return serialise(root)


@calls.query(115, "node_device_get_parent", "name:string", "parent:string?")
async def node_device_get_parent(call: Call, name: str) -> str | None:
    return COMPUTER if _device(name) else None


@calls.query(116, "node_device_num_of_caps", "name:string", "count:int")
async def node_device_num_of_caps(call: Call, name: str) -> int:
    _device(name)
    return 1


@calls.query(117, "node_device_list_caps", "name:string max:int", "names:string<65536>")
async def node_device_list_caps(call: Call, name: str, max: int) -> list[str]:
    _device(name)
    return [_capability(name)][: at_least_zero(max)]


@calls.query(436, "node_device_is_active", "name:string", "active:int")
async def node_device_is_active(call: Call, name: str) -> int:
    _device(name)
    return 1


# Filters and secrets: there are none.


@calls.query(286, "connect_list_all_nwfilters", "need:int flags:uint", "filters:nwfilter<16384> count:uint")
async def connect_list_all_nwfilters(call: Call, need: int, flags: int) -> tuple[list[FilterRef], int]:
    return [], 0


@calls.query(178, "connect_num_of_nwfilters", "", "count:int")
async def connect_num_of_nwfilters(call: Call) -> int:
    return 0


@calls.query(179, "connect_list_nwfilters", "max:int", "names:string<16384>")
async def connect_list_nwfilters(call: Call, max: int) -> list[str]:
    return []


@calls.query(175, "nwfilter_lookup_by_name", "name:string", "filter:nwfilter")
async def nwfilter_lookup_by_name(call: Call, name: str) -> FilterRef:
    raise LibvirtError(Code.NO_NWFILTER, f"no nwfilter with matching name '{name}'", From.NWFILTER)


@calls.query(401, "connect_list_all_nwfilter_bindings", "need:int flags:uint", "bindings:nwfilter<16384> count:uint")
async def connect_list_all_nwfilter_bindings(call: Call, need: int, flags: int) -> tuple[list[FilterRef], int]:
    return [], 0


@calls.query(287, "connect_list_all_secrets", "need:int flags:uint", "secrets:secret<16384> count:uint")
async def connect_list_all_secrets(call: Call, need: int, flags: int) -> tuple[list[SecretRef], int]:
    return [], 0


@calls.query(139, "connect_num_of_secrets", "", "count:int")
async def connect_num_of_secrets(call: Call) -> int:
    return 0


@calls.query(140, "connect_list_secrets", "max:int", "uuids:string<16384>")
async def connect_list_secrets(call: Call, max: int) -> list[str]:
    return []


@calls.query(141, "secret_lookup_by_uuid", "uuid:uuid", "secret:secret")
async def secret_lookup_by_uuid(call: Call, uuid: bytes) -> SecretRef:
    raise LibvirtError(Code.NO_SECRET, f"no secret with matching uuid '{uuids.UUID(bytes=uuid)}'", From.SECRET)


@calls.query(147, "secret_lookup_by_usage", "type:int id:string", "secret:secret")
async def secret_lookup_by_usage(call: Call, type: int, id: str) -> SecretRef:
    raise LibvirtError(Code.NO_SECRET, f"no secret with matching usage '{id}'", From.SECRET)
