"""Calls in worker threads that are waited for whatever happens. Loop thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


async def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """A call that reads guest memory or writes files. Cancelled, it is waited for: what it uses is given back
    afterwards."""
    future = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.gather(future, return_exceptions=True)
        raise
