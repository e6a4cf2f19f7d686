"""Changes of a qcow2 image that no machine uses: internal snapshots, its size, what its header names.

New tables go where nothing is; one write into the header switches to them. Refcounts are counted anew afterwards.
Meanwhile the image is marked dirty (version 3), so that a change that was interrupted is ended or undone by whoever
opens it next. The descriptor has to be locked for writing. Everything may block. Raises ConfigError, OSError.
"""

from __future__ import annotations

import os
import struct
import time

from virtio.errors import ConfigError
from virtio.images.check import clear_autoclear, marked, place_for, repair, reread, unmark
from virtio.images.header import CORRUPT, DIRTY, L1_BYTES_MAX, SIZE_MAX, SNAPSHOTS_MAX, Qcow2Header
from virtio.images.scan import COPIED, numbers, scan
from virtio.images.snapshots import InternalSnapshot, find, read_table

_SIZE_AT, _SNAPSHOTS_AT = 24, 60


def _ready(path: str, fd: int) -> Qcow2Header:
    """The header of an image that may be changed, repaired first if its last writer did not end well."""
    header = reread(path, fd)
    if header.incompatible & CORRUPT:
        raise ConfigError(f"{path}: is marked as corrupt; try vmm disk check --repair")
    return clear_autoclear(fd, repair(path, fd, header) if header.incompatible & DIRTY else header)


def _switch(path: str, fd: int, header: Qcow2Header, wanted: Qcow2Header, at: int, data: bytes) -> None:
    """Write `data` into the header at `at`, which makes it `wanted`, if refcounts can say so; and write those."""
    os.fdatasync(fd)
    most = (1 << (1 << header.refcount_order)) - 1
    over = next((number for _, number in scan(path, fd, wanted).counts.used() if number > most), None)
    if over is not None:
        unmark(fd, header)
        raise ConfigError(
            f"{path}: a cluster would have {over} references, its refcounts go to {most}; convert it to wider ones"
        )
    os.pwrite(fd, data, at)
    os.fdatasync(fd)
    repair(path, fd, reread(path, fd))


def list_snapshots(path: str, fd: int) -> list[InternalSnapshot]:
    """The internal snapshots, the oldest first."""
    return read_table(path, fd, reread(path, fd))[0]


def create_snapshot(path: str, fd: int, name: str, *, now: float | None = None) -> None:
    """Keep the disk as it is now under a name."""
    header = _ready(path, fd)
    if header.has_data_file:
        raise ConfigError(f"{path}: an image with an external data file has no internal snapshots")
    snapshots, _ = read_table(path, fd, header)
    if not name or len(os.fsencode(name)) > 255:
        raise ConfigError("a snapshot needs a name of at most 255 bytes")
    if any(item.name == name for item in snapshots):
        raise ConfigError(f"{path}: has a snapshot {name!r} already; delete it first, or take another name")
    if len(snapshots) >= SNAPSHOTS_MAX:
        raise ConfigError(f"{path}: has {len(snapshots)} snapshots, more cannot be")
    when = time.time() if now is None else now
    ids = [int(item.id) for item in snapshots if item.id.isascii() and item.id.isdigit()]
    l1 = [entry & ~COPIED for entry in numbers(fd, header.l1_offset, header.l1_entries)]
    packed = struct.pack(f">{len(l1)}Q", *l1)
    marked(fd, header)
    where = place_for(path, fd, header, len(packed))
    os.pwrite(fd, packed, where)
    entry = InternalSnapshot(
        where,
        len(l1),
        str(max(ids, default=0) + 1),
        name,
        int(when),
        int(when % 1 * 1e9),
        size=header.size,
        extra=b"\xff" * 8,  # no record of instructions
    )
    _write_table(path, fd, header, [*snapshots, entry], beside=(where, len(packed)))


def delete_snapshot(path: str, fd: int, name: str) -> None:
    """Forget a snapshot; what only it held is free then."""
    header = _ready(path, fd)
    snapshots, _ = read_table(path, fd, header)
    del snapshots[find(path, snapshots, name)]
    marked(fd, header)
    _write_table(path, fd, header, snapshots)


def _write_table(
    path: str, fd: int, header: Qcow2Header, snapshots: list[InternalSnapshot], beside: tuple[int, int] = (0, 0)
) -> None:
    table = b"".join(item.pack() for item in snapshots)
    where = place_for(path, fd, header, len(table), beside) if table else 0
    os.pwrite(fd, table, where)
    wanted = header.with_(snapshots=len(snapshots), snapshots_offset=where)
    _switch(path, fd, header, wanted, _SNAPSHOTS_AT, struct.pack(">IQ", len(snapshots), where))


def apply_snapshot(path: str, fd: int, name: str) -> None:
    """Make the disk what it was at a snapshot, which stays. What it holds now is lost."""
    header = _ready(path, fd)
    snapshots, _ = read_table(path, fd, header)
    item = snapshots[find(path, snapshots, name)]
    needed = max(header.l1_needed(item.size), item.l1_entries)
    if item.size > SIZE_MAX or needed * 8 > L1_BYTES_MAX:
        raise ConfigError(f"{path}: snapshot {name!r} has a size that cannot be")
    marked(fd, header)
    _new_l1(path, fd, header, item.size, list(numbers(fd, item.l1_offset, item.l1_entries)), needed)


def _new_l1(path: str, fd: int, header: Qcow2Header, size: int, entries: list[int], count: int) -> None:
    l1 = [*entries, *[0] * (count - len(entries))]
    packed = struct.pack(f">{len(l1)}Q", *l1)
    where = place_for(path, fd, header, len(packed)) if packed else header.l1_offset
    os.pwrite(fd, packed, where)
    wanted = header.with_(size=size, l1_entries=len(l1), l1_offset=where)
    _switch(path, fd, header, wanted, _SIZE_AT, wanted.tables())


def set_size(path: str, fd: int, size: int) -> None:
    """Change the size of the disk. What would be cut off has to be given up before (Image.forget)."""
    header = _ready(path, fd)
    if size > SIZE_MAX or header.l1_needed(size) * 8 > L1_BYTES_MAX:
        raise ConfigError(f"{path}: too large for clusters of {header.cluster_size} bytes; convert it to larger ones")
    if header.l1_needed(size) <= header.l1_entries:
        os.pwrite(fd, header.with_(size=size).tables(), _SIZE_AT)
        os.fdatasync(fd)
        return
    marked(fd, header)
    entries = list(numbers(fd, header.l1_offset, header.l1_entries))
    _new_l1(path, fd, header, size, entries, header.l1_needed(size))


def set_backing(path: str, fd: int, name: str | None, format: str | None) -> None:
    """Record another backing file, or none."""
    header = _ready(path, fd)
    changed = header.with_(backing=name, backing_format=format if name is not None else None)
    packed = changed.pack()
    os.pwrite(fd, packed + bytes(max(0, min(header.cluster_size, 65536) - len(packed))), 0)
    os.fdatasync(fd)
