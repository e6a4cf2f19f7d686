"""Bytes from image to image: convert, commit, rebase, resize. May block for long; call from threads.

Large reads and writes; holes and zeroes are not moved. A reader thread is one step ahead of the writer; compression has
all processors.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from virtio import _ring
from virtio.backends.file import open_locked
from virtio.errors import ConfigError, HostError, os_reason
from virtio.images.chain import Backing, Format, ImageChain, backing_path, file_size, open_chain
from virtio.images.changes import set_backing, set_size
from virtio.images.create import create_qcow2, create_raw
from virtio.images.progress import Progress, silent
from virtio.images.unpack import pack

STEP = 2 << 20
"""Bytes of one read or write."""
MAPPED = 1 << 30
"""Bytes that are asked for in one look into the tables."""
_ZEROES = bytes(STEP)


def data_of(chain: ImageChain) -> Iterator[tuple[int, int, str, int]]:
    """(offset, length, kind, depth in the chain) of every part of the disk. A raw file's holes are looked up."""
    image, at = chain.image, 0
    while at < chain.size:
        for length, kind, depth, _ in image.map(at, min(MAPPED, chain.size - at)):
            layer = chain.layers[depth] if depth < len(chain.layers) else None
            if kind == "data" and layer is not None and layer.format == "raw":
                for start, part, hole in _holes(layer.fd, at, length):
                    yield start, part, "zero" if hole else "data", depth
            else:
                yield at, length, kind, depth
            at += length


