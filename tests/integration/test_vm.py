"""VirtualMachine on the scripted core: life, failure isolation, cancellation, console, several machines in a loop."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

import vmm
from cpu import select
from cpu.contract import Space, VmConfig
from cpu.exits import FailEntry, Halt, InternalError, MmioRead, PortIn, PortOut, Shutdown, SystemEvent
from cpu.scripted import ScriptedVm, Step
from tests.support.scripted import Script, config, until
from virtio.device import Device
from vmm import (
    ConfigError,
    ConsoleClosed,
    ConsoleTimeout,
    Ended,
    HostError,
    Rebooted,
    State,
    StateChanged,
    StateError,
    VirtualMachine,
    Warned,
)
from vmm.errors import GuestError
from vmm.lifecycle import Change, Outcome, Reason
from vmm.machine.builder import Machine

COM1 = 0x3F8
EXIT = PortOut(0xF4, 1, 7)


def text(data: bytes) -> list[Step]:
    return [PortOut(COM1, 1, character) for character in data]


def machine(folder: Path, *scripts: list[Step], **options: Any) -> VirtualMachine:
    return VirtualMachine(config(folder, cpus=max(len(scripts), 1), **options), system=Script(*scripts))


async def outcome_of(folder: Path, *scripts: list[Step], **options: Any) -> Outcome:
    async with machine(folder, *scripts, **options) as vm:
        return await vm.run()


@pytest.fixture
def no_passt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A passt that cannot start, as in a chroot."""
    program = tmp_path / "path" / "passt"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho some news >&2\necho 'no user namespaces' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


async def test_a_network_that_cannot_be_had_ends_the_machine(tmp_path: Path, no_passt: None) -> None:
    before = descriptors()
    with pytest.raises(HostError, match="passt does not start here: no user namespaces"):
        await outcome_of(tmp_path, [EXIT], nets=("user",))
    assert descriptors() == before


async def test_a_network_that_is_optional_is_warned_of(tmp_path: Path, no_passt: None) -> None:
    vm = machine(tmp_path, [EXIT], nets=("user,optional",))
    events = vm.events()
    async with vm:
        assert (await vm.run()).status == 15
    warnings = [event.text async for event in events if isinstance(event, Warned)]
    assert warnings == ["net user: passt does not start here: no user namespaces; the machine runs without net0"]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("steps", "reason", "status", "detail"),
    [
        ([EXIT], Reason.EXIT, 15, "the guest wrote 0x7 to the exit port"),
        ([Shutdown()], Reason.TRIPLE_FAULT, 3, "vCPU 0 at rip 0x"),
        ([Halt()], Reason.HALTED, 0, "interrupts off"),
        ([SystemEvent(1)], Reason.SHUTDOWN, 0, "shutdown"),
        ([SystemEvent(2)], Reason.RESET, 0, "reset"),
        ([SystemEvent(3)], Reason.CRASH, 3, "crash"),
        ([FailEntry(0x80000021, 0)], Reason.HOST_ERROR, 4, "entry to guest mode failed, 0x80000021"),
        ([InternalError(1, 0x1234, b"\x0f\x0b")], Reason.HOST_ERROR, 4, "cannot execute the instruction at 0x1234"),
        ([InternalError(3, 0x99)], Reason.HOST_ERROR, 4, "internal error 3 of the core at 0x99"),
    ],
)
async def test_every_end_is_a_typed_outcome(
    tmp_path: Path, steps: list[Step], reason: Reason, status: int, detail: str
) -> None:
    outcome = await outcome_of(tmp_path, steps)
    assert (outcome.reason, outcome.status) == (reason, status)
    assert detail in outcome.detail


async def test_unclaimed_accesses_read_ones(tmp_path: Path) -> None:
    system = Script([PortIn(0x9999, 2), MmioRead(0xD000_0000, 4), EXIT])
    async with VirtualMachine(config(tmp_path), system=system) as vm:
        await vm.run()
        assert vm.stats()["unclaimed"] == 2


