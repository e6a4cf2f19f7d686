"""Files without a name, which end with their last descriptor."""

from __future__ import annotations

import errno
import os

_WITHOUT = {errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL}
"""What open(2) says of O_TMPFILE where the file system, or the kernel, does not have it."""


def unnamed_file(folder: str) -> int:
    """The descriptor of a new, empty file in `folder`, to be read and written. Raises OSError. Any thread."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
    import tempfile  # loads a random number generator, which takes a good part of a warm start (tests.bench state)

    descriptor, name = tempfile.mkstemp(prefix="loopvisor-", dir=folder)
    os.unlink(name)
    return descriptor
