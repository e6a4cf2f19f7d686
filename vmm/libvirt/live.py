"""Changes of machines that run: devices come and go, memory goes to the balloon, limits change. Loop thread.

A running domain's description (`Domain.live`) follows what the machine says: what it took is written there, and what
left it, by whoever's wish, is taken out.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

from vmm.config import Config, Disk, Net
from vmm.convert import KIB, plain
from vmm.errors import HostError
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.events import DomainEvent
from vmm.libvirt.format import domain_xml
from vmm.libvirt.iotune import BANDWIDTH
from vmm.libvirt.machines import ask
from vmm.libvirt.spec import DiskName, NetName, Spec, described, disk_ids
from vmm.libvirt.xmltree import malformed, parse, serialise
from vmm.management.registry import RegistryEntry

if TYPE_CHECKING:
    from vmm.libvirt.daemon import Daemon
    from vmm.libvirt.domain import Domain
    from vmm.libvirt.domains import Domains
    from vmm.libvirt.events import Hub

ATTACH_SECONDS, DETACH_SECONDS = 10, 10
"""How long the guest's driver may take; a guest that takes longer still gets or gives up the device."""


def named(spec: Spec) -> Spec:
    """With every disk's id said, so that it stays when another leaves."""
    disks = [disk.replace(id=name) for disk, name in zip(spec.config.disks, disk_ids(spec.config), strict=True)]
    return replace(spec, config=spec.config.replace(disks=disks))


def _lock(domain: Domain) -> asyncio.Lock:
    lock: asyncio.Lock = domain.extra.setdefault("devices lock", asyncio.Lock())
    return lock


def _live(domain: Domain) -> Spec:
    domain.running_entry()
    assert domain.live is not None
    return domain.live


def _devices(spec: Spec) -> dict[tuple[str, str | None], str]:
    """What tells a device of this description from others -> its alias."""
    found: dict[tuple[str, str | None], str] = {}
    for index, name in enumerate(disk_ids(spec.config)):
        found["disk", name] = f"virtio-disk{index}"
    for index, net in enumerate(spec.config.nets):
        found["net", net.mac] = f"net{index}"
    return found


async def refresh(domains: Domains, events: Hub, domain: Domain) -> None:
    """The description follows what the machine has now, at whoever's wish; clients hear what came and what left. Raises
    VmmError."""
    config = Config.from_dict((await ask(domain.running_entry(), "config"))["config"])
    before = domain.live
    if before is None:
        return
    after = described(before, config, domain.extra.get("coming", {}))
    domains.set_live(domain, after)
    had, has = _devices(before), _devices(after)
    for device in had.keys() - has.keys():
        events.domain(DomainEvent.DEVICE_REMOVED, domain.ref, had[device])
    for device in has.keys() - had.keys():
        events.domain(DomainEvent.DEVICE_ADDED, domain.ref, has[device])


async def attach(daemon: Daemon, domain: Domain, element: Element) -> None:
    """Give a device to the running machine. Raises VmmError; nothing is left behind then."""
    if element.tag not in ("disk", "interface"):
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED,
            f"<{element.tag}> cannot come to a running machine; use --config for the next start",
        )
    async with _lock(domain):
        spec, entry = named(_live(domain)), domain.running_entry()
        root = parse(domain_xml(spec, daemon.emulator), "domain")
        devices = root.find("devices")
        if devices is None:
            raise malformed("<devices> is missing")
        devices.append(element)
        read = daemon.domains.read(serialise(root))
        alone: Spec | None = None
        """Of the interface, if it is one."""
        coming: dict[str | None, DiskName | NetName] = domain.extra.setdefault("coming", {})
        if element.tag == "disk":
            target = _target(element)
            index = next(at for at, name in enumerate(read.disks) if name.target == target)
            disk = read.config.disks[index]
            disk = disk.replace(id=disk.id or _free(target, disk_ids(spec.config)))
            coming[disk.id], asked = read.disks[index], {"disk": plain(disk)}
        else:
            net = read.config.nets[-1]
            alone = replace(read, config=read.config.replace(nets=[net]), nets=read.nets[-1:])
            daemon.networks.check(alone)
            coming[net.mac], asked = read.nets[-1], {"net": plain(net)}
        await ask(entry, "attach", 60, **asked, timeout=ATTACH_SECONDS)
        if alone is not None:
            await daemon.networks.plug(alone)
        await refresh(daemon.domains, daemon.events, domain)


