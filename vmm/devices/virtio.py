"""The machine's virtio devices, made from its configuration: disks, networks, console, entropy, vsock with the agent.

A builder's part. Opens backends (so `attach` is a coroutine), joins each device to a transport and the transport to PCI
or to a virtio-mmio window that ACPI describes. Loop thread.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpu.contract import Space
from virtio.device import Device
from virtio.mmio import QUEUE_NOTIFY, MmioTransport
from virtio.pci import PciTransport
from virtio.transport import Transport
from vmm import layout
from vmm.errors import ConfigError, HostError, os_reason

if TYPE_CHECKING:
    from virtio.backends.net import NetBackend
    from virtio.backends.vsock import Open, Streams
    from vmm.agent import Agent
    from vmm.config import Disk, Net
    from vmm.interfaces import Assembly, CharacterPort, State

FICLONE = 0x40049409
GUEST_CID = 3
CHUNK = 64 << 20


class VirtioComponent:
    """A device with its transport, as the builder owns it."""

    def __init__(self, transport: Transport, begin: Callable[[], Any] | None) -> None:
        self.transport = transport
        self._begin = begin
        self._undo: list[Callable[[], None]] = []

    @property
    def device(self) -> Device:
        return self.transport.device

    async def start(self) -> None:
        if self._begin is not None:
            await self._begin()

    async def quiesce(self) -> None:
        """Take no more requests, wait for those in flight."""
        await self.transport.quiesce()

    def resume(self) -> None:
        self.transport.resume()

    def save(self) -> State:
        return self.transport.save()

    def restore(self, state: State) -> None:
        self.transport.restore(state)

    async def aclose(self) -> None:
        for undo in self._undo:
            undo()
        await self.device.aclose()

    def ring_doorbells(self, assembly: Assembly, start: int) -> None:
        """virtio-mmio: each queue's notifications come through an ioeventfd."""
        for index in range(len(self.device.queue_sizes)):

            def notify(index: int = index) -> None:
                self.transport.notify(index)

            address = start + QUEUE_NOTIFY
            self._undo.append(assembly.machine.ioeventfd(Space.MMIO, address, 4, index, notify))


class HubPort:
    """The machine's console hub as the backend of a virtio console port."""

    def __init__(self, hub: CharacterPort) -> None:
        self._hub = hub
        self._arrived = asyncio.Event()
        hub.set_receiver(self._arrived.set)

    async def read(self) -> bytes:
        while not (data := self._hub.read(4096)):
            self._arrived.clear()
            await self._arrived.wait()
        return data

    async def write(self, data: bytes) -> None:
        self._hub.write(data)

    async def aclose(self) -> None:
        """The hub is the machine's."""


class _Host:
    """vsock's host side: the agent's port is served here, the others by UNIX sockets if the machine has them."""

    def __init__(self, sockets: Any | None) -> None:
        self._sockets = sockets
        self.agent: Agent | None = None

    async def start(self, open: Open) -> None:
        if self._sockets is not None:
            await self._sockets.start(open)

    async def dial(self, port: int) -> Streams:
        from virtio.backends.vsock import stream_pair
        from vmm.agent import READY_PORT

        if port == READY_PORT and self.agent is not None:
            self.agent.set_ready()
            ours, theirs = await stream_pair()
            theirs[1].close()
            return ours
        if self._sockets is None:
            raise ConnectionRefusedError(f"nobody serves vsock port {port}")
        streams: Streams = await self._sockets.dial(port)
        return streams

    async def aclose(self) -> None:
        if self._sockets is not None:
            await self._sockets.aclose()


async def attach(assembly: Assembly) -> None:
    """Components "disk0"…, "net0"…, "console", "rng", "vsock", "agent" (or the ids that the configuration gives)."""
    config = assembly.config
    for number, disk in enumerate(config.disks):
        await _add_disk(assembly, disk, number)
    for number, net in enumerate(config.nets):
        await _add_net(assembly, net, number)
    if config.hvc or config.ports:
        await _add_console(assembly)
    if config.rng and _is_stock(assembly):
        from virtio.devices.rng import EntropyDevice

        add(assembly, "rng", EntropyDevice(assembly.machine.random))
    if config.vsock is not None or config.agent:
        await _add_vsock(assembly)


