"""Finds out that every vCPU halted with interrupts off, on cores that do not tell (KVM halts inside the kernel).

A machine that does something does not need to be looked at. One from which nothing has come for a while is parked for a
moment, less and less often, and its vCPUs are read. Loop thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cpu.contract import Vcpu
from vmm.lifecycle import Outcome, Reason
from vmm.machine.dispatch import Dispatcher

FIRST_SECONDS, LAST_SECONDS = 0.5, 4.0
"""Seconds between two looks: after something happened, and at most, when nothing happens for long."""
INTERRUPTS = 1 << 9
"""RFLAGS.IF"""
OWN = {"exit.interrupted", "sleeps"}
"""Counters that a look changes."""


class HaltWatch:
    """Ends the machine through its dispatcher, as a core that reports Halt does."""

    def __init__(self, dispatcher: Dispatcher, vcpus: Sequence[Vcpu], stats: Callable[[], dict[str, int]]) -> None:
        self._dispatcher, self._vcpus, self._stats = dispatcher, vcpus, stats
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="halt watch")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        dispatcher = self._dispatcher
        seconds, seen = FIRST_SECONDS, -1
        try:
            while not dispatcher.ended:
                await asyncio.sleep(seconds)
                count = sum(value for name, value in self._stats().items() if name not in OWN)
                if count != seen or dispatcher.held:
                    seconds, seen = FIRST_SECONDS, count
                    continue
                dispatcher.hold("halt watch")
                try:
                    await dispatcher.wait_parked()
                    if not dispatcher.ended and self._halted():
                        dispatcher.end(Outcome(Reason.HALTED, "every vCPU halted with interrupts off"))
                finally:
                    dispatcher.release("halt watch")
                seconds = min(2 * seconds, LAST_SECONDS)
        except Exception as error:
            dispatcher.fail(error)

    def _halted(self) -> bool:
        """All vCPUs are parked; none can go on by itself."""
        return all(self._stuck(vcpu) for vcpu in self._vcpus)

    def _stuck(self, vcpu: Vcpu) -> bool:
        if vcpu.index == 0 and vcpu.registers().rflags & INTERRUPTS:
            return False  # without reading all of its state, which takes longer
        state = vcpu.state().mp_state
        if state == "halted":
            return not vcpu.registers().rflags & INTERRUPTS
        return vcpu.index > 0 and state in ("uninitialized", "init-received")
