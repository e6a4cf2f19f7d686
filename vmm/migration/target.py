"""The target of a migration: waits for a machine, builds it paused, takes what comes into its memory, and runs it when
the source has let go of it for good.

Who owns the machine at which moment is ARCHITECTURE.md's "Live migration". The peer is hostile: what it names of this
host is opened only where the user allows it, and whatever it sends makes StateError at most. Loop thread; each
connection has a thread that reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from cpu.model import lacking
from virtio.devices.blk import BlockDevice
from virtio.devices.net import NetDevice
from virtio.images.create import create_qcow2
from vmm import _native
from vmm.config import Config
from vmm.errors import ConfigError, HostError, StateError, VmmError, core_errors, fault_of, os_reason
from vmm.lifecycle import Outcome, Reason
from vmm.machine.memory import GuestMemory
from vmm.machine.origin import Arrival, ArrivingDisk, Restore, Saved
from vmm.machine.saving import MachineState, later, parse, prepare_parsing, restore, versions
from vmm.migration import protocol, storage
from vmm.migration.fetching import Fetching
from vmm.migration.link import PING_SECONDS, Closed, Link, Listener, Threads, parse_uri
from vmm.migration.postcopy import ranges_at_once
from vmm.migration.protocol import (
    PAGES,
    Accept,
    Answer,
    Ask,
    Commit,
    Fetch,
    Join,
    Kind,
    Offer,
    Recover,
    Recovered,
    Refuse,
    Round,
)
from vmm.vm import Obstacle, VirtualMachine

if TYPE_CHECKING:
    import socket

    from vmm.machine.builder import Machine

SMALL_STATE = 1 << 20
"""Bytes of a state that is parsed in the loop's turn."""
MAX_WAITING = 32
"""Connections that have not said yet what they want."""
ANSWERING_SECONDS = 60.0
"""How long a target that runs goes on telling a source so that did not hear it."""
LATE_SECONDS = 600.0
"""How long a paused machine that was never handed over goes on answering its source."""
log = logging.getLogger(__name__)

Phase = Literal["building", "receiving", "ready", "taken", "running", "failed"]


PARTS = (
    "cpu.kvm.system", "cpu.system", "vmm.acpi.aml", "vmm.devices.virtio.disk", "vmm.devices.virtio.net",
    "vmm.devices.virtio.pool", "vmm.devices.virtio.vsock", "vmm.machine.builder",
)  # fmt: skip
"""What most machines are built of, and nothing else imports before."""


def preload() -> None:
    """Import what building a machine takes, which is imported then otherwise, while its source waits."""
    for name in PARTS:
        importlib.import_module(name)


