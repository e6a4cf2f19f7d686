"""What tests/fuzz/virtio_flood.py floods: every virtio device with its backends, and requests of every kind for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.support.flooder import Child, Kind, Shape
from virtio.backends.block import MemoryBlock
from virtio.backends.char import MemoryChar, SocketChar
from virtio.backends.file import FileBlock, SnapshotBlock
from virtio.backends.net import NetBackend
from virtio.backends.sockets import StreamNet
from virtio.backends.vsock import MemoryVsock
from virtio.device import Device
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.devices.console import ConsoleDevice, ControlEvent, Port
from virtio.devices.net import NetDevice
from virtio.devices.rng import EntropyDevice
from virtio.devices.vsock import VsockDevice
from virtio.devices.vsock_stream import Op
from vmm.console.hub import ConsoleHub
from vmm.devices.virtio.console import HubChar

MAC = b"\x52\x54\0\0\0\1"
DISK = 64 << 20
MIB = 1 << 20


class World:
    """One device with what stands behind it. Made before the child is, so that both have its sockets."""

    kinds: dict[str, Kind]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def make(self) -> Device:
        raise NotImplementedError

    async def close(self) -> None:
        return None


# Disks

Request = tuple[Sequence[bytes], Sequence[int]]


def disk_kind(*requests: Request) -> Kind:
    """(readable parts, lengths of writable ones) each, on both queues."""

    def shapes(child: Child) -> list[Shape]:
        built: list[Shape] = []
        for readable, writable in requests:
            parts = [child.buffer(part) for part in readable], [child.buffer(length) for length in writable]
            built += [(0, *parts), (1, *parts)]
        return built

    return shapes


def head(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


GIB_OF_ZEROES = struct.pack("<QII", 0, DISK // 512, 0) * 32
DISKS: dict[str, Kind] = {
    "read 4 KiB": disk_kind(([head(blk.IN, 8)], [4096, 1])),
    "read 1 MiB": disk_kind(([head(blk.IN, 2048)], [MIB, 1])),
    "write 4 KiB": disk_kind(([head(blk.OUT, 16), bytes(4096)], [1])),
    "write 1 MiB": disk_kind(([head(blk.OUT, 4096), bytes(MIB)], [1])),
    "read 8 MiB": disk_kind(([head(blk.IN)], [8 * MIB, 1])),
    "flush": disk_kind(([head(blk.FLUSH)], [1])),
    "serial number": disk_kind(([head(blk.GET_ID)], [20, 1])),
    "zeroes": disk_kind(([head(blk.WRITE_ZEROES), GIB_OF_ZEROES], [1])),
    "discard": disk_kind(([head(blk.DISCARD), GIB_OF_ZEROES], [1])),
    "unknown and wrong": disk_kind(([head(99)], [1]), ([head(blk.IN, 2**60)], [512, 1]), ([head(blk.OUT)], [1])),
    "everything": disk_kind(
        ([head(blk.IN, 8)], [65536, 1]), ([head(blk.OUT, 16), bytes(65536)], [1]), ([head(blk.FLUSH)], [1]),
        ([head(blk.WRITE_ZEROES), GIB_OF_ZEROES], [1]),
    ),
}  # fmt: skip


class Disk(World):
    kinds = DISKS

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__(folder)
        self.kind = kind
        self.path = folder / f"{kind}.img"
        with self.path.open("wb") as file:
            for _ in range(DISK // MIB):
                file.write(os.urandom(MIB))

    async def make(self) -> Device:
        if self.kind == "own":
            disk = MemoryBlock(DISK)
            disk.data[:] = os.urandom(DISK)  # touched now: what the disk itself takes is not the flood's
            return BlockDevice(disk, queues=2)
        opened = SnapshotBlock if self.kind == "snapshot" else FileBlock
        return BlockDevice(await opened.open(self.path), queues=2)


# Networks


def net_kind(*frames: bytes, receive: int = 0, control: bytes = b"") -> Kind:
    def shapes(child: Child) -> list[Shape]:
        built: list[Shape] = [(1, [child.buffer(frame)], []) for frame in frames]
        if receive:
            built.append((0, [], [child.buffer(receive)]))
        if control:
            built.append((2, [child.buffer(control)], [child.buffer(1)]))
        return built

    return shapes


PLAIN = bytes(12)
NETS: dict[str, Kind] = {
    "small frames": net_kind(PLAIN + bytes(60)),
    "large frames": net_kind(PLAIN + bytes(65554)),
    "frames both ways": net_kind(PLAIN + bytes(1514), receive=1526),
    "buffers too small": net_kind(receive=1),
    "wrong frames": net_kind(b"x", bytes(11), PLAIN, PLAIN + bytes(65555), bytes(MIB)),
    "headers": net_kind(b"\xff" * 12 + bytes(60), b"\x01\x01\xff\xff\0\0\xff\xff\xff\xff\xff\xff" + bytes(1000)),
    "commands": net_kind(control=b"\1\1" + MAC),
    "unknown commands": net_kind(control=bytes(5000)),
}


class Stream(World):
    """`peer`: reads and answers, in the child, or not at all."""

    def __init__(self, folder: Path, *, peer: bool) -> None:
        super().__init__(folder)
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.kinds = {name: self._with_peer(kind) for name, kind in NETS.items()} if peer else NETS
        self._thread: threading.Thread | None = None

    def _with_peer(self, kind: Kind) -> Kind:
        def shapes(child: Child) -> Sequence[Shape]:
            if self._thread is None:
                self._thread = threading.Thread(target=self._answer, daemon=True)
                self._thread.start()
            return kind(child)

        return shapes

    def _answer(self) -> None:
        frame = struct.pack(">I", 1514) + bytes(1514)
        with contextlib.suppress(OSError):
            while self.far.recv(1 << 20):
                self.far.send(frame * 20)

    async def make(self) -> Device:
        return NetDevice(StreamNet(socket.socket(fileno=os.dup(self.near.fileno()))), MAC)

    async def close(self) -> None:
        self.near.close()
        self.far.close()


class Nowhere(NetBackend):
    """A wire as an embedder writes one, with nobody at its end."""

    async def send(self, frame: bytes) -> None:
        return None

    async def receive(self) -> bytes:
        await asyncio.sleep(0)
        return bytes(1514)


class Wire(World):
    kinds = NETS

    async def make(self) -> Device:
        return NetDevice(Nowhere(), MAC)


# Consoles


def control(*messages: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<IHH", *message) for message in messages)


def console_kind(*output: int, queue: int = 1, receive: Sequence[int] = (), messages: Sequence[bytes] = ()) -> Kind:
    def shapes(child: Child) -> list[Shape]:
        built: list[Shape] = [(queue, [child.buffer(b"x" * length)], []) for length in output]
        built += [(0, [], [child.buffer(length)]) for length in receive]
        built += [(3, [child.buffer(message)], []) for message in messages]
        return built

    return shapes


CONSOLES: dict[str, Kind] = {
    "a byte at a time": console_kind(1),
    "64 KiB": console_kind(65536),
    "4 MiB": console_kind(4 * MIB),
    "input of a byte": console_kind(1, receive=[1]),
}
OPEN = [control((port, ControlEvent.PORT_OPEN, 1)) for port in range(3)]
PORTS = CONSOLES | {
    "a port's bytes": console_kind(1, 100, queue=5, messages=OPEN),
    "messages": console_kind(
        messages=[control((0, ControlEvent.DEVICE_READY, 1)), *OPEN, control((1, ControlEvent.PORT_READY, 1))]
    ),
    "open and close": console_kind(messages=[*OPEN, control((1, ControlEvent.PORT_OPEN, 0))]),
    "wrong messages": console_kind(messages=[b"x", control((99, 99, 99)), bytes(4096)]),
}


class Console(World):
    """As `vmm run --hvc` has it: on the machine's console."""

    kinds = CONSOLES

    async def make(self) -> Device:
        char = HubChar(input=True)
        char.join(ConsoleHub().port())
        return ConsoleDevice(char)


