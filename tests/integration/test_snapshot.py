"""Machines put down and taken up again by API and command: whole, incremental, compressed, damaged, killed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.command import VMM, environment
from vmm.errors import ConfigError, GuestError, StateError
from vmm.guest.frames import VERSION
from vmm.machine.saving import AGENT_OF_V1
from vmm.state.snapshot import Snapshot
from vmm.state.taking import SnapshotProgress

OPTIONS: dict[str, Any] = {"nets": [], "memory": "128M"}


@pytest.fixture(autouse=True)
def own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trusted and verified is this test's alone. The images stay where they are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopvisor"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "loopvisor").mkdir()
    if cache.is_dir():
        for entry in cache.iterdir():
            if entry.name != "snapshots":
                (tmp_path / "cache" / "loopvisor" / entry.name).symlink_to(entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


async def text(vm: vmm.VirtualMachine, script: str) -> str:
    result = await vm.exec("sh", "-c", script, timeout=60, check=True)
    return result.text


async def test_a_machine_runs_on_and_goes_on_elsewhere(linux: Any, tmp_path: Path) -> None:
    """Memory, processes and the disk of the moment of the snapshot, in as many copies as wanted; increments on a base;
    compressed; the original runs on."""
    whole, more, small = tmp_path / "whole", tmp_path / "more", tmp_path / "small"
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "echo one >/first; mkdir -p /ram; mount -t tmpfs none /ram; echo kept >/ram/file")
        await text(vm, "(while :; do echo x >>/ram/ticks; sleep 0.05; done) >/dev/null 2>&1 &")
        progress = SnapshotProgress()
        manifest = await vm.snapshot(whole, progress=progress)
        assert progress.stood_still_ns and manifest.memory.size == 128 << 20
        await text(vm, "echo two >/second")
        increment = await vm.snapshot(more, base=whole)
        await vm.snapshot(small, compress="zstd", base=whole)
        assert increment.memory.stored < manifest.memory.stored
        assert await text(vm, "cat /first /second /ram/file") == "one\ntwo\nkept"
    for folder, expected in ((whole, "one"), (more, "one\ntwo"), (small, "one\ntwo"), (whole, "one")):
        async with vmm.restore(folder) as copy:
            assert await text(copy, "cat /first /second 2>/dev/null; true") == expected
            before = int(await text(copy, "cat /ram/file >/dev/null && wc -l </ram/ticks"))
            until = f"while [ $(wc -l </ram/ticks) -le {before} ]; do sleep 0.02; done; echo on"
            assert await text(copy, until) == "on", "the process of the saved machine runs on"
            assert "BUG" not in await text(copy, "dmesg")
    for folder in (whole, more, small):
        snapshot = Snapshot.open(folder)
        snapshot.verify()
        snapshot.close()


async def test_console_and_clock_go_on(linux: Any, tmp_path: Path) -> None:
    """The console's text is there for who attaches; the guest's clock does not go back."""
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "echo before >/dev/console")
        up = float((await text(vm, "cat /proc/uptime")).split()[0])
        await vm.snapshot(tmp_path / "s")
    async with vmm.restore(tmp_path / "s") as copy:
        assert "before" in copy.console.text
        assert float((await text(copy, "cat /proc/uptime")).split()[0]) >= up
        await text(copy, "echo after >/dev/console")
        await copy.console.expect(rb"after", timeout=30)


async def test_stop_ends_the_machine_where_it_was_saved(linux: Any, tmp_path: Path) -> None:
    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "echo saved >/state")
        await vm.snapshot(tmp_path / "s", stop=True)
        assert (await vm.wait()).detail == "saved"
    async with vmm.restore(tmp_path / "s", paused=True) as copy:
        copy.resume()
        assert await text(copy, "cat /state") == "saved"


async def test_the_virtual_clock_goes_on_identically(linux: Any, tmp_path: Path) -> None:
    """Original and restored machines write the same to the console, at the same instructions. What is typed comes while
    they stand still, for the moment at which it comes is an input too."""
    options: dict[str, Any] = {"clock": "virtual", "seed": 5, "agent": False, "nets": [], "memory": "128M"}

    async def go_on(vm: vmm.VirtualMachine) -> str:
        start = len(vm.console.text)
        await vm.console.write(b"cat /proc/uptime /proc/sys/kernel/random/uuid; cat /proc/interrupts; echo e''nd\n")
        vm.resume()
        await vm.console.expect(rb"end\r\n", timeout=120)
        return vm.console.text[start:]

    outputs = []
    async with vmm.run("linux", **options) as vm:
        await vm.console.expect(rb"# ", timeout=120)
        await vm.pause()
        await vm.snapshot(tmp_path / "s")
        outputs.append(await go_on(vm))
    for _ in range(2):
        async with vmm.restore(tmp_path / "s", paused=True) as copy:
            outputs.append(await go_on(copy))
    assert outputs[1] == outputs[2], "copies of one state go the same way"
    assert outputs[0] == outputs[1], "the original goes that way too"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A snapshot of a tiny guest: quick to take, with all the parts but disks."""

    async def make() -> None:
        async with vmm.run("echo") as vm:
            await vm.console.expect(rb"Ctrl-D ends\n", timeout=30)
            await vm.snapshot(tmp_path / "snapshot")

    asyncio.run(make())
    return tmp_path / "snapshot"


