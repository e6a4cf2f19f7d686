"""Post-copy: the machine runs at its target at once, and its memory follows; devices wait for pages, not the loop;
a link that breaks pauses the machine until another is there."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.integration.test_migration import OPTIONS, echo, talks, text, waiting
from tests.support.command import VMM, environment
from tests.support.slowlink import SlowLink
from tests.support.stalls import StallWatch
from vmm import _native
from vmm.errors import ConfigError, HostError, StateError
from vmm.lifecycle import Reason, State
from vmm.migration.link import parse_uri
from vmm.migration.precopy import Options
from vmm.migration.source import Outgoing
from vmm.migration.target import Receiver

pytestmark = pytest.mark.skipif(not _native.can_page(False), reason="the host has no userfaultfd for this process")


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for it."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_linux_guest_runs_before_its_memory_is_there(linux: Any, tmp_path: Path) -> None:
    """At once, without a round; then, as it writes more than the link carries, after the first rounds."""
    async with vmm.run("linux", **OPTIONS) as vm, waiting(f"unix:{tmp_path / 'm'}") as receiver:
        await text(vm, "echo one >/first; mkdir -p /ram; mount -t tmpfs none /ram")
        await text(vm, "head -c 20000000 /dev/urandom >/ram/data; md5sum </ram/data >/ram/sum")
        await text(vm, "(while :; do echo x >>/ram/ticks; sleep 0.05; done) >/dev/null 2>&1 &")
        moving = asyncio.create_task(vm.migrate(receiver.uri, postcopy="now", bandwidth=1 << 20))
        new = await receiver.arrive()
        assert new.state is State.RUNNING and new.fetching is not None and new.fetching.as_dict()["missing"] > 10 << 20
        await until(lambda: vm.state is State.PAUSED)  # it hears a moment later that the other side runs
        assert vm.migration is not None
        vm.migration.set_bandwidth(8 << 20)
        with pytest.raises(StateError, match="still fetches memory from here"):
            vm.resume()
        for refused in (new.snapshot(tmp_path / "s"), new.migrate("unix:/nowhere"), new.fork()):
            with pytest.raises(StateError, match="still on its way"):
                await refused
        assert await text(new, "cat /first; md5sum </ram/data | cmp - /ram/sum && echo same") == "one\nsame"
        assert (await moving).asked > 0
        assert (await vm.wait()).reason is Reason.MIGRATED
        before = int(await text(new, "wc -l </ram/ticks"))
        await text(new, f"while [ $(wc -l </ram/ticks) -le {before} ]; do sleep 0.02; done")
        assert "BUG" not in await text(new, "dmesg")
        await until(lambda: new.fetching is None)
        write = "while :; do head -c 20000000 /dev/urandom >/ram/data; md5sum </ram/data >/ram/sum; done"
        await text(new, f"({write}) >/dev/null 2>&1 &")
        async with waiting(f"unix:{tmp_path / 'b'}") as back:
            progress = await new.migrate(back.uri, postcopy=True, bandwidth=16 << 20, downtime=0.01)
            last = await back.arrive()
            assert progress.rounds > 1 and not progress.throttle
            await text(last, "kill %1; kill $(pidof head md5sum); sync; ls -l /ram/data; md5sum /ram/data")
            assert "BUG" not in await text(last, "dmesg")


@pytest.mark.kvm
@pytest.mark.parametrize("cores", [("kvm", "kvm"), ("kvm", "soft")], ids="-".join)
async def test_every_core(tmp_path: Path, cores: tuple[str, str]) -> None:
    """KVM touches missing pages in the kernel."""
    if "kvm" in cores[1] and not _native.can_page(True):
        pytest.skip("the host has no userfaultfd for the kernel's own faults for this process")
    async with echo(core=cores[0]) as vm, waiting(f"unix:{tmp_path / 'm'}", core=cores[1]) as receiver:
        await asyncio.gather(vm.migrate(receiver.uri, postcopy="now"), receiver.arrive())
        new = await receiver.arrive()
        assert new.core == cores[1]
        await talks(new, "moved")


async def test_it_is_asked_for_while_a_round_goes_on(tmp_path: Path) -> None:
    async with echo(memory="64M") as vm, waiting(f"unix:{tmp_path / 'm'}") as receiver:
        with memoryview(vm.machine.memory.regions()[0][1]) as memory:
            memory[16 << 20 : 32 << 20] = content = os.urandom(1 << 20) * 16
        outgoing = Outgoing(vm, parse_uri(receiver.uri), Options(bandwidth=1 << 20, postcopy="allowed"))
        moving = asyncio.create_task(outgoing.run())
        await until(lambda: outgoing.progress.phase == "memory")
        outgoing.start_postcopy()
        new = await receiver.arrive()
        with pytest.raises(StateError, match="handed over already"):
            outgoing.start_postcopy()
        outgoing.set_bandwidth(0)
        await moving
        await talks(new, "moved")
        assert new.machine.memory.regions()[0][1][16 << 20 : 32 << 20] == content
    async with echo() as vm, waiting(f"unix:{tmp_path / 'n'}") as receiver:
        outgoing = Outgoing(vm, parse_uri(receiver.uri), Options())
        with pytest.raises(StateError, match="not allowed when the migration began"):
            outgoing.start_postcopy()
        with pytest.raises(ConfigError, match="none of allowed, auto and now"):
            await vm.migrate(receiver.uri, postcopy="soon")


async def test_it_is_asked_for_as_the_machine_goes_already(tmp_path: Path) -> None:
    """The last round, which nothing follows, comes whole."""
    async with echo(memory="64M") as vm, waiting(f"unix:{tmp_path / 'm'}") as receiver:
        content = os.urandom(1 << 20) * 16
        outgoing = Outgoing(vm, parse_uri(receiver.uri), Options(downtime=60.0, postcopy="allowed"))
        send = outgoing._send_round

        async def send_round(todo: Sequence[bytes], *, fresh: bool) -> None:
            if outgoing.progress.phase == "switching":
                outgoing.start_postcopy()
            await send(todo, fresh=fresh)
            if outgoing.progress.phase == "memory":
                vm.machine.memory.write(16 << 20, content)

        outgoing._send_round = send_round  # type: ignore[method-assign]
        await asyncio.gather(outgoing.run(), receiver.arrive())
        new = await receiver.arrive()
        await talks(new, "moved")
        assert new.machine.memory.regions()[0][1][16 << 20 : 32 << 20] == content


async def test_a_target_of_before_is_refused(tmp_path: Path) -> None:
    async with echo() as vm:
        for newest in (1, 2):
            async with waiting(f"unix:{tmp_path / str(newest)}", newest=newest) as receiver:
                with pytest.raises(StateError, match=f"version {newest} of the protocol, which has not post-copy"):
                    await vm.migrate(receiver.uri, postcopy="now")
        async with waiting(f"unix:{tmp_path / 'm'}", newest=2) as receiver:
            await vm.migrate(receiver.uri)
            await talks(await receiver.arrive(), "moved")


async def test_devices_wait_for_pages_and_the_loop_does_not(linux: Any, tmp_path: Path) -> None:
    """A disk reads into pages that are on a link of 40 ms each way; meanwhile the loop answers at once."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(1 << 20) * 8)
    disk = vmm.Disk(path=image, format="raw", id="data")
    async with vmm.run("linux", **OPTIONS, disks=[disk]) as vm, waiting(f"unix:{tmp_path / 't'}") as receiver:
        await text(vm, "mkdir -p /ram; mount -t tmpfs none /ram; head -c 20000000 /dev/urandom >/ram/data")
        await text(vm, "dd if=/ram/data of=/dev/null bs=1M; dd if=/dev/zero of=/ram/copy bs=1M count=8")
        with SlowLink(tmp_path / "p", tmp_path / "t") as link:
            moving = asyncio.create_task(vm.migrate(f"unix:{link.path}", postcopy="now", bandwidth=1 << 20))
            new = await receiver.arrive()
            link.delay = 0.04
            fetching = new.fetching
            assert fetching is not None
            async with StallWatch() as watch:
                device = "/dev/$(grep -l data /sys/block/*/serial | cut -d/ -f4)"
                # Pages of the cache that are still there are read into and written from.
                script = f"dd if={device} of=/ram/copy bs=1M count=1 conv=notrunc; dd if=/ram/data of={device} bs=64k"
                await text(new, f"{script} count=4 conv=fsync; cmp -n 262144 /ram/data {device} && echo same")
            assert fetching.absent.status().faults > 3
            assert watch.longest_wall < 1.0 or watch.longest < 0.2, watch.stack
            link.delay = 0.0
            vm.migration.set_bandwidth(0)  # type: ignore[union-attr]
            await moving


