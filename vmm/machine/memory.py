"""Guest memory: host buffers at guest-physical addresses, checked on every access.

RAM is laid out as in a PC: it goes from 0 up to the PCI hole at 3 GiB, and the rest follows from 4 GiB on. GuestMemory
implements virtio.protocols.DmaMemory. A buffer stays at its host address for the memory's life; what lies behind it
depends on the source:

- `Anonymous`: zeros of this process, with large pages where the host has them.
- `Shared`: a memfd, which other processes may map.
- `CopyOnWrite`: pieces of files (a snapshot, frozen memory), of which a page is copied when it is first written.

`freeze()` turns the first two into the third. This module must not know devices.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import itertools
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from cpu.values import dataclass
from virtio.errors import GuestError as VirtioGuestError
from vmm._native import Mapping, nonzero_pages, runs
from vmm.convert import format_size
from vmm.errors import GuestError, HostError, StateError, os_reason
from vmm.machine.layout import HIGH_MEMORY, PCI_HOLE

if TYPE_CHECKING:
    from vmm.machine.absent import AbsentPages

PAGE = 4096
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # asm-generic/mman-common.h; the mmap module has neither
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MAX_PIECES = 2048
"""freeze() keeps to this many extents, and discard() makes no more holes in their files than this. The host allows a
process 65,530 mappings (vm.max_map_count)."""


class OutsideMemory(GuestError, VirtioGuestError):
    """A guest-physical range that is not RAM; virtio's devices take it as their driver's error."""


@dataclass(frozen=True, slots=True)
class Anonymous:
    """Zeros. With `hugepages` memory comes from the host's reserved pool of large pages, through a memfd."""

    hugepages: bool = False


@dataclass(frozen=True, slots=True)
class Shared:
    """A memfd: `GuestMemory.shared` says where each region is in it. It has no large pages on most hosts."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The file holds [gpa, gpa + length) from `offset` on. All three numbers are multiples of the page size. The file
    must not change while it is mapped: if it is cut short, a process that touches what was cut is killed."""

    gpa: int
    length: int
    fd: int
    offset: int


@dataclass(frozen=True, slots=True)
class CopyOnWrite:
    """Extents that do not overlap; memory outside them is zeros. GuestMemory keeps descriptors of its own."""

    extents: tuple[Extent, ...]


MemorySource = Anonymous | Shared | CopyOnWrite


class MemoryCore(Protocol):
    """What memory needs of a core's VM (cpu.contract.Vm)."""

    def set_memory_slot(
        self, slot: int, address: int, memory: memoryview | None, *, readonly: bool = False, log_dirty: bool = False
    ) -> None: ...
    def start_dirty_log(self) -> None: ...
    def stop_dirty_log(self) -> None: ...
    def dirty_log(self, slot: int) -> bytes: ...
    def memory_written(self, address: int, length: int) -> None: ...
    def memory_written_ranges(self, ranges: bytes) -> None: ...


class _Region:
    """One buffer: its guest-physical start, its mapping, and its offset in a file that holds all memory."""

    def __init__(self, start: int, mapping: Mapping, offset: int) -> None:
        self.start, self.mapping, self.offset = start, mapping, offset
        self.size = len(mapping)
        self.view = memoryview(mapping)


