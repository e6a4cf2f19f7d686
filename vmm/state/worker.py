"""Calls in worker threads, which are waited for even when the caller is cancelled. Loop thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


async def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """Run a call that reads guest memory or writes files in a worker thread. A caller that is cancelled waits for the
    call all the same, since it gives back afterwards what the call uses."""
    future = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.gather(future, return_exceptions=True)
        raise