def _target(element: Element) -> str:
    target = element.find("target")
    return target.get("dev", "") if target is not None else ""


def _free(wanted: str, taken: list[str]) -> str:
    """An id that no other disk has."""
    if wanted not in taken:
        return wanted
    return next(name for number in range(len(taken) + 1) if (name := f"{wanted}-{number}") not in taken)


async def detach(daemon: Daemon, domain: Domain, element: Element) -> None:
    """Ask the guest to give a device up. Raises LibvirtError if it keeps it, or has no such device."""
    async with _lock(domain):
        spec, entry = _live(domain), domain.running_entry()
        if element.tag == "disk":
            target = _target(element)
            index = next((at for at, name in enumerate(spec.disks) if name.target == target), None)
            if index is None:
                raise LibvirtError(Code.OPERATION_FAILED, f"no target device {target}")
            name = disk_ids(spec.config)[index]
        elif element.tag == "interface":
            mac = element.find("mac")
            address = mac.get("address", "").lower() if mac is not None else ""
            nets = (await ask(entry, "devices", 15))["nets"]
            found = next((net for net in nets if net and net["mac"] == address), None)
            if found is None:
                raise LibvirtError(Code.OPERATION_FAILED, f"no device matching MAC address {address or '(none given)'}")
            name = str(found["id"])
        else:
            raise LibvirtError(
                Code.OPERATION_UNSUPPORTED,
                f"<{element.tag}> cannot leave a running machine; use --config for the next start",
            )
        await ask(entry, "detach", DETACH_SECONDS + 30, id=name, timeout=DETACH_SECONDS)
        await refresh(daemon.domains, daemon.events, domain)


JOB_STATES = {"done": 0, "failed": 1, "cancelled": 2, "ready": 3}
"""virConnectDomainEventBlockJobStatus."""
JOB_TYPES = {"stream": 1, "mirror": 2, "commit": 4}
"""virDomainBlockJobType; a commit is of the active image."""


def job_told(events: Hub, domain: Domain, event: dict[str, Any]) -> None:
    """A job of a disk is ready or over: clients that wait are told, by the image's path and by the disk's name."""
    spec, status = domain.live, JOB_STATES.get(str(event.get("state")))
    if spec is None or status is None or (ids := disk_ids(spec.config)).count(str(event.get("disk"))) != 1:
        return
    index, kind = ids.index(str(event["disk"])), JOB_TYPES.get(str(event.get("kind")), 0)
    events.domain(DomainEvent.BLOCK_JOB, domain.ref, str(spec.config.disks[index].path), kind, status)
    events.domain(DomainEvent.BLOCK_JOB_2, domain.ref, spec.disks[index].target, kind, status)


async def set_memory(daemon: Daemon, domain: Domain, size: int) -> None:
    """What the guest is to keep, in bytes; the rest goes to its balloon. Raises LibvirtError without one."""
    spec, entry = _live(domain), domain.running_entry()
    if not spec.config.balloon:
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED,
            "the memory of this machine cannot change while it runs: define <memballoon model='virtio'/>",
        )
    if size > spec.config.memory:
        raise LibvirtError(
            Code.INVALID_ARG, f"cannot set memory higher than max memory ({spec.config.memory // KIB} KiB)"
        )
    answer = await ask(entry, "set", 15, memory=size)
    actual = answer["balloon"]["actual"] // KIB
    daemon.events.domain(DomainEvent.BALLOON_CHANGE, domain.ref, actual)


async def set_processors(daemon: Daemon, domain: Domain, count: int) -> None:
    """How many processors the machine has from now on. Raises VmmError."""
    spec, entry = _live(domain), domain.running_entry()
    most = spec.config.most_cpus
    if not 1 <= count <= most:
        raise LibvirtError(
            Code.INVALID_ARG,
            f"requested vcpus is greater than max allowable vcpus for the live domain: {count} > {most}",
        )
    await ask(entry, "set", 60, cpus=count)
    spec = _live(domain)
    config = spec.config.replace(cpus=count, max_cpus=most)
    daemon.domains.set_live(domain, replace(spec, config=config))


