"""What the tables of a qcow2 image name: every cluster of the file with the number of its references.

Reads only. Each L2 table is looked at once, however many L1 entries name it, so the work is bounded by the size of the
file and of the L1 tables. What makes no sense is a problem in the list, never an exception other than ConfigError.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from virtio.images.header import BITMAPS, EXTENSION_BITMAPS, Qcow2Header
from virtio.images.snapshots import read_table

OFFSET = 0x00FFFFFFFFFFFE00
COPIED, PACKED, ZERO = 1 << 63, 1 << 62, 1
_CHUNK_BITS = 12
PROBLEMS_MAX = 1000
"""Messages that are kept; the count goes on."""
BAD_MAX = 1 << 20


class Counts:
    """A number for each cluster, 0 for most. Only stretches with other numbers take memory."""

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}
        self.end = 0
        """One more than the last cluster that was named."""

    def __getitem__(self, cluster: int) -> int:
        chunk = self._chunks.get(cluster >> _CHUNK_BITS)
        return chunk[cluster & ((1 << _CHUNK_BITS) - 1)] if chunk is not None else 0

    def add(self, cluster: int, by: int = 1) -> None:
        index = cluster >> _CHUNK_BITS
        chunk = self._chunks.get(index)
        if chunk is None:
            chunk = self._chunks[index] = array("Q", bytes(8 << _CHUNK_BITS))
        chunk[cluster & ((1 << _CHUNK_BITS) - 1)] += by
        if cluster >= self.end:
            self.end = cluster + 1

    def used(self) -> Iterator[tuple[int, int]]:
        """(cluster, number) where the number is not 0, in order."""
        for index in sorted(self._chunks):
            base = index << _CHUNK_BITS
            for at, number in enumerate(self._chunks[index]):
                if number:
                    yield base + at, number

    def free_run(self, length: int, limit: int) -> int:
        """The first of `length` adjacent clusters that nothing names; at `limit` at the latest."""
        start = 0
        while start + length <= limit:
            taken = next((at for at in range(start + length - 1, start - 1, -1) if self[at]), None)
            if taken is None:
                return start
            start = taken + 1
        return max(start, limit)


@dataclass
class Scan:
    """What was found."""

    header: Qcow2Header
    file_size: int
    counts: Counts = field(default_factory=Counts)
    problems: list[str] = field(default_factory=list)
    corruptions: int = 0
    l1: list[int] = field(default_factory=list)
    l2_seen: dict[int, int] = field(default_factory=dict)
    """Offset of an L2 table -> how many L1 entries of all L1 tables name it."""
    bad_l1: list[int] = field(default_factory=list)
    bad_l2: list[tuple[int, int]] = field(default_factory=list)
    """(offset of an L2 table, index) of entries that name no place in the file."""
    tables: list[tuple[str, int, int]] = field(default_factory=list)
    """What tables with one name each are in: (name, first cluster, how many)."""
    allocated: int = 0
    """Guest clusters of the active L1 table that have a place in the file."""
    packed: int = 0
    fragmented: int = 0

    @property
    def clusters(self) -> int:
        """Of the file."""
        return -(-self.file_size // self.header.cluster_size)

    def problem(self, text: str) -> None:
        self.corruptions += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(text)

    def name(self, what: str, offset: int, size: int, by: int = 1, *, table: bool = True) -> bool:
        """A table names a range of the file, which holds another table or data. False: there is no such place."""
        first, last = offset >> self.header.cluster_bits, (offset + size - 1) >> self.header.cluster_bits
        if last >= self.clusters:
            self.problem(f"{what} is at {offset}, beyond the end of the file")
            return False
        for cluster in range(first, last + 1):
            self.counts.add(cluster, by)
        if table:
            self.tables.append((what, first, last + 1 - first))
        return True

    def overlaps(self) -> None:
        """Problems for clusters of tables that something else names as well; when everything has been named."""
        for what, first, count in self.tables:
            if any(self.counts[cluster] > 1 for cluster in range(first, first + count)):
                self.problem(f"{what} shares a cluster with something else")


def numbers(fd: int, offset: int, count: int) -> array[int]:
    """Big-endian 64-bit numbers from the file; what it does not have is 0."""
    data = os.pread(fd, count * 8, offset) if offset < 1 << 63 else b""
    found = array("Q", data[: len(data) // 8 * 8])
    if sys.byteorder == "little":
        found.byteswap()
    found.extend([0] * (count - len(found)))
    return found


def scan(path: str, fd: int, header: Qcow2Header, progress: Callable[[int, int], None] | None = None) -> Scan:
    """Follow every table but those of refcounts. Raises ConfigError for a snapshot table that makes no sense."""
    found = Scan(header, os.lseek(fd, 0, os.SEEK_END))
    found.name("the header", 0, 1)
    tables: list[tuple[str, int, int]] = [("the active L1 table", header.l1_offset, header.l1_entries)]
    if header.snapshots:
        snapshots, size = read_table(path, fd, header)
        found.name("the snapshot table", header.snapshots_offset, size)
        tables += [(f"the L1 table of snapshot {item.id!r}", item.l1_offset, item.l1_entries) for item in snapshots]
    _bitmaps(found, fd)
    active: dict[int, int] = {}
    for number, (what, offset, entries) in enumerate(tables):
        if not entries or not found.name(what, offset, entries * 8):
            continue
        l1 = numbers(fd, offset, entries)
        if number == 0:
            found.l1 = list(l1)
        for index, entry in enumerate(l1):
            table = entry & OFFSET
            if not table:
                continue
            if table % header.cluster_size or table >> header.cluster_bits >= found.clusters:
                found.problem(f"{what}: entry {index} names {table}, which is no L2 table")
                if number == 0:
                    found.bad_l1.append(index)
                continue
            found.l2_seen[table] = found.l2_seen.get(table, 0) + 1
            if number == 0:
                active[table] = index
    for done, (table, times) in enumerate(found.l2_seen.items()):
        found.counts.add(table >> header.cluster_bits, times)
        _l2(found, fd, table, times, table in active)
        if progress is not None:
            progress(done, len(found.l2_seen))
    found.overlaps()
    return found


def _l2(found: Scan, fd: int, table: int, times: int, active: bool) -> None:
    header = found.header
    bits, mask, clusters = header.cluster_bits, header.cluster_size - 1, found.clusters
    step = 2 if header.extended else 1
    entries = numbers(fd, table, header.cluster_size // 8)
    x = 62 - (bits - 8)
    counts = found.counts
    expected = None
    for index in range(0, len(entries), step):
        entry = entries[index]
        if not entry:
            if step == 2 and entries[index + 1] & 0xFFFFFFFF:
                _bad(found, table, index, "has subclusters but no place")
            continue
        if entry & PACKED:
            offset = entry & ((1 << x) - 1) & ((1 << 56) - 1)
            size = (((entry & (PACKED - 1)) >> x) + 1) * 512 - (offset & 511)
            if header.has_data_file or (offset + size - 1) >> bits >= clusters:
                _bad(found, table, index, "is compressed beyond the end of the file")
                continue
            found.name("compressed data", offset, size, times, table=False)
            if active:
                found.allocated += 1
                found.packed += 1
            continue
        place = entry & OFFSET
        if step == 2:
            bitmap = entries[index + 1]
            if bitmap & bitmap >> 32 & 0xFFFFFFFF:
                _bad(found, table, index, "has subclusters that are both allocated and zeroes")
                continue
        if header.has_data_file:
            found.allocated += active and bool(entry & COPIED)
            continue
        if not place:
            continue
        if place & mask or place >> bits >= clusters:
            _bad(found, table, index, f"names {place}, which is no cluster of the file")
            continue
        counts.add(place >> bits, times)
        if active:
            found.allocated += 1
            if expected is not None and place != expected:
                found.fragmented += 1
            expected = place + header.cluster_size


def _bad(found: Scan, table: int, index: int, what: str) -> None:
    found.problem(f"the L2 table at {table}: entry {index} {what}")
    if len(found.bad_l2) < BAD_MAX:
        found.bad_l2.append((table, index))


def _bitmaps(found: Scan, fd: int) -> None:
    """The clusters of bitmaps that are kept up to date; others are not counted, as other programs do not."""
    header = found.header
    data = next((data for kind, data in header.extensions if kind == EXTENSION_BITMAPS), None)
    if data is None or len(data) < 24 or not header.autoclear & BITMAPS:
        return
    count, _, size, offset = struct.unpack_from(">IIQQ", data)
    if size > 64 << 20 or not found.name("the directory of bitmaps", offset, max(size, 1)):
        return
    directory, at = os.pread(fd, size, offset), 0
    for _ in range(min(count, 65535)):
        if at + 24 > len(directory):
            break
        table, entries, _, _, _, name_size, extra_size = struct.unpack_from(">QIIBBHI", directory, at)
        at += -(-(24 + name_size + extra_size) // 8) * 8
        if entries * 8 > 64 << 20 or not entries or not found.name("a bitmap's table", table, entries * 8):
            continue
        for entry in numbers(fd, table, entries):
            if entry & OFFSET:
                found.name("a bitmap", entry & OFFSET, 1, table=False)
