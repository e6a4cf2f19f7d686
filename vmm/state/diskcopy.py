"""Copies of disk files. Where the file system can (FICLONE), the copy shares blocks with its source; elsewhere data is
copied, and holes stay holes. *any thread*"""

from __future__ import annotations

import errno
import fcntl
import os

FICLONE = 0x40049409
"""linux/fs.h: _IOW(0x94, 9, int)"""
PIECE = 1 << 30
_NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.ETXTBSY}


def copy_sparse(source: int, target: int, size: int) -> None:
    """Make the empty file `target` equal to the first `size` bytes of `source`, holes included. Raises OSError."""
    try:
        fcntl.ioctl(target, FICLONE, source)
        os.ftruncate(target, size)
        return
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole from here on
            if error.errno != errno.EINVAL:
                raise
            start, end = at, size  # the source is a device, which knows no holes
        else:
            end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        _copy(source, target, start, end)
        at = end


def _copy(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            done = os.copy_file_range(source, target, min(end - start, PIECE), start, start)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            done = 0
        if not done:
            data = os.pread(source, min(end - start, 1 << 20), start)
            if not data:
                return  # the source became shorter; what is missing reads as zeroes
            done = os.pwrite(target, data, start)
        start += done
