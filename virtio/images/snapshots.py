"""The table of a qcow2 image's internal snapshots: read, checked, packed."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from virtio.errors import ConfigError
from virtio.images.header import BITMAPS, EXTENSION_BITMAPS, L1_BYTES_MAX, Qcow2Header

_ENTRY = struct.Struct(">QIHHIIQII")
TABLE_MAX = 64 << 20
EXTRA_MAX = 1024
_RANGES_MAX = 40


@dataclass(frozen=True)
class InternalSnapshot:
    """One entry."""

    l1_offset: int
    l1_entries: int
    id: str
    name: str
    seconds: int
    """When it was taken, since 1970."""
    nanoseconds: int = 0
    guest_nanoseconds: int = 0
    """How long the guest had run."""
    state_size: int = 0
    """Bytes of a machine's state behind the disk; 0: none."""
    size: int = 0
    """Of the disk then, bytes."""
    extra: bytes = b""
    """What follows the fields that are known here."""

    def pack(self) -> bytes:
        name, identity = os.fsencode(self.name), os.fsencode(self.id)
        extra = struct.pack(">QQ", self.state_size, self.size) + self.extra
        state = self.state_size if self.state_size < 1 << 32 else 0
        entry = _ENTRY.pack(
            self.l1_offset,
            self.l1_entries,
            len(identity),
            len(name),
            self.seconds,
            self.nanoseconds,
            self.guest_nanoseconds,
            state,
            len(extra),
        )
        whole = entry + extra + identity + name
        return whole + bytes(-len(whole) % 8)


def read_table(path: str, fd: int, header: Qcow2Header) -> tuple[list[InternalSnapshot], int]:
    """The snapshots and the bytes that their table takes. Raises ConfigError."""
    found: list[InternalSnapshot] = []
    at = header.snapshots_offset
    for _ in range(header.snapshots):
        entry = os.pread(fd, _ENTRY.size, at)
        if len(entry) < _ENTRY.size:
            raise ConfigError(f"{path}: its snapshot table is cut short")
        l1_offset, l1_entries, id_size, name_size, seconds, nanoseconds, ran, state, extra_size = _ENTRY.unpack(entry)
        length = _ENTRY.size + extra_size + id_size + name_size
        if extra_size > EXTRA_MAX or at + length - header.snapshots_offset > TABLE_MAX:
            raise ConfigError(f"{path}: its snapshot table is too large")
        if l1_entries * 8 > L1_BYTES_MAX or l1_offset % header.cluster_size:
            raise ConfigError(f"{path}: a snapshot's L1 table is no place in it")
        rest = os.pread(fd, length - _ENTRY.size, at + _ENTRY.size)
        if len(rest) < length - _ENTRY.size:
            raise ConfigError(f"{path}: its snapshot table is cut short")
        extra, identity, name = rest[:extra_size], rest[extra_size : extra_size + id_size], rest[extra_size + id_size :]
        size = header.size
        if len(extra) >= 8:
            (state,) = struct.unpack_from(">Q", extra)
        if len(extra) >= 16:
            (size,) = struct.unpack_from(">Q", extra, 8)
        found.append(
            InternalSnapshot(
                l1_offset,
                l1_entries,
                os.fsdecode(identity),
                os.fsdecode(name),
                seconds,
                nanoseconds,
                ran,
                state,
                size,
                extra[16:],
            )
        )
        at += length + -length % 8
    return found, at - header.snapshots_offset


def find(path: str, snapshots: list[InternalSnapshot], name: str) -> int:
    """The index of a snapshot by its name, or by its id if none is called so."""
    for key in ("name", "id"):
        for index, item in enumerate(snapshots):
            if getattr(item, key) == name:
                return index
    raise ConfigError(f"{path}: has no snapshot {name!r}; vmm disk snapshot {path} lists them")


def clusters(offset: int, size: int, cluster_bits: int) -> tuple[int, int]:
    """(first cluster, how many) of a range of the file."""
    first = offset >> cluster_bits
    return first, ((offset + size + (1 << cluster_bits) - 1) >> cluster_bits) - first


def protected(path: str, fd: int, header: Qcow2Header) -> list[tuple[int, int]]:
    """Clusters, as (first, how many), that no guest cluster may be in, beside those that C finds itself."""
    found: list[tuple[int, int]] = []
    if header.snapshots:
        snapshots, size = read_table(path, fd, header)
        found.append(clusters(header.snapshots_offset, size, header.cluster_bits))
        found += [
            clusters(item.l1_offset, item.l1_entries * 8, header.cluster_bits)
            for item in snapshots[:_RANGES_MAX]
            if item.l1_entries
        ]
    for kind, data in header.extensions:
        if kind == EXTENSION_BITMAPS and len(data) >= 24 and header.autoclear & BITMAPS:
            size, offset = struct.unpack_from(">QQ", data, 8)
            if size <= TABLE_MAX and not offset % header.cluster_size:
                found.append(clusters(offset, size, header.cluster_bits))
    return found
