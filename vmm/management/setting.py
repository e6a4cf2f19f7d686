"""The control socket's request to change a running machine.

    {"command": "set", "disks": {"disk0": {"iops": 100}}, "nets": {"net0": {"bps_in": 1000000}}}
                                                -> {"ok": true, "limits": …} with what holds now
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.changes import present
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

KEYS = ("disks", "nets")


async def set_machine(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request. Raises ConfigError, StateError."""
    wanted = {key: value for key, value in request.items() if key != "command"}
    for key, value in wanted.items():
        if key not in KEYS:
            raise ConfigError(f"{key!r} cannot be set; {', '.join(KEYS)} can")
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            raise ConfigError(f"{key}: an object of objects is expected")
    await vm.set(**wanted)
    return {"limits": present(vm)}
