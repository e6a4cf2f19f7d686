"""A virtqueue as a device uses it: a ring, its number, and the way to tell the driver.

`async for chain in queue` waits for the driver's notifications; `pop_batch` and `push` are for devices that
work in batches. Loop thread only. A queue the driver did not enable has no ring: nothing is ever available in
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from virtio.errors import StateError
from virtio.protocols import Chain, Interrupts, Ring

TURN = 16
"""Chains that one `async for` takes before other tasks get a turn."""
TURN_BYTES = 256 << 10
"""Bytes in them, likewise."""


class Queue:
    """One virtqueue of an active device."""

    def __init__(self, index: int, ring: Ring | None, interrupts: Interrupts) -> None:
        self.index = index
        self._ring = ring
        self._interrupts = interrupts
        self._event = asyncio.Event()
        self._taken = 0
        self._bytes = 0
        self._stopping = False
        self.paused = False
        """While set nothing is available."""
        self.fair = True
        """`async for` gives other tasks a turn now and then."""
        self.on_push: Callable[[], object] | None = None
        """Called after each push, while somebody waits for the queue to drain."""

    @property
    def enabled(self) -> bool:
        """The driver enabled it, and did not stop it since."""
        return self._ring is not None and not self._stopping

    @property
    def _open(self) -> bool:
        return not (self.paused or self._stopping)

    @property
    def ring(self) -> Ring:
        """The ring; StateError if the driver did not enable the queue."""
        if self._ring is None:
            raise StateError(f"queue {self.index} is not enabled")
        return self._ring

    @property
    def in_flight(self) -> int:
        """Chains that were taken and not yet completed."""
        return self._ring.in_flight if self._ring is not None else 0

    def stop(self) -> None:
        """The driver stops using the queue: no more chains are taken."""
        self._stopping = True

    def stopped(self) -> bool:
        """Whether a queue that was stopped has returned its last chain, and does not touch guest memory any more."""
        if self._stopping and not self.in_flight:
            self.close()
        return self._stopping and self._ring is None

    def restart(self, ring: Ring) -> None:
        """The driver uses the queue again, or only now, with a new ring. Not while chains of the old one are out."""
        self._ring = ring
        self._stopping = False
        self._event.set()

    def close(self) -> None:
        """Abandon what is in flight."""
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()

    def uses(self, ring: Ring) -> bool:
        """Whether this is the queue's ring now."""
        return self._ring is ring

    def look_again(self) -> bool:
        """Ring.look_again"""
        return self._ring is not None and self._ring.look_again()

    def wake(self) -> None:
        """The driver notified the queue."""
        self._event.set()

    def pop(self) -> Chain | None:
        """The next available chain, if any; GuestError if the ring is malformed."""
        return self._ring.pop() if self._ring is not None and self._open else None

    def pop_batch(self, limit: int = TURN) -> Sequence[Chain]:
        """Ring.pop_batch"""
        return self._ring.pop_batch(limit) if self._ring is not None and self._open else []

    def push(self, chain: Chain, written: int | None = None) -> None:
        """Return a chain without telling the driver: `notify` does, once for a batch."""
        self.ring.push(chain, written)
        if self.on_push is not None:
            self.on_push()

    def push_batch(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """Ring.push_batch"""
        self.ring.push_batch(chains)
        if self.on_push is not None:
            self.on_push()

    def notify(self) -> None:
        """Send a used buffer notification if the driver wants one for what was pushed."""
        if self._ring is not None and self._ring.needs_notification():
            self._interrupts.signal_queue(self.index)

    def complete(self, chain: Chain, written: int | None = None) -> None:
        """Return a chain and tell the driver."""
        self.push(chain, written)
        self.notify()

    def want_more(self) -> None:
        """Ask to be woken by the next chain although some are available; then try once more, then `wait`."""
        self._event.clear()
        if self._ring is not None and self._open:
            self._ring.want_more()

    async def wait(self) -> None:
        """Until the driver notifies the queue."""
        await self._event.wait()

    def __aiter__(self) -> Queue:
        return self

    async def __anext__(self) -> Chain:
        if self.fair and (self._taken >= TURN or self._bytes >= TURN_BYTES):
            self._taken = self._bytes = 0
            await asyncio.sleep(0)  # a driver that never stops must not keep the loop
        while True:
            chain = self.pop()
            if chain is not None:
                self._taken += 1
                self._bytes += chain.readable_length + chain.writable_length
                return chain
            self._event.clear()
            if self._ring is not None and self._open and self._ring.enable_notification():
                continue
            await self._event.wait()
