"""Both ends of every device for hostile campaigns: its backend with a host that does things, and a driver that knows
the protocol, so that what is then made wrong was nearly right. tests/support/hostile.py drives them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.virtio import Driver
from virtio.backends.block import BlockBackend, MemoryBlock
from virtio.backends.char import MemoryChar
from virtio.backends.file import FileBlock, SnapshotBlock
from virtio.backends.net import FdNet, Framing, MemoryNet, NetBackend, PcapNet
from virtio.backends.policed import PolicedNet
from virtio.backends.rules import Address, Egress, parse
from virtio.backends.sockets import DatagramNet, StreamNet
from virtio.backends.tap import TapNet
from virtio.backends.vsock import MemoryVsock
from virtio.device import Device
from virtio.devices import blk, net
from virtio.devices.balloon import BalloonDevice
from virtio.devices.blk import BlockDevice
from virtio.devices.console import ConsoleDevice, ControlEvent, Port
from virtio.devices.net import NetDevice
from virtio.devices.rng import EntropyDevice
from virtio.devices.vsock import VsockDevice

DISK = 64 << 10
MAC = b"\x52\x54\0\0\0\1"
Source = random.Random


def blur(data: bytes, source: Source) -> bytes:
    """Mostly as it is; sometimes with a byte changed, cut, or grown."""
    chance = source.random()
    if chance < 0.85 or not data:
        return data
    if chance < 0.93:
        at = source.randrange(len(data))
        return data[:at] + bytes([source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))]) + data[at + 1 :]
    return data[: source.randrange(len(data))] if chance < 0.97 else data + source.randbytes(source.randrange(40))


def cut(driver: Driver, data: bytes, source: Source) -> list[tuple[int, int]]:
    """`data` in guest memory as one or more readable buffers."""
    gpa, length = driver.buffer(data)
    parts: list[tuple[int, int]] = []
    while length:
        part = length if source.random() < 0.6 else source.randrange(1, length + 1)
        parts.append((gpa, part))
        gpa, length = gpa + part, length - part
    return parts


class World:
    """One device with its surroundings."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.source = source
        self.folder = folder

    async def make(self) -> Device:
        """The device; called again for one that takes over from it."""
        raise NotImplementedError

    def request(self, driver: Driver) -> None:
        """The driver makes a request that is right, or nearly so. MemoryError: there is no room now."""
        raise NotImplementedError

    async def host(self, device: Device) -> None:
        """Something happens on the host."""

    async def works(self, driver: Driver) -> None:
        """The device does its work for a driver that behaves."""
        raise NotImplementedError

    async def close(self) -> None:
        return None

    def put(self, driver: Driver, index: int, readable: bytes, writable: list[int]) -> int:
        """Make a buffer available in queue `index`."""
        if index >= len(driver.queues):
            return -1
        source = self.source
        rooms = [driver.buffer(size) for size in writable if size]
        parts = cut(driver, readable, source) if readable else []
        if not parts and not rooms:
            return -1
        return driver.submit(index, parts, rooms, indirect=source.random() < 0.3)


class SlowBlock(MemoryBlock):
    """Takes some turns of the loop for each request, and fails some."""

    def __init__(self, source: Source) -> None:
        super().__init__(DISK)
        self.source = source
        self.failing = True

    async def _pass(self) -> None:
        for _ in range(self.source.randrange(6)):
            await asyncio.sleep(0)
        if self.failing and self.source.random() < 0.05:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def read(self, offset: int, length: int) -> bytes:
        await self._pass()
        return await super().read(offset, length)

    async def write(self, offset: int, data: bytes) -> None:
        await self._pass()
        await super().write(offset, data)

    async def flush(self) -> None:
        await self._pass()