async def broken(tmp_path: Path, vm: vmm.VirtualMachine, receiver: Receiver, link: SlowLink) -> vmm.VirtualMachine:
    """A machine that moved, and whose link was cut in mid-course."""
    moving = asyncio.create_task(vm.migrate(f"unix:{link.path}", postcopy="now", bandwidth=1 << 20))
    new = await receiver.arrive()
    link.cut()
    with pytest.raises(HostError, match="vmm migrate --recover NAME URI goes on"):
        await moving
    await until(lambda: new.state is State.PAUSED)
    return new


async def test_a_broken_link_is_recovered(linux: Any, tmp_path: Path) -> None:
    """Twice; both machines are paused meanwhile and say why; then nothing is lost."""
    async with vmm.run("linux", **OPTIONS) as vm, waiting(f"unix:{tmp_path / 't'}") as receiver:
        await text(vm, "mkdir -p /ram; mount -t tmpfs none /ram")
        await text(vm, "head -c 20000000 /dev/urandom >/ram/data; md5sum </ram/data >/ram/sum")
        with SlowLink(tmp_path / "p", tmp_path / "t") as link:
            new = await broken(tmp_path, vm, receiver, link)
            assert vm.state is State.PAUSED and vm.obstacle is not None and "--recover" in vm.obstacle.text
            assert new.obstacle is not None and "still at its source" in new.obstacle.text
            for machine in (vm, new):
                with pytest.raises(StateError):
                    machine.resume()
            with pytest.raises(HostError):
                await vm.migrate(f"unix:{tmp_path / 'nowhere'}", recover=True)
            again = asyncio.create_task(vm.migrate(f"unix:{link.path}", recover=True))
            await until(lambda: new.state is State.RUNNING)
            link.cut()
            with pytest.raises(HostError, match="--recover"):
                await again
        assert new.fetching is not None
        other = await new.fetching.listen(f"unix:{tmp_path / 'other'}", None)
        again = asyncio.create_task(vm.migrate(other, recover=True))
        await until(lambda: new.state is State.RUNNING)
        assert vm.migration is not None
        vm.migration.set_bandwidth(0)
        await again
        assert (await vm.wait()).reason is Reason.MIGRATED
        assert await text(new, "md5sum </ram/data | cmp - /ram/sum && echo same") == "same"
        with pytest.raises(StateError, match="no migration of this machine waits"):
            await new.migrate(other, recover=True)


