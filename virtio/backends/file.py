"""Raw files and block devices as disks.

`engine` gives the device the C path over the same descriptor (virtio/native/blk.c); the coroutines here serve
everyone else. No call blocks the loop. Loop thread only.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from virtio import _ring
from virtio.backends.block import BlockBackend
from virtio.backends.lock import ImageLock
from virtio.backends.unnamed import overlay_file
from virtio.errors import ConfigError, HostError

Cache = Literal["writeback", "writethrough", "none"]
"""writeback: durable when flushed. writethrough: when written. none: writeback past the page cache
(O_DIRECT)."""

Io = Literal["auto", "io_uring", "threads"]
"""How what may block is done: by an io_uring, by native threads, or by the first of them that the host has."""

T = TypeVar("T")
SECTOR = 512
_PUNCH_HOLE, _KEEP_SIZE, _ZERO_RANGE = 2, 1, 16


@cache
def _libc() -> Any:
    import ctypes  # only guests that discard need it, where there is no engine in C

    return ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    if _libc().fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def open_locked(path: str, *, read_only: bool, direct: bool = False, lock: bool = True) -> int:
    """The descriptor of an image file or block device, locked (ImageLock) against a second writer, of ours or QEMU's;
    without `lock` that comes later. May block. ConfigError."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        before = os.stat(path).st_mode
        if not (stat.S_ISREG(before) or stat.S_ISBLK(before)):  # opening a FIFO would wait for its other end
            raise ConfigError(f"{path}: neither a regular file nor a block device")
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EINVAL and direct:
            raise ConfigError(f"{path}: its file system has no O_DIRECT; use another cache mode") from error
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(f"{path}: neither a regular file nor a block device")
        if lock:
            ImageLock(fd, path, read_only=read_only).take()
        return fd
    except BaseException:
        os.close(fd)
        raise


