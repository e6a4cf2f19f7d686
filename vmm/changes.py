"""What may be changed of a machine while it runs: its memory, by the balloon, and limits of its disks and network
cards. Loop thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmm.config import PAGE, Disk, Net, limit_names
from vmm.convert import MIB, Checked, sized, split
from vmm.errors import ConfigError, core_errors

if TYPE_CHECKING:
    from virtio.devices.balloon import BalloonDevice
    from virtio.devices.blk import BlockDevice
    from virtio.devices.net import NetDevice
    from vmm.vm import VirtualMachine

LEAST_MEMORY = 16 * MIB
"""What a guest keeps at least: none runs on less, and a slip of a unit should not end it."""
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


def find_balloon(vm: VirtualMachine) -> BalloonDevice | None:
    """The machine's balloon, if it has one and is built."""
    return vm.virtio_devices().get("balloon") if vm.config.balloon else None  # type: ignore[return-value]


def _target(vm: VirtualMachine, memory: int | str) -> tuple[BalloonDevice, int]:
    """The balloon, and the pages that it is to have so that the guest keeps so much. ConfigError."""
    balloon = find_balloon(vm)
    if balloon is None:
        raise ConfigError("memory: this machine has no balloon; start it with --balloon")
    least = min(LEAST_MEMORY, vm.config.memory)
    return balloon, (vm.config.memory - sized(least, vm.config.memory, PAGE, "memory", memory)) // PAGE


async def change(
    vm: VirtualMachine,
    *,
    memory: int | str | None = None,
    disks: Mapping[str, Limits] | None = None,
    nets: Mapping[str, Limits] | None = None,
) -> None:
    """Change all of these, or none. `memory`: bytes that the guest is to keep, of those that it began with; it gives
    the rest to the balloon as fast as it likes. `disks`, `nets`: limits by name. ConfigError."""
    balloon, pages = _target(vm, memory) if memory is not None else (None, 0)
    wanted: list[tuple[BlockDevice | NetDevice, dict[str, int]]] = []
    for name, values in (disks or {}).items():
        wanted.append((find_disk(vm, name), checked(Disk, values)))
    for name, values in (nets or {}).items():
        wanted.append((find_net(vm, name), checked(Net, values)))
    with core_errors():
        for device, limits in wanted:
            device.set_limits(limits)
        if balloon is not None:
            balloon.set_target(pages)


def present(vm: VirtualMachine) -> dict[str, Any]:
    """What holds: "limits" of each disk and card that has some, by its name; "balloon", if there is one."""
    found = {name: disk.limits.as_dict() for name, disk in vm.block_devices().items()}
    found |= {name: net.limits for name, net in vm.nets().items()}
    limits = {name: values for name, values in found.items() if values}
    balloon = find_balloon(vm)
    answer: dict[str, Any] = {"limits": limits} if limits else {}
    if balloon is not None:
        answer["balloon"] = {
            "target": vm.config.memory - balloon.target * PAGE,
            "actual": max(vm.config.memory - balloon.actual * PAGE, 0),
            "discarded": balloon.discarded,
            "statistics": dict(balloon.statistics),
        }
    return answer


async def memory_statistics(vm: VirtualMachine, timeout: float = 1.0) -> dict[str, int]:
    """What the guest's kernel says of its memory now, by virtio.devices.balloon.STATISTICS' names; nothing without a
    balloon, and what it said last if it does not answer within `timeout` seconds."""
    balloon = find_balloon(vm)
    return await balloon.refresh(timeout) if balloon is not None else {}
