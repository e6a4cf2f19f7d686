"""Images with a format, and chains of them, as disks. No call blocks the loop. Loop thread only."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from virtio import _ring
from virtio.backends.file import Cache, FileBlock, Io
from virtio.backends.lock import ImageLock
from virtio.backends.unnamed import overlay_file
from virtio.errors import ConfigError, StateError
from virtio.images.chain import Backing, Format, ImageChain, make_active, open_chain

T = TypeVar("T")
SECTOR = 512


class ImageBlock(FileBlock):
    """A disk in an image file, of whatever format, with what is below it. Use `await ImageBlock.open_image(path)`."""

    def __init__(self, chain: ImageChain, *, read_only: bool, cache: Cache, block_size: int = SECTOR) -> None:
        super().__init__(
            chain.top.fd, -(-chain.size // SECTOR) * SECTOR, read_only=read_only, cache=cache, block_size=block_size
        )
        self.chain = chain
        self._image = chain.image
        self.overlay = -1
        """The file of a private copy (`snapshot`), else -1."""
        self.written = bytearray()
        """One bit for each sector that the private copy holds."""
        self._take_over()

    def _take_over(self) -> None:
        """What the chain is now is what this disk is."""
        self._image = self.chain.image
        self.fd = self.chain.top.fd
        self.path = Path(self.chain.top.path)
        self.capacity = -(-self.chain.size // SECTOR) * SECTOR
        self._locks.clear()
        for layer in self.chain.layers:
            self._locks.append(ImageLock.of(layer.fd, layer.path))
            if layer.header is not None and layer.header.has_data_file:
                self._locks.append(ImageLock.of(layer.others[0], layer.path))
            for lock in self._locks[-2:]:
                lock.held = self.chain.active or layer is not self.chain.top

    async def change(self, call: Callable[[ImageChain], None]) -> None:
        """Let `call`, in a thread, change the files of the chain or the chain itself. Nobody may be using this backend:
        BlockDevice.exchange sees to that. Cancelled, it is done all the same when this ends. Raises what `call` does;
        StateError for a private copy."""
        if self.overlay >= 0:
            raise StateError(f"{self.chain.top.path}: what is written to a snapshot disk ends with the machine")
        chain = self.chain

        def work() -> None:
            chain.rebuild(lambda: call(chain))

        changing = asyncio.ensure_future(self._in_thread(work))
        try:
            await asyncio.shield(changing)
        except asyncio.CancelledError:
            await asyncio.gather(changing, return_exceptions=True)
            raise
        finally:
            self._take_over()

    async def adopt(self, chain: ImageChain) -> None:
        """Be the disk in this chain from now on, which is as large, and close the one before. Nobody may be using this
        backend: BlockDevice.exchange sees to that. Raises HostError if what was written to the one before may be lost;
        this disk is in its new place then."""
        before, self.chain = self.chain, chain
        self._take_over()
        closing = asyncio.ensure_future(self._in_thread(before.close))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.gather(closing, return_exceptions=True)
            raise

    @classmethod
    async def open_image(
        cls,
        path: str | os.PathLike[str],
        *,
        format: Format | None = None,
        read_only: bool = False,
        snapshot: bool = False,
        cache: Cache = "writeback",
        io: Io = "auto",
        backing: Backing = "dir",
        data: str | os.PathLike[str] | None = None,
        active: bool = True,
    ) -> ImageBlock:
        """The arguments are those of `open_chain`. `snapshot`: nothing is written to the files; what the guest writes
        ends with this backend. Not `active`: the files are somebody else's until `activate`. Raises ConfigError."""
        cls._check_io(io)
        call = partial(
            open_chain,
            path,
            format=format,
            read_only=read_only or snapshot,
            direct=cache == "none" and not snapshot,
            backing=backing,
            data=data,
            active=active or read_only or snapshot,
        )
        opening = asyncio.ensure_future(asyncio.to_thread(cls._opened, call, read_only, snapshot, cache))
        try:
            backend = await asyncio.shield(opening)
        except asyncio.CancelledError:
            for opened in await asyncio.gather(opening, return_exceptions=True):
                if isinstance(opened, ImageBlock):
                    await opened.aclose()
            raise
        backend.io = io
        return backend

    @classmethod
    def _opened(cls, call: Callable[[], ImageChain], read_only: bool, snapshot: bool, cache: Cache) -> ImageBlock:
        chain = call()
        try:
            if chain.size < SECTOR:
                raise ConfigError(f"{chain.top.path}: smaller than one block")
            block = SECTOR
            if cache == "none" and not snapshot and cls._needs_4k(chain.top.others[-1]):
                block = 4096
            backend = cls(chain, read_only=read_only, cache=cache, block_size=block)
            if snapshot:
                backend._cover()
            return backend
        except BaseException:
            chain.close()
            raise

    def _cover(self) -> None:
        """Put a private copy over the chain."""
        self.overlay = overlay_file(self.capacity)
        self.written = bytearray(-(-self.capacity // (8 * SECTOR)))
        self._image = _ring.Image.overlay(self.overlay, self.written, self.chain.image)

    def image(self) -> _ring.Image:
        return self._image

    async def deactivate(self) -> None:
        """FileBlock.deactivate. Nothing is written to the files any more, not even by `aclose`."""
        await self._in_thread(self._image.flush)
        for layer in self.chain.layers:
            await self._in_thread(layer.image.close)
        for lock in self._locks:
            await self._in_thread(lock.give_up)

    async def activate(self) -> None:
        """FileBlock.activate. Tables are read anew, for others may have written them: a device has to take the image as
        it is then, which `BlockDevice.exchange(backend.activate)` does. StateError for a private copy."""
        if self.overlay >= 0:
            raise StateError(f"{self.chain.top.path}: what was written to a snapshot disk is not in its file")
        await super().activate()
        try:
            await self.change(make_active)
        except BaseException:
            for lock in self._locks:
                lock.give_up()
            raise

    async def is_free(self) -> bool:
        """Nobody has the lock of an image that is not active: it is no file that another machine uses."""

        def probe() -> bool:
            lock = self._locks[0]
            try:
                lock.take()
            except ConfigError:
                return False
            lock.give_up()
            return True

        return await self._in_thread(probe)

    def _read(self, offset: int, length: int) -> bytes:
        buffer = memoryview(mmap.mmap(-1, length))
        self._image.read(offset, buffer)
        return bytes(buffer)

    def _write(self, offset: int, data: bytes) -> None:
        self._image.write(offset, data, self.cache == "writethrough")

    async def flush(self) -> None:
        await self._in_thread(self._image.flush)

    async def discard(self, offset: int, length: int) -> None:
        await self._in_thread(self._image.discard, offset, length)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        await self._in_thread(self._image.zero, offset, length, unmap)

    async def aclose(self) -> None:
        await asyncio.gather(*self._calls, return_exceptions=True)
        if self.fd < 0:
            return
        self.fd = -1
        overlay, self.overlay = self.overlay, -1
        if overlay >= 0:
            os.close(overlay)
        await asyncio.to_thread(self.chain.close)
