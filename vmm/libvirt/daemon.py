"""The daemon: its sockets, its clients, and what they share. It runs no guest.

    async with Daemon(settings) as daemon:
        await daemon.serve()

A client comes by a UNIX socket, where the kernel says who it is, or by TLS, where its certificate does. Loop thread.
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import pwd
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmm.errors import ConfigError, HostError, VmmError, os_reason
from vmm.libvirt import (
    admin_calls,
    agent_calls,
    block_calls,
    connect_calls,
    device_calls,
    domain_calls,
    dump_calls,
    event_calls,
    hostdevice_calls,
    migrate_calls,
    network_calls,
    pinning_calls,
    rpc,
    snapshot_calls,
    statistics_calls,
    storage_calls,
    stream_calls,
)
from vmm.libvirt.client import Client
from vmm.libvirt.connect_calls import CONNECTION_CLOSED
from vmm.libvirt.domain import Domain
from vmm.libvirt.domains import SCAN_SECONDS, SETTLE_SECONDS, Domains
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.events import Hub
from vmm.libvirt.migrate_calls import AwaitedMachine
from vmm.libvirt.networks import Networks
from vmm.libvirt.procedures import joined
from vmm.libvirt.rpc import Budget
from vmm.libvirt.saves import Saves
from vmm.libvirt.spec import Spec
from vmm.libvirt.storage import Pools
from vmm.libvirt.store import Store
from vmm.libvirt.wire import Signature
from vmm.management.registry import runtime_directory
from vmm.management.sockets import listen

MAX_CLIENTS = 5000
"""As libvirt's max_clients."""
MAX_GREETING_CLIENTS = 100
"""Clients that have not opened their connection yet."""
MAX_LEFT = 64
"""Calls that go on though their clients have left."""
MESSAGE_MEMORY = 128 << 20
"""Bytes of large messages of all clients together while they arrive."""
SOCKET, ADMIN_SOCKET = "libvirt-sock", "libvirt-admin-sock"
CLOSED_EVENT, CLOSED_MESSAGE = 362, Signature("reason:int")
MODULES = (
    connect_calls,
    domain_calls,
    pinning_calls,
    dump_calls,
    device_calls,
    block_calls,
    event_calls,
    hostdevice_calls,
    migrate_calls,
    network_calls,
    snapshot_calls,
    statistics_calls,
    storage_calls,
    stream_calls,
    agent_calls,
)
PROGRAMS = {rpc.REMOTE: joined(module.calls for module in MODULES), rpc.QEMU: joined([agent_calls.qemu])}
ADMIN_PROGRAMS = {rpc.ADMIN: joined([admin_calls.calls])}
log = logging.getLogger(__name__)


@dataclass
class ClientLimits:
    """How many may be connected, and how many of them that have not opened their connection yet."""

    clients: int = MAX_CLIENTS
    greeting: int = MAX_GREETING_CLIENTS


@dataclass(frozen=True)
class Settings:
    """What `vmm daemon` is told."""

    launcher: Sequence[str]
    """The command whose `run` runs a machine, as a list."""
    emulator: str
    """What clients are told is the emulator: the path of `vmm`."""
    state: Path
    socket: Path | None = None
    """None: `libvirt-sock` in the runtime directory. Beside it is a read-only one with "-ro" behind its name."""
    group: str | None = None
    """A group whose members may connect as well."""
    listen_tls: str | None = None
    """HOST:PORT for clients with certificates."""
    tls: Path | None = None
    """The directory of certificates (vmm/libvirt/tls.py); None: libvirt's standard places."""


def default_state() -> Path:
    """Where definitions are kept if nothing is said."""
    if os.getuid() == 0:
        return Path("/var/lib/loopvisor")
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "loopvisor"


