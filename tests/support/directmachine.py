"""A vmm.interfaces.Machine without a core: a test plays the guest by `inb`/`outb` and sees the lines at once.

Posted writes are queued until `drain()` (which synchronous accesses call first, as a core does); shadow reads are
answered from the shadow and queue their notices in the same queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cpu.contract import Space
from vmm.bus import Bus
from vmm.clock import MachineClock
from vmm.interfaces import BusDevice, PostedDevice
from vmm.interrupts import InterruptLines, Line


class FakeTime:
    """A clock that stands until the test moves it."""

    def __init__(self) -> None:
        self.now = 0
        self.alarm: int | None = None

    def now_ns(self) -> int:
        return self.now

    def set_alarm(self, deadline_ns: int | None) -> None:
        self.alarm = deadline_ns


class DirectShadow:
    def __init__(self, notice: Callable[[], None] | None) -> None:
        self.notice = notice
        self.value: int | None = None
        self.after: int | None = None

    def set(self, value: int, after: int | None = None) -> None:
        self.value, self.after = value, after

    def invalidate(self) -> None:
        self.value = None


class DirectMachine:
    def __init__(self) -> None:
        self.time = FakeTime()
        self.clock = MachineClock(self.time, 0)
        self.buses = (Bus("port", 1 << 16), Bus("MMIO", 1 << 52))
        self.levels: dict[int, bool] = {}
        self.edges: list[tuple[int, bool]] = []
        self.lines = InterruptLines(self._drive)
        self.messages: list[tuple[int, int]] = []
        self.requests: list[tuple[str, str, int | None]] = []
        self.posts: dict[tuple[Space, int, int], tuple[PostedDevice, int]] = {}
        self.shadows: dict[tuple[Space, int, int], DirectShadow] = {}
        self.queue: list[Callable[[], None]] = []
        self.synchronous = 0
        """Accesses that had to wait for the loop."""

    def _drive(self, gsi: int, level: bool) -> None:
        self.levels[gsi] = level
        self.edges.append((gsi, level))

    # vmm.interfaces.Machine

    def random(self, count: int) -> bytes:
        return bytes(count)

    def irq_line(self, gsi: int) -> Line:
        return self.lines.line(gsi)

    def signal_msi(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    def map(self, space: Space, address: int, size: int, device: BusDevice, name: str) -> None:
        self.buses[space].add(address, size, device, name)

    def unmap(self, space: Space, address: int) -> None:
        self.buses[space].remove(address)

    def post(self, space: Space, address: int, size: int, device: PostedDevice, offset: int) -> None:
        self.posts[space, address, size] = (device, offset)

    def unpost(self, space: Space, address: int, size: int) -> None:
        del self.posts[space, address, size]

    def shadow(
        self, space: Space, address: int, size: int, notice: Callable[[], None] | None = None
    ) -> DirectShadow:
        shadow = self.shadows[space, address, size] = DirectShadow(notice)
        return shadow

    def unshadow(self, space: Space, address: int, size: int) -> None:
        del self.shadows[space, address, size]

    def ioeventfd(
        self, space: Space, address: int, size: int, match: int | None, callback: Callable[[], None]
    ) -> Callable[[], None]:
        raise NotImplementedError

    def request(self, action: Any, detail: str, status: int | None = None) -> None:
        self.requests.append((action, detail, status))

    # The guest's side.

    def drain(self) -> None:
        """What the loop does with the posted ring."""
        while self.queue:
            self.queue.pop(0)()

    def out(self, port: int, value: int, size: int = 1) -> None:
        posted = self.posts.get((Space.PORT, port, size))
        if posted is not None:
            device, offset = posted
            data = value.to_bytes(size, "little")
            self.queue.append(lambda: device.posted(offset, size, data))
            return
        self.drain()
        self.synchronous += 1
        self.buses[Space.PORT].write(port, size, value)

    def inp(self, port: int, size: int = 1) -> int:
        shadow = self.shadows.get((Space.PORT, port, size))
        if shadow is not None and shadow.value is not None:
            value = shadow.value
            if shadow.after is not None:
                shadow.value, shadow.after = shadow.after, None
                if shadow.notice is not None:
                    self.queue.append(shadow.notice)
            return value
        self.drain()
        self.synchronous += 1
        return self.buses[Space.PORT].read(port, size)


class Port:
    """A CharacterPort that keeps what was written and hands out what the test typed."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.typed = bytearray()
        self.events: list[str] = []
        self.ready: Callable[[], None] | None = None

    def write(self, data: bytes) -> None:
        self.written += data

    def read(self, limit: int) -> bytes:
        data = bytes(self.typed[:limit])
        del self.typed[:limit]
        return data

    def set_receiver(self, ready: Callable[[], None]) -> None:
        self.ready = ready

    def event(self, kind: str) -> None:
        self.events.append(kind)

    def type(self, data: bytes) -> None:
        self.typed += data
        if self.ready is not None:
            self.ready()
