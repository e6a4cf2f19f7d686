"""How soon the loop hears of an event while guests spin: eventfd written by another thread to the callback."""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from collections.abc import Iterator

import uvloop

from cpu.select import probe
from images import guests
from vmm import VirtualMachine

EVENTS = 1500
INTERVAL = 0.0005


async def latencies() -> list[float]:
    """µs, one for each event."""
    loop = asyncio.get_running_loop()
    descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    found: list[float] = []
    sent = [0]
    done = asyncio.Event()
    heard = threading.Event()

    def ready() -> None:
        os.eventfd_read(descriptor)
        found.append((time.perf_counter_ns() - sent[0]) / 1e3)
        heard.set()
        if len(found) == EVENTS:
            done.set()

    def write() -> None:
        for _ in range(EVENTS):
            heard.clear()
            sent[0] = time.perf_counter_ns()
            os.eventfd_write(descriptor, 1)
            heard.wait(5)
            time.sleep(INTERVAL)

    loop.add_reader(descriptor, ready)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        await done.wait()
    finally:
        loop.remove_reader(descriptor)
        await asyncio.to_thread(thread.join)
        os.close(descriptor)
    return found


async def measure(core: str, spinning: int) -> list[float]:
    machines = [VirtualMachine(core=core, kernel=guests.path("spin"), memory="16M") for _ in range(spinning)]
    try:
        for vm in machines:
            await vm.__aenter__()
            vm.resume()
        return await latencies()
    finally:
        for vm in machines:
            await vm.aclose()


def rows() -> Iterator[dict[str, object]]:
    for core in ("kvm", "soft"):
        if not probe(core).available:
            continue
        for spinning in (0, 2):
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                found = sorted(runner.run(measure(core, spinning)))
            name = f"event to callback, {spinning} vCPUs spinning on {core}"
            yield {"name": f"{name}, median", "value": round(statistics.median(found), 1), "unit": "µs"}
            yield {"name": f"{name}, p99", "value": round(found[int(len(found) * 0.99)], 1), "unit": "µs"}
