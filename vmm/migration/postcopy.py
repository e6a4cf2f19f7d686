"""The source's part of post-copy: which pages have to be there before the machine runs, and the sending of the others.

The machine stands still here for good, so its memory does not change. `Serving` has a native thread send it
(vmm/native/serve.c); what is waited for there goes first. Loop thread, unless said otherwise.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from vmm import _native
from vmm.machine import layout
from vmm.migration.link import Link
from vmm.migration.protocol import MISSING, MISSING_BYTES, PAGE, Kind

KVM_MSRS = (0x11, 0x12, *range(0x4B564D00, 0x4B564D10))
"""MSRs that hold addresses of what KVM shares with its guest (Linux: Documentation/virt/kvm/x86/msr.rst)."""
_QUEUE = {"size", "enabled", "desc", "driver", "device"}


def ranges_at_once(state: Any) -> list[tuple[int, int]]:
    """(gpa, length) of what is touched as a machine is restored from this encoded state, which is well formed, or by
    the loop before any vCPU: the rings of its queues, and what its vCPUs share with the host."""
    # Where a reset looks for the warm-boot flag; what a restore writes.
    found: list[tuple[int, int]] = [(layout.WARM_BOOT_FLAG, 2), (layout.VM_GENERATION_ID, 16)]

    def queue(value: dict[str, Any]) -> None:
        size = value["size"]
        for name, length in (("desc", 16 * size), ("driver", 6 + 2 * size), ("device", 6 + 8 * size)):
            found.append((value[name], length))

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if value.keys() >= _QUEUE and all(isinstance(value[name], int) for name in _QUEUE):
                if value["enabled"]:
                    queue(value)
                return
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list):
            for inner in value:
                visit(inner)

    fields = state["fields"]
    visit(fields["components"])
    for vcpu in fields["vcpus"]:
        for msr in vcpu["fields"]["msrs"]:
            if msr["index"] in KVM_MSRS and msr["value"]:
                found.append((msr["value"] & ~0x3F, 64))
    return found


def pages_of(ranges: Sequence[tuple[int, int]], regions: Sequence[tuple[int, memoryview]]) -> list[bytearray]:
    """Bitmaps of the pages of ranges, a region each; what is outside memory is left out."""
    bitmaps = [bytearray((len(view) // PAGE + 63) // 64 * 8) for _, view in regions]
    for gpa, length in ranges:
        for (start, view), bitmap in zip(regions, bitmaps, strict=True):
            first, last = max(gpa, start), min(gpa + length, start + len(view))
            for page in range((first - start) // PAGE, (last - 1 - start) // PAGE + 1 if first < last else 0):
                bitmap[page // 8] |= 1 << page % 8
    return bitmaps


def split(bitmaps: Sequence[bytes | bytearray], chosen: Sequence[bytes | bytearray]) -> tuple[list[bytes], list[bytes]]:
    """(those of the pages that are chosen, the others), as bitmaps."""
    both, rest = [], []
    for bitmap, mask in zip(bitmaps, chosen, strict=True):
        whole, part = int.from_bytes(bitmap, "little"), int.from_bytes(mask, "little")
        both.append((whole & part).to_bytes(len(bitmap), "little"))
        rest.append((whole & ~part).to_bytes(len(bitmap), "little"))
    return both, rest


def missing_frames(bitmaps: Sequence[bytes | bytearray | mmap.mmap]) -> Iterator[bytes]:
    """Payloads of MISSING frames; pieces without a page are left out."""
    for region, bitmap in enumerate(bitmaps):
        for at in range(0, len(bitmap), MISSING_BYTES):
            part = bytes(bitmap[at : at + MISSING_BYTES])
            if any(part):
                yield MISSING.pack(region, at * 8) + part


class Serving:
    """Sends the pages of the bitmaps over one connection, in a thread."""

    def __init__(self, link: Link, views: Sequence[memoryview], bitmaps: Sequence[bytes], bandwidth: int) -> None:
        """It begins: at first only with what is asked for."""
        self.link = link
        self._loop = asyncio.get_running_loop()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._page = mmap.mmap(-1, PAGE)
        self._counts = memoryview(self._page)[:64].cast("Q")
        self._counts[2] = bandwidth
        todo = []
        for bitmap in bitmaps:
            room = mmap.mmap(-1, max(len(bitmap), 8))
            room[: len(bitmap)] = bitmap
            todo.append(room)
        self._work = list(zip(views, todo, strict=True))
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """done: the other side has all; else why not."""
        self._thread = threading.Thread(target=self._serve, name="migration pages", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        how = "lost"
        try:
            how = _native.serve_pages(self.link.fileno(), self._wake, self._work, self._counts)
        finally:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._over, how)

    def _over(self, how: str) -> None:
        if not self.ended.done():
            self.ended.set_result(how)

    def stream(self) -> None:
        """Send also what nobody asked for, from now on."""
        self._counts[0] = 1
        os.eventfd_write(self._wake, 1)

    def set_bandwidth(self, bandwidth: int) -> None:
        """Bytes a second at most, of what nobody asked for; 0: no limit."""
        self._counts[2] = bandwidth
        os.eventfd_write(self._wake, 1)

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """(bytes sent, pages, zero pages, pages that were asked for, pages left)."""
        _, _, _, sent, pages, zero, urgent, left = self._counts
        return sent, pages, zero, urgent, left

    async def aclose(self) -> None:
        """End it, and the connection. Idempotent."""
        if self._wake < 0:
            return
        self._counts[1] = 1
        os.eventfd_write(self._wake, 1)
        self.link.abort()
        await asyncio.to_thread(self._thread.join)
        self._work = []
        wake, self._wake = self._wake, -1
        os.close(wake)
        await asyncio.to_thread(self.link.close)


async def send_missing(call: Any, link: Link, bitmaps: Sequence[bytes]) -> None:
    """MISSING, for all of them. Raises Closed."""
    for payload in missing_frames(bitmaps):
        await call(link.send, Kind.MISSING, payload)
