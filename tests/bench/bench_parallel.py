"""Two compute jobs at once on two vCPUs of the software core, beside one alone: with a host thread for each vCPU
(--parallel on) and with one for both (off), in turn. The figure is throughput: twice the time of one job, by the time
of two at once. On a host with one processor, or a busy one, it says nothing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Mapping

import vmm
from vmm.vm import VirtualMachine

ROUNDS = 5
GOAL = 1.8
JOB = "awk 'BEGIN { for (i = 0; i < 400000; i++) s += i * i % 7; print s > \"/dev/null\" }'"


async def seconds(vm: VirtualMachine, command: str) -> float:
    begin = time.monotonic()
    await vm.exec("sh", "-c", command, timeout=600)
    return time.monotonic() - begin


async def measure() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"on": [], "off": []}
    for mode in found:
        async with vmm.run("linux", core="soft", cpus=2, parallel=mode, console="none") as vm:
            await seconds(vm, JOB)
            for _ in range(ROUNDS):
                one = await seconds(vm, JOB)
                two = await seconds(vm, f"{JOB} & {JOB} & wait")
                found[mode].append(2 * one / two)
    return found


def rows() -> Iterator[Mapping[str, object]]:
    name = "two jobs on two vCPUs, throughput of one"
    if len(os.sched_getaffinity(0)) < 2:
        yield {"name": name, "value": None, "note": "needs two processors"}
        return
    found = asyncio.run(measure())
    load = f"load {os.getloadavg()[0]:.1f}"
    yield {"name": f"{name}, --parallel on", "value": statistics.median(found["on"]), "unit": "×", "goal": GOAL,
           "better": "more", "note": load}  # fmt: skip
    yield {"name": f"{name}, off", "value": statistics.median(found["off"]), "unit": "×", "note": load}