async def test_a_machine_that_waits_for_its_memory_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while its vCPU waits for a page that does not come; then its source ends, too."""
    async with echo(memory="64M") as vm, waiting(f"unix:{tmp_path / 't'}") as receiver:
        with SlowLink(tmp_path / "p", tmp_path / "t") as link:
            new = await broken(tmp_path, vm, receiver, link)
            async with asyncio.timeout(30):
                await new.aclose()
            monkeypatch.setattr("vmm.migration.link.CONNECT_SECONDS", 0.5)  # nobody is there who could answer
            with pytest.raises(HostError):
                await vm.migrate(f"unix:{link.path}", recover=True)
            assert vm.state is State.PAUSED


async def test_a_guest_that_ends_lets_its_source_go(tmp_path: Path) -> None:
    async with echo(memory="64M") as vm, waiting(f"unix:{tmp_path / 't'}") as receiver:
        with memoryview(vm.machine.memory.regions()[0][1]) as memory:
            memory[16 << 20 : 48 << 20] = os.urandom(1 << 20) * 32
        moving = asyncio.create_task(vm.migrate(receiver.uri, postcopy="now", bandwidth=1 << 20))
        new = await receiver.arrive()
        new.end(vmm.Outcome(Reason.KILLED))
        async with asyncio.timeout(30):
            await new.wait()
            await moving
        assert (await vm.wait()).reason is Reason.MIGRATED


def test_the_commands(tmp_path: Path) -> None:
    """vmm migrate --postcopy-now, ps, --recover at both sides, as a user types them."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    surroundings = environment(runtime)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*VMM, *words], env=surroundings, capture_output=True, text=True, timeout=120)

    def states() -> dict[str, str]:
        lines = run("ps").stdout.splitlines()[1:]
        return {line.split()[0]: line for line in lines}

    def wait_for(what: Callable[[], bool]) -> None:
        for _ in range(300):  # a command each: as long as it takes on a busy host
            if what():
                return
        raise AssertionError(states())

    where, other = f"unix:{tmp_path / 'm'}", f"unix:{tmp_path / 'n'}"
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    processes: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*VMM, *words], env=surroundings, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        processes.append(process)
        return process

    try:
        start("run", "linux", "--name", "box", "--console", "none", "--net", "none", "--memory", "128M")
        wait_for(lambda: "box" in states() and run("exec", "box", "true").returncode == 0)
        fill = "mkdir /r; mount -t tmpfs none /r; head -c 30000000 /dev/urandom >/r/d; md5sum /r/d >/r/s"
        assert run("exec", "box", "sh", "-c", fill).returncode == 0
        target = start("receive", where, "--name", "box2", "--console", "none")
        assert target.stderr is not None and "waiting at" in target.stderr.readline()
        with SlowLink(tmp_path / "p", tmp_path / "m") as link:
            moving = start("migrate", "box", f"unix:{link.path}", "--postcopy-now", "--bandwidth", "1M")
            wait_for(lambda: "post-copy" in states().get("box2", ""))
            assert "running" in states()["box2"] and "paused" in states()["box"]
            done = run("migrate", "box", "--cancel")
            assert done.returncode == 2 and "handed over already" in done.stderr
            link.cut()
            assert moving.wait(60) == 4 and moving.stderr is not None and "--recover box URI" in moving.stderr.read()
        wait_for(lambda: "paused, post-copy broken" in states()["box2"])
        assert "paused, post-copy broken" in states()["box"]
        done = run("resume", "box2")
        assert done.returncode == 2 and "vmm receive --recover box2 URI here" in done.stderr
        done = run("receive", other, "--recover", "box2")
        assert done.returncode == 0 and f"waiting at {other}" in done.stderr
        moving = start("migrate", "--recover", "box", other)
        wait_for(lambda: "running, post-copy" in states()["box2"])
        assert run("migrate", "box", "--bandwidth", "1000M").returncode == 0
        assert moving.wait(60) == 0
        wait_for(lambda: "box" not in states() and "post-copy" not in states()["box2"])
        assert "OK" in run("exec", "box2", "md5sum", "-c", "/r/s").stdout
        done = run("receive", other, "--recover", "box2")
        assert done.returncode == 2 and "waits for no memory" in done.stderr
        assert json.loads(run("ps", "--json").stdout)[0]["fetching"] is None
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