class Ports(World):
    """Three of them; one is a UNIX socket."""

    kinds = PORTS

    async def make(self) -> Device:
        sock = await SocketChar(self.folder / "port").start()

        class Quiet(MemoryChar):
            async def write(self, data: bytes) -> None:
                return None

        others = Port(sock, "socket", console=False), Port(Quiet(), "other", console=False)
        return ConsoleDevice([Port(Quiet()), *others])


# Entropy


def entropy_kind(*lengths: int, count: int = 1) -> Kind:
    def shapes(child: Child) -> list[Shape]:
        return [(0, [], [child.buffer(length)] * count) for length in lengths]

    return shapes


class Entropy(World):
    kinds = {
        "a byte": entropy_kind(1),
        "64 KiB": entropy_kind(65536),
        "1 MiB in pieces": entropy_kind(16384, count=63),
    }

    async def make(self) -> Device:
        return EntropyDevice(os.urandom)


class Nothing(Entropy):
    """Its driver makes no request: what is measured then is the host's and the second machine's."""

    kinds = {f"nothing, {number}": entropy_kind() for number in range(5)}


# Sockets

ECHO, DEAF, NOBODY = 1025, 1026, 9
PACKET = struct.Struct("<QQIIIHHIII")


def packets(*wanted: tuple[int, int, int, int], rooms: Sequence[int] = (), rounds: int = 1) -> Kind:
    """(guest's port, host's port, operation, bytes of data) each; guest's ports count up over `rounds`."""

    def shapes(child: Child) -> list[Shape]:
        built: list[Shape] = [(0, [], [child.buffer(length)]) for length in rooms]
        for number in range(rounds):
            for guest, host, op, length in wanted:
                header = PACKET.pack(3, 2, guest + number, host, length, 1, op, 3, 1 << 20, 0)
                built.append((1, [child.buffer(header + bytes(length))], []))
                built += [(0, [], [child.buffer(length)]) for length in rooms]
        return built

    return shapes


