"""Direct execution: a Linux guest's programs have the same results natively as in the core, and reach nothing here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmm
from cpu import _core
from cpu.direct import support
from cpu.model import unavailable
from cpu.system import soft_system
from tests.support import calltrace
from tests.support.counted import counters
from tests.support.patience import PATIENCE
from vmm.config import Share
from vmm.errors import ConfigError

SOURCES = Path(__file__).parents[1] / "support" / "direct"
FLAGS = ["-O1", "-static", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-mno-red-zone", "-mxsavec", "-mxsave"]
OWN_PAGES = ["-falign-functions=4096", f"-I{SOURCES.parents[2] / 'cpu'}"]
"""So that no attack shares a page with code that the core has to execute."""
MORE_FLAGS = {
    "programs": [],
    "attacks": OWN_PAGES,
    "threads": ["-pthread"],
    "rewritten": OWN_PAGES,
    "instructions": OWN_PAGES,
}
SECCOMP, STOP, MAPPING_CALLS, UNFILTERED = 317, 436, {9, 10, 11, 16}, {335, 336}
"""System calls of x86-64: seccomp; close_range, by which a guest half stops; mmap, mprotect, munmap, ioctl; uretprobe
and uprobe, which Linux passes by every filter and refuses outside of its own trampolines."""

pytestmark = pytest.mark.skipif("soft" not in _core.CORES, reason="this build has no software core")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    for name, more in MORE_FLAGS.items():
        subprocess.run(["gcc", *FLAGS, *more, "-o", folder / name, SOURCES / f"{name}.c"], check=True)
    return folder


@pytest.fixture(scope="module")
def direct() -> None:
    if not support().available:
        pytest.skip(f"direct execution: {support().reason}")


async def output(folder: Path, words: str, direct: Any, cpus: int = 1, **more: Any) -> tuple[str, dict[str, int]]:
    """What a program prints in a guest, and the machine's counters."""
    shares = [Share(path=folder, mount="/work", readonly=True)]
    options: dict[str, Any] = {"core": "soft", "nets": [], "memory": "256M", "shares": shares, "direct": direct, **more}
    if cpus > 1:
        options |= {"cpus": cpus, "parallel": "on"}
    async with vmm.run("linux", **options) as machine:
        result = await machine.exec(*f"/work/{words}".split(), timeout=240 * PATIENCE, check=True)
        return result.text, await counters(machine)


PROGRAMS = ["identity", "faults", "compatibility", "code", "hidden", "memory", "signals", "calls"]


@pytest.mark.parametrize("name", PROGRAMS)
async def test_results_are_those_of_the_core(linux: Any, direct: None, programs: Path, name: str) -> None:
    native, counted = await output(programs, f"programs {name}", "on")
    core, none = await output(programs, f"programs {name}", "off")
    assert native.splitlines() == core.splitlines()
    assert native.splitlines()[-1] == "done"
    assert counted["native-stops"] > 0 and none["native-stops"] == 0
    if name == "hidden" and support().breakpoints and not support().cpuid_faults:
        assert counted["native-stops.guard"] > 10


@pytest.mark.parametrize("cpus", [1, 2])
async def test_code_that_others_rewrite_is_looked_at_anew(
    linux: Any, direct: None, programs: Path, tmp_path: Path, cpus: int
) -> None:
    """By its kernel, a disk, a share, a debugger, through another mapping: CPUID and XGETBV are the guest's."""
    image = subprocess.run([programs / "rewritten", "image"], check=True, stdout=subprocess.PIPE).stdout
    for path in (programs / "image", tmp_path / "disk"):
        path.write_bytes(image.ljust(1 << 20, b"\0"))
    disks = [vmm.Disk(path=tmp_path / "disk")]
    text, counted = await output(programs, "rewritten /dev/vdb /work/image", "on", cpus, disks=disks)
    *lines, last = text.splitlines()
    answers = {tuple(line.partition(": ")[2].partition(" after ")[0].split()) for line in lines}
    brand, components = int.from_bytes(b"loopviso", "little"), 3
    assert answers == {(f"{brand:x}",) * 3, (f"{components:x}",) * 3}, text
    assert last == "done" and len(lines) == 7 * 6
    assert counted["native-ns"] > 1_000_000


@pytest.mark.parametrize("model", ["v2", "v3"])
async def test_each_instruction_ends_as_in_the_core(linux: Any, direct: None, programs: Path, model: str) -> None:
    if unavailable(model, soft_system().supported_cpuid()):
        pytest.skip(f"this host's core has no {model}")
    native, counted = await output(programs, "instructions", "on", cpu_model=model)
    core, _ = await output(programs, "instructions", "off", cpu_model=model)
    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    compared = ("exact ", "vendor ") if amd else ("exact ",)
    pairs = list(zip(native.splitlines(), core.splitlines(), strict=True))
    assert [one for one, other in pairs if one != other and one.startswith(compared)] == []
    assert pairs[-1] == ("done", "done") and len(pairs) > 800
    assert {one.partition(":")[0] for one, _ in pairs} == {other.partition(":")[0] for _, other in pairs}
    assert counted["native-stops.fault"] > 300


def survived(text: str) -> bool:
    """Every attack ended, or computed rightly, and its parent was sound after it."""
    *lines, last = text.splitlines()
    counts = [re.fullmatch(r"[a-z ]+: (\d+) of (\d+) as expected, sound", line) for line in lines]
    return last == "done" and len(lines) == 12 and all(found and found[1] == found[2] for found in counts)


@pytest.mark.parametrize("cpus", [1, 2])
async def test_attacks_end_with_their_program(linux: Any, direct: None, programs: Path, cpus: int) -> None:
    text, counted = await output(programs, "attacks", "on", cpus)
    assert survived(text), text
    assert counted["native-stops"] > 0


