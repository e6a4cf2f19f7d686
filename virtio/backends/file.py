"""Raw files and block devices as disks.

`engine` gives the device the C path over the same descriptor (virtio/native/blk.c); the coroutines here serve
everyone else. No call blocks the loop. Loop thread only.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import stat
from typing import Literal

from virtio import _ring
from virtio.backends.block import BlockBackend
from virtio.errors import ConfigError, HostError

Cache = Literal["writeback", "writethrough", "none"]
"""writeback: durable when flushed. writethrough: when written. none: writeback past the page cache
(O_DIRECT)."""

_PUNCH_HOLE, _KEEP_SIZE, _ZERO_RANGE = 2, 1, 16
_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class FileBlock(BlockBackend):
    """A raw image. Use `await FileBlock.open(path)`; it is locked against a second writer."""

    def __init__(self, fd: int, capacity: int, *, read_only: bool, cache: Cache, block_size: int = 512) -> None:
        self.fd = fd
        self.capacity = capacity
        self.read_only = read_only
        self.cache = cache
        self.block_size = block_size

    @classmethod
    async def open(
        cls, path: str | os.PathLike[str], *, read_only: bool = False, cache: Cache = "writeback"
    ) -> FileBlock:
        """ConfigError if there is no such image or it is in use."""
        return await asyncio.to_thread(cls._open, os.fspath(path), read_only, cache)

    @classmethod
    def _open(cls, path: str, read_only: bool, cache: Cache) -> FileBlock:
        if cache not in ("writeback", "writethrough", "none"):
            raise ConfigError(f"cache={cache}: not writeback, writethrough or none")
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
        if cache == "none":
            flags |= os.O_DIRECT
        try:
            fd = os.open(path, flags)
        except OSError as error:
            if error.errno == errno.EINVAL and cache == "none":
                raise ConfigError(f"{path}: its file system has no O_DIRECT; use another cache mode") from error
            raise ConfigError(f"{path}: {error.strerror}") from error
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise ConfigError(f"{path}: neither a regular file nor a block device")
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"{path}: in use by another machine") from error
            size = os.lseek(fd, 0, os.SEEK_END)
            block = 4096 if cache == "none" and cls._needs_4k(fd) else 512
            if size < block:
                raise ConfigError(f"{path}: smaller than one block")
            return cls(fd, size // block * block, read_only=read_only, cache=cache, block_size=block)
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def _needs_4k(fd: int) -> bool:
        import mmap

        with mmap.mmap(-1, 4096) as buffer, memoryview(buffer) as view, view[:512] as sector:
            try:
                os.preadv(fd, [sector], 512)
            except OSError as error:
                return error.errno == errno.EINVAL
        return False

    def engine(self, serial: bytes) -> _ring.BlockEngine:
        """The C path over this descriptor; it is to be closed before the backend."""
        return _ring.BlockEngine(self.fd, self.capacity // 512, self.read_only, self.cache == "none", 2, serial[:20])

    async def read(self, offset: int, length: int) -> bytes:
        return await asyncio.to_thread(self._read, offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        buffer = self._aligned(length)
        if os.preadv(self.fd, [buffer], offset) != length:
            raise HostError("the image became shorter")
        return bytes(buffer)

    async def write(self, offset: int, data: bytes) -> None:
        await asyncio.to_thread(self._write, offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        buffer = self._aligned(len(data))
        buffer[:] = data
        flags = os.RWF_DSYNC if self.cache == "writethrough" else 0
        if os.pwritev(self.fd, [buffer], offset, flags) != len(data):
            raise HostError("the image took only a part")

    @staticmethod
    def _aligned(length: int) -> memoryview:
        import mmap

        return memoryview(mmap.mmap(-1, length))  # page-aligned, as O_DIRECT wants it

    async def flush(self) -> None:
        await asyncio.to_thread(os.fdatasync, self.fd)

    async def discard(self, offset: int, length: int) -> None:
        try:
            await asyncio.to_thread(_fallocate, self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError:
            return  # a hint not taken

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        modes = ([_PUNCH_HOLE | _KEEP_SIZE] if unmap else []) + [_ZERO_RANGE | _KEEP_SIZE]
        for mode in modes:
            try:
                await asyncio.to_thread(_fallocate, self.fd, mode, offset, length)
                return
            except OSError:
                continue
        await super().write_zeroes(offset, length, unmap)

    async def aclose(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            await asyncio.to_thread(os.close, fd)
