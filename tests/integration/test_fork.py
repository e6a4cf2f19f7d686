"""Copies of a running machine, and machines that are kept for warm starts: each is one of its own."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.command import VMM, environment
from vmm.errors import ConfigError

OPTIONS: dict[str, Any] = {"memory": "128M"}
LOOK = (
    "hostname; cat /sys/class/net/eth0/address; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo;"
    "cat /proc/sys/kernel/random/uuid; cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id; date +%s; cat /kept"
)


async def look(vm: vmm.VirtualMachine) -> list[str]:
    result = await vm.exec("sh", "-c", LOOK, timeout=60, check=True)
    return result.text.split("\n")


async def test_copies_differ_in_who_they_are_and_in_nothing_else(linux: Any) -> None:
    """Eight at once, of which no two share random numbers, addresses or names; memory, disk and time are right; nobody
    complains; the original is what it was, and can be copied again, as can a copy."""
    async with vmm.run("linux", **OPTIONS) as vm:
        prepare = "echo 0123456789abcdef0123456789abcdef >/etc/machine-id; echo kept >/kept"
        await vm.exec("sh", "-c", prepare, check=True)
        before = await look(vm)
        names = [f"clone-{os.getpid()}-{number}" for number in range(8)]  # nobody else's on this host
        copies = await vm.fork(8, names=names)
        asked = time.time()
        seen = await asyncio.gather(*(look(copy) for copy in copies))
        answered = time.time()
        for position in range(6):
            values = [before[position], *(facts[position] for facts in seen)]
            assert len(set(values)) == len(values), values
        assert [facts[0] for facts in seen] == names
        for facts in seen:
            assert re.fullmatch("[0-9a-f]{32}", facts[4]) and facts[7] == "kept"
            assert asked - 2 <= int(facts[6]) <= answered + 2, "the wall clock"
        await copies[0].exec("sh", "-c", "echo other >/kept; sync", check=True)
        assert (await look(copies[1]))[7] == "kept" and (await look(vm))[7] == "kept"
        logs = await asyncio.gather(*(copy.exec("dmesg", timeout=60) for copy in copies))
        for log in logs:
            assert not re.search("BUG|WARNING|lockup|rcu.*stall|Oops|Call Trace", log.text), log.text
        again = await copies[0].fork()
        assert vm.source == "" and again[0].source == f"copy of {names[0]}"
        facts = await look(again[0])
        assert facts[7] == "other" and facts[2] not in {line[2] for line in seen}
        for copy in copies[3:]:
            await copy.aclose()
        after = await look(vm)
        assert (after[0], after[1], *after[4:6]) == (before[0], before[1], *before[4:6])
        cids = {copy.device("vsock").cid for copy in copies[:3]}  # type: ignore[attr-defined]
        assert len(cids) == 3
    assert all(copy.outcome is not None for copy in copies), "copies end with their original"


async def test_what_cannot_be_copied_is_said(linux: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    async with vmm.run("linux", disks=[vmm.Disk(path=tmp_path / "disk")], **OPTIONS) as vm:
        await vm.exec("true", timeout=60)
        with pytest.raises(ConfigError, match="disk1: a copy would write to the same disk"):
            await vm.fork()
        for wrong in (0, 100000):
            with pytest.raises(ConfigError, match="copies"):
                await vm.fork(wrong)
        await vm.exec("true", timeout=60)


async def test_seeds_decide_what_copies_draw(linux: Any) -> None:
    """With the virtual clock copies of one state go the same way, to the last interrupt, though all run at once. With
    another seed they draw other numbers."""
    options: dict[str, Any] = {"clock": "virtual", "seed": 3, "agent": False, "nets": []}

    async def go_on(vm: vmm.VirtualMachine) -> str:
        await vm.console.write(b"head -c 8 /dev/hwrng | od -An -tx1; cat /proc/uptime /proc/interrupts; echo e''nd\n")
        vm.resume()
        await vm.console.expect(rb"end\r\n", timeout=120)
        return vm.console.text[-1500:]

    async with vmm.run("linux", **OPTIONS, **options) as vm:
        await vm.console.expect(rb"# ", timeout=120)
        await vm.pause()
        copies = await vm.fork(3, seeds=[7, 7, 8], paused=True)
        states = [copy.machine.save_state() for copy in copies]
        for state in states:
            del state["fields"]["saved_ns"]
        assert states[0] == states[1] != states[2]
        first, second = await asyncio.gather(*map(go_on, copies[:2]))
        assert first == second


def test_the_commands(linux: Any, tmp_path: Path) -> None:
    """vmm fork, and vmm run --warm, as a user types them."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    surroundings = environment(runtime)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*VMM, *words], env=surroundings, capture_output=True, text=True, timeout=180)

    machine = subprocess.Popen(
        [*VMM, "run", "linux", "--name", "box", "--memory", "128M", "--console", "none"], env=surroundings
    )
    try:
        deadline = time.monotonic() + 120
        while run("exec", "box", "--", "true").returncode:
            assert time.monotonic() < deadline and machine.poll() is None
        done = run("fork", "box", "--count", "2", "--as", "twin-%d")
        assert done.returncode == 0, done.stderr
        for name in ("twin-1", "twin-2"):
            assert run("exec", name, "--", "hostname").stdout == f"{name}\n"
        head, *rows = run("ps").stdout.splitlines()
        assert head.split()[-1] == "FROM"
        assert [row.split()[0] for row in rows] == ["box", "twin-1", "twin-2"]
        assert [row.split()[-1] == "-" for row in rows] == [True, False, False]
        done = run("fork", "box", "--as", "twin-1")
        assert done.returncode == 2 and "twin-1 runs already" in done.stderr
    finally:
        for name in ("twin-1", "twin-2", "box"):
            run("kill", name)
        machine.wait(60)


def test_a_warm_start_goes_on_from_a_kept_machine(linux: Any, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    cache = tmp_path / "cache"
    standing = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopvisor"
    (cache / "loopvisor").mkdir(parents=True)
    for entry in standing.iterdir():
        if entry.name not in ("snapshots", "warm"):
            (cache / "loopvisor" / entry.name).symlink_to(entry)
    surroundings = environment(runtime) | {"XDG_CACHE_HOME": str(cache)}

    def warm(*words: str) -> str:
        done = subprocess.run(
            [*VMM, "run", "linux", "--warm", "--memory", "128M", *words],
            env=surroundings, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    # No two boots have their messages at the same moments.
    boot_id = ("--", "sh", "-c", "dmesg | head -n 100 | md5sum | head -c 32; echo; cat /proc/sys/kernel/random/uuid")
    first, second, third = (warm(*boot_id).split() for _ in range(3))
    assert first[0] == second[0] == third[0], "one boot serves all"
    assert len({first[1], second[1], third[1]}) == 3, "each has random numbers of its own"
    assert warm("--append", "other", *boot_id).split()[0] != first[0], "another kind of machine boots"
    kept = [entry for entry in (cache / "loopvisor" / "warm").iterdir() if entry.is_dir()]
    assert len(kept) == 2
    for entry in kept:
        (entry / "state.json").write_text("{}")
    assert warm(*boot_id).split()[0] != first[0], "what is damaged is made again"
    done = subprocess.run([*VMM, "run", "echo", "--warm"], env=surroundings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "agent" in done.stderr