async def test_pause_parks_and_resume_goes_on(tmp_path: Path) -> None:
    async with machine(tmp_path, text(b"x" * 5000)) as vm:
        vm.resume()
        await vm.pause()
        assert vm.state is State.PAUSED
        assert vm._machine is not None and vm._machine.dispatcher.parked
        vm._machine.vcpus[0].registers()
        with pytest.raises(StateError, match="cannot pause a machine that is paused; possible: resume, end"):
            await vm.pause()
        vm.resume()
        await vm.console.expect("x{5000}")
        await vm.pause()
        await asyncio.gather(vm.stop(timeout=0.05))
        assert vm.outcome is not None and vm.outcome.reason is Reason.KILLED


class Stalling:
    """A port whose writes keep the vCPU that makes them."""

    def __init__(self, vm: VirtualMachine) -> None:
        assert vm._machine is not None
        self.board = vm._machine.board
        self.stalls: list[Callable[[], None]] = []
        self.board.map(Space.PORT, 0x5000, 1, self, "stalling")

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.stalls += [self.board.stall() for _ in range(value)]


async def test_a_device_keeps_the_vcpu_that_wrote_and_no_other(tmp_path: Path) -> None:
    vm = machine(tmp_path, [*text(b"a"), PortOut(0x5000, 1, 2), *text(b"b")], [PortIn(0x5001, 1), *text(b"1")], [])
    async with vm, machine(tmp_path, text(b"other")) as other:
        port = Stalling(vm)
        with pytest.raises(StateError, match="no vCPU makes an access"):
            port.board.stall()
        vm.resume()
        await vm.console.expect("a.*1|1.*a")
        await until(lambda: port.stalls)
        other.resume()
        await other.console.expect("other")
        for _ in range(3):
            await vm.pause()
            vm._machine.vcpus[0].state()  # type: ignore[union-attr]
            vm.resume()
        for go_on in port.stalls:
            assert vm._machine.vcpus[0].parked and "b" not in vm.console.text  # type: ignore[union-attr]
            go_on()
        await vm.console.expect("b")
        port.stalls[0]()
        await vm.pause()


async def test_a_vcpu_whose_stall_ends_while_paused_stays_parked(tmp_path: Path) -> None:
    async with machine(tmp_path, [PortOut(0x5000, 1, 1), *text(b"b")]) as vm:
        port = Stalling(vm)
        vm.resume()
        await until(lambda: port.stalls)
        await vm.pause()
        port.stalls[0]()
        vm._machine.vcpus[0].state()  # type: ignore[union-attr]
        assert "b" not in vm.console.text
        vm.resume()
        await vm.console.expect("b")


async def test_a_stall_that_is_over_at_once_and_one_that_never_ends(tmp_path: Path) -> None:
    class Short(Stalling):
        def write(self, offset: int, size: int, value: int) -> None:
            self.board.stall()()

    async with machine(tmp_path, [*[PortOut(0x5000, 1, 1)] * 50, *text(b"b")]) as vm:
        Short(vm)
        vm.resume()
        await vm.console.expect("b")
    async with machine(tmp_path, [PortOut(0x5000, 1, 1)]) as vm:
        port = Stalling(vm)
        vm.resume()
        await until(lambda: port.stalls)
    port.stalls[0]()
    assert vm.outcome is not None and vm.outcome.reason is Reason.KILLED


async def test_entering_twice_and_resuming_after_the_end(tmp_path: Path) -> None:
    vm = machine(tmp_path, [EXIT])
    with pytest.raises(StateError, match="the machine is not built"):
        await vm.wait()
    async with vm:
        await vm.run()
        with pytest.raises(StateError, match="cannot resume a machine that is stopped"):
            vm.resume()
        assert (await vm.run()).reason is Reason.EXIT
    with pytest.raises(StateError, match="entered once"):
        async with vm:
            pass


async def test_console_text_and_expect(tmp_path: Path) -> None:
    async with machine(tmp_path, text(b"login: welcome\n")) as vm:
        vm.resume()
        match = await vm.console.expect(r"lo(\w+): ")
        assert match[1] == b"gin"
        assert await vm.console.read(7) == b"welcome"
        with pytest.raises(ConsoleTimeout, match=r"'never' did not come within 0.05 s; the console showed nothing"):
            await vm.console.expect("never", timeout=0.05)
        assert "welcome" in vm.console.text
        vm.kill()
        with pytest.raises(ConsoleClosed, match="the console ended without 'never'"):
            await vm.console.expect("never")
        assert b"".join([data async for data in vm.console]) == b"\n"


