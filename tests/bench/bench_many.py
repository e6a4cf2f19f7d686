"""Twenty Linux guests at once in one Python process: the time until each has answered a command, and what each further
guest takes of the process's memory beyond its own.

Memory is what smaps names resident when the guests have nothing to do, without the mappings of guest memory (the
guests' own pages, which are reported by themselves). What a process maps twice (memory for translated code) counts
once. The first guest pays for what all share (Python, the cores' code), so the figure is the difference between
twenty guests and one, divided by nineteen.
Everything runs in a fresh process.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import vmm
from tests.bench.settled import settled
from vmm.vm import VirtualMachine

GUESTS = 20
GOAL_MIB = 8.0
MIB = 1 << 20


def guest_ranges(machine: VirtualMachine) -> list[tuple[int, int]]:
    """[start, end) of the host's addresses of a machine's memory."""
    assert machine._machine is not None
    found = []
    for _, buffer in machine._machine.memory.regions():
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        found.append((start, start + len(buffer)))
    return found


def resident(machines: list[VirtualMachine]) -> Counter[str]:
    """Bytes resident in this process by kind of mapping: "guest", "heap", "code", "files", "anonymous"."""
    ranges = [item for machine in machines for item in guest_ranges(machine)]
    found: Counter[str] = Counter()
    kind = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(word, 16) for word in words[0].split("-"))
            if any(start < high and low < end for low, high in ranges):
                # Neighbours of the same kind are one mapping: it must hold guest memory alone.
                inside = sum(min(end, high) - max(start, low) for low, high in ranges if start < high and low < end)
                kind = "guest" if inside == end - start else "mixed"
            elif words[-1] == "[heap]":
                kind = "heap"
            elif "memfd:loopvisor-code" in line:
                kind = "translations"
            elif "x" in words[1]:
                kind = "code"
            else:
                kind = "files" if len(words) > 5 and words[5].startswith("/") else "anonymous"
        elif words[0] == ("Pss:" if kind == "translations" else "Rss:"):
            found[kind] += int(words[1]) * 1024
    if found["mixed"]:
        raise RuntimeError("guest memory shares a mapping with something else: it cannot be told apart")
    return found


async def measure(count: int, core: str, tiny: int) -> dict[str, object]:
    """Start `count` Linux guests at once beside `tiny` small ones, let each answer; then look."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    async with AsyncExitStack() as stack:

        async def one(number: int) -> VirtualMachine:
            machine: VirtualMachine = await stack.enter_async_context(vmm.run("linux", core=core, nets=()))
            answer = await machine.exec("sh", "-c", f"echo {number}", timeout=600)
            assert answer.text == str(number)
            return machine

        for _ in range(tiny):
            await stack.enter_async_context(vmm.run("echo", core=core))
        machines = await asyncio.gather(*(one(number) for number in range(count)))
        seconds = loop.time() - begin
        again = loop.time()
        await asyncio.gather(*(machine.exec("true", timeout=600) for machine in machines))
        again = loop.time() - again
        working = resident(machines)
        found = await settled(lambda: resident(machines), lambda found: found.total() - found["guest"])
        return {"seconds": seconds, "again": again, "resident": dict(found), "working": dict(working)}


def in_fresh_process(count: int, core: str, tiny: int = 0) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.bench.bench_many", str(count), core, str(tiny)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def beyond(measured: dict[str, object], when: str = "resident") -> int:
    """Bytes that are no guest's own memory: at rest, or with `when` "working" just after a command."""
    found = measured[when]
    assert isinstance(found, dict)
    return sum(value for kind, value in found.items() if kind != "guest")


def rows() -> Iterator[Mapping[str, object]]:
    one, many = in_fresh_process(1, "soft"), in_fresh_process(GUESTS, "soft")
    yield {"name": f"{GUESTS} Linux guests at once: each has answered exec", "value": many["seconds"], "unit": "s"}
    yield {"name": f"{GUESTS} guests: exec of `true` in all, at once", "value": many["again"], "unit": "s"}
    each = (beyond(many) - beyond(one)) / (GUESTS - 1) / MIB
    yield {"name": "memory of each further guest beyond its own", "value": each, "unit": "MiB", "goal": GOAL_MIB}
    busy = (beyond(many, "working") - beyond(one, "working")) / (GUESTS - 1) / MIB
    yield {"name": "the same just after a command, before it has slept", "value": busy, "unit": "MiB"}
    for kind in sorted(many["resident"]):  # type: ignore[call-overload]
        less = one["resident"].get(kind, 0)  # type: ignore[attr-defined]
        share = (many["resident"][kind] - less) / (GUESTS - 1) / MIB  # type: ignore[index]
        name = "its own (guest memory resident)" if kind == "guest" else f"  of that: {kind}"
        yield {"name": f"each further guest: {name}", "value": share, "unit": "MiB"}


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(measure(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))))
