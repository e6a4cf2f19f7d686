"""iperf3 through user networking with a policy and without, both ways: one machine, which gets and loses it by turns.

Two machines of one image and core differ from each other by more than a policy costs, and so do two turns of one: the
rate of a turn hangs on which of guest, passt and server share a processor. BENCH_POLICY_LAPS (12) laps of
BENCH_POLICY_SECONDS (2) a turn, in each lap the way without first or last by turns; shown are the medians, and of the
laps' ratios the median and between what the half in the middle lies, of the rate and of the bytes that a second of
processor time moved (this process with the guest in it, and passt). Turns stay far below the 24 seconds after which
Debian 12's passt resets a connection whose other end is silent (docs/networking.md). A private switch is measured, too:
one machine sends to another. passt and iperf3's server are in network namespaces, so this needs root, passt, iperf3
and the image linux; the switch needs iperf3 and the image alone.
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
from tests.bench.bench_daemon import processor_ms
from tests.support import passt, programs
from tests.support.guestprograms import install
from tests.support.passt import FAR
from vmm.config import Net

LAPS = int(os.environ.get("BENCH_POLICY_LAPS", "12"))
SECONDS = int(os.environ.get("BENCH_POLICY_SECONDS", "2"))
POLICIES = {"open": "", "allowed": f"{FAR}:5201+example.org:443+*.example.net+10.0.0.0/9+192.0.2.0/24:22"}
WAYS = {"the guest sends": "", "the guest receives": "-R"}
Turn = tuple[float, float]
"""Mbit/s, and MB a second of processor time."""


def processor_seconds(*processes: int) -> float:
    """What they have used so far, without their children."""
    return sum(map(processor_ms, processes)) / 1000


async def _turn(vm: vmm.VirtualMachine, command: str, *processes: int) -> Turn:
    while True:
        before = processor_seconds(*processes)
        result = await vm.exec("sh", "-c", command, timeout=600)
        used = processor_seconds(*processes) - before
        report = json.loads(result.stdout)
        if "busy running a test" not in report.get("error", ""):
            break
        await asyncio.sleep(0.2)  # the server is still ending the one before
    if "error" in report:
        raise RuntimeError(f"iperf3: {report['error']}")
    received = report["end"]["sum_received"]
    return received["bits_per_second"] / 1e6, received["bytes"] / 1e6 / used


def _passt_of(vm: vmm.VirtualMachine) -> int:
    backend = vm.nets()["net0"].backend
    process: int = getattr(backend, "inner", backend)._process.pid
    return process


async def _policy() -> dict[tuple[str, str], list[Turn]]:
    """What each turn gave, by way and policy."""
    found: dict[tuple[str, str], list[Turn]] = {}
    async with vmm.run("linux", nets=(Net(kind="user"),)) as vm:
        await vm.exec("sh", "-c", "until ip route | grep -q default; do sleep 0.1; done", timeout=300, check=True)
        call = await install(vm, "iperf3")
        for lap in range(LAPS):
            for name in sorted(POLICIES, reverse=bool(lap % 2)):
                await vm.set(nets={"net0": {"allow": POLICIES[name]}})
                for way, option in WAYS.items():
                    command = f"{call} -c {FAR} -t {SECONDS} {option} -J"
                    turn = await _turn(vm, command, os.getpid(), _passt_of(vm))
                    found.setdefault((way, name), []).append(turn)
    return found


async def _switch() -> list[Turn]:
    """What one machine sends to another through a switch of this process's."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(vmm.Switch("bench-policy"))
        one, other = [await stack.enter_async_context(vmm.run("linux", nets=["switch=bench-policy"])) for _ in range(2)]
        for number, vm in enumerate((one, other), 1):
            script = f"ip link set eth0 up; ip addr add 10.77.0.{number}/24 dev eth0"
            await vm.exec("sh", "-c", script, timeout=300, check=True)
        serve, call = await install(other, "iperf3"), await install(one, "iperf3")
        await other.exec("sh", "-c", f"{serve} -s -D", timeout=300, check=True)
        return [await _turn(one, f"{call} -c 10.77.0.2 -t {SECONDS} -J", os.getpid()) for _ in range(LAPS)]


def rows() -> Iterator[dict[str, object]]:
    """Each way with a policy, and its ratio to the same without; the switch's rate."""
    missing = programs.missing(("ip", "iperf3", "passt"))
    if missing or os.geteuid() or passt.why_not():
        note = f"not here: {', '.join(missing) or passt.why_not() or 'needs root'}"
        yield {"name": "network policy", "value": None, "unit": "", "note": note}
    else:
        yield from _policy_rows()
    if not programs.missing(("iperf3",)):
        turns = asyncio.run(_switch())
        rate, work = (statistics.median(values) for values in zip(*turns, strict=True))
        note = f"{work:.0f} MB a second of processor time, both guests in it"
        yield {"name": "switch, one to another", "value": rate, "unit": "Mbit/s", "better": "more", "note": note}


def _policy_rows() -> Iterator[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder, passt.networks(Path(folder)) as (_, far):

        async def work() -> dict[tuple[str, str], list[Turn]]:
            await far.listen(5201, "iperf3", "-s", "-B", FAR)
            return await _policy()

        found = asyncio.run(work())
    for way in WAYS:
        ours, base = found[way, "allowed"], found[way, "open"]
        for index, (kind, unit) in enumerate((("rate", "Mbit/s"), ("work", "MB a second of processor time"))):
            medians = [statistics.median(turn[index] for turn in turns) for turns in (ours, base)]
            ratios = [one[index] / other[index] for one, other in zip(ours, base, strict=True)]
            ratio = statistics.median(ratios)
            note = f"{medians[0]:.0f} of {medians[1]:.0f} {unit}"
            if len(ratios) > 1:
                low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
                note += f"; half of {len(ratios)} laps between {low:.2f} and {high:.2f}"
            name = f"policy, {way}, {kind}"
            yield {"name": name, "value": ratio, "unit": "", "goal": 0.9, "better": "more", "note": note}


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(f"{row}\n")
