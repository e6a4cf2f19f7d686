"""Procedures that add, remove and change devices, in definitions and of running machines."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from vmm.libvirt import live
from vmm.libvirt.client import Call
from vmm.libvirt.domain import Domain
from vmm.libvirt.domain_calls import AFFECT_CONFIG, AFFECT_LIVE, check_flags, wants
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.spec import Spec
from vmm.libvirt.wire import DomainRef
from vmm.libvirt.xmltree import malformed, parse, serialise

calls = Procedures()

FORCE = 4


def _definition(call: Call, domain: Domain) -> tuple[Element, Element]:
    """(its definition's XML, the <devices> in it)."""
    root = parse(domain.xml(call.daemon.emulator, inactive=True), "domain")
    devices = root.find("devices")
    assert devices is not None
    return root, devices


def _domain(call: Call, dom: DomainRef, flags: int) -> tuple[Domain, bool, bool]:
    """(the domain, whether it is changed as it runs, whether its definition is). Raises LibvirtError."""
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG | FORCE)
    domain = call.daemon.domains.of(dom)
    return domain, *wants(call, domain, flags)


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


def _replace(call: Call, domain: Domain, spec: Spec | None) -> None:
    if spec is not None:
        call.daemon.domains.replace_definition(domain, spec)
        domain.updated = domain.active


@calls.change(8, "domain_attach_device", "dom:domain xml:string")
async def domain_attach_device(call: Call, dom: DomainRef, xml: str) -> None:
    await domain_attach_device_flags(call, dom, xml, AFFECT_LIVE)


@calls.change(160, "domain_attach_device_flags", "dom:domain xml:string flags:uint")
async def domain_attach_device_flags(call: Call, dom: DomainRef, xml: str, flags: int) -> None:
    domain, running, config = _domain(call, dom, flags)
    added = _device(xml)
    if running and domain.live is not None:
        _refuse_twice(parse(domain.xml(call.daemon.emulator), "domain").find("devices"), added)
    spec = None
    if config:
        root, devices = _definition(call, domain)
        _refuse_twice(devices, added)
        for single in [device for device in devices if device.tag == added.tag and added.tag in ("memballoon", "rng")]:
            devices.remove(single)
        devices.append(added)
        spec = call.daemon.checked(call.daemon.domains.read(serialise(root)))
    if running:
        await live.attach(call.daemon, domain, _device(xml))
    _replace(call, domain, spec)


def _refuse_twice(devices: Element | None, added: Element) -> None:
    there = [] if devices is None else [one for one in devices if one.tag in ("disk", "interface", "channel")]
    if any(_key(device) == _key(added) for device in there):
        raise LibvirtError(Code.OPERATION_INVALID, f"{' '.join(_key(added))} already exists")


@calls.change(13, "domain_detach_device", "dom:domain xml:string")
async def domain_detach_device(call: Call, dom: DomainRef, xml: str) -> None:
    await domain_detach_device_flags(call, dom, xml, AFFECT_LIVE)


@calls.change(161, "domain_detach_device_flags", "dom:domain xml:string flags:uint")
async def domain_detach_device_flags(call: Call, dom: DomainRef, xml: str, flags: int) -> None:
    domain, running, config = _domain(call, dom, flags)
    spec = None
    if config:
        root, devices = _definition(call, domain)
        devices.remove(_find(devices, _device(xml)))
        spec = call.daemon.checked(call.daemon.domains.read(serialise(root)))
    if running:
        await live.detach(call.daemon, domain, _device(xml))
    _replace(call, domain, spec)


@calls.change(174, "domain_update_device_flags", "dom:domain xml:string flags:uint")
async def domain_update_device_flags(call: Call, dom: DomainRef, xml: str, flags: int) -> None:
    domain, running, config = _domain(call, dom, flags)
    spec = None
    if config:
        root, devices = _definition(call, domain)
        changed = _device(xml)
        old = _find(devices, changed)
        devices[list(devices).index(old)] = changed
        spec = call.daemon.checked(call.daemon.domains.read(serialise(root)))
    if running:
        await live.update(call.daemon, domain, _device(xml))
    _replace(call, domain, spec)
