"""Calls of what an embedder wrote: backends of devices, sources of chance.

What such a class may raise is declared with its Protocol. Everything else that it does wrong (another exception, a
wrong type or length) comes out of here as a HostError that names the method, and `warn` names the class: the guest gets
an I/O error, and the embedder reads whose mistake it is. Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from virtio.errors import HostError

log = logging.getLogger(__name__)

WARNINGS_MAX = 8
"""Of one backend; later ones are debug messages, for a guest can ask for any number."""

T = TypeVar("T")


class Mistake(HostError):
    """The implementation broke its Protocol."""


class Backend:
    """`implementation` is the embedder's object, `role` what it serves as: "block backend"."""

    def __init__(self, implementation: object, role: str) -> None:
        self.name = f"{role} {_name(implementation)}"
        self._warnings = 0

    async def call(self, method: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """What the method returns. OSError and HostError pass; Mistake for every other exception. A CancelledError
        passes if the calling task is cancelled, not if the method made one of its own."""
        try:
            return await method(*arguments)
        except (OSError, HostError):
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self.mistake(method, error) from error
        except Exception as error:
            raise self.mistake(method, error) from error

    def mistake(self, method: Callable[..., object], what: BaseException | str) -> Mistake:
        """The error that says what is wrong with this call."""
        text = what if isinstance(what, str) else f"{type(what).__name__}: {what}"
        return Mistake(f"{getattr(method, '__name__', method)}: {text}")

    def sized(self, method: Callable[..., object], data: Any, least: int, most: int) -> bytes | bytearray | memoryview:
        """`data` if it is bytes of a permitted number; Mistake."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise self.mistake(method, f"returned {type(data).__name__}, not bytes")
        length = data.nbytes if isinstance(data, memoryview) else len(data)
        if not least <= length <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise self.mistake(method, f"returned {length} bytes, not {wanted}")
        return data

    def warn(self, error: BaseException) -> None:
        """Log it, with the class."""
        self._warnings += 1
        level = logging.WARNING if self._warnings <= WARNINGS_MAX else logging.DEBUG
        log.log(level, "%s: %s", self.name, str(error) or type(error).__name__)


def _name(implementation: object) -> str:
    kind = type(implementation)
    named = implementation if isinstance(implementation, type) or hasattr(implementation, "__qualname__") else kind
    return str(getattr(named, "__qualname__", kind.__qualname__))
