"""Whether passt starts here: it makes a user namespace, which a chroot, some containers and hardened kernels forbid."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.netns import Namespace
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


FAR = "10.214.7.3"
"""A host beyond passt's; the gateway 10.214.7.2 is passt's own host as the guest sees it."""


@contextmanager
def networks(folder: Path) -> Iterator[tuple[Namespace, Namespace]]:
    """(the namespace that passt runs in, with 10.214.7.1; one beyond a cable, with FAR). passt is the first in PATH,
    and goes there. Debian 12's resets a connection of the guest's whose other end sends nothing in its first 24 seconds
    (docs/networking.md): what only sends must take less. Needs root."""
    program = shutil.which("passt")
    with netns.namespaces("passt", "far") as (near, far):
        netns.cable(near, far)
        near.ip("addr", "add", "10.214.7.1/24", "dev", "eth0")
        near.ip("route", "add", "default", "via", "10.214.7.2")
        for address in ("10.214.7.2/24", f"{FAR}/24"):
            far.ip("addr", "add", address, "dev", "eth0")
        # passt's echo requests are those of an ordinary user
        near.run("sh", "-c", "echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range")
        wrapper = folder / "bin" / "passt"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {" ".join(near.command(str(program)))} "$@"\n')
        wrapper.chmod(0o755)
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{wrapper.parent}:{before}"
        try:
            yield near, far
        finally:
            os.environ["PATH"] = before
