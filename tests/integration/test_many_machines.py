"""Real cores: many machines at once and in a row leave nothing behind; spinning guests do not starve the loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

from cpu.select import probe
from tests.bench import bench_many
from vmm import VirtualMachine, run
from vmm.lifecycle import Reason

GUESTS = Path(__file__).resolve().parents[2] / "images/guests"
CORES = [
    pytest.param("kvm", marks=[pytest.mark.kvm, pytest.mark.skipif(not probe("kvm").available, reason="no KVM")]),
    pytest.param("soft", marks=pytest.mark.skipif(not probe("soft").available, reason="no software core")),
]


def machine(core: str, guest: str, **options: Any) -> VirtualMachine:
    return VirtualMachine(core=core, kernel=GUESTS / f"{guest}.bin", memory="16M", **options)


async def hello(core: str) -> None:
    async with machine(core, "hello") as vm:
        outcome = await vm.run()
        assert outcome.reason is Reason.RESET
        assert vm.console.text == "Hello from guest mode!\n"


def tasks() -> int:
    """Threads that the kernel knows. One that Python has seen end may be there for a moment more."""
    deadline = time.monotonic() + 10
    while (count := len(os.listdir("/proc/self/task"))) > threading.active_count() and time.monotonic() < deadline:
        time.sleep(0.001)
    return count


def usage() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * 4096
    with open("/proc/self/maps", encoding="ascii") as file:
        mappings = sum(1 for _ in file)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": tasks(),
        "mappings": mappings,
        "resident": resident,
    }


@pytest.mark.parametrize("core", CORES)
def test_two_hundred_in_a_row(core: str) -> None:
    """No thread, descriptor or mapping more than after the first twenty; less than 8 MiB of memory."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for _ in range(20):
            runner.run(hello(core))
        before = usage()
        for _ in range(180):
            runner.run(hello(core))
        after = usage()
    for what in ("descriptors", "threads", "tasks"):
        assert after[what] == before[what], what
    assert after["mappings"] <= before["mappings"] + 8
    assert after["resident"] <= before["resident"] + (8 << 20)


@pytest.mark.parametrize("core", CORES)
def test_fifty_at_the_same_time(core: str) -> None:
    async def all_at_once() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(hello(core))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(all_at_once())
        before = usage()
        runner.run(all_at_once())
        after = usage()
    for what in ("descriptors", "threads", "tasks"):
        assert after[what] == before[what], what
    assert after["mappings"] <= before["mappings"] + 50


@pytest.mark.parametrize("core", CORES)
async def test_pause_and_kill_spinning_guests(core: str) -> None:
    """kick reaches a guest that never exits by itself."""
    async with machine(core, "spin") as first, machine(core, "spin") as second:
        for vm in (first, second):
            vm.resume()
        for vm in (first, second):
            await vm.pause()
            vm.resume()
        first.kill()
        assert (await first.wait()).reason is Reason.KILLED


@pytest.mark.parametrize("core", CORES)
async def test_cancelled_anywhere_on_a_real_core(core: str) -> None:
    async def work() -> None:
        async with machine(core, "hello") as vm:
            await vm.run()

    await work()
    before = usage()
    for turns in range(0, 40, 3):
        task = asyncio.ensure_future(work())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    after = usage()
    for what in ("descriptors", "threads", "tasks"):
        assert after[what] == before[what], what


@pytest.mark.parametrize("core", CORES)
async def test_echo_by_interrupts(core: str) -> None:
    """A real guest with an interrupt-driven receiver gets every character of a paste."""
    text = bytes(32 + index % 90 for index in range(3000))
    async with machine(core, "echo", timeout=60) as vm:
        vm.resume()
        await vm.console.expect("Ctrl-D ends\n")
        await vm.console.write(text)
        received = b""
        while len(received) < len(text):
            received += await vm.console.read()
        assert received == text
        await vm.console.write("\x04")
        assert (await vm.wait()).reason is Reason.RESET


@pytest.mark.parametrize("core", CORES)
async def test_reboot_in_place_on_a_real_core(core: str) -> None:
    async with machine(core, "hello", reboot=True) as vm:
        vm.resume()
        for _ in range(3):
            await vm.console.expect("Hello from guest mode!\n")
        vm.kill()
        assert (await vm.wait()).reason is Reason.KILLED


@pytest.mark.debian
@pytest.mark.slow
def test_a_further_linux_guest_takes_little_beyond_its_own_memory(linux: object) -> None:
    """Of twenty machines in one process four are Linux guests or one is: each answers a command, and when they have
    nothing to do, the three more take at most 8 MiB each beyond guest memory."""
    one, four = bench_many.in_fresh_process(1, "soft", 19), bench_many.in_fresh_process(4, "soft", 16)
    assert (bench_many.beyond(four) - bench_many.beyond(one)) / 3 <= 8 << 20, (one, four)


@pytest.mark.debian
async def test_a_machine_that_sleeps_gives_back_what_is_others_share(linux: object) -> None:
    """What a Linux guest's boot was translated to is most of what it takes; beside many machines it may keep less."""
    async with contextlib.AsyncExitStack() as stack:
        vm = await stack.enter_async_context(run("linux", core="soft", nets=()))
        await vm.exec("true", timeout=120)
        alone = bench_many.resident([vm])["translations"]
        assert alone > 4 << 20
        for _ in range(24):
            await stack.enter_async_context(machine("soft", "echo"))
        async with asyncio.timeout(60):
            while bench_many.resident([vm])["translations"] > alone / 2:
                await asyncio.sleep(0.1)
        assert (await vm.exec("echo", "awake", timeout=120)).text == "awake"
