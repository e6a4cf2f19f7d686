"""A short soak (`make soak` is the long one): both of Debian's kernels, a round of work a vCPU, as on the host."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path

import pytest

from cpu import _core
from tests.soak import machine

pytestmark = [
    pytest.mark.debian,
    pytest.mark.slow,
    pytest.mark.skipif("soft" not in _core.CORES, reason="this build has no software core"),
]
KIB = 64
DAILY = {("linux-image-cloud-amd64", 2), ("linux-image-amd64", 4)}
"""Each kernel, and few and many vCPUs; the other cases are a campaign."""
CASES = [
    pytest.param(meta, cpus, id=f"{meta}-{cpus}", marks=() if (meta, cpus) in DAILY else pytest.mark.campaign)
    for meta in ("linux-image-cloud-amd64", "linux-image-amd64")
    for cpus in (1, 2, 4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rounds need, built."""
    path = tmp_path_factory.mktemp("soak")
    machine.prepare(path)
    machine.initramfs(path)
    return path


@pytest.mark.parametrize(("meta", "cpus"), CASES)
async def test_work_under_debians_kernels_has_the_hosts_results(folder: Path, meta: str, cpus: int) -> None:
    kernel = machine.vmlinux(meta, folder)
    result = await machine.soak(
        kernel, folder / "initramfs", machine.Host(folder, KIB), cpus=cpus, seconds=240, kib=KIB, rounds=1
    )
    assert result.problems == []
    assert result.rounds == cpus and result.lines > 40 * cpus


async def compared(host: machine.Host, lines: list[str]) -> machine.Result:
    """Round 9 of a guest that printed these lines."""
    result = machine.Result()
    comparison = machine.Comparison(host, result)
    for line in [*lines, "9 end"]:
        await comparison.line(line)
    assert result.rounds == 1
    return result


async def test_a_wrong_result_is_found(folder: Path) -> None:
    """The comparison itself: a digest that differs, one that lacks, and a line that tells of trouble."""
    host = machine.Host(folder, 4)
    theirs = machine.of_every_vendor(await host.round(9))
    lines = sorted(theirs.elements())
    lines.remove("9 end")
    vendors = sorted((await host.round(9) - theirs).elements())
    for change, problems in [
        (lines, 0),
        ([*lines[1:], lines[0][:-1] + "x"], 2),
        (lines[1:], 1),
        ([*lines, "BUG: unable to handle page fault"], 1),
    ]:
        result = await compared(host, [*change, *vendors])
        assert len(result.problems) == problems, result.problems
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("soak")]


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
async def test_results_of_one_vendor_count_on_its_hosts(folder: Path, vendor: str) -> None:
    """A host of the guest's vendor, and one of another: there what its processors do otherwise is no problem,
    but a wrong result of both vendors' is, and a guest that shows the host's vendor."""
    here = machine.Host(folder, 4)
    everything = sorted((await here.round(9)).elements())
    everything.remove("9 end")
    ours = [re.sub(r"@\w+", "@AuthenticAMD", line) for line in everything]
    assert len([line for line in ours if "@" in line]) >= 6
    other = vendor != "AuthenticAMD"

    class Elsewhere(machine.Host):
        """The same results, but for those of its vendor."""

        def round(self, seed: int) -> asyncio.Task[Counter[str]]:
            async def lines() -> Counter[str]:
                changed = [re.sub(r"@AuthenticAMD .", f"@{vendor} x", line) if other else line for line in ours]
                return Counter([*changed, "9 end"])

            return asyncio.create_task(lines())

    host = Elsewhere(folder, 4)
    wrong_everywhere = [line[:-1] + "x" if " traps.steps " in line else line for line in ours]
    wrong_of_vendor = [line[:-1] + "x" if " traps.steps@" in line else line for line in ours]
    assert (await compared(host, ours)).problems == []
    assert len((await compared(host, wrong_everywhere)).problems) == 2
    assert len((await compared(host, wrong_of_vendor)).problems) == (0 if other else 2)
    hosts_vendor = [line.replace("@AuthenticAMD", "@GenuineIntel") for line in ours]
    assert (await compared(host, hosts_vendor)).problems
