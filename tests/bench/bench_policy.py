"""iperf3 through user networking with a policy and without, both ways: two machines of one image and core, by turns.

BENCH_POLICY_LAPS (5) turns of BENCH_POLICY_SECONDS (3) each; shown are the medians and the median of the turns' ratios.
passt and iperf3's server are in network namespaces, so this needs root, passt, iperf3 and the image linux.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import vmm
from tests.support import passt, programs
from tests.support.guestprograms import install
from tests.support.passt import FAR
from vmm.config import Net

LAPS = int(os.environ.get("BENCH_POLICY_LAPS", "5"))
SECONDS = int(os.environ.get("BENCH_POLICY_SECONDS", "3"))
POLICIES = {"open": "", "allowed": f"{FAR}:5201+example.org:443+*.example.net+10.0.0.0/9+192.0.2.0/24:22"}
WAYS = {"the guest sends": "", "the guest receives": "-R"}


async def _measured() -> dict[tuple[str, str], list[float]]:
    """Mbit/s of each turn, by way and policy."""
    found: dict[tuple[str, str], list[float]] = {}
    async with AsyncExitStack() as stack:
        calls = {}
        for name, allow in POLICIES.items():
            vm = await stack.enter_async_context(vmm.run("linux", nets=(Net(kind="user", allow=allow),)))
            await vm.exec("sh", "-c", "until ip route | grep -q default; do sleep 0.1; done", timeout=300, check=True)
            calls[name] = vm, await install(vm, "iperf3")
        for lap in range(LAPS):
            for way, option in WAYS.items():
                for name in sorted(calls, reverse=bool(lap % 2)):
                    vm, call = calls[name]
                    command = f"{call} -c {FAR} -t {SECONDS} {option} -J"
                    result = await vm.exec("sh", "-c", command, timeout=300, check=True)
                    rate = json.loads(result.stdout)["end"]["sum_received"]["bits_per_second"]
                    found.setdefault((way, name), []).append(rate / 1e6)
    return found


def rows() -> Iterator[dict[str, object]]:
    """Each way with a policy, and its ratio to the same without."""
    missing = programs.missing(("ip", "iperf3", "passt"))
    if missing or os.geteuid() or passt.why_not():
        note = f"not here: {', '.join(missing) or passt.why_not() or 'needs root'}"
        yield {"name": "network policy", "value": None, "unit": "", "note": note}
        return
    with tempfile.TemporaryDirectory() as folder, passt.networks(Path(folder)) as (_, far):

        async def work() -> dict[tuple[str, str], list[float]]:
            await far.listen(5201, "iperf3", "-s", "-B", FAR)
            return await _measured()

        found = asyncio.run(work())
    for way in WAYS:
        ours, base = found[way, "allowed"], found[way, "open"]
        rates = f"{statistics.median(ours):.0f} of {statistics.median(base):.0f} Mbit/s"
        ratio = statistics.median(one / other for one, other in zip(ours, base, strict=True))
        yield {"name": f"policy, {way}", "value": ratio, "unit": "", "goal": 0.9, "better": "more", "note": rates}


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
