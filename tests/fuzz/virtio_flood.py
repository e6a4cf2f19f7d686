"""Flood every virtio device of a machine, beside a second machine in the same loop:
`python -m tests.fuzz.virtio_flood [SECONDS [DEVICE…]]`. SECONDS for each device, 60 by default.

Drivers run in processes of their own (tests/support/flooder.py), for a guest does not run in the loop. Each kind of
request gets its part of the time, and ends with a reset in the midst of the flood. The second machine is a tiny guest
that echoes what is typed; how long its answer takes is measured all the time.

It fails if a reset is not complete at once, the second machine does not answer, or memory passes what docs/machine.md
states (MEMORY_MAX). The stalls are printed: the longest of each part, as the median over all parts and the greatest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

import vmm
from tests.support.flooder import Flooder
from tests.support.floods import World, worlds
from tests.support.stalls import StallWatch, resident

MEMORY_MAX = 192 << 20
"""Bytes by which one machine's virtio devices make the process grow at most, beside guest memory."""
RESET_SECONDS = 10.0
"""A reset of a disk may wait for what the kernel has begun; every other is complete when the register was written."""
ECHO_PERIOD = 0.02


@dataclass
class Result:
    """What one device's flood did to the others."""

    name: str
    stalls: list[float] = field(default_factory=list)
    """Seconds of the loop thread's processor time: the longest turn in each part."""
    walls: list[float] = field(default_factory=list)
    """The same in seconds that passed."""
    echoes: list[float] = field(default_factory=list)
    """Seconds until the second machine's answer: the longest in each part."""
    resets: list[float] = field(default_factory=list)
    """Seconds until status reads 0."""
    at_once: bool = True
    """Every reset was complete when the register was written."""
    grown: int = 0
    worst: str = ""
    """The kind of request with the longest stall."""
    details: str = ""
    """A line for each kind of request."""

    def kinds(self, names: Sequence[str]) -> str:
        """The longest stall of each kind of request."""
        each = zip(names, self.stalls, self.walls, self.resets, strict=True)
        return "".join(
            f"  {name:34} {stall * 1e3:7.2f} ms of work, {wall * 1e3:7.2f} passed; reset {reset * 1e3:.2f}\n"
            for name, stall, wall, reset in each
        )

    def line(self) -> str:
        def ms(values: Sequence[float]) -> str:
            return f"{statistics.median(values) * 1e3:8.2f} {max(values) * 1e3:8.2f}"

        return (
            f"{self.name:16} {ms(self.stalls)} {ms(self.walls)} {ms(self.echoes)} {max(self.resets) * 1e3:8.2f} "
            f"{self.grown / (1 << 20):8.1f}  {self.worst}"
        )


TITLE = (
    f"{'':16} {'stall, ms of work':>17} {'ms that passed':>17} {'echo, ms':>17} {'reset':>8} {'MiB':>8}\n"
    f"{'device':16} {'median':>8} {'longest':>8} {'median':>8} {'longest':>8} {'median':>8} {'longest':>8} {'ms':>8}"
)


class Echo:
    """The second machine: types into it every 20 ms, and notes how long the answer takes."""

    def __init__(self, vm: vmm.VirtualMachine) -> None:
        self._vm = vm
        self.longest = 0.0
        self.answers = 0
        self._task = asyncio.get_running_loop().create_task(self._ask(), name="echo")

    async def _ask(self) -> None:
        for number in range(1 << 60):
            text = b"%d;" % number
            began = time.monotonic()
            await self._vm.console.write(text)
            await self._vm.console.expect(text, timeout=30)
            self.longest = max(self.longest, time.monotonic() - began)
            self.answers += 1
            await asyncio.sleep(ECHO_PERIOD)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def flood(name: str, world: World, flooder: Flooder, seconds: float, stalls: StallWatch, echo: Echo) -> Result:
    """One device, each kind of request for its part of `seconds`."""
    result = Result(name)
    device = await world.make()
    driver = flooder.driver(device)
    base = 0
    try:
        for kind in flooder.kinds:
            await flooder.begin(driver, kind)
            if not base:
                base = resident(collect=False)
            stalls.restart()
            echo.longest, echo.answers = 0.0, 0
            await asyncio.sleep(seconds / len(flooder.kinds))
            grown = resident(collect=False) - base
            began = time.monotonic()
            driver.write_status(0)
            at_once = driver.read_status() == 0
            await driver.wait(lambda: driver.read_status() == 0, RESET_SECONDS)
            result.resets.append(time.monotonic() - began)
            result.at_once = result.at_once and at_once
            await asyncio.sleep(0.01)
            stall, wall = stalls.restart()
            await flooder.stop()
            await driver.wait(lambda: echo.answers)
            if stall > max(result.stalls, default=0.0):
                result.worst = kind
            result.stalls.append(stall)
            result.walls.append(wall)
            result.echoes.append(echo.longest)
            result.grown = max(result.grown, grown)
    finally:
        flooder.unplug()
        driver.transport.reset()
        await device.aclose()
        await world.close()
    result.details = result.kinds(list(flooder.kinds))
    return result


async def campaign(everything: dict[str, tuple[World, Flooder]], seconds: float) -> list[Result]:
    """Each device in turn, `seconds` each, beside the second machine."""
    results = []
    async with vmm.run("echo") as vm, StallWatch() as stalls:
        await vm.console.expect(rb"Ctrl-D ends\n", timeout=30)
        echo = Echo(vm)
        try:
            for name, (world, flooder) in everything.items():
                results.append(await flood(name, world, flooder, seconds, stalls, echo))
        finally:
            await echo.close()
    return results


def run(seconds: float, names: Sequence[str] = ()) -> list[Result]:
    """The campaign over the devices called so, by default all."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        everything = {}
        for name, world in worlds(Path(folder)).items():
            if name in names or not names:
                flooder = Flooder(world.kinds)
                stack.callback(flooder.close)
                everything[name] = world, flooder
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(campaign(everything, seconds))


def main() -> int:
    logging.disable(logging.WARNING)
    results = run(float(sys.argv[1]) if len(sys.argv) > 1 else 60, sys.argv[2:])
    write = sys.stdout.write
    write(TITLE + "\n" + "".join(f"{result.line()}\n{result.details}" for result in results))
    stalls = [stall for result in results for stall in result.stalls]
    write(f"median of the longest stalls {statistics.median(stalls) * 1e3:.2f} ms; ")
    write(f"the process was {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB at most\n")
    wrong = [f"{each.name}: grew by {each.grown >> 20} MiB" for each in results if each.grown > MEMORY_MAX]
    wrong += [
        f"{each.name}: a reset was not complete at once"
        for each in results
        if not (each.at_once or each.name.startswith("blk"))
    ]
    for line in wrong:
        write(line + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
