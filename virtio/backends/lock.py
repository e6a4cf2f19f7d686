"""Exclusive use of an image file, against other machines of ours and against QEMU.

Two kinds of lock on one descriptor. flock(2) is ours. QEMU's are open file description locks (fcntl(2), F_OFD_SETLK)
on single bytes of the image: a shared lock on byte 100 + n says that its holder makes use of permission n, one on byte
200 + n that it does not share that permission with others. The permissions are: 0 a consistent view, 1 writing, 2
writing what is there already, 3 changing the size. Whoever opens an image takes its own locks first and then looks
whether others' contradict, so that of two that come at once at least one is refused. QEMU's programs do so, and so do
we: tests/unit/virtio/test_image_lock.py holds both sides against each other.

A reader lets other readers in, a writer nobody. All locks belong to the open file: they end with its last descriptor. A
file system without such locks (some network ones) is used without them. Any thread; may block.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from virtio.errors import ConfigError

USED, UNSHARED = 100, 200
VIEW, WRITE, RESIZE = 0, 1, 3
F_OFD_GETLK, F_OFD_SETLK = 36, 37
"""Linux' numbers; Python names F_OFD_SETLK only where its C library did."""
_FLOCK = struct.Struct("hh4xqqi4x")
"""struct flock on x86-64: type, whence, start, length, pid."""
_WITHOUT = (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class ImageLock:
    """The lock of one open image, which stays its owner's. `take` it before the first use; it can be given up and taken
    again, by which an image moves between processes."""

    def __init__(self, fd: int, path: str, *, read_only: bool) -> None:
        self._fd = fd
        self._path = path
        self._read_only = read_only
        self.held = False

    @classmethod
    def of(cls, fd: int, path: str) -> ImageLock:
        """The lock that `open_locked` took with this descriptor."""
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        lock = cls(fd, path, read_only=mode == os.O_RDONLY)
        lock.held = True
        return lock

    def take(self) -> None:
        """ConfigError if somebody uses the image in a way that excludes ours; nothing is held then."""
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if self._read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{self._path}: in use by another machine") from error
        self.held = True
        try:
            self._take_bytes()
        except BaseException:
            self.give_up()
            raise

    def share(self) -> None:
        """Only read from now on, and let others read. ConfigError if that cannot be said."""
        self._read_only = True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be shared: {error.strerror}") from error
        for permission in (WRITE, RESIZE):
            if not self._set(fcntl.F_UNLCK, USED + permission, 1):
                return

    def give_up(self) -> None:
        """Others may use the image from now on. Idempotent."""
        if self.held:
            self.held = False
            self._set(fcntl.F_UNLCK, 0, 0)
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _take_bytes(self) -> None:
        use = (VIEW,) if self._read_only else (VIEW, WRITE, RESIZE)
        keep = (WRITE, RESIZE)
        for byte in (*(USED + each for each in use), *(UNSHARED + each for each in keep)):
            if not self._set(fcntl.F_RDLCK, byte, 1):
                return
        for byte in (*(UNSHARED + each for each in use), *(USED + each for each in keep)):
            if self._others_hold(byte):
                what = "writes to it" if USED + WRITE <= byte < UNSHARED else "does not share it"
                raise ConfigError(f"{self._path}: in use by another program, such as QEMU, which {what}")

    def _set(self, kind: int, start: int, length: int) -> bool:
        """False: this file system has no such locks."""
        try:
            fcntl.fcntl(self._fd, F_OFD_SETLK, _FLOCK.pack(kind, 0, start, length, 0))
            return True
        except OSError as error:
            if error.errno in _WITHOUT:
                return False
            raise ConfigError(f"{self._path}: cannot be locked: {error.strerror}") from error

    def _others_hold(self, byte: int) -> bool:
        answer = fcntl.fcntl(self._fd, F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK
