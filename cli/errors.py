"""Errors as the user sees them: one line on stderr and the exit status of whose fault it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmm.errors import ConfigError, GuestError, StateError, VmmError

EXIT_CONFIG, EXIT_GUEST, EXIT_HOST = 2, 3, 4


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
    """Print a VmmError as one line and exit; end quietly on Ctrl-C and when our reader went away."""
    try:
        yield
    except VmmError as error:
        say(" ".join(str(error).split()))
        sys.exit(status_of(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere, without a traceback
        sys.exit(141)
