"""The CPU model v3: on the software core a Linux guest's programs find AVX2 and its like; results are the host's."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import vmm
from cpu import _core
from cpu.direct import support
from cpu.model import V2, V3, lacking
from cpu.system import NativeSystem, soft_system
from tests.support.counted import counters
from tests.support.patience import PATIENCE
from vmm import _native
from vmm.config import Share
from vmm.errors import HostError
from vmm.migration.target import Receiver

SOURCE = Path(__file__).parents[1] / "support" / "v3" / "programs.c"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
FLAGS = ["-O2", "-static", "-std=gnu11", "-fno-builtin", "-march=x86-64-v3", "-maes", "-mpclmul", *WARNINGS]
OWN_PAGES = "-falign-functions=4096"
"""So that nothing shares a page with code that direct execution leaves to the core."""
ATTACKS = [
    "-O1", "-static", "-std=gnu11", "-mno-red-zone", "-mxsave", "-mxsavec", OWN_PAGES, f"-I{SOURCE.parents[3] / 'cpu'}",
    *WARNINGS,
]  # fmt: skip
RECEIVER: dict[str, Any] = {"name": "", "core": "soft"}
SECONDS = 240 * PATIENCE

pytestmark = pytest.mark.skipif(
    "soft" not in _core.CORES or bool(lacking(V3, soft_system().supported_cpuid())),
    reason="this build has no software core, or this host lacks AVX2, AES, PCLMULQDQ or another part of the model v3",
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    subprocess.run(["gcc", *FLAGS, OWN_PAGES, "-o", folder / "programs", SOURCE], check=True)
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


@asynccontextmanager
async def arrived(receiver: Receiver) -> AsyncIterator[vmm.VirtualMachine]:
    """The machine that comes; it is closed at the end."""
    machine = await receiver.arrive()
    try:
        yield machine
    finally:
        await machine.aclose()


async def rounds(machine: vmm.VirtualMachine) -> list[int]:
    """How often each process of the program `live` has looked at its registers."""
    return [int(word) for word in (await machine.exec("cat", "/tmp/rounds", timeout=SECONDS)).text.split()]


async def goes_on(machine: vmm.VirtualMachine) -> None:
    """Each of them looks at its registers twice more: the first time may have been before a change of machines."""
    before = await rounds(machine)
    async with asyncio.timeout(SECONDS):
        while not all(now >= then + 2 for then, now in zip(before, await rounds(machine), strict=True)):
            assert (await machine.exec("cat", "/tmp/said", timeout=SECONDS)).text == ""
            await asyncio.sleep(0.02)


async def kept(machine: vmm.VirtualMachine) -> str:
    """What it says at its end."""
    script = "touch /tmp/end; while ! grep -qE 'kept|changed' /tmp/said; do :; done; cat /tmp/said"
    return (await machine.exec("sh", "-c", script, timeout=SECONDS, check=True)).text.strip()


async def test_registers_live_over_snapshots_copies_and_migrations(linux: Any, programs: Path, tmp_path: Path) -> None:
    """Programs with full YMM registers, with upper halves in their initial state, and with an MXCSR of their own go on
    in a restored machine, in a copy, and at the target of each kind of migration."""
    options: dict[str, Any] = {"core": "soft", "cpu_model": "v3", "nets": [], "memory": "128M"}
    async with vmm.run("linux", **options) as machine:
        await machine.copy_in(programs / "programs", "/tmp/programs")
        live = "/tmp/programs live /tmp/end /tmp/rounds >/tmp/said 2>&1 & while ! [ -s /tmp/rounds ]; do :; done"
        await machine.exec("sh", "-c", live, timeout=SECONDS, check=True)
        await goes_on(machine)
        await machine.snapshot(tmp_path / "saved")
        (copy,) = await machine.fork(1)
        await goes_on(copy)
        assert await kept(copy) == "kept"
        await goes_on(machine)
        assert await kept(machine) == "kept"
    postcopy = _native.can_page(False)  # this process may have no userfaultfd: then its memory comes first
    async with (
        vmm.restore(tmp_path / "saved", core="soft") as machine,
        Receiver(f"unix:{tmp_path}/a", **RECEIVER) as first,
        Receiver(f"unix:{tmp_path}/b", **RECEIVER) as second,
    ):
        await goes_on(machine)
        await machine.migrate(first.uri)
        async with arrived(first) as moved:
            await goes_on(moved)
            how: dict[str, Any] = {"postcopy": "now"} if postcopy else {}
            moving = asyncio.create_task(moved.migrate(second.uri, **how), name="moving")
            async with arrived(second) as last:
                await goes_on(last)
                assert await kept(last) == "kept"
                await moving


@pytest.mark.parametrize("way", ["snapshot", "migration"])
async def test_a_host_without_avx_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The host's core declares no more than x86-64-v2; the machine runs on where it was."""
    tiny: dict[str, Any] = {"core": "soft", "cpu_model": "v3", "memory": "32M"}
    lacks = r"the guest was told of what the core soft lacks: .*\bavx\b.*\bavx2\b"
    async with vmm.run("echo", **tiny) as machine:
        await machine.console.expect(rb"Ctrl-D ends\n", timeout=SECONDS)
        await machine.snapshot(tmp_path / "saved")
        with monkeypatch.context() as patch:
            patch.setattr(NativeSystem, "supported_cpuid", lambda self: list(V2))
            if way == "snapshot":
                with pytest.raises(HostError, match=lacks):
                    async with vmm.restore(tmp_path / "saved", core="soft"):
                        pass
            else:
                async with Receiver(f"unix:{tmp_path}/a", **RECEIVER) as receiver:
                    with pytest.raises(HostError, match=lacks):
                        await machine.migrate(receiver.uri)
        await machine.console.write(b"runs on\n")
        await machine.console.expect(b"runs on", timeout=SECONDS)