async def test_ten_megabytes_of_output_without_loss(tmp_path: Path) -> None:
    """A lossless reader gets every byte in order, however slow it is; memory stays bounded."""
    block = bytes(range(32, 127)) * 11
    steps = text(block)
    total = 10_000_000 // len(block)
    system = Script()
    async with VirtualMachine(config(tmp_path), system=system) as vm:
        reader = vm.console.reader(lossless=True)
        hub = vm._hub
        received = 0

        async def produce() -> None:
            # The device's side at full speed, as the posted ring delivers it.
            for _ in range(total):
                hub.write(block)
                while hub._pressed:
                    await asyncio.sleep(0)

        producer = asyncio.create_task(produce(), name="producer")
        while received < total * len(block):
            data = await reader.read()
            expected = (block + block)[received % len(block) :]
            for at in range(0, len(data), len(block)):
                piece = data[at : at + len(block)]
                assert expected.startswith(piece)
            received += len(data)
            assert len(hub._ring) <= 4 << 20
        await producer
        assert reader.skipped == 0
        assert len(steps) == len(block)


async def test_a_slow_lossless_reader_holds_the_guest(tmp_path: Path) -> None:
    async with machine(tmp_path, text(b"z" * 330_000)) as vm:
        reader = vm.console.reader(lossless=True)
        vm.resume()
        await until(lambda: vm._hub._pressed)
        assert vm._machine is not None
        await vm._machine.dispatcher.wait_parked()
        held_at = vm._hub.total
        assert held_at < 330_000
        await asyncio.sleep(0)
        assert vm._hub.total == held_at
        received = 0
        while received < 330_000:
            received += len(await reader.read())
        assert reader.skipped == 0


async def test_input_reaches_the_guest_and_waits_for_it(tmp_path: Path) -> None:
    async with machine(tmp_path, []) as vm:
        hub = vm._hub
        writing = asyncio.create_task(vm.console.write(b"p" * 200_000), name="paste")
        await until(lambda: len(hub._input) >= 64 << 10)
        assert not writing.done()
        received = 0
        uart: Any = vm._machine.components["com1"]  # type: ignore[union-attr]
        while received < 200_000:
            while uart.read(5, 1) & 1:
                assert uart.read(0, 1) == ord("p")
                received += 1
            await asyncio.sleep(0)
        await writing


async def test_events_tell_the_story(tmp_path: Path) -> None:
    async with machine(tmp_path, [EXIT]) as vm:
        events = vm.events()
        outcome = await vm.run()
        assert [event async for event in events] == [
            StateChanged(State.RUNNING),
            StateChanged(State.STOPPED),
            Ended(outcome),
        ]
        assert [event async for event in vm.events()] == [Ended(outcome)]


async def test_timeout(tmp_path: Path) -> None:
    outcome = await outcome_of(tmp_path, [], timeout=0.05)
    assert (outcome.reason, outcome.status) == (Reason.TIMEOUT, 124)
    assert outcome.detail == "still running after 0.05 s"


async def test_reboot_in_place(tmp_path: Path) -> None:
    """With `reboot` a reset starts the machine again: new core, fresh memory, same console."""
    script = [*text(b"boot\n"), SystemEvent(2)]
    system = Script(script)
    async with VirtualMachine(config(tmp_path, reboot=True), system=system) as vm:
        events = vm.events()
        vm.resume()
        for _ in range(3):
            await vm.console.expect("boot\n")
        system.scripts = ([EXIT],)
        outcome = await vm.wait()
        assert outcome.reason is Reason.EXIT
        assert sum(isinstance(event, Rebooted) for event in [event async for event in events]) >= 3
    assert len(system.vms) >= 4
    assert all(core.closed for core in system.vms)


async def test_kill_wins_over_a_reboot_loop(tmp_path: Path) -> None:
    async with machine(tmp_path, [SystemEvent(2)], reboot=True) as vm:
        events = vm.events()
        vm.resume()
        async for event in events:
            if isinstance(event, Rebooted):
                break
        vm.kill()
        assert (await vm.wait()).reason is Reason.KILLED


class _EndedWhileClosing(Script):
    """The machine is killed while the core of its first incarnation closes."""

    def __init__(self, kill: Callable[[], None]) -> None:
        super().__init__([SystemEvent(2)])
        loop = asyncio.get_running_loop()

        def close(close: Callable[[], None]) -> None:
            done = threading.Event()
            loop.call_soon_threadsafe(lambda: (kill(), done.set()))
            assert done.wait(10)
            close()

        self.closing = close

    def create_vm(self, config: VmConfig) -> ScriptedVm:
        vm = super().create_vm(config)
        if len(self.vms) == 1:
            vm.close = partial(self.closing, vm.close)  # type: ignore[method-assign]
        return vm


