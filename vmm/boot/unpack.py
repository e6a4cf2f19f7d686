"""Unpacking a kernel's compressed payload on the host, with a cache by content.

The formats that Linux's build can write (Documentation/arch/x86/boot.rst, `payload_offset`): gzip, bzip2, lzma, xz,
lzo, lz4 (legacy frames), zstd, or none. A payload is followed by its unpacked size in 4 bytes, which every decoder
here ignores as trailing data. The cache holds unpacked ELF files named by the SHA-256 of the payload, and links to them
named by the identity of a kernel's file (inode, size, times of change), so that a file that is as it was is not read
again. What only a kernel not known yet needs is imported then: decoders (zstandard takes 13 ms), hashlib and OpenSSL.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import time
from pathlib import Path
from typing import Any

from vmm.cachedir import cache_directory

MAX_UNPACKED = 1 << 30
"""Bytes; a larger result is refused."""
_SETTLED_NS = 2_000_000_000
"""A file that changed later than so long ago may change again without its times telling."""
_LZ4_BLOCK = 8 << 20
_LZO_BLOCK = 256 << 10
"""What Linux's own decompressor takes."""
_LZO_MAGIC = b"\x89LZO\0\r\n\x1a\n"

MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
    (b"\xfd7zXZ\0", "xz"),
    (_LZO_MAGIC, "lzo"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x7fELF", "none"),
)


class UnpackError(Exception):
    """The payload is not what its magic says, or too large. One sentence."""


def compression(payload: bytes | memoryview) -> str | None:
    """The name of the compression by magic number, 'none' for a plain ELF file, None if unknown."""
    head = bytes(payload[:16])
    return next((name for magic, name in MAGICS if head.startswith(magic)), None)


def _bounded(decoder: Any, payload: bytes | memoryview) -> bytes:
    """Drive a zlib-, bz2- or lzma-like decompressor object with a bound on its output."""
    data: bytes = decoder.decompress(payload, MAX_UNPACKED)
    if not decoder.eof:
        raise UnpackError("it ends early, or unpacks to more than 1 GiB")
    return data


def _lz4(payload: memoryview) -> bytes:
    """The legacy frame format: magic, then blocks of up to 8 MiB, each after its packed size (4 bytes)."""
    import lz4.block

    at, blocks, total = 4, [], 0
    while at + 4 <= len(payload):
        size = int.from_bytes(payload[at : at + 4], "little")
        if payload[at : at + 4] == payload[:4]:
            at += 4  # concatenated frames
            continue
        if size == 0 or at + 4 + size > len(payload):
            break  # the size that Linux's build appends
        block = lz4.block.decompress(payload[at + 4 : at + 4 + size], uncompressed_size=_LZ4_BLOCK)
        total += len(block)
        if total > MAX_UNPACKED:
            raise UnpackError("it unpacks to more than 1 GiB")
        blocks.append(block)
        at += 4 + size
    if not blocks:
        raise UnpackError("it holds no block")
    return b"".join(blocks)


def _lzo(payload: memoryview) -> bytes:
    """The lzop file format: a header of big-endian fields, then blocks of (unpacked, packed size, checksums, data)."""
    try:
        lzallright = importlib.import_module("lzallright")
    except ImportError as error:
        raise UnpackError("lzo needs the Python package lzallright: pip install lzallright") from error

    def word(at: int, size: int = 4) -> int:
        if at + size > len(payload):
            raise UnpackError("it ends early")
        return int.from_bytes(payload[at : at + size], "big")

    at = len(_LZO_MAGIC)
    new = word(at, 2) >= 0x0940
    at += 4 + (2 if new else 0) + 1 + (1 if new else 0)
    flags = word(at)
    at += 4 + (4 if flags & 0x800 else 0) + 8 + (4 if new else 0)
    at += 1 + word(at, 1) + 4
    checksums_unpacked = 4 * (bool(flags & 0x1) + bool(flags & 0x100))
    checksums_packed = 4 * (bool(flags & 0x2) + bool(flags & 0x200))
    blocks, total = [], 0
    while unpacked := word(at):
        packed = word(at + 4)
        at += 8 + checksums_unpacked + (checksums_packed if packed < unpacked else 0)
        total += unpacked
        if packed > unpacked or unpacked > _LZO_BLOCK or at + packed > len(payload) or total > MAX_UNPACKED:
            raise UnpackError("a block's size is wrong")
        block = bytes(payload[at : at + packed])
        if packed < unpacked:
            try:
                block = lzallright.LZOCompressor.decompress(block, unpacked)
            except lzallright.LZOError as error:
                raise UnpackError(str(error)) from error
            if len(block) != unpacked:
                raise UnpackError("a block's size is wrong")
        blocks.append(block)
        at += packed
    return b"".join(blocks)


def unpack(payload: bytes | memoryview) -> bytes:
    """The unpacked payload. Raises UnpackError."""
    import bz2
    import lzma
    import zlib

    import lz4.block
    import zstandard

    view = memoryview(payload)
    kind = compression(view)
    try:
        match kind:
            case "none":
                return bytes(view)
            case "gzip":
                return _bounded(zlib.decompressobj(31), view)
            case "bzip2":
                return _bounded(bz2.BZ2Decompressor(), view)
            case "lzma":
                return _bounded(lzma.LZMADecompressor(lzma.FORMAT_ALONE), view)
            case "xz":
                return _bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ), view)
            case "lz4":
                return _lz4(view)
            case "lzo":
                return _lzo(view)
            case "zstd":
                return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj().decompress(view)
    except UnpackError as error:
        raise UnpackError(f"{kind} payload: {error}") from error
    except (zlib.error, lzma.LZMAError, lz4.block.LZ4BlockError, zstandard.ZstdError, OSError, EOFError) as error:
        raise UnpackError(f"{kind} payload: {error}") from error
    raise UnpackError(f"no known compression (it starts with {bytes(view[:4]).hex(' ')})")


def _map(path: Path) -> memoryview | None:
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        return None


def _remember(link: Path, target: Path, file: os.stat_result) -> None:
    if time.time_ns() - max(file.st_mtime_ns, file.st_ctime_ns) > _SETTLED_NS:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)


def unpack_cached(
    payload: bytes | memoryview, *, cache: Path | None = None, file: os.stat_result | None = None
) -> memoryview:
    """The unpacked payload, from the cache if it is there; else it is unpacked and kept (a cache that cannot be
    written is no error). `file`: what the payload's file was as it was opened; if the cache knows it, the payload is
    not looked at. Raises UnpackError."""
    if compression(payload) == "none":
        return memoryview(payload)
    folder = cache_directory("kernels") if cache is None else cache
    link = None
    if file is not None:
        parts = (file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns)
        link = folder / f"{'-'.join(f'{part:x}' for part in parts)}.link"
        known = _map(link)
        if known is not None:
            return known
    import hashlib

    path = folder / f"{hashlib.sha256(payload).hexdigest()}.elf"
    found = _map(path)
    if found is None:
        data = unpack(payload)
        with contextlib.suppress(OSError):
            store(path, data)
        found = memoryview(data)
    if link is not None and file is not None:
        _remember(link, path, file)
    return found


def store(path: Path, data: bytes) -> None:
    """Write a file so that others see it whole or not at all. Raises OSError."""
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.rename(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
