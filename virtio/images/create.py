"""New images. May block; call from threads."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Literal

from virtio.backends.file import open_locked
from virtio.errors import ConfigError, HostError, os_reason
from virtio.images.header import (
    COMPRESSION,
    DATA_FILE,
    DEFLATE,
    EXTENDED,
    L1_BYTES_MAX,
    LAZY_REFCOUNTS,
    RAW_DATA_FILE,
    SIZE_MAX,
    ZSTD,
    Qcow2Header,
    feature_names,
)

Preallocation = Literal["off", "metadata", "falloc", "full"]
"""metadata: every cluster has its place; falloc: and its space on the file system; full: and zeroes written into it."""
_COMPRESSIONS = {"zlib": DEFLATE, "zstd": ZSTD}
_PREALLOCATE_STEP = 1 << 30


def create_raw(path: str, size: int, *, preallocation: Preallocation = "off") -> None:
    """A raw image of `size` bytes; an existing file is replaced. ConfigError, HostError."""
    if preallocation == "metadata":
        raise ConfigError("a raw image has no metadata; preallocation is off, falloc or full")
    with _Made(path) as fd:
        os.ftruncate(fd, size)
        if preallocation != "off" and size:
            _reserve(fd, 0, size, preallocation)


def create_qcow2(
    path: str,
    size: int,
    *,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    backing: str | None = None,
    backing_format: str | None = None,
    data: str | None = None,
    data_raw: bool = False,
    extended_l2: bool = False,
    lazy_refcounts: bool = False,
    compression: str = "zlib",
    preallocation: Preallocation = "off",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """A qcow2 image for a disk of `size` bytes; an existing file is replaced.

    `backing` and `data` are recorded as they are given; `data` is made where that name is relative to the image. With
    `preallocation` other than off there can be no backing file. Raises ConfigError, HostError.
    """
    header = _plan(
        size,
        cluster_size=cluster_size,
        version=version,
        refcount_bits=refcount_bits,
        backing=backing,
        backing_format=backing_format,
        data=data,
        data_raw=data_raw,
        extended_l2=extended_l2,
        lazy_refcounts=lazy_refcounts,
        compression=compression,
    )
    if preallocation != "off" and backing is not None:
        raise ConfigError("preallocation and a backing file exclude each other: what is allocated is not read from it")
    with _Made(path) as fd:
        _write_empty(fd, header)
    where = None if data is None else os.path.join(os.path.dirname(path), data)
    if where is not None:
        create_raw(where, size)
    if preallocation != "off" and size:
        _preallocate(path, where, header, preallocation, progress)


def _plan(
    size: int,
    *,
    cluster_size: int,
    version: int,
    refcount_bits: int,
    backing: str | None,
    backing_format: str | None,
    data: str | None,
    data_raw: bool,
    extended_l2: bool,
    lazy_refcounts: bool,
    compression: str,
) -> Qcow2Header:
    bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << max(bits, 0) or not 9 <= bits <= 21:
        raise ConfigError(f"cluster_size={cluster_size}: not a power of two from 512 to 2M")
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise ConfigError(f"refcount_bits={refcount_bits}: not a power of two from 1 to 64")
    if version not in (2, 3):
        raise ConfigError(f"version={version}: not 2 or 3")
    if compression not in _COMPRESSIONS:
        raise ConfigError(f"compression={compression}: not zlib or zstd")
    only_3 = extended_l2 or lazy_refcounts or data is not None or compression != "zlib" or refcount_bits != 16
    if version == 2 and only_3:
        raise ConfigError("version 2 has none of extended L2, lazy refcounts, data files, zstd and other refcounts")
    if extended_l2 and bits < 14:
        raise ConfigError(f"cluster_size={cluster_size}: extended L2 needs clusters of 16K and more")
    if data_raw and data is None:
        raise ConfigError("a raw data file needs a data file")
    if backing is not None and data_raw:
        raise ConfigError("a raw data file and a backing file exclude each other")
    if size > SIZE_MAX or size < 0:
        raise ConfigError(f"a disk of {size} bytes cannot be")
    incompatible = (EXTENDED if extended_l2 else 0) | (DATA_FILE if data is not None else 0)
    if compression != "zlib":
        incompatible |= COMPRESSION
    header = Qcow2Header(
        version,
        bits,
        size,
        backing,
        backing_format,
        data,
        incompatible=incompatible,
        compatible=LAZY_REFCOUNTS if lazy_refcounts else 0,
        autoclear=RAW_DATA_FILE if data_raw else 0,
        refcount_order=refcount_bits.bit_length() - 1,
        compression=_COMPRESSIONS[compression],
    )
    if version > 2 and cluster_size >= 1024:
        header = header.with_(extensions=(feature_names(),))
    entries = header.l1_needed(size)
    if entries * 8 > L1_BYTES_MAX:
        raise ConfigError(f"a disk of {size} bytes is too large for clusters of {cluster_size}; take larger ones")
    return header.with_(l1_entries=entries)


def _write_empty(fd: int, header: Qcow2Header) -> None:
    """Header, refcount table, refcount blocks and an L1 table, one after the other."""
    size = header.cluster_size
    l1_clusters = -(-header.l1_entries * 8 // size)
    block_bits = header.cluster_bits + 3 - header.refcount_order
    tables = blocks = 1
    while True:
        used = 1 + tables + blocks + l1_clusters
        need = -(-used // (1 << block_bits))
        room = tables * size // 8
        if need <= blocks and blocks <= room:
            break
        blocks = max(need, blocks)
        tables = max(tables, -(-blocks * 8 // size))
    header = header.with_(
        reftable_offset=size,
        reftable_clusters=tables,
        l1_offset=(1 + tables + blocks) * size,
    )
    first_block = 1 + tables
    table = b"".join(struct.pack(">Q", (first_block + index) * size) for index in range(blocks))
    os.ftruncate(fd, used * size)
    _write(fd, table, size)
    for index in range(blocks):
        count = min(max(used - (index << block_bits), 0), 1 << block_bits)
        _write(fd, ones(header.refcount_order, count), (first_block + index) * size)
    _write(fd, header.pack(), 0)
    os.fdatasync(fd)


def ones(order: int, count: int) -> bytes:
    """The start of a refcount block whose first `count` clusters have one reference each."""
    if order >= 3:
        return (1).to_bytes(1 << (order - 3), "big") * count
    bits = 1 << order
    value = sum(1 << index * bits for index in range(count))
    return value.to_bytes(-(-count * bits // 8), "little")


def _write(fd: int, data: bytes, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _reserve(fd: int, offset: int, size: int, preallocation: Preallocation) -> None:
    if preallocation == "falloc":
        os.posix_fallocate(fd, offset, size)
        return
    zeroes = bytes(1 << 20)
    for at in range(offset, offset + size, len(zeroes)):
        _write(fd, zeroes[: offset + size - at], at)


def _preallocate(
    path: str,
    data: str | None,
    header: Qcow2Header,
    preallocation: Preallocation,
    progress: Callable[[int, int], None] | None,
) -> None:
    from virtio.images.chain import open_chain

    with open_chain(path, format="qcow2", data=data) as chain:
        end = -(-header.size // 512) * 512
        step = _PREALLOCATE_STEP if preallocation == "full" else header.cluster_size
        zeroes = bytes(1 << 20)
        for at in range(0, end, step):
            # One sector brings its whole cluster, whose other bytes are new and so read as zeroes.
            part = min(step, end - at) if preallocation == "full" else min(512, end - at)
            for place in range(at, at + part, len(zeroes)):
                chain.image.write(place, zeroes[: at + part - place])
            if progress is not None:
                progress(at, end)
        if preallocation == "falloc":
            for layer_fd in (chain.top.fd, *chain.top.others[:1]):
                size = os.fstat(layer_fd).st_size
                os.posix_fallocate(layer_fd, 0, max(size, 1))


class _Made:
    """A file that is made anew: removed again if making it fails and it was not there before. An existing one is locked
    before it is touched."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self.new = False

    def __enter__(self) -> int:
        try:
            try:
                made = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
                os.close(made)
                self.new = True
            except FileExistsError:
                pass
            self.fd = open_locked(self.path, read_only=False)
            os.ftruncate(self.fd, 0)
        except OSError as error:
            raise ConfigError(f"{self.path}: {os_reason(error)}") from error
        return self.fd

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        os.close(self.fd)
        if error is not None and self.new:
            os.unlink(self.path)
        if isinstance(error, OSError):
            raise HostError(f"{self.path}: {os_reason(error)}") from error
