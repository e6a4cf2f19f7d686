"""Whether passt starts here: it makes a user namespace, which a chroot, some containers and hardened kernels forbid."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

from virtio.backends.sockets import UserNet
from virtio.errors import ConfigError, HostError


@cache
def why_not() -> str:
    """Why passt cannot be used on this host; "" if it can."""

    async def start() -> None:
        await (await UserNet.start()).aclose()

    try:
        with ThreadPoolExecutor(1) as pool:  # a test's own loop may be running in this thread
            pool.submit(asyncio.run, start()).result()
    except (ConfigError, HostError) as error:
        return str(error)
    return ""


def need() -> None:
    """Skip the test where passt cannot be used."""
    if reason := why_not():
        pytest.skip(reason)
