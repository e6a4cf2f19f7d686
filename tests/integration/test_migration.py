"""Live migration: a machine moves while it runs, by every way; what does not fit is refused while it runs on; whatever
breaks, exactly one machine runs afterwards, or is paused and says how to go on."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.command import VMM, environment
from tests.support.cutting import CuttingProxy
from vmm import disks
from vmm.errors import ConfigError, HostError, StateError, VmmError
from vmm.lifecycle import Reason, State
from vmm.migration.link import parse_uri
from vmm.migration.precopy import Options
from vmm.migration.protocol import Kind
from vmm.migration.source import Outgoing
from vmm.migration.target import Receiver

OPTIONS: dict[str, Any] = {"nets": [], "memory": "128M"}
TINY: dict[str, Any] = {"memory": "32M", "platform": "pc"}


async def text(vm: vmm.VirtualMachine, script: str) -> str:
    result = await vm.exec("sh", "-c", script, timeout=60, check=True)
    return result.text


@asynccontextmanager
async def waiting(uri: str, **options: Any) -> AsyncIterator[Receiver]:
    """A receiver, and the machine that came is closed."""
    async with Receiver(uri, **{"name": "", **options}) as receiver:
        try:
            yield receiver
        finally:
            if receiver.session is not None and hasattr(receiver.session, "vm"):
                await receiver.session.vm.aclose()


@asynccontextmanager
async def echo(**options: Any) -> AsyncIterator[vmm.VirtualMachine]:
    async with vmm.run("echo", **{**TINY, **options}) as vm:
        await vm.console.expect(rb"Ctrl-D ends\n", timeout=60)
        yield vm


async def talks(vm: vmm.VirtualMachine, word: str) -> None:
    await vm.console.write(word.encode() + b"\n")
    await vm.console.expect(word.encode(), timeout=60)


@pytest.mark.parametrize("way", ["unix", "tcp", "compressed"])
async def test_a_linux_guest_moves(linux: Any, tmp_path: Path, way: str) -> None:
    """Its programs, its memory, what it wrote to its disk; over several connections and compressed, too."""
    uri = f"unix:{tmp_path / 'm'}" if way == "unix" else "tcp:127.0.0.1:0"
    options: dict[str, Any] = {} if way == "unix" else {"connections": 3, "compress": way == "compressed"}
    async with vmm.run("linux", **OPTIONS) as vm, waiting(uri, trust=True) as receiver:
        await text(vm, "echo one >/first; mkdir -p /ram; mount -t tmpfs none /ram")
        await text(vm, "head -c 9000000 /dev/urandom >/ram/data; md5sum </ram/data >/ram/sum")
        await text(vm, "(while :; do echo x >>/ram/ticks; sleep 0.05; done) >/dev/null 2>&1 &")
        generation = vm.machine.components["generation-id"].save()  # type: ignore[attr-defined]
        progress = await vm.migrate(receiver.uri, **options)
        assert (await vm.wait()).reason is Reason.MIGRATED
        new = await receiver.arrive()
        assert new.state is State.RUNNING and progress.rounds >= 2 and progress.downtime > 0
        assert await text(new, "cat /first; md5sum </ram/data | cmp - /ram/sum && echo same") == "one\nsame"
        before = int(await text(new, "wc -l </ram/ticks"))
        await text(new, f"while [ $(wc -l </ram/ticks) -le {before} ]; do sleep 0.02; done")
        assert new.machine.components["generation-id"].save() == generation  # type: ignore[attr-defined]
        assert "BUG" not in await text(new, "dmesg")


async def test_time_goes_on_by_the_standstill(linux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guest's clocks show is what the host's do, although it stood still for a second; its timers are due."""
    answer = Outgoing._answer

    async def slow(self: Outgoing, kind: Any, patience: float = 30.0) -> Any:
        if kind is Kind.READY:
            await asyncio.sleep(1.0)
        return await answer(self, kind, patience)

    monkeypatch.setattr(Outgoing, "_answer", slow)
    async with vmm.run("linux", **OPTIONS) as vm, waiting(f"unix:{tmp_path / 'm'}") as receiver:

        async def ahead(machine: vmm.VirtualMachine) -> tuple[float, float]:
            """How far the host is ahead of the guest's monotonic and wall clocks; the quickest of five tells."""
            found = []
            for _ in range(5):
                began, wall = time.monotonic(), time.time()
                up, now = (await text(machine, "cut -d' ' -f1 /proc/uptime; date +%s")).split()
                found.append((began - float(up), wall - float(now)))
            return max(found)

        before = await ahead(vm)
        await text(vm, "(sleep 2; echo >/slept) >/dev/null 2>&1 &")
        progress = await vm.migrate(receiver.uri)
        new = await receiver.arrive()
        after = await ahead(new)
        assert progress.downtime > 1.0
        assert after[0] - before[0] < 0.5, "the monotonic clock fell behind"
        assert after[1] < 2.0
        await text(new, "while [ ! -e /slept ]; do sleep 0.05; done")
        assert not [line for line in (await text(new, "dmesg")).splitlines() if "BUG" in line or "unstable" in line]


