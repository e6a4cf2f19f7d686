"""The control socket's request to change a running machine.

    {"command": "set", "cpus": 2, "memory": 536870912, "disks": {"disk0": {"iops": 100}}, "nets": {"net0": {…}}}
                              -> {"ok": true, "cpus": 2, "limits": …, "policies": …, "balloon": …}: what holds now
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.changes import present
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

KEYS = ("cpus", "memory", "disks", "nets")


def balloon_metrics(name: str, balloon: dict[str, Any]) -> str:
    """What vmm.changes.present says of a balloon, as Prometheus text."""
    samples = {kind: balloon[kind] for kind in ("target", "actual", "discarded")} | balloon["statistics"]
    lines = [
        "# HELP loopvisor_memory What the guest is to keep and keeps, has given back, and says of its memory.",
        "# TYPE loopvisor_memory gauge",
    ]
    lines += [f'loopvisor_memory{{machine="{name}",kind="{kind}"}} {samples[kind]}' for kind in sorted(samples)]
    return "\n".join(lines) + "\n"


async def set_machine(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request. Raises ConfigError, StateError."""
    wanted = {key: value for key, value in request.items() if key != "command"}
    for key, value in wanted.items():
        if key not in KEYS:
            raise ConfigError(f"{key!r} cannot be set; {', '.join(KEYS)} can")
        if key in ("cpus", "memory"):
            continue
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            raise ConfigError(f"{key}: an object of objects is expected")
    await vm.set(**wanted)
    return {"cpus": vm.present_cpus, "max_cpus": vm.config.most_cpus, "limits": {}, **present(vm)}
