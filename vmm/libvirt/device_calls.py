"""Procedures that add, remove and change devices: in definitions. A running machine's devices stay as they are."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from vmm.libvirt.client import Call
from vmm.libvirt.domain_calls import AFFECT_CONFIG, AFFECT_LIVE, check_flags, wants
from vmm.libvirt.domains import Domain
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.wire import DomainRef
from vmm.libvirt.xmltree import malformed, parse, serialise

calls = Procedures()

FORCE = 4


def _definition(call: Call, dom: DomainRef, flags: int) -> tuple[Domain, Element, Element]:
    """(the domain, its definition's XML, the <devices> in it). Raises LibvirtError."""
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG | FORCE)
    domain = call.daemon.domains.of(dom)
    live, _ = wants(call, domain, flags)
    if live:
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED,
            "the devices of a running machine cannot change; use --config for the next start",
        )
    root = parse(domain.xml(call.daemon.emulator, inactive=True), "domain")
    devices = root.find("devices")
    assert devices is not None
    return domain, root, devices


def _device(xml: str) -> Element:
    """The one element of a device's XML."""
    tree = parse(f"<devices>{xml}</devices>", "devices")
    if len(tree) != 1:
        raise malformed("a device is one element")
    return tree[0]


def _key(device: Element) -> tuple[str, ...]:
    """What makes two descriptions one device."""
    target, mac, source = device.find("target"), device.find("mac"), device.find("source")
    if device.tag == "disk" and target is not None:
        return ("disk", target.get("dev", ""))
    if device.tag == "interface" and mac is not None:
        return ("interface", mac.get("address", "").lower())
    if device.tag == "channel" and target is not None:
        return ("channel", target.get("name", ""))
    return (device.tag, source.get("path", "") if source is not None else "")


def _find(devices: Element, wanted: Element) -> Element:
    for device in devices:
        if device.tag == wanted.tag and _key(device) == _key(wanted):
            return device
    raise LibvirtError(Code.OPERATION_FAILED, f"device not found: no {' '.join(_key(wanted))} in the definition")


def _store(call: Call, domain: Domain, root: Element) -> None:
    spec = call.daemon.checked(call.daemon.domains.read(serialise(root)))
    call.daemon.domains.replace_definition(domain, spec)
    domain.updated = domain.active


@calls.change(8, "domain_attach_device", "dom:domain xml:string")
async def domain_attach_device(call: Call, dom: DomainRef, xml: str) -> None:
    await domain_attach_device_flags(call, dom, xml, AFFECT_LIVE)


@calls.change(160, "domain_attach_device_flags", "dom:domain xml:string flags:uint")
async def domain_attach_device_flags(call: Call, dom: DomainRef, xml: str, flags: int) -> None:
    domain, root, devices = _definition(call, dom, flags)
    added = _device(xml)
    if any(_key(device) == _key(added) for device in devices if device.tag in ("disk", "interface", "channel")):
        raise LibvirtError(Code.OPERATION_INVALID, f"{' '.join(_key(added))} already exists")
    for single in [device for device in devices if device.tag == added.tag and added.tag in ("memballoon", "rng")]:
        devices.remove(single)
    devices.append(added)
    _store(call, domain, root)


@calls.change(13, "domain_detach_device", "dom:domain xml:string")
async def domain_detach_device(call: Call, dom: DomainRef, xml: str) -> None:
    await domain_detach_device_flags(call, dom, xml, AFFECT_LIVE)


@calls.change(161, "domain_detach_device_flags", "dom:domain xml:string flags:uint")
async def domain_detach_device_flags(call: Call, dom: DomainRef, xml: str, flags: int) -> None:
    domain, root, devices = _definition(call, dom, flags)
    devices.remove(_find(devices, _device(xml)))
    _store(call, domain, root)


@calls.change(174, "domain_update_device_flags", "dom:domain xml:string flags:uint")
async def domain_update_device_flags(call: Call, dom: DomainRef, xml: str, flags: int) -> None:
    domain, root, devices = _definition(call, dom, flags)
    changed = _device(xml)
    old = _find(devices, changed)
    devices[list(devices).index(old)] = changed
    _store(call, domain, root)
