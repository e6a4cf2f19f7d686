"""A short soak (`make soak` is the long one): both of Debian's kernels, a round of work a vCPU, as on the host."""

from __future__ import annotations

import asyncio
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rounds need, built."""
    path = tmp_path_factory.mktemp("soak")
    machine.prepare(path)
    machine.initramfs(path)
    return path


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("meta", ["linux-image-cloud-amd64", "linux-image-amd64"])
async def test_work_under_debians_kernels_has_the_hosts_results(folder: Path, meta: str, cpus: int) -> None:
    kernel = machine.vmlinux(meta, folder)
    result = await machine.soak(
        kernel, folder / "initramfs", machine.Host(folder, KIB), cpus=cpus, seconds=240, kib=KIB, rounds=1
    )
    assert result.problems == []
    assert result.rounds == cpus and result.lines > 40 * cpus


async def test_a_wrong_result_is_found(folder: Path) -> None:
    """The comparison itself: a digest that differs, one that lacks, and a line that tells of trouble."""
    host = machine.Host(folder, 4)
    lines = sorted((await host.round(9)).elements())
    lines.remove("9 end")
    for change, problems in [
        (lines, 0),
        ([*lines[1:], lines[0][:-1] + "x"], 2),
        (lines[1:], 1),
        ([*lines, "BUG: unable to handle page fault"], 1),
    ]:
        result = machine.Result()
        comparison = machine.Comparison(host, result)
        for line in [*change, "9 end"]:
            await comparison.line(line)
        assert (result.rounds, len(result.problems)) == (1, problems), result.problems
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("soak")]