async def test_a_kill_while_the_machine_restarts_is_not_forgotten(tmp_path: Path) -> None:
    system = _EndedWhileClosing(lambda: vm.kill())
    async with VirtualMachine(config(tmp_path, reboot=True), system=system) as vm:
        assert (await vm.run()).reason is Reason.KILLED
    assert len(system.vms) == 1 and system.vms[0].closed


class Gate:
    """A component of the machine whose closing takes until it is opened: the first half of a restart."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    async def aclose(self) -> None:
        self.reached.set()
        await self.opened.wait()


@asynccontextmanager
async def restarting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> AsyncIterator[tuple[VirtualMachine, Script, asyncio.Event]]:
    """A machine in the first ("closing") or second ("building") half of a restart, its core, and what lets it go on.
    The guest would end with EXIT after the restart."""
    system = Script([SystemEvent(2)])
    async with VirtualMachine(config(folder, reboot=True), system=system) as vm:
        assert vm._machine is not None
        gate = Gate()
        if half == "closing":
            vm._machine.components["gate"] = gate
        else:
            build = Machine.build

            async def gated(present: Machine) -> None:
                await gate.aclose()
                await build(present)

            monkeypatch.setattr(Machine, "build", gated)
        vm.resume()
        await gate.reached.wait()
        system.scripts = ([EXIT],)
        yield vm, system, gate.opened
        gate.opened.set()


HALVES = pytest.mark.parametrize("half", ["closing", "building"])


@HALVES
async def test_a_kill_during_a_restart_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    async with restarting(tmp_path, monkeypatch, half) as (vm, _, go_on):
        vm.kill()
        go_on.set()
        async with asyncio.timeout(10):
            assert (await vm.wait()).reason is Reason.KILLED


@HALVES
async def test_a_machine_that_is_paused_during_a_restart_starts_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    async with restarting(tmp_path, monkeypatch, half) as (vm, _, go_on):
        events = vm.events()
        await vm.pause()
        go_on.set()
        async for event in events:
            if isinstance(event, Rebooted):
                break
        assert vm.state is State.PAUSED
        assert vm._machine is not None and vm._machine.dispatcher.held
        assert vm.outcome is None
        assert (await vm.run()).reason is Reason.EXIT


@HALVES
async def test_pausing_and_resuming_during_a_restart_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    async with restarting(tmp_path, monkeypatch, half) as (vm, _, go_on):
        await vm.pause()
        vm.resume()
        go_on.set()
        assert (await vm.wait()).reason is Reason.EXIT


@HALVES
async def test_a_machine_that_is_stopped_during_a_restart_does_not_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    async with restarting(tmp_path, monkeypatch, half) as (vm, system, go_on):
        stopping = asyncio.create_task(vm.stop(), name="stop")
        await until(lambda: vm.state is State.STOPPING)
        go_on.set()
        async with asyncio.timeout(10):  # its own is 30 s
            outcome = await stopping
        assert (outcome.reason, outcome.status) == (Reason.RESET, 0)
        assert all(core.closed for core in system.vms)


async def test_a_guest_that_resets_when_asked_to_stop_is_not_started_again(tmp_path: Path) -> None:
    # As ask_to_stop() does with a power button, which this machine has not.
    async with machine(tmp_path, [], [SystemEvent(2)], reboot=True) as vm:
        vm._change(Change.RESUME)
        vm._change(Change.ASK)
        assert vm._machine is not None
        vm._machine.dispatcher.release("pause")
        assert (await vm.wait()).reason is Reason.RESET


async def test_a_host_without_room_for_threads_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostError, match="cannot make a machine: can't start new thread"):
            await outcome_of(tmp_path, [EXIT])
    assert descriptors() == before
    async with machine(tmp_path, []) as vm:  # and one that exists can be closed
        vm.resume()
        monkeypatch.setattr(threading.Thread, "start", refuse)
    assert descriptors() == before


async def test_reset_without_reboot_ends(tmp_path: Path) -> None:
    assert (await outcome_of(tmp_path, [SystemEvent(2)])).status == 0


@pytest.mark.parametrize("error", [RuntimeError("boom"), GuestError("bad ring"), OSError(28, "No space left")])
async def test_a_device_that_raises_ends_its_machine_alone(tmp_path: Path, error: Exception) -> None:
    class Broken:
        def read(self, offset: int, size: int) -> int:
            raise error

        def write(self, offset: int, size: int, value: int) -> None: ...

    other_folder = tmp_path / "other"
    other_folder.mkdir()
    async with machine(tmp_path, [PortIn(0x5000, 1)]) as vm, machine(other_folder, []) as other:
        other.resume()
        assert vm._machine is not None
        vm._machine.board.map(Space.PORT, 0x5000, 1, Broken(), "broken")
        outcome = await vm.run()
        expected = Reason.GUEST_ERROR if isinstance(error, GuestError) else Reason.HOST_ERROR
        assert outcome.reason is expected
        assert str(error) in outcome.detail
        assert other.state is State.RUNNING


async def test_a_device_may_interrupt_while_it_closes(tmp_path: Path) -> None:
    """As one does whose last request is done when the machine has already ended."""
    closed = []

    class Late:
        async def aclose(self) -> None:
            built.board.signal_msi(0xFEE00000, 0x31)
            line.set(True)
            closed.append(True)

    async with machine(tmp_path, []) as vm:
        built = vm._machine
        assert built is not None
        line = built.board.irq_line(5)
        built.components["late"] = Late()
    assert closed


async def test_several_vcpus_halt_one_by_one(tmp_path: Path) -> None:
    async with machine(tmp_path, [Halt()], [Halt()], []) as vm:
        vm.resume()
        assert vm._machine is not None
        dispatcher = vm._machine.dispatcher
        await until(lambda: len(dispatcher.halted) == 2)
        assert vm.state is State.RUNNING
        await vm.pause()
        vm.resume()
    assert vm.outcome is not None and vm.outcome.reason is Reason.KILLED


async def test_posted_writes_come_before_the_exit_that_follows(tmp_path: Path) -> None:
    async with machine(tmp_path, [*text(b"all of it"), EXIT]) as vm:
        await vm.run()
        assert vm.console.text == "all of it"


async def test_debug_port(tmp_path: Path) -> None:
    async with machine(tmp_path, [PortIn(0xE9, 1), *[PortOut(0xE9, 1, c) for c in b"dbg"], EXIT]) as vm:
        heard: list[bytes] = []
        vm.on_debug = heard.append
        await vm.run()
        assert vm.debug_output == b"dbg" == b"".join(heard)
        assert vm.console.text == ""


async def test_build_failures_leave_nothing(tmp_path: Path) -> None:
    gc.collect()
    before, threads = descriptors(), threading.active_count()
    bad = config(tmp_path, console={"kind": "none", "log": str(tmp_path / "absent" / "log")})
    with pytest.raises(HostError, match="console log: .*: no such file"):
        async with VirtualMachine(bad, system=Script()):
            pass
    with pytest.raises(ConfigError, match="nothing to boot"):
        async with VirtualMachine(memory="2M", system=Script()):
            pass
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(ConfigError, match="console socket: .*: exists and is no socket; choose another path"):
        async with machine(tmp_path, console=f"socket={taken}"):
            pass
    with pytest.raises(ConfigError, match="bytes are too long for a socket, which takes 107; use a shorter"):
        async with machine(tmp_path, console=f"socket={tmp_path / ('s' * 120)}"):
            pass
    assert descriptors() == before
    assert threading.active_count() == threads


async def test_a_build_that_fails_says_why_though_closing_fails_too(tmp_path: Path) -> None:
    class Stubborn(Device):
        device_id = 4
        queue_sizes = (8,)

        async def aclose(self) -> None:
            raise OSError("cannot be closed")

    def absent() -> Device:
        raise ConfigError("second: no such thing")

    with pytest.raises(ConfigError, match="second: no such thing"):
        async with VirtualMachine(
            config(tmp_path), system=Script(), devices={"first": Stubborn, "second": absent}
        ):
            pass


async def test_console_log_rotates(tmp_path: Path) -> None:
    log = tmp_path / "log"
    console = {"kind": "none", "log": str(log), "log_limit": 4096}
    async with machine(tmp_path, text(b"a" * 3000 + b"b" * 3000 + b"c" * 1000) + [EXIT], console=console) as vm:
        await vm.run()
    assert (tmp_path / "log.1").read_bytes() + log.read_bytes() == b"a" * 3000 + b"b" * 3000 + b"c" * 1000
    assert (tmp_path / "log.1").stat().st_size == 4096


async def test_events_that_nobody_follows_any_more_are_not_kept(tmp_path: Path) -> None:
    async with machine(tmp_path, [EXIT]) as vm:
        followed = vm.events()
        forgotten = weakref.ref(vm.events())
        gc.collect()
        assert forgotten() is None
        await vm.run()
    assert [type(event) for event in [event async for event in followed]] == [StateChanged, StateChanged, Ended]


async def test_who_was_kept_long_is_told_that_it_stood_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = Script([], [])
    async with VirtualMachine(config(tmp_path, cpus=2), system=system) as vm:
        vm.resume()  # fresh vCPUs have missed nothing
        await vm.pause()
        vm.resume()  # nor in a moment
        vcpus = system.vms[0].made
        assert [vcpu.standstills for vcpu in vcpus] == [0, 0]
        monkeypatch.setattr("vmm.machine.dispatch.STANDSTILL", 0.0)
        await vm.pause()
        vm.resume()
        assert [vcpu.standstills for vcpu in vcpus] == [1, 1]


async def cancelled_at(step: int, work: Callable[[], Coroutine[Any, Any, Any]]) -> bool:
    """Cancel `work` after `step` turns of the loop; False if it was done before."""
    task = asyncio.ensure_future(work())
    for _ in range(step):
        await asyncio.sleep(0)
    done = task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return not done


async def test_cancellation_at_any_point_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with machine(tmp_path, text(b"hello") + [EXIT], name=f"cancel-{os.getpid()}") as vm:
            vm.resume()
            await vm.pause()
            await vm.run()

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    await work()
    gc.collect()
    before, threads = descriptors(), threading.active_count()
    step = 0
    while await cancelled_at(step, work):
        step += 1
        assert not list((tmp_path / "loopvisor").iterdir())
    assert step > 5
    gc.collect()
    assert descriptors() == before
    assert threading.active_count() == threads


async def test_cancelled_run_ends_the_machine(tmp_path: Path) -> None:
    async with machine(tmp_path, []) as vm:
        running = asyncio.create_task(vm.run(), name="run")
        await until(lambda: vm.state is State.RUNNING)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert (await vm.wait()).reason is Reason.KILLED


def test_the_same_on_asyncio_and_uvloop(tmp_path: Path) -> None:
    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            outcome = runner.run(outcome_of(tmp_path, text(b"x" * 100) + [EXIT]))
            assert outcome.code == 7


@asynccontextmanager
async def many(folder: Path, count: int) -> AsyncIterator[list[VirtualMachine]]:
    machines = [machine(folder, text(b"%d" % index) + [EXIT]) for index in range(count)]
    async with asyncio.TaskGroup() as group:
        for vm in machines:
            group.create_task(vm.__aenter__())
    try:
        yield machines
    finally:
        for vm in machines:
            await vm.aclose()


async def test_fifty_machines_in_one_loop(tmp_path: Path) -> None:
    gc.collect()
    before, threads = descriptors(), threading.active_count()
    async with many(tmp_path, 50) as machines:
        outcomes = await asyncio.gather(*(vm.run() for vm in machines))
        assert all(outcome.code == 7 for outcome in outcomes)
        assert [vm.console.text for vm in machines] == [str(index) for index in range(50)]
    gc.collect()
    assert descriptors() == before
    assert threading.active_count() == threads


@pytest.mark.parametrize("core", ["soft", pytest.param("kvm", marks=pytest.mark.kvm)])
async def test_memory_of_the_reserved_pool(core: str) -> None:
    found = select.probe(core)
    if not found.available:
        pytest.skip(f"{core}: {found.reason}")
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not pool.exists() or int(pool.read_text()) < 8:
        pytest.skip("the host has no 8 large pages free (sysctl vm.nr_hugepages=16)")
    async with vmm.run("hello", core=core, memory="16M", hugepages=True) as vm:
        await vm.console.expect("Hello", timeout=60)
        assert (await vm.wait()).reason is Reason.RESET