class GuestMemory:
    """All RAM of one machine. Loop thread, except that views may be filled by whoever holds them.

    `on_written` and `on_written_ranges`, set by attach(), tell the core about writes by the VMM (Vm.memory_written).
    """

    def __init__(self, size: int, *, hugepages: bool = False, source: MemorySource | None = None) -> None:
        """`size` is in bytes, a multiple of 4 KiB. `hugepages` without a source means Anonymous(hugepages=True). Raises
        HostError if the host refuses, if an extent's file is too short, or if an extent is not in RAM."""
        self.size = size
        self.source: MemorySource = source if source is not None else Anonymous(hugepages)
        self.on_written: Callable[[int, int], None] | None = None
        self.on_written_ranges: Callable[[bytes], None] | None = None
        self.before_freeze: Callable[[], None] | None = None
        """freeze() calls this first. It makes other processes that map a `Shared` source let go of it."""
        self._core: MemoryCore | None = None
        self._regions: list[_Region] = []
        self._fd = -1  # memfd of a `Shared` source until it is frozen, or of large pages; -1: none
        self._granule = PAGE
        self._frozen = isinstance(self.source, CopyOnWrite)
        self._extents: list[Extent] = []  # by address, when frozen; the descriptors are among _files
        self._files: set[int] = set()
        self._holes = 0
        self._logging = False
        self.absent: AbsentPages | None = None
        """After a migration by post-copy: the pages that are still on their way. None: no page ever was."""
        self._prepared = -1  # prepare_freeze()'s copy of memory, which lacks the writes in the dirty log
        low = min(size, PCI_HOLE)
        try:
            self._open_file()
            self._add(0, low, 0)
            if size > low:
                self._add(HIGH_MEMORY, size - low, low)
            if isinstance(self.source, CopyOnWrite):
                self._map_extents(self.source.extents)
        except (OSError, ValueError, OverflowError) as error:
            self.close()
            cure = "; ask for less memory"
            if isinstance(self.source, Anonymous) and self.source.hugepages:
                cure = "; reserve pages with sysctl vm.nr_hugepages, or leave hugepages out"
            elif isinstance(self.source, CopyOnWrite):
                cure = ""
            reason = os_reason(error) if isinstance(error, OSError) else str(error)
            raise HostError(f"memory: cannot map {format_size(size)}: {reason}{cure}") from error

    def _open_file(self) -> None:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if isinstance(self.source, Anonymous) and self.source.hugepages:
            flags = os.MFD_CLOEXEC | os.MFD_HUGETLB
        elif not isinstance(self.source, Shared):
            return
        self._fd = os.memfd_create("guest-memory", flags)
        os.ftruncate(self._fd, self.size)
        if flags & os.MFD_HUGETLB:
            self._granule = os.fstat(self._fd).st_blksize

    def _add(self, start: int, size: int, offset: int) -> None:
        region = _Region(start, Mapping(size, max(self._granule, 0x20_0000)), offset)
        self._regions.append(region)
        if self._fd >= 0:
            region.mapping.map_file(0, size, self._fd, offset, shared=True, populate=self._granule > PAGE)

    def attach(self, core: MemoryCore) -> None:
        """Make every region a memory slot of the core's VM, and tell it of what is written. Raises CpuError."""
        for slot, region in enumerate(self._regions):
            core.set_memory_slot(slot, region.start, region.view)
        self._core = core
        self.on_written, self.on_written_ranges = core.memory_written, core.memory_written_ranges

    # Pages that are still on another host.
    def expect(self, *, kernel: bool) -> AbsentPages:
        """Prepare for pages that come after the machine has started. Returns what keeps and fetches them
        (vmm.machine.absent). Raises HostError."""
        from vmm.machine.absent import AbsentPages  # seldom needed

        self.absent = AbsentPages(self.regions(), kernel=kernel)
        return self.absent

    @property
    def missing(self) -> Sequence[mmap.mmap] | None:
        """For each region a bitmap of the pages that are on their way; None: no page ever was
        (virtio.protocols.DmaMemory)."""
        return self.absent.bitmaps if self.absent is not None else None

    def want(self, gpa: int, length: int) -> None:
        """Have missing pages of the range fetched. *any thread*"""
        if self.absent is not None:
            self.absent.want(gpa, length)

    def here(self, gpa: int, length: int) -> bool:
        """Whether whoever touches the range will not wait for pages of another host."""
        return self.absent is None or self.absent.here(gpa, length)

    def check_whole(self) -> None:
        """Raises StateError while a part of memory is on its way from another host."""
        if self.absent is not None and self.absent.active:
            raise StateError("the machine's memory is still on its way from another host; wait until all has come")

    # Access.
    def regions(self) -> list[tuple[int, memoryview]]:
        """(guest-physical address, writable buffer) by address; they stay until close(). Region n is slot n."""
        return [(region.start, region.view) for region in self._regions]

    def view(self, gpa: int, length: int) -> memoryview:
        """The writable bytes [gpa, gpa + length), which must lie in one region. Raises OutsideMemory otherwise. While
        pages of it are on their way from another host this call blocks, and the loop with it: ask here() first."""
        for region in self._regions:
            offset = gpa - region.start
            if 0 <= offset <= offset + length <= region.size:
                if self.absent is not None:
                    self.absent.wait(gpa, length)
                return region.view[offset : offset + length]
        raise OutsideMemory(f"guest-physical range {gpa:#x}+{length:#x} is not within memory")

    def read(self, gpa: int, length: int) -> bytes:
        """A copy. Raises GuestError."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` in and tell the core. Raises GuestError."""
        self.view(gpa, len(data))[:] = data
        self.written(gpa, len(data))

    def written(self, gpa: int, length: int) -> None:
        """[gpa, gpa + length) was written through a view: tell the core, which enters it in its dirty log. Whoever
        holds a view calls it after each write. *any thread*"""
        if self.on_written is not None:
            self.on_written(gpa, length)

    def written_ranges(self, ranges: bytes) -> None:
        """`written` for many: pairs of 64-bit numbers of this host, (gpa, length). *any thread*"""
        if self.on_written_ranges is not None:
            self.on_written_ranges(ranges)

    # What changed.
    def start_dirty_log(self) -> None:
        """Log every write from now on, by vCPUs and by the VMM. The machine may run. Raises StateError if writes are
        logged already, or pages are on their way from another host; CpuError."""
        assert self._core is not None
        self.check_whole()
        if self._logging:
            raise StateError("memory is watched already, for another snapshot, copy or migration; wait for its end")
        self._core.start_dirty_log()
        self._logging = True

    def stop_dirty_log(self) -> None:
        """Stop logging, and forget what was logged. Does nothing if no writes are logged."""
        self._logging = False
        if self._core is not None:
            self._core.stop_dirty_log()

    def take_dirty(self) -> list[tuple[int, bytes]]:
        """For each region its address and the pages written since the last call: bit n is page n of 4 KiB, in 64-bit
        words. The machine may run: a page that is copied after this call holds the writes that its bit stands for, and
        later writes set its bit in the next answer. `vmm._native.runs` reads bitmaps. Raises CpuError."""
        assert self._core is not None
        return [(region.start, self._core.dirty_log(slot)) for slot, region in enumerate(self._regions)]

    def present_pages(self, *, private: bool = False) -> list[tuple[int, bytes]]:
        """For each region its address and a bitmap of the pages that this process has in memory or swapped out. These
        are the pages that were touched, and those that the host mapped along with them. `private`: only pages that are
        not a file's, because they were written or are anonymous. Raises HostError."""
        try:
            return [(region.start, region.mapping.present_pages(private=private)) for region in self._regions]
        except OSError as error:
            raise HostError(f"memory: cannot read which pages are there: {os_reason(error)}") from error

    def small_pages(self, small: bool) -> None:
        """Ask the host to give memory in pages of 4 KiB when it is first touched. Memory that is mostly empty then
        takes little of the host's, and each page comes sooner. With False the host gives pages of 2 MiB where it can,
        as it does by default. This is a hint."""
        for region in self._regions:
            with contextlib.suppress(OSError):
                advice = mmap.MADV_NOHUGEPAGE if small else mmap.MADV_HUGEPAGE
                region.mapping.advise(0, len(region.mapping), advice)

    def populate(self, gpa: int, length: int, *, write: bool = False) -> None:
        """Have whole pages in [gpa, gpa + length) mapped before they are touched. With `write` they become this
        memory's own, as if they had been written. This is a hint: hosts before Linux 5.14 do nothing. Raises
        OutsideMemory. *any thread*"""
        region, offset, length = self._pages_within(gpa, length, PAGE)
        if length:
            try:
                region.mapping.advise(offset, length, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ)
            except OSError:
                pass

    def populate_pages(self, pages: bytes) -> None:
        """populate() for the pages of a bitmap: region after region, each in whole 64-bit words. A bitmap that is too
        short or too long is used as far as it goes. *any thread*"""
        at = 0
        for start, view in self.regions():
            words = (len(view) // PAGE + 63) // 64 * 8
            bitmap = pages[at : at + words]
            for first, count in runs(bitmap[: len(bitmap) // 8 * 8], 15):
                length = min(count * PAGE, len(view) - first * PAGE)
                if length > 0:
                    self.populate(start + first * PAGE, length)
            at += words

    def discard(self, gpa: int, length: int) -> int:
        """Give the whole pages in [gpa, gpa + length) back to the host. Returns how many bytes the host took. The guest
        reads zeros there afterwards, or what stood there before if the host took nothing. Raises OutsideMemory."""
        return self.discard_ranges(((gpa, length),))

    def discard_ranges(self, ranges: Sequence[tuple[int, int]]) -> int:
        """`discard` for many (gpa, length). Raises OutsideMemory, and then gives nothing back."""
        wanted: dict[_Region, list[tuple[int, int]]] = {}
        # While pages are on their way nothing is given back: a missing page would come nevertheless.
        on_their_way = self.absent is not None and self.absent.active
        for gpa, length in ranges:
            region, offset, whole = self._pages_within(gpa, length, self._granule)
            if whole:
                wanted.setdefault(region, []).append((offset, whole))
        advice = mmap.MADV_REMOVE if self._fd >= 0 and not self._frozen else mmap.MADV_DONTNEED
        taken = 0
        for region, pieces in () if on_their_way else wanted.items():
            if self._extents:
                pieces = [piece for piece in pieces if self._uncover(region, *piece)]
            packed = struct.pack(f"={2 * len(pieces)}Q", *itertools.chain.from_iterable(pieces))
            taken += region.mapping.advise_ranges(packed, advice)
            self.written_ranges(
                struct.pack(f"={2 * len(pieces)}Q", *(n for at, length in pieces for n in (region.start + at, length)))
            )
        return taken

    def _uncover(self, region: _Region, offset: int, length: int) -> bool:
        """Unmap the files from a range, so that it reads as zeros when it is given back. Returns False if the range
        stays as it is, because the files have too many holes already or the host refuses."""
        near = self._extents_at(region.start + offset, length)
        if near is None:
            return True
        if self._holes >= _MAX_PIECES:
            return False
        try:
            region.mapping.map_anonymous(offset, length)
        except OSError:
            return False
        self._holes += 1
        self._extents[near] = _without(self._extents[near], [(region.start + offset, length)])
        return True

    def _extents_at(self, gpa: int, length: int) -> slice | None:
        """Which of `_extents` overlap the range; None: none does."""
        first = bisect.bisect_right(self._extents, gpa, key=lambda extent: extent.gpa + extent.length)
        end = bisect.bisect_left(self._extents, gpa + length, lo=first, key=lambda extent: extent.gpa)
        return slice(first, end) if first < end else None

    def _pages_within(self, gpa: int, length: int, granule: int) -> tuple[_Region, int, int]:
        """The whole pages in the range: their region, the offset in it, and their length. Raises OutsideMemory."""
        for region in self._regions:
            offset = gpa - region.start
            if 0 <= offset <= offset + length <= region.size:
                first = -(-offset // granule) * granule
                return region, first, max((offset + length) // granule * granule - first, 0)
        raise OutsideMemory(f"guest-physical range {gpa:#x}+{length:#x} is not within memory")

    # Files behind it.
    @property
    def frozen(self) -> bool:
        """Whether memory is mapped copy-on-write from files, so that even pages never touched here may hold data."""
        return self._frozen

    @property
    def shared(self) -> tuple[Extent, ...]:
        """Where each region is in the memfd, if there is one and memory was not frozen; otherwise empty."""
        if self._fd < 0 or self._frozen:
            return ()
        return tuple(Extent(region.start, region.size, self._fd, region.offset) for region in self._regions)

    def prepare_freeze(self) -> None:
        """Copy an anonymous source's pages while the machine runs, so that the next freeze() copies little. Until then
        the dirty log is on, and nobody else can use it. Other sources need no preparation. May run in a worker thread:
        the copying does not hold the interpreter's lock. Raises HostError, StateError, CpuError."""
        if self._frozen or self._fd >= 0 or self._granule > PAGE or self._prepared >= 0:
            return
        self.start_dirty_log()
        try:
            self._prepared, _ = self._copy_own()
        except OSError as error:
            self.stop_dirty_log()
            raise HostError(f"memory: cannot copy {format_size(self.size)}: {os_reason(error)}") from error

    def freeze(self) -> tuple[Extent, ...]:
        """Returns what memory holds now, as extents of files that never change again. Any number of other GuestMemory
        objects may take them as their `CopyOnWrite` source, and this one goes on as such a copy itself. The descriptors
        belong to this memory, and stay open until its next freeze() or close(). Raises StateError, HostError, CpuError;
        memory then holds what it held.

        vCPUs must be parked, and nothing may be on its way into memory (the host's DMA would reach the old pages);
        other processes that map a `Shared` source must be gone, which `before_freeze` sees to. Freezing a `Shared`
        source takes as long as a few system calls, however large it is. Otherwise the pages that are this memory's own
        are copied. The first time these are all pages of an anonymous source, or after prepare_freeze() those that were
        written since; later they are the pages that were written since the last freeze().
        """
        self.check_whole()
        if self._granule > PAGE:
            raise HostError("memory: pages of the reserved pool cannot be shared by copies; leave hugepages out")
        if self.before_freeze is not None:
            self.before_freeze()
        fd = -1
        fresh: list[Extent] = []
        try:
            if self._fd >= 0:
                fd, pieces = os.dup(self._fd), [(region, 0, region.size) for region in self._regions]
            elif self._prepared >= 0:
                fd, pieces = self._copy_dirty()
            else:
                fd, pieces = self._copy_own()
            try:
                for region, offset, length in pieces:
                    region.mapping.map_file(offset, length, fd, region.offset + offset)
                    fresh.append(Extent(region.start + offset, length, fd, region.offset + offset))
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            except OSError:
                if self._fd >= 0:
                    for region, offset, length in pieces:
                        region.mapping.map_file(offset, length, fd, region.offset + offset, shared=True)
                    os.close(fd)
                    fd, fresh = -1, []
                raise
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        except OSError as error:
            raise HostError(f"memory: cannot freeze {format_size(self.size)}: {os_reason(error)}") from error
        finally:
            # After a failure midway, too: the pieces mapped so far lie in the new file now, and hold the same data.
            if fd >= 0:
                self._adopt(fd, fresh)
        self._holes = 0
        return tuple(self._extents)

    def _adopt(self, fd: int, fresh: list[Extent]) -> None:
        """Replace what extents held by `fresh`, extents of the file `fd`, and close files that no extent uses any
        more."""
        kept = _without(self._extents, [(extent.gpa, extent.length) for extent in fresh])
        self._extents = sorted([*kept, *fresh], key=lambda extent: extent.gpa)
        self._frozen = True
        self._files.add(fd)
        for unused in self._files - {extent.fd for extent in self._extents}:
            os.close(unused)
            self._files.discard(unused)

    def _copy_dirty(self) -> tuple[int, list[tuple[_Region, int, int]]]:
        """Bring the prepared file up to date. Returns it, and where it is to be mapped: (region, offset, length)."""
        fd, self._prepared = self._prepared, -1
        try:
            for region, (_, bitmap) in zip(self._regions, self.take_dirty(), strict=True):
                for first, count in runs(bitmap):
                    _write_all(fd, region.view[first * PAGE : (first + count) * PAGE], region.offset + first * PAGE)
            self.stop_dirty_log()
        except BaseException:
            os.close(fd)
            raise
        return fd, [(region, 0, region.size) for region in self._regions]

    def _copy_own(self) -> tuple[int, list[tuple[_Region, int, int]]]:
        """A memfd with the pages that are this memory's own, and where it is to be mapped: (region, offset, length).

        If there would be too many pieces, runs of pages that are near each other are joined, and the pages between them
        are copied too."""
        own = [(region, region.mapping.present_pages(private=True)) for region in self._regions]
        pieces: list[tuple[_Region, int, int]] = []
        if self._frozen:
            for gap in (0, 15, 255, 4095, 1 << 40):
                pieces = [
                    (region, first * PAGE, min(count * PAGE, region.size - first * PAGE))
                    for region, bitmap in own
                    for first, count in runs(bitmap, gap)
                ]
                if len(self._extents) + 2 * len(pieces) <= _MAX_PIECES:
                    break
            copied = pieces
        else:
            pieces = [(region, 0, region.size) for region in self._regions]
            copied = [(r, first * PAGE, count * PAGE) for r, bitmap in own for first, count in runs(bitmap)]
        fd = os.memfd_create("frozen-guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.size)
            for region, start, length in copied:
                part = region.view[start : start + length]
                for first, count in runs(nonzero_pages(part)):
                    _write_all(fd, part[first * PAGE : (first + count) * PAGE], region.offset + start + first * PAGE)
        except BaseException:
            os.close(fd)
            raise
        return fd, pieces

    def _map_extents(self, extents: Iterable[Extent]) -> None:
        own: dict[int, int] = {}
        end = 0
        for extent in sorted(extents, key=lambda extent: extent.gpa):
            if extent.gpa < end:
                raise ValueError(f"two extents hold {extent.gpa:#x}")
            end = extent.gpa + extent.length
            region = next((r for r in self._regions if r.start <= extent.gpa and end <= r.start + r.size), None)
            if region is None:
                raise ValueError(f"the extent {extent.gpa:#x}+{extent.length:#x} is not in memory")
            if extent.fd not in own:
                own[extent.fd] = fcntl.fcntl(extent.fd, fcntl.F_DUPFD_CLOEXEC, 0)
                self._files.add(own[extent.fd])
            mine = Extent(extent.gpa, extent.length, own[extent.fd], extent.offset)
            region.mapping.map_file(mine.gpa - region.start, mine.length, mine.fd, mine.offset)
            self._extents.append(mine)

    def abandon(self) -> None:
        """Give up the pages that are on their way: whoever waits for one goes on. *any thread*. Idempotent."""
        if self.absent is not None:
            self.absent.close()

    def close(self) -> None:
        """Unmap. A view that someone still holds keeps its mapping until it goes. Idempotent."""
        self._core = self.on_written = self.on_written_ranges = self.before_freeze = None
        self.abandon()
        regions, self._regions = self._regions, []
        for region in regions:
            for release in (region.view.release, region.mapping.close):
                try:
                    release()
                except BufferError:
                    pass
        descriptors, self._files = self._files, set()
        for fd in descriptors:
            os.close(fd)
        for fd in (self._fd, self._prepared):
            if fd >= 0:
                os.close(fd)
        self._fd = self._prepared = -1
        self._extents = []


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _without(extents: list[Extent], taken: list[tuple[int, int]]) -> list[Extent]:
    """The extents without the parts in the ranges `taken`, (gpa, length). Both are sorted by address."""
    starts = [gpa for gpa, _ in taken]
    kept: list[Extent] = []
    for extent in extents:
        at, end = extent.gpa, extent.gpa + extent.length
        index = max(bisect.bisect_right(starts, at) - 1, 0)
        while at < end:
            gpa, length = taken[index] if index < len(taken) else (end, 0)
            until = min(max(gpa, at), end)
            if until > at:
                kept.append(Extent(at, until - at, extent.fd, extent.offset + at - extent.gpa))
            at = max(until, min(gpa + length, end))
            index += 1
    return kept
