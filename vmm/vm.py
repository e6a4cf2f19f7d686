"""The embedding API: one machine as an async context manager.

    async with VirtualMachine(Config(kernel=…)) as vm:
        outcome = await vm.run()

Works on asyncio and uvloop, several machines in one loop, no global state. Everything is called on the loop thread.
Leaving the block, or cancelling anything, ends the machine and gives back all it had.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cpu.contract import System
from vmm.config import Config
from vmm.console.hub import REPLAY, Console, ConsoleHub, ConsoleLog, ConsoleRingState, FirstOutput
from vmm.cores import open_system
from vmm.errors import StateError, VmmError, core_errors
from vmm.events import ConsoleBreak, Ended, Event, EventStream, Rebooted, StateChanged, Warned
from vmm.lifecycle import Change, Lifecycle, Outcome, Reason, State
from vmm.machine.builder import Machine
from vmm.machine.hardware import HeadStart, Making
from vmm.machine.origin import BOOT, Arrival, Origin, Restore, Saved, Touched
from vmm.machine.resources import Resources
from vmm.timeline import Timeline

if TYPE_CHECKING:
    from virtio.device import Device
    from virtio.devices.blk import BlockDevice
    from virtio.devices.net import NetDevice
    from vmm.config import Disk, Net, Share
    from vmm.debug.debugger import Debugger
    from vmm.debug.server import GdbServer
    from vmm.devices.virtio.pool import DevicePool
    from vmm.guest.agent import Agent
    from vmm.guest.frames import Text
    from vmm.guest.process import ExecResult, GuestProcess
    from vmm.hotplug import Attachment, Hotplug
    from vmm.live import DiskJobs, MachineDisks
    from vmm.machine.peripheral import Peripheral
    from vmm.migration.fetching import Fetching
    from vmm.migration.precopy import Progress
    from vmm.migration.source import Outgoing
    from vmm.state.manifest import Manifest

TOUCHED_SECONDS = 2.0
"""Seconds after a restore, at whose end the pages that the machine has used are recorded."""
STOP_SECONDS = 30.0
"""How long a guest may take to power off before `stop` ends it."""
KILLED = Outcome(Reason.KILLED)
MAX_WARNINGS = 100


class Obstacle:
    """Why a paused machine cannot just run on, and what clears the way."""

    def __init__(self, text: str, clear: Callable[[], Awaitable[None]] | None = None) -> None:
        self.text = text
        self._clear = clear

    async def clear(self) -> None:
        """Raises StateError if nothing can clear it, and whatever the attempt raises."""
        if self._clear is None:
            raise StateError(self.text)
        await self._clear()


class VirtualMachine:
    """One machine: built paused on entering the block, run by `run` or `resume`, ended at the latest on leaving."""

    def __init__(
        self,
        config: Config | None = None,
        *,
        system: System | None = None,
        devices: Mapping[str, Callable[[], Device | Peripheral]] | None = None,
        head_start: HeadStart | None = None,
        saved: Saved | None = None,
        **options: Any,
    ) -> None:
        """A Config, or its fields as keyword arguments. `system`: an execution core to use instead of
        `config.core`; it stays the caller's. `devices`: devices of the caller's own by name, virtio ones or
        vmm.Peripheral, as functions that make them, called once: a device outlives reboots, which reset it.
        `head_start`: what was begun of this configuration's machine already; entering takes it over. `saved`: what it
        goes on from, instead of booting. Raises ConfigError."""
        if config is not None and options:
            raise TypeError("give a Config or options, not both")
        if system is not None and head_start is not None:
            raise TypeError("give a system or a head start, not both")
        self.config = config if config is not None else Config(**options)
        self._given_system = system
        self._devices = dict(devices or {})
        self._head_start = head_start
        self._making: Making | None = None
        self._system: System | None = None
        self._lifecycle = Lifecycle()
        self.timeline = Timeline()
        """When the machine did what, up to its first reboot in place: vmm.timeline.Timeline."""
        self._hub = ConsoleHub()
        self._hub.on_event = self._console_event
        self.console = Console(self._hub)
        self._debug = bytearray()
        self.on_debug: Callable[[bytes], None] | None = None
        """Called with what the guest writes to the debug port 0xe9."""
        self._resources: Resources | None = None
        self._machine: Machine | None = None
        self._saved = saved
        self._after_restore: list[asyncio.Task[None]] = []
        self._origin: Origin = BOOT if saved is None else saved.origin
        self._ending = asyncio.Event()
        self._end: Outcome | None = None
        self._outcome: Outcome | None = None
        self._settled = asyncio.Event()
        self._stopped = asyncio.Event()
        self._failure: VmmError | None = None
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._warnings = 0
        self._reset_asked = False
        self._reboot_asked = False
        self._supervisor: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closers: list[Any] = []
        self.debugger: Debugger | None = None
        """What debugs the machine now; it puts itself here. See gdb()."""
        self._copies: list[VirtualMachine] = []
        self._plugging: Hotplug | None = None
        self.obstacle: Obstacle | None = None
        """Why a paused machine cannot just run on."""
        self.migration: Outgoing | None = None
        """The migration to another host that is under way; None: there is none."""
        self.fetching: Fetching | None = None
        """Fetches the memory that is still on another host, after a migration by post-copy; None: all of it is here."""
        if saved is not None and isinstance(saved.origin, Arrival):
            self.obstacle = Obstacle("the machine has not arrived yet")
        self._disk_jobs: DiskJobs | None = None

    # Life.

    async def __aenter__(self) -> Self:
        """Build it. Raises ConfigError, HostError."""
        if self.state is not State.CREATED or self._supervisor is not None:
            raise StateError("a VirtualMachine is entered once; make another")
        self.timeline.mark("enter")
        try:
            if self._head_start is not None:
                self._system, self._making = self._head_start.system, self._head_start.take()
                for text in self._head_start.warnings:
                    self._warn(text)
            else:
                self.config.check_host()
                self._system = self._given_system or open_system(self.config, self._warn)
            if self._saved is not None and self._saved.console is not None:
                from vmm.state.payload import parse

                self._hub.restore(parse(ConsoleRingState, "console", self._saved.console))
            await self._open_console()
            await self._build()
            if (gdb := self.config.gdb) is not None:
                server = await self.gdb(gdb.address, wait=gdb.wait, architecture=gdb.arch)
                self._warn(f"gdb: target remote {server.target}{' lets the machine begin' if gdb.wait else ''}")
        except BaseException:
            self._end = self._end or KILLED
            await self._release()
            raise
        self._change(Change.BUILD)
        self._supervisor = asyncio.create_task(self._supervise(), name=f"machine {self.config.name}".rstrip())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the machine if it has not ended, and give everything back. Idempotent."""
        self._finish(KILLED)
        supervisor = self._supervisor
        if supervisor is None:
            return
        copies, self._copies = self._copies, []
        try:
            for copy in copies:
                await copy.aclose()
            await asyncio.shield(supervisor)
        except asyncio.CancelledError:
            self._close_core()
            raise

    async def run(self) -> Outcome:
        """Run to the end. Cancelled, it ends the machine. Raises HostError only for what went wrong while closing."""
        try:
            if self.state is State.PAUSED:
                self.resume()
            return await self.wait()
        except asyncio.CancelledError:
            self._finish(KILLED)
            self._close_core()
            raise

    async def wait(self) -> Outcome:
        """Until the machine has ended and everything is given back; does not start it."""
        if self._supervisor is None and self._outcome is None:
            raise StateError("the machine is not built; use it in `async with`")
        await self._stopped.wait()
        if self._failure is not None:
            raise self._failure
        assert self._outcome is not None
        return self._outcome

    async def take_up(self) -> None:
        """Clear the obstacle, if there is one, and resume(): a machine that is left over from a migration takes its
        disks first. Raises StateError, ConfigError, HostError; then it stays paused."""
        if self.obstacle is not None:
            await self.obstacle.clear()
            self.obstacle = None
        self.resume()

    def resume(self) -> None:
        """Run, or run on. Raises StateError."""
        if self.obstacle is not None:
            raise StateError(self.obstacle.text)
        self._change(Change.RESUME)
        if self._timer is None and self.config.timeout is not None:
            outcome = Outcome(Reason.TIMEOUT, f"still running after {self.config.timeout:g} s")
            self._timer = asyncio.get_running_loop().call_later(self.config.timeout, self._finish, outcome)
        self.timeline.mark("resume")
        if self._machine is not None:  # between two boots there is none; the next goes by the state
            self._machine.dispatcher.release("pause")
        if self._saved is not None and not self._after_restore:
            if self._saved.identity is not None:
                self._after_restore.append(asyncio.create_task(self._identify(), name="identify"))
            if self._saved.touched is not None:
                watching = self._watch_pages(self._saved.touched)
                self._after_restore.append(asyncio.create_task(watching, name="touched pages"))

    def halt_for(self, obstacle: Obstacle) -> None:
        """Pause because of this obstacle, without waiting until every vCPU is parked."""
        self.obstacle = obstacle
        if self.state is State.RUNNING:
            self._change(Change.PAUSE)
        if self._machine is not None:
            self._machine.dispatcher.hold("pause")

    async def pause(self) -> None:
        """Park every vCPU. Raises StateError."""
        self._change(Change.PAUSE)
        if self._machine is not None:
            dispatcher = self._machine.dispatcher
            dispatcher.hold("pause")
            await dispatcher.wait_parked()

    async def stop(self, timeout: float = STOP_SECONDS) -> Outcome:
        """Press the power button, wait for the guest to power off, end it after `timeout` seconds. A guest that resets
        instead, or just did, is not started again."""
        if self._supervisor is None:
            raise StateError("the machine is not built; use it in `async with`")
        await self.ask_to_stop(timeout)
        return await self.wait()

    async def ask_to_stop(self, timeout: float) -> Outcome:
        """`stop`, but returns as soon as it is known how the machine ended, while its sockets still close."""
        if self._outcome is not None:
            return self._outcome
        if self.state is State.PAUSED:
            self.resume()
        if self.debugger is not None and self.debugger.stopped is not None:
            self.debugger.dismiss()
        if not self.ending:
            self._change(Change.ASK)
            pm = self._machine.services.pm if self._machine is not None else None
            if self._machine is None or self._end is not None:
                self._finish(Outcome(Reason.RESET, "stopped between two boots"))
            elif pm is None:
                self._finish(Outcome(Reason.KILLED, "this machine has no power button"))
            else:
                pm.press_power_button()
        try:
            async with asyncio.timeout(timeout):
                return await self.ended()
        except TimeoutError:
            self._finish(Outcome(Reason.KILLED, f"the guest did not power off within {timeout:g} s"))
        return await self.ended()

    def press_power_button(self, *, reboot: bool = False) -> None:
        """Ask the guest to power off and go on; what it does is its own affair. With `reboot` the machine starts again
        in place once the guest has powered off. StateError if the machine has no power button, or does not run."""
        pm = self._machine.services.pm if self._machine is not None else None
        if self.state is not State.RUNNING or self._end is not None:
            state = "ending" if self._end is not None else self.state.value
            raise StateError(f"cannot press the power button of a machine that is {state}")
        if self._machine is None:
            if reboot:
                return  # It begins to boot at this moment.
            raise StateError("cannot press the power button of a machine between two boots")
        if pm is None:
            raise StateError("this machine has no power button")
        self._reboot_asked = reboot
        pm.press_power_button()

    def reset(self) -> None:
        """Start again in place, as the reset button does: nobody asks the guest. StateError if it has ended."""
        if self.obstacle is not None:
            raise StateError(self.obstacle.text)
        if self.state not in (State.RUNNING, State.PAUSED) or self._end is not None:
            raise StateError(f"cannot reset a machine that is {'ending' if self.ending else self.state.value}")
        self._reset_asked = True
        self._finish(Outcome(Reason.RESET, "the reset button"))

    async def ended(self) -> Outcome:
        """Until it is known how the machine ended; its sockets may still be closing."""
        await self._settled.wait()
        assert self._outcome is not None
        return self._outcome

    def kill(self) -> None:
        """End it now; `wait` and `run` then return."""
        self._finish(KILLED)

    def end(self, outcome: Outcome) -> None:
        """End it now, with this outcome unless it has ended already."""
        self._finish(outcome)

    async def gdb(
        self, address: str = "127.0.0.1:0", *, wait: bool = False, architecture: str = "x86-64"
    ) -> GdbServer:
        """Let GDB connect at `address`, [HOST:]PORT (0: a free one) or unix:PATH: one at a time, which stops the
        machine until it continues, detaches or goes away. `wait`: the machine stands still until then. `architecture`:
        x86-64, i386 or i8086, as GDB is to see it. Ends with aclose() of what is returned, which has `address`, or
        with the machine. Whoever can connect rules the guest. Raises ConfigError, HostError, StateError."""
        from vmm.debug.server import GdbServer

        self._live()
        server = GdbServer(self, address, wait=wait, architecture=architecture)
        await server.start()
        self.own(server)
        server.on_close = partial(self.disown, server)
        return server

    def own(self, closer: Any) -> None:
        """Have something closed with the machine, by its aclose()."""
        self._closers.append(closer)

    def disown(self, closer: Any) -> None:
        """Undo own()."""
        if closer in self._closers:
            self._closers.remove(closer)

    def device(self, name: str) -> Any:
        """A device while the machine runs: a disk's or net's id (else "disk0", "net0", …), "console", "rng", "vsock"
        (virtio.device.Device), or one of `devices`. StateError if there is none."""
        resources = self._live()
        try:
            if self._machine is None:
                raise KeyError(name)
            return resources.device(name)
        except KeyError:
            raise StateError(f"this machine has no device {name!r} now") from None

    async def resize_console(self, rows: int, columns: int) -> None:
        """Tell the guest how large the terminal is that shows its console: by a virtio console and, once it listens, by
        the agent (a serial line has no way to), as far as the machine has them. GuestError if it ends before."""
        console: Any = self.device("console") if self.config.hvc else None
        if console is not None:
            console.resize(columns, rows)
        if self.config.agent:
            await self.agent.resize_console(rows, columns)

    # Devices that come and go.

    async def attach(self, part: Disk | Net | Share, *, timeout: float = 10.0) -> Attachment:
        """Add a disk, a network card or a shared directory while the machine runs, and wait up to `timeout` seconds for
        the guest's driver: what it is called, where it stands, and whether the driver has taken it. The agent mounts a
        share that says where. Raises ConfigError, StateError, HostError; nothing is left behind then."""
        return await self._hotplug.attach(part, timeout=timeout)

    async def detach(self, name: str, *, force: bool = False, timeout: float | None = None) -> str:
        """Ask the guest to give up a disk, a card or a share, and wait until it has ("guest"). With `force` one that it
        does not give up within `timeout` seconds (5; without 30) is pulled ("force"): what it has not written is lost.
        Raises ConfigError, HostError; StateError if the guest keeps it."""
        return await self._hotplug.detach(name, force=force, timeout=timeout)

    @property
    def present(self) -> Config:
        """The configuration with what was attached and without what was detached; `config` is what was asked for."""
        return self._hotplug.present if self._plugging is not None else self.config

    def attached(self) -> list[dict[str, Any]]:
        """Its disks, network cards and shares, JSON-like."""
        if self._plugging is None and not (self.config.disks or self.config.nets or self.config.shares):
            return []
        return self._hotplug.describe()

    @property
    def _hotplug(self) -> Hotplug:
        if self._plugging is None:
            from vmm.hotplug import Hotplug

            self._plugging = Hotplug(self)
        return self._plugging

    @property
    def pool(self) -> DevicePool:
        """Its virtio devices, and how each is made. StateError if it is not built or has ended."""
        return self._live().pool

    def check_alive(self) -> None:
        """StateError if it is not built, or has ended or is about to."""
        self._live()
        if self._end is not None:
            raise StateError("the machine is ending")

    @property
    def disks(self) -> MachineDisks:
        """Its disks by id, to be changed while it runs: snapshots, commits, streams, mirrors, size."""
        from vmm.live import MachineDisks

        return MachineDisks(self)

    @property
    def disk_jobs(self) -> DiskJobs:
        """What is at work on its disks."""
        if self._disk_jobs is None:
            from vmm.live import DiskJobs

            self._disk_jobs = DiskJobs()
        return self._disk_jobs

    @property
    def change_lock(self) -> asyncio.Lock:
        """Held while a device comes or goes, while an image of a disk is exchanged, and while the state is taken."""
        return self._hotplug.lock

    def check_settled(self) -> None:
        """StateError if the machine moves to another host: its devices and their files stay what they are then."""
        if self.migration is not None:
            raise StateError("the machine is moving to another host; wait for that, or cancel it")
        if self._machine is not None:
            self._machine.memory.check_whole()

    def check_no_jobs(self) -> None:
        """StateError if a job is at work on a disk: what it changes cannot be saved."""
        for job in self._disk_jobs.active() if self._disk_jobs is not None else ():
            raise StateError(f"{job.disk}: a {job.kind} is under way; cancel it or wait for its end")

    def disk_part(self, name: str) -> Disk | None:
        """A disk of the present configuration."""
        return self._hotplug.disk_part(name)

    def disk_moved(self, name: str, **values: Any) -> None:
        """A disk has another image from now on: fields of its part of the present configuration."""
        self._hotplug.disk_moved(name, **values)

    def net_part(self, name: str) -> Net | None:
        """A network card of the present configuration."""
        return self._hotplug.net_part(name)

    def net_changed(self, name: str, part: Net) -> None:
        """A network card is this from now on: its part of the present configuration."""
        self._hotplug.net_changed(name, part)

    # Programs in the guest, for images that run the agent.

    @property
    def agent(self) -> Agent:
        """The guest's agent. StateError if this machine has none, is not built or has ended."""
        if not self.config.agent:
            raise StateError("this machine has no guest agent; set agent=True and run an image that has it")
        agent = self._live().agent
        assert agent is not None
        return agent

    def _live(self) -> Resources:
        """What the machine has, unless it has ended or is about to. Raises StateError."""
        end = self._outcome or (self._end if self.ending else None)
        if end is not None:
            raise StateError(f"the machine has ended: {end.detail or end.reason.value}")
        if self._resources is None:
            raise StateError("the machine is not built yet")
        return self._resources

    async def exec(self, *arguments: Text, **options: Any) -> ExecResult:
        """Run a program in the guest to its end: vmm.guest.agent.Agent.exec. The configuration's env, user and workdir
        are its defaults. Without arguments it is the configuration's own program."""
        return await self.agent.exec(*self._words(arguments), **self._defaults(options))

    async def start_process(self, *arguments: Text, **options: Any) -> GuestProcess:
        """Start a program in the guest: vmm.guest.agent.Agent.start_process. Defaults as in exec."""
        return await self.agent.start_process(*self._words(arguments), **self._defaults(options))

    def _words(self, arguments: tuple[Text, ...]) -> tuple[Text, ...]:
        if arguments:
            return arguments
        from vmm.guest.program import words

        return tuple(words(self.config.to_dict(), ()))

    def _defaults(self, options: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        if not (config.env or config.user or config.workdir):
            return options
        from vmm.guest.program import defaults

        return defaults(config.to_dict(), options)

    async def copy_in(self, source: Path | str, target: Text) -> None:
        """Copy a file or a directory of the host into the guest: vmm.guest.agent.Agent.copy_in."""
        await self.agent.copy_in(source, target)

    async def copy_out(self, source: Text, target: Path | str, **options: Any) -> None:
        """Copy a file or a directory of the guest to the host: vmm.guest.agent.Agent.copy_out."""
        await self.agent.copy_out(source, target, **options)

    @property
    def ending(self) -> bool:
        """It has ended or is about to."""
        return self._end is not None and not self._restarts(self._end)

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._lifecycle.state

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None before."""
        return self._outcome

    @property
    def core(self) -> str:
        """The name of the execution core, "" before the machine is built."""
        return self._system.name if self._system is not None else ""

    def events(self) -> EventStream:
        """What happens from now on, as an async iterator that ends with the machine. One that nobody holds any more
        is dropped."""
        stream = EventStream()
        if self._outcome is not None:
            stream.put(Ended(self._outcome))
        self._streams.add(stream)
        return stream

    def stats(self) -> dict[str, int]:
        """Counters of exits by class and reason, and of accesses that nothing claimed; the core's go with it when the
        machine ends. Empty before it is built."""
        return self._machine.stats() if self._machine is not None else {}

    @property
    def debug_output(self) -> bytes:
        """The last 64 KiB that the guest wrote to the debug port 0xe9."""
        return bytes(self._debug)

    # State.

    @property
    def machine(self) -> Machine:
        """What the guest sees since it last booted. StateError if there is nothing now."""
        if self._machine is None:
            raise StateError("the machine is not built, or is between two boots")
        return self._machine

    @property
    def own_devices(self) -> Mapping[str, Callable[[], Any]]:
        """The embedder's devices by name, as functions that make them."""
        return self._devices

    @property
    def restored(self) -> bool:
        """It goes on from a saved state, and did not boot."""
        return self._saved is not None

    def tell(self, text: str) -> None:
        """Warn whoever follows the machine's events."""
        self._warn(text)

    def report(self, event: Event) -> None:
        """Tell an event to whoever follows the machine's events."""
        self._tell(event)

    def virtio_devices(self) -> Mapping[str, Device]:
        """Its virtio devices by name."""
        return self._resources.devices if self._resources is not None else {}

    def block_devices(self) -> dict[str, BlockDevice]:
        """Its virtio disks by name."""
        from virtio.devices.blk import BlockDevice

        return {name: device for name, device in self.virtio_devices().items() if isinstance(device, BlockDevice)}

    def nets(self) -> dict[str, NetDevice]:
        """Its virtio network cards by name."""
        from virtio.devices.net import NetDevice

        return {name: device for name, device in self.virtio_devices().items() if isinstance(device, NetDevice)}

    async def set(self, **values: Any) -> None:
        """Change the machine while it runs: vmm.changes.change. Raises ConfigError, StateError, GuestError."""
        from vmm.changes import change

        self._live()
        await change(self, **values)

    @property
    def present_cpus(self) -> int:
        """How many processors the guest has now."""
        return len(self._resources.present_cpus) if self._resources is not None else self.config.cpus

    async def memory_statistics(self, timeout: float = 1.0) -> dict[str, int]:
        """What the guest's kernel says of its memory, if the machine has a balloon: vmm.changes.memory_statistics."""
        from vmm.changes import memory_statistics

        return await memory_statistics(self, timeout)

    def save_console(self) -> dict[str, Any]:
        """The console's ring, encoded."""
        from vmm.state.payload import encode

        return encode(self._hub.save())

    @asynccontextmanager
    async def standstill(self, why: str) -> AsyncIterator[None]:
        """The machine stands still, between two instructions and with no virtio request in flight, so that its state
        may be taken. `why` names the hold. StateError if it ends or reboots meanwhile."""
        async with self._hotplug.lock:
            machine = self.machine
            machine.dispatcher.hold(why)
            try:
                await machine.dispatcher.wait_parked()
                await machine.quiesce()
                self.check_standing(machine)
                if self.debugger is not None:
                    self.debugger.lift()
                yield
            finally:
                if self.debugger is not None:
                    self.debugger.put_back()
                machine.resume_devices()
                machine.dispatcher.release(why)

    def check_standing(self, machine: Machine) -> None:
        """StateError if the machine has rebooted since, or has ended."""
        if self._machine is not machine or machine.dispatcher.ended or self._end is not None:
            raise StateError("the machine ended, or rebooted, meanwhile")

    async def snapshot(self, directory: Path | str, **options: Any) -> Manifest:
        """Save the running machine into a directory: vmm.state.taking.take."""
        from vmm.state.taking import take

        return await take(self, Path(directory), **options)

    async def fork(
        self, count: int = 1, *, names: Sequence[str] = (), seeds: Sequence[int] = (), paused: bool = False
    ) -> list[VirtualMachine]:
        """`count` running copies, which share memory with this machine until one of them writes, each with an identity
        of its own: random numbers, MAC addresses, vsock context id, host name, machine id. This machine runs on. Disks
        must be snapshots or read-only. `names`: for vmm ps, and their host names; `seeds`: chance of the copies, where
        it is a function of a seed; `paused`: they wait for resume(). A copy ends by aclose(), or with this machine.

        Raises ConfigError, StateError, HostError, and leaves no copy behind then."""
        from vmm.state.fork import fork

        copies = await fork(self, count, names=names, seeds=seeds, paused=paused)
        self._copies.extend(copies)
        return copies

    async def migrate(self, uri: str, **options: Any) -> Progress:
        """Move the running machine to where `vmm receive` waits: vmm.migration.source.migrate."""
        from vmm.migration.source import migrate

        return await migrate(self, uri, **options)

    def arrive(self, console: Any) -> None:
        """The state of a machine that was on its way is there: its console's ring. Raises StateError."""
        from vmm.state.payload import parse

        self._hub.restore(parse(ConsoleRingState, "console", console))

    async def _identify(self) -> None:
        """Tell the guest of a copy who it is; whoever asks its agent waits for that."""
        agent = self._resources.agent if self._resources is not None else None
        if agent is not None:
            try:
                await agent.identify()
            except VmmError as error:
                self._warn(f"the guest has not heard that it is a copy: {error}")

    async def _watch_pages(self, touched: Touched) -> None:
        """Map the pages that such machines use first. If they are not known yet, find them out and record them."""
        memory = self.machine.memory
        with suppress(VmmError, ValueError):  # it ended meanwhile, and its memory with it
            if touched.pages is not None:
                await asyncio.to_thread(memory.populate_pages, touched.pages)
            else:
                await asyncio.sleep(TOUCHED_SECONDS)
                pages = b"".join(bitmap for _, bitmap in memory.present_pages())
                await asyncio.to_thread(touched.record, pages)

    @property
    def source(self) -> str:
        """The snapshot or machine that it goes on from; "" if it booted."""
        return self._saved.source if self._saved is not None else ""

    # Inside.

    async def _build(self) -> None:
        assert self._system is not None
        self._hub.disconnect()
        timeline = self.timeline
        if self._resources is None:
            self._resources = Resources(
                self.config,
                self._system,
                devices=self._devices,
                warn=self._warn,
                mark=timeline.mark,
                saved_disks=None if self._saved is None else self._saved.disks,
            )
        origin, self._origin = self._origin, BOOT
        machine = Machine(
            self._resources,
            self._hub.port,
            self._write_debug,
            self._finish,
            timeline,
            self._making,
            origin,
        )
        self._making = None
        FirstOutput(self._hub, partial(timeline.mark, "first console byte"))
        await machine.build()
        timeline.mark("built")
        self._machine = machine
        registers = machine.services.pci_hotplug
        if registers is not None:
            registers.on_eject = lambda slot: self._hotplug.ejected(machine, slot)
            registers.on_refused = lambda slot, reason: self._hotplug.refused(machine, slot, reason)
        if self._plugging is not None:
            self._plugging.rebooted()
        if isinstance(origin, Restore) and self._saved is not None and self._saved.identity is not None:
            from vmm.machine.becoming import become

            become(machine, self._saved.identity)
        self._hub.on_pressure = self._console_pressure
        if self._hub.pressed:
            machine.dispatcher.hold("console")
        if self.debugger is not None:
            self.debugger.rebuilt(machine)

    async def _open_console(self) -> None:
        console = self.config.console
        if console.log is not None:
            self._closers.append(ConsoleLog(self._hub, console.log, console.log_limit, self._warn))
        if console.path is not None:
            from vmm.console.server import ConsoleServer

            await self._add_service(ConsoleServer(self._hub, console.path))
        if self.config.name:
            from vmm.management.control import Registration

            await self._add_service(Registration(self, self._hub))
        if console.kind == "stdio":
            from vmm.console.terminal import StandardStreams

            await self._add_service(StandardStreams(self._hub, self._finish))

    async def _add_service(self, service: Any) -> None:
        self._closers.append(service)
        await service.start()

    def _finish(self, outcome: Outcome) -> None:
        """The machine is to end with this outcome. The first call decides; only a reset that would start the machine
        again is overruled by a later call. The supervisor does the rest."""
        if self._reboot_asked and outcome.reason is Reason.SHUTDOWN:
            self._reset_asked = True
            outcome = Outcome(Reason.RESET, "the guest powered off to be started again")
        if self._end is None or self._restarts(self._end):
            self._end = outcome
            self._ending.set()
            if self._machine is not None:
                self._machine.dispatcher.end(outcome)

    async def _supervise(self) -> None:
        """Waits for the end, restarts after a reboot if that is asked for, cleans up."""
        try:
            while True:
                await self._ending.wait()
                end = self._end
                if end is None or not self._restarts(end):
                    break
                await self._restart(end)
        except asyncio.CancelledError:
            self._end = KILLED
            raise
        except VmmError as error:
            self._end = Outcome(Reason.HOST_ERROR, f"restart: {error}")
        finally:
            await self._release()

    def _restarts(self, end: Outcome) -> bool:
        wanted = self.config.reboot or self._reset_asked
        return end.reason is Reason.RESET and wanted and self.state is not State.STOPPING

    async def _restart(self, end: Outcome) -> None:
        assert self._machine is not None
        await self._machine.aclose()
        if self._end is not end or not self._restarts(end):
            return  # killed or stopped meanwhile
        self._machine = None
        if self._resources is not None:
            self._resources.restarted()
        self._end = None
        self._reset_asked = self._reboot_asked = False
        self._ending.clear()
        await self._build()
        self._tell(Rebooted(end.detail))
        if self._end is None and self.state is not State.PAUSED:
            assert self._machine is not None
            self._machine.dispatcher.release("pause")

    def _close_core(self) -> None:
        if self._machine is not None:
            self._machine.close()

    async def _release(self) -> None:
        """Give everything back, whatever fails; the outcome is known afterwards."""
        self.timeline.mark("end")
        machine = self._machine
        try:
            if self._timer is not None:
                self._timer.cancel()
            for task in self._after_restore:
                task.cancel()
            if self._making is not None:  # no Machine took it over
                self._making.close_core()
                self._making.close_memory()
            if machine is not None:
                machine.begin_close()  # a thread closes the core while the components close
                await machine.close_components()
            if self._disk_jobs is not None:
                await self._disk_jobs.aclose()
            if self._plugging is not None:
                await self._plugging.aclose()
            if self._resources is not None:
                with core_errors():
                    await self._resources.aclose()
        except VmmError as error:
            self._failure = error
        finally:
            self._settle()
            try:
                await self._close_services()
            finally:
                if machine is not None:
                    await machine.aclose()
                self.timeline.mark("closed")
                self._stopped.set()

    async def _close_services(self) -> None:
        self._hub.close()
        closers, self._closers = self._closers, []
        try:
            for closer in reversed(closers):
                close = getattr(closer, "aclose", None)
                if close is not None:
                    await close()
                else:
                    closer.close()
        except BaseException:
            for closer in closers:
                closer.close()
            raise

    def _settle(self) -> None:
        if self._system is not None and self._given_system is None:
            self._system.close()
        self._outcome = self._end or KILLED
        if self.state is not State.STOPPED:
            self._change(Change.END)
        self._tell(Ended(self._outcome))
        if self.debugger is not None:
            self.debugger.ended()
        self._settled.set()

    def _change(self, change: Change) -> None:
        state = self._lifecycle.change(change)
        self._tell(StateChanged(state))

    def _tell(self, event: Event) -> None:
        for stream in tuple(self._streams):
            stream.put(event)

    def _warn(self, text: str) -> None:
        self._warnings += 1
        if self._warnings <= MAX_WARNINGS:
            self._tell(Warned(text))

    def _console_event(self, kind: str) -> None:
        if kind == "break":
            self._tell(ConsoleBreak())

    def _console_pressure(self, pressed: bool) -> None:
        if self._machine is not None:
            if pressed:
                self._machine.dispatcher.hold("console")
            else:
                self._machine.dispatcher.release("console")

    def _write_debug(self, data: bytes) -> None:
        self._debug += data
        if len(self._debug) > 2 * REPLAY:
            del self._debug[:-REPLAY]
        if self.on_debug is not None:
            self.on_debug(data)
