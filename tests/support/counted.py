"""A machine's counters as they are, rather than as its vCPUs told them when they last paused."""

from __future__ import annotations

from vmm.vm import VirtualMachine


async def counters(machine: VirtualMachine) -> dict[str, int]:
    """What `stats()` says while the machine stands still for it."""
    await machine.pause()
    found = machine.stats()
    machine.resume()
    return found
