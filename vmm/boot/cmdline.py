"""The default kernel command line, by core.

| parameter | why |
|---|---|
| `console=ttyS0,115200n8r` | the console that `vmm` shows; `r`: a tty that is behind drops RTS, so no input is lost |
| `panic=-1` | a panicked kernel resets at once instead of spinning for ever |
| `reboot=panic_warm` | that reset, and no other, sets the warm-boot flag at 0x472: so a panic is told from a reboot |
| `cryptomgr.notests` | software core: the boot-time crypto self-tests are two thirds of all instructions up to /init |
| `no_timer_check` | software core: host load must not fail the kernel's timer self-test |
"""

from __future__ import annotations

from collections.abc import Set

from cpu.contract import Capability

COMMON = ("console=ttyS0,115200n8r", "panic=-1", "reboot=panic_warm")
INTERPRETED = ("cryptomgr.notests", "no_timer_check")


def default_cmdline(capabilities: Set[Capability], *, extra: tuple[str, ...] = ()) -> str:
    """What a Linux kernel gets when the user gives no command line. `extra` is appended (a root device, say)."""
    interpreted = Capability.VIRTUAL_CLOCK in capabilities
    return " ".join([*COMMON, *(INTERPRETED if interpreted else ()), *extra])
