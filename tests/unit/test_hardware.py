"""Memory, VM and vCPUs made beside the loop: who waits, who closes, what a failure leaves."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path

import pytest

from cpu.contract import VmConfig
from cpu.errors import HostError as CoreHostError
from cpu.exits import PortOut
from cpu.scripted import ScriptedVcpu, ScriptedVm
from cpu.system import soft_system
from tests.support.scripted import Script, config, until
from vmm import Config, ConfigError, HostError, State, VirtualMachine
from vmm.machine.hardware import HeadStart, Making, make

EXIT = PortOut(0xF4, 1, 7)


def held() -> tuple[int, int]:
    """(descriptors, threads) of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


class Slow(Script):
    """A host that makes no VM before it is let."""

    def __init__(self) -> None:
        super().__init__([EXIT])
        self.asked, self.let = threading.Event(), threading.Event()

    def create_vm(self, config: VmConfig) -> ScriptedVm:
        self.asked.set()
        assert self.let.wait(30)
        return super().create_vm(config)


class NoVcpus(Script):
    """A host that has no room for a second vCPU."""

    class Vm(ScriptedVm):
        def create_vcpu(self, index: int) -> ScriptedVcpu:
            if index:
                raise CoreHostError("no more vCPUs")
            return super().create_vcpu(index)

    def create_vm(self, config: VmConfig) -> ScriptedVm:
        return self.Vm("scripted", config)


async def test_the_loop_runs_while_the_host_makes_a_vm(tmp_path: Path) -> None:
    system = Slow()
    vm = VirtualMachine(config(tmp_path), system=system)
    entering = asyncio.create_task(vm.__aenter__(), name="entering")
    await until(system.asked.is_set)
    assert vm.state is State.CREATED
    system.let.set()
    await entering
    assert (await vm.run()).code == 7
    await vm.aclose()


async def test_a_build_that_is_cancelled_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    before = held()
    system = Slow()
    entering = asyncio.create_task(VirtualMachine(config(tmp_path), system=system).__aenter__(), name="entering")
    await until(system.asked.is_set)
    entering.cancel()
    await asyncio.sleep(0)
    system.let.set()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert len(system.vms) == 1
    system.vms.clear()
    assert held() == before


async def test_a_host_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    before = held()
    wanted = config(tmp_path, cpus=2)
    with pytest.raises(CoreHostError, match="no more vCPUs"):
        make(wanted, NoVcpus())
    making = Making(wanted, NoVcpus())
    with pytest.raises(CoreHostError, match="no more vCPUs"):
        making.result()
    making.close_core()
    making.close_memory()
    with pytest.raises(HostError, match="no more vCPUs"):
        async with VirtualMachine(wanted, system=NoVcpus()):
            pass
    assert held() == before


def test_a_core_without_a_virtual_clock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = Script()
    monkeypatch.setattr(system, "capabilities", frozenset)
    with pytest.raises(ConfigError, match="no virtual clock; use --core soft"):
        make(config(tmp_path, clock="virtual"), system)


def test_who_asks_late_is_told_at_once(tmp_path: Path) -> None:
    told: list[int] = []
    system = Slow()
    making = Making(config(tmp_path), system)
    making.when_done(lambda: told.append(threading.get_ident()))
    system.let.set()
    hardware = making.result()
    assert len(told) == 1
    assert told[0] != threading.get_ident()
    making.when_done(lambda: told.append(threading.get_ident()))
    assert told[1:] == [threading.get_ident()]
    assert [vcpu.index for vcpu in hardware.vcpus] == [0]
    making.close_core()
    making.close_memory()


async def test_a_head_start_is_taken_over(tmp_path: Path) -> None:
    before = held()
    wanted = config(tmp_path, core="soft")
    head_start = HeadStart(wanted)
    async with VirtualMachine(wanted, head_start=head_start) as vm:
        assert vm.core == "soft"
        head_start.close()  # changes nothing: it is the machine's
        assert (await asyncio.wait_for(vm.run(), 60)).code is None
    assert held() == before


async def test_a_head_start_that_nobody_wants_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    wanted = config(tmp_path, core="soft", name="taken")
    async with VirtualMachine(wanted):
        before = held()
        HeadStart(wanted).close()
        assert held() == before
        head_start = HeadStart(wanted)
        with pytest.raises(ConfigError, match="taken"):  # before it is built
            async with VirtualMachine(wanted, head_start=head_start):
                pass
        head_start.close()
        assert held() == before


def test_a_head_start_of_what_is_missing_begins_nothing(tmp_path: Path) -> None:
    before = held()
    wanted = config(tmp_path, core="soft")
    (tmp_path / "nothing.bin").unlink()
    with pytest.raises(ConfigError, match=r"nothing\.bin"):
        HeadStart(wanted)
    assert held() == before


async def test_a_machine_has_one_beginning(tmp_path: Path) -> None:
    wanted = config(tmp_path, core="soft")
    head_start = HeadStart(wanted)
    with pytest.raises(TypeError, match="not both"):
        VirtualMachine(wanted, system=Script(), head_start=head_start)
    head_start.close()


@pytest.mark.parametrize(("clock", "epoch"), [("real", 0), ("virtual", 0), ("virtual", 1)])
def test_the_epoch_is_the_one_given_zero_too(tmp_path: Path, clock: str, epoch: int) -> None:
    (tmp_path / "code").write_bytes(b"\xf4")
    config = Config(core="soft", clock=clock, epoch=epoch, memory="1M", flat={"path": tmp_path / "code"})
    hardware = make(config, soft_system())
    try:
        assert hardware.epoch_ns == epoch * 1_000_000_000
    finally:
        hardware.vm.close()
        hardware.memory.close()
