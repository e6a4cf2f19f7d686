"""The stub: where a machine's debuggers connect, one at a time. Loop thread.

Who connects stops the machine; who leaves, or is cut off, lets it run on without breakpoints. The protocol knows no
passwords: whoever can connect rules the guest. So a port is one of 127.0.0.1 unless another address is named, and a
UNIX socket is its user's alone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cpu.values import dataclass
from vmm.debug.debugger import Debugger
from vmm.debug.session import GdbSession
from vmm.debug.target import ARCHITECTURES
from vmm.errors import ConfigError, HostError, VmmError, os_reason
from vmm.management.sockets import check_path, listen

if TYPE_CHECKING:
    from types import TracebackType

    from vmm.vm import VirtualMachine

LOCAL = "127.0.0.1"
LAST_WORDS = 1.0
"""Seconds that a client has to take what the machine's end is."""


@dataclass(frozen=True, slots=True)
class GdbAddress:
    """`path` of a UNIX socket, or `host` and `port` (0: one that is free)."""

    host: str = LOCAL
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> GdbAddress:
        """[HOST:]PORT or unix:PATH. Raises ConfigError."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path:
                raise ConfigError(f"gdb: {text!r} names no socket; write unix:PATH")
            check_path(Path(path), "gdb")
            return cls(path=path)
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") if colon else LOCAL
        if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
            raise ConfigError(f"gdb: {text!r} is no address; write [HOST:]PORT or unix:PATH")
        return cls(host or LOCAL, int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def target(self) -> str:
        """What follows `target remote` in GDB."""
        return self.path or str(self)


def check_architecture(name: str) -> str:
    """Raises ConfigError."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"gdb: no architecture {name!r}; known are {', '.join(ARCHITECTURES)}")
    return name


class GdbServer:
    """Listens from `start` to `aclose`; both ends of a machine's life, reboots included, are the machine's affair."""

    def __init__(self, vm: VirtualMachine, address: str, *, wait: bool = False, architecture: str = "x86-64") -> None:
        """`wait`: the machine stands still until a debugger lets it run. Raises ConfigError."""
        self._vm = vm
        self._wanted = GdbAddress.parse(address)
        self._wait = wait
        self._architecture = check_architecture(architecture)
        self._server: asyncio.Server | None = None
        self._waiting: Debugger | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self.on_close: Callable[[], None] | None = None
        self.address = str(self._wanted)
        """Where it listens, with the port that it got."""

    @property
    def target(self) -> str:
        """What follows `target remote` in GDB."""
        return GdbAddress.parse(self.address).target

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Raises ConfigError, HostError, StateError."""
        wanted = self._wanted
        listener = listen(Path(wanted.path), "gdb") if wanted.path else _listen_tcp(wanted)
        try:
            if not wanted.path:
                host, port = listener.getsockname()[:2]
                self.address = str(GdbAddress(host, port))
            if self._wait:
                self._waiting = Debugger(self._vm)
                await self._waiting.attach()
            accept = asyncio.start_unix_server if wanted.path else asyncio.start_server
            self._server = await accept(self._client, sock=listener)
        except BaseException:
            listener.close()
            await self.aclose()
            raise

    def close(self) -> None:
        """At once. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
            if self._wanted.path:
                Path(self._wanted.path).unlink(missing_ok=True)
        if self._waiting is not None:
            self._waiting.detach()
            self._waiting = None
        if self.on_close is not None:
            self.on_close()
            self.on_close = None

    async def aclose(self) -> None:
        """Debuggers are cut off, and the machine runs on."""
        self.close()
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=LAST_WORDS if self._vm.outcome is not None else 0)
            for session in self._sessions:
                session.cancel()
            await asyncio.gather(*self._sessions, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own, which may be cancelled: asyncio takes a cancelled client of a server for an error.
        await asyncio.wait([self.adopt(reader, writer)])

    def adopt(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> asyncio.Task[None]:
        """Serve a connection that came from elsewhere; start() is not needed for that."""
        task = asyncio.create_task(self._serve(reader, writer), name="gdb session")
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)
        return task

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, to its end. It is sent away if another debugs this machine."""
        waiting, self._waiting = self._waiting, None
        debugger = waiting or Debugger(self._vm)
        session = GdbSession(
            debugger, reader, writer, architecture=self._architecture, outcome=lambda: self._vm.outcome,
            kill=self._vm.kill, reset=self._vm.reset,
        )  # fmt: skip
        debugger.on_dismiss = writer.close
        try:
            if waiting is None:
                await debugger.attach()
            await session.serve()
        except VmmError:
            pass
        finally:
            debugger.on_dismiss = None
            if waiting is not None and not session.spoke and self._server is not None and debugger.attached:
                self._waiting = waiting  # nobody was there: the machine waits for the next
            else:
                debugger.detach()
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def _listen_tcp(address: GdbAddress) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"gdb: {address.host}: {os_reason(error)}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(where)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise HostError(f"gdb: {address}: {os_reason(error)}") from error
    return listener


