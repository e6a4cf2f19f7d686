"""What a network device is connected to, the one that lives in memory, and a recorder.

A user's backend is a subclass of NetBackend with `send` and `receive` of Ethernet frames; a warning names the class of
one that breaks its contract. One that has a descriptor offers `channels`: the device then moves frames in C
(virtio/native/net.c). Loop thread only.
"""

from __future__ import annotations

import asyncio
import enum
import os
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from virtio._ring import Fence
from virtio.backends.learned import PolicyState
from virtio.errors import ConfigError, HostError
from virtio.protocols import DeviceClock

FRAME_MAX = 65554
"""Bytes of a frame at most: Ethernet and VLAN header around 64 KiB."""
VNET_HEADER = 12


class Framing(enum.IntEnum):
    """How frames stand on a descriptor."""

    TAP = 0
    """One frame per read, after a 12-byte virtio_net_hdr."""
    DATAGRAM = 1
    """One frame per datagram."""
    STREAM = 2
    """A 4-byte big-endian length, then the frame."""


@dataclass(frozen=True, slots=True)
class Channel:
    """One descriptor that frames go through: one pair of queues."""

    fd: int
    framing: Framing


class NetBackend(Protocol):
    """The other end of a network device's wire."""

    mtu: int | None = None
    """Bytes of payload, told to the guest; None: it decides."""
    offloads: int = 0
    """Feature bits (5.1.3) of checksum and segmentation offload that the channel's virtio_net_hdr carries."""
    keeps_connections: bool = False
    """The guest's TCP connections end here and live as long as this does: a guest that goes on from a saved state has
    to hear that those of before are gone."""
    channels: tuple[Channel, ...] = ()
    """Descriptors for the path in C; empty: `send` and `receive` are used."""

    fence: Fence | None = None
    """What decides in C which frames pass, for a backend with `channels`; its answers for the guest stand there."""

    async def send(self, frame: bytes) -> None:
        """A frame from the guest. One that cannot be delivered is lost; HostError: the link is gone. Any other
        exception loses the frame."""

    async def receive(self) -> bytes:
        """The next frame for the guest, 1 to FRAME_MAX bytes. Any exception, or anything else: the link is gone."""

    def set_offloads(self, features: int) -> None:
        """The driver negotiated these of `offloads`."""
        return None

    def set_mac(self, mac: bytes) -> None:
        """The card has this hardware address from now on."""
        return None

    def use_clock(self, clock: Callable[[], DeviceClock]) -> None:
        """The card's clock, for a backend that has times of its own."""
        return None

    def on_replies(self, call: Callable[[], None]) -> None:
        """Call this when `fence` has frames for the guest, other than while a frame passes it."""
        return None

    def save(self) -> PolicyState | None:
        """What is part of the machine's state."""
        return None

    def restorer(self, state: PolicyState) -> Callable[[], None]:
        """What takes over what `save` gave; nothing has changed yet. StateError: it cannot be such a state."""
        return lambda: None

    async def send_offloaded(self, header: bytes, frame: bytes) -> None:
        """`send` with the frame's virtio_net_hdr; a backend without `offloads` does not need it."""
        await self.send(frame)

    async def receive_offloaded(self) -> tuple[bytes, bytes]:
        """`receive` with the frame's virtio_net_hdr."""
        return bytes(VNET_HEADER), await self.receive()

    async def aclose(self) -> None:
        """Give up descriptors."""
        return None


class MemoryNet(NetBackend):
    """The fake: one end of a wire. `pair` makes both."""

    def __init__(self) -> None:
        self.peer: MemoryNet | None = None
        self.sent: list[bytes] = []
        self._arrived: deque[bytes] = deque(maxlen=1024)
        self._event = asyncio.Event()

    @classmethod
    def pair(cls) -> tuple[MemoryNet, MemoryNet]:
        """Two ends of one wire."""
        one, two = cls(), cls()
        one.peer, two.peer = two, one
        return one, two

    def deliver(self, frame: bytes) -> None:
        """A frame arrives for the guest."""
        self._arrived.append(frame)
        self._event.set()

    async def send(self, frame: bytes) -> None:
        self.sent.append(frame)
        del self.sent[:-1024]
        if self.peer is not None:
            self.peer.deliver(frame)

    async def receive(self) -> bytes:
        while not self._arrived:
            self._event.clear()
            await self._event.wait()
        return self._arrived.popleft()


async def ready(register: Callable[..., None], unregister: Callable[[int], object], fd: int) -> None:
    """Wait until the loop finds `fd` readable or writable, whichever the methods given are for."""
    waiter = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    register(fd, wake)
    try:
        await waiter
    finally:
        unregister(fd)


