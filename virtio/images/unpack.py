"""Decompression of qcow2 clusters by Python, for hosts that lack libz.so.1 or libzstd.so.1; and compression.

A thread of C that calls this waits for the interpreter's lock beside a busy loop, which the host's libraries, called
from C, do not need. So C asks those first, and this is what serves without them.
"""

from __future__ import annotations

import zlib

from virtio import _ring
from virtio.images.header import DEFLATE


def unpack(kind: int, data: bytes, size: int) -> bytes:
    """The first `size` bytes that the stream makes; what follows it is not looked at. zlib.error, ZstdError."""
    if kind == DEFLATE:
        return zlib.decompressobj(-15).decompress(data, size)
    import zstandard  # most machines have no such image

    with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as reader:
        return reader.read(size)


def pack(kind: int, data: bytes) -> bytes:
    """Compressed as other readers of the format take it: deflate without header and with a window of 4 KiB, or zstd."""
    if kind == DEFLATE:
        made = zlib.compressobj(wbits=-12)
        return made.compress(data) + made.flush()
    import zstandard

    return zstandard.ZstdCompressor(write_content_size=True).compress(data)


_ring.Image.set_unpacker(unpack)
