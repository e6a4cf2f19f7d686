"""The console on a UNIX socket: raw bytes both ways, so `vmm console` and socat serve alike.

A client gets the last 64 KiB and then what comes. One that does not read falls behind in the hub's ring and skips;
what it has not fetched costs no memory, and neither the guest nor other clients wait for it. Loop thread.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

from vmm.console.hub import ConsoleHub
from vmm.management.sockets import listen

BUFFER = 64 << 10
"""Bytes handed to a client's socket ahead of its reading."""
MAX_CLIENTS = 64
CLOSE_SECONDS = 0.5
"""How long clients may take at the end to fetch what is in their socket."""


class ConsoleClient(asyncio.Protocol):
    """One connection."""

    lossless = False

    def __init__(self, server: ConsoleServer) -> None:
        self._server = server
        self._hub = server.hub
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self.position = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=BUFFER)
        self.position = self._hub.replay_position
        if len(self._server.clients) >= MAX_CLIENTS:
            self._transport.write(b"vmm: too many clients\r\n")
            self._transport.close()
            return
        self._server.clients.add(self)
        self._hub.watch(self)
        self.wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._hub.unwatch(self)
        self._server.gone(self)
        self._transport = None

    def wake(self) -> None:
        """Send while the socket takes it."""
        transport, hub = self._transport, self._hub
        if transport is None:
            return
        while not self._paused and self.position < hub.total and not transport.is_closing():
            if self.position < hub.start:
                transport.write(b"\r\n[%d bytes skipped]\r\n" % (hub.start - self.position))
                self.position = hub.start
            data = hub.output(self.position, BUFFER)
            self.position += len(data)
            transport.write(data)
        if hub.closed and self.position >= hub.total:
            transport.close()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.wake()

    def data_received(self, data: bytes) -> None:
        if not self._hub.feed(data, self._resume_reading) and self._transport is not None:
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        return True  # a client that has nothing more to type may still watch

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class ConsoleServer:
    """Listens at `path` from `start()` on."""

    def __init__(self, hub: ConsoleHub, path: Path) -> None:
        self.hub = hub
        self.path = path
        self.clients: set[ConsoleClient] = set()
        self._server: asyncio.Server | None = None
        self._all_gone: asyncio.Event = asyncio.Event()

    async def start(self) -> None:
        """Raises ConfigError (path taken or too long) or HostError."""
        listener = listen(self.path, "console socket")
        try:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(lambda: ConsoleClient(self), sock=listener)
        except BaseException:
            listener.close()
            self.path.unlink(missing_ok=True)
            raise

    def gone(self, client: ConsoleClient) -> None:
        self.clients.discard(client)
        if not self.clients:
            self._all_gone.set()

    def close(self) -> None:
        """At once; clients may lose what they have not read."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            self.path.unlink(missing_ok=True)
        for client in tuple(self.clients):
            client.abort()

    async def aclose(self) -> None:
        """Stop listening; clients get a moment to fetch the last output. Close the hub first."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            self.path.unlink(missing_ok=True)
        try:
            if self.clients:
                self._all_gone.clear()
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._all_gone.wait()
        except TimeoutError:
            pass
        finally:
            self.close()
