"""Limits of what a device moves: token buckets for operations and bytes (virtio/native/limits.h), and who waits for
tokens.

A bucket fills at its rate up to its burst. A request passes when the buckets that concern it hold what it costs, or are
full; what it costs beyond that is a debt, so that over time exactly the rate passes, however large requests are. Nobody
polls: whoever waits has a timer armed to the moment at which its tokens are there. Loop thread only.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from virtio import _ring
from virtio.errors import ConfigError
from virtio.protocols import DeviceClock, DeviceTimer

ALL, READ, WRITE = 0, 1, 2
DISK = {"iops": 0, "iops_read": 1, "iops_write": 2, "bps": 3, "bps_read": 4, "bps_write": 5}
"""What may be limited of a disk, and the number of its bucket."""
CARD = {"pps": 0, "bps": 3}
"""The same for one direction of a network card."""
RATE_MAX = 1 << 40
"""Operations or bytes a second, and in a burst."""
BURST_SECONDS = 1 / 20
"""How much a bucket without a burst of its own holds. A loop that is late by less loses no tokens, and in no second
does more than a twentieth too much pass."""


TURN, SHARE = 256, 16
"""Frames that one queue of a card moves at a time; and while others wait for tokens."""


@dataclass(frozen=True, slots=True)
class LimitState:
    """One bucket. Rates are tokens a second; 0: no limit. A burst of 0 is BURST_SECONDS' worth."""

    rate: Annotated[int, range(RATE_MAX + 1)]
    burst: Annotated[int, range(RATE_MAX + 1)]
    level: Annotated[int, range(-1 << 63, 1 << 41)]
    """Thousandths of a token; negative: a debt."""


class LoopClock:
    """The event loop's time, for a device that no machine has given another."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> DeviceTimer:
        # uvloop's timers have milliseconds, and a shorter delay would be none
        delay = max(-(-(deadline_ns - self.now_ns()) // 1_000_000), 1) / 1000
        return asyncio.get_running_loop().call_later(delay, callback)


class Buckets:
    """The token buckets of a disk, or of one direction of a card."""

    def __init__(self, names: Mapping[str, int]) -> None:
        self.native = _ring.Limits()
        self._names = names
        self._bursts = dict.fromkeys(names, 0)

    @property
    def active(self) -> bool:
        """Anything is limited."""
        return self.native.active

    def rate(self, name: str) -> int:
        """Tokens a second; 0: no limit."""
        return int(self.native.get(self._names[name])[0])

    def burst(self, name: str) -> int:
        """The burst that was asked for; 0: none."""
        return self._bursts[name]

    def check(self, values: Mapping[str, int]) -> None:
        """ConfigError unless `set` takes them."""
        for key, value in values.items():
            if key.removesuffix("_burst") not in self._names:
                raise ConfigError(f"{key}: no limit is called so; known are {', '.join(self._names)}, each with _burst")
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= RATE_MAX:
                raise ConfigError(f"{key}: {value!r} is outside 0 to {RATE_MAX}")

    def set(self, values: Mapping[str, int]) -> None:
        """Change rates by name, and bursts by name and "_burst"; what is not named stays. 0 takes a limit, or its
        burst, away. ConfigError, and nothing has changed then."""
        self.check(values)
        for name in self._names:
            if name in values or f"{name}_burst" in values:
                self._bursts[name] = values.get(f"{name}_burst", self._bursts[name])
                self._set(name, values.get(name, self.rate(name)), None)

    def _set(self, name: str, rate: int, level: float | None) -> None:
        burst = self._bursts[name] or rate * BURST_SECONDS
        self.native.set(self._names[name], rate, max(burst, 1.0), level)

    def as_dict(self) -> dict[str, int]:
        """What is limited, as `set` takes it."""
        found = {}
        for name in self._names:
            if rate := self.rate(name):
                found[name] = rate
                if burst := self._bursts[name]:
                    found[f"{name}_burst"] = burst
        return found

    def save(self) -> tuple[LimitState, ...]:
        """Every bucket, in the order of the names."""
        return tuple(
            LimitState(self.rate(name), self._bursts[name], int(self.native.get(index)[2] * 1000))
            for name, index in self._names.items()
        )

    def restore(self, states: Sequence[LimitState]) -> None:
        """Take over what `save` gave."""
        for name, state in zip(self._names, states, strict=True):
            self._bursts[name] = state.burst
            self._set(name, state.rate, state.level / 1000)


class Alarm:
    """One call that is to come when tokens are there."""

    def __init__(self, clock: Callable[[], DeviceClock], call: Callable[[], object]) -> None:
        """`clock` gives the present clock: a machine that boots again has another."""
        self._clock = clock
        self._call = call
        self._timer: DeviceTimer | None = None

    def arm(self, wait_ns: int) -> None:
        """Call in `wait_ns` ns; an earlier appointment is void."""
        self.cancel()
        clock = self._clock()
        self._timer = clock.call_at(clock.now_ns() + wait_ns, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._call()

    @property
    def armed(self) -> bool:
        """The call is to come."""
        return self._timer is not None

    def cancel(self) -> None:
        """Nobody waits any more. Idempotent."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