class FdNet(NetBackend):
    """Frames through non-blocking descriptors that it owns."""

    def __init__(self, fds: list[int], framing: Framing) -> None:
        for fd in fds:
            os.set_blocking(fd, False)
        self.framing = framing
        self.channels = tuple(Channel(fd, framing) for fd in fds)
        self._buffer = bytearray()

    @property
    def fd(self) -> int:
        """The first channel's descriptor. HostError once closed."""
        if not self.channels:
            raise HostError("the link is closed")
        return self.channels[0].fd

    async def send(self, frame: bytes) -> None:
        await self.send_offloaded(bytes(VNET_HEADER), frame)

    async def receive(self) -> bytes:
        return (await self.receive_offloaded())[1]

    async def send_offloaded(self, header: bytes, frame: bytes) -> None:
        data = frame
        if self.framing is Framing.TAP:
            data = header + frame
        elif self.framing is Framing.STREAM:
            data = struct.pack(">I", len(frame)) + frame
        loop = asyncio.get_running_loop()
        while data:
            try:
                sent = os.write(self.fd, data)
            except BlockingIOError:
                await ready(loop.add_writer, loop.remove_writer, self.fd)
                continue
            except OSError as error:
                if self.framing is Framing.STREAM:
                    raise HostError(f"the link is gone: {error.strerror}") from error
                return  # lost, as on a wire
            data = data[sent:] if self.framing is Framing.STREAM else b""

    async def receive_offloaded(self) -> tuple[bytes, bytes]:
        while True:
            if self.framing is Framing.STREAM and len(self._buffer) >= 4:
                (length,) = struct.unpack_from(">I", self._buffer)
                if length > FRAME_MAX:
                    raise HostError(f"the peer announced a frame of {length} bytes")
                if len(self._buffer) >= 4 + length:
                    frame = bytes(self._buffer[4 : 4 + length])
                    del self._buffer[: 4 + length]
                    if frame:
                        return bytes(VNET_HEADER), frame
                    continue
            loop = asyncio.get_running_loop()
            try:
                data = os.read(self.fd, FRAME_MAX + VNET_HEADER)
            except BlockingIOError:
                await ready(loop.add_reader, loop.remove_reader, self.fd)
                continue
            except OSError as error:
                raise HostError(f"the link is gone: {error.strerror}") from error
            if self.framing is Framing.STREAM:
                if not data:
                    raise HostError("the link is gone: the peer closed it")
                self._buffer += data
            elif self.framing is Framing.TAP:
                return data[:VNET_HEADER], data[VNET_HEADER:]
            elif data:
                return bytes(VNET_HEADER), data

    async def aclose(self) -> None:
        channels, self.channels = self.channels, ()
        for channel in channels:
            os.close(channel.fd)


class PcapNet(NetBackend):
    """Another backend, with every frame recorded in pcap format (link type Ethernet, nanoseconds)."""

    BACKLOG = 16 << 20
    """Bytes that wait for the disk at most; frames beyond are not recorded."""

    def __init__(self, inner: NetBackend, path: str | os.PathLike[str]) -> None:
        self.inner = inner
        self.mtu, self.keeps_connections = inner.mtu, inner.keeps_connections
        self.lost = 0
        try:
            self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115 - closed by aclose
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        self._pending = bytearray(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1))
        self._writer: asyncio.Task[None] | None = None
        self._record_now()

    def _record(self, frame: bytes) -> None:
        if len(self._pending) > self.BACKLOG:
            self.lost += 1
            return
        now = time.time_ns()
        self._pending += struct.pack("<IIII", now // 10**9, now % 10**9, len(frame), len(frame)) + frame
        self._record_now()

    def _record_now(self) -> None:
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write(), name="pcap")

    async def _write(self) -> None:
        while self._pending:
            data, self._pending = self._pending, bytearray()
            try:
                await asyncio.to_thread(self._file.write, data)
            except OSError:
                self.lost += 1  # a full disk ends the recording, not the network

    def set_mac(self, mac: bytes) -> None:
        self.inner.set_mac(mac)

    def use_clock(self, clock: Callable[[], DeviceClock]) -> None:
        self.inner.use_clock(clock)

    def save(self) -> PolicyState | None:
        return self.inner.save()

    def restorer(self, state: PolicyState) -> Callable[[], None]:
        return self.inner.restorer(state)

    async def send(self, frame: bytes) -> None:
        self._record(frame)
        await self.inner.send(frame)

    async def receive(self) -> bytes:
        frame = await self.inner.receive()
        self._record(frame)
        return frame

    async def aclose(self) -> None:
        await self.inner.aclose()
        while self._writer is not None and not self._writer.done():
            await self._writer
        self._file.close()
