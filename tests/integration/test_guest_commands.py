"""Programs in a real guest: many at once, what they leave behind, bytes as they are, and errors that say what is so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.command import VMM, Background, environment, wait_for
from tests.support.command import vmm as command
from tests.support.debian import PATIENCE

pytestmark = [pytest.mark.debian, pytest.mark.usefixtures("linux")]
BOOT = 90 * PATIENCE


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


async def test_many_programs_at_once_and_after_the_end(stock_core: Any) -> None:
    """More than the guest's queue of connections and the device's table hold; then the machine is gone, and says so."""
    machine = vmm.run("linux", core=stock_core, nets=(), memory="512M", timeout=4 * BOOT)
    async with machine as vm:
        with pytest.raises(vmm.StateError, match="has no device 'x' now"):
            vm.device("x")
        results = await asyncio.gather(*(vm.exec("echo", str(n), timeout=3 * BOOT) for n in range(300)))
        assert [result.text for result in results] == [str(n) for n in range(300)]
        vm.kill()
        for call in (vm.exec("true"), vm.start_process("true"), vm.copy_in("/etc/hostname", "/x")):
            with pytest.raises(vmm.StateError, match="the machine has ended: killed"):
                await call
    with pytest.raises(vmm.StateError, match="the machine has ended: killed"):
        vm.device("disk0")
    with pytest.raises(vmm.StateError, match="the machine is not built yet"):
        await vmm.VirtualMachine(kernel="x", agent=True).exec("true")
    with pytest.raises(vmm.StateError, match="this machine has no guest agent; set agent=True"):
        await vmm.VirtualMachine(kernel="x").exec("true")


async def test_processes_of_the_agent_that_serve_again(stock_core: Any) -> None:
    """One program's user, environment, directory, terminal and failure are nothing to the next one in that process; who
    kills such a process harms only what runs there."""
    async with vmm.run("linux", core=stock_core, nets=(), timeout=4 * BOOT) as vm:
        show = ("sh", "-c", "id -u; pwd; env | grep -c MINE; ls /proc/$PPID/fd | wc -l; echo $PPID")
        servers = []
        for _ in range(5):
            assert (await vm.exec("id", "-u", user="nobody", env={"MINE": "1"}, cwd="/tmp")).text == "65534"
            assert (await vm.exec("no-such", env={"MINE": "1"})).status == 127
            async with await vm.start_process("sh", "-c", "tty; read x", terminal=(5, 5)) as process:
                await process.close_stdin()
                assert b"/dev/pts/0" in await process.stdout.read_all()  # the one before is closed
            with pytest.raises(TimeoutError):
                await vm.exec("sleep", "1000", timeout=0.05)
            for _ in range(3):
                *rest, server = (await vm.exec(*show, timeout=BOOT)).text.split()
                assert rest[:3] == ["0", "/root", "0"] and int(rest[3]) <= 12
                servers.append(server)
        assert len(set(servers)) < len(servers)
        for killed in dict.fromkeys(reversed(servers)):  # those that are there still wait, but the one that serves this
            with contextlib.suppress(vmm.GuestError):
                await vm.exec("kill", "-9", killed, timeout=BOOT)
        assert [(await vm.exec("echo", str(n), timeout=BOOT)).text for n in range(5)] == ["0", "1", "2", "3", "4"]
        agent = (await vm.exec("sh", "-c", "cut -d' ' -f4 /proc/$PPID/stat", timeout=BOOT)).text
        with contextlib.suppress(vmm.GuestError):
            await vm.exec("sh", "-c", f"kill -9 {agent} $PPID", timeout=BOOT)
        with pytest.raises(vmm.GuestError, match="the guest's agent has ended: nobody answers at its port"):
            await vm.exec("true", timeout=BOOT)


def test_a_background_child_does_not_hold_the_command(runtime: Path) -> None:
    """The machine's end is not what ends the child: the command returns long before that."""
    begin = time.monotonic()
    done = command(runtime, "run", "linux", "--", "sh", "-c", "echo hi; sleep 1000 & exit 4", timeout=2 * BOOT)
    assert (done.returncode, done.stdout) == (4, "hi\n") and time.monotonic() - begin < 900


@pytest.mark.parametrize("words", [[b"a\xffb"], ["żółć".encode(), b"\xc5"]])
def test_bytes_of_the_command_line_arrive(words: list[bytes], runtime: Path) -> None:
    """In the locale C as Python has it without UTF-8, and in this process's own."""
    for changes in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = subprocess.run([*VMM, "run", "linux", "--", "printf", "%s|%s", *words],
                              env={**environment(runtime), **changes}, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=BOOT)  # fmt: skip
        assert (done.returncode, done.stdout) == (0, b"|".join([*words, b""][:2])), done.stderr


def test_a_full_queue_of_the_control_socket_is_waited_for(runtime: Path) -> None:
    """Clients that connect and are not served yet fill it while the machine's process stands still."""
    with Background(runtime, "echo", "--name", "echo", "--console", "none") as machine:
        path = runtime / "loopvisor/echo"
        wait_for(lambda: (path / "info.json").exists() or machine.process.poll() is not None)
        os.kill(machine.process.pid, 19)
        clients = []
        try:
            with pytest.raises(BlockingIOError):
                for _ in range(5000):
                    clients.append(socket.socket(socket.AF_UNIX))
                    clients[-1].setblocking(False)
                    clients[-1].connect(str(path / "control.sock"))
            words = [*VMM, "pause", "echo"]
            pausing = subprocess.Popen(words, env=environment(runtime), stderr=subprocess.PIPE, text=True)
            with pytest.raises(subprocess.TimeoutExpired):
                pausing.wait(1)
        finally:
            os.kill(machine.process.pid, 18)
        assert pausing.communicate(timeout=30)[1] == "vmm: echo: paused\n"
        for client in clients:
            client.close()