class SlowChar(MemoryChar):
    """Takes some turns of the loop for each piece of output."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    async def write(self, data: bytes) -> None:
        for _ in range(self.source.randrange(6)):
            await asyncio.sleep(0)
        await super().write(data)


class Disk(World):
    """`kind`: file, snapshot, readonly, memory or slow."""

    def __init__(self, kind: str, source: Source, folder: Path) -> None:
        super().__init__(source, folder)
        self.kind = kind
        self.memory = SlowBlock(source) if kind == "slow" else MemoryBlock(DISK)
        self.path = folder / "disk"
        if not self.path.exists():
            self.path.write_bytes(bytes(DISK))

    async def make(self) -> Device:
        backend: BlockBackend
        match self.kind:
            case "file":
                backend = await FileBlock.open(self.path)
            case "snapshot":
                backend = await SnapshotBlock.open(self.path)
            case "readonly":
                backend = await FileBlock.open(self.path, read_only=True)
            case _:
                backend = self.memory
        return BlockDevice(backend, queues=2, serial="hostile")

    def request(self, driver: Driver) -> None:
        source = self.source
        rare = (blk.FLUSH, blk.GET_ID, blk.DISCARD, blk.WRITE_ZEROES, 99)
        kind = source.choice((blk.IN,) * 4 + (blk.OUT,) * 4 + rare)
        sector = source.choice((source.randrange(DISK // 512),) * 6 + (DISK // 512, 2**64 - 1, 2**55))
        payload, space = b"", [1]
        if kind == blk.IN:
            space = [512 * source.randrange(1, 9) for _ in range(source.randrange(1, 4))] + [1]
        elif kind == blk.OUT:
            payload = source.randbytes(512 * source.randrange(1, 9))
        elif kind == blk.GET_ID:
            space = [20, 1]
        elif kind in (blk.DISCARD, blk.WRITE_ZEROES):
            entries = [(source.randrange(130), source.randrange(20), source.choice((0, 0, 1, 2))) for _ in range(3)]
            payload = b"".join(struct.pack("<QII", *entry) for entry in entries)
        if source.random() < 0.1:
            space = [source.randrange(600) for _ in range(source.randrange(4))]
        head = struct.pack("<IIQ", kind, 0, sector)
        self.put(driver, source.randrange(2), blur(head + payload, source), space)

    async def host(self, device: Device) -> None:
        assert isinstance(device, BlockDevice)
        device.resized()

    async def works(self, driver: Driver) -> None:
        if isinstance(self.memory, SlowBlock):
            self.memory.failing = False
        header = struct.pack("<IIQ", blk.IN, 0, 3)
        assert (await driver.request(0, [header], [512, 1]))[-1] == blk.OK


class Entropy(World):
    async def make(self) -> Device:
        return EntropyDevice(random.Random(1).randbytes, bytes_per_second=self.source.choice((None, None, 10_000_000)))

    def request(self, driver: Driver) -> None:
        readable = b"x" if self.source.random() < 0.03 else b""
        self.put(driver, 0, readable, [self.source.randrange(1, 5000) for _ in range(self.source.randrange(1, 4))])

    async def works(self, driver: Driver) -> None:
        assert len(await driver.request(0, [], [10])) == 10


class Balloon(World):
    async def make(self) -> Device:
        return BalloonDevice()

    def request(self, driver: Driver) -> None:
        queue = self.source.randrange(4)
        numbers = [self.source.choice((16, 17, 2000, 0, 0xFFFFFFFF, self.source.randrange(1 << 12))) for _ in range(9)]
        data = struct.pack("<9I", *numbers)[: self.source.randrange(37)] * self.source.choice((1, 1, 1, 500))
        sizes = [self.source.choice((1, 4096, 20000)) for _ in range(self.source.randrange(3))]
        self.put(driver, queue, data, sizes)

    async def host(self, device: Device) -> None:
        assert isinstance(device, BalloonDevice)
        device.set_target(self.source.randrange(1 << 32))
        await device.refresh(0.0)

    async def works(self, driver: Driver) -> None:
        at = driver.allocator.take(4096, 4096)
        driver.memory.view(at, 4096)[:] = b"x" * 4096
        await driver.request(0, [struct.pack("<I", at // 4096)])
        assert bytes(driver.memory.view(at, 4096)) == bytes(4096)


class FakeTap(FdNet):
    """A tap as its descriptors look: one frame per read, behind a virtio_net_hdr. `far` are the kernel's ends."""

    offloads = TapNet.offloads

    def __init__(self, queues: int) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(queues)]
        self.far = [two for _, two in pairs]
        super().__init__([one.detach() for one, _ in pairs], Framing.TAP)


async def names(name: str, kind: int) -> list[Address]:
    """A resolver that knows one address."""
    return [ipaddress.ip_address("10.0.0.3")]


