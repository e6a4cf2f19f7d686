"""A guest resets a disk that hangs: its vCPU waits, and nothing else."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from cpu.exits import MmioRead, MmioWrite, PortIn, PortOut
from cpu.scripted import ScriptedVcpu
from tests.support.engines import ENGINES
from tests.support.scripted import Script, config, until
from tests.support.slowdisk import SlowDisk, slow_disk
from tests.support.virtio import MmioDriver
from virtio.devices import blk
from virtio.driver import Allocator
from virtio.errors import ConfigError
from virtio.mmio import MmioTransport
from vmm import VirtualMachine
from vmm.errors import VmmError
from vmm.lifecycle import Reason
from vmm.machine import layout

pytestmark = [pytest.mark.root]
STATUS = layout.virtio_mmio(0)[0].start + 0x070
COM1 = 0x3F8
BUFFERS = 1 << 20
"""Where the driver's memory begins; the machine has as much again."""


class GuestsDriver(MmioDriver):
    """What the guest's driver has done before its vCPU takes the last step itself."""

    def __init__(self, vm: VirtualMachine) -> None:
        assert vm._machine is not None
        memory = vm._machine.memory
        self.memory = cast(Any, memory)
        self.allocator = Allocator(memory, BUFFERS, 2 * BUFFERS)
        self.queues = []
        self.interrupted = asyncio.Event()
        self.mmio = self.transport = vm._machine.components["virtio"].transports["disk0"]  # type: ignore[attr-defined]
        assert isinstance(self.mmio, MmioTransport)
        self.initialize()

    def read_at(self, sector: int) -> None:
        self.submit(0, [self.buffer(struct.pack("<IIQ", blk.IN, 0, sector))], [self.buffer(4096), self.buffer(1)])


@pytest.fixture
async def hung(tmp_path: Path) -> AsyncIterator[SlowDisk]:
    try:
        with slow_disk(tmp_path / "slow", 1 << 20) as disk:
            yield disk
    except OSError as error:
        pytest.skip(f"needs root and FUSE: {error}")


@pytest.fixture(params=ENGINES)
async def vm(request: pytest.FixtureRequest, hung: SlowDisk, tmp_path: Path) -> AsyncIterator[VirtualMachine]:
    """vCPU 0 resets the disk, reads its status and says so; vCPU 1 says something when it is asked to."""
    disk = {"path": hung.path, "transport": "mmio", "io": request.param}
    system = Script(
        [MmioWrite(STATUS, 4, 0), MmioRead(STATUS, 4), PortOut(COM1, 1, ord("R"))],
        [PortIn(0x9999, 1)] * 20 + [PortOut(COM1, 1, ord("1"))],
    )
    made = VirtualMachine(config(tmp_path, disks=(disk,), cpus=2), system=system)
    try:
        await made.__aenter__()
    except (ConfigError, VmmError) as error:
        pytest.skip(str(error))
    driver = GuestsDriver(made)
    hung.hold()
    for sector in range(0, 400, 40):
        driver.read_at(sector)
    await until(lambda: hung.waiting)
    yield made
    hung.release()
    await made.__aexit__(None, None, None)


def vcpu(vm: VirtualMachine) -> ScriptedVcpu:
    """The one that resets the disk."""
    assert vm._machine is not None
    return cast(ScriptedVcpu, vm._machine.vcpus[0])


async def reset_begun(vm: VirtualMachine) -> None:
    vm.resume()
    await vm.console.expect("1")
    await until(lambda: vcpu(vm).parked)
    assert vm.stats()["exit.mmio-write"] == 1 and not vm.stats().get("exit.mmio-read")


async def test_another_vcpu_and_another_machine_run_on(vm: VirtualMachine, hung: SlowDisk, tmp_path: Path) -> None:
    await reset_begun(vm)
    async with VirtualMachine(config(tmp_path), system=Script([PortOut(0xF4, 1, 7)])) as other:
        assert (await other.run()).reason is Reason.EXIT
    assert vcpu(vm).parked and hung.waiting
    hung.release()
    await vm.console.expect("R")
    await vm.pause()
    assert vcpu(vm).answers == [0]


async def test_the_machine_is_paused_and_resumed_meanwhile(vm: VirtualMachine, hung: SlowDisk) -> None:
    await reset_begun(vm)
    await vm.pause()
    vcpu(vm).state()
    vm.resume()
    assert vcpu(vm).parked
    await vm.pause()
    virtio: Any = vm._machine.components["virtio"]  # type: ignore[union-attr]
    quiesced = asyncio.ensure_future(virtio.quiesce())
    await asyncio.wait([quiesced], timeout=0.01)
    assert not quiesced.done()
    hung.release()
    await asyncio.wait_for(quiesced, 10)
    assert virtio.save().mmio["disk0"].status == 0
    assert vcpu(vm).parked and "R" not in vm.console.text
    virtio.resume()
    vm.resume()
    await vm.console.expect("R")
    await vm.pause()
    assert vcpu(vm).answers == [0]


async def test_the_machine_is_ended_meanwhile(vm: VirtualMachine, hung: SlowDisk) -> None:
    await reset_begun(vm)
    vm.kill()
    ended = asyncio.ensure_future(vm.wait())
    await asyncio.wait([ended], timeout=0.05)
    assert not ended.done(), "the loop runs, the kernel still has the machine's memory"
    hung.release()
    assert (await asyncio.wait_for(ended, 10)).reason is Reason.KILLED
    assert "R" not in vm.console.text