async def test_a_tiny_guest_goes_on(saved: Path) -> None:
    async with vmm.restore(saved) as vm:
        await vm.console.write(b"hello\x04")
        await vm.console.expect(rb"hello", timeout=30)
        await vm.wait()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "memory", "memory.sums"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "missing", "directory", "link"])
async def test_damage_is_one_line_and_nothing_starts(saved: Path, name: str, how: str) -> None:
    path = saved / name
    data = path.read_bytes()
    if how == "flip":
        middle = len(data) // 3
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :])
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if how == "directory":
            path.mkdir()
        elif how == "link":
            path.symlink_to("/etc/passwd")
    with pytest.raises(StateError) as caught:
        async with vmm.restore(saved):
            pass
    message = str(caught.value)
    assert str(saved) in message and "\n" not in message


async def test_state_that_does_not_fit_is_refused_by_name(saved: Path) -> None:
    """A manifest and a state that are whole, but not of this machine."""
    from vmm.state import manifest as manifests

    with pytest.raises(StateError, match="vCPUs: the state has 1, this machine 2"):
        async with vmm.restore(saved, cpus=2):
            pass
    with pytest.raises(ConfigError, match="memory"):
        async with vmm.restore(saved, memory="nothing"):
            pass
    values, _ = manifests.read(saved)
    (saved / "manifest.json").unlink()
    text = json.dumps({"kind": "snapshot", "version": 99, "fields": {}})
    import hashlib

    (saved / "manifest.json").write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
    with pytest.raises(StateError, match="version 99 is newer than 1"):
        async with vmm.restore(saved):
            pass
    assert values.memory.size


async def test_a_foreign_snapshot_opens_no_file_of_this_host(linux: Any, tmp_path: Path) -> None:
    """One that came from elsewhere names its disk's image; that is opened only when the user says so. A file that
    changed since is not taken for the old one."""
    async with vmm.run("linux", **OPTIONS) as vm:
        await vm.exec("true", timeout=60)
        await vm.snapshot(tmp_path / "s")
    shutil.rmtree(tmp_path / "cache" / "loopvisor" / "snapshots")
    with pytest.raises(StateError, match="comes from elsewhere and names .*--trust"):
        async with vmm.restore(tmp_path / "s"):
            pass
    async with vmm.restore(tmp_path / "s", trust=True) as vm:
        await vm.exec("true", timeout=60)


