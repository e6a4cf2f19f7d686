"""Files without a name, which end with their last descriptor."""

from __future__ import annotations

import errno
import os

from virtio.errors import ConfigError, os_reason

_WITHOUT = {errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL}
"""What open(2) says of O_TMPFILE where the file system, or the kernel, does not have it."""


def overlay_file(capacity: int) -> int:
    """The descriptor of a new file of `capacity` bytes, all holes, for what is written to a snapshot disk. Raises
    ConfigError. Any thread."""
    folder = os.environ.get("TMPDIR", "/var/tmp")
    try:
        descriptor = _unnamed_file(folder)
        try:
            os.truncate(descriptor, capacity)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise ConfigError(f"snapshot in {folder}: {os_reason(error)}; set TMPDIR to another folder") from error
    return descriptor


def _unnamed_file(folder: str) -> int:
    """The descriptor of a new, empty file in `folder`, to be read and written. Raises OSError."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
    import tempfile  # loads a random number generator, which takes a good part of a warm start (tests.bench state)

    descriptor, name = tempfile.mkstemp(prefix="loopvisor-", dir=folder)
    os.unlink(name)
    return descriptor
