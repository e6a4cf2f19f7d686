"""Data that flows beside calls: a console, a volume's contents. A stream belongs to the call that opened it, by serial.

    client                               daemon
    call, serial 7              →
                                ←        reply to 7
    STREAM 7 CONTINUE data      →  ←     STREAM 7 CONTINUE data; without data: no more will come
    STREAM 7 OK                 →        the client has sent all
                                ←        STREAM 7 OK, or ERROR with why
    STREAM 7 ERROR              →        the client gives it up

What the client sends goes to a `Sink`, what a `Source` gives goes to the client. Neither is ahead of the other by more
than a few messages: a slow sink holds the client's connection up, a client that does not read holds the source up.
Loop thread.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from vmm.errors import VmmError
from vmm.libvirt.errors import Code, From, LibvirtError, translated
from vmm.libvirt.rpc import STREAM_CHUNK, RpcHeader, RpcKind, RpcStatus
from vmm.libvirt.wire import encode_error

if TYPE_CHECKING:
    from vmm.libvirt.client import Client


class Endpoint(Protocol):
    """The daemon's side of a stream."""

    async def read(self, limit: int) -> bytes:
        """The next bytes for the client, limit at most; empty: there are no more. Raises VmmError, OSError."""

    async def write(self, data: bytes) -> None:
        """Bytes from the client. Raises VmmError, OSError."""

    async def finish(self) -> None:
        """The client has sent everything. Raises VmmError, OSError."""

    async def aclose(self) -> None:
        """It is over. Idempotent."""


class Stream:
    """One stream of one client."""

    def __init__(self, client: Client, header: RpcHeader, endpoint: Endpoint) -> None:
        self._client = client
        self._header = header._replace(kind=RpcKind.STREAM)
        self._endpoint = endpoint
        self._pump: asyncio.Task[None] | None = None
        self._over = False

    def start(self) -> None:
        """Begin to send what the endpoint has; called when the reply is on its way."""
        if not self._over:
            self._pump = asyncio.create_task(self._send(), name=f"stream {self._header.serial} of {self._client.who}")

    async def received(self, status: int, data: bytes) -> None:
        """A message of the client's."""
        if self._over:
            return
        try:
            if status == RpcStatus.CONTINUE:
                if data:
                    await self._endpoint.write(data)
            elif status == RpcStatus.OK:
                await self._endpoint.finish()
                await self._end(RpcStatus.OK)
            else:
                await self._end(RpcStatus.OK)
        except (VmmError, OSError) as error:
            await self._fail(error)

    async def hole(self, _length: int) -> None:
        """The client skips bytes, which only streams opened for that may do."""
        if not self._over:
            await self._fail(LibvirtError(Code.OPERATION_INVALID, "this stream takes no holes", From.STREAMS))

    async def disconnect(self) -> None:
        """Another client takes what this one had: it hears that there is no more."""
        if not self._over:
            self._client.send_stream(self._header._replace(status=RpcStatus.CONTINUE), b"")
            self._client.forget_stream(self._header.serial)
            await self.aclose()

    async def aclose(self) -> None:
        """Without a word to the client. Idempotent."""
        self._over = True
        if self._pump is not None and self._pump is not asyncio.current_task():
            pump, self._pump = self._pump, None
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
        with suppress(OSError, VmmError):
            await self._endpoint.aclose()

    async def _send(self) -> None:
        client = self._client
        try:
            while data := await self._endpoint.read(STREAM_CHUNK):
                client.send_stream(self._header._replace(status=RpcStatus.CONTINUE), data)
                await client.drained()
            client.send_stream(self._header._replace(status=RpcStatus.CONTINUE), b"")
        except (VmmError, OSError) as error:
            await self._fail(error)

    async def _end(self, status: RpcStatus, body: bytes = b"") -> None:
        self._client.forget_stream(self._header.serial)
        await self.aclose()
        self._client.send_stream(self._header._replace(status=status), body)

    async def _fail(self, error: VmmError | OSError) -> None:
        failure = translated(error) if isinstance(error, VmmError) else LibvirtError(Code.OPERATION_FAILED, str(error))
        await self._end(RpcStatus.ERROR, encode_error(failure))
