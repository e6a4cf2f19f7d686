"""Socket device (virtio 1.2, 5.10): stream connections between guest and host, with credit. Loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
from dataclasses import dataclass
from typing import Annotated, ClassVar

from virtio.backends.vsock import Streams, VsockBackend, stream_pair
from virtio.constants import DeviceId
from virtio.device import Activation, Device
from virtio.errors import ConfigError, GuestError
from virtio.layouts import VsockConfig, VsockEvent, VsockHeader, fast
from virtio.queue import Queue

HOST_CID = 2
STREAM = 1
BUFFER = 256 << 10
"""Bytes that a guest may send ahead on one connection (buf_alloc)."""
CHUNK = 64 << 10
CONNECTIONS_MAX = 256
"""Each holds up to three descriptors of this process and BUFFER bytes. As many may wait, closed, for a host that has
not read everything."""
PACKETS_WAITING = 256
"""Packets that wait for the guest's buffers before the device takes no more from it."""
FIRST_PORT = 1 << 30
_header = fast(VsockHeader)
_event = fast(VsockEvent)
EVENT_TRANSPORT_RESET = 0
SHUTDOWN_RECEIVE, SHUTDOWN_SEND = 1, 2


class Op(enum.IntEnum):
    """5.10.6"""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Connection:
    """One stream: the host's end as a pair of asyncio streams, the credit of both directions (5.10.6.3)."""

    def __init__(self, host_port: int, guest_port: int) -> None:
        self.host_port = host_port
        self.guest_port = guest_port
        self.streams: Streams | None = None
        self.accepted: asyncio.Future[None] | None = None
        self.peer_alloc = 0
        self.peer_forwarded = 0
        self.sent = 0
        self.received = 0
        self.forwarded = 0
        self.told = 0
        self.guest_done = False
        self.host_done = False
        self.inbox = bytearray()
        """From the guest, not yet written to the host's end. Bounded by credit: BUFFER bytes at most."""
        self.ended = False
        """Nothing more comes into `inbox`."""
        self.gone = False
        """The guest ended it: it hears nothing of it any more."""
        self.closed = False
        """The host's end is closed: what still works for the connection ends."""
        self.dialing: asyncio.Task[None] | None = None
        self.arrived = asyncio.Event()
        self.credit = asyncio.Event()

    @property
    def room(self) -> int:
        """Bytes that the guest still takes."""
        return self.peer_alloc - ((self.sent - self.peer_forwarded) & 0xFFFFFFFF)

    def put(self, data: bytes) -> None:
        """Bytes from the guest."""
        self.inbox += data
        self.arrived.set()

    def end(self) -> None:
        """The guest sends no more."""
        self.ended = True
        self.arrived.set()

    def close(self) -> None:
        """Drop the connection at once."""
        self.closed = True
        self.arrived.set()
        self.credit.set()
        if self.dialing is not None:
            self.dialing.cancel()
        if self.streams is not None:
            self.streams[1].close()
        if self.accepted is not None and not self.accepted.done():
            self.accepted.set_exception(ConnectionResetError("the guest refused, or its vsock device was reset"))
            self.accepted.exception()  # also if `open` gave up and does not look at it


Packet = tuple[Connection | None, int, int, Op, int, bytes]
"""connection, host port, guest port, operation, flags, data"""


@dataclass(frozen=True, slots=True)
class VsockState:
    """The guest's context id."""

    kind: ClassVar = "virtio-vsock"
    version: ClassVar = 1
    cid: Annotated[int, range(3, 0xFFFFFFFF)]


