"""A machine for device tests: real buses and interrupt lines, a clock that the test moves, everything recorded."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Literal

from cpu.contract import Space
from vmm.bus import Bus
from vmm.interfaces import BusDevice, PostedDevice
from vmm.interrupts import InterruptLines, Line

SECOND = 1_000_000_000


class ManualClock:
    """Stands still until `advance`. Its epoch is 2024-02-29T23:59:00Z unless given."""

    def __init__(self, epoch_s: int = 1_709_251_140) -> None:
        self._now = 0
        self.epoch_ns = epoch_s * SECOND
        self._timers: list[tuple[int, int, ManualTimer]] = []
        self._count = 0

    def now_ns(self) -> int:
        return self._now

    def wall_ns(self) -> int:
        return self.epoch_ns + self._now

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(callback)
        self._count += 1
        heapq.heappush(self._timers, (deadline_ns, self._count, timer))
        return timer

    def advance(self, ns: int) -> None:
        """Let time pass, running what is due at its own moment."""
        end = self._now + ns
        while self._timers and self._timers[0][0] <= end:
            deadline, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, deadline)
            if not timer.cancelled:
                timer.callback()
        self._now = end

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self._timers)


class ManualTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class RecordedShadow:
    """A shadow register: `value` while valid, None otherwise."""

    def __init__(self) -> None:
        self.value: int | None = None
        self.after: int | None = None

    def set(self, value: int, after: int | None = None) -> None:
        self.value, self.after = value, after

    def invalidate(self) -> None:
        self.value = self.after = None


class Pc:
    """vmm.interfaces.Machine; guest accesses by `inb` and friends."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ports, self.mmio = Bus("port", 1 << 16), Bus("MMIO", 1 << 52)
        self._buses = (self.ports, self.mmio)
        self.levels: dict[int, bool] = {}
        self.lines = InterruptLines(self._drive)
        self.messages: list[tuple[int, int]] = []
        self.requests: list[tuple[str, str, int | None]] = []
        self.posts: dict[tuple[Space, int, int], tuple[PostedDevice, int]] = {}
        self.shadows: dict[tuple[Space, int, int], RecordedShadow] = {}
        self.edges: list[tuple[int, bool]] = []

    def _drive(self, gsi: int, level: bool) -> None:
        self.levels[gsi] = level
        self.edges.append((gsi, level))

    @staticmethod
    def random(count: int) -> bytes:
        return bytes(range(count % 256))

    def irq_line(self, gsi: int) -> Line:
        return self.lines.line(gsi)

    def signal_msi(self, address: int, data: int) -> None:
        self.messages.append((address, data))

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
    ) -> RecordedShadow:
        shadow = self.shadows[space, address, size] = RecordedShadow()
        return shadow

    def unshadow(self, space: Space, address: int, size: int) -> None:
        del self.shadows[space, address, size]

    def ioeventfd(
        self, space: Space, address: int, size: int, match: int | None, callback: Callable[[], None]
    ) -> Callable[[], None]:
        return lambda: None

    def request(self, action: Literal["shutdown", "reset", "crash"], detail: str, status: int | None = None) -> None:
        self.requests.append((action, detail, status))

    # The guest's side.

    def _read(self, space: Space, address: int, size: int) -> int:
        shadow = self.shadows.get((space, address, size))
        if shadow is not None and shadow.value is not None:
            return shadow.value
        return self._buses[space].read(address, size)

    def _write(self, space: Space, address: int, size: int, value: int) -> None:
        post = self.posts.get((space, address, size))
        if post is not None:
            post[0].posted(post[1], size, value.to_bytes(size, "little"))
        else:
            self._buses[space].write(address, size, value)

    def inp(self, port: int, size: int = 1) -> int:
        return self._read(Space.PORT, port, size)

    def out(self, port: int, value: int, size: int = 1) -> None:
        self._write(Space.PORT, port, size, value)

    def read(self, address: int, size: int = 4) -> int:
        return self._read(Space.MMIO, address, size)

    def write(self, address: int, value: int, size: int = 4) -> None:
        self._write(Space.MMIO, address, size, value)


class FakeAssembly:
    """vmm.interfaces.Assembly around a Pc, for `attach(assembly)`."""

    def __init__(self, config: Any, memory: Any, pc: Pc | None = None) -> None:
        self.config, self.memory = config, memory
        self.machine = pc or Pc()
        self.capabilities: frozenset[Any] = frozenset()
        self.console: Any = None
        self.components: dict[str, Any] = {}
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