class Receiver:
    """Waits at an address for one machine.

    async with Receiver("tcp:0.0.0.0:4444") as receiver:
        vm = await receiver.arrive()
    """

    def __init__(
        self,
        uri: str,
        *,
        tls: Path | str | None = None,
        trust: bool = False,
        disks: Mapping[str, Path | str] | None = None,
        newest: int = protocol.VERSION,
        **changes: Any,
    ) -> None:
        """`tls`: a directory with a server's certificate, as `vmm daemon --tls` takes. `trust`: open the files of this
        host that the source names; a source that came by TLS, a UNIX socket or an inherited descriptor is trusted.
        `disks`: files for disks by name, instead of what the source names. `changes`: fields of Config that shall
        differ. Raises ConfigError, HostError."""
        self._listener = Listener(parse_uri(uri), None if tls is None else Path(tls))
        self.trusted = trust or self._listener.trusted
        self.disks = {name: Path(path) for name, path in (disks or {}).items()}
        self.changes = changes
        self.newest = newest
        self.session: Session | None = None
        self._refused: set[Session] = set()
        """Whose machines did not fit, until they are closed."""
        self._threads = Threads(MAX_WAITING + 2)
        self._waiting: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._others: list[tuple[Listener, asyncio.Task[None]]] = []
        """Where else it listens, for a source that comes back."""
        self._arrived: asyncio.Future[VirtualMachine] | None = None
        self._answering: asyncio.TimerHandle | None = None

    @property
    def uri(self) -> str:
        """Where it waits; a port of 0 is the real one here."""
        return str(self._listener.address)

    async def __aenter__(self) -> Self:
        self._arrived = asyncio.get_running_loop().create_future()
        self._accepting = asyncio.create_task(self._accept(self._listener), name="receive")
        return self

    async def also(self, uri: str, tls: Path | str | None = None) -> str:
        """Wait at one more address, until all of the machine's memory has come: for a source that comes back. The
        address, with its port. Raises ConfigError, HostError."""
        listener = Listener(parse_uri(uri), None if tls is None else Path(tls))
        task = asyncio.create_task(self._accept(listener), name="receive: again")
        self._others.append((listener, task))
        return str(listener.address)

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop waiting; a machine that has not arrived is given up, one that has is its owner's. After a switch to
        post-copy it waits until all of the machine's memory has come, or it has ended. Idempotent."""
        if self.session is not None:
            await self.session.settled()
        await self._stop_listening()
        for session in (*self._refused, *((self.session,) if self.session is not None else ())):
            await session.aclose()
        if self._arrived is not None and self._arrived.done() and not self._arrived.cancelled():
            self._arrived.exception()
        self._threads.close()

    async def _stop_listening(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
        others, self._others = self._others, []
        for listener, task in others:
            listener.stop()
            await asyncio.gather(task, return_exceptions=True)
            listener.close()
        accepting, self._accepting = self._accepting, None
        if accepting is None:
            return
        self._listener.stop()
        await asyncio.gather(accepting, return_exceptions=True)
        self._listener.close()
        waiting = tuple(self._waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def arrive(self) -> VirtualMachine:
        """Until a machine has arrived: it runs, or is paused if it was, or if its source was lost at the handover
        (`vm.obstacle` says so). Its owner calls its `aclose()`. Raises what ended the migration: StateError,
        ConfigError, HostError."""
        assert self._arrived is not None
        return await asyncio.shield(self._arrived)

    # Connections.

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                sock = await self._threads.call(listener.accept)
            except OSError as error:
                log.warning("receive: %s", os_reason(error))
                await asyncio.sleep(0.1)
                continue
            if sock is None:
                return
            if len(self._waiting) >= MAX_WAITING:
                sock.close()
                continue
            task = asyncio.create_task(self._greet(listener, sock), name="receive: connection")
            self._waiting.add(task)
            task.add_done_callback(functools.partial(self._greeted, sock))

    def _greeted(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._waiting.discard(task)
        if task.cancelled():  # before it had a link, which would close the socket; perhaps before it began
            sock.close()

    async def _greet(self, listener: Listener, sock: socket.socket) -> None:
        """Find out what a connection wants. What is no migration ends here, and nobody else notices."""
        link: Link | None = None
        try:
            link = await self._threads.call(listener.open, sock)
            await self._threads.call(lambda: link.greet(newest=self.newest))
            kind, message = await self._threads.call(
                link.expect, Kind.OFFER, Kind.JOIN, Kind.ASK, Kind.FETCH, Kind.RECOVER
            )
            if kind is Kind.OFFER:
                await self._begin(link, message)
            elif kind is Kind.JOIN:
                if self.session is None or not self.session.join(link, message):
                    raise StateError("a connection that belongs to no migration")
            elif kind is Kind.FETCH:
                if self.session is None or not self.session.join_pages(link, message):
                    raise StateError("a connection that belongs to no migration")
            elif kind is Kind.RECOVER:
                await self._recover(link, message)
            else:
                await self._answer(link, message)
                await asyncio.to_thread(link.close)
        except (VmmError, OSError) as error:
            log.info("receive: %s", error)
            if link is not None:
                await asyncio.to_thread(link.close)
            else:
                sock.close()
            if listener.address.kind == "fd":
                self._fail(error if isinstance(error, VmmError) else HostError(str(error)))
        except asyncio.CancelledError:
            if link is not None:
                link.abort()
                link.close()
            raise

    async def _begin(self, link: Link, offer: Offer) -> None:
        if self.session is not None:
            await self.refuse(link, StateError("this vmm receive has a machine already"))
            return
        session = self.session = Session(self, link, offer)
        try:
            await session.build()
            await self._threads.call(link.send_message, Kind.ACCEPT, Accept(session.vm.core, session.vm.config.name))
        except (VmmError, OSError) as error:
            failure = error if isinstance(error, VmmError) else HostError(os_reason(error))
            await self.refuse(link, failure)
            self.session = None
            self._refused.add(session)  # aclose() closes it, if it cancels this
            await session.aclose()
            self._refused.discard(session)
            self._fail(failure)
            return
        except BaseException:
            await session.aclose()
            raise
        session.start()

    async def refuse(self, link: Link, error: VmmError) -> None:
        """Say why, and end the connection."""
        fault: Any = fault_of(error)
        with contextlib.suppress(VmmError):
            await self._threads.call(link.send_message, Kind.REFUSE, Refuse(fault, str(error)[:4000]))
        link.finish()
        await asyncio.to_thread(link.close)

    async def _answer(self, link: Link, ask: Ask) -> None:
        session = self.session
        state: Any = "unknown"
        if session is not None and session.offer.token == ask.token:
            state = await session.asked(drop=ask.drop)
        await self._threads.call(link.send_message, Kind.ANSWER, Answer(state))

    async def _recover(self, link: Link, message: Recover) -> None:
        session = self.session
        if session is not None and session.offer.token == message.token and session.phase == "running":
            if session.fetching is not None and await session.fetching.recover(link):
                return
            answer = Recovered("whole", 0)
        else:
            answer = Recovered("unknown", 0)
        await self._threads.call(link.send_message, Kind.RECOVERED, answer)
        link.finish()
        await asyncio.to_thread(link.close)

    # What becomes of it.

    def _fail(self, error: VmmError) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_exception(error)

    def failed(self, error: VmmError) -> None:
        """Called by the session: the machine will not come."""
        self._fail(error)

    def has_arrived(self, vm: VirtualMachine, *, answering: float | None) -> None:
        """Called by the session: the machine has arrived. A source that does not know that is answered for so many
        seconds more; None: until it is said how long."""
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(vm)
        if self._answering is not None:
            self._answering.cancel()
        self._answering = None
        if answering is not None:
            self._answering = asyncio.get_running_loop().call_later(answering, self._listener.stop)


class Session:
    """One machine on its way here."""

    def __init__(self, receiver: Receiver, link: Link, offer: Offer) -> None:
        self.offer = offer
        self.phase: Phase = "building"
        self._receiver = receiver
        self._links: list[Link] = [link]
        self._loop = asyncio.get_running_loop()
        self._threads = Threads(2)
        self._messages: asyncio.Queue[tuple[Kind, Any] | BaseException] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.vm: VirtualMachine
        self._machine: Machine
        self._built = False
        self._state: MachineState | None = None
        self._console: Any = None
        self._rounds: dict[int, int] = {}
        """Connections over which a round has come whole."""
        self._early_state: Any = None
        """Of the machine, when it came before the last round had come whole over all connections."""
        self._disks: list[tuple[protocol.DiskOffer, BlockDevice]] = []
        self._taken: list[BlockDevice] = []
        self._made: list[Path] = []
        """Files of disks that are copied along."""
        self._restored = False
        self._announcing: asyncio.Task[None] | None = None
        self._pings: asyncio.Task[None] | None = None
        self._views: list[memoryview] = []
        self.fetching: Fetching | None = None
        """With post-copy: memory that comes after the machine."""

    # The offer.

    async def build(self) -> None:
        """Build the machine like it, paused, and see that all of it will fit. Raises ConfigError, StateError,
        HostError."""
        offer = self.offer
        if offer.protocol != self._links[0].version:
            raise StateError(f"an offer for version {offer.protocol} of the protocol, which was not agreed on")
        config = await self._threads.call(self._config)
        arriving = {entry.name: ArrivingDisk(exclusive=True) for entry in offer.disks if entry.how == "shared"}
        came_from = f"{offer.name or 'a machine'}, migrated"
        self.vm = VirtualMachine(config, saved=Saved(Arrival(offer.epoch_ns), arriving, None, source=came_from))
        try:
            await self.vm.__aenter__()
        except VmmError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise StateError(f"the offer's configuration makes no machine: {error}") from error
        self._built = True
        self._machine = self.vm.machine
        await self._check()
        self._views = [view for _, view in self._machine.memory.regions()]
        self._machine.memory.small_pages(True)  # for the first round, which brings what the guest has, and no more
        if offer.postcopy:
            if self._links[0].version < 3:
                raise StateError("an offer of post-copy, which version 2 of the protocol has not")
            self.fetching = Fetching(self.vm, self._receiver.also)
        self.phase = "receiving"

    def _config(self) -> Config:
        """The machine's configuration here. *worker thread*"""
        receiver, offer = self._receiver, self.offer
        values = protocol.load("offer: config", offer.config.encode())
        if not isinstance(values, dict):
            raise StateError("offer: config: not a table")
        changes: dict[str, Any] = {"console": "none", "core": "auto", "gdb": None, **receiver.changes}
        changes.setdefault("name", offer.name)
        try:
            config = Config.from_dict({**values, **changes})
        except (TypeError, ValueError, OverflowError) as error:
            raise StateError(f"offer: config: {str(error)[:200]}") from error
        names = [disk.id or f"disk{index}" for index, disk in enumerate(config.disks)]
        if names != [entry.name for entry in offer.disks]:
            raise StateError("offer: its disks and its configuration differ")
        for name in receiver.disks:
            if name not in names:
                raise ConfigError(f"disk: the machine has no {name}; it has {', '.join(names) or 'none'}")
        changed = []
        for disk, entry in zip(config.disks, offer.disks, strict=True):
            given = receiver.disks.get(entry.name)
            if given is None and not receiver.trusted:
                raise ConfigError(
                    f"{entry.name}: the source names {disk.path}; add --trust if files here may be opened, or give it "
                    f"with --disk {entry.name}=FILE"
                )
            disk = replace(disk, path=given or disk.path)
            if entry.how == "copy":
                self._make_disk(entry, disk.path, given=given is not None)
                disk = replace(disk, format=entry.format)
            changed.append(disk)
        config = Config.from_dict({**config.to_dict(), "disks": changed})
        if not receiver.trusted:
            for what, path in self._other_files(config):
                raise ConfigError(f"{what}: the source names {path}; add --trust if files here may be opened")
        return config

    def _other_files(self, config: Config) -> list[tuple[str, object]]:
        found: list[tuple[str, object]] = [
            ("kernel", config.kernel),
            ("initrd", config.initrd),
            ("vsock", config.vsock),
            ("flat", config.flat and config.flat.path),
            *(("disk data", disk.data) for disk in config.disks),
            *(("fw_cfg", item.file) for item in config.fw_cfg),
            *(("net pcap", net.pcap) for net in config.nets),
            *(("net", net.target or None) for net in config.nets),
            *(("port", port) for port in config.ports),
        ]
        # What the user gave here is no wish of the source's.
        return [(what, path) for what, path in found if path and what not in self._receiver.changes]

    def _make_disk(self, entry: protocol.DiskOffer, path: Path, *, given: bool) -> None:
        """The file that a disk is copied into: a new one, or one that the user gave. *worker thread*"""
        if given and path.exists():
            return
        try:
            if entry.format == "qcow2":
                if path.exists():
                    raise FileExistsError
                create_qcow2(str(path), entry.capacity)
            else:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    os.ftruncate(descriptor, entry.capacity)
                finally:
                    os.close(descriptor)
        except FileExistsError:
            raise ConfigError(
                f"{entry.name}: {path} is here already; move it away, or say with --disk {entry.name}=FILE which file "
                "is to be overwritten"
            ) from None
        except OSError as error:
            raise HostError(f"{entry.name}: {path}: {os_reason(error)}") from error
        self._made.append(path)

    async def _check(self) -> None:
        """The offer against the machine. Raises StateError, HostError, ConfigError."""
        offer, machine = self.offer, self._machine
        ours = [(start, len(view)) for start, view in machine.memory.regions()]
        if ours != [(region.start, region.size) for region in offer.regions]:
            raise StateError("its memory is laid out in another way here")
        mine = versions(machine)
        for name, version in offer.payloads.items():
            if name not in mine:
                raise StateError(f"{name[:60]}: the machine has none here")
            if version > mine[name]:
                raise StateError(f"{name[:60]}: version {version} of its state; this program knows {mine[name]}")
        for name in mine.keys() - offer.payloads.keys():
            raise StateError(f"{name}: the machine has one here, and none there")
        with core_errors():
            missing = lacking(offer.cpuid, machine.system.supported_cpuid())
            if missing:
                raise HostError(f"the guest was told of what the core {self.vm.core} lacks: {', '.join(missing)}")
            if offer.tsc_khz:
                machine.vm.set_tsc_khz(offer.tsc_khz)
        devices = self.vm.block_devices()
        for entry in offer.disks:
            device = devices.get(entry.name)
            if device is None:
                raise StateError(f"{entry.name}: the machine has no such disk here")
            backend = storage.image_of(entry.name, device)
            if backend.capacity != entry.capacity:
                raise StateError(f"{entry.name}: has {entry.capacity} bytes there, {backend.capacity} here")
            if entry.fingerprint:
                image = backend.chain.image if backend.overlay >= 0 else backend.image()
                found = await self._threads.call(storage.fingerprint, image, backend.capacity)
                if found != entry.fingerprint:
                    raise StateError(f"{entry.name}: {backend.path} holds something else than {entry.path} there")
            if (entry.how == "overlay") != (backend.overlay >= 0):
                raise StateError(f"{entry.name}: a snapshot disk on one side only")
            self._disks.append((entry, device))

    # What comes.

    def start(self) -> None:
        """The source was told that it will do."""
        self._receive_disks = storage.DiskReceiver(
            [(entry, storage.image_of(entry.name, device)) for entry, device in self._disks]
        )
        self._links[0].read_on(self._took, self._over)
        self._pings = asyncio.create_task(self._ping(), name="receive: pings")
        self._task = asyncio.create_task(self._serve(), name="receive: session")

    async def _ping(self) -> None:
        """So that the source hears of us while a round takes long."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            with contextlib.suppress(VmmError):
                await self._threads.call(self._links[0].send_message, Kind.PING)

    def join(self, link: Link, message: Join) -> bool:
        """One more connection; False: it is none of ours."""
        if message.token != self.offer.token or self.phase != "receiving" or link.version < 2:
            return False
        if len(self._links) >= self.offer.connections:
            return False
        self._links.append(link)
        link.read_on(self._took, self._over)
        return True

    def join_pages(self, link: Link, message: Fetch) -> bool:
        """The connection over which missing pages will come; False: it is none of ours."""
        if message.token != self.offer.token or self.phase != "receiving" or self.fetching is None:
            return False
        return self.fetching.join(link)

    def _took(self, kind: Kind, payload: memoryview) -> None:
        """*a connection's thread*"""
        if kind is Kind.PAGES:
            self._take_pages(payload)
        elif kind is Kind.MISSING:
            if self.phase != "receiving" or self.fetching is None or self._early_state is not None:
                raise StateError("missing pages out of turn")
            self.fetching.absent.mark(*protocol.parse_missing(payload))
        elif kind is Kind.DISK:
            if self.phase != "receiving":
                raise StateError("content of a disk out of turn")
            self._receive_disks.write(payload)
        elif kind is Kind.STATE:
            self._tell((kind, bytes(payload)))
        else:
            self._tell((kind, protocol.unpack(kind, payload)))

    def _take_pages(self, payload: memoryview) -> None:
        if self.phase != "receiving":
            raise StateError("pages out of turn")
        if len(payload) < PAGES.size:
            raise StateError("a PAGES frame without its head")
        region, base, runs = PAGES.unpack_from(payload)
        table = payload[PAGES.size : PAGES.size + 8 * runs]
        data = payload[PAGES.size + 8 * runs :]
        if region >= len(self._views) or len(table) != 8 * runs or base * protocol.PAGE > len(self._views[region]):
            raise StateError("a PAGES frame that is malformed")
        try:
            _native.unpack_pages(self._views[region][base * protocol.PAGE :], table, data)
        except ValueError as error:
            raise StateError(f"a PAGES frame: {error}") from error

    def _tell(self, message: tuple[Kind, Any] | BaseException) -> None:
        """*a connection's thread*"""
        if self._messages.qsize() > 1000:
            raise StateError("the source sends more messages than make sense")
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._messages.put_nowait, message)

    def _over(self, error: BaseException) -> None:
        """*a connection's thread*"""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._messages.put_nowait, error)

    async def _serve(self) -> None:
        try:
            await self._threads.call(prepare_parsing, self._machine)  # while memory comes, and the machine runs there
            ended = asyncio.create_task(self.vm.ended(), name="receive: end")
            try:
                while self.phase != "running":
                    message = asyncio.create_task(self._messages.get(), name="receive: message")
                    await asyncio.wait((message, ended), return_when=asyncio.FIRST_COMPLETED)
                    if not message.done():
                        message.cancel()
                        raise StateError("the machine was ended here before it had arrived")
                    got = message.result()
                    if isinstance(got, BaseException):
                        raise got
                    await self._handle(*got)
            finally:
                ended.cancel()
            if self.fetching is not None and self.fetching.needed:
                self._receiver.has_arrived(self.vm, answering=None)
                if not await self.fetching.run(self._messages):
                    self._receiver.has_arrived(self.vm, answering=0.0)
                    return
            await self._see_off()
            for link in self._links:
                link.abort()
        except (VmmError, OSError, MemoryError) as error:
            failure = error if isinstance(error, VmmError) else HostError(str(error))
            if not isinstance(error, Closed) and self.phase == "receiving":
                await self._receiver.refuse(self._links[0], failure)
            await self._lost(failure)
        except Exception as error:  # a peer made us do what we did not foresee: its machine does not come
            log.exception("receive")
            await self._lost(StateError(f"the stream cannot be understood: {type(error).__name__}"))
        finally:
            if self._pings is not None:
                self._pings.cancel()

    async def _ready(self, state: Any) -> None:
        """All memory and the state are here."""
        await self._take_state(state)
        if self.fetching is not None and self.fetching.absent.any:
            await self.fetching.begin(ranges_at_once(self._raw))
        self.phase = "ready"
        await self._threads.call(self._links[0].send_message, Kind.READY)

    async def _handle(self, kind: Kind, message: Any) -> None:
        main, call = self._links[0], self._threads.call
        if kind is Kind.ROUND and self.phase == "receiving":
            assert isinstance(message, Round)
            self._rounds[message.number] = self._rounds.get(message.number, 0) + 1
            if len(self._rounds) > 2:
                raise StateError("rounds out of order")
            if self._rounds[message.number] == self.offer.connections:
                del self._rounds[message.number]
                self._machine.memory.small_pages(False)
                await call(main.send_message, Kind.ROUND_DONE, message)
                if self._early_state is not None and not self._rounds:
                    await self._ready(self._early_state)
        elif kind is Kind.STATE and self.phase == "receiving" and self._early_state is None:
            # It follows the last round on the first connection, and may overtake what is left of it on others.
            if self._rounds:
                self._early_state = message
            else:
                await self._ready(message)
        elif kind is Kind.HANDOVER and self.phase == "ready":
            try:
                await self._take_over(0 if message is None else message.stood_ns)
            except VmmError as error:
                await self._give_back()
                await self._receiver.refuse(main, error)
                raise
            self.phase = "taken"
            await call(main.send_message, Kind.TAKEN)
        elif kind is Kind.COMMIT and self.phase == "taken":
            assert isinstance(message, Commit)
            self._run(paused=message.paused)
            with contextlib.suppress(VmmError):
                await call(main.send_message, Kind.RUNNING)
        else:
            raise StateError(f"the source sent {kind.name} out of turn")

    async def _take_state(self, payload: bytes) -> None:
        """Parse all of it; nothing changes yet. Raises StateError."""
        if len(payload) < SMALL_STATE:  # the machine stands still: a thread would take longer to begin
            values = protocol.load("state", payload)
        else:
            values = await self._threads.call(protocol.load, "state", payload)
        if not isinstance(values, dict) or set(values) != {"machine", "console"}:
            raise StateError("not the state of a machine and its console")
        self._state = parse(self._machine, values["machine"])
        self._raw = values["machine"]
        self._console = values["console"]

    async def _take_over(self, stood_ns: int = 0) -> None:
        """Lock the disks and give the machine its state of `stood_ns` ago; it does nothing yet. Raises ConfigError,
        StateError, HostError."""
        begun = time.monotonic_ns()
        for entry, device in self._disks:
            if entry.how == "shared":
                await storage.take(device)
                self._taken.append(device)
        if self._restored:
            return
        state, machine = self._state, self._machine
        assert state is not None
        if stood_ns:
            state = later(state, stood_ns + time.monotonic_ns() - begun)
        self.vm.arrive(self._console)
        machine.board.clock.epoch_ns = time.time_ns() - state.now_ns
        memory: GuestMemory = machine.memory
        restore(machine, Restore(self._raw, lambda: memory, machine.board.clock.epoch_ns), state, quiet=True)
        self._restored = True

    async def _give_back(self) -> None:
        """Others may have the disks."""
        taken, self._taken = self._taken, []
        for device in taken:
            with contextlib.suppress(Exception):
                await storage.image_of("disk", device).deactivate()

    def _run(self, *, paused: bool) -> None:
        """The machine is this one from now on."""
        self.phase = "running"
        self._made.clear()
        self.vm.obstacle = None
        if self.fetching is not None and self.fetching.needed:
            self.fetching.commit()
        self._machine.resume_devices()
        if not paused:
            self.vm.resume()
        self._announcing = asyncio.create_task(self._announce(), name="announce")

    async def _announce(self) -> None:
        """The cards are in another place of the network. A network that cannot be told learns by the guest's frames."""
        cards = [device for device in self.vm.virtio_devices().values() if isinstance(device, NetDevice)]
        await asyncio.gather(*(card.announce() for card in cards), return_exceptions=True)

    async def _see_off(self) -> None:
        """The machine runs: until the source knows."""
        self._receiver.has_arrived(self.vm, answering=ANSWERING_SECONDS)
        try:
            async with asyncio.timeout(ANSWERING_SECONDS):
                got = await self._messages.get()
        except TimeoutError:
            return
        if isinstance(got, tuple) and got[0] is Kind.DONE:
            self._receiver.has_arrived(self.vm, answering=0.0)

    # What goes wrong.

    async def _lost(self, error: VmmError) -> None:
        """The source is gone, or talks nonsense. A machine that was complete stays, paused; another goes."""
        complete = self.phase in ("ready", "taken") and not self.vm.ending
        complete = complete and not (self.fetching is not None and self.fetching.needed)
        for link in self._links:
            link.abort()
        if not complete:
            self.phase = "failed"
            self._receiver.failed(error)
            await self._discard(str(error))
            return
        await self._give_back()
        self.phase = "ready"

        async def clear() -> None:
            await self._take_over()
            self._run(paused=True)

        name = self.vm.config.name or "NAME"
        text = (
            f"the source was lost before it handed the machine over ({error}); if it does not run there: "
            f"vmm resume {name}, else: vmm kill {name}"
        )
        self.vm.obstacle = Obstacle(text, clear)
        self.vm.tell(text)
        self._receiver.has_arrived(self.vm, answering=LATE_SECONDS)

    async def asked(self, *, drop: bool) -> str:
        """What became of the machine; with `drop` it goes unless it runs."""
        if self.phase == "running":
            return "running"
        if not drop:
            return "waiting" if self.phase in ("ready", "taken") else "dropped"
        self.phase = "failed"
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._give_back()
        self._receiver.failed(StateError("the source took the machine back"))
        await self._discard("the source took the machine back")
        return "dropped"

    async def _discard(self, why: str) -> None:
        if self.fetching is not None:
            await self.fetching.aclose()
        if self._built:
            self.vm.end(Outcome(Reason.KILLED, f"the migration failed: {why}"))
            self._views = []
            with contextlib.suppress(VmmError):
                await self.vm.aclose()
        for path in self._made:
            with contextlib.suppress(OSError):
                path.unlink()
        self._made.clear()

    async def settled(self) -> None:
        """Until a machine that runs here has all of its memory, or has ended."""
        if self._task is not None and self.phase == "running" and self.fetching is not None and self.fetching.needed:
            await asyncio.wait((self._task,))

    async def aclose(self) -> None:
        """Give up a machine that has not arrived, and all connections. Idempotent."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for link in self._links:
            link.abort()
        if self._pings is not None:
            self._pings.cancel()
            await asyncio.gather(self._pings, return_exceptions=True)
        for link in self._links:
            await asyncio.to_thread(link.close)
        if self.fetching is not None:
            await self.fetching.aclose()
        self._threads.close()
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        if self.phase in ("building", "receiving", "failed"):
            await self._discard("given up")


@asynccontextmanager
async def receive(
    uri: str,
    *,
    tls: Path | str | None = None,
    trust: bool = False,
    disks: Mapping[str, Path | str] | None = None,
    **options: Any,
) -> AsyncIterator[VirtualMachine]:
    """A machine that arrives by live migration: the block begins when it runs here, and ends it. The arguments are
    Receiver's."""
    async with Receiver(uri, tls=tls, trust=trust, disks=disks, **options) as receiver:
        vm = await receiver.arrive()
        try:
            yield vm
        finally:
            await vm.aclose()
