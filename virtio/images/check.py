"""Whether a qcow2 image is consistent, and making it so.

Repairing counts the references that the tables really hold, writes refcounts anew beside the old ones, and switches
over by one write into the header. While it goes on the image is marked dirty, so whoever finds it half done does it
again.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from virtio.errors import ConfigError
from virtio.images.header import (
    BITMAPS,
    CORRUPT,
    DIRTY,
    RAW_DATA_FILE,
    REFTABLE_BYTES_MAX,
    Qcow2Header,
    parse,
)
from virtio.images.progress import Progress
from virtio.images.scan import COPIED, OFFSET, PACKED, PROBLEMS_MAX, Counts, Scan, numbers, scan


@dataclass
class Report:
    """What a check found. Messages are at most PROBLEMS_MAX; the numbers are exact."""

    corruptions: int = 0
    leaks: int = 0
    """Clusters that are kept though fewer tables name them: space is lost, nothing else."""
    problems: list[str] = field(default_factory=list)
    dirty: bool = False
    corrupt: bool = False
    allocated: int = 0
    total: int = 0
    """Guest clusters."""
    packed: int = 0
    fragmented: int = 0
    end: int = 0
    """Bytes up to the end of the last cluster in use."""

    @property
    def clean(self) -> bool:
        return not self.corruptions and not self.leaks


def check(path: str, fd: int, header: Qcow2Header, progress: Progress | None = None) -> Report:
    """Compare refcounts and flags with what the tables name. Reads only. Raises ConfigError."""
    found = scan(path, fd, header, progress)
    report = Report(found.corruptions, 0, list(found.problems))
    report.dirty, report.corrupt = bool(header.incompatible & DIRTY), bool(header.incompatible & CORRUPT)
    report.allocated, report.packed, report.fragmented = found.allocated, found.packed, found.fragmented
    report.total = -(-header.size // header.cluster_size)
    recorded = _recorded(fd, found, report)
    report.end = max(found.counts.end, recorded.end) * header.cluster_size
    for cluster, number in found.counts.used():
        if recorded[cluster] < number:
            _tell(report, f"cluster {cluster} has {number} references and the refcount {recorded[cluster]}")
    for cluster, number in recorded.used():
        if number > found.counts[cluster]:
            report.leaks += 1
            if len(report.problems) < PROBLEMS_MAX:
                names = found.counts[cluster]
                report.problems.append(f"cluster {cluster} is lost: refcount {number}, references {names}")
    _flags(fd, found, lambda text, _offset, _entry: _tell(report, text))
    return report


def _tell(report: Report, text: str) -> None:
    report.corruptions += 1
    if len(report.problems) < PROBLEMS_MAX:
        report.problems.append(text)


def _recorded(fd: int, found: Scan, report: Report) -> Counts:
    """What the refcount blocks say. Their own clusters and the table's are named in `found`."""
    header, recorded = found.header, Counts()
    bits = 1 << header.refcount_order
    size = header.reftable_clusters << header.cluster_bits
    if not found.name("the refcount table", header.reftable_offset, size):
        report.corruptions += 1
        return recorded
    per_block = header.cluster_size * 8 // bits
    for index, entry in enumerate(numbers(fd, header.reftable_offset, size // 8)):
        place = entry & ~511
        if not place:
            continue
        if place % header.cluster_size or place >> header.cluster_bits >= found.clusters:
            _tell(report, f"the refcount table: entry {index} names {place}, which is no refcount block")
            continue
        found.counts.add(place >> header.cluster_bits)
        block = os.pread(fd, header.cluster_size, place)
        base = index * per_block
        for at, number in _block(block, bits):
            recorded.add(base + at, number)
    return recorded


def _block(block: bytes, bits: int) -> list[tuple[int, int]]:
    """(index, refcount) of a block where it is not 0."""
    if not any(block):
        return []
    if bits < 8:
        mask = (1 << bits) - 1
        return [
            (at * 8 // bits + part, byte >> part * bits & mask)
            for at, byte in enumerate(block)
            if byte
            for part in range(8 // bits)
            if byte >> part * bits & mask
        ]
    values = array({8: "B", 16: "H", 32: "I", 64: "Q"}[bits], block[: len(block) // (bits // 8) * (bits // 8)])
    values.byteswap()
    return [(at, number) for at, number in enumerate(values) if number]


def _flags(fd: int, found: Scan, wrong: Callable[[str, int, int], None]) -> None:
    """Where bit 63 of the active tables does not say whether there is exactly one reference:
    wrong(text, offset in the file, entry as it should be)."""
    header, counts = found.header, found.counts
    step = 2 if header.extended else 1
    walked: set[int] = set()  # a damaged L1 table may name one L2 table any number of times
    for index, entry in enumerate(found.l1):
        table = entry & OFFSET
        if not table or index in found.bad_l1:
            continue
        single = counts[table >> header.cluster_bits] == 1
        if bool(entry & COPIED) != single:
            mended = entry | COPIED if single else entry & ~COPIED
            wrong(f"L1 entry {index}: its flag says otherwise than the refcount", header.l1_offset + index * 8, mended)
        if header.has_data_file or table in walked:
            continue
        walked.add(table)
        entries = numbers(fd, table, header.cluster_size // 8)
        for at in range(0, len(entries), step):
            item = entries[at]
            if not item or item & PACKED:
                if item & PACKED and item & COPIED:
                    wrong(f"L2 table {table}: entry {at} is compressed and flagged", table + at * 8, item & ~COPIED)
                continue
            place = item & OFFSET
            if not place or place & (header.cluster_size - 1) or place >> header.cluster_bits >= found.clusters:
                continue
            single = counts[place >> header.cluster_bits] == 1
            if bool(item & COPIED) != single:
                mended = item | COPIED if single else item & ~COPIED
                wrong(f"L2 table {table}: the flag of entry {at} is wrong", table + at * 8, mended)


def repair(path: str, fd: int, header: Qcow2Header, progress: Progress | None = None) -> Qcow2Header:
    """Make refcounts and flags what the tables name; entries that name no place become unallocated. The header as it is
    then. Raises ConfigError if there is no way."""
    marked(fd, header)
    found = scan(path, fd, header, progress)
    while found.bad_l1 or found.bad_l2:
        for index in found.bad_l1:
            os.pwrite(fd, bytes(8), header.l1_offset + index * 8)
        for table, index in found.bad_l2:
            os.pwrite(fd, bytes(16 if header.extended else 8), table + index * 8)
        os.fdatasync(fd)
        found = scan(path, fd, header, progress)
    if found.corruptions:
        raise ConfigError(f"{path}: beyond repair: {found.problems[0]}")
    header = write_refcounts(path, fd, found)
    mended: list[tuple[int, int]] = []
    _flags(fd, found, lambda _text, offset, entry: mended.append((offset, entry)))
    for offset, entry in mended:
        os.pwrite(fd, struct.pack(">Q", entry), offset)
    os.fdatasync(fd)
    cleared = header.incompatible & ~(DIRTY | CORRUPT)
    if header.version > 2:
        _mark(fd, cleared)
    return header.with_(incompatible=cleared)


def _mark(fd: int, incompatible: int) -> None:
    """Write the incompatible features; they are durable then."""
    os.pwrite(fd, struct.pack(">Q", incompatible), 72)
    os.fdatasync(fd)


def clear_autoclear(fd: int, header: Qcow2Header) -> Qcow2Header:
    """Before an image is changed, its bitmaps are declared inconsistent, and so is what nobody here knows.

    "An implementation may only write to an image with unknown auto-clear features if it clears the respective bits":
    and bitmaps are not kept up to date here."""
    kept = header.autoclear & RAW_DATA_FILE & ~BITMAPS
    if kept == header.autoclear:
        return header
    os.pwrite(fd, struct.pack(">Q", kept), 88)
    os.fdatasync(fd)
    return header.with_(autoclear=kept)


def _in_use(fd: int, found: Scan) -> Counts:
    """What tables name, and the refcount table and blocks as they are."""
    header, both = found.header, Counts()
    for cluster, _ in found.counts.used():
        both.add(cluster)
    for index in range(header.reftable_clusters):
        both.add((header.reftable_offset >> header.cluster_bits) + index)
    for entry in numbers(fd, header.reftable_offset, (header.reftable_clusters << header.cluster_bits) // 8):
        if entry and entry >> header.cluster_bits < found.clusters:
            both.add(entry >> header.cluster_bits)
    return both


def place_for(path: str, fd: int, header: Qcow2Header, size: int, beside: tuple[int, int] = (0, 0)) -> int:
    """Offset of clusters for `size` bytes that nothing names; the range `beside` (offset, bytes) is taken as well."""
    both = _in_use(fd, scan(path, fd, header))
    bits = header.cluster_bits
    for cluster in range(beside[0] >> bits, (beside[0] + beside[1] + header.cluster_size - 1) >> bits):
        both.add(cluster)
    return both.free_run(-(-size // header.cluster_size), both.end) << bits


def marked(fd: int, header: Qcow2Header) -> None:
    """Mark an image as dirty, where its version can say so."""
    if header.version > 2:
        _mark(fd, header.incompatible | DIRTY)


def unmark(fd: int, header: Qcow2Header) -> None:
    """Take back marked(): nothing was changed."""
    if header.version > 2:
        _mark(fd, header.incompatible)


def write_refcounts(path: str, fd: int, found: Scan) -> Qcow2Header:
    """Refcounts for what was found, in a free place, and the switch to them. The old ones are free then."""
    header, counts = found.header, found.counts
    bits, size = 1 << header.refcount_order, header.cluster_size
    per_block = size * 8 // bits
    most = (1 << bits) - 1
    used = dict.fromkeys(cluster // per_block for cluster, _ in counts.used())
    for cluster, number in counts.used():
        if number > most:
            raise ConfigError(f"{path}: cluster {cluster} has {number} references; its refcounts go to {most}")
    both = _in_use(fd, found)
    blocks, tables = dict(used), 1
    while True:
        need = tables + len(blocks)
        place = both.free_run(need, both.end)
        grown = {**blocks, **dict.fromkeys(range(place // per_block, (place + need - 1) // per_block + 1))}
        entries = max(grown) + 1
        if len(grown) == len(blocks) and entries * 8 <= tables * size:
            break
        blocks, tables = grown, max(tables, -(-entries * 8 // size))
    if tables * size > max(REFTABLE_BYTES_MAX, size):
        raise ConfigError(f"{path}: would need a refcount table of {tables * size} bytes")
    for cluster in range(place, place + need):
        counts.add(cluster)
    table = array("Q", bytes(tables * size))
    for position, index in enumerate(sorted(blocks)):
        where = (place + tables + position) * size
        table[index] = where
        os.pwrite(fd, pack_block([counts[index * per_block + at] for at in range(per_block)], bits), where)
    table.byteswap()
    os.pwrite(fd, table.tobytes(), place * size)
    os.fdatasync(fd)
    os.pwrite(fd, struct.pack(">QI", place * size, tables), 48)
    os.fdatasync(fd)
    return header.with_(reftable_offset=place * size, reftable_clusters=tables)


def pack_block(values: list[int], bits: int) -> bytes:
    """A refcount block."""
    if bits >= 8:
        packed = array({8: "B", 16: "H", 32: "I", 64: "Q"}[bits], values)
        packed.byteswap()
        return packed.tobytes()
    per_byte = 8 // bits
    return bytes(
        sum(value << part * bits for part, value in enumerate(values[at : at + per_byte]))
        for at in range(0, len(values), per_byte)
    )


def reread(path: str, fd: int) -> Qcow2Header:
    """The header as it is in the file now."""
    return parse(path, os.pread(fd, 2 << 20, 0), os.lseek(fd, 0, os.SEEK_END))