class Flow:
    """What a network card moves in one direction: its limits, and the queues that wait for tokens, which take turns."""

    def __init__(self, clock: Callable[[], DeviceClock], move: Callable[[int], None]) -> None:
        """`move(number)` goes on with a queue that waited."""
        self.buckets = Buckets(CARD)
        self._clock = clock
        self._move = move
        self._waiting: deque[int] = deque()
        self._served = -1
        self._alarm = Alarm(clock, self.go_on)
        self._tokens = asyncio.Event()
        self._open = False

    def now_ns(self) -> int:
        """The time by which tokens are counted."""
        return self._clock().now_ns() if self.buckets.active else 0

    @property
    def share(self) -> int:
        """Frames that a queue may move at a time."""
        return SHARE if self._waiting else TURN

    def must_wait(self, number: int) -> bool:
        """A queue that wants to move frames: whether others come before it. It has its turn after them then."""
        if number == self._served or not self._waiting:
            return False
        if number not in self._waiting:
            self._waiting.append(number)
        return True

    def wait(self, number: int, wait_ns: int, moved: bool) -> None:
        """The queue's next frame has to wait. If others were `moved` before, the other queues come first."""
        if number in self._waiting:
            self._waiting.remove(number)
        if moved:
            self._waiting.append(number)
        else:
            self._waiting.appendleft(number)
        self._alarm.arm(wait_ns)

    def go_on(self) -> None:
        """Tokens may be there, or the limits are others."""
        self._alarm.cancel()
        self._tokens.set()
        for _ in range(len(self._waiting)):
            number = self._served = self._waiting.popleft()
            try:
                self._move(number)
            finally:
                self._served = -1
            if self._waiting and self._waiting[0] == number:
                return
        if self._waiting and not self._alarm.armed:
            self._alarm.arm(0)

    async def admit(self, length: int) -> None:
        """Wait until a frame may pass, for a card with one queue whose frames a coroutine moves."""
        while self.buckets.active and not self._open:
            wait = self.buckets.native.wait(ALL, length, self.now_ns())
            if not wait:
                return
            self._tokens.clear()
            self._alarm.arm(wait)
            await self._tokens.wait()

    def charge(self, length: int) -> None:
        """Such a frame passes."""
        self.buckets.native.charge(ALL, length, self.now_ns())

    def set_open(self, open: bool) -> None:
        """With `open`, frames that were taken from a queue pass at once and leave a debt."""
        self._open = open
        self._tokens.set()

    def close(self) -> None:
        """Nobody waits any more."""
        self._alarm.cancel()
        self._waiting.clear()


class Gate:
    """Coroutines that wait for tokens, as requests of BlockEngine do in virtio/native/blk_gate.h: reads and writes
    apart, the queues in turns, and nobody passes by whom tokens that all share are missing for."""

    def __init__(self, buckets: Buckets, clock: Callable[[], DeviceClock]) -> None:
        self._buckets = buckets
        self._clock = clock
        self._alarm = Alarm(clock, self.run)
        self._lanes: dict[int, dict[int, deque[tuple[asyncio.Future[None], int]]]] = {READ: {}, WRITE: {}}
        """By kind, then by queue in the order of their turns: who waits, and its bytes."""
        self._turn = READ
        self.waiting = 0
        """How many there are."""
        self.open = False
        """Let everybody pass; that leaves a debt."""

    async def admit(self, queue: int, kind: int, length: int) -> None:
        """Wait until an operation of `length` bytes of this queue may pass. `kind` is READ or WRITE."""
        if not self._buckets.active:
            return
        future = asyncio.get_running_loop().create_future()
        self._lanes[kind].setdefault(queue, deque()).append((future, length))
        self.waiting += 1
        self.run()
        await future

    def run(self) -> None:
        """Let pass who may; see to the others when it is time."""
        now = self._clock().now_ns()
        while (wait := self._pass_one(now)) == 0:
            pass
        if wait > 0:
            self._alarm.arm(wait)
        else:
            self._alarm.cancel()

    def _pass_one(self, now: int) -> int:
        """0: one has passed; else ns until one can; -1: nobody waits."""
        native, soonest = self._buckets.native, -1
        for kind in (self._turn, READ + WRITE - self._turn):
            while lane := next(iter(self._lanes[kind].items()), None):
                if not lane[1][0][0].done():
                    break
                self._step(kind)  # a reset has cancelled it
            if lane is None:
                continue
            length = lane[1][0][1]
            wait = native.wait(kind, length, now)
            if self.open or not wait:
                native.charge(kind, length, now)
                lane[1][0][0].set_result(None)
                self._step(kind)
                self._turn = READ + WRITE - kind
                return 0
            soonest = wait if soonest < 0 else min(soonest, wait)
            if native.wait(ALL, length, now) == wait:
                self._turn = kind
                break
        return soonest

    def _step(self, kind: int) -> None:
        """The first of this kind is done with; the next queue has its turn."""
        queue, lane = next(iter(self._lanes[kind].items()))
        del self._lanes[kind][queue]
        lane.popleft()
        self.waiting -= 1
        if lane:
            self._lanes[kind][queue] = lane

    def close(self) -> None:
        """Nobody waits any more."""
        self._alarm.cancel()
        self.waiting = 0
        for lanes in self._lanes.values():
            lanes.clear()