async def test_a_shared_disk_is_handed_over_with_its_lock(tmp_path: Path) -> None:
    """Back and forth; nobody else can have it at any moment; what is no shared file is refused."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    disk = vmm.Disk(path=image, format="raw")
    async with echo(disks=[disk]) as vm:
        other = tmp_path / "other.img"
        other.write_bytes(bytes(1 << 20))
        async with waiting(f"unix:{tmp_path / 'a'}", disks={"disk0": other}) as receiver:
            with pytest.raises(ConfigError, match="nobody has locked it.*--copy-storage"):
                await vm.migrate(receiver.uri)
        await talks(vm, "still here")
        async with waiting(f"unix:{tmp_path / 'b'}") as receiver:
            await vm.migrate(receiver.uri)
            new = await receiver.arrive()
            await talks(new, "over there")
            with pytest.raises(ConfigError, match="in use"):
                async with echo(disks=[disk]):
                    pass
            async with waiting(f"unix:{tmp_path / 'c'}") as back:
                await new.migrate(back.uri)
                await talks(await back.arrive(), "and back")
    async with echo(disks=[disk]):
        pass


async def test_a_paused_machine_arrives_paused(tmp_path: Path) -> None:
    async with echo() as vm, waiting(f"unix:{tmp_path / 'm'}") as receiver:
        await vm.pause()
        await vm.migrate(receiver.uri)
        new = await receiver.arrive()
        assert new.state is State.PAUSED
        await new.take_up()
        await talks(new, "running")


async def test_what_does_not_fit_is_refused_while_it_runs_on(tmp_path: Path) -> None:
    async with echo(nets=[vmm.Net(kind="user", required=False)]) as vm:
        with pytest.raises(ConfigError, match="passt.*--drop-connections"):
            await vm.migrate("unix:/nowhere")
        with pytest.raises(HostError, match="is vmm receive running there"):
            await vm.migrate(f"unix:{tmp_path / 'none'}", drop_connections=True)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    async with echo(disks=[vmm.Disk(path=image, format="raw")]) as vm:
        cases: list[tuple[type[VmmError], str, dict[str, Any]]] = [
            (ConfigError, "names .*disk.img; add --trust", {}),
            (StateError, "memory is laid out", {"trust": True, "memory": "64M"}),
            (ConfigError, "no disk9; it has disk0", {"trust": True, "disks": {"disk9": image}}),
        ]
        for kind, message, options in cases:
            async with waiting("tcp:127.0.0.1:0", **options) as receiver:
                with pytest.raises(kind, match=message):
                    await vm.migrate(receiver.uri)
                with pytest.raises(kind):
                    await receiver.arrive()
            assert vm.state is State.RUNNING and vm.migration is None
            await talks(vm, "undisturbed")


async def test_version_1_is_spoken(tmp_path: Path) -> None:
    async with echo() as vm:
        async with waiting(f"unix:{tmp_path / 'a'}", newest=1) as receiver:
            with pytest.raises(StateError, match="version 1 of the protocol, which has not compression"):
                await vm.migrate(receiver.uri, compress=True)
        async with waiting(f"unix:{tmp_path / 'b'}", newest=1) as receiver:
            await vm.migrate(receiver.uri)
            await talks(await receiver.arrive(), "moved")


async def test_a_migration_is_cancelled(tmp_path: Path) -> None:
    """At a limited rate it takes its time; it is told of, changed, and ended; then it works."""
    async with echo(memory="64M") as vm:
        vm.machine.memory.view(0, 1)  # it is there
        with memoryview(vm.machine.memory.regions()[0][1]) as memory:
            memory[16 << 20 : 48 << 20] = os.urandom(1 << 20) * 32
        async with waiting(f"unix:{tmp_path / 'a'}") as receiver:
            outgoing = Outgoing(vm, parse_uri(receiver.uri), Options(bandwidth=1 << 20))
            task = asyncio.create_task(outgoing.run())
            async for event in vm.events():
                if isinstance(event, vmm.events.Migrating) and event.phase == "memory":
                    break
            with pytest.raises(StateError, match="on its way already"):
                await vm.migrate(receiver.uri)
            outgoing.set_downtime(0.5)
            outgoing.cancel()
            with pytest.raises(StateError, match="cancelled"):
                await task
            with pytest.raises(HostError):
                await receiver.arrive()
        await talks(vm, "here")
        async with waiting(f"unix:{tmp_path / 'b'}") as receiver:
            await vm.migrate(receiver.uri)
            await talks(await receiver.arrive(), "there")


async def test_a_round_may_take_longer_than_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides hear of each other meanwhile."""
    monkeypatch.setattr("vmm.migration.link.SILENCE", 2.0)
    monkeypatch.setattr("vmm.migration.source.PING_SECONDS", 0.2)
    monkeypatch.setattr("vmm.migration.target.PING_SECONDS", 0.2)
    async with echo() as vm, waiting(f"unix:{tmp_path / 'm'}") as receiver:
        with memoryview(vm.machine.memory.regions()[0][1]) as memory:
            memory[8 << 20 : 24 << 20] = os.urandom(1 << 20) * 16
        progress = await vm.migrate(receiver.uri, bandwidth=4 << 20)
        assert progress.seconds > 2.0
        await talks(await receiver.arrive(), "moved")


