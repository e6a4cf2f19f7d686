"""Socket device (virtio 1.2, 5.10): stream connections between guest and host, with credit. Loop thread only.

A guest may flood the device, take no answers and reset it at any moment, so what waits is bounded, and so is the work
of one turn of the loop. What is to be sent stands in an outbox (vsock_stream.py): no task waits for the guest's receive
buffers but the one that fills them. Connections take places, and a reset leaves the closing of the host's ends to a
task of its own (vsock_host.py).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from virtio.backends.vsock import Streams, VsockBackend, stream_pair
from virtio.constants import DeviceId
from virtio.device import Activation, Device
from virtio.devices.vsock_host import SHUTDOWN_SEND, HostEnds, Places
from virtio.devices.vsock_stream import Connection, Op, Outbox, Refusal
from virtio.errors import ConfigError, GuestError
from virtio.layouts import VsockConfig, VsockEvent, VsockHeader, fast
from virtio.protocols import Chain
from virtio.queue import Queue

HOST_CID = 2
STREAM = 1
BUFFER = 256 << 10
"""Bytes that a guest may send ahead on a connection (buf_alloc); SMALL_BUFFER if there are more than AMPLE
connections."""
SMALL_BUFFER = 64 << 10
AMPLE = 32
DIALS_MAX = 16
"""Connections of the guest that the backend is asked for at a time."""
DIAL_SECONDS = 10
TOGETHER = 16
"""Packets for the guest that go out with one notification, in one turn of the loop."""
FIRST_PORT = 1 << 30
_header = fast(VsockHeader)
_event = fast(VsockEvent)
EVENTS = 2
"""The event queue's number."""
EVENT_TRANSPORT_RESET = 0
SHUTDOWN_RECEIVE = 1


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
        """Those whose ports are taken, by (host's, guest's)."""
        self._places = Places()
        self._ends = HostEnds(self._places, self._send, self._reset, type(backend).__name__)
        self._to_dial: OrderedDict[Connection, None] = OrderedDict()
        self._dials = 0
        self._outbox = Outbox()
        self._ports = itertools.count(FIRST_PORT)
        self._reset_owed = False
        """The driver has not heard yet that its connections are gone."""
        self._told = asyncio.Event()
        """It has, and has ended them: a connection that is opened before would end with them."""
        self._told.set()
        self._answered = asyncio.Event()
        """The driver itself has notified the event queue."""
        self._resuming = False

    def config(self) -> bytes:
        result: bytes = VsockConfig.build({"guest_cid": self.cid})
        return result

    async def start(self) -> None:
        """Let the host's side in."""
        await self.backend.start(self.open)

    async def open(self, port: int) -> Streams:
        """A connection to the guest's `port`. While all places are taken it waits for one. ConnectionError if the guest
        refuses, or has no driver."""
        await self._told.wait()
        await self._places.wait(lambda: self.is_active)
        if not self.is_active:
            raise ConnectionRefusedError("the guest does not take vsock connections now")
        host_port = next(number for number in self._ports if (number, port) not in self._connections)
        connection = self._add(host_port, port, by_guest=False)
        connection.accepted = asyncio.get_running_loop().create_future()
        try:
            self._outbox.put(connection, Op.REQUEST)
            await connection.accepted
            ours, theirs = await stream_pair()
        except BaseException:
            self._reset(connection)
            raise
        if not self._ends.run(connection, ours):
            theirs[1].close()
            raise ConnectionResetError("the guest ended the connection, or its vsock device was reset")
        return theirs

    # Life

    def started(self, active: Activation) -> None:
        self._outbox = Outbox()
        self.spawn(self._deliver(active.queues[0], self._outbox), "receive")
        self.spawn(self._take(active.queues[1], self._outbox), "transmit")
        if self._reset_owed:
            self.spawn(self._transport_reset(active.queues[EVENTS]), "event")

    def stopped(self) -> bool:
        self._reset_owed = False
        self._told.set()
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            self._unlist(connection)
        self._to_dial.clear()
        self._places.wake_all()
        return True

    def queue_notified(self, index: int) -> None:
        if index == EVENTS and not self._resuming:
            self._answered.set()
        super().queue_notified(index)

    def resume(self) -> None:
        self._resuming = True  # the notifications that this makes are not the driver's
        try:
            super().resume()
        finally:
            self._resuming = False

    async def aclose(self) -> None:
        await super().aclose()
        await self._ends.aclose()
        await self.backend.aclose()

    def save_device(self) -> VsockState:
        """Connections do not move: the other end of each is a process of this host."""
        return VsockState(self.cid)

    def restore_device(self, state: VsockState) -> None:
        self.cid = state.cid
        self._reset_owed = True
        self._told.clear()

    async def _transport_reset(self, queue: Queue) -> None:
        # 5.10.6.7: "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET": the guest closes its connections and reads its cid again
        async for chain in queue:
            chain.write(_event.pack(EVENT_TRANSPORT_RESET))
            queue.want_more()  # the driver makes the buffer available again once it has done what the event says
            self._answered.clear()
            queue.complete(chain)
            await self._answered.wait()
            self._reset_owed = False
            self._told.set()
            return

    # To the guest

    def _send(self, connection: Connection, op: Op, flags: int = 0, data: bytes = b"") -> None:
        if connection.listed and not connection.over:
            self._outbox.put(connection, op, flags, data)

    async def _deliver(self, queue: Queue, outbox: Outbox) -> None:
        while True:
            await outbox.wait()
            chain: Chain | None = await anext(queue)
            who = outbox.first()
            if who is None and chain is not None:  # the guest ended that connection while its packet waited
                queue.ring.undo_pop(chain)
                continue
            # What waits goes out with one notification: a guest that is told of each packet switches to its driver and
            # to the reader for each (tests.bench agent).
            for left in reversed(range(TOGETHER)):
                if who is None or chain is None:
                    break
                if chain.writable_length < _header.size:
                    raise GuestError("a vsock receive buffer is smaller than a packet header")
                if isinstance(who, Refusal):
                    chain.write(self._packet(who, Op.RST, 0, 0))
                else:
                    self._write(who, chain)
                outbox.served(who)
                queue.push(chain)
                who = outbox.first()
                chain = queue.pop() if who is not None and left else None
            queue.notify()

    def _write(self, connection: Connection, chain: Any) -> None:
        try:
            op, flags, data = connection.next_packet(chain.writable_length - _header.size)
        except ValueError as error:
            raise GuestError("a vsock receive buffer has no room for data") from error
        chain.write(self._packet(connection, op, flags, len(data)))
        chain.write(data)
        if op == Op.RST:
            self._unlist(connection)

    def _packet(self, of: Connection | Refusal, op: Op, flags: int, length: int) -> bytes:
        # 5.10.6.3.2: "All packets associated with a stream flow MUST contain valid information in buf_alloc and fwd_cnt
        # fields."
        alloc, forwarded = BUFFER, 0
        if isinstance(of, Connection):
            alloc, forwarded = of.alloc, of.forwarded
            of.told = forwarded
        return _header.pack(
            HOST_CID, self.cid, of.host_port, of.guest_port, length, STREAM, op, flags, alloc, forwarded & 0xFFFFFFFF
        )

    # Ends

    def _add(self, host_port: int, guest_port: int, *, by_guest: bool) -> Connection:
        alloc = BUFFER if self._places.taken < AMPLE else SMALL_BUFFER
        connection = Connection(host_port, guest_port, alloc, by_guest=by_guest)
        self._connections[host_port, guest_port] = connection
        self._places.take(connection)
        return connection

    def _reset(self, connection: Connection) -> None:
        """End the connection and tell the guest, after what it is to hear before."""
        if connection.over:
            return
        if connection.packets and connection.packets[0][0] == Op.REQUEST:
            self._unlist(connection)  # the guest never heard of it
            return
        self._send(connection, Op.RST)
        self._detach(connection)

    def _unlist(self, connection: Connection) -> None:
        """The guest knows, or need not know, that the connection is over: its ports are free."""
        if not connection.listed:
            return
        connection.listed = False
        self._connections.pop((connection.host_port, connection.guest_port), None)
        self._outbox.drop(connection)
        self._detach(connection)
        self._places.leave(connection)

    def _detach(self, connection: Connection) -> None:
        """Nothing more is done for the connection; its host's end will be closed."""
        if connection.over:
            return
        connection.over = True
        self._to_dial.pop(connection, None)
        self._ends.close_soon(connection)

    # From the guest

    async def _take(self, queue: Queue, outbox: Outbox) -> None:
        while True:
            await outbox.wait_for_room()
            chain = await anext(queue)
            header = chain.read(_header.size)
            if len(header) < _header.size:
                raise GuestError("a vsock packet is smaller than its header")
            fields = _header.unpack(header)
            length = fields[4]
            data = chain.read(length, _header.size) if length <= BUFFER else b""
            queue.complete(chain, 0)
            self._packet_from_guest(fields, data)
            if fields[6] in (Op.REQUEST, Op.RESPONSE):
                await asyncio.sleep(0)  # what begins a connection costs much more than other packets

    def _packet_from_guest(self, fields: tuple[int, ...], data: bytes) -> None:
        src_cid, dst_cid, guest_port, host_port, length, kind, op, flags, alloc, forwarded = fields
        connection = self._connections.get((host_port, guest_port))
        # 5.10.6.4.1: "The guest_cid configuration field MUST be used as the source CID"; 5.10.6.4.2: "A
        # VIRTIO_VSOCK_OP_RST reply MUST be sent if a packet is received with an unknown type value."
        if src_cid != self.cid or dst_cid != HOST_CID or kind != STREAM or len(data) != length:
            self._refuse(host_port, guest_port, op)
            return
        if op == Op.REQUEST:
            if connection is not None or not self._places.free_for_guest:
                self._refuse(host_port, guest_port, op)
                return
            connection = self._add(host_port, guest_port, by_guest=True)
            connection.peer_alloc, connection.peer_forwarded = alloc, forwarded
            self._to_dial[connection] = None
            self.next_turn(self._dial_next)
            return
        if connection is None:
            self._refuse(host_port, guest_port, op)
            return
        connection.peer_alloc, connection.peer_forwarded = alloc, forwarded
        if op == Op.RST:
            self._unlist(connection)
        elif not connection.over:  # else it hears so with the RST that waits for its buffers
            connection.go_on.set()
            self._connected(connection, op, flags, data)

    def _connected(self, connection: Connection, op: int, flags: int, data: bytes) -> None:
        match op:
            case Op.RESPONSE:
                if connection.accepted is not None and not connection.accepted.done():
                    connection.accepted.set_result(None)
                    return
                self._reset(connection)
            case Op.SHUTDOWN:
                if flags & SHUTDOWN_RECEIVE:
                    connection.host_done = True
                if flags & SHUTDOWN_SEND:
                    connection.end()
                self._ends.finish(connection)
            case Op.RW:
                connection.received += len(data)
                # 5.10.6.3.1: the driver keeps to the credit; one that does not loses its connection
                if connection.received - connection.forwarded > connection.alloc or connection.ended:
                    self._reset(connection)
                elif data:
                    connection.put(data)
            case Op.CREDIT_REQUEST:
                self._send(connection, Op.CREDIT_UPDATE)
            case Op.CREDIT_UPDATE:
                return
            case _:
                self._reset(connection)

    def _refuse(self, host_port: int, guest_port: int, op: int) -> None:
        if op != Op.RST:
            self._outbox.refuse(host_port, guest_port)

    # The guest's connections to the host

    def _dial_next(self) -> None:
        """One more, for making a connection takes its time, and then the next in the loop's next turn."""
        if self._to_dial and self._dials < DIALS_MAX:
            connection, _ = self._to_dial.popitem(last=False)
            self._dials += 1
            connection.dialing = self.spawn(self._dial(connection), "dial")
            connection.dialing.add_done_callback(self._dialed)
            self.next_turn(self._dial_next)

    def _dialed(self, _: asyncio.Task[None]) -> None:
        self._dials -= 1
        if self.is_active:
            self.next_turn(self._dial_next)

    async def _dial(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                streams = await self.backend.dial(connection.host_port)
            _check_streams(streams)
        except OSError:  # a timeout is one
            self._reset(connection)
            return
        except Exception as error:
            self._ends.complain(error)
            self._reset(connection)
            return
        finally:
            connection.dialing = None
        if not connection.over:
            self._send(connection, Op.RESPONSE)
        self._ends.run(connection, streams)


def _check_streams(streams: Any) -> None:
    reader, writer = streams
    if not (isinstance(reader, asyncio.StreamReader) and isinstance(writer, asyncio.StreamWriter)):
        raise TypeError(f"dial returned {type(reader).__name__} and {type(writer).__name__}, no asyncio streams")
