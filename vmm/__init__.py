"""The machine: configuration, memory, buses, devices, boot, lifecycle; embedding and management.

    async with vmm.VirtualMachine(kernel="bzImage", memory="512M") as vm:
        outcome = await vm.run()

Names are imported when they are first used, so that `import vmm` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmm.config import Config, ConsoleConfig, Disk, FlatImage, Net, Share
    from vmm.console.hub import Console, ConsoleClosed, ConsoleReader, ConsoleTimeout
    from vmm.errors import ConfigError, GuestError, HostError, StateError, VmmError
    from vmm.events import (
        Attached,
        ConsoleBreak,
        Detached,
        DetachRefused,
        DiskJobChanged,
        Ended,
        Event,
        Rebooted,
        StateChanged,
        Warned,
    )
    from vmm.guest.process import ExecResult, GuestProcess
    from vmm.launch import restore, run
    from vmm.lifecycle import Outcome, Reason, State
    from vmm.machine.bus import Register
    from vmm.machine.peripheral import Peripheral, Stateless
    from vmm.migration.target import receive
    from vmm.network.switch import Switch
    from vmm.sandboxes.box import RunResult, Sandbox, SyncSandbox, sandbox
    from vmm.vm import VirtualMachine

__version__ = "0.1.0"

_HOMES = {
    "vmm.guest.process": ("ExecResult", "GuestProcess"),
    "vmm.config": ("Config", "ConsoleConfig", "Disk", "FlatImage", "Net", "Share"),
    "vmm.console.hub": ("Console", "ConsoleClosed", "ConsoleReader", "ConsoleTimeout"),
    "vmm.errors": ("ConfigError", "GuestError", "HostError", "StateError", "VmmError"),
    "vmm.events": (
        "Attached", "ConsoleBreak", "DetachRefused", "Detached", "DiskJobChanged", "Ended", "Event", "Rebooted",
        "StateChanged", "Warned",
    ),
    "vmm.launch": ("restore", "run"),
    "vmm.lifecycle": ("Outcome", "Reason", "State"),
    "vmm.machine.bus": ("Register",),
    "vmm.machine.peripheral": ("Peripheral", "Stateless"),
    "vmm.migration.target": ("receive",),
    "vmm.network.switch": ("Switch",),
    "vmm.sandboxes.box": ("RunResult", "Sandbox", "SyncSandbox", "sandbox"),
    "vmm.vm": ("VirtualMachine",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Attached",
    "Config",
    "ConfigError",
    "Console",
    "ConsoleBreak",
    "ConsoleClosed",
    "ConsoleConfig",
    "ConsoleReader",
    "ConsoleTimeout",
    "DetachRefused",
    "Detached",
    "Disk",
    "DiskJobChanged",
    "Ended",
    "Event",
    "ExecResult",
    "FlatImage",
    "GuestError",
    "GuestProcess",
    "HostError",
    "Net",
    "Outcome",
    "Peripheral",
    "Reason",
    "Rebooted",
    "Register",
    "RunResult",
    "Sandbox",
    "Share",
    "State",
    "StateChanged",
    "StateError",
    "Stateless",
    "Switch",
    "SyncSandbox",
    "VirtualMachine",
    "VmmError",
    "Warned",
    "receive",
    "restore",
    "run",
    "sandbox",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vmm' has no attribute {name!r}")
