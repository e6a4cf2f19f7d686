"""A layer's blob as the tar stream that it holds: decompressed in bounded memory, and checked by its digest.

Source: OCI image specification 1.1, "Layer" media types (tar, +gzip, +zstd; Docker's of the same shapes). What a blob
is compressed with is told by its first bytes, for media types are often wrong. *any thread*
"""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, Self

from images.errors import ImageError

CHUNK = 4 << 20
INPUT = 256 << 10
AHEAD = 8
"""Chunks of a layer that are taken before somebody asks for them; most have about a MiB."""
MAX_WINDOW = 128 << 20
"""Bytes that a zstd frame may have its reader keep."""
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
SKIPPABLE = 0x184D2A50
"""zstd's skippable frames have this number and the next 15 (RFC 8878, 3.1.2); zstd:chunked and estargz use them."""


def decompressed(blob: BinaryIO) -> Iterator[bytes]:
    """The content of a blob, CHUNK bytes at most at a time. Raises ImageError if it is damaged."""
    start = blob.read(4)
    blob.seek(0)
    if start[:2] == GZIP:
        return _gunzip(blob)
    if start == ZSTD or (len(start) == 4 and int.from_bytes(start, "little") & ~15 == SKIPPABLE):
        return _unzstd(blob)
    return _plain(blob)


def _plain(blob: BinaryIO) -> Iterator[bytes]:
    while data := blob.read(CHUNK):
        yield data


def _gunzip(blob: BinaryIO) -> Iterator[bytes]:
    """Any number of gzip members one after another (RFC 1952, 2.2); zeroes behind the last are padding."""
    data = blob.read(INPUT)
    while data:
        engine = zlib.decompressobj(31)
        try:
            while not engine.eof:
                out = engine.decompress(data, CHUNK)
                if out:
                    yield out
                data = engine.unconsumed_tail
                if not data and not engine.eof and not (data := blob.read(INPUT)):
                    raise ImageError("a layer is cut short")
        except zlib.error as error:
            raise ImageError(f"a layer is damaged: {error}") from error
        data = engine.unused_data or blob.read(INPUT)
        while data and not data.strip(b"\0"):
            data = blob.read(INPUT)


def _unzstd(blob: BinaryIO) -> Iterator[bytes]:
    import zstandard

    engine = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    try:
        with engine.stream_reader(blob, read_size=INPUT, read_across_frames=True, closefd=False) as reader:
            while data := reader.read(CHUNK):
                yield data
    except zstandard.ZstdError as error:
        raise ImageError(f"a layer is damaged: {error}") from error


class _ReadAhead:
    """Takes chunks in a thread of its own, AHEAD of them before they are asked for, and their digest: decompression and
    digests run without the interpreter's lock, so on another processor than who makes files of the chunks."""

    def __init__(self, chunks: Iterator[bytes], limit: int) -> None:
        """`limit`: bytes, behind which nothing is taken any more."""
        self._chunks = chunks
        self._limit = limit
        self._taken: queue.Queue[bytes | Exception] = queue.Queue(AHEAD)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="oci-layer", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[bytes]:
        """The chunks. Raises what taking them did."""
        while taken := self._taken.get():
            if isinstance(taken, Exception):
                raise taken
            yield taken

    def close(self) -> None:
        """End the thread; chunks that nobody asked for are lost."""
        self._stopped = True
        while self._thread.is_alive():
            try:
                self._taken.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _run(self) -> None:
        try:
            for chunk in self._chunks:
                self._taken.put(chunk)
                self._limit -= len(chunk)
                if self._stopped or self._limit < 0:
                    break
            self._taken.put(b"")
        except Exception as error:
            self._taken.put(error)


class LayerStream:
    """Chunks as something to read from, with the digest of everything that went through. In a `with` block the chunks
    and their digest are made by a thread that is a little ahead."""

    def __init__(self, chunks: Iterator[bytes], limit: int, like: str = "sha256:") -> None:
        """`limit`: bytes, over which ImageError is raised. `like`: a digest whose algorithm is taken."""
        self._algorithm = like.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self._chunks = self._digested(chunks)
        self._ahead: _ReadAhead | None = None
        self._chunk = memoryview(b"")
        self._left = limit
        self._limit = limit

    def __enter__(self) -> Self:
        self._ahead = _ReadAhead(self._chunks, self._limit)
        self._chunks = iter(self._ahead)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._ahead is not None
        self._ahead.close()

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        if len(self._chunk) >= size:
            data, self._chunk = self._chunk[:size], self._chunk[size:]
            return bytes(data)
        parts = [self._chunk]
        missing = size - len(self._chunk)
        self._chunk = memoryview(b"")
        while missing and (chunk := self._next()):
            parts.append(chunk[:missing])
            self._chunk = chunk[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def finish(self) -> str:
        """Read what is left; the digest of everything."""
        while self._next():
            pass
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def _digested(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._hash.update(chunk)
            yield chunk

    def _next(self) -> memoryview:
        chunk = next(self._chunks, b"")
        self._left -= len(chunk)
        if self._left < 0:
            raise ImageError(
                f"a layer unpacks to more than {self._limit >> 30} GiB; LOOPVISOR_OCI_LIMIT sets another limit"
            )
        return memoryview(chunk)
