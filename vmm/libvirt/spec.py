"""A domain as it is defined: the configuration of its machine, and what clients say of it beyond that."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vmm.config import Config, limit_names
from vmm.firmware.smbios import name_uuid

TYPE_OF_CORE = {"kvm": "kvm", "soft": "qemu", "auto": "loopvisor"}
"""libvirt's domain types: kvm is the processor's own virtualization, qemu is software; loopvisor takes the best."""
CPU_MODELS = {"v2": "x86-64-v2", "v3": "x86-64-v3"}
"""What libvirt's clients call the CPU models that have a name there; of mode custom a domain asks for one of them."""
CPU_MODEL = CPU_MODELS["v2"]
"""The one that every core has."""
CORE_OF_TYPE = {kind: core for core, kind in TYPE_OF_CORE.items()}


@dataclass(frozen=True)
class DiskName:
    """What libvirt says of a disk that the configuration does not: its place in `config.disks` is its place here."""

    target: str
    """The name that clients know it by: vda …"""
    block: bool = False
    """The source is a device of the host, not a file."""


@dataclass(frozen=True)
class NetName:
    """What libvirt says of an interface that the configuration does not."""

    network: str = ""
    """The libvirt network that it belongs to, "" for none."""
    bridge: str = ""
    """The host's bridge that it is a port of, where it belongs to no network."""
    link: bool = True
    """Whether its cable is plugged in."""


EMULATOR = -1
"""In place of a vCPU's number: every other thread."""


@dataclass(frozen=True)
class Pins:
    """On which of the host's processors threads of the machine run; what is not named, on any."""

    vcpus: tuple[tuple[int, frozenset[int]], ...] = ()
    """By the vCPU's number."""
    emulator: frozenset[int] | None = None
    """Every thread that is no vCPU's."""

    def changed(self, which: int, cpus: frozenset[int] | None) -> Pins:
        """With other processors for one vCPU, or for the EMULATOR; None: any."""
        if which == EMULATOR:
            return replace(self, emulator=cpus)
        others = {vcpu: there for vcpu, there in self.vcpus if vcpu != which}
        return replace(self, vcpus=tuple(sorted((others if cpus is None else {**others, which: cpus}).items())))


@dataclass(frozen=True)
class Spec:
    """One definition. `config.name` and `config.uuid` are the domain's."""

    config: Config
    title: str = ""
    description: str = ""
    metadata: str = ""
    """The children of <metadata>, as XML text."""
    disks: tuple[DiskName, ...] = ()
    nets: tuple[NetName, ...] = ()
    pins: Pins = Pins()
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was accepted although the machine has no such thing; clients can ask for it (virDomainGetMessages)."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def uuid(self) -> uuid.UUID:
        return uuid.UUID(self.config.uuid) if self.config.uuid is not None else name_uuid(self.config.name)

    def with_config(self, **values: object) -> Spec:
        """With some of the configuration's values changed. Raises ConfigError."""
        return replace(self, config=Config.from_dict({**self.config.to_dict(), **values}))


def tap_name(mac: str) -> str:
    """The host's name for the interface of a card with this address: 14 characters, the same on every host."""
    return "lv" + mac.lower().replace(":", "")


def disk_name(index: int) -> str:
    """vda, vdb … vdz, vdaa …"""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return "vd" + letters


def disk_ids(config: Config) -> list[str]:
    """What the machine calls its disks, in the configuration's order."""
    return [disk.id or f"disk{index}" for index, disk in enumerate(config.disks)]


def described(spec: Spec, config: Config, coming: Mapping[str | None, Any] | None = None) -> Spec:
    """What was remembered of a machine, with the devices of its present configuration: disks are known by their ids,
    cards by their addresses. `coming`: the DiskName or NetName of one that was not there. Limits and the number of
    processors stay as remembered, for the machine's configuration has those of its start."""
    plain, was = spec_of(config), spec.config
    disks = dict(zip(disk_ids(was), zip(was.disks, spec.disks, strict=True), strict=True))
    nets = dict(zip([net.mac for net in was.nets], zip(was.nets, spec.nets, strict=True), strict=True))
    disk_parts, disk_names = _merged(disk_ids(config), config.disks, plain.disks, disks, coming or {})
    net_parts, net_names = _merged([net.mac for net in config.nets], config.nets, plain.nets, nets, coming or {})
    present = config.replace(disks=disk_parts, nets=net_parts, cpus=was.cpus, max_cpus=was.max_cpus)
    return replace(spec, config=present, disks=disk_names, nets=net_names)


def _merged(
    keys: Sequence[str | None],
    parts: Sequence[Any],
    names: Sequence[Any],
    remembered: Mapping[Any, tuple[Any, Any]],
    coming: Mapping[str | None, Any],
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(parts of the configuration, what libvirt says of them) of devices with these keys. `remembered`: both, of those
    that were there; `names`: for want of anything better."""
    found = []
    for key, part, name in zip(keys, parts, names, strict=True):
        old, said = remembered.get(key, (None, coming.get(key, name)))
        limits = {each: getattr(old, each) for each in limit_names(type(part))} if old is not None else {}
        found.append((part.replace(**limits), said))
    return tuple(part for part, _ in found), tuple(said for _, said in found)


def spec_of(config: Config) -> Spec:
    """The definition of a machine that was started otherwise."""
    disks = tuple(DiskName(disk_name(index), disk.path.is_block_device()) for index, disk in enumerate(config.disks))
    return Spec(config, disks=disks, nets=tuple(NetName() for _ in config.nets))
