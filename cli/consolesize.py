"""The size of the terminal on which a machine's console is shown, told to the guest."""

from __future__ import annotations

import asyncio
import os
import signal

from vmm.events import Rebooted
from vmm.vm import VirtualMachine


def terminal_size() -> tuple[int, int]:
    """(rows, columns) of the terminal on standard output, else on input or error; 24 and 80 if there is none."""
    for descriptor in (1, 0, 2):
        try:
            size = os.get_terminal_size(descriptor)
        except OSError:
            continue
        return size.lines, size.columns
    return 24, 80


async def follow_size(vm: VirtualMachine) -> None:
    """Tell the guest at the start, after each reboot and whenever the window changes. Until it is cancelled."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    changed.set()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    helpers = [asyncio.create_task(_reboots(vm, changed), name="reboots")]
    try:
        while True:
            await changed.wait()
            changed.clear()
            # An earlier call may still wait for the agent, with a size that no longer holds.
            helpers[1:] = await _replaced(helpers[1:], vm)
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        for helper in helpers:
            helper.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)


async def _replaced(telling: list[asyncio.Task[None]], vm: VirtualMachine) -> list[asyncio.Task[None]]:
    for task in telling:
        task.cancel()
    await asyncio.gather(*telling, return_exceptions=True)
    return [asyncio.create_task(vm.resize_console(*terminal_size()), name="console-size")]


async def _reboots(vm: VirtualMachine, changed: asyncio.Event) -> None:
    async for event in vm.events():
        if isinstance(event, Rebooted):
            changed.set()
