"""Direct execution: a Linux guest's programs have the same results natively as in the core, and reach nothing here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmm
from cpu import _core
from cpu.direct import support
from tests.support.patience import PATIENCE
from vmm.config import Share
from vmm.errors import ConfigError

SOURCE = Path(__file__).parents[1] / "support" / "direct" / "programs.c"
FLAGS = ["-O1", "-static", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-mno-red-zone", "-mxsavec", "-mxsave"]
TRACING = Path("/sys/kernel/tracing")
SECCOMP, MAPPING_CALLS = 317, {9, 10, 11}
"""System calls of x86-64: seccomp; mmap, mprotect, munmap."""

pytestmark = pytest.mark.skipif("soft" not in _core.CORES, reason="this build has no software core")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    subprocess.run(["gcc", *FLAGS, "-o", folder / "programs", SOURCE], check=True)
    return folder


@pytest.fixture(scope="module")
def direct() -> None:
    if not support().available:
        pytest.skip(f"direct execution: {support().reason}")


async def output(folder: Path, name: str, direct: Any) -> tuple[str, dict[str, int]]:
    """What a program prints in a guest, and the machine's counters."""
    shares = [Share(path=folder, mount="/work", readonly=True)]
    options: dict[str, Any] = {"core": "soft", "nets": [], "memory": "256M", "shares": shares, "direct": direct}
    async with vmm.run("linux", **options) as machine:
        result = await machine.exec("/work/programs", name, timeout=240 * PATIENCE, check=True)
        return result.text, machine.stats()


@pytest.mark.parametrize("name", ["identity", "faults", "compatibility", "code", "memory", "signals", "calls"])
async def test_results_are_those_of_the_core(linux: Any, direct: None, programs: Path, name: str) -> None:
    native, counters = await output(programs, name, "on")
    core, none = await output(programs, name, "off")
    assert native.splitlines() == core.splitlines()
    assert native.splitlines()[-1] == "done"
    assert counters["native-stops"] > 0 and none["native-stops"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clock": "virtual"}, "virtual clock"),
        ({"seed": 1}, "seed"),
        ({"cpus": 2}, "several processors"),
    ],
)
async def test_on_says_what_it_cannot(linux: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"direct: .*{words}.*use --direct auto or off"):
        async with vmm.run("linux", core="soft", direct="on", **options):
            pass


async def test_a_copy_and_its_machine_go_on_in_the_core(linux: Any, direct: None) -> None:
    """To share memory with a copy it is taken from the runners; what a program computed natively goes on in both."""
    script = "i=0; while :; do i=$((i+1)); echo $i >/tmp/count; done"
    read = (
        'r() { while c=$(cat /tmp/count); [ -z "$c" ]; do :; done; echo $c; }; '
        "a=$(r); while b=$(r); [ $b -le $a ]; do :; done; echo $a $b"
    )
    async with vmm.run("linux", core="soft", direct="on", nets=[], memory="256M") as machine:
        await machine.exec("sh", "-c", f"({script}) >/dev/null 2>&1 &", timeout=240 * PATIENCE, check=True)
        first = (await machine.exec("sh", "-c", read, timeout=240 * PATIENCE, check=True)).text.split()
        assert machine.stats()["native-stops"] > 0
        (copy,) = await machine.fork()
        stops = machine.stats()["native-stops"]
        for one in (machine, copy):
            later = (await one.exec("sh", "-c", read, timeout=240 * PATIENCE, check=True)).text.split()
            assert int(later[1]) > int(later[0]) >= int(first[1])
        assert machine.stats()["native-stops"] == stops
        assert copy.stats()["native-stops"] == 0


# ---- seen from outside ----


@pytest.fixture
def calls_of_runners() -> Iterator[Path]:
    """A trace of every system call that begins in a process of the name runner.bin."""
    mounted = False
    if os.geteuid() != 0:
        pytest.skip("needs root, for the kernel's trace of system calls")
    if not (TRACING / "instances").is_dir():
        mounted = subprocess.run(["mount", "-t", "tracefs", "none", TRACING], capture_output=True).returncode == 0
    instance = TRACING / "instances" / f"loopvisor-{os.getpid()}"
    try:
        instance.mkdir()
        (instance / "buffer_size_kb").write_text("4096")
        event = instance / "events/raw_syscalls/sys_enter"
        (event / "filter").write_text('comm == "runner.bin"')
        (event / "enable").write_text("1")
    except OSError as error:
        pytest.skip(f"the kernel gives no trace of system calls: {error}")
    try:
        yield instance / "trace"
    finally:
        (event / "enable").write_text("0")
        instance.rmdir()
        if mounted:
            subprocess.run(["umount", TRACING], check=False)


def calls(trace: str) -> dict[int, list[int]]:
    """By process, the numbers of its system calls in order."""
    found: dict[int, list[int]] = {}
    for line in trace.splitlines():
        name, _, rest = line.strip().partition("-")
        if name == "runner.bin" and "sys_enter: NR " in rest:
            number = int(rest.partition("sys_enter: NR ")[2].split()[0])
            found.setdefault(int(rest.split()[0]), []).append(number)
    return found


@pytest.mark.root
@pytest.mark.parametrize("name", ["faults", "calls"])
async def test_runners_make_no_other_system_call(
    linux: Any, direct: None, programs: Path, calls_of_runners: Path, name: str
) -> None:
    """Hostile programs in the guest: once its filter stands, the half that executes them has called nothing of the
    host, and the other nothing but what it is for."""
    _, counters = await output(programs, name, "on")
    found = calls(calls_of_runners.read_text())
    after = {pid: numbers[numbers.index(SECCOMP) + 1 :] for pid, numbers in found.items() if SECCOMP in numbers}
    assert counters["native-stops"] > 0 and len(after) >= 2
    silent = [pid for pid, numbers in after.items() if not numbers]
    assert silent and len(silent) >= len(after) // 2, after
    assert all(set(numbers) <= MAPPING_CALLS for numbers in after.values()), after
