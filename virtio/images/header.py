"""The header of a qcow2 file ("Qcow2 Image File Format", versions 2 and 3): read, checked, written.

Everything in it is hostile: whatever would need absurd memory, or names what is not in the file, is a ConfigError of
one line. It must not open other files.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field, replace

from virtio.errors import ConfigError

MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_TABLES = struct.Struct(">QIIQ")
"""Size, encryption, L1 entries, L1 offset: bytes 24 to 47, which change together."""
EXTENSION_END, EXTENSION_BACKING_FORMAT, EXTENSION_FEATURES = 0, 0xE2792ACA, 0x6803F857
EXTENSION_BITMAPS, EXTENSION_ENCRYPTION, EXTENSION_DATA_FILE = 0x23852875, 0x0537BE77, 0x44415441
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED = 1, 2, 4, 8, 16
LAZY_REFCOUNTS = 1
BITMAPS, RAW_DATA_FILE = 1, 2
KNOWN = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED
CLUSTER_BITS = range(9, 22)
L1_BYTES_MAX, REFTABLE_BYTES_MAX = 32 << 20, 8 << 20
SNAPSHOTS_MAX = 65536
NAME_MAX = 1023
SIZE_MAX = (1 << 63) - (1 << 22)
DEFLATE, ZSTD = 0, 1
_FEATURE_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)


@dataclass(frozen=True)
class Qcow2Header:
    """The fields of a header; offsets and sizes in bytes unless said otherwise."""

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    """Of the disk."""
    backing: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    encryption: int = 0
    l1_entries: int = 0
    l1_offset: int = 0
    reftable_offset: int = 0
    reftable_clusters: int = 0
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression: int = DEFLATE
    extensions: tuple[tuple[int, bytes], ...] = field(default=())
    """Others than those that have a field here, as they stand in the file."""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended(self) -> bool:
        """L2 entries have 16 bytes, and clusters 32 subclusters."""
        return bool(self.incompatible & EXTENDED)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & DATA_FILE)

    @property
    def l2_entries(self) -> int:
        return self.cluster_size // (16 if self.extended else 8)

    def l1_needed(self, size: int) -> int:
        """L1 entries that a disk of `size` bytes takes."""
        return -(-size // (self.cluster_size * self.l2_entries))

    def tables(self) -> bytes:
        """What stands at byte 24, in one piece: size and L1 table."""
        return _TABLES.pack(self.size, self.encryption, self.l1_entries, self.l1_offset)

    def with_(self, **changes: object) -> Qcow2Header:
        """A copy with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def pack(self) -> bytes:
        """The header, its extensions and the backing file's name. ConfigError: more than a cluster."""
        extensions = list(self.extensions)
        if self.backing_format is not None:
            extensions.append((EXTENSION_BACKING_FORMAT, os.fsencode(self.backing_format)))
        if self.data_file is not None:
            extensions.append((EXTENSION_DATA_FILE, os.fsencode(self.data_file)))
        packed = b"".join(
            struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in extensions
        )
        # A header of its own for the end is needed only where something follows, but it is never wrong.
        packed += bytes(8)
        length = 72 if self.version == 2 else 112
        name = b"" if self.backing is None else os.fsencode(self.backing)
        if len(name) > NAME_MAX or length + len(packed) + len(name) > self.cluster_size:
            raise ConfigError(f"the name of the backing file has {len(name)} bytes, and no room in the header")
        where = length + len(packed) if name else 0
        head = _V2.pack(
            MAGIC,
            self.version,
            where,
            len(name),
            self.cluster_bits,
            self.size,
            self.encryption,
            self.l1_entries,
            self.l1_offset,
            self.reftable_offset,
            self.reftable_clusters,
            self.snapshots,
            self.snapshots_offset,
        )
        if self.version > 2:
            head += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, length)
            head += bytes([self.compression]) + bytes(7)
        return head + packed + name


def feature_names() -> tuple[int, bytes]:
    """The extension that tells other programs what feature bits are called."""
    return EXTENSION_FEATURES, b"".join(
        bytes((kind, bit)) + name.ljust(46, b"\0") for kind, bit, name in _FEATURE_NAMES
    )


def is_qcow2(start: bytes) -> bool:
    """Whether a file that starts so says that it is qcow2."""
    return start[:4] == MAGIC and start[4:8] in (b"\0\0\0\2", b"\0\0\0\3")


