"""Memory balloon device (virtio 1.2, 5.5): pages that the guest gives up, and statistics of its memory.

Inflated and reported pages go back to the host at once (DmaMemory.discard_ranges) and read as zeros afterwards. A
queue stands at the number that it has among those whose features were negotiated, as drivers count them. Loop thread
only.
"""

from __future__ import annotations

import asyncio
import enum
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from virtio.constants import DeviceId
from virtio.device import Activation, Device
from virtio.errors import ConfigError, GuestError
from virtio.layouts import BalloonConfig, fast
from virtio.protocols import Chain
from virtio.queue import Queue
from virtio.state import U32


class BalloonFeature(enum.IntFlag):
    """5.5.3"""

    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    PAGE_POISON = 1 << 4
    PAGE_REPORTING = 1 << 5


PAGE = 4096
"""5.5.6: "These addresses are divided by 4096", whatever the guest's pages are."""
PAGES_MAX = 1 << 18
"""Pages that one request may name: 1 GiB of them. Linux names 256."""
TURN_PAGES = 2048
"""Pages that are given back in one turn of the loop, or little more: the host takes a millisecond for them."""
REPORT_MAX = 1 << 40
"""Bytes that one report may name."""
STATISTICS = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free", "total", "available", "caches",
    "hugetlb_allocations", "hugetlb_failures",
)  # fmt: skip
"""5.5.6.4: what the driver tells, by tag; amounts of memory are bytes."""
STATISTICS_BYTES = 4096
"""Of a buffer of statistics, what is read."""
_config = fast(BalloonConfig)
_stat = struct.Struct("<HQ")
_ACTUAL, _POISON = 4, 12