async def test_processors_change_what_others_touch_and_execute(linux: Any, direct: None, programs: Path) -> None:
    """Rights, mappings, copies and code, by threads and processes on two vCPUs that have runners of their own."""
    text, counted = await output(programs, "threads 20", "on", 2)
    *lines, last = text.splitlines()
    assert last == "done" and len(lines) == 10 and all(": 0 wrong" in line for line in lines), text
    assert counted["native-stops"] > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clock": "virtual"}, "virtual clock"),
        ({"seed": 1}, "seed"),
        ({"cpus": 2, "parallel": "off"}, "several processors"),
    ],
)
async def test_on_says_what_it_cannot(linux: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"direct: .*{words}.*use --direct auto or off"):
        async with vmm.run("linux", core="soft", direct="on", **options):
            pass


@pytest.mark.parametrize("cpus", [1, 2])
async def test_a_copy_and_its_machine_go_on_in_the_core(linux: Any, direct: None, cpus: int) -> None:
    """To share memory with a copy it is taken from the runners; what a program computed natively goes on in both."""
    script = "i=0; while :; do i=$((i+1)); echo $i >/tmp/count; done"
    read = (
        'r() { while c=$(cat /tmp/count); [ -z "$c" ]; do :; done; echo $c; }; '
        "a=$(r); while b=$(r); [ $b -le $a ]; do :; done; echo $a $b"
    )
    options: dict[str, Any] = {"cpus": cpus, "parallel": "on" if cpus > 1 else "off"}
    async with vmm.run("linux", core="soft", direct="on", nets=[], memory="256M", **options) as machine:
        await machine.exec("sh", "-c", f"({script}) >/dev/null 2>&1 &", timeout=240 * PATIENCE, check=True)
        first = (await machine.exec("sh", "-c", read, timeout=240 * PATIENCE, check=True)).text.split()
        assert (await counters(machine))["native-stops"] > 0
        (copy,) = await machine.fork()
        stops = (await counters(machine))["native-stops"]
        for one in (machine, copy):
            later = (await one.exec("sh", "-c", read, timeout=240 * PATIENCE, check=True)).text.split()
            assert int(later[1]) > int(later[0]) >= int(first[1])
        assert (await counters(machine))["native-stops"] == stops
        assert (await counters(copy))["native-stops"] == 0


# ---- seen from outside ----


def processor_time(pid: str) -> int:
    """Of a process, in clock ticks."""
    after_name = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    return int(after_name[11]) + int(after_name[12])


def busiest_runner() -> str:
    """The guest half that has executed for longest, of this process's runners."""
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    runners = [pid for pid in children if Path("/proc", pid, "comm").read_text() == "runner.bin\n"]
    return max(runners, key=processor_time)


async def test_a_mapper_that_the_host_refuses_memory_ends_with_its_program(linux: Any, direct: None) -> None:
    """The machine and its other programs go on."""
    async with vmm.run("linux", core="soft", direct="on", nets=[], memory="256M") as machine:
        script = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; x=1; while :; do x=$x$x; done"
        hungry = asyncio.create_task(machine.exec("sh", "-c", script, timeout=240 * PATIENCE))
        async with asyncio.timeout(120 * PATIENCE):
            while machine.stats()["native-ns"] < 50_000_000:
                await asyncio.sleep(0.01)
        guest_half = int(busiest_runner())
        resource.prlimit(os.getsid(guest_half), resource.RLIMIT_AS, (1 << 20, 1 << 20))
        assert (await hungry).status in (139, -signal.SIGSEGV)
        stops = machine.stats()["native-stops"]
        async with asyncio.timeout(240 * PATIENCE):
            while machine.stats()["native-stops"] <= stops:
                await machine.exec("true", check=True)


@pytest.fixture
def calls_of_runners() -> Iterator[Path]:
    """A trace of the system calls of processes of the name runner.bin."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for the kernel's trace of system calls")
    with contextlib.ExitStack() as stack:
        try:
            instance = stack.enter_context(calltrace.trace("runner.bin"))
        except OSError as error:
            pytest.skip(f"the kernel gives no trace of system calls: {error}")
        yield instance / "trace"


def calls(trace: str) -> dict[int, list[int]]:
    """By process, the numbers of its system calls in order."""
    found: dict[int, list[int]] = {}
    for line in trace.splitlines():  # all are of runners; the kernel remembers the names of the last processes only
        if entered := re.search(r"-(\d+) .*sys_enter: NR (\d+)", line):
            found.setdefault(int(entered[1]), []).append(int(entered[2]))
    return found


@pytest.mark.root
@pytest.mark.parametrize("words", ["programs faults", "programs calls", "attacks"])
async def test_runners_make_no_other_system_call(
    linux: Any, direct: None, programs: Path, calls_of_runners: Path, words: str
) -> None:
    """Hostile programs in the guest: once its filter stands, the half that executes them makes only the call that gives
    up its descriptors (and returns from signals), and the other nothing but what it is for."""
    _, counted = await output(programs, words, "on")
    found = calls(calls_of_runners.read_text())
    after = {pid: numbers[numbers.index(SECCOMP) + 1 :] for pid, numbers in found.items() if SECCOMP in numbers}
    assert counted["native-stops"] > 0 and len(after) >= 2
    halves = [pid for pid, made in after.items() if made[:1] == [STOP] and set(made[1:]) <= UNFILTERED]
    assert halves and len(halves) >= len(after) // 2, after
    assert all(set(numbers) <= MAPPING_CALLS for pid, numbers in after.items() if pid not in halves), after
