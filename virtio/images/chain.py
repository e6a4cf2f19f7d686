"""Opening an image with the files that it names: backing files, an external data file.

An image is not to be trusted, and neither is what a guest wrote into a raw one, so:
- A file is opened because the user named it, or because the rule says so (`Backing`). A data file only if the user
  named it.
- A format is what the user says, or what the naming image records. Only without either it is found by content, and an
  image that was found so names no further files unless the rule is "any".
- A raw image that was found by content keeps guests from making it look like another format (`guarded`).

Everything may block; call from threads. Raises ConfigError.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from virtio import _ring
from virtio.backends.file import open_locked
from virtio.errors import ConfigError, HostError, os_reason
from virtio.images import unpack as _unpack  # noqa: F401  # tells C how to decompress without a library
from virtio.images.header import CORRUPT, DIRTY, RAW_DATA_FILE, Qcow2Header, is_qcow2, parse
from virtio.images.snapshots import find, protected, read_table

Format = Literal["raw", "qcow2"]
Backing = Literal["dir", "any", "none"]
"""dir: backing files in the same directory as the image that names them; any: wherever; none: no other file."""

DEPTH_MAX = 64
START = 2 << 20
"""The largest cluster, in which the header is."""


CACHE_BYTES = 32 << 20
"""Of L2 tables of one image that are kept in memory; of refcount blocks an eighth of it."""


@dataclass
class Layer:
    """One image of a chain, open."""

    path: str
    format: Format
    fd: int
    header: Qcow2Header | None
    """Of a qcow2 image."""
    others: tuple[int, ...]
    """More descriptors."""
    data_fd: int
    """Where guest clusters are: `fd` or one of the others."""
    align: int
    """Of what is read and written there, bytes; 0: any."""
    read_only: bool
    probed: bool = False
    """The format was found by content."""
    _image: _ring.Image | None = None

    @property
    def image(self) -> _ring.Image:
        assert self._image is not None
        return self._image

    def build(self, below: Layer | None, cache_bytes: int = CACHE_BYTES) -> None:
        """Make the image from what its file says now. May block. Raises ConfigError, OSError."""
        header = self.header
        if header is None:
            size = file_size(self.fd)
            self._image = _ring.Image.raw(self.data_fd, size, self.align, self.read_only, guarded=self.probed)
            return
        try:
            self._image = _ring.Image.qcow2(
                self.fd,
                self.data_fd,
                header.version,
                header.cluster_bits,
                header.refcount_order,
                -(-header.size // 512) * 512,
                header.l1_offset,
                header.l1_entries,
                header.reftable_offset,
                header.reftable_clusters,
                read_only=self.read_only,
                extended=header.extended,
                external=header.has_data_file,
                external_raw=bool(header.autoclear & RAW_DATA_FILE),
                compression=header.compression,
                align=self.align,
                backing=None if below is None else below.image,
                ranges=[] if self.read_only else protected(self.path, self.fd, header),
                cache_bytes=cache_bytes,
            )
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}; try vmm disk check --repair") from error

    def reread(self) -> None:
        """Take the header as it is in the file now, before `build`. Raises ConfigError."""
        if self.header is not None:
            self.header = parse(self.path, read_start(self.fd), file_size(self.fd))


class ImageChain:
    """An image and what is read where it has nothing. `close` it, or lose what was not flushed."""

    def __init__(self, layers: list[Layer], *, active: bool = True) -> None:
        self.layers = layers
        self.active = active
        """False: the uppermost image is somebody else's still, and is not written here."""

    @property
    def top(self) -> Layer:
        return self.layers[0]

    @property
    def image(self) -> _ring.Image:
        return self.top.image

    @property
    def size(self) -> int:
        """Of the disk, bytes."""
        return self.image.length

    @property
    def image_size(self) -> int:
        """The same from the file, for use while the images are closed."""
        return file_size(self.top.fd) if self.top.header is None else self.top.header.size

    def rebuild(self, change: Callable[[], None] | None = None) -> None:
        """Flush, let `change` do what it likes to files and `layers`, and build every image anew from what the files
        say then. Nobody may be using the images, nor use those of before. Raises ConfigError, OSError."""
        for layer in self.layers:
            layer.image.close()
        try:
            if change is not None:
                change()
        finally:
            below: Layer | None = None
            for layer in reversed(self.layers):
                layer.reread()
                layer.build(below)
                below = layer

    def close(self) -> None:
        """Flush and close everything. HostError: what was written may not be there."""
        failure: OSError | None = None
        layers, self.layers = self.layers, []
        for layer in layers:
            try:
                layer.image.close()
            except OSError as error:
                failure = failure or error
            for fd in (layer.fd, *layer.others):
                os.close(fd)
        if failure is not None:
            raise HostError(f"{layers[0].path}: {os_reason(failure)}") from failure

    def __enter__(self) -> ImageChain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_start(fd: int) -> bytes:
    """The bytes among which a header is."""
    return os.pread(fd, START, 0)


