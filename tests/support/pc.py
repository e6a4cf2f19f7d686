"""A machine without a core for device tests: real buses, interrupt lines and timers, a clock that the test moves,
everything recorded. The test is the guest.

With `queued`, posted writes and the notices of shadows wait for `drain()`, as in the posted ring (a synchronous access
drains it first, as a core does); without, devices hear of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from cpu.contract import Space
from vmm.machine.bus import Bus, BusDevice
from vmm.machine.clock import MachineClock
from vmm.machine.interfaces import PostedDevice, Services
from vmm.machine.lines import InterruptLines, Line

SECOND = 1_000_000_000


class FakeTime:
    """A core's time (vmm.machine.clock.TimeSource) that stands until the test moves it."""

    def __init__(self) -> None:
        self.now = 0
        self.alarm: int | None = None

    def now_ns(self) -> int:
        return self.now

    def set_alarm(self, deadline_ns: int | None) -> None:
        self.alarm = deadline_ns


class ManualClock(MachineClock):
    """Stands still until `advance`. Its epoch is 2024-02-29T23:59:00Z unless given."""

    def __init__(self, epoch_s: int = 1_709_251_140) -> None:
        self.time = FakeTime()
        super().__init__(self.time, epoch_s * SECOND)

    def advance(self, ns: int) -> None:
        """Let time pass, running what is due at its own moment."""
        end = self.time.now + ns
        while self.time.alarm is not None and self.time.alarm <= end:
            self.time.now, self.time.alarm = max(self.time.now, self.time.alarm), None
            self.expire()
        self.time.now = end

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self._queue)


class FakeShadow:
    """A shadow register: `value` while valid, None otherwise."""

    def __init__(self, notice: Callable[[], None] | None) -> None:
        self.notice = notice
        self.value: int | None = None
        self.after: int | None = None

    def set(self, value: int, after: int | None = None) -> None:
        self.value, self.after = value, after

    def invalidate(self) -> None:
        self.value = self.after = None


class Pc:
    """vmm.machine.interfaces.Board; guest accesses by `inp`, `out`, `read` and `write`."""

    def __init__(self, *, queued: bool = False) -> None:
        self.clock = ManualClock()
        self._buses = (Bus("port", 1 << 16), Bus("MMIO", 1 << 52))
        self.ports, self.mmio = self._buses
        self.levels: dict[int, bool] = {}
        self.lines = InterruptLines(self._drive)
        self.messages: list[tuple[int, int]] = []
        self.stalls = 0
        """Of vCPUs, that did not end yet."""
        self.requests: list[tuple[str, str, int | None]] = []
        self.posts: dict[tuple[Space, int, int], tuple[PostedDevice, int]] = {}
        self.shadows: dict[tuple[Space, int, int], FakeShadow] = {}
        self.edges: list[tuple[int, bool]] = []
        self.synchronous = 0
        """Accesses that had to wait for the loop."""
        self._queued = queued
        self._queue: list[Callable[[], None]] = []

    def _drive(self, gsi: int, level: bool) -> None:
        self.levels[gsi] = level
        self.edges.append((gsi, level))

    # vmm.machine.interfaces.Board

    @staticmethod
    def random(count: int) -> bytes:
        return bytes(range(count % 256))

    def irq_line(self, gsi: int) -> Line:
        return self.lines.line(gsi)

    def signal_msi(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    def stall(self) -> Callable[[], None]:
        self.stalls += 1

        def go_on() -> None:
            self.stalls -= 1

        return go_on

    def map(self, space: Space, address: int, size: int, device: BusDevice, name: str) -> None:
        self._buses[space].add(address, size, device, name)

    def unmap(self, space: Space, address: int) -> None:
        self._buses[space].remove(address)

    def post(self, space: Space, address: int, size: int, device: PostedDevice, offset: int) -> None:
        self.posts[space, address, size] = (device, offset)

    def unpost(self, space: Space, address: int, size: int) -> None:
        del self.posts[space, address, size]

    def shadow(
        self, space: Space, address: int, size: int, notice: Callable[[], None] | None = None
    ) -> FakeShadow:
        shadow = self.shadows[space, address, size] = FakeShadow(notice)
        return shadow

    def unshadow(self, space: Space, address: int, size: int) -> None:
        del self.shadows[space, address, size]

    def ioeventfd(
        self,
        space: Space,
        address: int,
        size: int,
        match: int | None,
        callback: Callable[[], None],
        answerer: object = None,
    ) -> Callable[[], None]:
        return lambda: None

    def request(self, action: Literal["shutdown", "reset", "crash"], detail: str, status: int | None = None) -> None:
        self.requests.append((action, detail, status))

    # The guest's side.

    def drain(self) -> None:
        """What the loop does with the posted ring."""
        while self._queue:
            self._queue.pop(0)()

    def _later(self, call: Callable[[], None]) -> None:
        self._queue.append(call)
        if not self._queued:
            self.drain()

    def _read(self, space: Space, address: int, size: int) -> int:
        shadow = self.shadows.get((space, address, size))
        if shadow is None or shadow.value is None:
            self.drain()
            self.synchronous += 1
            return self._buses[space].read(address, size)
        value = shadow.value
        if shadow.after is not None:
            shadow.value, shadow.after = shadow.after, None
            if shadow.notice is not None:
                self._later(shadow.notice)
        return value

    def _write(self, space: Space, address: int, size: int, value: int) -> None:
        posted = self.posts.get((space, address, size))
        if posted is None:
            self.drain()
            self.synchronous += 1
            self._buses[space].write(address, size, value)
            return
        device, offset = posted
        data = value.to_bytes(size, "little")
        self._later(lambda: device.posted(offset, size, data))

    def inp(self, port: int, size: int = 1) -> int:
        return self._read(Space.PORT, port, size)

    def out(self, port: int, value: int, size: int = 1) -> None:
        self._write(Space.PORT, port, size, value)

    def read(self, address: int, size: int = 4) -> int:
        return self._read(Space.MMIO, address, size)

    def write(self, address: int, value: int, size: int = 4) -> None:
        self._write(Space.MMIO, address, size, value)


class FakeAssembly:
    """vmm.machine.interfaces.Assembly around a Pc, for `attach(assembly)`."""

    def __init__(self, config: Any, memory: Any, pc: Pc | None = None) -> None:
        self.config, self.memory = config, memory
        self.board = pc or Pc()
        self.capabilities: frozenset[Any] = frozenset()
        self.console: Any = None
        self.components: dict[str, Any] = {}
        self.services = Services()
        self.rsdp: int | None = None
        self.marks: list[str] = []

    def warn(self, text: str) -> None:
        raise AssertionError(text)

    def mark(self, name: str) -> None:
        self.marks.append(name)

    def debug_output(self, text: bytes) -> None:
        return None

    def add(self, name: str, component: object) -> None:
        self.components[name] = component

    def get(self, name: str) -> Any:
        return self.components[name]


class FakePort:
    """A CharacterPort that keeps what was written and hands out what the test typed."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.typed = bytearray()
        self.events: list[str] = []
        self.ready: Callable[[], None] | None = None

    def write(self, data: bytes) -> None:
        self.written += data

    async def relieved(self) -> None:
        return None

    def read(self, limit: int) -> bytes:
        data = bytes(self.typed[:limit])
        del self.typed[:limit]
        return data

    def set_receiver(self, ready: Callable[[], None]) -> None:
        self.ready = ready
        if self.typed:
            ready()

    def event(self, kind: str) -> None:
        self.events.append(kind)

    def type(self, data: bytes) -> None:
        self.typed += data
        if self.ready is not None:
            self.ready()
