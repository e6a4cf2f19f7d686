"""Control-socket operations by which devices come and go.

    {"command": "attach", "disk": "FILE,ro", "timeout": 10}   -> {"ok": true, "id": "disk1", "slot": 5, "driven": true}
    {"command": "attach", "net": {"kind": "user"}}            -> likewise; text as of --disk, --net, --share, or a table
    {"command": "detach", "id": "disk1", "force": false, "timeout": 30} -> {"ok": true, "id": "disk1", "by": "guest"}

`driven`: the guest's driver has taken the device within `timeout`. `note`, of a share that was to be mounted: why it is
not. Loop thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

MAX_SECONDS = 3600.0


def seconds(request: dict[str, Any], default: float | None) -> float | None:
    """The request's timeout. Raises ConfigError."""
    value = request.get("timeout", default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
        raise ConfigError(f"timeout: {value!r} is not a number of seconds up to {MAX_SECONDS:g}")
    return float(value)


async def attach(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises VmmError."""
    from vmm.hotplug import DRIVER_SECONDS, part_of

    timeout = seconds(request, DRIVER_SECONDS)
    made = await vm.attach(part_of(request), timeout=DRIVER_SECONDS if timeout is None else timeout)
    return {"id": made.id, "slot": made.slot, "driven": made.driven, "note": made.note}


async def detach(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises VmmError."""
    name, force = request.get("id"), request.get("force", False)
    if not isinstance(name, str) or not isinstance(force, bool):
        raise ConfigError("detach: give the id of a device, and force as true or false")
    return {"id": name, "by": await vm.detach(name, force=force, timeout=seconds(request, None))}
