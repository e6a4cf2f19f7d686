"""Linux tap interfaces, with checksum and segmentation offload through the virtio_net_hdr. Loop thread only.

With the optional `net` extra (pyroute2) a missing interface is also brought up and given an address; without it, the
interface is created by TUNSETIFF and left to the host's administrator.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct

from virtio.backends.net import FdNet, Framing
from virtio.devices.net import NetFeature
from virtio.errors import ConfigError, HostError

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 1, 2, 4
_OFFLOAD = {NetFeature.GUEST_CSUM: TUN_F_CSUM, NetFeature.GUEST_TSO4: TUN_F_TSO4, NetFeature.GUEST_TSO6: TUN_F_TSO6}


class TapNet(FdNet):
    """A tap interface with `queues` pairs of queues."""

    offloads = int(
        NetFeature.CSUM
        | NetFeature.GUEST_CSUM
        | NetFeature.GUEST_TSO4
        | NetFeature.GUEST_TSO6
        | NetFeature.HOST_TSO4
        | NetFeature.HOST_TSO6
    )

    def __init__(self, name: str, *, queues: int = 1) -> None:
        """Attach to (or create) `name`; ConfigError if that is not possible."""
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
        fds: list[int] = []
        actual = name.encode()  # with %d in it, the kernel chooses the number for the first queue
        try:
            for _ in range(queues):
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                fds.append(fd)
                request = fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", actual, flags))
                actual = request[:16].rstrip(b"\0")
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 12))
                fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise ConfigError(
                f"tap {name}: {error.strerror}; it needs CAP_NET_ADMIN, or an interface made for this user"
            ) from error
        super().__init__(fds, Framing.TAP)
        self.name = actual.decode()

    def set_offloads(self, features: int) -> None:
        flags = 0
        if features & NetFeature.GUEST_CSUM:  # the others mean nothing without it (5.1.3.1)
            for feature, flag in _OFFLOAD.items():
                flags |= flag if features & feature else 0
        for channel in self.channels:
            try:
                fcntl.ioctl(channel.fd, TUNSETOFFLOAD, flags)
            except OSError as error:
                raise HostError(f"tap {self.name}: {error.strerror}") from error

    async def configure(self, *, address: str | None = None, netns: int | None = None) -> None:
        """Bring the interface up, with `address` ("10.0.0.1/24") if given, in the network namespace of descriptor
        `netns` if given. Needs pyroute2 and CAP_NET_ADMIN."""
        await asyncio.to_thread(self._configure, address, netns)

    def _configure(self, address: str | None, netns: int | None) -> None:
        try:
            from pyroute2 import IPRoute  # type: ignore[import-untyped,unused-ignore]
        except ImportError as error:
            raise ConfigError("configuring a tap needs the extra loopvisor[net]") from error
        try:
            with IPRoute() as route:
                (index,) = route.link_lookup(ifname=self.name)
                if netns is not None:
                    route.link("set", index=index, net_ns_fd=netns)
                    return
                if address is not None:
                    host, _, prefix = address.partition("/")
                    route.addr("replace", index=index, address=host, prefixlen=int(prefix or 24))
                route.link("set", index=index, state="up")
        except Exception as error:
            raise HostError(f"tap {self.name}: {error}") from error
