"""The host's ends of the socket device's connections: moving bytes, closing, and the places that connections take.

A connection keeps its place until both ends are done with it: the guest was told, or ended it itself, and the host's
end is closed. Closing is done by one task, a few in a turn of the loop, so that a guest that ends or resets hundreds at
once does not hold others up. Loop thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from functools import partial

from virtio.backends.vsock import Streams
from virtio.devices.vsock_stream import Connection, Op

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
"""Each holds up to three descriptors of this process, `alloc` bytes from the guest and DATA_AHEAD for it."""
HOST_PLACES = 64
"""Of CONNECTIONS_MAX, those that connections made by the guest leave free for the host."""
LINGERING_MAX = 64
"""Closed connections whose last bytes the host has not read; beyond, the oldest half are cut off."""
CLOSED_PER_TURN = 4
"""Closing one costs about 0.1 ms: sockets, transports, two tasks."""
CHUNK = 64 << 10
COMPLAINTS_MAX = 8
"""Warnings about a backend that breaks its contract; later ones are debug messages."""
SHUTDOWN_SEND = 2


class Places:
    """CONNECTIONS_MAX of them; the host may wait for one, the guest may not."""

    def __init__(self) -> None:
        self.taken = 0
        self._by_guest = 0
        self._waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    @property
    def free(self) -> bool:
        """The host may have one."""
        return self.taken < CONNECTIONS_MAX

    @property
    def free_for_guest(self) -> bool:
        """The guest may have one."""
        return self.free and self._by_guest < max(CONNECTIONS_MAX - HOST_PLACES, 1)

    def take(self, connection: Connection) -> None:
        """The connection is new."""
        self.taken += 1
        self._by_guest += connection.by_guest

    def leave(self, connection: Connection) -> None:
        """One end is done; the place is free if both are."""
        if not (connection.listed or connection.attached):
            self.taken -= 1
            self._by_guest -= connection.by_guest
            self._admit()

    async def wait(self, wanted: Callable[[], bool]) -> None:
        """Until one is free for the host, or `wanted` is false."""
        first = True
        while wanted() and not self.free:
            place = asyncio.get_running_loop().create_future()
            self._waiting[place] = None
            self._waiting.move_to_end(place, last=first)  # one who was overtaken keeps its turn
            first = False
            try:
                await place
            except BaseException:
                self._waiting.pop(place, None)
                if place.done() and not place.cancelled():
                    self._admit()  # in place of this one
                raise

    def wake_all(self) -> None:
        """Those who wait look again whether they want a place."""
        while self._waiting:
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            place, _ = self._waiting.popitem(last=False)
            if not place.done():
                place.set_result(None)
                return


class HostEnds:
    """`send(connection, op, flags, data)` and `reset(connection)` are the device's; `name` is the backend's class."""

    def __init__(
        self,
        places: Places,
        send: Callable[[Connection, Op, int, bytes], None],
        reset: Callable[[Connection], None],
        name: str,
    ) -> None:
        self._places = places
        self._send = send
        self._reset = reset
        self._name = name
        self._closing: deque[Connection] = deque()
        self._closer: asyncio.Task[None] | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self._lingering: list[asyncio.WriteTransport] = []
        """Closed, with bytes that the host had not read. LINGERING_MAX at most."""
        self._complaints = 0

    def run(self, connection: Connection, streams: Streams) -> bool:
        """Begin to move bytes. False: the connection is over already, and so are the streams."""
        if connection.over:
            streams[1].close()
            return False
        connection.streams = streams
        self._pump(connection, partial(self._pump_out, connection, streams[0]), "to-guest")
        self._pump(connection, partial(self._pump_in, connection, streams[1]), "to-host")
        return True

    def close_soon(self, connection: Connection) -> None:
        """Nothing more is done for the connection, which is over."""
        self._closing.append(connection)
        if self._closer is None or self._closer.done():
            self._closer = asyncio.get_running_loop().create_task(self._close_all(), name="VsockDevice.closer")

    async def aclose(self) -> None:
        """Wait until what was given to `close_soon` is closed."""
        if self._closer is not None:
            await self._closer
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def complain(self, error: Exception) -> None:
        """The backend, or a stream that it gave, broke its contract."""
        self._complaints += 1
        level = logging.WARNING if self._complaints <= COMPLAINTS_MAX else logging.DEBUG
        log.log(level, "vsock backend %s: %s: %s", self._name, type(error).__name__, error)

    # Moving bytes

    def _pump(self, connection: Connection, work: Callable[[], Awaitable[None]], name: str) -> None:
        """Not by Device.spawn: a reset would cancel all of them in one turn of the loop."""
        task = asyncio.get_running_loop().create_task(self._guard(connection, work), name=f"VsockDevice.{name}")
        for tasks in (self._pumps, connection.pumps):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _guard(self, connection: Connection, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except OSError:
            self._reset(connection)
        except Exception as error:
            self.complain(error)
            self._reset(connection)

    async def _pump_out(self, connection: Connection, reader: asyncio.StreamReader) -> None:
        """Host to guest, as far as the guest's credit goes."""
        while True:
            # 5.10.6.3.2: "VIRTIO_VSOCK_OP_RW data packets MUST only be transmitted when the peer has sufficient free
            # buffer space for the payload."
            while not (connection.may_send or connection.over):
                connection.go_on.clear()
                await connection.go_on.wait()
            if connection.over:
                return
            try:
                data = await reader.read(min(connection.room, CHUNK))
            except OSError:
                data = b""
            if not data:
                break
            connection.sent += len(data)
            self._send(connection, Op.RW, 0, data)
        connection.host_done = True
        self._send(connection, Op.SHUTDOWN, SHUTDOWN_SEND, b"")
        self.finish(connection)

    async def _pump_in(self, connection: Connection, writer: asyncio.StreamWriter) -> None:
        """Guest to host, as fast as the host takes it."""
        while True:
            while not (connection.inbox or connection.ended or connection.over):
                connection.arrived.clear()
                await connection.arrived.wait()
            if connection.over:
                return
            data, connection.inbox = connection.inbox, bytearray()
            if not data:
                break
            writer.write(data)
            await writer.drain()
            connection.forwarded += len(data)
            # tell the guest before its credit runs out
            if connection.forwarded - connection.told >= connection.alloc // 4:
                self._send(connection, Op.CREDIT_UPDATE, 0, b"")
        if writer.can_write_eof() and not writer.is_closing():
            with contextlib.suppress(OSError):
                writer.write_eof()
        connection.guest_done = True
        self.finish(connection)

    def finish(self, connection: Connection) -> None:
        """End the connection if neither end has anything more to say."""
        # 5.10.6.5: a clean disconnect ends with VIRTIO_VSOCK_OP_RST when both directions are done
        if connection.guest_done and connection.host_done:
            self._reset(connection)

    # Closing

    async def _close_all(self) -> None:
        for count in itertools.count(1):
            if not self._closing:
                return
            connection = self._closing.popleft()
            self._close(connection)
            connection.attached = False
            self._places.leave(connection)
            if count % CLOSED_PER_TURN == 0:
                await asyncio.sleep(0)

    def _close(self, connection: Connection) -> None:
        if connection.dialing is not None:
            connection.dialing.cancel()
        if connection.accepted is not None and not connection.accepted.done():
            connection.accepted.set_exception(
                ConnectionResetError("the guest refused the connection, or its vsock device was reset")
            )
            connection.accepted.exception()  # also if `open` gave up and does not look at it
        for pump in connection.pumps:
            pump.cancel()
        connection.inbox.clear()
        if connection.streams is not None:
            connection.streams[1].close()
            self._linger(connection.streams[1].transport)

    def _linger(self, transport: asyncio.WriteTransport) -> None:
        if not transport.get_write_buffer_size():
            return
        self._lingering.append(transport)
        if len(self._lingering) > LINGERING_MAX:  # half of them go, so that looking at all of them is rare
            waiting = [transport for transport in self._lingering if transport.get_write_buffer_size()]
            keep = max(LINGERING_MAX // 2, 1)
            for transport in waiting[:-keep]:
                transport.abort()
            self._lingering = waiting[-keep:]
