"""How far a long operation on an image has come: the callback that such operations take."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all)"""


def silent(_done: int, _total: int) -> None:
    """Tell nobody."""
