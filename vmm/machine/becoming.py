"""How a machine that goes on from another's state becomes one of its own. Loop thread."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from vmm.guest.identity import ENTROPY, Identity, payload

if TYPE_CHECKING:
    from vmm.machine.builder import Machine

FIRST_CID = 3


def become(machine: Machine, identity: Identity) -> None:
    """Give the devices what tells this machine from the original, and have the guest's agent told, before the machine
    runs on. The kernel hears of it by the VM generation ID, and mixes it into its random numbers."""
    if machine.services.generation_id is not None:
        machine.services.generation_id.renew()
    resources = machine.resources
    for device in resources.devices.values():
        new = identity.addresses.get(getattr(device, "mac", b""))
        if new is not None:
            device.set_address(new)
        if identity.addresses and hasattr(device, "cid"):
            device.cid = FIRST_CID + int.from_bytes(resources.random(3), "little")
    if resources.agent is not None:
        resources.agent.becomes(partial(_payload, machine, identity))


def _payload(machine: Machine, identity: Identity) -> bytes:
    virtual = machine.config.clock == "virtual"
    entropy = machine.resources.random(ENTROPY) if virtual else os.urandom(ENTROPY)
    return payload(identity, machine.board.clock.wall_ns(), entropy)
