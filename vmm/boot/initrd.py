"""Whether an initrd is whole, as far as its own headers tell.

Specification: Linux' Documentation/driver-api/early-userspace/buffer-format.rst (newc archives, compressed or not, one
after the other, with zero bytes between), RFC 8878 (Zstandard), the .xz file format 1.2.0. Where a gzip, bzip2 or xz
stream ends is known only after unpacking it, so that is done, bit by bit, and what comes out is thrown away; an .xz
file that ends with a stream's footer is taken as whole. The kernel reports what is wrong with other compressions.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from vmm.errors import ConfigError

CPIO_MAGICS = (b"070701", b"070702")
CPIO_HEADER = 110
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
XZ_MAGIC, XZ_FOOTER = b"\xfd7zXZ\0", b"YZ"
XZ_MEMORY = 256 << 20
"""Bytes that a dictionary may take here; Linux' own decompressor takes 64 MiB at most."""
STREAMS: tuple[tuple[bytes, str, Callable[[], Any]], ...] = (
    (b"\x1f\x8b\x08", "gzip", lambda: zlib.decompressobj(31)),
    (b"BZh", "bzip2", bz2.BZ2Decompressor),
    (XZ_MAGIC, "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)),
)
PIECE, UNPACKED_MAX = 1 << 20, 1 << 30
"""Bytes that are unpacked at a time, and at most; a stream that makes more is taken as it is."""
MAX_STEPS = 200_000
"""Members and blocks that are looked at; what follows is taken as it is."""


def check_whole(data: memoryview, name: str) -> None:
    """Raises ConfigError if a member or a block reaches beyond the file."""
    at, steps = 0, 0
    while at < len(data) and steps < MAX_STEPS:
        steps += 1
        magic = bytes(data[at : at + 6])
        if magic in CPIO_MAGICS:
            at = _member_end(data, at, name)
        elif magic[:4] == ZSTD_MAGIC:
            at, blocks = _frame_end(data, at, name)
            steps += blocks
        elif stream := next((each for each in STREAMS if magic.startswith(each[0])), None):
            at = _stream_end(data, at, name, *stream[1:])
        elif magic[0] == 0:
            at += 1
            rest = bytes(data[at : at + 4096])
            at += len(rest) - len(rest.lstrip(b"\0"))
        else:
            return


def _cut(name: str, what: str, end: int, size: int) -> ConfigError:
    return ConfigError(f"{name}: the initrd is cut short: {what} ends at {end} of {size} bytes")


def _member_end(data: memoryview, at: int, name: str) -> int:
    try:
        header = bytes(data[at : at + CPIO_HEADER])
        file_size, name_size = int(header[54:62], 16), int(header[94:102], 16)
    except ValueError as error:
        if at + CPIO_HEADER > len(data):
            raise _cut(name, "a header", at + CPIO_HEADER, len(data)) from error
        return len(data)  # not an archive after all
    content = (at + CPIO_HEADER + name_size + 3) & ~3
    if content + file_size > len(data):
        raise _cut(name, "a member", content + file_size, len(data))
    return (content + file_size + 3) & ~3


def _stream_end(data: memoryview, at: int, name: str, kind: str, make: Callable[[], Any]) -> int:
    """Where the stream at `at` ends. The kernel reports what is wrong with a damaged one."""
    if kind == "xz" and bytes(data[-4096:]).rstrip(b"\0").endswith(XZ_FOOTER):
        return len(data)
    decoder, unpacked = make(), 0
    try:
        while not decoder.eof:
            # zlib gives back the input that it has not looked at, the others keep it
            left = getattr(decoder, "unconsumed_tail", b"")
            if not left and getattr(decoder, "needs_input", True):
                left = data[at : at + PIECE]
                at += len(left)
            out = decoder.decompress(left, PIECE)
            if not left and not out and not decoder.eof and at >= len(data):
                raise ConfigError(f"{name}: the initrd is cut short: its {kind} stream does not end within the file")
            unpacked += len(out)
            if unpacked > UNPACKED_MAX:
                return len(data)
    except (zlib.error, lzma.LZMAError, OSError, EOFError):
        return len(data)
    return at - len(decoder.unused_data)


def _frame_end(data: memoryview, at: int, name: str) -> tuple[int, int]:
    """(end, blocks) of the Zstandard frame at `at` (RFC 8878, 3.1.1)."""
    descriptor = data[at + 4] if at + 4 < len(data) else 0
    single, checksum = bool(descriptor & 0x20), bool(descriptor & 4)
    size_bytes = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    at += 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + size_bytes
    last, blocks = False, 0
    while not last:
        if blocks >= MAX_STEPS:
            return len(data), blocks
        if at + 3 > len(data):
            raise _cut(name, "a Zstandard frame", at + 3, len(data))
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)
        blocks += 1
    at += 4 if checksum else 0
    if at > len(data):
        raise _cut(name, "a Zstandard frame", at, len(data))
    return at, blocks
