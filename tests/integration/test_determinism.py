"""Virtual clock and a seed: a boot of Debian's kernel is a function of its inputs, down to the last byte of memory."""

from __future__ import annotations

import hashlib
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import vmm
import vmm.launch
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


class Machine(VirtualMachine):
    """`at_the_end`: instructions and SHA-256 of RAM when the guest has powered itself off."""

    at_the_end: tuple[int, str] | None = None

    def _finish(self, outcome: Outcome) -> None:
        """Called while the vCPU that ended the machine waits for an answer."""
        if self.at_the_end is None and outcome.reason is Reason.SHUTDOWN:
            ram = hashlib.sha256()
            for _, memory in self.machine.memory.regions():
                ram.update(memory)
            self.at_the_end = (self.stats()["instructions"], ram.hexdigest())
        super()._finish(outcome)


def result(machine: Machine) -> tuple[str, int, str]:
    assert machine.at_the_end is not None
    return machine.console.text, *machine.at_the_end


async def boot(folder: Path, seed: int, cpus: int, *, saved: Path | None = None) -> tuple[str, int, str]:
    """(console, instructions, SHA-256 of RAM) when the guest has powered itself off. `saved`: a snapshot is taken there
    on the way."""
    machine = Machine(
        core="soft", clock="virtual", seed=seed, cpus=cpus, memory="128M", kernel=debian.kernel(),
        initrd=debian.initramfs(folder), append="do=poweroff", console="none", timeout=150,
    )  # fmt: skip
    async with machine as vm:
        if saved is not None:
            vm.resume()
            await vm.console.expect(rb"Kernel command line", timeout=100)
            await vm.snapshot(saved)
            outcome = await vm.wait()
        else:
            outcome = await vm.run()
    assert outcome.reason is Reason.SHUTDOWN, outcome
    return result(machine)


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


@pytest.mark.parametrize("cpus", [1, 2])
async def test_a_restored_machine_goes_on_as_the_saved_one_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    """To the last bit; and being saved changes nothing."""
    monkeypatch.setattr(vmm.launch, "VirtualMachine", Machine)
    plain = await boot(tmp_path, 3, cpus)
    assert await boot(tmp_path, 3, cpus, saved=tmp_path / "snapshot") == plain
    for _ in range(2):
        async with vmm.restore(tmp_path / "snapshot", timeout=150) as machine:
            outcome = await machine.wait()
        assert outcome.reason is Reason.SHUTDOWN, outcome
        assert isinstance(machine, Machine)
        assert result(machine) == plain
