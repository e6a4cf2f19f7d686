"""What virtio needs from the machine it is built into. Everything is confined to the loop thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

RandomSource = Callable[[int], bytes]
"""random(n) -> n bytes. The only source of chance a device may use."""


class DeviceTimer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It does not come. Idempotent."""


class DeviceClock(Protocol):
    """The machine's time."""

    def now_ns(self) -> int:
        """ns since some moment."""

    def call_at(self, deadline_ns: int, callback: Callable[[], None]) -> DeviceTimer:
        """Call once when the clock has come to `deadline_ns`."""


class DmaMemory(Protocol):
    """Guest RAM as devices see it."""

    def regions(self) -> Sequence[tuple[int, memoryview]]:
        """(guest-physical address, writable buffer), stable while the machine lives."""

    def view(self, gpa: int, length: int) -> memoryview:
        """`length` bytes at `gpa`; GuestError unless all of them are RAM of one region."""

    def written(self, gpa: int, length: int) -> None:
        """A device wrote there (dirty log, translated code).

        A memory may have `written_ranges(ranges: bytes)` besides: the same for many, pairs of 64 bits (gpa, length);
        and `discard_ranges(ranges: Sequence[tuple[int, int]]) -> int`: the host takes back what is behind the whole
        pages of these, which hold zeros afterwards or what they held; how many bytes it took. GuestError if they are
        not RAM.

        A memory of which parts are still on their way from another host has `missing`, a bitmap of pages of 4 KiB for
        each region, and `want(gpa, length)`, which has those of a range fetched: a ring (`virtio._ring.Ring`) gives
        out no chain before all of it has come, so that no device ever waits for a page in the loop."""


class Interrupts(Protocol):
    """A device's notifications to its driver (2.3); what becomes of them is the transport's."""

    def signal_queue(self, index: int) -> None:
        """Used buffer notification of queue `index`."""

    def signal_config(self) -> None:
        """Configuration change notification."""


class Chain(Protocol):
    """A descriptor chain (2.7.5): device-readable bytes, then device-writable ones."""

    @property
    def id(self) -> int:
        """What the used element names it by: head index (split ring) or buffer id (packed ring)."""

    @property
    def slots(self) -> int:
        """Ring entries that it takes."""

    @property
    def readable_length(self) -> int:
        """Bytes for the device to read."""

    @property
    def writable_length(self) -> int:
        """Bytes that the device may write."""

    @property
    def written(self) -> int:
        """Bytes that write() has stored, counted from the start."""

    @property
    def segments(self) -> tuple[tuple[int, int, bool], ...]:
        """(gpa, length, device-writable) each."""

    def read(self, length: int = -1, offset: int = 0, /) -> bytes:
        """At most `length` device-readable bytes (-1: all) from `offset`."""

    def write(self, data: bytes | bytearray | memoryview, offset: int | None = None, /) -> int:
        """Store into the device-writable part, by default after what was written; the number of bytes that
        fit."""

    def readable(self) -> list[memoryview]:
        """Views of the device-readable bytes, one a segment; not to be kept after push()."""

    def writable(self) -> list[memoryview]:
        """Views of the device-writable bytes, likewise."""


@runtime_checkable
class Ring(Protocol):
    """One virtqueue, device side; it never signals. `virtio._ring.Ring` and the reference in Python are
    two."""

    @property
    def size(self) -> int:
        """Queue Size: entries of the ring."""

    @property
    def in_flight(self) -> int:
        """Chains popped and not yet pushed."""

    @property
    def next_avail(self) -> int:
        """Where the next chain is looked for."""

    @property
    def next_used(self) -> int:
        """Where the next used chain goes."""

    @property
    def error(self) -> str | None:
        """Why the ring is broken; None while it is not."""

    def pop(self) -> Chain | None:
        """The next available chain; GuestError if the ring is malformed, and from then on."""

    def pop_batch(self, limit: int, /) -> Sequence[Chain]:
        """Up to `limit` chains. GuestError as for pop(); chains before the fault come first."""

    def undo_pop(self, chain: Any, /) -> None:
        """Make the chain popped last available again."""

    def push(self, chain: Any, written: int | None = None, /) -> None:
        """Return a chain with `written` bytes stored (default: what write() counted)."""

    def push_batch(self, chains: Sequence[tuple[Any, int]], /) -> None:
        """Return chains so that the driver sees all of them at once."""

    def needs_notification(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call."""

    def enable_notification(self) -> bool:
        """Ask for notifications; True: more came meanwhile, so pop again."""

    def want_more(self) -> None:
        """Ask for a notification with the next chain although some are available; then try once more."""

    def disable_notification(self) -> None:
        """Tell the driver not to notify."""

    def look_again(self) -> bool:
        """Pages of memory that were missing have come: whether the ring waited for some, and is to be popped again."""

    def has_available(self) -> bool:
        """A chain is available."""

    def close(self) -> None:
        """The queue was reset: its chains can no longer touch guest memory."""

    def save(self) -> dict[str, Any]:
        """The positions; StateError while chains are in flight."""

    def restore(self, next_avail: int, next_used: int, avail_wrap: bool = True, used_wrap: bool = True) -> None:
        """Take over what save() gave."""
