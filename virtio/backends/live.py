"""Changes of the disk of a running machine: snapshots, size, another image on top, and moving data along the chain.

Each holds the driver's requests for moments only (BlockDevice.exchange); what takes long goes on beside them, in
steps. Everything can be cancelled: what was done by then stays done, and the disk is right at every moment, also if the
process is killed. Loop thread. Raises ConfigError, HostError, StateError. `progress` is called with (bytes done, bytes
in all).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Protocol

from virtio import _ring
from virtio.backends.block import BlockBackend
from virtio.backends.file import open_locked
from virtio.backends.image import ImageBlock
from virtio.backends.lock import ImageLock
from virtio.backends.pace import JobPace
from virtio.errors import ConfigError, HostError, StateError, os_reason
from virtio.images import changes
from virtio.images.chain import DEPTH_MAX, ImageChain, Layer
from virtio.images.check import reread
from virtio.images.create import create_qcow2
from virtio.images.header import DIRTY
from virtio.images.progress import Progress, silent


class LiveDisk(Protocol):
    """The device; virtio.devices.blk.BlockDevice is one."""

    backend: BlockBackend

    async def exchange(self, change: Callable[[], Awaitable[None]]) -> None:
        """Have `change` put another backend in place while no request is in flight."""


def image_of(disk: LiveDisk) -> ImageBlock:
    """The disk's images. StateError if it has none."""
    if not isinstance(disk.backend, ImageBlock):
        raise StateError(f"a disk that is {type(disk.backend).__name__} has no images")
    return disk.backend


@contextlib.contextmanager
def one_kind(path: str) -> Iterator[None]:
    """An OSError as a HostError that names the file."""
    try:
        yield
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error


async def _change(disk: LiveDisk, call: Callable[[ImageChain], None]) -> None:
    backend = image_of(disk)
    with one_kind(backend.chain.top.path):
        await disk.exchange(lambda: backend.change(call))


def _is_qcow2(chain: ImageChain) -> Layer:
    if chain.top.format != "qcow2":
        raise ConfigError(f"{chain.top.path}: a raw image cannot do that; put a qcow2 one over it, or convert it")
    if chain.top.read_only:
        raise ConfigError(f"{chain.top.path}: is open for reading only")
    return chain.top


async def snapshot(disk: LiveDisk, name: str) -> None:
    """Take an internal snapshot. The guest waits meanwhile: seconds for an image of many GiB."""

    def call(chain: ImageChain) -> None:
        layer = _is_qcow2(chain)
        changes.create_snapshot(layer.path, layer.fd, name)

    await _change(disk, call)


async def delete_snapshot(disk: LiveDisk, name: str) -> None:
    """Forget an internal snapshot. The guest waits meanwhile."""

    def call(chain: ImageChain) -> None:
        layer = _is_qcow2(chain)
        changes.delete_snapshot(layer.path, layer.fd, name)

    await _change(disk, call)


async def resize(disk: LiveDisk, size: int) -> None:
    """Make the disk larger, to a multiple of 512 bytes; the guest is told."""

    def call(chain: ImageChain) -> None:
        layer = chain.top
        if layer.read_only:
            raise ConfigError(f"{layer.path}: is open for reading only")
        if size < chain.image_size or size % 512:
            raise ConfigError(
                f"{layer.path}: has {chain.image_size} bytes; a running disk only grows, by whole sectors"
            )
        if layer.format == "raw":
            os.ftruncate(layer.fd, size)
        else:
            changes.set_size(layer.path, layer.fd, size)

    await _change(disk, call)


async def cover(disk: LiveDisk, path: str) -> None:
    """Make a new image at `path`, over the present one, into which the guest writes from now on. The present one stays
    as it is at this moment: an external snapshot. Whoever starts the machine again has to name the new one."""

    def call(chain: ImageChain) -> None:
        below = chain.top
        if below.header is not None and below.header.has_data_file:
            raise ConfigError(f"{below.path}: has an external data file, which an image over it could not name")
        if len(chain.layers) >= DEPTH_MAX:
            raise ConfigError(f"{below.path}: a chain of {DEPTH_MAX} images is the longest; commit or stream some")
        create_qcow2(path, chain.image_size, backing=name_from(path, below.path), backing_format=below.format)
        try:
            with_lock = open_locked(path, read_only=False)
        except BaseException:
            os.unlink(path)
            raise
        ImageLock.of(below.fd, below.path).share()  # whoever copies it may read it
        below.read_only = True
        layer = Layer(path, "qcow2", with_lock, None, (), with_lock, 0, False)
        layer.header = reread(path, with_lock)
        chain.layers.insert(0, layer)

    backend = image_of(disk)
    if os.path.lexists(path):
        raise ConfigError(f"{path}: is there already")
    if backend.read_only:
        raise ConfigError(f"{backend.chain.top.path}: is open for reading only")
    await _change(disk, call)


