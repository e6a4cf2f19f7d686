"""A running disk goes over into another image: copied while the guest works, followed, and switched.

What the guest writes meanwhile is marked when the write is over (`BlockDevice.track`). A round takes the marks and
copies what they name; a write that was not over by then is marked afterwards. When little is left, or it does not
become less, the guest's requests wait, the rest is copied and made durable, and the new image is the disk. Until then
the old one is whole: a crash costs nothing but the new file. Loop thread; worker threads copy. Raises ConfigError,
HostError, StateError.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from virtio.backends.image import ImageBlock
from virtio.backends.live import LiveDisk, image_of, name_from, one_kind, step
from virtio.backends.pace import STEP, JobPace
from virtio.errors import ConfigError, HostError, StateError
from virtio.images.chain import Format, ImageChain, open_chain
from virtio.images.create import create_qcow2, create_raw
from virtio.images.progress import Progress, silent

PIECE = 1 << 20
SHIFT = 16
TRACKED = 1 << SHIFT
"""Bytes for which there is one mark."""
SMALL_UNITS = 128
"""So many of them are copied at once, while the guest waits: 8 MiB."""
FOLLOW_SECONDS = 0.1
"""Between two looks at what was written, once the target has everything."""
T = TypeVar("T")


class TrackedDisk(LiveDisk, Protocol):
    """One whose writes can be followed."""

    def track(self, bits: bytearray | None, shift: int = 0) -> None:
        """virtio.devices.blk.BlockDevice.track"""


class Changeover:
    """When a mirror goes over to its target, and how far it is. Loop thread."""

    def __init__(self, *, now: bool = True) -> None:
        """`now`: as soon as the target has everything."""
        self.wanted = asyncio.Event()
        if now:
            self.wanted.set()
        self.ready = asyncio.Event()
        """The target has everything but what the guest writes just now."""
        self.apart = False
        """When `wanted`: the target is a copy of this moment, and the disk stays where it is."""


@dataclass(frozen=True)
class CopyTarget:
    """The image that a disk is copied into."""

    path: str
    format: Format = "qcow2"
    shallow: bool = False
    """It has the backing file of the present image, and gets what that image itself holds."""
    there: bool = False
    """It was made before, as large as the disk, and is not removed. Of a shallow one the backing file reads as that of
    the present image."""


async def mirror(
    disk: TrackedDisk,
    into: CopyTarget,
    progress: Progress = silent,
    switch: Changeover | None = None,
    pace: JobPace | None = None,
) -> None:
    """Copy the disk into another image while the guest works, follow what it writes, and go over to that image.
    Until then the present one is whole and the guest's; a new one is removed if this fails or is cancelled."""
    path = into.path
    check(disk, into)
    backend = image_of(disk)
    shallow = into.shallow and len(backend.chain.layers) > 1
    switch = switch or Changeover()
    target = await _in_thread(_target, into, backend, shallow, remove=not into.there)
    copied = _Copy(disk, backend, target, pace or JobPace(), shallow=shallow, fresh=not into.there)
    try:
        with one_kind(path):
            await copied.run(progress, switch)
    except BaseException:
        if not copied.switched:
            await asyncio.shield(asyncio.to_thread(_give_up, target, remove=not into.there))
        raise


def check(disk: LiveDisk, into: CopyTarget) -> None:
    """What can be told of a mirror before it begins. Raises ConfigError, StateError."""
    backend = image_of(disk)
    where = backend.chain.top.path
    if backend.overlay >= 0:
        raise StateError(f"{where}: what is written to a snapshot disk ends with the machine")
    if backend.read_only:
        raise ConfigError(f"{where}: is open for reading only")
    if os.path.lexists(into.path) != into.there:
        raise ConfigError(f"{into.path}: is {'not there' if into.there else 'there already'}")
    if into.shallow and len(backend.chain.layers) > 1 and into.format == "raw":
        raise ConfigError(f"{into.path}: a raw image has no backing file; copy the whole chain, or into qcow2")


def _target(into: CopyTarget, backend: ImageBlock, shallow: bool) -> ImageChain:
    path, size = into.path, backend.capacity
    if not into.there:
        if into.format == "raw":
            create_raw(path, size)
        else:
            below = backend.chain.layers[1] if shallow else None
            create_qcow2(
                path,
                size,
                backing=name_from(path, below.path) if below is not None else None,
                backing_format=below.format if below is not None else None,
            )
    try:
        # Whoever names the target of a shallow copy chose what is below it.
        chain = open_chain(
            path, format=into.format, direct=backend.cache == "none", backing="any" if shallow else "none"
        )
    except BaseException:
        if not into.there:
            os.unlink(path)
        raise
    wrong = ""
    if chain.size != size:
        wrong = f"has {chain.size} bytes, and the disk {size}"
    elif shallow and len(chain.layers) < 2:
        wrong = "has no backing file"
    if wrong:
        _give_up(chain, remove=not into.there)
        raise ConfigError(f"{path}: {wrong}")
    return chain


