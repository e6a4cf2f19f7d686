"""Errors as the user sees them: one line on stderr and the exit status of whose fault it is."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from vmm.errors import ConfigError, GuestError, StateError, VmmError, os_reason

EXIT_CONFIG, EXIT_GUEST, EXIT_HOST = 2, 3, 4
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EAGAIN)


def _nothing() -> None:
    return None


before_message: Callable[[], None] = _nothing
"""Called before a message is written: whoever draws on the terminal makes room."""


def say(message: str) -> None:
    """A message of ours, on stderr; a terminal in raw mode needs the carriage return."""
    before_message()
    try:
        sys.stderr.write(f"vmm: {message}\n")
        sys.stderr.flush()
    except OSError:
        pass  # nobody reads it


def status_of(error: VmmError) -> int:
    if isinstance(error, ConfigError | StateError):
        return EXIT_CONFIG
    return EXIT_GUEST if isinstance(error, GuestError) else EXIT_HOST


@contextmanager
def reported() -> Iterator[None]:
    """Print a VmmError, and what the host refuses, as one line and exit; end quietly on Ctrl-C and when our reader went
    away."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except VmmError as error:
        say(" ".join(str(error).split()))
        sys.exit(status_of(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _drop_output()
        sys.exit(141)
    except ImportError as error:  # no descriptor is left for it, or the installation is not whole
        say(f"cannot load {error.name}: {error.msg}")
        sys.exit(EXIT_HOST)
    except OSError as error:
        # Files of ours have a name.
        where = error.filename or ("standard output" if error.errno in _OF_WRITING else "host")
        say(f"{where}: {os_reason(error)}")
        _drop_output()
        sys.exit(EXIT_HOST)


def _drop_output() -> None:
    """What is still buffered goes nowhere, without a traceback."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
