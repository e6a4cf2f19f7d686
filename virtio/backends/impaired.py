"""A wire that is slow, loses, doubles, reorders and is cut, by a seed: for tests of what a network does to a guest.

What becomes of a frame depends on the seed, the direction and the frame's number alone, and times are those of the
card's clock: with the virtual clock they are a function of the machine's inputs. Loop thread only.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from virtio.backends.net import NetBackend
from virtio.errors import ConfigError
from virtio.limits import LoopClock
from virtio.protocols import DeviceClock, DeviceTimer

MAX_WAITING = 1024
"""Frames of one direction that are on their way at a time; further ones are lost."""
LATER_NS = 1_000_000
"""How much longer than others a frame that is to be overtaken takes at least."""


@dataclass(frozen=True, slots=True)
class Impairment:
    """What a wire does. Times in seconds; the others are parts of all frames, 0 to 1."""

    delay: float = 0.0
    jitter: float = 0.0
    """As much more at most, at random."""
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Frames that arrive after those sent behind them."""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError."""
        for name in ("loss", "duplicate", "reorder"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is no part of all frames; give 0 to 1")
        for name in ("delay", "jitter"):
            if not 0 <= getattr(self, name) <= 3600:
                raise ConfigError(f"{name}: {getattr(self, name)} is outside 0 to 3600 seconds")

    @property
    def active(self) -> bool:
        """It does anything."""
        return any((self.delay, self.jitter, self.loss, self.duplicate, self.reorder))


class Way:
    """One direction: frames that are on their way, and what becomes of them."""

    def __init__(self, impairment: Impairment, name: str, clock: Callable[[], DeviceClock]) -> None:
        self.impairment, self.lost = impairment, 0
        self._random = Random(f"{impairment.seed} {name}")
        self._clock = clock
        self._waiting: list[tuple[int, int, bytes]] = []
        self._number = 0
        self._timer: DeviceTimer | None = None
        self._arrived: Callable[[bytes], None] = lambda frame: None

    def on_arrival(self, call: Callable[[bytes], None]) -> None:
        """Call with each frame when it arrives."""
        self._arrived = call

    def send(self, frame: bytes) -> None:
        """A frame sets out."""
        # Four numbers for every frame: what happens to one does not move what happens to the next.
        lost, doubled, overtaken, jitter = (self._random.random() for _ in range(4))
        wire = self.impairment
        if lost < wire.loss:
            self.lost += 1
            return
        delay = int((wire.delay + wire.jitter * jitter) * 1e9)
        if overtaken < wire.reorder:
            delay += max(LATER_NS, int((wire.delay + wire.jitter) * 1e9))
        self._start(frame, delay)
        if doubled < wire.duplicate:
            self._start(frame, delay)

    def _start(self, frame: bytes, delay: int) -> None:
        if delay <= 0 and not self._waiting:
            self._arrived(frame)
            return
        if len(self._waiting) >= MAX_WAITING:
            self.lost += 1
            return
        heapq.heappush(self._waiting, (self._clock().now_ns() + delay, self._number, frame))
        self._number += 1
        if self._waiting[0][1] == self._number - 1:
            self._arm()

    def _arm(self) -> None:
        self.close()
        if self._waiting:
            self._timer = self._clock().call_at(self._waiting[0][0], self._due)

    def _due(self) -> None:
        self._timer = None
        now = self._clock().now_ns()
        while self._waiting and self._waiting[0][0] <= now:
            self._arrived(heapq.heappop(self._waiting)[2])
        self._arm()

    def close(self) -> None:
        """Nothing arrives any more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class ImpairedNet(NetBackend):
    """`inner` at the far end of such a wire."""

    def __init__(self, inner: NetBackend, impairment: Impairment) -> None:
        """Raises ConfigError."""
        impairment.check()
        self.inner, self.mtu, self.keeps_connections = inner, inner.mtu, inner.keeps_connections
        self.cut = False
        """Nothing passes, either way, while it is set."""
        loop_clock = LoopClock()
        self._clock: Callable[[], DeviceClock] = lambda: loop_clock
        self._out, self._in = (Way(impairment, name, lambda: self._clock()) for name in ("out", "in"))
        self._sending: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._received: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._out.on_arrival(lambda frame: self._put(self._sending, frame))
        self._in.on_arrival(lambda frame: self._put(self._received, frame))
        self._events = {id(queue): asyncio.Event() for queue in (self._sending, self._received)}
        self._tasks: list[asyncio.Task[None]] = []

    def use_clock(self, clock: Callable[[], DeviceClock]) -> None:
        self._clock = clock

    def set_mac(self, mac: bytes) -> None:
        self.inner.set_mac(mac)

    def _put(self, queue: deque[bytes], frame: bytes) -> None:
        if not self.cut:
            queue.append(frame)
            self._events[id(queue)].set()

    async def _next(self, queue: deque[bytes]) -> bytes:
        while not queue:
            self._events[id(queue)].clear()
            await self._events[id(queue)].wait()
        return queue.popleft()

    async def _forward(self) -> None:
        while True:
            await self.inner.send(await self._next(self._sending))

    async def _fetch(self) -> None:
        count = 0
        while True:
            frame = await self.inner.receive()
            if not self.cut:
                self._in.send(frame)
            count += 1
            if not count % 64:
                await asyncio.sleep(0)

    def _start(self) -> None:
        if not self._tasks:
            works = (self._forward(), self._fetch())
            self._tasks = [asyncio.create_task(work, name="impaired-net") for work in works]

    async def send(self, frame: bytes) -> None:
        self._start()
        if not self.cut:
            self._out.send(frame)

    async def receive(self) -> bytes:
        self._start()
        waiting = asyncio.create_task(self._next(self._received), name="impaired-net-next")
        try:
            done, _ = await asyncio.wait({waiting, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not waiting.done():
                waiting.cancel()
        if waiting in done:
            return waiting.result()
        for task in done:
            task.result()  # the link is gone: HostError
        raise AssertionError("these tasks have no end")

    async def aclose(self) -> None:
        for way in (self._out, self._in):
            way.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.inner.aclose()
