"""GDB's `monitor` commands: what a machine's user wants to know and the protocol has no packet for."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from vmm.debug import inspect
from vmm.debug.debugger import Debugger
from vmm.errors import ConfigError, VmmError

MAX_BYTES = 4096
HELP = """\
registers [VCPU]              every register of a vCPU, or of all
physical ADDRESS [LENGTH]     guest-physical memory, in bytes
translate ADDRESS             the guest-physical address of a linear one
exits [VCPU]                  the last accesses to devices, and other exits
interrupts on|off             whether a vCPU that is stepped gets interrupts (off)
reset                         start the machine again, as its reset button does
help                          this
"""


class Monitor:
    """Runs commands on a debugger whose machine stands."""

    def __init__(self, debugger: Debugger, reset: Callable[[], None]) -> None:
        self._debugger, self._reset = debugger, reset

    def describe(self, index: int) -> str:
        """What a vCPU is doing, in a few words."""
        try:
            return inspect.activity(self._debugger.vcpu(index))
        except VmmError:
            return "unknown"

    async def execute(self, line: str) -> str:
        """The text for the user, which ends its last line; mistakes are text as well."""
        try:
            words = shlex.split(line)
        except ValueError as error:
            return f"{error}\n"
        name, *arguments = words or ["help"]
        try:
            if name == "registers" and len(arguments) < 2:
                return "".join(inspect.text(inspect.registers(vcpu)) for vcpu in self._chosen(arguments))
            if name == "exits" and len(arguments) < 2:
                return "".join(inspect.exits_text(inspect.exits(vcpu)) for vcpu in self._chosen(arguments))
            if name == "physical" and len(arguments) in (1, 2):
                return self._physical(*arguments)
            if name == "translate" and len(arguments) == 1:
                gpa = self._debugger.translate(0, _number(arguments[0]))
                return f"{gpa:#x}\n" if gpa is not None else "not mapped\n"
            if name == "interrupts" and arguments in (["on"], ["off"], []):
                if arguments:
                    self._debugger.hold_interrupts = arguments == ["off"]
                return f"{'off' if self._debugger.hold_interrupts else 'on'}\n"
            if name == "reset" and not arguments:
                self._reset()
                return "the machine starts again; its first instruction waits for continue\n"
        except VmmError as error:
            return f"{error}\n"
        return HELP

    def _chosen(self, arguments: list[str]) -> list[inspect.InspectedVcpu]:
        indices = [_number(arguments[0])] if arguments else list(range(self._debugger.count))
        return [self._debugger.vcpu(index) for index in indices]

    def _physical(self, address: str, length: str = "64") -> str:
        at, size = _number(address), _number(length)
        if size > MAX_BYTES:
            raise ConfigError(f"{size} bytes are too many; {MAX_BYTES} at a time")
        data = self._debugger.read(0, at, size, physical=True)
        lines = [
            f"{at + offset:016x}: {data[offset : offset + 16].hex(' ')}\n" for offset in range(0, len(data), 16)
        ]
        return "".join(lines) or f"{at:#x} is not RAM\n"


def _number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise ConfigError(f"{text!r} is not a number; write 4096 or 0x1000")
    return value
