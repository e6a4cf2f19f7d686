"""The CPU model v3: on the software core a Linux guest's programs find AVX2 and its like; results are the host's."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmm
from cpu import _core
from cpu.model import V3, lacking
from cpu.system import soft_system
from tests.support.patience import PATIENCE
from vmm.config import Share
from vmm.errors import ConfigError

SOURCE = Path(__file__).parents[1] / "support" / "v3" / "programs.c"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
FLAGS = ["-O2", "-static", "-std=gnu11", "-fno-builtin", "-march=x86-64-v3", "-maes", "-mpclmul", *WARNINGS]
SECONDS = 240 * PATIENCE

pytestmark = pytest.mark.skipif(
    "soft" not in _core.CORES or bool(lacking(V3, soft_system().supported_cpuid())),
    reason="this build has no software core, or this host lacks AVX2, AES, PCLMULQDQ or another part of the model v3",
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    subprocess.run(["gcc", *FLAGS, "-o", folder / "programs", SOURCE], check=True)
    return folder


def options(folder: Path) -> dict[str, Any]:
    shares = [Share(path=folder, mount="/work", readonly=True)]
    return {"core": "soft", "cpu_model": "v3", "nets": [], "memory": "256M", "shares": shares}


async def test_programs_have_the_hosts_results(linux: Any, programs: Path) -> None:
    """Vector instructions, glibc's string functions of AVX2, and registers that live over switches of processes."""
    async with vmm.run("linux", **options(programs)) as machine:
        flags = (await machine.exec("grep", "-m1", "^flags", "/proc/cpuinfo", timeout=SECONDS, check=True)).text.split()
        assert {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave", "aes"} <= set(flags)
        for name in ("results", "strings", "switches"):
            host = subprocess.run([programs / "programs", name], capture_output=True, text=True, check=True)
            guest = await machine.exec("/work/programs", name, timeout=SECONDS, check=True)
            assert (name, guest.text.strip()) == (name, host.stdout.strip())


async def test_registers_live_in_a_snapshot(linux: Any, programs: Path, tmp_path: Path) -> None:
    """A program whose YMM registers are full is saved in the middle of it, and goes on in another machine."""
    script = "/work/programs live /tmp/end >/tmp/said & while ! grep -q holds /tmp/said; do :; done"
    async with vmm.run("linux", **options(programs)) as machine:
        await machine.exec("sh", "-c", script, timeout=SECONDS, check=True)
        await machine.snapshot(tmp_path / "saved")
    async with vmm.restore(tmp_path / "saved") as machine:
        script = "touch /tmp/end; while ! grep -qE 'kept|changed' /tmp/said; do :; done; cat /tmp/said"
        said = await machine.exec("sh", "-c", script, timeout=SECONDS, check=True)
        assert said.text.split() == ["holds", "kept"]


async def test_direct_execution_says_that_it_does_not_do_avx(linux: Any, programs: Path) -> None:
    with pytest.raises(ConfigError, match=r"direct: programs that have AVX run in the core \(cpu_model: v3\)"):
        async with vmm.run("linux", direct="on", **options(programs)):
            pass
