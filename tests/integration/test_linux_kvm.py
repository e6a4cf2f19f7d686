"""Debian's unmodified kernel on KVM. In tests.rig it runs on kvm-amd, with the rig's own kernel as the guest's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cpu import select
from cpu.contract import Capability
from tests.support import debian
from tests.support.command import vmm as command

pytestmark = [pytest.mark.kvm, pytest.mark.stock_kvm, pytest.mark.debian]

PATIENCE = float(os.environ.get("LOOPVISOR_PATIENCE", "1"))


@pytest.fixture
def kernel() -> Path:
    """A stock kernel image; skips where KVM cannot run one."""
    found = select.probe("kvm")
    if Capability.STOCK_KERNELS not in found.capabilities:
        pytest.skip(found.reason)
    given = os.environ.get("LOOPVISOR_KERNEL")
    return Path(given) if given else debian.kernel()


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_stock_kernel_boots_finds_its_processors_and_powers_off(tmp_path: Path, kernel: Path, cpus: int) -> None:
    done = command(
        tmp_path, "run", "--core", "kvm", "--kernel", str(kernel), "--initrd", str(debian.initramfs(tmp_path)),
        "--cpus", str(cpus), "--memory", "256M", "--append", "do=dmesg", "--json",
        "--timeout", str(int(60 * PATIENCE)), timeout=90 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert f"INIT dmesg cpus={cpus}" in done.stdout
    assert "Hypervisor detected: KVM" in done.stdout
    assert json.loads(done.stderr.splitlines()[-1])["reason"] == "shutdown"