def add(
    assembly: Assembly, name: str, device: Device, transport: Literal["pci", "mmio"] = "pci",
    begin: Callable[[], Any] | None = None,
) -> VirtioComponent:
    """Give the machine a virtio device, also one of the embedder's; `begin` is awaited before the first instruction."""
    if transport == "mmio":
        index = sum(
            isinstance(component, VirtioComponent) and isinstance(component.transport, MmioTransport)
            for component in assembly.parts()
        )
        window, gsi = layout.virtio_mmio(index)
        mmio = MmioTransport(device, assembly.memory, assembly.machine.irq_line(gsi).set)
        assembly.machine.map(Space.MMIO, window.start, window.size, mmio, f"virtio-mmio {name}")
        assembly.get("acpi").add_virtio_mmio(index)
        component = VirtioComponent(mmio, begin)
        component.ring_doorbells(assembly, window.start)
    else:
        pci = PciTransport(device, assembly.memory)
        assembly.get("pci").add(pci)
        component = VirtioComponent(pci, begin)
    assembly.add(name, component)
    return component


def _is_stock(assembly: Assembly) -> bool:
    """Tiny guests have no drivers; they start quicker without devices."""
    from vmm.cores import SMALL_KERNEL

    kernel = assembly.config.kernel
    return kernel is not None and kernel.stat().st_size >= SMALL_KERNEL


async def _add_disk(assembly: Assembly, disk: Disk, number: int) -> None:
    from virtio.backends.file import FileBlock
    from virtio.devices.blk import BlockDevice

    if disk.format == "qcow2":
        raise ConfigError(f"disk: {disk.path}: qcow2 is not supported; convert it: qemu-img convert -O raw")
    if disk.snapshot:
        descriptor = await asyncio.to_thread(private_copy, disk.path)
        size = os.fstat(descriptor).st_size // 512 * 512
        backend = FileBlock(descriptor, size, read_only=False, cache=disk.cache)
    else:
        backend = await FileBlock.open(disk.path, read_only=disk.readonly, cache=disk.cache)
    queues = min(assembly.config.cpus, 4)
    device = BlockDevice(backend, serial=disk.id or f"disk{number}", queues=queues)
    add(assembly, disk.id or f"disk{number}", device, disk.transport)


def private_copy(path: Path) -> int:
    """A descriptor of an unnamed file with the same content, holes kept; it vanishes with the last descriptor.
    Raises ConfigError, HostError."""
    folder = os.environ.get("TMPDIR") or ("/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir())
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"disk: {path}: {os_reason(error)}") from error
    try:
        target = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        os.close(source)
        raise HostError(f"snapshot of {path}: {folder}: {os_reason(error)}; set TMPDIR") from error
    try:
        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError:
            _copy_data(source, target)
        return target
    except OSError as error:
        os.close(target)
        raise HostError(f"snapshot of {path}: {os_reason(error)}; make room in {folder} or set TMPDIR") from error
    finally:
        os.close(source)


def _copy_data(source: int, target: int) -> None:
    size = os.lseek(source, 0, os.SEEK_END)
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: only a hole is left
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            at += os.copy_file_range(source, target, min(end - at, CHUNK), at, at) or end - at


async def _add_net(assembly: Assembly, net: Net, number: int) -> None:
    from virtio.devices.net import NetDevice, parse_mac

    backend = await _net_backend(net)
    if net.pcap is not None:
        from virtio.backends.net import PcapNet

        backend = PcapNet(backend, net.pcap)
    # Locally administered, as QEMU's and KVM's users know it.
    mac = parse_mac(net.mac) if net.mac else b"\x52\x54\x00" + assembly.machine.random(3)
    add(assembly, net.id or f"net{number}", NetDevice(backend, mac), net.transport)


async def _net_backend(net: Net) -> NetBackend:
    if net.kind == "tap":
        from virtio.backends.tap import TapNet

        return TapNet(net.target)
    from virtio.backends.sockets import StreamNet, UserNet

    return await UserNet.start() if net.kind == "user" else await StreamNet.connect(net.target)


async def _add_console(assembly: Assembly) -> None:
    from virtio.backends.char import SocketChar
    from virtio.devices.console import ConsoleDevice, Port

    ports = [Port(HubPort(assembly.console))] if assembly.config.hvc else []
    for port in assembly.config.ports:
        ports.append(Port(await SocketChar(port.path).start(), name=port.name, console=False))
    add(assembly, "console", ConsoleDevice(ports if len(ports) > 1 or not assembly.config.hvc else ports[0].backend))


async def _add_vsock(assembly: Assembly) -> None:
    from virtio.backends.vsock import UnixVsock
    from virtio.devices.vsock import VsockDevice

    config = assembly.config
    host = _Host(None if config.vsock is None else UnixVsock(config.vsock))
    device = VsockDevice(host, GUEST_CID)
    add(assembly, "vsock", device, begin=device.start)
    if config.agent:
        from vmm.agent import AGENT_PORT, Agent

        host.agent = Agent(lambda: device.open(AGENT_PORT), waits=True)
        assembly.add("agent", host.agent)


