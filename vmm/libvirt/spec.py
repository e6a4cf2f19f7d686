"""A domain as it is defined: the configuration of its machine, and what clients say of it beyond that."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace

from vmm.config import Config
from vmm.firmware.smbios import name_uuid

TYPE_OF_CORE = {"kvm": "kvm", "soft": "qemu", "auto": "loopvisor"}
"""libvirt's domain types: kvm is the processor's own virtualization, qemu is software; loopvisor takes the best."""
CPU_MODEL = "x86-64-v2"
"""What libvirt's clients are told of the CPU model that every core has."""
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


def described(spec: Spec, config: Config) -> Spec:
    """What was remembered of a machine, with its present configuration: disks by their ids, cards by their
    addresses."""
    plain = spec_of(config)
    names = dict(zip(disk_ids(spec.config), spec.disks, strict=True))
    cards = {net.mac: name for net, name in zip(spec.config.nets, spec.nets, strict=True)}
    disks = [names.get(name, other) for name, other in zip(disk_ids(config), plain.disks, strict=True)]
    nets = [cards.get(net.mac, other) for net, other in zip(config.nets, plain.nets, strict=True)]
    return replace(spec, config=config, disks=tuple(disks), nets=tuple(nets))


def spec_of(config: Config) -> Spec:
    """The definition of a machine that was started otherwise."""
    disks = tuple(DiskName(disk_name(index), disk.path.is_block_device()) for index, disk in enumerate(config.disks))
    return Spec(config, disks=disks, nets=tuple(NetName() for _ in config.nets))