def _holes(fd: int, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """The parts of a file that its file system has, and those that it has not: (offset, length, hole)."""
    end = offset + length
    while offset < end:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError:
            data = end  # nothing but a hole follows
        if data > offset:
            yield offset, data - offset, True
        if data < end:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            yield data, hole - data, False
            data = hole
        offset = data


def _pieces(chain: ImageChain, step: int) -> Iterator[tuple[int, int]]:
    """What of a disk may hold something, in multiples of `step` where that can be: (offset, length <= STEP)."""
    done = 0
    for offset, length, kind, _ in data_of(chain):
        if kind in ("zero", "hole"):
            continue
        # Whole steps, each once.
        start, end = max(offset // step * step, done), min(-(-(offset + length) // step) * step, chain.size)
        for at in range(start, end, STEP):
            yield at, min(STEP, end - at)
        done = max(done, end)


def _read(image: _ring.Image, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    image.read(offset, data)
    return data


def _ahead(image: _ring.Image, pieces: Iterator[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
    """(offset, bytes) of pieces, the next ones being read meanwhile."""
    with ThreadPoolExecutor(1, "read image") as reader:
        waiting: deque[tuple[int, Future[bytearray]]] = deque()
        try:
            for offset, length in pieces:
                waiting.append((offset, reader.submit(_read, image, offset, length)))
                if len(waiting) > 2:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def filled(data: bytearray, unit: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the runs of units that are not all zeroes."""
    start = -1
    for at in range(0, len(data), unit):
        part = data[at : at + unit]
        if part == _ZEROES[: len(part)]:
            if start >= 0:
                yield start, at - start
            start = -1
        elif start < 0:
            start = at
    if start >= 0:
        yield start, len(data) - start


def convert(
    source: str,
    target: str,
    *,
    source_format: Format | None = None,
    format: Format = "qcow2",
    backing: Backing = "dir",
    data: str | None = None,
    snapshot: str | None = None,
    compress: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Write the disk in `source` into a new image at `target`. `options` are those of create_qcow2 or create_raw.
    `snapshot`: as it was then. Raises ConfigError, HostError."""
    options = options or {}
    if compress and format == "raw":
        raise ConfigError("a raw image is not compressed; convert to qcow2")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise ConfigError(f"{target}: is what is to be converted")
    with open_chain(
        source, format=source_format, read_only=True, backing=backing, data=data, snapshot=snapshot
    ) as chain:
        size = chain.size
        if format == "raw":
            create_raw(target, size, **options)
        else:
            create_qcow2(target, size, **options)
        try:
            external = options.get("data")
            path = None if external is None else os.path.join(os.path.dirname(target), str(external))
            with open_chain(target, format=format, data=path) as made:
                header = made.top.header
                unit = 4096 if header is None else max(4096, header.cluster_size)
                pieces = _pieces(chain, unit)
                if compress:
                    _compressed(chain.image, made, pieces, progress)
                else:
                    for at, content in _ahead(chain.image, pieces):
                        for start, length in filled(content, unit):
                            made.image.write(at + start, memoryview(content)[start : start + length])
                        progress(at, size)
        except OSError as error:
            raise HostError(f"{target}: {os_reason(error)}") from error
    progress(size, size)


def _compressed(image: _ring.Image, made: ImageChain, pieces: Iterator[tuple[int, int]], progress: Progress) -> None:
    header = made.top.header
    assert header is not None
    cluster, kind = header.cluster_size, header.compression

    def packed(data: bytes) -> bytes | None:
        """None: nothing but zeroes."""
        return None if data == _ZEROES[: len(data)] else pack(kind, data.ljust(cluster, b"\0"))

    def store(at: int, data: bytes, future: Future[bytes | None]) -> None:
        result = future.result()
        if result is not None and len(result) < cluster:
            made.image.write_packed(at, result)
        elif result is not None:
            made.image.write(at, data)
        progress(at, made.size)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers, "compress") as pool:
        waiting: deque[tuple[int, bytes, Future[bytes | None]]] = deque()
        for offset, content in _ahead(image, pieces):
            for start in range(0, len(content), cluster):
                data = bytes(content[start : start + cluster])
                waiting.append((offset + start, data, pool.submit(packed, data)))
                if len(waiting) > 4 * workers:
                    store(*waiting.popleft())
        while waiting:
            store(*waiting.popleft())


def commit(path: str, *, backing: Backing = "dir", keep: bool = False, progress: Progress = silent) -> str:
    """Write what an image holds into its backing file, and empty it unless `keep`. Other images over that file see the
    change. Returns the backing file's path. Raises ConfigError, HostError."""
    with open_chain(path, read_only=True, backing=backing) as chain:
        header = chain.top.header
        if header is None or header.backing is None:
            raise ConfigError(f"{path}: has no backing file to commit to")
        below, size = chain.layers[1], chain.size
        where, format, larger = below.path, below.format, below.image.length < size
    if larger:
        resize(where, size, format=format, backing=backing)
    try:
        with open_chain(path, format="qcow2", alone=True) as top:
            with open_chain(where, format=format, backing=backing) as base:
                for at, content in _ahead(top.image, _own(top, base)):
                    base.image.write(at, content)
                    progress(at, size)
                base.image.flush()
            if not keep:
                top.image.forget(0, size)
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error
    progress(size, size)
    return where


def _own(top: ImageChain, base: ImageChain) -> Iterator[tuple[int, int]]:
    """What an image itself holds, as (offset, length <= STEP); where it says zeroes, the base gets them at once."""
    for offset, length, kind, _ in data_of(top):
        if kind == "zero":
            base.image.zero(offset, length, True)
        elif kind != "hole":
            for at in range(offset, offset + length, STEP):
                yield at, min(STEP, offset + length - at)


def rebase(
    path: str,
    name: str | None,
    format: Format | None,
    *,
    backing: Backing = "dir",
    unsafe: bool = False,
    progress: Progress = silent,
) -> None:
    """Give an image another backing file, `name` as it is to be recorded, or none; the disk stays what it is. `unsafe`:
    only the name is changed. Raises ConfigError, HostError."""
    where = None if name is None else backing_path(path, name)
    try:
        if not unsafe:
            _take_over(path, where, format, backing, progress)
        fd = open_locked(path, read_only=False)
        try:
            set_backing(path, fd, name, format)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error
    progress(1, 1)


def _take_over(path: str, where: str | None, format: Format | None, backing: Backing, progress: Progress) -> None:
    """Copy into the image what it reads from its backing file and would not read from the new one."""
    with open_chain(path, format="qcow2", backing=backing) as chain:
        if where is not None and os.path.samefile(path, where):
            raise ConfigError(f"{path}: cannot be its own backing file")
        new = None if where is None else open_chain(where, format=format, read_only=True, backing=backing)
        header = chain.top.header
        assert header is not None
        unit = header.cluster_size
        try:
            for offset, length, kind, depth in list(data_of(chain)):
                if depth == 0 and kind != "hole":
                    continue
                for at in range(offset, offset + length, STEP):
                    part = min(STEP, offset + length - at)
                    _differing(chain, new, at, part, unit, old_zero=kind in ("zero", "hole"))
                    progress(at, chain.size)
        finally:
            if new is not None:
                new.close()


def _differing(chain: ImageChain, new: ImageChain | None, at: int, length: int, unit: int, *, old_zero: bool) -> None:
    there = 0 if new is None else max(0, min(length, new.size - at))
    if old_zero and not there:
        return
    old = bytearray(length) if old_zero else _read(chain.image, at, length)
    other = bytearray(length)
    if new is not None and there:
        other[:there] = _read(new.image, at, there)
    if old == other:
        return
    start = 0
    while start < length:
        stop = min(length, (at + start) // unit * unit + unit - at)
        if old[start:stop] != other[start:stop]:
            chain.image.write(at + start, old[start:stop])
        start = stop


def resize(
    path: str,
    size: int,
    *,
    format: Format | None = None,
    shrink: bool = False,
    backing: Backing = "dir",
    data: str | None = None,
) -> None:
    """Make a disk larger, or smaller if `shrink` says that what is behind the end may be lost. Raises ConfigError,
    HostError."""
    try:
        with open_chain(path, format=format, backing=backing, data=data) as chain:
            old, header = chain.size, chain.top.header
            if size < old and not shrink:
                raise ConfigError(
                    f"{path}: has {old} bytes; what is behind {size} would be lost: allow it with --shrink"
                )
            if header is None:
                os.ftruncate(chain.top.fd, size)
                return
            if size < old:
                end = -(-size // header.cluster_size) * header.cluster_size
                chain.image.zero(size, min(end, old) - size)
                if end < old:
                    chain.image.forget(end, old - end)
        if data is not None and file_size_of(data) < size:
            os.truncate(data, size)
        fd = open_locked(path, read_only=False)
        try:
            set_size(path, fd, size)
        finally:
            os.close(fd)
        if size > old:
            # A backing file that is longer than the disk was does not show through behind its old end.
            with open_chain(path, format="qcow2", backing=backing, data=data) as chain:
                if len(chain.layers) > 1 and chain.layers[1].image.length > old:
                    chain.image.zero(old, min(size, chain.layers[1].image.length) // 512 * 512 - old)
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error


def file_size_of(path: str) -> int:
    """Of a file or a block device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return file_size(fd)
    finally:
        os.close(fd)
