"""Which addresses are this host's, as its kernel says."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import sys
from pathlib import Path

import pytest

from tests.support import netns
from virtio.backends.ownaddresses import is_own


def test_addresses_of_interfaces_are_own_and_others_are_not() -> None:
    own = [line.split()[0] for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    for address in [*(ipaddress.IPv6Address(bytes.fromhex(text)) for text in own), ipaddress.ip_address("127.0.0.1")]:
        assert is_own(address), address
    for text in ("203.0.113.77", "2001:db8:77::1", "224.0.0.1", "ff02::1"):
        assert not is_own(ipaddress.ip_address(text)), text


def test_an_address_of_which_the_kernel_says_nothing_is_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "no netlink here")

    monkeypatch.setattr(socket, "socket", refuse)
    assert is_own(ipaddress.ip_address("203.0.113.77"))


SCRIPT = """
import asyncio, ipaddress
from virtio.backends.ownaddresses import Watch, is_own
async def main():
    changed = asyncio.Event()
    watch = Watch(changed.set)
    address = ipaddress.ip_address("203.0.113.77")
    print(is_own(address), flush=True)
    await asyncio.wait_for(changed.wait(), 60)
    print(is_own(address), flush=True)
    watch.close()
    watch.close()
asyncio.run(main())
"""


@pytest.mark.root
async def test_an_address_that_comes_is_told() -> None:
    """In a network namespace, so that nothing of the host changes."""
    with netns.namespaces("own") as (space,):
        command = space.command(sys.executable, "-c", SCRIPT)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"False\n"
        space.ip("addr", "add", "203.0.113.77/24", "dev", "lo")
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"True\n"
        assert await asyncio.wait_for(process.wait(), 60) == 0