def change_state(snapshot: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the machine's state in a snapshot, with the checksums that are right for it."""
    state = json.loads((snapshot / "state.json").read_text())
    change(state["machine"])
    data = json.dumps(state).encode()
    (snapshot / "state.json").write_bytes(data)
    manifest = json.loads((snapshot / "manifest.json").read_text().rstrip("\n").rpartition("\n")[0])
    manifest["fields"]["files"]["state.json"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(manifest)
    (snapshot / "manifest.json").write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")


async def test_who_asks_an_agent_of_another_version_is_told(linux: Any, tmp_path: Path) -> None:
    def another(machine: dict[str, Any]) -> None:
        assert (machine["version"], machine["fields"]["agent"]) == (2, VERSION)
        machine["fields"]["agent"] = VERSION + 1

    def older(machine: dict[str, Any]) -> None:
        machine["version"], machine["fields"]["agent"] = 1, True

    async with vmm.run("linux", **OPTIONS) as vm:
        await text(vm, "true")
        await vm.snapshot(tmp_path / "s", stop=True)
    change_state(tmp_path / "s", another)
    async with vmm.restore(tmp_path / "s", trust=True, as_copy=True) as vm:
        for call in (vm.exec("true"), vm.agent.copy_in(tmp_path / "s" / "state.json", "/state")):
            told = f"speaks version {VERSION + 1} of its protocol, this vmm version {VERSION}"
            with pytest.raises(GuestError, match=told):
                await asyncio.wait_for(call, 60)
    change_state(tmp_path / "s", older)
    async with vmm.restore(tmp_path / "s", trust=True) as vm:
        told = f"speaks version {AGENT_OF_V1} of its protocol, this vmm version {VERSION}"
        with pytest.raises(GuestError, match=told):
            await asyncio.wait_for(vm.exec("true"), 60)


async def test_targets_that_are_no_snapshots_stay_as_they_are(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("mine")
    async with vmm.run("echo") as vm:
        for target in (tmp_path / "full", tmp_path / "full" / "letter", tmp_path / "no" / "where"):
            with pytest.raises(ConfigError):
                await vm.snapshot(target)
        await vm.snapshot(saved)  # replaced
    assert sorted(entry.name for entry in tmp_path.iterdir() if "partial" in entry.name) == []
    assert (tmp_path / "full" / "letter").read_text() == "mine"


async def test_a_machine_that_ended_is_refused_by_name(tmp_path: Path) -> None:
    async with vmm.run("hello") as vm:
        await vm.wait()
        with pytest.raises(StateError, match="the machine ended"):
            await vm.snapshot(tmp_path / "s")
    assert not (tmp_path / "s").exists()


KILLED = """
import asyncio, sys
import vmm

async def main():
    async with vmm.run("echo", memory="64M") as vm:
        await vm.console.expect(rb"Ctrl-D ends\\n", timeout=30)
        print("ready", flush=True)
        while True:
            await vm.snapshot(sys.argv[1])

asyncio.run(main())
"""


def test_kills_while_it_is_written_leave_the_old_one_or_none(tmp_path: Path) -> None:
    """Snapshots over each other without end, killed at random moments: what stands there is whole, and stays there from
    the first whole one on. LOOPVISOR_KILLS: how often."""
    target = tmp_path / "s"
    seed = int(os.environ.get("LOOPVISOR_SEED") or time.time_ns() % 1_000_000)
    chance, seen = random.Random(seed), False
    for number in range(int(os.environ.get("LOOPVISOR_KILLS", "8"))):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(chance.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        assert target.exists() or not seen, f"seed {seed}, kill {number}: the old one is gone"
        if target.exists():
            seen = True
            snapshot = Snapshot.open(target)
            snapshot.verify()
            snapshot.close()
    assert seen or number < 20, f"seed {seed}: no snapshot was ever whole"


def test_the_commands(linux: Any, tmp_path: Path) -> None:
    """vmm run, snapshot, snapshot-info and restore, as a user types them."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    surroundings = environment(runtime)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*VMM, *words], env=surroundings, capture_output=True, text=True, timeout=120)

    machine = subprocess.Popen(
        [*VMM, "run", "linux", "--name", "box", "--console", "none", "--net", "none"], env=surroundings
    )
    try:
        deadline = 60.0
        while run("snapshot", "box", str(tmp_path / "s")).returncode and deadline > 0:
            deadline -= 1
        done = run("snapshot", "box", str(tmp_path / "s"), "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["stood_still_ns"] > 0, done.stderr
        done = run("snapshot", "box", str(tmp_path / "t"), "--stop")
        assert done.returncode == 0 and "saved to" in done.stderr, done.stderr
        assert machine.wait(60) == 0
    finally:
        machine.kill()
        machine.wait()
    assert json.loads(run("snapshot-info", str(tmp_path / "s"), "--verify", "--json").stdout)["verified"] is True
    done = run("restore", str(tmp_path / "t"), "--", "sh", "-c", "uname -s; exit 7")
    assert (done.stdout, done.returncode) == ("Linux\n", 7), done.stderr
    done = run("restore", str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no snapshot" in done.stderr
