"""Memory on its way while the machine runs: rounds over what was written, how long they take, and when to stop.

`Pages` sends a round over one or more connections, each with a thread of its own. `Planner` decides after each: go on,
slow the guest down, stand still, or give up. `Throttle` keeps the vCPUs from running a part of the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from vmm import _native
from vmm.errors import ConfigError
from vmm.events import Migrating
from vmm.migration import protocol
from vmm.migration.link import Link
from vmm.migration.protocol import DATA_BYTES, PAGE, PAGES, TABLE_BYTES, Kind, Round

if TYPE_CHECKING:
    from vmm.machine.dispatch import Dispatcher

PHASES = ("connecting", "memory", "switching", "post-copy", "post-copy broken", "done", "failed")
PIECE = 64 << 20
"""Bytes of memory that one thread takes at a time."""
MAX_THROTTLE = 90
"""Per cent of the time that vCPUs are kept from running at most, unless asked for otherwise."""
STEP = 20
MAX_ROUNDS = 40
MAX_POLISH, WORTH_SECONDS = 3, 0.01
"""Rounds beyond those that the goal takes, and what one has to send at least, in seconds of the connection."""
OVERHEAD_SECONDS = 0.01
"""What standing still takes beside the pages: state, locks and answers. A first guess; the round trip is added."""
THROTTLE_PERIOD = 0.05
LEAST_BANDWIDTH = 64 << 10


@dataclass(slots=True)
class Options:
    """What a user may ask for."""

    bandwidth: int = 0
    """Bytes a second at most, until the machine stands still; 0: as many as go."""
    downtime: float = 0.3
    """Seconds that the machine may stand still, as a goal."""
    connections: int = 1
    compress: bool = False
    throttle: int = MAX_THROTTLE
    """Per cent of the time that vCPUs may be kept from running so that it comes to an end; 0: never."""
    postcopy: bool | str = ""
    """Memory may follow after the machine: "allowed", if Outgoing.start_postcopy() asks for it; "auto" or True, as soon
    as rounds no longer pay; "now", at once."""
    copy_storage: bool = False
    drop_connections: bool = False
    """Connections of the guest that passt carries may end."""

    def check(self) -> None:
        """Raises ConfigError."""
        if isinstance(self.postcopy, bool):
            self.postcopy = "auto" if self.postcopy else ""
        if self.postcopy not in ("", "allowed", "auto", "now"):
            raise ConfigError(f"postcopy: {str(self.postcopy)[:40]!r} is none of allowed, auto and now")
        if self.bandwidth and self.bandwidth < LEAST_BANDWIDTH:
            raise ConfigError(f"bandwidth: {self.bandwidth} bytes a second; at least {LEAST_BANDWIDTH} are needed")
        if not 0.001 <= self.downtime <= 3600:
            raise ConfigError(f"downtime: {self.downtime * 1000:g} ms is outside 1 to 3600000")
        if not 1 <= self.connections <= protocol.MAX_CONNECTIONS:
            raise ConfigError(f"connections: {self.connections}; 1 to {protocol.MAX_CONNECTIONS} are possible")
        if not 0 <= self.throttle <= 99:
            raise ConfigError(f"throttle: {self.throttle} is outside 0 to 99 per cent")


@dataclass(slots=True)
class Progress:
    """How far a migration has come; bytes, seconds, pages of 4 KiB."""

    phase: str = "connecting"
    total: int = 0
    """Bytes of guest memory."""
    sent: int = 0
    """Bytes over all connections."""
    remaining: int = 0
    """Bytes of memory that are to be sent yet, as far as is known."""
    rate: int = 0
    """Bytes a second in this round, or in the last one."""
    dirty_rate: int = 0
    """Bytes of memory a second that the guest writes."""
    rounds: int = 0
    pages: int = 0
    """Sent as data."""
    zero_pages: int = 0
    unchanged: int = 0
    """Pages that were written, and held what was sent already."""
    asked: int = 0
    """Pages that the machine waited for after it ran there."""
    throttle: int = 0
    expected_downtime: float = 0.0
    downtime: float = 0.0
    """From the standstill to the target's word that it runs."""
    seconds: float = 0.0
    disk_total: int = 0
    disk_sent: int = 0
    error: str = ""
    tell: Callable[[Migrating], None] = field(default=lambda event: None, repr=False)

    def event(self) -> Migrating:
        """As an event of the machine."""
        expected = int(self.expected_downtime * 1000)
        remaining = self.remaining + self.disk_total - self.disk_sent
        return Migrating(
            self.phase, self.sent, remaining, self.rate, self.dirty_rate, self.rounds, self.throttle, expected,
            int(self.downtime * 1000),
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """As JSON, for the control socket."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "tell"}


def as_dict(event: Migrating) -> dict[str, Any]:
    """An event as JSON."""
    return {name: getattr(event, name) for name in Migrating.__annotations__}


class Pace:
    """Keeps several threads to a number of bytes a second. *any thread*"""

    def __init__(self, bandwidth: int) -> None:
        self.bandwidth = bandwidth
        self._lock = threading.Lock()
        self._next = 0.0
        self.slept = 0.0
        self.stopped = threading.Event()

    def wait(self, length: int) -> None:
        """Before `length` bytes are sent: wait for their turn."""
        if not self.bandwidth:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + length / self.bandwidth
        if start > now:
            self.stopped.wait(start - now)
            with self._lock:
                self.slept += start - now


class RoundTiming:
    """How long a round has taken."""

    def __init__(self, pace: Pace, links: int) -> None:
        self._pace, self._links = pace, links
        self._begun, self._slept = time.monotonic(), pace.slept

    @property
    def seconds(self) -> float:
        """From its begin until now."""
        return max(time.monotonic() - self._begun, 1e-6)

    @property
    def unhindered(self) -> float:
        """Without what the pace made its threads, one for each connection, wait."""
        return max(self.seconds - (self._pace.slept - self._slept) / self._links, 1e-6)


@dataclass(slots=True)
class Piece:
    """A part of one region, and which of its pages."""

    region: int
    base: int
    """Its first page."""
    view: memoryview
    bitmap: memoryview


@dataclass(slots=True)
class Sent:
    """What a round sent."""

    bytes: int = 0
    pages: int = 0
    zero: int = 0
    unchanged: int = 0
    rest: list[tuple[Piece, int]] = field(default_factory=list)
    """Of an interrupted round: pieces that were not sent, from which page of each on."""


class Pages:
    """Sends rounds. One at a time; *worker threads*."""

    def __init__(
        self,
        links: Sequence[Link],
        regions: Sequence[memoryview],
        pace: Pace,
        interrupted: threading.Event,
        *,
        compress: bool,
        digests: bool,
    ) -> None:
        """`interrupted`: while it is set rounds end early; what one has not sent is in Sent.rest."""
        self._links = links
        self._regions = regions
        self._pace = pace
        self._compress = compress
        self._digests = [mmap.mmap(-1, max(len(view) // PAGE * 16, 1)) for view in regions] if digests else []
        self._tables = [bytearray(TABLE_BYTES) for _ in links]
        self._rooms = [mmap.mmap(-1, DATA_BYTES) for _ in links]
        self._compressors: list[Any] = [None] * len(links)
        self.round = 0
        self._handled = [0 for _ in links]
        self._interrupted = interrupted

    def begin_round(self) -> None:
        """Another one."""
        self.round += 1
        self._handled = [0 for _ in self._links]

    @property
    def handled(self) -> int:
        """Pages of this round that were sent, or found unchanged. *any thread*"""
        return sum(self._handled)

    def pieces(self, bitmaps: Sequence[bytes | bytearray]) -> queue.SimpleQueue[Piece]:
        """A round's work, for all threads."""
        work: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        for index, (view, bitmap) in enumerate(zip(self._regions, bitmaps, strict=True)):
            bits = memoryview(bitmap)
            for start in range(0, len(view), PIECE):
                end = min(start + PIECE, len(view))
                part = bits[start // PAGE // 8 : (end // PAGE + 7) // 8]
                if any(part.cast("Q")) if len(part) % 8 == 0 else any(part):
                    work.put(Piece(index, start // PAGE, view[start:end], part))
        return work

    def send(self, number: int, work: queue.SimpleQueue[Piece], *, fresh: bool) -> Sent:
        """What one connection sends of a round, to its end. Raises Closed."""
        link, sent = self._links[number], Sent()
        before = link.sent
        with contextlib.suppress(queue.Empty):
            while True:
                self._send_piece(number, work.get_nowait(), sent, fresh=fresh)
        link.send_message(Kind.ROUND, Round(self.round))
        sent.bytes = link.sent - before
        return sent

    def _send_piece(self, number: int, piece: Piece, sent: Sent, *, fresh: bool) -> None:
        link, table, room = self._links[number], self._tables[number], self._rooms[number]
        digests = None
        if self._digests:
            pages = len(piece.view) // PAGE
            digests = memoryview(self._digests[piece.region])[piece.base * 16 : (piece.base + pages) * 16]
        # At a limited rate smaller frames, so that the other side hears of us often enough.
        most = DATA_BYTES
        if self._pace.bandwidth:
            most = min(max(self._pace.bandwidth // 8 // PAGE, 1) * PAGE, DATA_BYTES)
        at, end = 0, len(piece.view) // PAGE
        if self._interrupted.is_set():
            sent.rest.append((piece, 0))
            return
        with memoryview(room) as whole, whole[:most] as out, memoryview(table) as entries:
            while at < end:
                at, runs, data, zero, same = _native.pack_pages(
                    piece.view, piece.bitmap, at, entries, out, digests, fresh
                )
                sent.pages += data
                sent.zero += zero
                sent.unchanged += same
                self._handled[number] += data + zero + same
                if not runs:
                    continue
                self._pace.wait(data * PAGE + runs * 8)
                parts = (PAGES.pack(piece.region, piece.base, runs), entries[: runs * 8], out[: data * PAGE])
                if self._compress and data:
                    link.send(Kind.PAGES, self._compressed(number, parts), flags=protocol.COMPRESSED)
                else:
                    link.send(Kind.PAGES, *parts)
                if self._interrupted.is_set() and at < end:
                    sent.rest.append((piece, at))
                    return

    def _compressed(self, number: int, parts: tuple[bytes | memoryview, ...]) -> bytes:
        import zstandard

        if self._compressors[number] is None:
            self._compressors[number] = zstandard.ZstdCompressor(level=1)
        frame: bytes = self._compressors[number].compress(b"".join(parts))
        return frame


def merge_rest(bitmaps: Sequence[bytearray], rest: Sequence[tuple[Piece, int]]) -> None:
    """Set in bitmaps, a region each, what rounds have not sent."""
    for piece, at in rest:
        part = int.from_bytes(piece.bitmap, "little") >> at << at
        bits = bitmaps[piece.region]
        start, length = piece.base // 8, len(piece.bitmap)
        whole = int.from_bytes(bits[start : start + length], "little") | part
        bits[start : start + length] = whole.to_bytes(length, "little")


Decision = Literal["again", "slower", "stop", "give up", "post-copy"]


class Planner:
    """What comes after a round. Pure."""

    def __init__(self, options: Options, round_trip: float) -> None:
        self._options = options
        # The first round trip may have waited for a busy host: it must not make a goal that cannot be met.
        self._overhead = min(OVERHEAD_SECONDS + 3 * round_trip, options.downtime / 2)
        self._rounds = 0
        self._stuck = 0
        self._polish = 0
        self.throttle = 0

    def expected_downtime(self, remaining: int, rate: float) -> float:
        """Seconds to stand still for `remaining` bytes at `rate` bytes a second."""
        return self._overhead + remaining / max(rate, 1.0)

    def after_round(self, sent: int, remaining: int, rate: float) -> Decision:
        """`sent`: bytes of memory that the round sent in its time, in which `remaining` bytes were written; `rate`:
        what the connection carries while nothing slows it down."""
        self._rounds += 1
        goal = self._options.downtime
        if self.expected_downtime(remaining, rate) <= goal:
            # While each round leaves less than half, another one is cheap and makes the standstill shorter.
            if self._polish < MAX_POLISH and remaining <= sent // 2 and remaining > rate * WORTH_SECONDS:
                self._polish += 1
                return "again"
            return "stop"
        if self._options.postcopy == "auto" and (remaining > sent // 2 or self._rounds > MAX_ROUNDS // 4):
            return "post-copy"  # the next round would hardly be shorter
        if self._rounds > MAX_ROUNDS:
            return "give up"
        # A round that leaves three quarters of what it sent would need many more.
        self._stuck = self._stuck + 1 if remaining > sent * 3 // 4 else 0
        if self._stuck and self._rounds > 1:
            if self.throttle < self._options.throttle:
                self.throttle = min(self.throttle + STEP, self._options.throttle)
                return "slower"
            if self._stuck > 6:
                return "give up"
        return "again"


class Throttle:
    """Keeps vCPUs from running a part of the time. Loop thread."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._share = 0
        self._task: asyncio.Task[None] | None = None

    def set(self, per_cent: int) -> None:
        """From now on."""
        self._share = per_cent
        if per_cent and self._task is None:
            self._task = asyncio.create_task(self._work(), name="throttle")

    async def _work(self) -> None:
        try:
            while self._share and not self._dispatcher.ended:
                self._dispatcher.hold("throttle")
                await asyncio.sleep(THROTTLE_PERIOD * self._share / 100)
                self._dispatcher.release("throttle")
                await asyncio.sleep(THROTTLE_PERIOD * (100 - self._share) / 100)
        finally:
            self._dispatcher.release("throttle")

    async def stop(self) -> None:
        """At full speed again. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