# ---- natively ----


@pytest.fixture(scope="module")
def direct(programs: Path) -> Path:
    """The programs, and attacks on direct execution beside them; skipped where this host has none."""
    if not support().available:
        pytest.skip(f"direct execution: {support().reason}")
    attacks = SOURCE.parents[1] / "direct" / "attacks.c"
    subprocess.run(["gcc", *ATTACKS, "-o", programs / "attacks", attacks], check=True)
    return programs


async def test_natively_programs_have_the_hosts_results(linux: Any, direct: Path) -> None:
    """YMM registers go to the runners and back; they are those of the program that runs, whoever ran before."""
    async with vmm.run("linux", direct="on", **options(direct)) as machine:
        for name in ("results", "strings", "switches"):
            host = subprocess.run([direct / "programs", name], capture_output=True, text=True, check=True)
            guest = await machine.exec("/work/programs", name, timeout=SECONDS, check=True)
            assert (name, guest.text.strip()) == (name, host.stdout.strip())
        assert (await counters(machine))["native-ns"] > 0


@pytest.mark.campaign
async def test_attacks_change_no_vectors_of_others(linux: Any, direct: Path) -> None:
    """Programs that forge stops, and overwrite the frame in which registers go to and fro, beside one that compares its
    YMM registers; in between runners are given from one to the other."""
    beside = "while [ ! -e /tmp/over ]; do /work/programs switches; done | sort -u >/tmp/kept &"
    script = f"{beside} /work/attacks; touch /tmp/over; wait; cat /tmp/kept"
    async with vmm.run("linux", direct="on", **options(direct)) as machine:
        *attacks, done, kept = (await machine.exec("sh", "-c", script, timeout=SECONDS, check=True)).text.splitlines()
        assert (done, kept) == ("done", "kept"), attacks
        assert attacks and all(line.endswith("as expected, sound") for line in attacks), attacks
        assert (await counters(machine))["native-stops"] > 0


async def test_a_kernel_that_does_not_enable_avx_has_its_programs_in_the_core(linux: Any, direct: Path) -> None:
    """The guest's CPUID announces AVX and its kernel does not use XSAVE: VEX instructions are #UD (SDM 2A 2.6), as the
    host's are not."""
    async with vmm.run("linux", direct="on", append="noxsave", **options(direct)) as machine:
        ended = await machine.exec("sh", "-c", "/work/programs results; echo $?", timeout=SECONDS, check=True)
        assert ended.text.split()[-1] == str(128 + signal.SIGILL)
        assert (await counters(machine))["native-stops"] == 0