def _give_up(target: ImageChain, *, remove: bool) -> None:
    path = target.top.path
    with contextlib.suppress(HostError):
        target.close()
    if remove:
        with contextlib.suppress(OSError):
            os.unlink(path)


async def _in_thread(call: Callable[..., T], *arguments: object, remove: bool) -> T:
    """A call in a thread, which is waited for also if we are cancelled; what it made is then closed, and removed if
    `remove`."""
    future = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        for made in await asyncio.gather(future, return_exceptions=True):
            if isinstance(made, ImageChain):
                await asyncio.to_thread(_give_up, made, remove=remove)
        raise


class _Copy:
    """A disk on its way into another image."""

    def __init__(
        self, disk: TrackedDisk, backend: ImageBlock, target: ImageChain, pace: JobPace, *, shallow: bool, fresh: bool
    ) -> None:
        """`shallow`: what the present image itself holds; `fresh`: the target holds nothing yet."""
        self._disk, self._backend, self._target, self._pace = disk, backend, target, pace
        self._shallow, self._fresh = shallow, fresh
        self._moved = 0
        self._size = backend.capacity
        self._units = -(-self._size // TRACKED)
        self._bits = bytearray(-(-self._units // 8))
        self.switched = False

    async def run(self, progress: Progress, switch: Changeover) -> None:
        self._disk.track(self._bits, SHIFT)
        try:
            await self._whole(progress)
            before = self._units
            while True:
                changed = self._take()
                count = sum(length for _, length in changed) // TRACKED
                # It may write faster than we copy: then the last part is copied while it waits.
                settled = count <= SMALL_UNITS or count >= before * 3 // 4
                before = max(count, 1)
                if settled:
                    switch.ready.set()
                    progress(self._size, self._size)
                    if switch.wanted.is_set():
                        await self._switch(changed, apart=switch.apart)
                        return
                await self._parts(changed)
                if settled:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(switch.wanted.wait(), FOLLOW_SECONDS)
        finally:
            self._disk.track(None)

    def _take(self) -> list[tuple[int, int]]:
        """What was written since the last time."""
        taken = list(_runs(self._bits))
        self._bits[:] = bytes(len(self._bits))
        return taken

    async def _whole(self, progress: Progress) -> None:
        """Everything; but of what goes into a new image without a backing file only what is not zero, for that is."""
        at = 0
        while at < self._size:
            length, moved = min(self._pace.step, self._size - at), self._moved
            await step(self._copy_data if self._fresh and not self._shallow else self._copy_any, at, length)
            at += length
            progress(at, self._size)
            await self._pace.passed(self._moved - moved)

    async def _parts(self, changed: list[tuple[int, int]], *, hurry: bool = False) -> None:
        for start, length in changed:
            at, end = start, min(start + length, self._size)
            while at < end:
                part, moved = min(STEP if hurry else self._pace.step, end - at), self._moved
                await step(self._copy_any, at, part)
                at += part
                if not hurry:
                    await self._pace.passed(self._moved - moved)

    async def _switch(self, changed: list[tuple[int, int]], *, apart: bool) -> None:
        """The rest, while the guest waits; then the target is the disk, or if `apart` a copy of it."""

        async def change() -> None:
            await self._parts(changed, hurry=True)
            await self._parts(self._take(), hurry=True)
            await asyncio.to_thread(self._target.image.flush)
            self.switched = True
            if not apart:
                await self._backend.adopt(self._target)

        try:
            await self._disk.exchange(change)
        finally:
            if apart and self.switched:
                await asyncio.shield(asyncio.to_thread(self._target.close))

    def _copy_data(self, at: int, length: int) -> None:
        """*worker thread*"""
        source, end = self._backend.image(), at + length
        while at < end:
            for part, kind, _, _ in source.map(at, end - at):
                if kind in ("data", "packed"):
                    self._move(at, part)
                at += part

    def _copy_any(self, at: int, length: int) -> None:
        """*worker thread*"""
        source, end = self._backend.image(), at + length
        while at < end:
            for part, kind, depth, _ in source.map(at, end - at):
                if self._shallow and (depth or kind == "hole"):
                    pass  # below both
                elif kind in ("data", "packed"):
                    self._move(at, part)
                else:
                    self._target.image.zero(at, part, True)
                at += part

    def _move(self, at: int, length: int) -> None:
        for start in range(at, at + length, PIECE):
            # A mapping of its own, as O_DIRECT wants it.
            with mmap.mmap(-1, min(PIECE, at + length - start)) as room, memoryview(room) as piece:
                self._backend.image().read(start, piece)
                self._target.image.write(start, piece)
                self._moved += len(piece)


def _runs(bits: bytearray) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of what is marked."""
    start = -1
    for index, byte in enumerate(bits):
        if not byte and start < 0:
            continue
        for bit in range(8):
            unit = 8 * index + bit
            if byte >> bit & 1:
                start = unit if start < 0 else start
            elif start >= 0:
                yield start * TRACKED, (unit - start) * TRACKED
                start = -1
    if start >= 0:
        yield start * TRACKED, (8 * len(bits) - start) * TRACKED
