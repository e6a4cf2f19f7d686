"""A real Linux guest in a Python program, on asyncio's own loop and on uvloop: programs and their streams, files both
ways, console, many machines at once, and that a cancelled program leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

import vmm
from images import builder
from images.errors import ImageError
from tests.support.command import ROOT

pytestmark = pytest.mark.debian
BOOT = 60.0
LOOPS = [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]
Loop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(scope="module", autouse=True)
def linux_image() -> None:
    try:
        builder.build("linux")
    except ImageError as error:
        pytest.skip(f"no linux image: {error}")


def run(loop: Loop, work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work)


@pytest.mark.parametrize("loop", LOOPS)
def test_programs_and_files(loop: Loop, tmp_path: Path) -> None:
    run(loop, programs_and_files(tmp_path))


async def programs_and_files(folder: Path) -> None:
    async with vmm.run("linux", core="soft", nets=()) as vm:
        await vm.console.expect(rb"~# ", timeout=BOOT)
        await vm.console.write("echo con''sole\n")
        await vm.console.expect(rb"console\r?\n", timeout=BOOT)

        done = await vm.exec("sh", "-c", 'cat; pwd; echo "$NAME" >&2; exit 3', input=b"in\n", cwd="/tmp",
                             env={"NAME": "value"}, timeout=BOOT)  # fmt: skip
        assert (done.status, done.stdout, done.stderr) == (3, b"in\n/tmp\n", b"value\n")

        # Output comes while the program runs, which then waits for us.
        script = "echo first; read line; echo second $line; read line"
        async with await vm.start_process("sh", "-c", script) as process:
            assert await asyncio.wait_for(process.stdout.read(), BOOT) == b"first\n"
            await process.write(b"go\n")
            assert await asyncio.wait_for(process.stdout.read(), BOOT) == b"second go\n"
            await process.send_signal(15)
            assert await asyncio.wait_for(process.wait(), BOOT) == 128 + 15

        script = "stty size; read line; stty size; tty"
        async with await vm.start_process("sh", "-c", script, terminal=(30, 90)) as process:
            seen = b""
            while b"30 90" not in seen:
                seen += await asyncio.wait_for(process.stdout.read(), BOOT)
            await process.resize(11, 44)
            await process.write(b"\n")
            seen += await asyncio.wait_for(process.stdout.read_all(), BOOT)
            assert b"11 44" in seen and b"/dev/pts/" in seen

        with pytest.raises(TimeoutError):
            await vm.exec("sleep", "1000", timeout=0.3)
        task = asyncio.ensure_future(vm.exec("sh", "-c", "exec -a endless sleep 1000"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # What was given up is killed there.
        await vm.exec("sh", "-c", "while pidof sleep; do usleep 10000; done", timeout=BOOT)

        source = folder / "source"
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "large").write_bytes(os.urandom(2_000_000))
        (source / "run").write_text("#!/bin/sh\necho ran\n")
        (source / "run").chmod(0o755)
        (source / "link").symlink_to("run")
        await vm.copy_in(source, "/opt/source")
        assert (await vm.exec("/opt/source/link", check=True)).text == "ran"
        await vm.exec("sh", "-c", "echo made >/opt/source/sub/there", check=True)
        await vm.copy_out("/opt/source", folder / "back")
        assert (folder / "back/sub/large").read_bytes() == (source / "sub/large").read_bytes()
        assert (folder / "back/sub/there").read_text() == "made\n"
        assert os.readlink(folder / "back/link") == "run"
        await vm.copy_out("/etc/hostname", folder / "hostname")
        assert (folder / "hostname").read_text() == "linux\n"
        with pytest.raises(vmm.GuestError, match="No such file"):
            await vm.copy_out("/no/such", folder / "x")


async def test_a_guest_that_was_paused_takes_it_for_no_lockup() -> None:
    """Its watchdog is told that time went on without it (PVCLOCK_GUEST_STOPPED)."""
    async with vmm.run("linux", core="soft", nets=()) as vm:
        await vm.exec("sh", "-c", "echo 1 >/proc/sys/kernel/watchdog_thresh", check=True, timeout=BOOT)
        async with await vm.start_process("sh", "-c", "while :; do :; done"):
            await vm.exec("sleep", "1", timeout=BOOT)
            await vm.pause()
            await asyncio.sleep(4)  # twice what it takes for a lockup
            vm.resume()
            await vm.exec("sleep", "3", timeout=BOOT)
        log = (await vm.exec("dmesg", check=True, timeout=BOOT)).stdout
    assert b"Linux version" in log
    assert b"lockup" not in log


@pytest.mark.parametrize("loop", LOOPS)
def test_twenty_machines_at_once(loop: Loop) -> None:
    async def one(number: int) -> int:
        async with vmm.run("exit", cmdline=str(number)) as vm:
            return (await vm.wait()).status

    async def all_of_them() -> None:
        assert await asyncio.gather(*(one(number) for number in range(20))) == [2 * number + 1 for number in range(20)]

    run(loop, all_of_them())


def held() -> dict[str, int]:
    """What this process holds of the host."""
    gc.collect()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len([thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]),
        "children": len(children),
        "machines": sum("loopvisor-net" in line for line in Path("/proc/self/maps").read_text().splitlines()),
    }


MOMENTS = ("enter", "loaded", "built", "first exit", "init", "agent", "exec")


@pytest.mark.parametrize("loop", LOOPS)
def test_cancelled_at_any_moment_nothing_is_left(loop: Loop, tmp_path: Path) -> None:
    """With network (a process of its own), sockets and a program that runs."""
    run(loop, cancelled_at_any_moment(tmp_path))


async def cancelled_at_any_moment(folder: Path) -> None:
    sockets = {"vsock": folder / "v", "console": f"socket={folder}/c", "ports": [f"p={folder}/p"], "name": "cancelled"}

    async def program(reached: asyncio.Event, moment: str) -> None:
        machine = vmm.VirtualMachine(await asyncio.to_thread(described))
        mark = machine.timeline.mark

        def marked(name: str, at_ns: int | None = None) -> None:
            mark(name, at_ns)
            if name == moment:
                reached.set()

        machine.timeline.mark = marked  # type: ignore[method-assign]
        async with machine as vm:
            vm.resume()
            async with await vm.start_process("sh", "-c", "echo up; sleep 1000") as process:
                await process.stdout.read()
                marked("exec")
                await process.wait()

    def described() -> vmm.Config:
        from images import catalog
        from vmm.launch import config_for

        return config_for(catalog.resolve("linux"), core="soft", **sockets)

    os.environ["XDG_RUNTIME_DIR"], before = str(folder), os.environ.get("XDG_RUNTIME_DIR")
    try:
        for number, moment in enumerate(("enter", *MOMENTS)):
            reached = asyncio.Event()
            task = asyncio.create_task(program(reached, moment))
            await asyncio.wait({task, asyncio.create_task(reached.wait())}, timeout=BOOT, return_when="FIRST_COMPLETED")
            assert reached.is_set(), f"{moment}: {task}"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, BOOT)
            found = held()
            if number == 0:
                first = found  # what is loaded and opened once and for all
            assert found == first, moment
            assert sorted(path.name for path in folder.iterdir()) == ["loopvisor"], moment
            assert not list((folder / "loopvisor").iterdir()), moment
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


PLUGIN = """
import asyncio
import pytest
{policy}
ended = []

async def test_one_machine(vm):
    machine = await vm("linux", core="soft", nets=())
    assert (await machine.exec("uname", "-s", timeout=240)).text == "Linux"
    await machine.console.expect(rb"~# ", timeout=240)
    ended.append(machine)

async def test_two_machines_and_a_failure(vm):
    assert ended[0].outcome is not None, "the machine outlived its test"
    one, two = await asyncio.gather(vm("exit", cmdline="1"), vm("exit", cmdline="2"))
    assert ((await one.wait()).status, (await two.wait()).status) == (3, 5)
    assert type(asyncio.get_running_loop()).__module__.startswith("{module}")
"""
POLICY = """
import uvloop

@pytest.fixture(scope="session")
def event_loop_policy():
    return uvloop.EventLoopPolicy()
"""


@pytest.mark.parametrize(("policy", "module"), [("", "asyncio"), (POLICY, "uvloop")], ids=["asyncio", "uvloop"])
def test_the_pytest_plugin(policy: str, module: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent(PLUGIN).format(policy=policy, module=module))
    settings = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    (tmp_path / "pytest.ini").write_text(settings)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=BOOT * 2,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "2 passed" in done.stdout
