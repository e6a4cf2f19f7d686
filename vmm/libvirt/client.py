"""One connection of a client: its calls are answered, its streams moved, its events sent; what it does wrong ends it
alone.

Calls of one client run beside each other, MAX_CALLS at most; while as many run, or while the client does not read what
it was sent, nothing more is read from it. A client that falls MAX_UNREAD behind with its events is cut off. Loop
thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from vmm.errors import VmmError
from vmm.libvirt import rpc
from vmm.libvirt.errors import Code, From, LibvirtError, translated
from vmm.libvirt.names import NAMES, api_name
from vmm.libvirt.procedures import Procedure
from vmm.libvirt.rpc import RpcHeader, RpcKind, RpcMessage, RpcStatus
from vmm.libvirt.stream import Stream
from vmm.libvirt.wire import Signature, encode_error
from vmm.libvirt.xdr import XdrError

if TYPE_CHECKING:
    from vmm.libvirt.daemon import Daemon
    from vmm.libvirt.events import Subscriptions

MAX_CALLS = 5
"""Calls of one client that are worked on at a time, as libvirt's max_client_requests."""
MAX_STREAMS = 16
MAX_UNREAD = 16 << 20
"""Bytes of answers and events that a client may leave unread before it is cut off."""
WRITE_BUFFER = 1 << 20
"""Bytes unread from which on nothing more is read from the client."""
GREETING_SECONDS = 30.0
"""How long a client may take to open its connection."""
MESSAGE_SECONDS = 120.0
"""How long a message may take from its first byte to its last."""
KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 5.0, 5
"""A client that takes part in keepalive and lets so many intervals pass in silence is gone, as libvirt has it."""

log = logging.getLogger(__name__)