async def balloon_of(domain: Domain, patience: float = 5.0) -> dict[str, Any] | None:
    """What the machine says of its balloon; None: it has none, does not run, or does not answer."""
    if domain.live is None or domain.entry is None or not domain.live.config.balloon:
        return None
    try:
        found = (await ask(domain.entry, "status", patience)).get("balloon")
    except HostError:
        return None
    return found if isinstance(found, dict) else None


async def _cards(entry: RegistryEntry) -> dict[str, str]:
    """The machine's names of its cards, by their addresses. Raises VmmError."""
    return {str(net["mac"]): str(net["id"]) for net in (await ask(entry, "devices", 15))["nets"] if net}


async def set_cables(spec: Spec, entry: RegistryEntry) -> None:
    """Pull the cables of a machine's cards that are described so; all are plugged in when it starts. Raises
    VmmError."""
    if all(name.link for name in spec.nets):
        return
    cards = await _cards(entry)
    for net, name in zip(spec.config.nets, spec.nets, strict=True):
        if not name.link:
            await ask(entry, "link", 15, id=cards[(net.mac or "").lower()], up=False)


async def update(daemon: Daemon, domain: Domain, element: Element) -> None:
    """Change what can be changed in place of a card: its cable and its limits. Raises LibvirtError for the rest."""
    async with _lock(domain):
        spec, entry = _live(domain), domain.running_entry()
        mac = element.find("mac")
        address = mac.get("address", "").lower() if mac is not None else ""
        places = [at for at, net in enumerate(spec.config.nets) if (net.mac or "").lower() == address]
        if element.tag != "interface" or not places:
            raise LibvirtError(
                Code.OPERATION_UNSUPPORTED,
                f"<{element.tag}> of a running machine is not changed in place, but an interface's link and bandwidth "
                "are; detach it and attach another, or use --config",
            )
        at = places[0]
        root = parse(domain_xml(spec, daemon.emulator), "domain")
        devices = root.find("devices")
        assert devices is not None
        old = devices.findall("interface")[at]
        devices[list(devices).index(old)] = element
        read = daemon.domains.read(serialise(root))
        limits = {name: getattr(read.config.nets[at], name) for name in BANDWIDTH.values()}
        others = read.config.nets[at].replace(**{name: getattr(spec.config.nets[at], name) for name in limits})
        if others != spec.config.nets[at] or replace(read.nets[at], link=spec.nets[at].link) != spec.nets[at]:
            raise LibvirtError(
                Code.OPERATION_UNSUPPORTED, "of an interface, link and bandwidth change while the machine runs"
            )
        name = (await _cards(entry))[address]
        await ask(entry, "link", 15, id=name, up=read.nets[at].link)
        await ask(entry, "set", 15, nets={name: limits})
        nets, names = list(spec.config.nets), list(spec.nets)
        nets[at], names[at] = read.config.nets[at], read.nets[at]
        daemon.domains.set_live(domain, replace(spec, config=spec.config.replace(nets=nets), nets=tuple(names)))


async def set_limits(daemon: Daemon, domain: Domain, kind: str, index: int, limits: dict[str, int]) -> None:
    """Limits of the disk or the card at this place. Raises VmmError."""
    spec, entry = _live(domain), domain.running_entry()
    if kind == "disks":
        name = disk_ids(spec.config)[index]
    else:
        mac = (spec.config.nets[index].mac or "").lower()
        nets = (await ask(entry, "devices", 15))["nets"]
        name = next((str(net["id"]) for net in nets if net and net["mac"] == mac), f"net{index}")
    await ask(entry, "set", 15, **{kind: {name: limits}})
    parts: list[Disk | Net] = list(getattr(spec.config, kind))
    parts[index] = parts[index].replace(**limits)
    daemon.domains.set_live(domain, replace(spec, config=spec.config.replace(**{kind: parts})))
