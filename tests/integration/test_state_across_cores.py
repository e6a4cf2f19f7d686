"""Debian's kernel goes on, from a snapshot, on the software core after KVM, and on KVM after the software core."""

from __future__ import annotations

import os
from itertools import cycle, islice
from pathlib import Path

import pytest

import vmm
from tests.integration.conftest import require_stock_core
from tests.support import debian

pytestmark = [pytest.mark.kvm, pytest.mark.stock_kvm, pytest.mark.debian, pytest.mark.slow]

CMDLINE = f"console=ttyS0 panic=-1 reboot=panic_warm cryptomgr.notests no_timer_check {debian.APPEND} do=shell"
PROMPT = rb"shell# "
HOPS = int(os.environ.get("LOOPVISOR_HOPS", "4"))
SECONDS = 60 * debian.PATIENCE
COUNT = "i=0; while [ $i -lt 200 ]; do i=$((i + 1)); [ $((i % 50)) = 0 ] && echo counted $i $((i * i * 7919)); done\n"


async def ask(machine: vmm.VirtualMachine, command: str, *answers: str) -> None:
    await machine.console.write(f"{command}\n")
    for answer in answers:
        await machine.console.expect(answer.encode(), timeout=SECONDS)
    await machine.console.expect(PROMPT, timeout=SECONDS)


@pytest.mark.parametrize("cpus", [1, 2])
async def test_linux_hops_between_kvm_and_the_software_core(tmp_path: Path, cpus: int) -> None:
    require_stock_core("kvm")
    config = vmm.Config(
        core="kvm", kernel=debian.kernel(), initrd=debian.initramfs(tmp_path), cpus=cpus, cmdline=CMDLINE,
        memory=128 << 20,
    )  # fmt: skip
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(PROMPT, timeout=SECONDS)
        await ask(machine, "kept=$((6 * 7)); echo here $kept", "here 42")
        await machine.snapshot(tmp_path / "0")
    for hop, core in enumerate(islice(cycle(("soft", "kvm")), HOPS)):
        async with vmm.restore(tmp_path / str(hop), core=core) as machine:
            assert machine.core == core
            await ask(machine, "kept=$((kept + 1)); echo here $kept processors=$(busybox nproc)",
                      f"here {43 + hop} processors={cpus}")  # fmt: skip
            await ask(machine, COUNT.strip(), *(f"counted {i} {i * i * 7919}" for i in (50, 100, 150, 200)))
            await ask(machine, "busybox sleep 0.3; echo slept", "slept")
            text = machine.console.text
            assert "BUG" not in text and "Call Trace" not in text and "lockup" not in text, text[-3000:]
            await machine.snapshot(tmp_path / str(hop + 1))