class FileBlock(BlockBackend):
    """A raw image. Use `await FileBlock.open(path)`; it is locked against a second writer."""

    def __init__(self, fd: int, capacity: int, *, read_only: bool, cache: Cache, block_size: int = 512) -> None:
        self.fd = fd
        self.capacity = capacity
        self.read_only = read_only
        self.cache = cache
        self.block_size = block_size
        self.io: Io = "auto"
        self.path = Path()
        """The image, as it was named."""
        self._calls: set[asyncio.Future[Any]] = set()
        self._locks: list[ImageLock] = []
        self._length = capacity
        """Bytes of the file as it was opened: its last sector may be only partly there, and reads as zero beyond."""

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        cache: Cache = "writeback",
        io: Io = "auto",
    ) -> Self:
        """ConfigError if there is no such image, it is in use, or the host lacks what is asked for."""
        cls._check_io(io)
        opening = asyncio.ensure_future(asyncio.to_thread(cls._open, os.fspath(path), read_only, cache))
        try:
            backend = await asyncio.shield(opening)
        except asyncio.CancelledError:
            for opened in await asyncio.gather(opening, return_exceptions=True):
                if isinstance(opened, FileBlock):
                    await opened.aclose()
            raise
        backend.io = io
        backend.path = Path(path)
        return backend

    @staticmethod
    def _check_io(io: Io) -> None:
        if io == "io_uring" and (code := _ring.BlockEngine.io_uring_error()):
            raise ConfigError(f"io=io_uring: this host has none ({os.strerror(code)}); use io=threads or io=auto")

    @classmethod
    def _open(cls, path: str, read_only: bool, cache: Cache) -> Self:
        if cache not in ("writeback", "writethrough", "none"):
            raise ConfigError(f"cache={cache}: not writeback, writethrough or none")
        fd = open_locked(path, read_only=read_only, direct=cache == "none")
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
            block = 4096 if cache == "none" and cls._needs_4k(fd) else 512
            if size < block:
                raise ConfigError(f"{path}: smaller than one block")
            backend = cls(fd, -(-size // block) * block, read_only=read_only, cache=cache, block_size=block)
            backend._length = size
            backend._locks = [ImageLock.of(fd, path)]
            return backend
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def _needs_4k(fd: int) -> bool:
        with mmap.mmap(-1, 4096) as buffer, memoryview(buffer) as view, view[:512] as sector:
            try:
                os.preadv(fd, [sector], 512)
            except OSError as error:
                return error.errno == errno.EINVAL
        return False

    def image(self) -> _ring.Image:
        """Where the bytes stand, for the C path. It uses this backend's descriptors, which are to outlive it."""
        align = self.block_size if self.cache == "none" else 0
        return _ring.Image.raw(self.fd, self._length, align, self.read_only)

    def engine(self, serial: bytes, *, inline: bool = True) -> _ring.BlockEngine:
        """The C path over this image; it is to be closed before the backend. Without `inline` nothing is answered in
        the loop's turn. Raises OSError."""
        return _ring.BlockEngine(
            self.image(), self.capacity // SECTOR, self.read_only, serial=serial[:20], engine=self.io, inline=inline
        )

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """A call that may block. One that is abandoned goes on, and `aclose` waits for it: its descriptor must not
        become another file's meanwhile."""
        future = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return await asyncio.shield(future)

    async def read(self, offset: int, length: int) -> bytes:
        return await self._in_thread(self._read, offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        buffer = self._aligned(length)
        self._check(offset, length, os.preadv(self.fd, [buffer], offset))
        return bytes(buffer)

    def _check(self, offset: int, length: int, found: int) -> None:
        if found != length and offset + found < self._length:
            raise HostError("the image became shorter")

    async def write(self, offset: int, data: bytes) -> None:
        await self._in_thread(self._write, offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        buffer = self._aligned(len(data))
        buffer[:] = data
        flags = os.RWF_DSYNC if self.cache == "writethrough" else 0
        if os.pwritev(self.fd, [buffer], offset, flags) != len(data):
            raise HostError("the image took only a part")

    @staticmethod
    def _aligned(length: int) -> memoryview:
        return memoryview(mmap.mmap(-1, length))  # page-aligned, as O_DIRECT wants it

    async def flush(self) -> None:
        await self._in_thread(os.fdatasync, self.fd)

    async def discard(self, offset: int, length: int) -> None:
        try:
            await self._in_thread(_fallocate, self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError:
            return  # a hint not taken

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        modes = ([_PUNCH_HOLE | _KEEP_SIZE] if unmap else []) + [_ZERO_RANGE | _KEEP_SIZE]
        for mode in modes:
            try:
                await self._in_thread(_fallocate, self.fd, mode, offset, length)
                return
            except OSError:
                continue
        await super().write_zeroes(offset, length, unmap)

    async def deactivate(self) -> None:
        """Make everything durable and let others use the files: another process that takes the machine over, say. The
        device is to be quiesced before; nothing may be read or written until `activate`. Raises HostError, OSError."""
        await self.flush()
        for lock in self._locks:
            await self._in_thread(lock.give_up)

    async def activate(self) -> None:
        """Take the files again. ConfigError if somebody uses them; they are left alone then."""
        try:
            for lock in self._locks:
                await self._in_thread(lock.take)
        except BaseException:
            for lock in self._locks:
                lock.give_up()
            raise

    async def aclose(self) -> None:
        await asyncio.gather(*self._calls, return_exceptions=True)
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            for lock in self._locks:
                lock.give_up()  # at once, although the kernel may have requests to clean up
            await asyncio.to_thread(os.close, fd)


class SnapshotBlock(FileBlock):
    """A raw image that is only read: what is written stands in an unnamed temporary file and ends with the machine."""

    def __init__(self, fd: int, capacity: int, *, read_only: bool, cache: Cache, block_size: int = 512) -> None:
        super().__init__(fd, capacity, read_only=False, cache="writeback", block_size=block_size)
        self.dirty = bytearray(-(-capacity // (8 * SECTOR)))
        """One bit per sector that stands in the overlay."""
        self.overlay = overlay_file(capacity)

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        cache: Cache = "writeback",
        io: Io = "auto",
    ) -> Self:
        """As FileBlock; the image needs to be readable only."""
        return await super().open(path, read_only=True, cache="writeback", io=io)

    def image(self) -> _ring.Image:
        return _ring.Image.overlay(self.overlay, self.dirty, super().image())

    def _runs(self, offset: int, length: int) -> Iterator[tuple[bool, int, int]]:
        sector, end = offset // SECTOR, (offset + length) // SECTOR
        while sector < end:
            first, start = self._is_dirty(sector), sector
            while sector < end and self._is_dirty(sector) == first:
                sector += 1
            yield first, start * SECTOR, (sector - start) * SECTOR

    def _is_dirty(self, sector: int) -> bool:
        return bool(self.dirty[sector // 8] >> sector % 8 & 1)

    def _read(self, offset: int, length: int) -> bytes:
        data = b"".join(
            os.pread(self.overlay if dirty else self.fd, part, at) for dirty, at, part in self._runs(offset, length)
        )
        self._check(offset, length, len(data))
        return data.ljust(length, b"\0")

    def _write(self, offset: int, data: bytes) -> None:
        if os.pwrite(self.overlay, data, offset) != len(data):
            raise HostError("the temporary file took only a part")
        for sector in range(offset // SECTOR, (offset + len(data)) // SECTOR):
            self.dirty[sector // 8] |= 1 << sector % 8

    async def flush(self) -> None:
        """There is nothing to make durable."""

    async def discard(self, offset: int, length: int) -> None:
        """A hint not taken."""

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        await BlockBackend.write_zeroes(self, offset, length, unmap)

    async def aclose(self) -> None:
        await asyncio.gather(*self._calls, return_exceptions=True)
        if self.fd >= 0:
            os.close(self.overlay)
        await super().aclose()
