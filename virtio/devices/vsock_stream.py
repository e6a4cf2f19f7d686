"""One stream of the socket device (virtio 1.2, 5.10.6): its credit in both directions, and the packets that wait for
the guest's receive buffers. Knows no queue and no socket.

Everything that waits is bounded: a stream stands in the outbox once. It holds at most one request or response,
DATA_AHEAD bytes of data and one chunk, one credit update, one shutdown and one reset. Loop thread only.
"""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict, deque
from dataclasses import dataclass

from virtio.backends.vsock import Streams

DATA_AHEAD = 64 << 10
"""Bytes for the guest that wait in one stream; while there are more, nothing is read from the host's end."""
REFUSALS_MAX = 256
"""Refusals that wait for the guest's buffers before the device takes no more packets from it."""


class Op(enum.IntEnum):
    """5.10.6"""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


@dataclass(frozen=True, slots=True, eq=False)
class Refusal:
    """A packet of the guest that belongs to no connection; it is answered with RST."""

    host_port: int
    guest_port: int


class Connection:
    """One stream. `alloc` is how many bytes the guest may send ahead (buf_alloc)."""

    def __init__(self, host_port: int, guest_port: int, alloc: int, *, by_guest: bool) -> None:
        self.host_port = host_port
        self.guest_port = guest_port
        self.alloc = alloc
        self.by_guest = by_guest
        """The guest asked for it."""
        self.streams: Streams | None = None
        """The host's end."""
        self.accepted: asyncio.Future[None] | None = None
        """What the host waits for that asked for the connection."""
        self.dialing: asyncio.Task[None] | None = None
        self.pumps: set[asyncio.Task[None]] = set()
        self.listed = True
        """The guest may still say something about it, or has to hear that it is over: its ports are taken."""
        self.attached = True
        """The host's end is not closed yet."""
        self.over = False
        """Nothing more is done for it but telling the guest, with the RST that waits in `packets`."""
        self.guest_done = False
        self.host_done = False
        self.peer_alloc = 0
        self.peer_forwarded = 0
        self.sent = 0
        self.received = 0
        self.forwarded = 0
        self.told = 0
        self.inbox = bytearray()
        """From the guest, not yet written to the host's end: at most `alloc` bytes."""
        self.ended = False
        """Nothing more comes into `inbox`."""
        self.arrived = asyncio.Event()
        """Something came into `inbox`, or it ended."""
        self.go_on = asyncio.Event()
        """There may be room for the guest again: credit came, or what waited was delivered."""
        self.packets: deque[tuple[Op, int, memoryview]] = deque()
        self.waiting = 0
        """Bytes of data in `packets`."""

    @property
    def room(self) -> int:
        """Bytes that the guest still takes; 0 or less: it has no credit."""
        return self.peer_alloc - ((self.sent - self.peer_forwarded) & 0xFFFFFFFF)

    @property
    def may_send(self) -> bool:
        """Read from the host's end and send it."""
        return self.room > 0 and self.waiting < DATA_AHEAD

    def put(self, data: bytes) -> None:
        """Bytes from the guest."""
        self.inbox += data
        self.arrived.set()

    def end(self) -> None:
        """The guest sends no more."""
        self.ended = True
        self.arrived.set()

    def next_packet(self, space: int) -> tuple[Op, int, memoryview]:
        """Take operation, flags and data of what is to be sent next, at most `space` bytes of data. ValueError: data
        waits and there is no space for any."""
        if not self.packets:
            return Op.CREDIT_UPDATE, 0, memoryview(b"")
        op, flags, data = self.packets[0]
        if len(data) <= space:
            self.packets.popleft()
        elif space <= 0:
            raise ValueError("no space for data")
        else:
            self.packets[0] = op, flags, data[space:]
            data = data[:space]
        self.waiting -= len(data)
        return op, flags, data


class Outbox:
    """The streams and refusals that have a packet for the guest, in turn: one packet each."""

    def __init__(self) -> None:
        self._line: OrderedDict[Connection | Refusal, None] = OrderedDict()
        self._refusals = 0
        self._filled = asyncio.Event()
        self._relieved = asyncio.Event()

    def put(self, connection: Connection, op: Op, flags: int = 0, data: bytes = b"") -> None:
        """Send a packet of this stream, after those of it that wait."""
        if op != Op.CREDIT_UPDATE:  # a stream in the line without packets sends its credit
            connection.packets.append((op, flags, memoryview(data)))
            connection.waiting += len(data)
        self._line.setdefault(connection)
        self._filled.set()

    def refuse(self, host_port: int, guest_port: int) -> None:
        """Answer a packet with RST."""
        self._refusals += 1
        self._line[Refusal(host_port, guest_port)] = None
        self._filled.set()

    def drop(self, connection: Connection) -> None:
        """The guest ended this stream: it hears nothing more of it."""
        connection.packets.clear()
        connection.waiting = 0
        self._line.pop(connection, None)

    def first(self) -> Connection | Refusal | None:
        """Whose turn it is, if anybody's; `served` is called when its packet is sent."""
        return next(iter(self._line), None)

    def served(self, who: Connection | Refusal) -> None:
        """One packet of `first` was sent; to the end of the line with it if more wait."""
        self._line.pop(who, None)  # it may have been its last, and dropped
        if isinstance(who, Refusal):
            self._refusals -= 1
            self._relieved.set()
            return
        if who.packets:
            self._line[who] = None
        if who.may_send:
            who.go_on.set()

    async def wait(self) -> None:
        """Until there is a packet to send."""
        while not self._line:
            self._filled.clear()
            await self._filled.wait()

    async def wait_for_room(self) -> None:
        """Until another refusal has a place."""
        while self._refusals >= REFUSALS_MAX:
            self._relieved.clear()
            await self._relieved.wait()