def probe(fd: int) -> Format:
    """What a file looks like; what looks like nothing is raw."""
    return "qcow2" if is_qcow2(os.pread(fd, 8, 0)) else "raw"


def file_size(fd: int) -> int:
    """Of a file or a block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def backing_path(path: str, name: str) -> str:
    """Where a backing file is that the image at `path` calls `name`. ConfigError: no file at all."""
    name = name.removeprefix("file:")
    head = name.split("/", 1)[0]
    if ":" in head:
        raise ConfigError(
            f"{path}: its backing file is {head.split(':')[0]!r}…, which is no file; convert or rebase it"
        )
    return os.path.join(os.path.dirname(path), name)


def allowed(path: str, backing: str, rule: Backing) -> bool:
    """Whether the rule lets an image name that file. Links are followed first."""
    if rule == "any":
        return True
    real = os.path.realpath
    return rule == "dir" and os.path.dirname(real(path)) == os.path.dirname(real(backing))


def open_chain(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    read_only: bool = False,
    direct: bool = False,
    backing: Backing = "dir",
    data: str | os.PathLike[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
    repair: bool = True,
    alone: bool = False,
    snapshot: str | None = None,
    active: bool = True,
) -> ImageChain:
    """Open an image and its chain. Without `format` it is found by content.

    `direct`: guest clusters of the top image past the page cache. `data`: its external data file. `repair`: refcounts
    of an image whose last writer did not end well are made right before it is written; else that is refused. `alone`:
    only the image itself; where it has nothing it reads as zeroes. `snapshot`: as it was at that internal snapshot, to
    be read only. Not `active`: somebody else uses the files. They are neither locked nor written, and what is read of
    them may be old, until the chain is rebuilt.
    """
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    try:
        _open(
            layers,
            seen,
            os.fspath(path),
            format,
            _Wanted(
                read_only, direct, "none" if alone else backing, data, cache_bytes, repair, alone, snapshot, active
            ),
        )
    except BaseException:
        ImageChain(layers).close()
        raise
    return ImageChain(layers, active=active)


def make_active(chain: ImageChain) -> None:
    """In `ImageChain.rebuild`, with the locks: the uppermost image is ours from now on. Raises ConfigError."""
    if chain.active:
        return
    layer = chain.top
    if layer.header is not None:
        wanted = _Wanted(False, False, "dir", None, CACHE_BYTES, True, False, None)
        _prepare(layer.path, layer.fd, parse(layer.path, read_start(layer.fd), file_size(layer.fd)), wanted)
    layer.read_only = False
    chain.active = True


@dataclass(frozen=True)
class _Wanted:
    """How a layer is to be opened: open_chain()'s arguments."""

    read_only: bool
    direct: bool
    backing: Backing
    data: str | os.PathLike[str] | None
    cache_bytes: int
    repair: bool
    alone: bool
    snapshot: str | None
    active: bool = True


def _open(layers: list[Layer], seen: set[tuple[int, int]], path: str, format: Format | None, wanted: _Wanted) -> Layer:
    """Open one image below those in `layers`, after what it names, and put it before them."""
    top = not seen
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {os_reason(error) if isinstance(error, OSError) else error}") from error
    if (status.st_dev, status.st_ino) in seen:  # before it is locked: its first user is this chain
        raise ConfigError(f"{path}: its chain of backing files comes back to it")
    fd = open_locked(path, read_only=wanted.read_only, lock=wanted.active)
    descriptors = [fd]
    try:
        status = os.fstat(fd)
        place = (status.st_dev, status.st_ino)
        if place in seen:
            raise ConfigError(f"{path}: its chain of backing files comes back to it")
        if len(seen) == DEPTH_MAX:
            raise ConfigError(f"{path}: a chain of more than {DEPTH_MAX} images; commit or rebase some")
        seen.add(place)
        found = format or probe(fd)
        if found == "raw":
            if wanted.snapshot is not None or wanted.data is not None:
                raise ConfigError(f"{path}: a raw image has neither snapshots nor a data file")
            layer = _raw(path, descriptors, wanted, probed=format is None)
        else:
            layer = _qcow2(layers, seen, path, descriptors, wanted, recorded=top or format is not None)
            layer.probed = format is None
        layers.insert(0, layer)
        return layer
    except OSError as error:
        for each in descriptors:
            os.close(each)
        raise ConfigError(f"{path}: {os_reason(error)}") from error
    except BaseException:
        for each in descriptors:
            os.close(each)
        raise


