"""What may be changed of a machine while it runs: limits of its disks and network cards. Loop thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmm.config import Disk, Net, limit_names
from vmm.convert import Checked, split
from vmm.errors import ConfigError, core_errors

if TYPE_CHECKING:
    from virtio.devices.blk import BlockDevice
    from virtio.devices.net import NetDevice
    from vmm.vm import VirtualMachine

Limits = Mapping[str, Any]
"""Limits by the names that Disk and Net have for them; what is not named stays, 0 takes one away."""


def parse(kind: type[Checked], text: str) -> tuple[str, dict[str, int]]:
    """NAME,limit=VALUE[,…] as a name and limits. ConfigError."""
    name, values = split(kind._where, text, {})
    if not values:
        raise ConfigError(f"{kind._where}: {text!r} changes nothing; write {name},{limit_names(kind)[0]}=…")
    return name, checked(kind, values)


def checked(kind: type[Checked], values: Limits) -> dict[str, int]:
    """Limits from what users write. ConfigError."""
    known = limit_names(kind)
    found = {}
    for key, value in values.items():
        if key not in known:
            some = ", ".join(name for name in known if not name.endswith("_burst"))
            raise ConfigError(f"{kind._where}: {key} cannot be changed while the machine runs; limits are {some}")
        found[key] = kind._converters[key](f"{kind._where}.{key}", value)
    return found


def find_disk(vm: VirtualMachine, name: str) -> BlockDevice:
    """A disk by its id, or as Linux names it: vda, vdb… ConfigError."""
    disks = vm.block_devices()
    linux = {f"vd{chr(ord('a') + index)}": device for index, device in enumerate(disks.values()) if index < 26}
    found: BlockDevice = _find("disk", name, {**linux, **disks}, disks)
    return found


def find_net(vm: VirtualMachine, name: str) -> NetDevice:
    """A network card by its id. ConfigError."""
    nets = vm.nets()
    found: NetDevice = _find("net", name, nets, nets)
    return found


def _find(what: str, name: str, found: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    if name not in found:
        raise ConfigError(f"{what}: this machine has no {name!r}; it has {', '.join(known) or 'none'}")
    return found[name]


async def change(
    vm: VirtualMachine, *, disks: Mapping[str, Limits] | None = None, nets: Mapping[str, Limits] | None = None
) -> None:
    """Change limits of disks and cards, all or none. ConfigError."""
    wanted: list[tuple[BlockDevice | NetDevice, dict[str, int]]] = []
    for name, values in (disks or {}).items():
        wanted.append((find_disk(vm, name), checked(Disk, values)))
    for name, values in (nets or {}).items():
        wanted.append((find_net(vm, name), checked(Net, values)))
    with core_errors():
        for device, limits in wanted:
            device.set_limits(limits)


def present(vm: VirtualMachine) -> dict[str, dict[str, int]]:
    """The limits of each disk and card that has some, by its name."""
    found = {name: disk.limits.as_dict() for name, disk in vm.block_devices().items()}
    found |= {name: net.limits for name, net in vm.nets().items()}
    return {name: limits for name, limits in found.items() if limits}