class Network(World):
    """`kind`: memory, stream, datagram, tap (two queues), pcap, or policed: a stream behind a policy."""

    def __init__(self, kind: str, source: Source, folder: Path) -> None:
        super().__init__(source, folder)
        self.kind = kind
        self.peer: MemoryNet | None = None
        self.far: list[socket.socket] = []
        self.mtu = source.choice((None, None, 1500, 9000))
        self.queue_size = self.source.choice((16, 256))
        self.policed: PolicedNet | None = None
        self.streams = kind in ("stream", "policed")

    async def make(self) -> Device:
        backend: NetBackend
        await self.close()
        if self.kind in ("memory", "pcap"):
            backend, self.peer = MemoryNet.pair()
            if self.kind == "pcap":
                backend = PcapNet(backend, self.folder / "pcap")
        elif self.kind == "tap":
            backend = tap = FakeTap(2)
            self.far = tap.far
        else:
            stream = self.streams
            one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
            backend = StreamNet(one) if stream else DatagramNet(one)
            if self.source.random() < 0.5:  # so little that the peer soon holds the guest up
                with socket.socket(fileno=os.dup(backend.fd)) as again:
                    again.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
            self.far = [two]
            if self.kind == "policed":
                backend.keeps_connections = True
                backend = self.policed = PolicedNet(backend, MAC, self.policy(), resolve=names)
        for far in self.far:
            far.setblocking(False)
        backend.mtu = self.mtu
        return NetDevice(backend, MAC, queue_size=self.queue_size)

    def header(self) -> bytes:
        source = self.source
        if source.random() < 0.5:
            return bytes(12)
        fields = source.choice((0, 1, 2, 3, 7, 255)), source.choice((0, 1, 3, 4, 5, 0x80, 0x81, 99))
        numbers = [source.choice((0, 1, 14, 34, 54, 1448, 65535)) for _ in range(4)]
        return struct.pack("<BBHHHHH", *fields, *numbers, source.choice((0, 0, 1, 65535)))

    def policy(self) -> Egress:
        rules = self.source.choice(("*", "10.0.0.0/8:80+example.org", "10.0.0.1+[2001:db8::/32]", "none"))
        return Egress(parse(rules), parse(self.source.choice(("", "10.0.0.2:80"))))

    def packet(self) -> bytes:
        """Something that a policy has to think about, in one direction or the other."""
        source = self.source
        outward = source.random() < 0.7
        addresses = [bytes([10, 0, 0, 15]), bytes([10, 0, 0, source.choice((1, 2, 3))])]
        ports = [source.choice((4000, 4001)), source.choice((53, 67, 68, 80, 443))]
        if not outward:
            addresses.reverse()
            ports.reverse()
        protocol = source.choice((6, 6, 17, 1, 58))
        question = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + b"\7example\3org\0\0\1\0\1"
        body = struct.pack(">HHIIBBHHH", *ports, 1, 2, 0x50, source.choice((2, 16, 17, 18, 4)), 0, 0, 0)
        if protocol == 17:
            body = struct.pack(">HHHH", *ports, 8 + len(question), 0) + question
        if source.random() < 0.7:
            head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0) + b"".join(addresses)
            kind = b"\x08\0"
        else:
            wide = [b"\x20\x01\x0d\xb8" + bytes(8) + address for address in addresses]
            head = struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + b"".join(wide)
            kind = b"\x86\xdd"
        peer = b"\2\0\0\0\0\1"
        return blur((peer + MAC if outward else MAC + peer) + kind + head + body, source)

    def frame(self) -> bytes:
        if self.policed is not None and self.source.random() < 0.8:
            return self.packet()
        return self.source.randbytes(self.source.choice((14, 60, 60, 1514, 1518, 1519, 4000, 65000, 65554, 1, 0)))

    def request(self, driver: Driver) -> None:
        source = self.source
        pairs = max((len(driver.queues) - 1) // 2, 1)
        what = source.random()
        if what < 0.45:
            sizes = source.choice(([1526], [1526], [12, 1514], [200], [70_000], [11], [1]))
            self.put(driver, 2 * source.randrange(pairs), b"x" if source.random() < 0.02 else b"", sizes)
        elif what < 0.9:
            spoiled = [5] if source.random() < 0.02 else []
            data = blur(self.header() + self.frame(), source)
            self.put(driver, 2 * source.randrange(pairs) + 1, data, spoiled)
        else:
            command = source.choice(
                (b"\1\1" + source.randbytes(6), b"\4\0" + struct.pack("<H", source.choice((0, 1, 1, 2, 2, 3, 65535))),
                 b"\0\0\1", b"\1\0" + bytes(8), b"\x63\1", b"")
            )  # fmt: skip
            multi = driver.features & net.NetFeature.MQ
            self.put(driver, len(driver.queues) - 1 if multi else 2, blur(command, source), [source.choice((1, 1, 9))])

    async def host(self, device: Device) -> None:
        assert isinstance(device, NetDevice)
        source = self.source
        if source.random() < 0.15:
            device.set_link(not device.link)
            return
        if self.policed is not None and source.random() < 0.2:
            self.policed.change(self.policy(), names)
        for _ in range(source.randrange(1, 6)):
            data = self.frame()
            if self.peer is not None:
                await self.peer.send(data)
                continue
            if not self.far:
                return
            far = source.choice(self.far)
            if self.kind == "tap":
                data = self.header() + data
            elif self.streams:
                length = len(data) if source.random() < 0.98 else source.getrandbits(32)
                data = struct.pack(">I", length) + data
                if source.random() < 0.03:
                    data = data[: source.randrange(len(data) + 1)]
            with contextlib.suppress(OSError):
                far.send(data)
        for far in self.far if source.random() < 0.4 else ():
            with contextlib.suppress(OSError):
                for _ in range(source.randrange(20)):
                    far.recv(1 << 17)
        if self.kind in ("stream", "policed", "datagram") and source.random() < 0.01:
            self.far.pop().close()

    async def works(self, driver: Driver) -> None:
        """What is sent is taken: over a wire, or because the link is down."""
        task = asyncio.ensure_future(self.drain())
        try:
            driver.submit(1, [driver.buffer(bytes(12) + b"frame".ljust(60))])
            await driver.used(1)
            assert await driver.request(len(driver.queues) - 1, [b"\1\1" + MAC], [1]) == b"\0"
            assert driver.config_read(0, 4) == int.from_bytes(MAC[:4], "little")
        finally:
            task.cancel()

    async def drain(self) -> None:
        """The far side reads what waited, for a peer that does not would hold the frames."""
        loop = asyncio.get_running_loop()
        while self.far:
            with contextlib.suppress(OSError):
                if not await loop.sock_recv(self.far[0], 1 << 17):
                    return

    async def close(self) -> None:
        for far in self.far:
            far.close()
        self.far = []


class Terminal(World):
    """A console; with `ports` a multiport one; its other ends at once there or slow."""

    def __init__(self, ports: int, slow: bool, source: Source, folder: Path) -> None:
        super().__init__(source, folder)
        self.chars = [SlowChar(source) if slow else MemoryChar() for _ in range(max(ports, 1))]
        self.multi = ports > 1

    async def make(self) -> Device:
        if not self.multi:
            return ConsoleDevice(self.chars[0])
        names = ["", "a", "b" * 200]
        return ConsoleDevice([Port(char, name, console=not name) for char, name in zip(self.chars, names, strict=True)])

    def request(self, driver: Driver) -> None:
        source = self.source
        if self.multi and source.random() < 0.5:
            if source.random() < 0.4:
                self.put(driver, 2, b"", [source.choice((64, 64, 300, 8, 3))])
                return
            event = source.choice(
                (ControlEvent.DEVICE_READY, ControlEvent.PORT_READY, ControlEvent.PORT_OPEN, ControlEvent.RESIZE, 77)
            )
            message = struct.pack("<IHH", source.choice((0, 0, 1, 2, 3, 2**32 - 1)), event, source.choice((0, 1, 1, 2)))
            self.put(driver, 3, blur(message, source), [])
            return
        queues = [0, 4, 6] if self.multi else [0]
        queue = source.choice(queues)
        if source.random() < 0.5:
            self.put(driver, queue, b"", [source.randrange(1, 300)])
        else:
            self.put(driver, queue + 1, source.randbytes(source.choice((1, 80, 5000, 200_000))), [])

    async def host(self, device: Device) -> None:
        assert isinstance(device, ConsoleDevice)
        if self.source.random() < 0.3:
            device.resize(self.source.randrange(300), self.source.randrange(100))
        else:
            self.source.choice(self.chars).feed(self.source.randbytes(self.source.randrange(1, 2000)))

    async def works(self, driver: Driver) -> None:
        before = len(self.chars[0].output)
        driver.submit(1, [driver.buffer(b"output")])
        await driver.used(1)
        await driver.wait(lambda: self.chars[0].output[before:].endswith(b"output"))


class Sockets(World):
    """Connections both ways; the host's ends echo, ignore, or close."""

    ECHO, DEAF, RUDE, NOBODY = 1025, 1026, 1027, 1028
    PACKET = struct.Struct("<QQIIIHHIII")

    def __init__(self, source: Source, folder: Path) -> None:
        super().__init__(source, folder)
        self.backend = MemoryVsock()
        self.device: VsockDevice | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.rooms: dict[int, tuple[int, int]] = {}
        self.known: list[tuple[int, int]] = [(7, self.ECHO)]
        """(guest's port, host's port) of connections that were heard of"""

    async def make(self) -> Device:
        self.backend = MemoryVsock()
        self.backend.listen(self.ECHO, self.echo)
        self.backend.listen(self.DEAF, self.deaf)
        self.backend.listen(self.RUDE, self.rude)
        self.device = VsockDevice(self.backend)
        await self.device.start()
        return self.device

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

    async def deaf(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello" * 1000)
        await asyncio.Event().wait()

    async def rude(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.transport.abort()

    def hear(self, driver: Driver) -> None:
        """Read what came into the rx queue, and answer requests."""
        for used in driver.queues[0].used():
            room = self.rooms.pop(used.id, None)
            if room is None or min(used.length, room[1]) < self.PACKET.size:
                continue
            _, _, host, guest, _, _, op, _, _, _ = self.PACKET.unpack_from(driver.bytes_at(room))
            if op == 1:
                self.known.append((guest, host))
                self.packet(driver, guest, host, self.source.choice((2, 2, 2, 3, 5)))
        del self.known[:-20]

    def packet(self, driver: Driver, guest: int, host: int, op: int, data: bytes = b"") -> None:
        source = self.source
        alloc = source.choice((65536, 1 << 20, 1000, 0, 2**32 - 1))
        header = self.PACKET.pack(
            3, 2, guest, host, len(data), 1, op, source.choice((0, 0, 1, 2, 3)), alloc, source.choice((0, 0, 77))
        )
        self.put(driver, 1, blur(header + data, source), [])

    def request(self, driver: Driver) -> None:
        source = self.source
        if len(driver.queues) < 3:
            return
        with contextlib.suppress(KeyError):  # a scribbled ring confuses the driver too
            self.hear(driver)
        what = source.random()
        if what < 0.4:
            size = source.choice((4096, 4096, 44, 45, 1000, 10))
            room = driver.buffer(size)
            self.rooms[driver.submit(0, [], [room])] = room
        elif what < 0.45:
            self.put(driver, 2, b"", [8])
        elif what < 0.65:
            guest, host = source.randrange(6), source.choice((self.ECHO, self.DEAF, self.RUDE, self.NOBODY))
            self.known.append((guest, host))
            self.packet(driver, guest, host, 1)
        else:
            op = source.choice((5, 5, 5, 5, 4, 6, 7, 3, 2, 0, 99))
            data = source.randbytes(source.choice((1, 100, 4000, 60_000))) if op == 5 else b""
            self.packet(driver, *source.choice(self.known), op, data)

    async def host(self, device: Device) -> None:
        task = asyncio.get_running_loop().create_task(self.visit())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def visit(self) -> None:
        """The host connects to the guest, says something, waits a little, goes."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(0.05):
                _, writer = await self.backend.open(self.source.choice((1024, 1, 2**32 - 1)))
            try:
                writer.write(b"from the host" * self.source.choice((1, 1, 10_000)))
                for _ in range(self.source.randrange(10)):
                    await asyncio.sleep(0)
            finally:
                writer.close()

    async def works(self, driver: Driver) -> None:
        await self.close()
        header = self.PACKET.pack(3, 2, 4242, self.ECHO, 0, 1, 1, 0, 1 << 20, 0)
        seen = []
        room = driver.buffer(4096)
        driver.submit(1, [driver.buffer(header)])
        while 2 not in seen:
            driver.submit(0, [], [room])
            await driver.used(0)
            packet = self.PACKET.unpack_from(driver.bytes_at(room))
            seen += [packet[6]] if packet[2:4] == (self.ECHO, 4242) else []

    async def close(self) -> None:
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def _worlds() -> dict[str, Callable[[Source, Path], World]]:
    def of(kind: Any, *arguments: Any) -> Callable[[Source, Path], World]:
        return lambda source, folder: kind(*arguments, source, folder)

    found = {f"blk-{kind}": of(Disk, kind) for kind in ("file", "snapshot", "readonly", "memory", "slow")}
    found |= {f"net-{kind}": of(Network, kind) for kind in ("memory", "stream", "datagram", "tap", "pcap", "policed")}
    found |= {"console": of(Terminal, 1, False), "console-ports": of(Terminal, 3, False)}
    found |= {"console-slow": of(Terminal, 1, True), "console-ports-slow": of(Terminal, 3, True)}
    found |= {"balloon": of(Balloon), "rng": of(Entropy), "vsock": of(Sockets)}
    return found


WORLDS = _worlds()
"""name -> a world of its own"""
