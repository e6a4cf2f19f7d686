"""Whether a machine's guest programs run natively, beside the software core. Knows no devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError, HostError

if TYPE_CHECKING:
    from cpu.contract import System, Vm
    from vmm.config import Config
    from vmm.machine.memory import GuestMemory


def obstacle(config: Config, system: System) -> str:
    """Why this machine cannot run guest programs natively on any host; empty if it can."""
    if system.name != "soft":
        return f"the core {system.name} has no need of it"
    if config.clock == "virtual":
        return "with the virtual clock every instruction is counted"
    if config.seed is not None:
        return "with a seed the guest may have no random bytes of the host"
    if config.hugepages:
        return "memory of reserved huge pages cannot be mapped page by page"
    if config.most_cpus > 1 and not config.runs_in_parallel:
        return "several processors that share a thread run in the core (parallel: on gives each its own)"
    return ""


def runs_directly(config: Config, system: System) -> bool:
    """Whether guest programs run natively, by the configuration and what this host can. ConfigError or HostError if the
    configuration says "on" and that is not possible."""
    if config.direct == "off":
        return False
    reason = obstacle(config, system)
    if reason and config.direct == "on":
        raise ConfigError(f"direct: {reason}; use --direct auto or off")
    if reason:
        return False
    from cpu.direct import support

    found = support()
    if not found.available and config.direct == "on":
        raise HostError(f"direct: this host cannot: {found.reason}; use --direct auto or off")
    return found.available


def host_support() -> dict[str, Any]:
    """What `vmm doctor` tells: available, reason (why not), cpuid_faults, breakpoints."""
    from cpu.direct import support

    found = support()
    names = "available", "reason", "cpuid_faults", "breakpoints"
    return {name: getattr(found, name) for name in names}


def start_direct(vm: Vm, memory: GuestMemory, *, always: bool) -> None:
    """Begin direct execution. The memory is shared, and in its slots. Raises HostError, CpuError."""
    from cpu.direct import disable, enable

    regions = dict(memory.regions())
    extents = memory.shared
    enable(vm, extents[0].fd, [(regions[extent.gpa], extent.offset) for extent in extents], always=always)
    memory.before_freeze = lambda: disable(vm)
