"""Which addresses are this host's own, by the kernel's routing tables (rtnetlink(7)). Any thread, but `watch`."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from virtio.backends.rules import Address

_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
_ROUTE = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, bits of the target, of the source, tos, table, protocol, scope, type, flags."""
_ATTRIBUTE = struct.Struct("=HH")
_ERROR, _NEW_ROUTE, _GET_ROUTE, _REQUEST, _TARGET = 2, 24, 26, 1, 1
_LOCAL, _ANYCAST = 2, 4
"""Types of routes: the target is this host; or it is one address of several hosts, and this is one of them."""
_ADDRESS_GROUPS = 0x10 | 0x100
"""RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR: addresses that come and go."""


def _netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)


def is_own(address: Address) -> bool:
    """Whether the kernel keeps a packet to this address on this host. True also if it does not say."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    target = _ATTRIBUTE.pack(4 + len(address.packed), _TARGET) + address.packed
    route = _ROUTE.pack(family, 8 * len(address.packed), 0, 0, 0, 0, 0, 0, 0)
    message = _HEADER.pack(_HEADER.size + len(route) + len(target), _GET_ROUTE, _REQUEST, 1, 0) + route + target
    try:
        with _netlink() as asked:
            asked.settimeout(1)  # the kernel answers in the call that asks
            asked.send(message)
            answer = asked.recv(4096)
    except OSError:
        return True
    _, kind, _, _, _ = _HEADER.unpack_from(answer)
    if kind == _ERROR:  # no route leads there
        return False
    return kind != _NEW_ROUTE or _ROUTE.unpack_from(answer, _HEADER.size)[7] in (_LOCAL, _ANYCAST)


class Watch:
    """Calls `changed` in the loop when this host's addresses have changed, until it is closed. Nothing where the kernel
    does not tell."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._socket: socket.socket | None = None
        try:
            told = _netlink()
        except OSError:
            return
        try:
            told.setblocking(False)
            told.bind((0, _ADDRESS_GROUPS))
            asyncio.get_running_loop().add_reader(told.fileno(), self._heard)
        except OSError:
            told.close()
            return
        self._socket = told

    def _heard(self) -> None:
        assert self._socket is not None
        with suppress(OSError):  # EAGAIN: that was all. ENOBUFS: more came than there was room for.
            while self._socket.recv(65536):
                pass
        self._changed()

    def close(self) -> None:
        """Idempotent."""
        told, self._socket = self._socket, None
        if told is not None:
            asyncio.get_running_loop().remove_reader(told.fileno())
            told.close()
