"""The HTTP server of sandboxes in the loop of their machines: uvicorn, which listens, and what ends it. Loop thread.

SIGTERM lets requests under way end, for so long as is allowed; then running sandboxes are paused, for the next server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cpu.values import dataclass
from vmm.errors import ConfigError, HostError, os_reason
from vmm.sandboxes.serve.control import application
from vmm.sandboxes.serve.edge import Edge
from vmm.sandboxes.serve.fleet import Fleet, FleetSettings
from vmm.sandboxes.serve.tokens import Tokens

HEAD_SECONDS = 20.0
"""How long a client may take for the head of a request."""
KEEPALIVE_SECONDS = 75
CONNECTIONS = 4096
MAX_HEAD = 64 << 10
BACKLOG = 512
DRAIN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where it listens, for whom, and how it ends."""

    fleet: FleetSettings
    host: str = "127.0.0.1"
    port: int = 3000
    tokens: Tokens | None = None
    domain: str = ""
    """Behind "PORT-ID." the host name of a sandbox's port; by default localhost and the port."""
    drain: float = DRAIN_SECONDS


class _Protocol(HttpToolsProtocol):
    """A connection whose client must send a request's head in time."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._forget_head()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._forget_head()
        self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class _Uvicorn(uvicorn.Server):
    """Signals are the caller's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class SandboxServer:
    """Use in `async with`; then serve(). Raises ConfigError, HostError."""

    def __init__(self, settings: ServerSettings) -> None:
        if settings.tokens is None and not _is_loopback(settings.host):
            raise ConfigError(
                f"{settings.host}: whoever reaches it could run programs here; "
                "give --token-file, or listen on 127.0.0.1"
            )
        self._settings = settings
        self._tokens = settings.tokens or Tokens(None)
        self._socket: socket.socket | None = None
        self.fleet = Fleet(settings.fleet)
        self._stopping = asyncio.Event()
        self.host, self.port = settings.host, settings.port
        """Where it listens, once entered."""
        self.asks_tokens = settings.tokens is not None

    async def __aenter__(self) -> SandboxServer:
        settings = self._settings
        try:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            listener = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
        except (OSError, OverflowError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else str(error)
            raise HostError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from error
        listener.setblocking(False)
        self._socket = listener
        self.port = listener.getsockname()[1]
        try:
            await self.fleet.__aenter__()
        except BaseException:
            listener.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.fleet.aclose()
        if self._socket is not None:
            self._socket.close()

    def stop(self) -> None:
        """Let serve() end, after what is under way."""
        self._stopping.set()

    async def serve(self) -> None:
        """Until stop(); then requests under way end, and what runs is paused."""
        domain = self._settings.domain or f"localhost:{self.port}"
        control = application(self.fleet, self._tokens, domain)
        edge = Edge(self.fleet, control, self._tokens.by_name)
        config = uvicorn.Config(
            edge,
            loop="none",
            http=_Protocol,
            ws="websockets-sansio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEPALIVE_SECONDS,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client may not fill the log
        server = _Uvicorn(config)
        assert self._socket is not None
        serving = asyncio.create_task(server.serve(sockets=[self._socket]), name="http")
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._drain(edge)
        finally:
            stopping.cancel()
            server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)

    async def _drain(self, edge: Edge) -> None:
        """Nothing new is taken on; what is under way gets its time; then sandboxes are paused."""
        self.fleet.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain):
                await edge.idle.wait()
        await self.fleet.pause_all()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
