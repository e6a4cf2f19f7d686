"""Machines on the scripted core: what the vCPUs do is a list of steps, and everything else is real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from cpu.contract import VmConfig
from cpu.scripted import ScriptedSystem, ScriptedVcpu, ScriptedVm, Step
from vmm.config import Config


class _Vcpu(ScriptedVcpu):
    standstills = 0

    def stood_still(self) -> None:
        super().stood_still()
        self.standstills += 1


class _Vm(ScriptedVm):
    scripts: Sequence[Sequence[Step]]
    made: list[_Vcpu]

    def create_vcpu(self, index: int) -> ScriptedVcpu:
        vcpu = _Vcpu(self, index)
        vcpu._vm = self
        if index < len(self.scripts):
            vcpu.script(*self.scripts[index])
        self.made.append(vcpu)
        return vcpu


class Script(ScriptedSystem):
    """A core whose vCPU i does `scripts[i]`, in every VM that it makes (again after a restart)."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        super().__init__()
        self.scripts = scripts
        self.vms: list[_Vm] = []

    def create_vm(self, config: VmConfig) -> ScriptedVm:
        vm = _Vm("scripted", config, msr_indices=(0x10,))
        vm.scripts = self.scripts
        vm.made = []
        self.vms.append(vm)
        return vm


def config(folder: Path, **options: object) -> Config:
    """A configuration that boots: one byte of real-mode code, which a scripted vCPU never looks at."""
    image = folder / "nothing.bin"
    image.write_bytes(b"\xf4")
    values: dict[str, object] = {"memory": "2M", "flat": {"path": image}}
    return Config.from_dict(values | options)


async def until(condition: Callable[[], object], deadline: float = 10.0) -> None:
    """Wait until `condition()` is true; fail after `deadline` seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    while not condition():
        assert loop.time() < end, "the condition did not become true in time"
        await asyncio.sleep(0.001)
