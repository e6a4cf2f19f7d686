"""Virtual clock and a seed: a boot of Debian's kernel is a function of its inputs, down to the last byte of memory."""

from __future__ import annotations

import hashlib
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from cpu import _core
from images import guests
from tests.support import debian
from vmm import VirtualMachine
from vmm.lifecycle import Outcome, Reason

pytestmark = [
    pytest.mark.debian,
    pytest.mark.slow,
    pytest.mark.skipif("soft" not in _core.CORES, reason="this build has no software core"),
]


async def boot(folder: Path, seed: int, cpus: int) -> tuple[str, int, str]:
    """(console, instructions, SHA-256 of RAM) when the guest has powered itself off."""
    machine = VirtualMachine(
        core="soft", clock="virtual", seed=seed, cpus=cpus, memory="128M", kernel=debian.kernel(),
        initrd=debian.initramfs(folder), append="do=poweroff", console="none", timeout=150,
    )  # fmt: skip
    found: list[tuple[int, str]] = []
    finish = machine._finish

    def at_the_end(outcome: Outcome) -> None:
        """Called while the vCPU that ended the machine waits for an answer."""
        built: Any = machine._built
        if not found and built is not None:
            ram = hashlib.sha256()
            for _, memory in built.memory.regions():
                ram.update(memory)
            found.append((machine.stats()["instructions"], ram.hexdigest()))
        finish(outcome)

    machine._finish = at_the_end  # type: ignore[method-assign]
    async with machine as vm:
        outcome = await vm.run()
    assert outcome.reason is Reason.SHUTDOWN, outcome
    return machine.console.text, *found[0]


async def test_two_boots_with_one_seed_are_equal_and_another_seed_differs(tmp_path: Path) -> None:
    first = await boot(tmp_path, 1, 1)
    assert "INIT poweroff cpus=1" in first[0]
    assert await boot(tmp_path, 1, 1) == first
    other = await boot(tmp_path, 2, 1)
    assert other[2] != first[2]


async def test_neighbours_change_nothing(tmp_path: Path) -> None:
    """Beside two dozen machines, which share memory for translated code."""
    alone = await boot(tmp_path, 1, 1)
    async with AsyncExitStack() as stack:
        for _ in range(24):
            await stack.enter_async_context(
                VirtualMachine(core="soft", kernel=guests.path("echo"), memory="16M", platform="bare")
            )
        assert await boot(tmp_path, 1, 1) == alone


async def test_two_vcpus_take_the_same_turns(tmp_path: Path) -> None:
    first = await boot(tmp_path, 7, 2)
    assert "cpus=2" in first[0]
    assert await boot(tmp_path, 7, 2) == first
