"""`vmm serve` on the software core to the unmodified client of E2B's API: how soon sandboxes answer.

Each figure is from before the client asks for a sandbox until the answer of its first command. BENCH_SERVE_LAPS (15)
sandboxes one after another, by the synchronous and the asynchronous client; then 20 at once, until each has answered
and until the last has. The template's warm machine is there already.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAPS = int(os.environ.get("BENCH_SERVE_LAPS", "15"))
AT_ONCE = 20


def rows() -> Iterator[dict[str, object]]:
    """One after another, and at once."""
    from images import builder
    from images.errors import ImageError

    name = "sandbox created and first command answered"
    if importlib.util.find_spec("e2b") is None:
        yield {"name": name, "value": None, "unit": "ms", "note": "the package e2b is not installed"}
        return
    try:
        builder.build("linux")
    except ImageError as error:
        yield {"name": name, "value": None, "unit": "ms", "note": f"no image: {error}"}
        return
    from tests.support.serve import served

    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-serve-") as folder, served(Path(folder)) as server:
        os.environ |= {"E2B_API_URL": server.url, "E2B_SANDBOX_URL": server.url, "E2B_API_KEY": "local"}
        import e2b

        one_after_another(e2b)
        yield described(f"{name}, sync", one_after_another(e2b))
        yield described(f"{name}, async", asyncio.run(asynchronous(e2b)))
        each, whole = asyncio.run(at_once(e2b))
        row = {"name": f"{AT_ONCE} sandboxes at once, until one has answered", "unit": "ms"}
        yield {**row, "value": round(statistics.median(each) * 1000, 1), "note": "median"}
        yield {"name": f"{AT_ONCE} sandboxes at once, until all have", "value": round(whole, 2), "unit": "s"}


def described(name: str, times: list[float]) -> dict[str, object]:
    """The median, with the goal, and the extremes."""
    note = f"least {min(times) * 1000:.0f}, most {max(times) * 1000:.0f}"
    return {"name": name, "value": round(statistics.median(times) * 1000, 1), "unit": "ms", "goal": 300, "note": note}


def one_after_another(e2b: Any) -> list[float]:
    """Seconds of each lap."""
    times = []
    for _ in range(LAPS):
        begin = time.perf_counter()
        box = e2b.Sandbox.create(timeout=120)
        assert box.commands.run("echo hi").stdout == "hi\n"
        times.append(time.perf_counter() - begin)
        box.kill()
    return times


async def asynchronous(e2b: Any) -> list[float]:
    """The same by the other client."""
    return [await timed(e2b) for _ in range(LAPS)]


async def timed(e2b: Any) -> float:
    """Seconds of one sandbox."""
    begin = time.perf_counter()
    box = await e2b.AsyncSandbox.create(timeout=120)
    assert (await box.commands.run("echo hi", timeout=60)).stdout == "hi\n"
    taken = time.perf_counter() - begin
    await box.kill()
    return taken


async def at_once(e2b: Any) -> tuple[list[float], float]:
    """Seconds of each, and until the last has answered."""
    begin = time.perf_counter()
    boxes = await asyncio.gather(*(answered(e2b, begin) for _ in range(AT_ONCE)))
    whole = time.perf_counter() - begin
    await asyncio.gather(*(box.kill() for box, _ in boxes))
    return [taken for _, taken in boxes], whole


async def answered(e2b: Any, begin: float) -> tuple[Any, float]:
    """A sandbox that has answered, and when."""
    box = await e2b.AsyncSandbox.create(timeout=120)
    assert (await box.commands.run("echo hi", timeout=120)).stdout == "hi\n"
    return box, time.perf_counter() - begin


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
