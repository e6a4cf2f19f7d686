"""Programs in a Linux guest on the software core: one large stream each way, and the time of a small program.

Where the time goes stands beside each figure: processor time of the loop's thread, of the rest of the process (nearly
all of it the vCPU's thread), instructions of the guest. The two threads work at the same time, so the larger of the two
is the time on a machine with two idle processors; the wall clock also has what other processes take.
`sh` is the same program started by a shell within the guest: what is left then is not the agent's.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import NamedTuple

import uvloop

import vmm

MIB = 1 << 20
INPUT, OUTPUT, PROGRAMS, ROUNDS = 50, 200, 100, 3


class Cost(NamedTuple):
    """Of one run: seconds of the wall clock, of the loop's thread, of all other threads; guest instructions; MiB by
    which the peak of the process's memory rose."""

    wall: float
    loop: float
    rest: float
    instructions: int
    peak: float


def now() -> tuple[float, float, float, float]:
    thread, process = resource.getrusage(resource.RUSAGE_THREAD), resource.getrusage(resource.RUSAGE_SELF)
    own = thread.ru_utime + thread.ru_stime
    return time.monotonic(), own, process.ru_utime + process.ru_stime - own, process.ru_maxrss / 1024


async def cost(vm: vmm.VirtualMachine, work: Callable[[], Awaitable[object]]) -> Cost:
    instructions, before = vm.stats()["instructions"], now()
    await work()
    wall, loop, rest, peak = (after - then for after, then in zip(now(), before, strict=True))
    return Cost(wall, loop, rest, vm.stats()["instructions"] - instructions, peak)


async def measure() -> dict[str, Cost]:
    """The best of ROUNDS by the wall clock."""
    async with vmm.run("linux", core="soft", nets=()) as vm:

        async def feed() -> None:
            chunk = bytes(MIB)
            async with await vm.start_process("sh", "-c", "cat >/dev/null") as process:
                for _ in range(INPUT):
                    await process.write(chunk)
                await process.close_stdin()
                assert await process.wait() == 0

        async def take() -> None:
            async with await vm.start_process("dd", "if=/dev/zero", "bs=1M", f"count={OUTPUT}") as process:
                assert sum([len(data) async for data in process.stdout]) == OUTPUT * MIB

        async def programs() -> None:
            for _ in range(PROGRAMS):
                await vm.exec("true", check=True)

        async def by_shell() -> None:
            script = f"i=0; while [ $i -lt {PROGRAMS} ]; do /bin/true; i=$((i + 1)); done"
            await vm.exec("sh", "-c", script, check=True)

        found: dict[str, Cost] = {}
        await programs()
        for _ in range(ROUNDS):
            for name, work in (("in", feed), ("out", take), ("exec", programs), ("sh", by_shell)):
                one = await cost(vm, work)
                found[name] = min(found.get(name, one), one)
        return found


def rows() -> Iterator[Mapping[str, object]]:
    """The bench's figures."""
    found = uvloop.run(measure())
    for name, what, mib in (("in", "to a program's input", INPUT), ("out", "of a program's output", OUTPUT)):
        one = found[name]
        note = f"a MiB: loop {one.loop / mib * 1e3:.1f}, vCPU {one.rest / mib * 1e3:.1f} ms, "
        note += f"{one.instructions / mib / 1e6:.1f} M instructions; {one.peak:.0f} MiB more memory"
        yield {"name": f"{mib} MiB {what}", "value": mib * MIB / one.wall / 1e6, "unit": "MB/s", "goal": 100,
               "better": "more", "note": note}  # fmt: skip
        yield {"name": "  by the busier thread alone", "value": mib * MIB / max(one.loop, one.rest) / 1e6,
               "unit": "MB/s", "goal": 100, "better": "more"}  # fmt: skip
    for name, what in (("exec", 'exec("true"), one after another'), ("sh", "the same program, started by a shell")):
        one = found[name]
        note = f"loop {one.loop / PROGRAMS * 1e3:.2f}, vCPU {one.rest / PROGRAMS * 1e3:.2f} ms, "
        note += f"{one.instructions / PROGRAMS / 1e3:.0f} k instructions"
        row = {"name": what, "value": one.wall / PROGRAMS * 1e3, "unit": "ms", "note": note}
        yield row | ({"goal": 5} if name == "exec" else {})


