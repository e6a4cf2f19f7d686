"""Pages of guest memory that are still on another host while the machine runs here (post-copy).

For each region a bitmap says which pages are missing. `vmm._native.Pager`, a native thread, fetches them over a
connection as they are touched, and clears their bits. Whoever touches a missing page waits in a page fault. vCPUs may
wait so, but the loop must not: before it touches memory for a guest it asks `here()`, and calls `want()` for what is
missing. This module must not know devices, nor what is said over the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence

from cpu.values import dataclass
from vmm import _native
from vmm.errors import HostError, StateError, os_reason

PAGE = 4096
WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """How far the fetching has come. Numbers count pages, unless their names end in _ns."""

    state: str
    """live, broken (the connection ended), whole (nothing is missing) or given up: enum pager_state
    (native/pager.h)."""
    why: str
    """Why the connection is broken; empty if it is not."""
    left: int
    """Pages that are missing."""
    faults: int
    """Page faults that waited for the connection."""
    slowest_ns: int
    """The longest wait of such a fault."""
    waited_ns: int
    """The waits of all such faults together."""
    pages: int
    """Pages that came with data."""
    zero: int
    """Pages that came as zeroes."""


class AbsentPages:
    """The missing pages of one memory. Loop thread, unless said otherwise."""

    def __init__(self, regions: Sequence[tuple[int, memoryview]], *, kernel: bool) -> None:
        """`regions`: GuestMemory.regions(). `kernel`: the core lets the kernel touch memory, as KVM does. Raises
        HostError if the host does not let this process answer such page faults."""
        self.check_host(kernel=kernel)
        self._regions = list(regions)
        self._kernel = kernel
        self._pager: _native.Pager | None = None
        self._waiters: list[tuple[tuple[tuple[int, int], ...], asyncio.Future[None]]] = []
        self._listener: Callable[[], None] | None = None
        self._last = Fetched("live", "", 0, 0, 0, 0, 0, 0)
        self.bitmaps = [mmap.mmap(-1, (len(view) // PAGE + 63) // 64 * 8) for _, view in self._regions]
        """One for each region. Bit n says that page n of the region is missing."""

    @staticmethod
    def check_host(*, kernel: bool) -> None:
        """Raises HostError if the host does not let this process answer such page faults."""
        if not _native.can_page(kernel):
            cure = "; or run it on the software core, with --core soft" if kernel else ""
            raise HostError(
                "post-copy: this process may not answer the page faults of its memory (userfaultfd); give it access to "
                f"/dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1{cure}"
            )

    def mark(self, region: int, first: int, words: bytes | memoryview) -> None:
        """Set which of these pages are missing. Call it before begin(). Bit 0 of `words`, 64-bit ones, is page `first`,
        a multiple of 64. *any thread*. Raises StateError if the pages are not in memory."""
        bitmap = self.bitmaps[region] if region < len(self.bitmaps) else b""
        at = first // 8
        if first % 64 or len(words) % 8 or at + len(words) > len(bitmap):
            raise StateError("missing pages that are not in memory")
        bitmap[at : at + len(words)] = bytes(words)  # type: ignore[index]
        spare = len(bitmap) * 8 - len(self._regions[region][1]) // PAGE
        if spare and int.from_bytes(bitmap[-8:], "little") >> (64 - spare):
            raise StateError("missing pages that are not in memory")

    @property
    def any(self) -> bool:
        """Whether any page is missing."""
        return any(_native.count(bitmap) for bitmap in self.bitmaps)

    @property
    def active(self) -> bool:
        """Whether begin() was called, and close() was not yet."""
        return self._pager is not None

    def begin(self) -> None:
        """Drop what stands in the missing pages, and answer faults in them from now on. During the call nobody may
        touch memory. Blocks; *any thread*. Raises HostError."""
        try:
            self._pager = _native.Pager(
                [(view, bitmap) for (_, view), bitmap in zip(self._regions, self.bitmaps, strict=True)], self._kernel
            )
        except OSError as error:
            raise HostError(f"post-copy: memory cannot be watched: {os_reason(error)}") from error

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called in the loop whenever wanted pages came, or the state in status() changed."""
        assert self._pager is not None
        self._listener = listener
        asyncio.get_running_loop().add_reader(self._pager.fileno(), self._told)

    def attach(self, fd: int) -> None:
        """Fetch over this connection, a stream socket, from now on. The pager keeps a duplicate of the descriptor.
        Raises StateError if nothing is missing any more."""
        assert self._pager is not None
        try:
            self._pager.attach(fd)
        except OSError as error:
            raise StateError("nothing is missing any more") from error

    def detach(self) -> None:
        """Leave the connection: whoever touches a missing page waits for the next connection."""
        if self._pager is not None:
            self._pager.detach()

    def commit(self) -> None:
        """The machine lives here from now on. Before this call the end of a connection gives the memory up; after it,
        missing pages wait for the next connection."""
        assert self._pager is not None
        self._pager.commit()

    def status(self) -> Fetched:
        """How far the fetching has come; after close(), how far it had come."""
        if self._pager is not None:
            self._last = Fetched(*self._pager.status())
        return self._last

    def here(self, gpa: int, length: int) -> bool:
        """Whether no page of the range is missing."""
        for (start, view), bitmap in zip(self._regions, self.bitmaps, strict=True):
            first, last = max(gpa, start), min(gpa + length, start + len(view))
            if first >= last or self._pager is None:
                continue
            one, end = (first - start) // PAGE, (last - 1 - start) // PAGE + 1
            part = int.from_bytes(bitmap[one // 8 : (end + 7) // 8], "little")
            if part >> one % 8 & ((1 << (end - one)) - 1):
                return False
        return True

    def want(self, gpa: int, length: int) -> None:
        """Fetch the pages of the range before others."""
        for index, (start, view) in enumerate(self._regions):
            first, last = max(gpa, start), min(gpa + length, start + len(view))
            if first < last and self._pager is not None:
                one = (first - start) // PAGE
                self._pager.want(index, one, (last - 1 - start) // PAGE + 1 - one)

    def wait(self, gpa: int, length: int) -> None:
        """Block until no page of the range is missing, the connection broke, or WAIT_SECONDS passed. A page fault would
        block, too, but would hold the interpreter's lock, which a connection by TLS may need. *any thread*"""
        if not self.here(gpa, length):
            self.want(gpa, length)
            deadline = time.monotonic() + WAIT_SECONDS
            while not self.here(gpa, length) and self.status().state == "live" and time.monotonic() < deadline:
                time.sleep(0.0005)

    async def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch these (gpa, length), and wait until none of their pages is missing, or the memory was given up. Call it
        after listen()."""
        wanted = tuple(ranges)
        for gpa, length in wanted:
            if not self.here(gpa, length):
                self.want(gpa, length)
        waiter = asyncio.get_running_loop().create_future()
        entry = (wanted, waiter)
        self._waiters.append(entry)
        self._wake()
        try:
            await waiter
        finally:
            if entry in self._waiters:
                self._waiters.remove(entry)

    def _told(self) -> None:
        assert self._pager is not None
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._pager.fileno())
        self._wake()
        if self._listener is not None:
            self._listener()

    def _wake(self) -> None:
        for entry in list(self._waiters):
            wanted, waiter = entry
            if all(self.here(gpa, length) for gpa, length in wanted):
                self._waiters.remove(entry)
                if not waiter.done():
                    waiter.set_result(None)

    def forget(self) -> None:
        """Call the listener no more. Must be called in the loop, before close(). Idempotent."""
        if self._pager is not None and self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._pager.fileno())
        self._listener = None

    def close(self) -> None:
        """Give up the missing pages: whoever waits for one goes on, and reads zeroes. *any thread*. Idempotent."""
        pager = self._pager
        if pager is not None:
            self.status()
            self._pager = None
            pager.close()