def name_from(path: str, below: str) -> str:
    """What the image at `path` calls its backing file."""
    if os.path.realpath(os.path.dirname(path) or ".") == os.path.realpath(os.path.dirname(below) or "."):
        return os.path.basename(below)
    return os.path.realpath(below)


async def step(call: Callable[[int, int], None], at: int, length: int) -> None:
    """A call about these bytes of a disk, in a thread. One who is cancelled waits for its end, for the image is in use
    until then."""
    future = asyncio.ensure_future(asyncio.to_thread(call, at, length))
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.gather(future, return_exceptions=True)
        raise


async def _steps(image: _ring.Image, call: Callable[[int, int], None], progress: Progress, pace: JobPace) -> None:
    """Have `call` go over the whole disk in a thread, one step after the other."""
    size, at = image.length, 0
    while at < size:
        length = min(pace.step, size - at)
        await step(call, at, length)
        at += length
        progress(at, size)
        await pace.passed(length)


async def stream(disk: LiveDisk, progress: Progress = silent, pace: JobPace | None = None) -> None:
    """Copy what the image reads from its backing file into it, while the guest works; then it has none any more."""
    backend = image_of(disk)
    top = _is_qcow2(backend.chain)
    if len(backend.chain.layers) == 1:
        raise ConfigError(f"{top.path}: has no backing file")
    with one_kind(top.path):
        await _steps(backend.image(), backend.image().populate, progress, pace or JobPace())

    def call(chain: ImageChain) -> None:
        changes.set_backing(top.path, top.fd, None, None)
        below, chain.layers = chain.layers[1:], chain.layers[:1]
        for layer in below:
            for fd in (layer.fd, *layer.others):
                os.close(fd)

    await _change(disk, call)


async def commit(
    disk: LiveDisk, progress: Progress = silent, *, drop: bool = False, pace: JobPace | None = None
) -> None:
    """Move what the image holds into its backing file, while the guest works. The image stays, and has then only what
    the guest has written since. With `drop` the disk goes on with the backing file alone: the image, of which nobody
    makes use then, holds nothing."""
    backend = image_of(disk)
    top = _is_qcow2(backend.chain)
    if len(backend.chain.layers) == 1:
        raise ConfigError(f"{top.path}: has no backing file to commit to")

    def open_below(chain: ImageChain, *, writable: bool) -> None:
        """The backing file for writing, or for reading again."""
        below = chain.layers[1]
        if below.header is not None and below.header.incompatible & DIRTY:
            raise ConfigError(f"{below.path}: was not closed; vmm disk check --repair makes it right")
        for fd in (below.fd, *below.others):
            os.close(fd)
        for read_only in (not writable, True):
            try:
                with_lock = open_locked(below.path, read_only=read_only)
                break
            except ConfigError:
                if read_only:
                    raise
                failed.append(below.path)
        if not read_only and below.format == "raw" and os.fstat(with_lock).st_size < chain.image_size:
            os.ftruncate(with_lock, chain.image_size)
        elif not read_only and below.header is not None and below.header.size < chain.image_size:
            changes.set_size(below.path, with_lock, chain.image_size)
        below.fd = below.data_fd = with_lock
        below.others, below.read_only = (), read_only

    def drop_top(chain: ImageChain) -> None:
        """The backing file is the disk."""
        gone = chain.layers.pop(0)
        for fd in (gone.fd, *gone.others):
            os.close(fd)

    async def end() -> None:
        """The rest, while the guest waits; the backing file is the disk then."""
        await _steps(backend.image(), backend.image().commit, silent, JobPace())
        await backend.change(drop_top)

    failed: list[str] = []
    try:
        await _change(disk, partial(open_below, writable=True))
        if failed:
            raise ConfigError(f"{failed[0]}: is used by others, or cannot be written")
        with one_kind(top.path):
            await _steps(backend.image(), backend.image().commit, progress, pace or JobPace())
            if drop:
                # What was written meanwhile is little; of that, once more.
                await _steps(backend.image(), backend.image().commit, silent, JobPace())
                await disk.exchange(end)
    finally:
        if top in backend.chain.layers and not backend.chain.layers[1].read_only:
            await _change(disk, partial(open_below, writable=False))
