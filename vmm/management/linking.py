"""The control socket's request to pull a network card's cable, or to plug it in.

    {"command": "link", "id": "net0", "up": false}   -> {"ok": true, "id": "net0", "up": false}
Loop thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.changes import find_net
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine


async def link(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError."""
    name, up = request.get("id"), request.get("up")
    if not isinstance(name, str) or not isinstance(up, bool):
        raise ConfigError("link: give the id of a network card, and up as true or false")
    find_net(vm, name).set_link(up)
    return {"id": name, "up": up}