def _raw(path: str, descriptors: list[int], wanted: _Wanted, *, probed: bool) -> Layer:
    align = 0
    if wanted.direct:
        align = 4096
        descriptors.append(_direct(path, descriptors[0], wanted.read_only))
    read_only = wanted.read_only or not wanted.active
    layer = Layer(path, "raw", descriptors[0], None, (), descriptors[-1], align, read_only, probed)
    layer.others = tuple(descriptors[1:])
    layer.build(None)
    return layer


def _direct(path: str, fd: int, read_only: bool) -> int:
    """The same file opened past the page cache, even if its name leads to another file by now."""
    try:
        return os.open(f"/proc/self/fd/{fd}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path}: its file system has no O_DIRECT; use another cache mode") from error


def _qcow2(
    layers: list[Layer],
    seen: set[tuple[int, int]],
    path: str,
    descriptors: list[int],
    wanted: _Wanted,
    *,
    recorded: bool,
) -> Layer:
    fd = descriptors[0]
    header = parse(path, read_start(fd), file_size(fd))
    if not wanted.read_only and wanted.active:
        header = _prepare(path, fd, header, wanted)
    if wanted.snapshot is not None:
        snapshots, _ = read_table(path, fd, header)
        item = snapshots[find(path, snapshots, wanted.snapshot)]
        header = header.with_(size=item.size, l1_offset=item.l1_offset, l1_entries=item.l1_entries)
        if header.l1_needed(header.size) > header.l1_entries:
            raise ConfigError(f"{path}: the L1 table of snapshot {wanted.snapshot!r} is too small for its size")
    data_fd, align = fd, 0
    if header.has_data_file:
        if wanted.data is None:
            hint = f" ({header.data_file})" if header.data_file else ""
            raise ConfigError(f"{path}: its clusters are in an external data file{hint}; name it with data=FILE")
        data_fd = open_locked(os.fspath(wanted.data), read_only=wanted.read_only, lock=wanted.active)
        descriptors.append(data_fd)
    elif wanted.data is not None:
        raise ConfigError(f"{path}: has no external data file; leave data= out")
    if wanted.direct:
        if header.cluster_bits < 12:
            raise ConfigError(f"{path}: cache=none needs clusters of 4 KiB and more; use another cache mode")
        data_fd, align = _direct(path, data_fd, wanted.read_only), 4096
        descriptors.append(data_fd)
    below: Layer | None = None
    if header.backing is not None and not wanted.alone:
        below = _below(layers, seen, path, header, wanted, recorded=recorded)
    read_only = wanted.read_only or not wanted.active
    layer = Layer(path, "qcow2", fd, header, tuple(descriptors[1:]), data_fd, align, read_only)
    layer.build(below, wanted.cache_bytes)
    return layer


def _below(
    layers: list[Layer], seen: set[tuple[int, int]], path: str, header: Qcow2Header, wanted: _Wanted, *, recorded: bool
) -> Layer:
    assert header.backing is not None
    where = backing_path(path, header.backing)
    if not recorded and wanted.backing != "any":
        raise ConfigError(
            f"{path}: names the backing file {header.backing!r}, but is itself qcow2 only by its content; "
            "record its format (vmm disk rebase --unsafe) or allow it with backing=any"
        )
    if not allowed(path, where, wanted.backing):
        raise ConfigError(
            f"{path}: its backing file {header.backing!r} is not in its directory; allow it with backing=any"
            if wanted.backing == "dir"
            else f"{path}: names the backing file {header.backing!r}, which backing=none forbids"
        )
    recorded_format = header.backing_format
    if recorded_format not in (None, "raw", "qcow2"):
        raise ConfigError(f"{path}: its backing file has the format {recorded_format!r}; raw and qcow2 are known")
    known: Format | None = "raw" if recorded_format == "raw" else "qcow2" if recorded_format == "qcow2" else None
    below = _Wanted(True, False, wanted.backing, None, wanted.cache_bytes, False, False, None)
    return _open(layers, seen, where, known, below)


def _prepare(path: str, fd: int, header: Qcow2Header, wanted: _Wanted) -> Qcow2Header:
    """Before an image is written: repaired if it has to be, and without features that we would make untrue."""
    if header.incompatible & CORRUPT:
        raise ConfigError(f"{path}: is marked as corrupt; try vmm disk check --repair, or open it read-only")
    if header.incompatible & DIRTY:
        if not wanted.repair:
            raise ConfigError(f"{path}: was not closed; vmm disk check --repair makes it right")
        from virtio.images.check import repair

        repair(path, fd, header)
        header = parse(path, read_start(fd), file_size(fd))
    if header.autoclear & ~RAW_DATA_FILE:
        from virtio.images.check import clear_autoclear

        header = clear_autoclear(fd, header)
    return header
