"""The source of a migration: a running machine is offered, its memory sent while it runs, and handed over.

Who owns the machine at which moment is ARCHITECTURE.md's "Live migration". Until COMMIT is sent every failure ends with
the machine running on here, its disks locked by itself. Afterwards it never runs here unless the target says that it
gave the machine up, or the user decides. With post-copy it then stands here, paused, until all of its memory has been
fetched (vmm/migration/postcopy.py). Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtio.devices.blk import BlockDevice
from virtio.devices.net import NetDevice
from vmm import _native
from vmm.errors import ConfigError, HostError, StateError, VmmError, core_errors, error_from
from vmm.lifecycle import Outcome, Reason, State
from vmm.machine.memory import Anonymous
from vmm.machine.saving import save, versions
from vmm.migration import protocol, storage
from vmm.migration.link import (
    PING_SECONDS,
    SILENCE,
    Address,
    Link,
    Threads,
    client_context,
    connect,
    parse_uri,
)
from vmm.migration.postcopy import Serving, pages_of, ranges_at_once, send_missing, split
from vmm.migration.precopy import Options, Pace, Pages, Planner, Progress, RoundTiming, Throttle, merge_rest
from vmm.migration.protocol import (
    Accept,
    Ask,
    Commit,
    DiskOffer,
    Fetch,
    Handover,
    Join,
    Kind,
    Offer,
    Recover,
    Refuse,
    Region,
)
from vmm.state.payload import field_types
from vmm.vm import Obstacle

if TYPE_CHECKING:
    from vmm.machine.builder import Machine
    from vmm.vm import VirtualMachine

ASK_SECONDS = 10.0
"""How long a source that does not know what became of its machine goes on asking."""
LOCK_SECONDS = 10.0
"""How long a source goes on trying to lock its disks again, which the other side may have for a moment."""
ROUND_SECONDS = 3600.0
"""How long what was sent may take to arrive over a slow link; silence ends it sooner."""
LOOK_SECONDS = 0.2
"""How often progress is reported."""
BUILD_SECONDS = 120.0
"""How long the other side may take to build the machine."""


async def migrate(
    vm: VirtualMachine,
    uri: str,
    *,
    tls: Path | str | None = None,
    progress: Progress | None = None,
    recover: bool = False,
    **options: Any,
) -> Progress:
    """Move the machine to where `vmm receive` (vmm.receive) waits at `uri`; what it took. It has then ended here, with
    Reason.MIGRATED. `tls`: a directory with a client's certificate (vmm.migration.link). `options`: fields of
    vmm.migration.precopy.Options.
    `recover`: the machine runs there since post-copy, and the connection broke: go on sending its memory over another.

    Raises ConfigError, StateError, HostError: then the machine runs on here; or, if the connection broke at the very
    moment of the handover, it is paused and `vm.obstacle` says why. One at a time: StateError. Cancelled, the machine
    runs on here, unless it was handed over already."""
    unknown = options.keys() - field_types(Options).keys()
    if unknown:
        raise TypeError(f"migrate: no option {sorted(unknown)[0]!r}")
    if recover:
        if vm.migration is None:
            raise StateError("no migration of this machine waits for a new connection")
        return await vm.migration.recover(parse_uri(uri), tls)
    outgoing = Outgoing(vm, parse_uri(uri), Options(**options), tls, progress)
    return await outgoing.run()


class Outgoing:
    """One migration on its way. `run` is its life; `cancel` ends it."""

    def __init__(
        self,
        vm: VirtualMachine,
        address: Address,
        options: Options,
        tls: Path | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises ConfigError, StateError; nothing is begun."""
        options.check()
        if vm.migration is not None:
            raise StateError("the machine is on its way already; wait, or cancel that")
        if vm.debugger is not None:
            raise StateError("a debugger is attached to the machine; let it detach first")
        if vm.state not in (State.RUNNING, State.PAUSED) or vm.obstacle is not None:
            raise StateError(vm.obstacle.text if vm.obstacle else f"a machine that is {vm.state.value} cannot move")
        vm.machine.memory.check_whole()
        self.vm = vm
        self.options = options
        self.progress = progress or Progress()
        self.progress.tell = vm.report
        self.committed = False
        """The other side may have begun to run it."""
        self._address = address
        self._context: ssl.SSLContext | None = None if tls is None else client_context(Path(tls))
        self._token = os.urandom(protocol.TOKEN)
        self._links: list[Link] = []
        self._threads = Threads(options.connections + 2)
        self._answers: asyncio.Queue[tuple[Kind, Any] | BaseException] = asyncio.Queue()
        self._pace = Pace(options.bandwidth)
        self._disks: list[tuple[DiskOffer, BlockDevice]] = []
        self._given: list[BlockDevice] = []
        self._machine: Machine = vm.machine
        self._held = False
        self._state_sent = False
        self._rate = 0.0
        """Bytes a second that the connections carry while nothing holds them back; 0: not known yet."""
        self._round_before = 0
        """_carried when the round began."""
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._sent_before = 0
        """Bytes, over connections that are no more."""
        self._tell_round: Callable[[], None] | None = None
        """While a round goes on: enters in `progress` how far it is."""
        self._page_link: Link | None = None
        self._serving: Serving | None = None
        self._postcopy_wanted = threading.Event()
        """Post-copy is to begin: rounds end early."""
        if self.options.postcopy == "now":
            self._postcopy_wanted.set()
        self._rest: list[Any] = []
        self._taken_ns = 0
        """When the state was taken, time.monotonic_ns()."""
        self._missing: list[bytes] = []
        """Pages that come after the machine."""
        self.broken = False
        """The machine runs there, waits for memory from here, and there is no connection: recover()."""
        self._running = False
        """The machine ran, and is to run there."""

    def cancel(self) -> None:
        """End it, and the machine runs on here. StateError if it was handed over already. Idempotent."""
        if self.committed:
            raise StateError("the machine is handed over already")
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def set_bandwidth(self, bandwidth: int) -> None:
        """Bytes a second from now on; 0: no limit. Raises ConfigError."""
        changed = replace(self.options, bandwidth=bandwidth)
        changed.check()
        self.options.bandwidth = self._pace.bandwidth = bandwidth
        if self._serving is not None:
            self._serving.set_bandwidth(bandwidth)

    def start_postcopy(self) -> None:
        """Do not wait for the end of a round: the machine goes, what is left of its memory follows. Raises StateError
        if that was not allowed when the migration began, or it is handed over already."""
        if not self.options.postcopy:
            raise StateError("post-copy was not allowed when the migration began; cancel it and use --postcopy")
        if self.committed:
            raise StateError("the machine is handed over already")
        if self.progress.phase != "switching":  # else it goes already, and its last round has to come to its end
            self._postcopy_wanted.set()

    def set_downtime(self, seconds: float) -> None:
        """Another goal from now on. Raises ConfigError."""
        replace(self.options, downtime=seconds).check()
        self.options.downtime = seconds

    async def run(self) -> Progress:
        """See migrate()."""
        vm, progress = self.vm, self.progress
        vm.migration = self
        self._task = asyncio.current_task()
        begun = time.monotonic()
        beside = [asyncio.create_task(each, name="beside a migration") for each in (self._ping(), self._look())]
        try:
            self._running = vm.state is State.RUNNING
            self._phase("connecting")
            await self._offer()
            self._phase("memory")
            await self._send_memory()
            return progress
        except BaseException as error:
            self._phase("post-copy broken" if self.broken else "failed")
            progress.error = str(error) or type(error).__name__
            if isinstance(error, asyncio.CancelledError) and self._cancelled:
                raise StateError("the migration was cancelled; the machine runs on here") from None
            raise
        finally:
            progress.seconds = time.monotonic() - begun
            for task in beside:
                task.cancel()
            if not self.broken:
                vm.migration = None
            self._pace.stopped.set()
            if self._page_link is not None:
                self._links.append(self._page_link)
                self._page_link = None
            for link in self._links:
                link.abort()
            await asyncio.gather(*beside, return_exceptions=True)
            await self._end_serving()
            for link in self._links:
                await asyncio.to_thread(link.close)
            if not self.broken:
                self._threads.close()

    async def _end_serving(self) -> None:
        serving, self._serving = self._serving, None
        if serving is not None:
            await serving.aclose()

    def _phase(self, phase: str) -> None:
        self.progress.phase = phase
        self._report()

    @property
    def _carried(self) -> int:
        """Bytes over the present connections."""
        return sum(link.sent for link in self._links)

    def _report(self) -> None:
        serving = self._serving
        self.progress.sent = self._sent_before + self._carried
        if serving is not None:
            sent, _, _, self.progress.asked, left = serving.counts
            self.progress.sent += sent
            self.progress.remaining = left * protocol.PAGE
        elif self._tell_round is not None:
            self._tell_round()
        self.progress.tell(self.progress.event())

    async def _ping(self) -> None:
        """So that the other side hears of us while we plan, wait or go slowly."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            for link in self._links:
                with contextlib.suppress(VmmError):
                    await self._threads.call(link.send_message, Kind.PING)

    async def _look(self) -> None:
        """So that whoever follows it sees progress while nothing else reports it."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._report()

    # The offer.

    async def _offer(self) -> None:
        vm, options = self.vm, self.options
        self._check_devices()
        for name, device in vm.block_devices().items():
            entry = await self._threads.call(lambda n=name, d=device: storage.offer(n, d, copy=options.copy_storage))
            self._disks.append((entry, device))
        main = await self._connect()
        round_trip = time.monotonic()
        await self._threads.call(main.greet)
        self._round_trip = time.monotonic() - round_trip
        self._check_version(main.version)
        offer = self._describe(main.version, await self._tsc_khz())
        await self._threads.call(main.send_message, Kind.OFFER, offer)
        kind, answer = await self._threads.call(lambda: main.expect(Kind.ACCEPT, Kind.REFUSE, patience=BUILD_SECONDS))
        if kind is Kind.REFUSE:
            raise _refused(answer)
        assert isinstance(answer, Accept)
        loop = asyncio.get_running_loop()

        def take(kind: Kind, payload: memoryview) -> None:
            message = protocol.unpack(kind, payload)
            loop.call_soon_threadsafe(self._answers.put_nowait, (kind, message))

        def over(error: BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._answers.put_nowait, error)

        main.read_on(take, over)
        for index in range(1, options.connections):
            link = await self._connect()
            await self._threads.call(link.greet)
            await self._threads.call(link.send_message, Kind.JOIN, Join(self._token, index))
        if options.postcopy:
            self._page_link = await self._threads.call(connect, self._address, self._context)
            await self._threads.call(self._page_link.greet)
            await self._threads.call(self._page_link.send_message, Kind.FETCH, Fetch(self._token))

    async def _connect(self) -> Link:
        link: Link = await self._threads.call(connect, self._address, self._context)
        self._links.append(link)
        return link

    def _check_devices(self) -> None:
        """Raises ConfigError for what cannot move, StateError for what cannot move now."""
        config = self.vm.present
        self.vm.check_no_jobs()
        if self._address.kind == "fd" and self.options.connections > 1:
            raise ConfigError("connections: an inherited descriptor is one; leave the option out")
        if self._address.kind == "fd" and self.options.postcopy:
            raise ConfigError("postcopy: an inherited descriptor is one connection, and pages need another")
        if config.hugepages:
            raise ConfigError("memory from the reserved pool of large pages cannot move yet; leave hugepages out")
        if config.clock == "virtual":
            raise ConfigError("a machine with the virtual clock cannot move while it runs; use vmm snapshot")
        if self.vm.own_devices:
            name = next(iter(self.vm.own_devices))
            raise ConfigError(f"{name}: a device of the program that runs the machine cannot move")
        for index, net in enumerate(config.nets):
            if net.kind == "user" and not self.options.drop_connections:
                raise ConfigError(
                    f"{net.id or f'net{index}'}: the guest's connections go through passt here and would end; "
                    "--drop-connections allows that"
                )

    def _check_version(self, version: int) -> None:
        if version < 3 and self.options.postcopy:
            raise StateError(f"{self._address}: speaks version {version} of the protocol, which has not post-copy")
        if version < 2:
            for what, wanted in (
                ("several connections", self.options.connections > 1),
                ("compression", self.options.compress),
                ("disks' contents", any(entry.how in ("overlay", "copy") for entry, _ in self._disks)),
            ):
                if wanted:
                    raise StateError(f"{self._address}: speaks version 1 of the protocol, which has not {what}")

    async def _tsc_khz(self) -> int:
        """KVM tells it of vCPUs that are parked: for a moment they are."""
        machine = self._machine
        machine.dispatcher.hold("migration offer")
        try:
            await machine.dispatcher.wait_parked()
            self._check_standing()
            with core_errors():
                rate: int = machine.vm.tsc_khz()
                return rate
        finally:
            machine.dispatcher.release("migration offer")

    def _describe(self, version: int, tsc: int) -> Offer:
        vm, machine = self.vm, self._machine
        from vmm import __version__

        config = vm.present
        # Its cards keep their addresses also over later reboots.
        nets = []
        for index, net in enumerate(config.nets):
            card = vm.virtio_devices().get(net.id or f"net{index}")
            nets.append(replace(net, mac=card.mac.hex(":")) if isinstance(card, NetDevice) else net)
        values = config.replace(nets=nets).to_dict()
        return Offer(
            protocol=version,
            token=self._token,
            program=f"loopvisor {__version__}",
            name=vm.config.name,
            config=json.dumps(values),
            regions=tuple(Region(start, len(view)) for start, view in machine.memory.regions()),
            core=vm.core,
            cpuid=tuple(machine.cpuid[0]),
            tsc_khz=tsc,
            epoch_ns=machine.board.clock.epoch_ns,
            payloads=versions(machine),
            disks=tuple(entry for entry, _ in self._disks),
            connections=self.options.connections,
            compress=self.options.compress,
            postcopy=bool(self.options.postcopy),
            paused=not self._running,
        )

    # Memory.

    async def _send_memory(self) -> None:
        memory, progress, options = self._machine.memory, self.progress, self.options
        views = [view for _, view in memory.regions()]
        progress.total = sum(map(len, views))
        self._pages = Pages(
            self._links, views, self._pace, self._postcopy_wanted, compress=options.compress, digests=True
        )
        self._storage = storage.DiskSender(self._disks, self._pace, progress)
        with core_errors():
            memory.start_dirty_log()
        throttle = Throttle(self._machine.dispatcher)
        planner = Planner(options, self._round_trip)
        try:
            self._storage.start()
            todo: Sequence[bytes] = await self._threads.call(self._present)
            fresh = True
            postcopy = False
            while True:
                memory_left = sum(map(_native.count, todo)) * protocol.PAGE
                size = memory_left + self._storage.remaining
                timing = RoundTiming(self._pace, len(self._links))
                self._tell_round = functools.partial(self._in_round, memory_left, timing, planner)
                await self._round(todo, fresh=fresh)
                self._tell_round = None
                fresh = False
                self._check_standing()
                seconds, unhindered = timing.seconds, timing.unhindered
                with core_errors():
                    todo = self._and_rest([bitmap for _, bitmap in memory.take_dirty()])
                self._storage.take()
                progress.remaining = sum(map(_native.count, todo)) * protocol.PAGE
                dirty = progress.remaining + self._storage.remaining
                self._rate = rate = self._measured(unhindered)
                progress.rate, progress.dirty_rate = int(self._round_bytes / seconds), int(dirty / seconds)
                progress.expected_downtime = planner.expected_downtime(dirty, rate)
                self._report()
                decision = planner.after_round(size, dirty, rate) if self._running else "stop"
                if self._postcopy_wanted.is_set():
                    decision = "post-copy"
                if decision == "post-copy":
                    # Disks cannot follow later.
                    postcopy = self._storage.remaining <= rate * options.downtime
                if decision == "stop" or postcopy:
                    break
                if decision == "give up":
                    raise StateError(
                        f"does not come to an end: the guest writes {progress.dirty_rate >> 20} MiB/s and the "
                        f"connection carries {int(rate) >> 20} MiB/s; allow a longer --downtime or more "
                        "--throttle"
                    )
                throttle.set(planner.throttle)
                progress.throttle = planner.throttle
            self._phase("switching")
            await self._switch(todo, throttle, postcopy=postcopy)
        finally:
            self._tell_round = None
            await throttle.stop()
            self._storage.stop()
            with contextlib.suppress(Exception):  # it went with the machine
                memory.stop_dirty_log()

    def _and_rest(self, bitmaps: Sequence[bytes]) -> Sequence[bytes]:
        """With what an interrupted round did not send."""
        if not self._rest:
            return bitmaps
        merged = [bytearray(bitmap) for bitmap in bitmaps]
        merge_rest(merged, self._rest)
        self._rest = []
        return [bytes(bitmap) for bitmap in merged]

    def _present(self) -> list[bytes]:
        """The pages that may hold anything. *worker thread*"""
        memory = self._machine.memory
        if isinstance(memory.source, Anonymous) and not memory.frozen:
            return [bitmap for _, bitmap in memory.present_pages()]
        return [_native.nonzero_pages(view) for _, view in memory.regions()]

    def _measured(self, seconds: float) -> float:
        """Bytes of memory a second: of the last round if it was large enough to tell, else of the best before."""
        sent = self._round_bytes
        if sent >= 4 << 20 or not self._rate:
            return max(sent / seconds, 1 << 20)
        return self._rate

    def _in_round(self, size: int, timing: RoundTiming, planner: Planner) -> None:
        """Tell how far a round of `size` bytes of memory is."""
        progress = self.progress
        progress.remaining = max(size - self._pages.handled * protocol.PAGE, 0)
        sent = self._carried - self._round_before
        progress.rate = int(sent / timing.seconds)
        progress.expected_downtime = planner.expected_downtime(
            progress.remaining + self._storage.remaining, self._rate or sent / timing.unhindered
        )

    async def _round(self, bitmaps: Sequence[bytes], *, fresh: bool) -> None:
        """Send these pages and what disks have; until all of it has arrived."""
        await self._send_round(bitmaps, fresh=fresh)
        await self._round_done()

    async def _send_round(self, bitmaps: Sequence[bytes], *, fresh: bool) -> None:
        """Send these pages and what disks have."""
        pages, progress = self._pages, self.progress
        pages.begin_round()
        self._round_before = self._carried
        if self._storage.remaining:
            await self._threads.call(self._storage.send, self._links[0])
        work = pages.pieces(bitmaps)
        for sent in await _all(
            self._threads.call(lambda n=number: pages.send(n, work, fresh=fresh)) for number in range(len(self._links))
        ):
            progress.pages += sent.pages
            progress.zero_pages += sent.zero
            progress.unchanged += sent.unchanged
            self._rest += sent.rest
        progress.rounds += 1
        self._round_bytes = self._carried - self._round_before

    async def _round_done(self) -> None:
        """Until the other side has all of the round."""
        done = await self._answer(Kind.ROUND_DONE, ROUND_SECONDS)
        if done.number != self._pages.round:
            raise StateError(f"{self._address}: acknowledges round {done.number} instead of {self._pages.round}")

    async def _answer(self, kind: Kind, patience: float = SILENCE) -> Any:
        """The next message, of this kind. Raises what a REFUSE says, HostError, StateError."""
        try:
            async with asyncio.timeout(patience):
                got = await self._answers.get()
        except TimeoutError:
            raise HostError(f"{self._address}: no answer within {patience:g} s") from None
        if isinstance(got, BaseException):
            raise got
        found, message = got
        if found is Kind.REFUSE:
            raise _refused(message)
        if found is not kind:
            raise StateError(f"{self._address}: sent {found.name} instead of {kind.name}")
        return message

    def _check_standing(self) -> None:
        self.vm.check_standing(self._machine)

    # The handover.

    async def _switch(self, dirty: Sequence[bytes], throttle: Throttle, *, postcopy: bool) -> None:
        machine, main, call = self._machine, self._links[0], self._threads.call
        with core_errors():  # what is durable already need not be made so while it stands still
            for entry, device in self._disks:
                if entry.how == "shared":
                    await storage.image_of(entry.name, device).flush()
        machine.dispatcher.hold("migration")
        self._held = True
        try:
            await throttle.stop()
            begun = time.monotonic()
            await machine.dispatcher.wait_parked()
            await machine.quiesce()
            self._check_standing()
            self._pace.bandwidth = 0
            with core_errors():
                last = [bytearray(bitmap) for bitmap in dirty]
                for merged, (_, bitmap) in zip(last, machine.memory.take_dirty(), strict=True):
                    _native.merge(merged, bitmap)
            self._storage.take()
            self._postcopy_wanted.clear()
            if postcopy:
                state = self._state()
                now = pages_of(ranges_at_once(state["machine"]), machine.memory.regions())
                first, self._missing = split(last, now)
                await self._send_round(first, fresh=False)
                await self._begin_serving()
            else:
                sending = asyncio.ensure_future(self._send_round([bytes(bitmap) for bitmap in last], fresh=False))
                try:
                    await asyncio.sleep(0)  # its threads begin, and the state is taken meanwhile
                    state = self._state()
                finally:
                    await asyncio.gather(sending, return_exceptions=True)
                sending.result()
            self._state_sent = True
            await call(main.send, Kind.STATE, json.dumps(state, separators=(",", ":")).encode())
            await self._round_done()
            await self._answer(Kind.READY)
            self._check_standing()
            self._given = await storage.give_up(self._disks)
            handover = None
            if main.version >= 3:
                stood = time.monotonic_ns() - self._taken_ns + int(self._round_trip * 5e8)
                handover = Handover(min(stood, protocol.MAX_STOOD_NS))
            await call(main.send_message, Kind.HANDOVER, handover)
            await self._answer(Kind.TAKEN)
            self._check_standing()
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._go_on_here()))
            raise
        await asyncio.shield(asyncio.ensure_future(self._commit(begun)))
        if self._serving is not None:
            await self._serve()
            with contextlib.suppress(VmmError):
                await call(main.send_message, Kind.DONE)
            self._gone()

    def _state(self) -> dict[str, Any]:
        self._taken_ns = time.monotonic_ns()
        return {"machine": save(self._machine), "console": self.vm.save_console()}

    async def _begin_serving(self) -> None:
        """Say which pages come later; they can be asked for from now on."""
        assert self._page_link is not None
        await send_missing(self._threads.call, self._links[0], self._missing)
        views = [view for _, view in self._machine.memory.regions()]
        link, self._page_link = self._page_link, None
        self._serving = Serving(link, views, self._missing, self.options.bandwidth)

    async def _commit(self, begun: float) -> None:
        """Nothing that happens from here on lets the machine run here, unless the other side says that it does not."""
        main = self._links[0]
        self.committed = True
        try:
            await self._threads.call(main.send_message, Kind.COMMIT, Commit(paused=not self._running))
            await self._answer(Kind.RUNNING)
        except (VmmError, OSError) as error:
            await self._undecided(error)
            return
        self.progress.downtime = time.monotonic() - begun
        if self._serving is None:
            with contextlib.suppress(VmmError):
                await self._threads.call(main.send_message, Kind.DONE)
            self._gone()

    # Post-copy: the machine runs there.

    async def _serve(self) -> None:
        """Until the other side has all of the memory. Raises HostError if the connection ends before, and
        `self.broken` is set then; StateError if the machine is ended here."""
        serving, vm = self._serving, self.vm
        assert serving is not None
        await self._stand_by(f"the machine runs at {self._address}, and still fetches memory from here")
        self._phase("post-copy")
        serving.stream()
        ended = asyncio.create_task(vm.ended(), name="post-copy: end")
        answer = asyncio.create_task(self._answers.get(), name="post-copy: main connection")
        try:
            while not serving.ended.done() and not ended.done():
                waits = {serving.ended, ended, *(() if answer.done() else (answer,))}
                await asyncio.wait(waits, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                self._report()
                if answer.done() and isinstance(answer.result(), BaseException):
                    serving.link.abort()  # both connections or none
        except asyncio.CancelledError:
            self.broken = True
            self.vm.obstacle = Obstacle(self._broken_text("it was left"))
            raise
        finally:
            for task in (ended, answer):
                task.cancel()
        if not serving.ended.done():
            raise StateError("the machine was ended here before all of its memory was fetched")
        how = serving.ended.result()
        self._missing = []
        self._sent_before += serving.counts[0]
        await self._end_serving()
        if how == "done":
            return
        reasons = {"lost": "the connection broke", "damaged": "the other side sent nonsense"}
        await self._interrupted(reasons.get(how, how))

    async def _interrupted(self, why: str) -> None:
        """Raises HostError: wait for recover()."""
        text = self._broken_text(why)
        await self._stand_by(text)
        self.broken = True
        raise HostError(text)

    def _broken_text(self, why: str) -> str:
        name = self.vm.config.name or "NAME"
        return (
            f"the machine runs at {self._address} and waits there for memory from here, but {why}; "
            f"vmm migrate --recover {name} URI goes on"
        )

    async def _stand_by(self, text: str) -> None:
        """This machine is memory and no more."""
        if self.vm.state is State.RUNNING:
            await self.vm.pause()
        self.vm.obstacle = Obstacle(text)

    async def recover(self, address: Address, tls: Path | str | None = None) -> Progress:
        """After the connection broke in post-copy: go on over a new one, to the end. Raises StateError if there is
        nothing to recover, HostError and StateError if that connection fails too."""
        if not self.broken:
            raise StateError("no migration of this machine waits for a new connection")
        context = None if tls is None else client_context(Path(tls))
        self.broken = False  # nobody else's turn
        link: Link | None = None
        done = False
        try:
            link = await self._threads.call(connect, address, context)
            await self._threads.call(link.greet)
            await self._threads.call(link.send_message, Kind.RECOVER, Recover(self._token))
            _, answer = await self._threads.call(link.expect, Kind.RECOVERED)
            if answer.state == "unknown":
                raise StateError(f"{address}: no machine waits there for memory from here")
            if answer.state == "waiting":
                bitmaps = await self._threads.call(self._receive_missing, link, answer.frames)
                self._address, self._context = address, context
                self._answers = asyncio.Queue()
                views = [view for _, view in self._machine.memory.regions()]
                self._serving = Serving(link, views, bitmaps, self.options.bandwidth)
                link = None
                await self._serve()
            done = True
            self._gone()
            return self.progress
        except BaseException as error:
            self.progress.error = str(error) or type(error).__name__
            self._phase("post-copy broken")
            raise
        finally:
            await self._end_serving()
            if link is not None:
                link.abort()
                await asyncio.to_thread(link.close)
            self.broken = not done
            if done:
                self.vm.migration = None
                self._threads.close()

    def _receive_missing(self, link: Link, frames: int) -> list[bytes]:
        """What the other side lacks. *worker thread*"""
        views = [view for _, view in self._machine.memory.regions()]
        bitmaps = [bytearray((len(view) // protocol.PAGE + 63) // 64 * 8) for view in views]
        for _ in range(frames):
            _, payload = link.expect(Kind.MISSING)
            region, first, words = protocol.parse_missing(payload)
            if region >= len(bitmaps) or first // 8 + len(words) > len(bitmaps[region]):
                raise StateError(f"{link.peer}: lacks pages that are not in memory")
            bitmaps[region][first // 8 : first // 8 + len(words)] = words
        for bitmap, view in zip(bitmaps, views, strict=True):
            if int.from_bytes(bitmap, "little") >> (len(view) // protocol.PAGE):
                raise StateError(f"{link.peer}: lacks pages that are not in memory")
        return [bytes(bitmap) for bitmap in bitmaps]

    def _gone(self) -> None:
        """Tell that it is done, before the machine's end ends its events."""
        self.progress.remaining = 0
        self._phase("done")
        self.vm.end(Outcome(Reason.MIGRATED, f"to {self._address}"))

    async def _go_on_here(self) -> None:
        """The handover failed before COMMIT: the machine is ours, and runs on; the other side is told, if it can be."""
        for link in self._links:
            link.abort()
        with contextlib.suppress(StateError):
            self._check_standing()
            try:
                await self._take_disks()
            except VmmError as error:
                await self._stay(f"the migration failed, and its disks cannot be taken back: {error}")
            else:
                self._release()
        if self._state_sent:
            with contextlib.suppress(VmmError):
                await self._ask(seconds=2.0)

    async def _take_disks(self) -> None:
        """Lock again what was given up. Raises ConfigError if somebody else has it, HostError."""
        deadline = time.monotonic() + LOCK_SECONDS
        while self._given:
            try:
                await storage.take(self._given[-1])
                self._given.pop()
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    def _release(self) -> None:
        if self._held:
            self._held = False
            self._machine.resume_devices()
            self._machine.dispatcher.release("migration")

    async def _stay(self, why: str) -> None:
        """Paused, until somebody decides."""
        vm = self.vm
        if vm.state is State.RUNNING:
            await vm.pause()

        async def clear() -> None:
            await self._take_disks()
            self._release()

        name = vm.config.name or "NAME"
        text = f"{why}; if it does not run there: vmm resume {name}, else: vmm kill {name}"
        vm.obstacle = Obstacle(text, clear)
        vm.tell(text)

    async def _undecided(self, error: BaseException) -> None:
        """COMMIT may have arrived. Raises HostError unless the machine runs there."""
        try:
            state = await self._ask(seconds=ASK_SECONDS)
        except VmmError:
            state = "unknown"
        if state == "running":
            if self._serving is None:
                self._gone()
            return
        if state == "dropped":
            self.committed = False
            await self._go_on_here()
            raise HostError(f"{error}; the machine runs on here") from error
        why = f"the machine was handed over to {self._address}, and the connection broke before it said that it runs"
        await self._stay(why)
        raise HostError(f"{why} ({error}); it is paused here") from error

    async def _ask(self, *, seconds: float) -> str:
        """What became of the machine, which is to be given up there unless it runs. Raises VmmError if nobody
        answers."""
        if self._address.kind == "fd":
            raise HostError("an inherited descriptor cannot be connected to again")
        deadline = time.monotonic() + seconds

        def ask(patience: float) -> str:
            link = connect(self._address, self._context, patience=patience)
            try:
                link.greet()
                link.send_message(Kind.ASK, Ask(self._token, drop=True))
                _, answer = link.expect(Kind.ANSWER, patience=patience)
                return str(answer.state)
            finally:
                link.close()

        while True:
            left = deadline - time.monotonic()
            try:
                answer: str = await asyncio.to_thread(ask, max(left, 0.5))
                return answer
            except VmmError:
                if left < 0.2:
                    raise
                await asyncio.sleep(0.2)


async def _all(calls: Any) -> list[Any]:
    """All of them to their ends; the first failure is raised afterwards."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _refused(answer: Refuse) -> VmmError:
    return error_from(answer.fault, answer.error)
