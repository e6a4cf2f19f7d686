"""Processors that come to a running Debian kernel and leave it, by ACPI."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import vmm
from cpu.select import probe
from vmm.errors import ConfigError, GuestError
from vmm.vm import VirtualMachine

DEADLINE = 120


async def online(vm: VirtualMachine) -> str:
    """The processors that the guest runs on, as Linux lists them."""
    return (await vm.exec("cat", "/sys/devices/system/cpu/online", timeout=DEADLINE)).text


async def test_processors_come_and_go() -> None:
    async with vmm.run("linux", cpus=1, max_cpus=4) as vm:
        assert await online(vm) == "0" and vm.present_cpus == 1
        for count, listed in ((3, "0-2"), (2, "0-1"), (4, "0-3"), (1, "0"), (4, "0-3")):
            await vm.set(cpus=count)
            assert (await online(vm), vm.present_cpus) == (listed, count)
        # all of them work
        busy = "for n in 0 1 2 3; do taskset -p $((1 << n)) $$ >/dev/null 2>&1; i=0; "
        busy += "while [ $i -lt 2000 ]; do i=$((i+1)); done; done; echo done"
        assert (await vm.exec("sh", "-c", busy, timeout=DEADLINE)).text == "done"
        log = (await vm.exec("dmesg", timeout=DEADLINE)).text
        assert "CPU 3 is now offline" in log
        assert not [line for line in log.splitlines() if "ACPI" in line and ("rror" in line or "arning" in line)]
        with pytest.raises(ConfigError, match="outside 1 to 4"):
            await vm.set(cpus=5)


async def test_present_processors_stay_over_snapshots_copies_and_reboots(tmp_path: Path) -> None:
    async with vmm.run("linux", cpus=1, max_cpus=3, reboot=True) as vm:
        await vm.set(cpus=2)
        (copy,) = await vm.fork()
        assert (await online(copy), copy.present_cpus) == ("0-1", 2)
        await copy.set(cpus=3)
        assert await online(copy) == "0-2"
        await copy.aclose()
        await vm.snapshot(tmp_path / "snapshot")
        events = vm.events()
        vm.reset()
        async with asyncio.timeout(DEADLINE):
            async for event in events:
                if isinstance(event, vmm.events.Rebooted):
                    break
            await vm.agent.wait_ready()
        assert (await online(vm), vm.present_cpus) == ("0-1", 2)
        await vm.set(cpus=1)
        assert await online(vm) == "0"
    async with vmm.restore(tmp_path / "snapshot") as vm:
        assert (await online(vm), vm.present_cpus) == ("0-1", 2)
        await vm.set(cpus=3)
        assert await online(vm) == "0-2"
        await vm.set(cpus=1)
        assert await online(vm) == "0"


async def test_a_guest_that_does_not_give_up_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    async with vmm.run("linux", cpus=2, max_cpus=2) as vm:
        with pytest.raises(ConfigError, match="max=M"):
            await vm.set(cpus=1)
    async with vmm.run("linux", cpus=1, max_cpus=2) as vm:
        await vm.set(cpus=2)
        assert await online(vm) == "0-1"
        monkeypatch.setattr("vmm.changes.CPU_SECONDS", 0.5)
        await vm.pause()
        with pytest.raises(GuestError, match="has not given up processor 1"):
            await vm.set(cpus=1)
        vm.resume()
        async with asyncio.timeout(DEADLINE):
            while vm.present_cpus > 1:  # the question stands
                await asyncio.sleep(0.05)
        assert await online(vm) == "0"


CORES = [
    "soft",
    pytest.param("kvm", marks=[pytest.mark.kvm, pytest.mark.skipif(not probe("kvm").available, reason="no KVM")]),
]


@pytest.mark.parametrize("core", CORES)
async def test_a_machine_with_absent_processors_runs_and_ends(core: str) -> None:
    async with vmm.run("exit", cmdline="3", core=core, platform="pc", cpus=1, max_cpus=4) as vm:
        assert (await vm.wait()).status == 7