VSOCKS: dict[str, Kind] = {
    "requests to nobody": packets((1, NOBODY, Op.REQUEST, 0), rounds=5000),
    "requests to nobody, answers taken": packets((1, NOBODY, Op.REQUEST, 0), rounds=100, rooms=[100]),
    "requests taken back": packets((1, NOBODY, Op.REQUEST, 0), (1, NOBODY, Op.RST, 0), rounds=2000),
    "connections": packets((1, ECHO, Op.REQUEST, 0), rounds=5000),
    "connections, answers taken": packets((1, ECHO, Op.REQUEST, 0), rounds=100, rooms=[100]),
    "connections that end": packets(
        (1, ECHO, Op.REQUEST, 0), (1, ECHO, Op.RW, 10), (1, ECHO, Op.RST, 0), rounds=300, rooms=[100]
    ),
    "connections that are shut down": packets(
        (1, ECHO, Op.REQUEST, 0), (1, ECHO, Op.SHUTDOWN, 0), rounds=300, rooms=[100]
    ),
    "data": packets((1, ECHO, Op.REQUEST, 0), *[(1, ECHO, Op.RW, 4096)] * 20, rooms=[4096]),
    "data, answers not taken": packets((1, DEAF, Op.REQUEST, 0), *[(1, DEAF, Op.RW, 65536)] * 3, rounds=40),
    "credit": packets((1, ECHO, Op.REQUEST, 0), *[(1, ECHO, Op.CREDIT_REQUEST, 0)] * 50),
    "no connection's packets": packets(*[(1, NOBODY, op, 0) for op in (2, 4, 5, 6, 7, 99)], rounds=100),
}


class Sockets(World):
    kinds = VSOCKS

    async def make(self) -> Device:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello" * 1000)
            await asyncio.Event().wait()

        backend = MemoryVsock()
        backend.listen(ECHO, echo)
        backend.listen(DEAF, deaf)
        device = VsockDevice(backend)
        await device.start()
        return device


def worlds(folder: Path) -> dict[str, World]:
    """Every device, by name."""
    return {
        "nothing": Nothing(folder),
        "blk-file": Disk("file", folder),
        "blk-snapshot": Disk("snapshot", folder),
        "blk-own": Disk("own", folder),
        "net-stream": Stream(folder, peer=True),
        "net-stream-deaf": Stream(folder, peer=False),
        "net-own": Wire(folder),
        "console": Console(folder),
        "console-ports": Ports(folder),
        "rng": Entropy(folder),
        "vsock": Sockets(folder),
    }