async def test_garbage_does_not_end_the_waiting(tmp_path: Path) -> None:
    async with waiting("tcp:127.0.0.1:0", trust=True) as receiver:
        port = int(receiver.uri.rpartition(":")[2])
        for garbage in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(5000)):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(garbage)
        async with echo() as vm:
            await vm.migrate(receiver.uri)
            await talks(await receiver.arrive(), "moved")


async def test_an_inherited_descriptor(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    async with waiting(f"fd:{theirs.detach()}") as receiver, echo() as vm:
        await vm.migrate(f"fd:{ours.detach()}")
        await talks(await receiver.arrive(), "moved")


async def one_of(vm: vmm.VirtualMachine, receiver: Receiver) -> str:
    """Who has the machine: "source" or "target" if it runs there, "paused" if it waits there for a word."""
    there = getattr(receiver.session, "vm", None)
    if there is not None and there.ending:
        there = None
    runs_here = vm.state is State.RUNNING and not vm.ending
    runs_there = there is not None and there.state is State.RUNNING
    assert not (runs_here and runs_there), "two machines run"
    if runs_here:
        await talks(vm, "alive")
        return "source"
    if runs_there:
        assert there is not None
        await talks(there, "alive")
        return "target"
    waits = [each for each in (vm, there) if each is not None and not each.ending and each.state is State.PAUSED]
    assert waits and all(each.obstacle is not None for each in waits), "no machine is left"
    assert "vmm resume" in str(waits[0].obstacle and waits[0].obstacle.text)
    return "paused"


async def measured(tmp_path: Path) -> tuple[int, int]:
    """Bytes of one whole migration, both ways."""
    async with echo() as vm, waiting(f"unix:{tmp_path / 't'}") as receiver:
        async with CuttingProxy(tmp_path / "p", tmp_path / "t") as proxy:
            await vm.migrate(f"unix:{tmp_path / 'p'}")
            await receiver.arrive()
            return proxy.counts[0], proxy.counts[1]


async def cut_at(tmp_path: Path, way: int, limit: int, *, again: bool, disk: Path | None) -> str:
    limits = {"forward_limit": limit} if way == 0 else {"backward_limit": limit}
    disks = [] if disk is None else [vmm.Disk(path=disk, format="raw")]
    async with echo(disks=disks) as vm, waiting(f"unix:{tmp_path / 't'}") as receiver:
        async with CuttingProxy(tmp_path / "p", tmp_path / "t", again=again, **limits) as proxy:
            try:
                await vm.migrate(f"unix:{tmp_path / 'p'}")
            except VmmError:
                pass
            assert proxy.cut or vm.outcome is not None
            session = receiver.session
            if session is not None and session._task is not None:  # until the target has heard, too
                await asyncio.wait([session._task], timeout=60)
            return await one_of(vm, receiver)


@pytest.mark.parametrize("again", [True, False], ids=["comes back", "stays away"])
async def test_a_cut_link_leaves_exactly_one(tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after every so many bytes, and after each of the last frames of both sides."""
    # On a busy host, too, whoever comes back is to be asked in time; whoever stays away is asked in vain.
    monkeypatch.setattr("vmm.migration.source.ASK_SECONDS", 5.0 if again else 0.2)
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    forward, backward = await measured(tmp_path)
    seen: dict[str, int] = {}
    steps = int(os.environ.get("LOOPVISOR_CUTS", "6"))
    points = [(0, forward * n // steps + 1) for n in range(steps)]
    # The last frames: HANDOVER, COMMIT and DONE are 16 bytes or little more; TAKEN and RUNNING likewise.
    points += [(0, forward - back) for back in (1, 17, 40, 90, 110)]
    points += [(1, backward - back) for back in (0, 1, 15, 16, 17, 32, 48)]
    for way, limit in points:
        found = await cut_at(tmp_path, way, max(limit, 1), again=again, disk=disk)
        seen[found] = seen.get(found, 0) + 1
    assert seen.get("source", 0) >= 3, seen
    if again:
        assert "paused" not in seen, "whoever can ask is told"


def test_the_commands(linux: Any, tmp_path: Path) -> None:
    """vmm run, receive, migrate and ps, as a user types them."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    surroundings = environment(runtime)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*VMM, *words], env=surroundings, capture_output=True, text=True, timeout=120)

    where = f"unix:{tmp_path / 'm'}"
    machine = subprocess.Popen(
        [*VMM, "run", "linux", "--name", "box", "--console", "none", "--net", "none"], env=surroundings
    )
    other: subprocess.Popen[str] | None = None
    try:
        for _ in range(120):  # seconds: until it is listed
            if (done := run("exec", "box", "sh", "-c", "echo kept >/kept")).returncode == 0:
                break
        assert done.returncode == 0, done.stderr
        done = run("migrate", "box", where)
        assert done.returncode == 4 and done.stderr.count("\n") == 1 and "vmm receive" in done.stderr
        other = subprocess.Popen(
            [*VMM, "receive", where, "--name", "box2", "--console", "none"],
            env=surroundings, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert other.stderr is not None and "waiting at" in other.stderr.readline()
        done = run("migrate", "box", where, "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["downtime"] > 0, done.stderr
        assert machine.wait(60) == 0
        listed = [(entry["name"], entry["source"]) for entry in json.loads(run("ps", "--json").stdout)]
        assert listed == [("box2", "box, migrated")]
        assert run("exec", "box2", "cat", "/kept").stdout == "kept\n"
        assert run("stop", "box2").returncode == 0
        assert other.wait(60) == 0
    finally:
        for process in (machine, other):
            if process is not None:
                process.kill()
                process.wait()
        if other is not None and other.stderr is not None:
            other.stderr.close()


def test_certificates_on_both_sides(tmp_path: Path) -> None:
    """Who has none of the right authority is not let in, and the machine runs on; neither side takes another's."""
    pytest.importorskip("cryptography")
    from vmm.libvirt import pki

    good, bad = tmp_path / "good", tmp_path / "bad"
    pki.init(good, ["localhost", "127.0.0.1"], ["mover"])
    pki.init(bad, ["localhost", "127.0.0.1"], ["mover"])

    async def main() -> None:
        async with echo() as vm:
            for server, client in ((good, bad), (bad, good)):
                async with waiting("tcp:127.0.0.1:0", tls=server) as receiver:
                    with pytest.raises(VmmError):
                        await vm.migrate(receiver.uri, tls=client / "clients" / "mover")
                    with pytest.raises(VmmError):
                        await vm.migrate(receiver.uri)
                await talks(vm, "still here")
            with pytest.raises(ConfigError, match="clientcert.pem is missing"):
                await vm.migrate("tcp:127.0.0.1:1", tls=good)
            async with waiting("tcp:127.0.0.1:0", tls=good) as receiver:
                await vm.migrate(receiver.uri, tls=good / "clients" / "mover", connections=2)
                await talks(await receiver.arrive(), "moved")

    asyncio.run(main())


KILLED = """
import asyncio, os, signal, sys
import vmm
from vmm.migration import link
from vmm.migration.protocol import Kind
from vmm.migration.target import Receiver

side, step, moment, where = sys.argv[1:5]
send = link.Link.send

def killing(self, kind, *parts, **options):
    if kind.name == step and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, kind, *parts, **options)
    if kind.name == step:
        os.kill(os.getpid(), signal.SIGKILL)

link.Link.send = killing

async def main():
    if side == "source":
        async with vmm.run("echo", memory="32M", platform="pc") as vm:
            await vm.console.expect(rb"Ctrl-D ends\\n", timeout=60)
            await vm.migrate(where)
    else:
        async with Receiver(where, name="") as receiver:
            print("waits", flush=True)
            await receiver.arrive()
            await asyncio.sleep(3600)

asyncio.run(main())
"""


def killed(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", KILLED, *words], stdout=subprocess.PIPE)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["PAGES", "STATE", "HANDOVER", "COMMIT", "DONE"])
async def test_a_killed_source(tmp_path: Path, step: str, moment: str) -> None:
    """Its guest goes with it, unless the target had all of it: then that one runs, or waits for a word."""
    async with waiting(f"unix:{tmp_path / 'm'}") as receiver:
        child = killed("source", step, moment, receiver.uri)
        try:
            if step == "PAGES" or (step, moment) == ("STATE", "before"):
                with pytest.raises(HostError, match="ended the connection|reset by peer"):
                    async with asyncio.timeout(60):
                        await receiver.arrive()
                return
            async with asyncio.timeout(60):
                vm = await receiver.arrive()
            if step == "DONE" or (step, moment) == ("COMMIT", "after"):
                assert vm.state is State.RUNNING
            else:
                assert vm.state is State.PAUSED and vm.obstacle is not None and "vmm resume" in vm.obstacle.text
                with pytest.raises(StateError):
                    vm.resume()
                await vm.take_up()
            await talks(vm, "lives")
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["ACCEPT", "ROUND_DONE", "READY", "TAKEN", "RUNNING"])
async def test_a_killed_target(tmp_path: Path, step: str, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source runs on, its disk locked by itself; or is paused, if the target may run, until somebody decides."""
    monkeypatch.setattr("vmm.migration.source.ASK_SECONDS", 1.0)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    where = f"unix:{tmp_path / 'm'}"
    async with echo(disks=[vmm.Disk(path=image, format="raw")]) as vm:
        child = killed("target", step, moment, where)
        try:
            assert child.stdout is not None and await asyncio.to_thread(child.stdout.readline) == b"waits\n"
            if (step, moment) == ("RUNNING", "after"):
                await vm.migrate(where)
                assert (await vm.wait()).reason is Reason.MIGRATED
                return
            with pytest.raises(HostError):
                await vm.migrate(where)
            if step == "RUNNING" or (step == "TAKEN" and vm.state is State.PAUSED):  # COMMIT was sent
                assert vm.state is State.PAUSED and vm.obstacle is not None and "vmm resume" in vm.obstacle.text
                await vm.take_up()
            assert vm.state is State.RUNNING
            await talks(vm, "lives")
            with pytest.raises(ConfigError, match="in use"):
                async with echo(disks=[vmm.Disk(path=image, format="raw")]):
                    pass
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_disks_are_copied_while_the_guest_writes(linux: Any, tmp_path: Path, format: str) -> None:
    """What it wrote before, meanwhile and afterwards is there, and nothing else; the source's file is left behind."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    if format == "raw":
        (here / "disk").write_bytes(bytes(32 << 20))
    else:
        disks.create_disk(str(here / "disk"), 32 << 20)
    data = vmm.Disk(path=here / "disk", format=format, id="data")
    async with vmm.run("linux", disks=[data], **OPTIONS) as vm:
        device = "/dev/$(grep -l data /sys/block/*/serial | cut -d/ -f4)"
        await text(vm, f"head -c 8000000 /dev/urandom >/tmp/one; cat /tmp/one >{device}; sync")
        write = "i=0; while :; do i=$((i+1)); echo $i | dd of=$D bs=512 seek=$((20000+i)) conv=notrunc 2>/dev/null;"
        write += " sync; echo $i >/tmp/next; mv /tmp/next /tmp/count; sleep 0.05; done"
        await text(vm, f"D={device}; ({write}) >/dev/null 2>&1 &")
        async with waiting(f"unix:{tmp_path / 'm'}", disks={"data": there / "disk"}) as receiver:
            progress = await vm.migrate(receiver.uri, copy_storage=True)
            assert progress.disk_sent >= 32 << 20
            new = await receiver.arrive()
            count = int(await text(new, "cat /tmp/count"))
            await text(new, f"while [ $(cat /tmp/count) -le {count} ]; do sleep 0.02; done; kill %1; sync; true")
            compare = f"cmp -n 8000000 /tmp/one {device} && n=$(cat /tmp/count); echo 3 >/proc/sys/vm/drop_caches;"
            compare += f" for i in $(seq $n); do [ $(dd if={device} bs=512 skip=$((20000+i)) count=1 2>/dev/null |"
            compare += " head -n 1) = $i ] || echo wrong $i; done; echo checked"
            assert await text(new, compare) == "checked"


@pytest.mark.kvm
async def test_from_one_core_to_the_other_and_back(tmp_path: Path) -> None:
    async with echo(core="kvm") as vm, waiting(f"unix:{tmp_path / 'm'}", core="soft") as receiver:
        await vm.migrate(receiver.uri)
        new = await receiver.arrive()
        assert new.core == "soft"
        await talks(new, "on the other core")
        async with waiting(f"unix:{tmp_path / 'b'}", core="kvm") as back:
            await new.migrate(back.uri)
            assert (await back.arrive()).core == "kvm"
            await talks(await back.arrive(), "and back")


async def test_a_processor_that_the_other_core_has_not_is_refused_by_name(tmp_path: Path) -> None:
    """What the guest was told of decides, not what this host has."""
    async with echo() as vm, waiting(f"unix:{tmp_path / 'm'}") as receiver:
        entries = vm.machine.cpuid[0]
        vm.machine.cpuid[0] = [replace(e, ebx=e.ebx | 1 << 16) if e.function == 7 else e for e in entries]
        if vm.machine.cpuid[0] == entries:
            vm.machine.cpuid[0] = [replace(e, ecx=e.ecx | 1 << 28) if e.function == 1 else e for e in entries]
        with pytest.raises(HostError, match="the guest was told of what the core .* lacks: avx"):
            await vm.migrate(receiver.uri)
        await talks(vm, "runs on")