class Daemon:
    """One daemon; entering it listens."""

    def __init__(self, settings: Settings, kinds: tuple[str, ...]) -> None:
        """`kinds`: the domain types that work on this host, the best first. Raises ConfigError, HostError."""
        self.settings = settings
        self.kinds = kinds
        self.emulator = settings.emulator
        self.programs, self.admin_programs = PROGRAMS, ADMIN_PROGRAMS
        self.limits = ClientLimits()
        self.log_filters: dict[str, int] = {}
        """Levels that virt-admin chose, by loggers."""
        self.budget = Budget(MESSAGE_MEMORY)
        self.events = Hub()
        self.store = Store(settings.state)
        self.networks = Networks(self.store, self.events)
        self.domains = Domains(self.store, self.events, settings.launcher, settings.emulator, self.networks)
        self.saves = Saves(self.store, self.domains)
        self.pools = Pools(self.store, self.events)
        self.arrivals: dict[str, AwaitedMachine] = {}
        """Processes that wait for machines of other hosts, by name (migrate_calls)."""
        self.socket = settings.socket or runtime_directory() / SOCKET
        self._clients: dict[asyncio.Task[None], Client] = {}
        self._left: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._paths: list[Path] = []
        self._scanner: asyncio.Task[None] | None = None
        self.tls: Any = None
        """The TLS listener, if there is one."""
        self._stopped = asyncio.Event()
        self._notice = asyncio.Condition()

    async def __aenter__(self) -> Self:
        """Load what is defined, find what runs, start what is marked for it, listen. Raises ConfigError, HostError."""
        try:
            self.domains.load()
            self.pools.load()
            self.networks.load()
            await self.networks.resume()
            self.domains.end_expecting()
            await self.domains.scan()
            for path, read_only in ((self.socket, False), (self.socket.with_name(self.socket.name + "-ro"), True)):
                await self._listen(path, read_only=read_only)
            await self._listen(self.socket.with_name(ADMIN_SOCKET), admin=True)
            if self.settings.listen_tls is not None:
                from vmm.libvirt.tls import Files, TlsListener  # OpenSSL takes a while to load

                self.tls = TlsListener(self.settings.listen_tls, Files(self.settings.tls), self._tls_client)
                self.tls.start()
            self._scanner = asyncio.create_task(self._scan(), name="scan")
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def serve(self) -> None:
        """Until `stop` is called."""
        await self._stopped.wait()

    def stop(self) -> None:
        """Let `serve` return."""
        self._stopped.set()

    def reload(self) -> None:
        """Read certificates, revocation list and allowed subjects anew; who is connected stays."""
        if self.tls is not None:
            try:
                self.tls.reload()
            except ConfigError as error:
                log.error("%s; the old certificates are used on", error)
            else:
                log.info("certificates read anew")

    async def autostart(self) -> None:
        """Start the domains that are marked for it; what fails is told."""
        for domain in self.domains.all():
            if domain.persistent is not None and not domain.active and self.domains.autostart(domain):
                try:
                    await self.start(domain, paused=False)
                except VmmError as error:
                    log.error("%s: not started: %s", domain.name, error)

    async def start(self, domain: Domain, *, paused: bool) -> None:
        """A persistent domain, from its managed save if it has one. Raises VmmError."""
        if not domain.active and self.saves.has_managed(domain):
            await self.saves.start_managed(domain, paused=paused)
        else:
            await self.domains.start(domain, paused=paused)

    def clients(self) -> list[Client]:
        """Who is connected."""
        return list(self._clients.values())

    def keep(self, task: asyncio.Task[None]) -> bool:
        """A client left while a call of its changed something: whether that may go on to its end."""
        if len(self._left) >= MAX_LEFT or self._stopped.is_set():
            return False
        self._left.add(task)
        task.add_done_callback(self._left.discard)
        return True

    def checked(self, spec: Spec) -> Spec:
        """A definition that this host can have. Raises LibvirtError."""
        kind = {"kvm": "kvm", "soft": "qemu"}.get(spec.config.core)
        if kind is not None and kind not in self.kinds:
            raise LibvirtError(
                Code.CONFIG_UNSUPPORTED,
                f"domains of type '{kind}' do not run on this host; here is {' or '.join(self.kinds)}",
            )
        return spec

    async def settled(self, condition: Callable[[], bool]) -> None:
        """Until what a machine was told has come back as its event. Raises HostError if it does not."""
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
        while not condition():
            if asyncio.get_running_loop().time() > deadline:
                raise HostError("the machine did not do what it was told")
            await asyncio.sleep(0.002)

    async def aclose(self) -> None:
        """Send clients away and stop listening; the machines go on. Idempotent."""
        self._stopped.set()
        arrivals, self.arrivals = self.arrivals, {}
        arrived = {domain.pid for domain in self.domains.all() if domain.active}
        for arrival in arrivals.values():
            if arrival.process.pid not in arrived:
                arrival.process.kill()
        if self.tls is not None:
            await self.tls.aclose()
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._paths.clear()
        if self._scanner is not None:
            self._scanner.cancel()
            await asyncio.gather(self._scanner, return_exceptions=True)
        for client in self._clients.values():
            if client.wants_close:
                client.send_event(CLOSED_EVENT, CLOSED_MESSAGE, (CONNECTION_CLOSED,))
        tasks = tuple(self._clients)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        left = tuple(self._left)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self.domains.aclose()
        self.networks.close()
        self.store.close()

    # Inside.

    async def _scan(self) -> None:
        while True:
            await asyncio.sleep(SCAN_SECONDS)
            try:
                await self.domains.scan()
                self.domains.keep_pinned()
                migrate_calls.end_left(self)
            except VmmError as error:
                log.warning("machines: %s", error)

    async def _listen(self, path: Path, *, read_only: bool = False, admin: bool = False) -> None:
        listener = listen(path, "socket")
        self._paths.append(path)
        try:
            if self.settings.group is not None and not admin:
                try:
                    group = grp.getgrnam(self.settings.group).gr_gid
                except KeyError:
                    raise ConfigError(f"group: there is no group {self.settings.group!r}") from None
                try:
                    os.chown(path, -1, group)
                    path.chmod(0o660)
                except OSError as error:
                    raise HostError(f"group {self.settings.group}: {os_reason(error)}") from error
            # The clients' tasks are this object's; asyncio's own would be cancelled with a complaint.
            self._servers.append(
                await asyncio.start_unix_server(
                    lambda reader, writer: self._unix_client(reader, writer, read_only=read_only, admin=admin),
                    sock=listener,
                )
            )
        except BaseException:
            listener.close()
            raise

    def _unix_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, read_only: bool, admin: bool
    ) -> None:
        peer: socket.socket = writer.get_extra_info("socket")
        pid, uid, gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        who = f"{_user(uid)}, process {pid}"
        self._accept(reader, writer, who=who, read_only=read_only, admin=admin, credentials=(pid, uid, gid))

    def _tls_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, subject: str, address: str
    ) -> None:
        who = f"{subject}, {address}"
        self._accept(reader, writer, who=who, read_only=False, subject=subject, address=address)

    def _accept(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        who: str,
        read_only: bool,
        admin: bool = False,
        **more: Any,
    ) -> None:
        greeting = sum(client.uri is None for client in self._clients.values())
        full = len(self._clients) >= self.limits.clients or greeting >= self.limits.greeting
        if full and not admin:  # who can let others in must come in
            log.warning("%s: sent away, for there are too many clients", who)
            writer.transport.abort()
            return
        client = Client(self, reader, writer, who=who, read_only=read_only, admin=admin, **more)
        task = asyncio.create_task(self._serve(client), name=f"client {who}")
        self._clients[task] = client
        task.add_done_callback(self._clients.pop)

    async def _serve(self, client: Client) -> None:
        try:
            await client.serve()
        except Exception:
            log.exception("%s: the connection failed", client.who)


def _user(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"uid {uid}"