class VsockDevice(Device):
    """`cid` is the guest's context id, 3 or more."""

    device_id = DeviceId.SOCKET
    state_type = VsockState
    queue_sizes = (128, 128, 64)  # 5.10.2: rx, tx, event

    def __init__(self, backend: VsockBackend, cid: int = 3) -> None:
        super().__init__()
        if not 3 <= cid < 0xFFFFFFFF:
            raise ConfigError(f"vsock: {cid} is no guest's context id; 3 is the first")
        self.backend = backend
        self.cid = cid
        self._connections: dict[tuple[int, int], Connection] = {}
        self._outgoing: asyncio.Queue[Packet] = asyncio.Queue(PACKETS_WAITING)
        self._ports = itertools.count(FIRST_PORT)
        self._lingering: list[asyncio.WriteTransport] = []
        """Closed, with bytes that the host has not read yet. CONNECTIONS_MAX at most."""
        self._reset_owed = False
        """The driver has not heard yet that its connections are gone."""

    def config(self) -> bytes:
        result: bytes = VsockConfig.build({"guest_cid": self.cid})
        return result

    async def start(self) -> None:
        """Let the host's side in."""
        await self.backend.start(self.open)

    async def open(self, port: int) -> Streams:
        """A connection to the guest's `port`; ConnectionError if it is refused or the guest has no driver."""
        if not self.is_active or len(self._connections) >= CONNECTIONS_MAX:
            raise ConnectionRefusedError("the guest does not take vsock connections now")
        host_port = next(number for number in self._ports if (number, port) not in self._connections)
        connection = Connection(host_port, port)
        connection.accepted = asyncio.get_running_loop().create_future()
        key = host_port, port
        self._connections[key] = connection
        try:
            await self._send(connection, Op.REQUEST)
            await connection.accepted
            ours, theirs = await stream_pair()
        except BaseException:
            if self._forget(connection) and self.is_active:
                with contextlib.suppress(asyncio.QueueFull):
                    self._outgoing.put_nowait((None, *key, Op.RST, 0, b""))
            raise
        self._run(connection, ours)
        return theirs

    # Life

    def started(self, active: Activation) -> None:
        self._outgoing = asyncio.Queue(PACKETS_WAITING)
        self.spawn(self._deliver(active.queues[0]), "receive")
        self.spawn(self._take(active.queues[1]), "transmit")
        if self._reset_owed:
            self.spawn(self._transport_reset(active.queues[2]), "event")

    def stopped(self) -> bool:
        self._reset_owed = False
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            self._close(connection)
        return True

    async def aclose(self) -> None:
        await super().aclose()
        await self.backend.aclose()

    def save_device(self) -> VsockState:
        """Connections do not move: the other end of each is a process of this host."""
        return VsockState(self.cid)

    def restore_device(self, state: VsockState) -> None:
        self.cid = state.cid
        self._reset_owed = True

    async def _transport_reset(self, queue: Queue) -> None:
        # 5.10.6.7: "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET": the guest closes its connections and reads its cid again
        async for chain in queue:
            chain.write(_event.pack(EVENT_TRANSPORT_RESET))
            queue.complete(chain)
            self._reset_owed = False
            return

    # To the guest

    def _known(self, connection: Connection) -> bool:
        """Not ended; its ports may be another connection's since."""
        return self._connections.get((connection.host_port, connection.guest_port)) is connection

    async def _send(self, connection: Connection, op: Op, flags: int = 0, data: bytes = b"") -> None:
        if self._known(connection):
            await self._put(connection, op, flags, data)

    async def _put(self, connection: Connection, op: Op, flags: int = 0, data: bytes = b"") -> None:
        await self._outgoing.put((connection, connection.host_port, connection.guest_port, op, flags, data))

    async def _deliver(self, queue: Queue) -> None:
        while True:
            connection, host_port, guest_port, op, flags, data = await self._outgoing.get()
            while connection is None or not connection.gone:
                chain = await anext(queue)
                if connection is not None and connection.gone:
                    queue.ring.undo_pop(chain)
                    break
                if chain.writable_length < _header.size:
                    raise GuestError("a vsock receive buffer is smaller than a packet header")
                part = data[: chain.writable_length - _header.size]
                if data and not part:
                    raise GuestError("a vsock receive buffer has no room for data")
                chain.write(self._packet(connection, host_port, guest_port, op, flags, len(part)) + part)
                queue.complete(chain)
                data = data[len(part) :]
                if not data:
                    break

    def _packet(
        self, connection: Connection | None, host_port: int, guest_port: int, op: Op, flags: int, length: int
    ) -> bytes:
        # 5.10.6.3.2: "All packets associated with a stream flow MUST contain valid information in buf_alloc and fwd_cnt
        # fields."
        alloc, forwarded = BUFFER, connection.forwarded if connection is not None else 0
        if connection is not None:
            connection.told = forwarded
        return _header.pack(
            HOST_CID, self.cid, host_port, guest_port, length, STREAM, op, flags, alloc, forwarded & 0xFFFFFFFF
        )

    async def _pump_out(self, connection: Connection, reader: asyncio.StreamReader) -> None:
        """Host to guest, as far as the guest's credit goes."""
        while True:
            # 5.10.6.3.2: "VIRTIO_VSOCK_OP_RW data packets MUST only be transmitted when the peer has sufficient free
            # buffer space for the payload."
            while connection.room <= 0 and not connection.closed:
                connection.credit.clear()
                await connection.credit.wait()
            if connection.closed:
                return
            try:
                data = await reader.read(min(connection.room, CHUNK))
            except OSError:
                data = b""
            if not data:
                break
            connection.sent += len(data)
            await self._send(connection, Op.RW, 0, data)
        connection.host_done = True
        await self._send(connection, Op.SHUTDOWN, SHUTDOWN_SEND)
        await self._finish(connection)

    async def _pump_in(self, connection: Connection, writer: asyncio.StreamWriter) -> None:
        """Guest to host, as fast as the host takes it."""
        while True:
            while not (connection.inbox or connection.ended or connection.closed):
                connection.arrived.clear()
                await connection.arrived.wait()
            if connection.closed:
                return
            data, connection.inbox = connection.inbox, bytearray()
            if not data:
                break
            try:
                writer.write(data)
                await writer.drain()
            except OSError:
                await self._reset(connection)
                return
            connection.forwarded += len(data)
            # tell the guest before its credit runs out
            if connection.forwarded - connection.told >= BUFFER // 4:
                await self._send(connection, Op.CREDIT_UPDATE)
        if writer.can_write_eof() and not writer.is_closing():
            with contextlib.suppress(OSError):
                writer.write_eof()
        connection.guest_done = True
        await self._finish(connection)

    async def _finish(self, connection: Connection) -> None:
        # 5.10.6.5: a clean disconnect ends with VIRTIO_VSOCK_OP_RST when both directions are done
        if connection.guest_done and connection.host_done:
            await self._reset(connection)

    async def _reset(self, connection: Connection) -> None:
        if self._forget(connection):
            await self._put(connection, Op.RST)

    def _forget(self, connection: Connection) -> bool:
        known = self._known(connection)
        if known:
            del self._connections[connection.host_port, connection.guest_port]
        self._close(connection)
        return known

    def _close(self, connection: Connection) -> None:
        connection.close()
        if connection.streams is None:
            return
        waiting = [*self._lingering, connection.streams[1].transport]
        waiting = [transport for transport in waiting if transport.get_write_buffer_size()]
        for transport in waiting[:-CONNECTIONS_MAX]:
            transport.abort()
        self._lingering = waiting[-CONNECTIONS_MAX:]

    def _run(self, connection: Connection, streams: Streams) -> None:
        connection.streams = streams
        if not self._known(connection):
            self._close(connection)
            return
        self.spawn(self._pump_out(connection, streams[0]), "to-guest")
        self.spawn(self._pump_in(connection, streams[1]), "to-host")

    # From the guest

    async def _take(self, queue: Queue) -> None:
        async for chain in queue:
            header = chain.read(_header.size)
            if len(header) < _header.size:
                raise GuestError("a vsock packet is smaller than its header")
            fields = _header.unpack(header)
            length = fields[4]
            data = chain.read(length, _header.size) if length <= BUFFER else b""
            queue.complete(chain, 0)
            await self._packet_from_guest(fields, data)

    async def _packet_from_guest(self, fields: tuple[int, ...], data: bytes) -> None:
        src_cid, dst_cid, guest_port, host_port, length, kind, op, flags, alloc, forwarded = fields
        connection = self._connections.get((host_port, guest_port))
        # 5.10.6.4.1: "The guest_cid configuration field MUST be used as the source CID"; 5.10.6.4.2: "A
        # VIRTIO_VSOCK_OP_RST reply MUST be sent if a packet is received with an unknown type value."
        if src_cid != self.cid or dst_cid != HOST_CID or kind != STREAM or len(data) != length:
            await self._refuse(host_port, guest_port, op)
            return
        if op == Op.REQUEST:
            if connection is None and len(self._connections) < CONNECTIONS_MAX:
                connection = Connection(host_port, guest_port)
                connection.peer_alloc, connection.peer_forwarded = alloc, forwarded
                self._connections[host_port, guest_port] = connection
                connection.dialing = self.spawn(self._dial(connection), "dial")
            else:
                await self._refuse(host_port, guest_port, op)
            return
        if connection is None:
            await self._refuse(host_port, guest_port, op)
            return
        connection.peer_alloc, connection.peer_forwarded = alloc, forwarded
        connection.credit.set()
        await self._connected(connection, op, flags, data)

    async def _connected(self, connection: Connection, op: int, flags: int, data: bytes) -> None:
        match op:
            case Op.RESPONSE:
                if connection.accepted is not None and not connection.accepted.done():
                    connection.accepted.set_result(None)
                    return
                await self._reset(connection)
            case Op.RST:
                connection.gone = True
                self._forget(connection)
            case Op.SHUTDOWN:
                if flags & SHUTDOWN_RECEIVE:
                    connection.host_done = True
                if flags & SHUTDOWN_SEND:
                    connection.end()
                await self._finish(connection)
            case Op.RW:
                connection.received += len(data)
                # 5.10.6.3.1: the driver keeps to the credit; one that does not loses its connection
                if connection.received - connection.forwarded > BUFFER or connection.ended:
                    await self._reset(connection)
                elif data:
                    connection.put(data)
            case Op.CREDIT_REQUEST:
                await self._send(connection, Op.CREDIT_UPDATE)
            case Op.CREDIT_UPDATE:
                return
            case _:
                await self._reset(connection)

    async def _refuse(self, host_port: int, guest_port: int, op: int) -> None:
        if op != Op.RST:
            await self._outgoing.put((None, host_port, guest_port, Op.RST, 0, b""))

    async def _dial(self, connection: Connection) -> None:
        try:
            streams = connection.streams = await self.backend.dial(connection.host_port)
        except OSError:
            connection.dialing = None
            await self._reset(connection)
            return
        connection.dialing = None
        await self._send(connection, Op.RESPONSE)
        self._run(connection, streams)
