"""What may be changed of a machine while it runs: its processors, its memory, by the balloon, and limits of its
disks and network cards. Loop thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmm.config import PAGE, POLICY, Disk, Net, limit_names
from vmm.convert import MIB, Checked, in_range, sized, split
from vmm.errors import ConfigError, GuestError, VmmError, core_errors

if TYPE_CHECKING:
    from virtio.devices.balloon import BalloonDevice
    from virtio.devices.blk import BlockDevice
    from virtio.devices.net import NetDevice
    from vmm.vm import VirtualMachine

CPU_SECONDS = 30.0
"""How long a guest may take to give up a processor, or to bring one online."""
REMIND_SECONDS = 2.0
"""How long it may take before it is asked again."""
LEAST_MEMORY = 16 * MIB
"""What a guest keeps at least: none runs on less, and a slip of a unit should not end it."""
Limits = Mapping[str, Any]
"""Limits by the names that Disk and Net have for them; what is not named stays, 0 takes one away."""


def parse(kind: type[Checked], text: str) -> tuple[str, dict[str, Any]]:
    """NAME,limit=VALUE[,…] as a name and limits, and a card's policy. ConfigError."""
    name, values = split(kind._where, text, {})
    if not values:
        raise ConfigError(f"{kind._where}: {text!r} changes nothing; write {name},{limit_names(kind)[0]}=…")
    return name, checked(kind, values)


def checked(kind: type[Checked], values: Limits) -> dict[str, Any]:
    """Limits and policies from what users write. ConfigError."""
    known = limit_names(kind) + (list(POLICY) if kind is Net else [])
    found = {}
    for key, value in values.items():
        if key not in known:
            some = ", ".join(name for name in known if not name.endswith("_burst"))
            raise ConfigError(f"{kind._where}: {key} cannot be changed while the machine runs; {some} can")
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


async def change_cpus(vm: VirtualMachine, count: int) -> None:
    """Give the guest so many processors. Those that come are brought online by its udev, or by our agent; those that go
    it has to give up. Raises ConfigError, and GuestError if it does not within CPU_SECONDS."""
    most = vm.config.most_cpus
    hotplug = vm.machine.services.cpu_hotplug
    if hotplug is None:
        raise ConfigError(f"cpus: this machine has {vm.config.cpus} for good; start it with --cpus N,max=M")
    in_range(1, most, "cpus", count)
    came = sorted(set(range(most)) - hotplug.present)[: max(count - len(hotplug.present), 0)]
    for index in came:
        hotplug.insert(index)
    if came:
        await _bring_online(vm, came)
    leaving = sorted(hotplug.present, reverse=True)[: max(len(hotplug.present) - count, 0)]
    if not leaving:
        return
    answers: dict[int, asyncio.Future[str | None]] = {}
    for index in leaving:
        answers[index] = asyncio.get_running_loop().create_future()

    def answered(index: int, reason: str | None) -> None:
        if index in answers and not answers[index].done():
            answers[index].set_result(reason)

    hotplug.on_change = answered
    deadline = time.monotonic() + CPU_SECONDS
    waiting = set(answers.values())
    while waiting and (left_seconds := deadline - time.monotonic()) > 0:
        for index, answer in answers.items():
            if not answer.done():
                hotplug.ask(index)  # again: a kernel that only starts forgets what it was told before
        _, waiting = await asyncio.wait(waiting, timeout=min(left_seconds, REMIND_SECONDS))
    for index, answer in answers.items():
        if answer.done() and (reason := answer.result()) is not None:
            raise GuestError(f"cpus: processor {index}: {reason}")
    if waiting:
        left = sorted(str(index) for index in leaving if index in hotplug.present)
        raise GuestError(
            f"cpus: the guest has not given up processor {', '.join(left)} within {CPU_SECONDS:g} s; "
            "its kernel has no ACPI hot plug, or is busy"
        )


async def _bring_online(vm: VirtualMachine, came: Sequence[int]) -> None:
    """With our agent, as udev does it elsewhere. A guest that does not answer has its processors all the same."""
    if not vm.config.agent:
        return
    script = (
        "for n; do f=/sys/devices/system/cpu/cpu$n/online; i=0; "
        "while [ ! -e $f ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i+1)); done; "
        '[ "$(cat $f)" = 1 ] || echo 1 >$f; done'
    )
    try:
        async with asyncio.timeout(CPU_SECONDS):
            await vm.agent.wait_ready()
            result = await vm.exec("sh", "-c", script, "sh", *map(str, came))
    except (TimeoutError, VmmError) as error:
        vm.tell(f"cpus: the guest has not brought them online: {error or 'no answer'}")
        return
    if result.status:
        vm.tell(f"cpus: the guest has not brought them online: {result.text}")


async def change(
    vm: VirtualMachine,
    *,
    cpus: int | str | None = None,
    memory: int | str | None = None,
    disks: Mapping[str, Limits] | None = None,
    nets: Mapping[str, Limits] | None = None,
) -> None:
    """Change all of these, or none. `cpus`: how many processors, see change_cpus. `memory`: bytes that the guest is to
    keep, of those that it began with; it gives the rest to the balloon as fast as it likes. `disks`, `nets`: limits by
    name, and of a card its policy: "allow", "deny" and "dns" as Net has them. ConfigError; GuestError if the guest does
    not give up a processor, and HostError if a card cannot get its first policy or lose its last (vmm.policies): the
    rest is changed then."""
    from vmm import policies

    balloon, pages = _target(vm, memory) if memory is not None else (None, 0)
    count = 0 if cpus is None else in_range(1, vm.config.most_cpus, "cpus", cpus)
    wanted: list[tuple[BlockDevice | NetDevice, dict[str, int]]] = []
    policed: list[Callable[[], Awaitable[None]]] = []
    for name, values in (disks or {}).items():
        wanted.append((find_disk(vm, name), checked(Disk, values)))
    for name, values in (nets or {}).items():
        policy, limits = policies.parts(checked(Net, values))
        wanted.append((find_net(vm, name), limits))
        if policy:
            with core_errors():
                policed.append(policies.prepare(vm, name, policy))
    with core_errors():
        for device, limits in wanted:
            device.set_limits(limits)
        for change_policy in policed:
            await change_policy()
        if balloon is not None:
            balloon.set_target(pages)
    if cpus is not None:
        await change_cpus(vm, count)


def present(vm: VirtualMachine) -> dict[str, Any]:
    """What holds: "limits" of each disk and card that has some, by its name; "balloon", if there is one."""
    found = {name: disk.limits.as_dict() for name, disk in vm.block_devices().items()}
    found |= {name: net.limits for name, net in vm.nets().items()}
    limits = {name: values for name, values in found.items() if values}
    balloon = find_balloon(vm)
    answer: dict[str, Any] = {"limits": limits} if limits else {}
    policies = {one["id"]: one["policy"] for one in vm.attached() if "policy" in one}
    if policies:
        answer["policies"] = policies
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