def parse(path: str, start: bytes, file_size: int) -> Qcow2Header:
    """The header from the first bytes of a file: 64 KiB, or all there is. Raises ConfigError."""
    if len(start) < _V2.size or start[:4] != MAGIC:
        raise ConfigError(f"{path}: not a qcow2 image; say format=raw if it is a raw one")
    fields = _V2.unpack_from(start)
    version, cluster_bits = fields[1], fields[4]
    if version not in (2, 3):
        raise ConfigError(f"{path}: qcow2 of version {version}; 2 and 3 are known")
    if cluster_bits not in CLUSTER_BITS:
        raise ConfigError(f"{path}: clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are possible")
    found = Qcow2Header(version, cluster_bits, fields[5], None, None, None, fields[6], *fields[7:13])
    length = 72
    if version == 3:
        if len(start) < 104:
            raise ConfigError(f"{path}: cut short within its header")
        incompatible, compatible, autoclear, order, length = _V3.unpack_from(start, 72)
        if length < 104 or length % 8 or length > min(len(start), found.cluster_size):
            raise ConfigError(f"{path}: a header of {length} bytes is none")
        if order > 6:
            raise ConfigError(f"{path}: refcounts of 2^{order} bits; 2^6 are the most")
        compression = start[104] if length > 104 else 0
        found = found.with_(
            incompatible=incompatible,
            compatible=compatible,
            autoclear=autoclear,
            refcount_order=order,
            compression=compression,
        )
    found = _extensions(path, found, start[: found.cluster_size], length, fields[2])
    _check(path, found, file_size)
    if fields[2]:
        offset, size = fields[2], fields[3]
        if size > NAME_MAX or not size or offset < length or offset + size > min(len(start), found.cluster_size):
            raise ConfigError(f"{path}: the name of its backing file is not in its header")
        name = start[offset : offset + size]
        if b"\0" in name:
            raise ConfigError(f"{path}: the name of its backing file has a zero byte")
        found = found.with_(backing=os.fsdecode(name))
    return found


def _extensions(path: str, found: Qcow2Header, start: bytes, at: int, name_at: int) -> Qcow2Header:
    others: list[tuple[int, bytes]] = []
    limit = name_at if at <= name_at <= len(start) else len(start)
    while at + 8 <= limit:
        kind, size = struct.unpack_from(">II", start, at)
        if kind == EXTENSION_END:
            break
        if at + 8 + size > limit:
            raise ConfigError(f"{path}: a header extension of {size} bytes does not fit")
        data = start[at + 8 : at + 8 + size]
        if kind == EXTENSION_BACKING_FORMAT:
            found = found.with_(backing_format=os.fsdecode(data))
        elif kind == EXTENSION_DATA_FILE:
            found = found.with_(data_file=os.fsdecode(data))
        else:
            others.append((kind, data))
        at += 8 + -(-size // 8) * 8
    return found.with_(extensions=tuple(others))


def _check(path: str, header: Qcow2Header, file_size: int) -> None:
    if header.encryption or any(kind == EXTENSION_ENCRYPTION for kind, _ in header.extensions):
        raise ConfigError(f"{path}: encrypted; decrypt it first: qemu-img convert -O qcow2 with its secret")
    if unknown := header.incompatible & ~KNOWN:
        raise ConfigError(f"{path}: needs {', '.join(_unknown(header, unknown))}, which is not known here")
    if header.size > SIZE_MAX:
        raise ConfigError(f"{path}: a disk of {header.size} bytes cannot be")
    if header.extended and header.cluster_bits < 14:
        raise ConfigError(f"{path}: extended L2 entries need clusters of 16 KiB and more")
    # With the deflate type the bit is clear.
    if bool(header.incompatible & COMPRESSION) != bool(header.compression) or header.compression > ZSTD:
        raise ConfigError(f"{path}: compression of type {header.compression}, which is not known here")
    if header.autoclear & RAW_DATA_FILE and not header.has_data_file:
        raise ConfigError(f"{path}: says that its data file is raw, and has none")
    mask = header.cluster_size - 1
    for what, offset, size in (
        ("L1 table", header.l1_offset, header.l1_entries * 8),
        ("refcount table", header.reftable_offset, header.reftable_clusters << header.cluster_bits),
        ("snapshot table", header.snapshots_offset, header.snapshots * 40),
    ):
        if not size:
            continue
        if offset & mask or not offset or offset >= file_size:
            raise ConfigError(f"{path}: its {what} is at {offset}, which is no place in it")
    if header.l1_entries * 8 > L1_BYTES_MAX:
        raise ConfigError(
            f"{path}: an L1 table of {header.l1_entries} entries is too large; larger clusters take fewer"
        )
    if header.reftable_clusters << header.cluster_bits > max(REFTABLE_BYTES_MAX, header.cluster_size):
        raise ConfigError(f"{path}: a refcount table of {header.reftable_clusters} clusters is too large")
    if header.snapshots > SNAPSHOTS_MAX:
        raise ConfigError(f"{path}: {header.snapshots} snapshots are too many")
    if header.l1_needed(header.size) > header.l1_entries:
        raise ConfigError(f"{path}: its L1 table of {header.l1_entries} entries is too small for its size")
    if not header.reftable_clusters:
        raise ConfigError(f"{path}: has no refcount table")


def _unknown(header: Qcow2Header, bits: int) -> list[str]:
    """What the file itself calls features that are not known here."""
    names = {}
    for kind, data in header.extensions:
        if kind == EXTENSION_FEATURES:
            for at in range(0, len(data) - 47, 48):
                if data[at] == 0:
                    text = data[at + 2 : at + 48].rstrip(b"\0").decode("ascii", "replace")
                    names[data[at + 1]] = "".join(char for char in text if char.isprintable())
    return [names.get(bit) or f"feature {bit}" for bit in range(64) if bits >> bit & 1]