def page_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Page numbers in any order, as (gpa, length) of what is adjacent."""
    found: list[tuple[int, int]] = []
    start = end = -1
    for number in sorted(numbers):
        if number == end:
            end += 1
        elif number >= end:
            if end > start:
                found.append((start * PAGE, (end - start) * PAGE))
            start, end = number, number + 1
    if end > start:
        found.append((start * PAGE, (end - start) * PAGE))
    return found


@dataclass(frozen=True, slots=True)
class BalloonState:
    """A balloon: how many pages it is to have, how many the driver says it has, and what free pages hold."""

    kind: ClassVar = "virtio-balloon"
    version: ClassVar = 1
    target: U32
    actual: U32
    poison: U32


class BalloonDevice(Device):
    """A balloon in memory that can discard ranges (DmaMemory)."""

    device_id = DeviceId.BALLOON
    device_features = int(
        BalloonFeature.STATS_VQ
        | BalloonFeature.DEFLATE_ON_OOM
        | BalloonFeature.PAGE_POISON
        | BalloonFeature.PAGE_REPORTING
    )
    queue_sizes = (128, 128, 16, 128)
    state_type = BalloonState

    def __init__(self) -> None:
        super().__init__()
        self.target = 0
        """Pages that it is to have; see `set_target`."""
        self.actual = 0
        """Pages that it has, as the driver says."""
        self._poison = 0
        self.statistics: dict[str, int] = {}
        """The driver's last statistics, by STATISTICS' names; empty before there are any."""
        self._statistics_queue: Queue | None = None
        self._asked = False
        self._heard = asyncio.Event()
        self.discarded = 0
        """Bytes given back to the host so far."""

    def config(self) -> bytes:
        return _config.pack(self.target, self.actual, 0, self._poison)

    def config_written(self, offset: int, data: bytes) -> None:
        # 5.5.4: the driver writes `actual`, and `poison_val` before DRIVER_OK
        image = bytearray(self.config())
        image[offset : offset + len(data)] = data
        _, actual, _, poison = _config.unpack(bytes(image))
        if _ACTUAL <= offset < _ACTUAL + 4:
            self.actual = actual
        elif offset >= _POISON and not self.is_active:
            self._poison = poison

    def set_target(self, pages: int) -> None:
        """Ask the guest for so many pages in all, at any time. ConfigError."""
        if not 0 <= pages < 1 << 32:
            raise ConfigError(f"a balloon of {pages} pages is not possible")
        if pages != self.target:
            self.target = pages
            self.config_changed()

    # Life

    def started(self, active: Activation) -> None:
        queues = iter(active.queues)
        self.spawn(self._inflate(next(queues)), "inflate")
        self.spawn(self._deflate(next(queues)), "deflate")
        if active.features & BalloonFeature.STATS_VQ:
            self._statistics_queue = next(queues)
            # a driver may have notified it before DRIVER_OK
            self.guarded(self._look_at_statistics, self._statistics_queue)
        if active.features & BalloonFeature.PAGE_REPORTING:
            self.spawn(self._report(next(queues)), "report")

    def stopped(self) -> bool:
        self._statistics_queue = None
        self._asked = False
        self.statistics = {}
        self.actual = self._poison = 0
        return True

    def save_device(self) -> BalloonState:
        return BalloonState(self.target, self.actual, self._poison)

    def restore_device(self, state: BalloonState) -> None:
        self.target, self.actual, self._poison = state.target, state.actual, state.poison

    def queue_notified(self, index: int) -> None:
        queue = self.active.queues[index]
        if queue is self._statistics_queue:
            self._look_at_statistics(queue)
        else:
            queue.wake()

    # Pages

    async def _inflate(self, queue: Queue) -> None:
        async for chain in queue:
            if chain.readable_length > 4 * PAGES_MAX:
                raise GuestError(f"{chain.readable_length // 4} pages for the balloon at once; it takes {PAGES_MAX}")
            for at in range(0, chain.readable_length // 4 * 4, 4 * TURN_PAGES):
                if at:
                    await asyncio.sleep(0)
                data = chain.read(min(4 * TURN_PAGES, chain.readable_length - at), at)
                numbers = array("I", data[: len(data) // 4 * 4])
                self._discard(page_ranges(numbers))
            # 5.5.6: "the device acknowledges inflate and deflate requests by using the descriptor."
            queue.complete(chain, 0)

    async def _deflate(self, queue: Queue) -> None:
        async for chain in queue:
            queue.complete(chain, 0)  # the pages are there as soon as they are touched

    async def _report(self, queue: Queue) -> None:
        async for chain in queue:
            # 5.5.6.7.2: "If the VIRTIO_BALLOON_F_PAGE_POISON feature has been negotiated, the device MUST NOT modify
            # the the content of a reported page to a value other than poison_val."
            if not (self.active.features & BalloonFeature.PAGE_POISON and self._poison):
                await self._discard_reported(chain)
            queue.complete(chain, 0)

    async def _discard_reported(self, chain: Chain) -> None:
        if chain.writable_length > REPORT_MAX:
            raise GuestError(f"a report of {chain.writable_length} bytes of free memory")
        turn = TURN_PAGES * PAGE
        moved = 0
        for gpa, length, writable in chain.segments:
            for at in range(0, length if writable else 0, turn):
                if moved >= turn:
                    await asyncio.sleep(0)
                    moved = 0
                part = min(turn, length - at)
                self._discard([(gpa + at, part)])
                moved += part

    def _discard(self, ranges: list[tuple[int, int]]) -> None:
        discard = getattr(self.memory, "discard_ranges", None)
        if discard is not None:
            self.discarded += discard(ranges)

    # Statistics (5.5.6.3). The driver's buffer stays available: it is used only when newer ones are asked for.

    async def refresh(self, timeout: float) -> dict[str, int]:
        """Ask the driver for statistics of now, and wait up to `timeout` seconds for them; what is known then."""
        queue = self._statistics_queue
        if queue is not None and queue.enabled and not self.paused:
            self._heard.clear()
            self.guarded(self._ask, queue)
            try:
                async with asyncio.timeout(timeout):
                    await self._heard.wait()
            except TimeoutError:
                pass
        return dict(self.statistics)

    def _ask(self, queue: Queue) -> None:
        if not self._asked and (chain := queue.pop()) is not None:
            self._asked = True
            queue.complete(chain, 0)
            queue.ring.enable_notification()
            self._look_at_statistics(queue)

    def _look_at_statistics(self, queue: Queue) -> None:
        chain = queue.pop()
        if chain is None:
            return
        data = chain.read(min(chain.readable_length, STATISTICS_BYTES) // _stat.size * _stat.size)
        queue.ring.undo_pop(chain)
        # 5.5.6.3.2: "the device MUST ignore entries with tag values that it does not recognize", "in any order"
        known = ((tag, value) for tag, value in _stat.iter_unpack(data) if tag < len(STATISTICS))
        self.statistics = {STATISTICS[tag]: value for tag, value in known}
        self._asked = False
        self._heard.set()