class Client:
    """A connection; `serve` is its life."""

    def __init__(
        self,
        daemon: Daemon,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        who: str,
        read_only: bool,
        secure: bool = True,
        credentials: tuple[int, int, int] = (0, 0, 0),
        subject: str = "",
        address: str = "",
        admin: bool = False,
    ) -> None:
        """`credentials`: process, user and group of a UNIX socket's client; `subject` and `address`: of TLS's; `admin`:
        it came by the socket for administration."""
        self.daemon = daemon
        self.credentials, self.subject, self.address, self.admin = credentials, subject, address, admin
        self.number = next(_numbers)
        self.since = time.time()
        self.who = who
        """For the log: a user or a certificate's name."""
        self.read_only = read_only
        self.secure = secure
        self.uri: str | None = None
        """The name that it opened; None before."""
        self.wants_close = False
        """It asked to be told when the daemon ends."""
        self.subscriptions: Subscriptions = daemon.events.subscriptions(self)
        self._reader, self._writer = reader, writer
        self._calls: set[asyncio.Task[None]] = set()
        self._changes: set[asyncio.Task[None]] = set()
        """Those of them that change something: they go on when the client leaves."""
        self._slots = asyncio.Semaphore(MAX_CALLS)
        self._streams: dict[int, Stream] = {}
        self._last_heard = 0.0
        self._keepalive: asyncio.Task[None] | None = None
        writer.transport.set_write_buffer_limits(high=WRITE_BUFFER)

    async def serve(self) -> None:
        """Until the client goes, is sent away, or is cancelled."""
        greeting = asyncio.get_running_loop().call_later(GREETING_SECONDS, self._late)
        try:
            while True:
                message = await self._next()
                if message.header.program == rpc.KEEPALIVE:
                    self._answer_keepalive(message.header)
                elif message.header.kind == RpcKind.STREAM or message.header.kind == RpcKind.HOLE:
                    await self._to_stream(message)
                else:
                    await self._slots.acquire()
                    self._start(message)
                if self.uri is not None:
                    greeting.cancel()
                await self._writer.drain()
        except (XdrError, TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            if not isinstance(error, asyncio.IncompleteReadError | OSError):
                log.info("%s: %s", self.who, error)
        finally:
            greeting.cancel()
            await self._release()

    @property
    def working(self) -> int:
        """Calls that are worked on."""
        return len(self._calls)

    @property
    def gone(self) -> bool:
        """Whether the connection has ended."""
        return self._writer.transport.is_closing()

    def abort(self) -> None:
        """Cut the connection at once; `serve` then ends."""
        self._writer.transport.abort()

    def send_event(
        self, procedure: int, message: Signature, values: tuple[Any, ...], program: int = rpc.REMOTE
    ) -> None:
        """An event's message; a client that does not read them is cut off."""
        body = message.write(values[0] if len(values) == 1 else values)
        self._send(RpcHeader(program, rpc.VERSION, procedure, RpcKind.EVENT, 0, RpcStatus.OK), body)

    def send_stream(self, header: RpcHeader, data: bytes) -> None:
        """A message of a stream."""
        self._send(header, data)

    async def drained(self) -> None:
        """Until the client has read most of what it was sent. Raises OSError if it went away."""
        await self._writer.drain()

    def forget_stream(self, serial: int) -> None:
        """The stream is over."""
        self._streams.pop(serial, None)

    def open_stream(self, header: RpcHeader, stream: Stream) -> None:
        """Called by a handler: data of this call's serial belongs to the stream from now on. Raises LibvirtError."""
        if len(self._streams) >= MAX_STREAMS:
            raise LibvirtError(Code.OPERATION_FAILED, f"this client has {MAX_STREAMS} streams open", From.STREAMS)
        self._streams[header.serial] = stream

    def may_change(self) -> None:
        """Raises LibvirtError for a read-only client."""
        if self.read_only:
            raise LibvirtError(Code.OPERATION_DENIED, "read only access prevents this")

    def enable_keepalive(self) -> None:
        """The client takes part: from now on its silence counts."""
        if self._keepalive is None:
            self._keepalive = asyncio.create_task(self._watch_silence(), name=f"keepalive {self.who}")

    # Inside.

    async def _next(self) -> RpcMessage:
        limit = rpc.MAX_MESSAGE if self.uri is not None else rpc.MAX_GREETING
        message = await rpc.read_message(self._reader, limit, self.daemon.budget, MESSAGE_SECONDS)
        self._last_heard = asyncio.get_running_loop().time()
        return message

    def _late(self) -> None:
        if self.uri is None:
            self.abort()

    def _send(self, header: RpcHeader, body: bytes) -> None:
        transport = self._writer.transport
        if transport.is_closing():
            return
        unread = transport.get_write_buffer_size() + len(body)
        if unread > MAX_UNREAD + rpc.STREAM_CHUNK and header.kind == RpcKind.EVENT:
            log.warning("%s: cut off, for it does not read its events", self.who)
            self.abort()
            return
        self._writer.write(rpc.pack(header, body))

    def _start(self, message: RpcMessage) -> None:
        task = asyncio.create_task(self._call(message), name=f"call {message.header.procedure} of {self.who}")
        self._calls.add(task)
        task.add_done_callback(self._called)

    def _called(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._changes.discard(task)
        self._slots.release()

    async def _call(self, message: RpcMessage) -> None:
        header = message.header
        try:
            procedure = self._find(header)
            arguments = procedure.arguments.read(message.body)
            if self.uri is None and procedure.number not in BEFORE_OPEN.get(header.program, ()):
                raise LibvirtError(Code.INTERNAL_ERROR, "connection not open", From.RPC)
            if not procedure.read_only:
                self.may_change()
                self._changes.add(cast("asyncio.Task[None]", asyncio.current_task()))
            call = Call(self, header)
            body = procedure.result.write(await procedure.handler(call, **arguments))
        except asyncio.CancelledError:
            raise
        except VmmError as error:
            self._refuse(header, translated(error))
            return
        except OSError as error:
            self._refuse(header, LibvirtError(Code.OPERATION_FAILED, str(error) or type(error).__name__))
            return
        except Exception:
            log.exception("%s: procedure %d", self.who, header.procedure)
            self._refuse(header, LibvirtError(Code.INTERNAL_ERROR, "the daemon failed; its log says how", From.RPC))
            return
        try:
            self._send(header._replace(kind=RpcKind.REPLY, status=RpcStatus.OK), body)
        except XdrError as error:
            self._refuse(header, translated(error))
            return
        for then in call.afterwards:
            then()

    def _find(self, header: RpcHeader) -> Procedure:
        if header.kind != RpcKind.CALL:
            raise LibvirtError(Code.RPC, f"message type {header.kind} is not supported", From.RPC)
        if header.version != rpc.VERSION:
            raise LibvirtError(Code.RPC, f"program version {header.version} is not {rpc.VERSION}", From.RPC)
        programs = self.daemon.admin_programs if self.admin else self.daemon.programs
        table: Mapping[int, Procedure] | None = programs.get(header.program)
        if table is None:
            raise LibvirtError(Code.RPC, f"Cannot find program {header.program} version {header.version}", From.RPC)
        found = table.get(header.procedure)
        if found is None:
            if header.program == rpc.REMOTE and 0 < header.procedure < len(NAMES):
                raise LibvirtError(Code.NO_SUPPORT, api_name(header.procedure))
            raise LibvirtError(Code.RPC, f"unknown procedure: {header.procedure}", From.RPC)
        return found

    def _refuse(self, header: RpcHeader, error: LibvirtError) -> None:
        self._send(header._replace(kind=RpcKind.REPLY, status=RpcStatus.ERROR), encode_error(error))

    async def _to_stream(self, message: RpcMessage) -> None:
        stream = self._streams.get(message.header.serial)
        if stream is None:
            return  # it ended while this was on its way
        if message.header.kind == RpcKind.HOLE:
            (length,) = struct.unpack(">q", message.body[:8]) if len(message.body) == 12 else (-1,)
            await stream.hole(length)
        else:
            await stream.received(message.header.status, message.body)

    def _answer_keepalive(self, header: RpcHeader) -> None:
        if header.procedure == rpc.PING:
            self._send(RpcHeader(rpc.KEEPALIVE, rpc.VERSION, rpc.PONG, RpcKind.EVENT, 0, RpcStatus.OK), b"")

    async def _watch_silence(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(KEEPALIVE_SECONDS)
            silence = loop.time() - self._last_heard
            if silence > KEEPALIVE_SECONDS * (KEEPALIVE_COUNT + 1):
                log.info("%s: cut off after %d s of silence", self.who, silence)
                self.abort()
                return
            if silence >= KEEPALIVE_SECONDS:
                self._send(RpcHeader(rpc.KEEPALIVE, rpc.VERSION, rpc.PING, RpcKind.EVENT, 0, RpcStatus.OK), b"")

    async def _release(self) -> None:
        self.subscriptions.close()
        going = [task for task in self._calls if not (task in self._changes and self.daemon.keep(task))]
        tasks = [*going, *([self._keepalive] if self._keepalive is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in tuple(self._streams.values()):
            await stream.aclose()
        self._streams.clear()
        self._writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()
        self._writer.transport.abort()


class Call:
    """What a handler is given beside its arguments: who calls."""

    def __init__(self, client: Client, header: RpcHeader) -> None:
        self.client = client
        self.header = header
        self.daemon = client.daemon
        self.afterwards: list[Any] = []
        """Functions that are called when the reply is on its way: events that the client must see later than it."""


BEFORE_OPEN = {rpc.REMOTE: frozenset({1, 2, 60, 66, 67, 68, 69, 70}), rpc.ADMIN: frozenset({1, 2})}
"""Procedures that are answered before connect_open, by program: features and authentication."""
_numbers = itertools.count(1)
