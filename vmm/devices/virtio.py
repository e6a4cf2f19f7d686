"""The virtio devices that a configuration asks for, each on its transport. A part of the builder.

PCI functions go to the component "pci"; virtio-mmio devices get a window of layout.virtio_mmio and are described by the
component "acpi". Devices are found by name through the component "virtio": a disk's or net's id (else disk0, net0, …),
"console", "rng", "vsock". Loop thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from cpu.contract import Space
from virtio import mmio
from virtio.backends.block import BlockBackend
from virtio.backends.char import CharBackend, SocketChar
from virtio.backends.file import FileBlock, SnapshotBlock
from virtio.backends.net import NetBackend, PcapNet
from virtio.backends.sockets import UserNet
from virtio.backends.sockets import connect as connect_socket
from virtio.backends.tap import TapNet
from virtio.backends.vsock import MemoryVsock, UnixVsock, VsockBackend
from virtio.device import Device
from virtio.devices.blk import BlockDevice
from virtio.devices.console import ConsoleDevice, Port
from virtio.devices.net import NetDevice, parse_mac
from virtio.devices.rng import EntropyDevice
from virtio.devices.vsock import VsockDevice
from virtio.errors import HostError, VirtioError
from virtio.mmio import MmioTransport
from virtio.pci import PciTransport
from virtio.state import TransportState
from virtio.transport import Transport
from vmm.config import Config, Disk, Net
from vmm.cores import is_stock_kernel
from vmm.errors import ConfigError, StateError
from vmm.machine import layout
from vmm.machine.interfaces import Assembly, CharacterPort, PciFunction

if TYPE_CHECKING:
    from virtio.protocols import GuestMemory

TransportKind = Literal["pci", "mmio"]
Make = Callable[[], Awaitable[Device]]
GUEST_CID = 3
QCOW2_MAGIC = b"QFI\xfb"
INPUT = 4096


class HubChar(CharBackend):
    """A virtio console port that joins the machine's console. With `input` it is where what is typed goes."""

    def __init__(self, hub: CharacterPort, *, input: bool) -> None:
        self._hub = hub
        self._input = input
        self._ready = asyncio.Event()

    async def read(self) -> bytes:
        if not self._input:
            await asyncio.Event().wait()
        while not (data := self._hub.read(INPUT)):
            self._ready.clear()
            self._hub.set_receiver(self._ready.set)
            await self._ready.wait()
        return data

    async def write(self, data: bytes) -> None:
        # Holding the machine does not end what is available in the queue already, and that may be any number of bytes.
        await self._hub.relieved()
        self._hub.write(data)


@dataclass(frozen=True, slots=True)
class VirtioState:
    """The virtio-mmio devices by name; functions are saved by their bus."""

    kind: ClassVar = "virtio"
    version: ClassVar = 1
    mmio: dict[str, object]


class VirtioDevices:
    """Every virtio device of one machine."""

    state_type = VirtioState

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._wanted = wanted(assembly)
        self._optional = {net.id or f"net{index}" for index, net in enumerate(assembly.config.nets) if not net.required}
        self._windows: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._begun: dict[str, asyncio.Task[Device]] = {}
        self.devices: dict[str, Device] = {}
        self.transports: dict[str, Transport] = {}
        for name, (kind, _) in self._wanted.items():
            if kind == "mmio":
                self._windows[name] = len(self._windows)
                assembly.get("acpi").add_virtio_mmio(self._windows[name])

    def __getitem__(self, name: str) -> Device:
        """The device of that name. Raises KeyError."""
        return self.devices[name]

    def begin(self) -> None:
        """Start what takes its time (passt) while the kernel is loaded."""
        for name, (_, make) in self._wanted.items():
            if isinstance(getattr(make, "__self__", None), _Net):
                self._begun[name] = asyncio.create_task(self._make(make), name=f"start {name}")

    async def _make(self, make: Make) -> Device:
        return await make()

    async def start(self) -> None:
        """Open the backends and plug the devices in. Raises ConfigError, HostError."""
        for name, (kind, make) in self._wanted.items():
            try:
                device = await (self._begun[name] if name in self._begun else make())
            except VirtioError as error:
                if name not in self._optional:
                    raise
                self._assembly.warn(f"{error}; the machine runs without {name}")
                continue
            self.devices[name] = device
            self._begun.pop(name, None)
            self._plug(name, device, kind)
            if isinstance(device, VsockDevice):
                await device.start()

    def _plug(self, name: str, device: Device, kind: TransportKind) -> None:
        memory = cast("GuestMemory", self._assembly.memory)
        machine = self._assembly.machine
        if kind == "pci":
            function = PciTransport(device, memory)
            self.transports[name] = function
            self._assembly.get("pci").add(cast(PciFunction, function))
            return
        window, gsi = layout.virtio_mmio(self._windows[name])
        transport = MmioTransport(device, memory, machine.irq_line(gsi).set, stall=machine.stall)
        self.transports[name] = transport
        machine.map(Space.MMIO, window.start, window.size, transport, f"virtio-mmio {name}")
        for index in range(len(device.queue_sizes)):
            self._undo.append(
                machine.ioeventfd(
                    Space.MMIO,
                    window.start + mmio.QUEUE_NOTIFY,
                    4,
                    index,
                    partial(transport.notify, index),
                )
            )

    async def quiesce(self) -> None:
        """Take no more requests and drain those in flight, in all devices. Before `save`."""
        for transport in self.transports.values():
            await transport.quiesce()

    def resume(self) -> None:
        """After `quiesce` or `restore`."""
        for transport in self.transports.values():
            transport.resume()

    def reset(self) -> None:
        """A machine reset, of the devices that no bus resets."""
        for name in self._plugged_windows():
            self.transports[name].reset()

    def _plugged_windows(self) -> list[str]:
        """The devices behind virtio-mmio windows; an optional one may be missing."""
        return [name for name in self._windows if name in self.transports]

    def state_parts(self) -> Mapping[str, Any]:
        """The components behind the `object` fields of its state."""
        return {"mmio": {name: self.transports[name] for name in self._plugged_windows()}}

    def save(self) -> VirtioState:
        return VirtioState({name: self.transports[name].save() for name in self._plugged_windows()})

    def restore(self, state: VirtioState) -> None:
        if set(state.mmio) != set(self._plugged_windows()):
            raise StateError("virtio: the saved state is of a machine with other devices")
        for name, saved in state.mmio.items():
            self.transports[name].restore(cast(TransportState, saved))

    async def aclose(self) -> None:
        """Close every device and backend."""
        undo, self._undo = self._undo, []
        for call in undo:
            call()
        begun, self._begun = self._begun, {}
        for task in begun.values():
            task.cancel()
        for made in await asyncio.gather(*begun.values(), return_exceptions=True):
            if isinstance(made, Device):
                await made.aclose()
        devices, self.devices = self.devices, {}
        failure: BaseException | None = None
        for transport in self.transports.values():
            transport.close()
        self.transports.clear()
        for device in devices.values():
            try:
                await device.aclose()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure


def wanted(assembly: Assembly) -> dict[str, tuple[TransportKind, Make]]:
    """name -> (transport, coroutine that makes the device), in the order in which guests find them."""
    config = assembly.config
    found: dict[str, tuple[TransportKind, Make]] = {}

    def want(name: str, kind: TransportKind, make: Make) -> None:
        if name in found:
            raise ConfigError(f"two devices are called {name!r}; give one another id")
        found[name] = (kind, make)

    for index, disk in enumerate(config.disks):
        want(disk.id or f"disk{index}", disk.transport, _Disk(disk, disk.id or f"disk{index}").make)
    for index, net in enumerate(config.nets):
        want(net.id or f"net{index}", net.transport, _Net(net, assembly).make)
    if config.hvc or config.ports:
        want("console", config.transport, _Console(config, assembly.console).make)
    if config.rng and is_stock_kernel(config):
        want("rng", config.transport, _Entropy(assembly).make)
    if config.vsock is not None or config.agent:
        want("vsock", config.transport, _Vsock(assembly).make)
    for name, make in assembly.devices.items():
        want(name, config.transport, _Own(make).make)
    return found


class _Own:
    """A device of the embedder's."""

    def __init__(self, make: Callable[[], Device]) -> None:
        self._make = make

    async def make(self) -> Device:
        return self._make()


class _Disk:
    def __init__(self, disk: Disk, serial: str) -> None:
        self.disk, self.serial = disk, serial

    async def make(self) -> Device:
        backend = await open_disk(self.disk)
        try:
            return BlockDevice(backend, serial=self.serial, queues=self.disk.queues)
        except OSError as error:
            await backend.aclose()
            raise HostError(f"{self.disk.path}: {error.strerror}") from error


async def open_disk(disk: Disk) -> BlockBackend:
    """The backend of a configured disk. Raises ConfigError."""
    if disk.format != "raw":
        magic = await asyncio.to_thread(_first_bytes, disk)
        if disk.format == "qcow2" or magic == QCOW2_MAGIC:
            raise ConfigError(f"disk: {disk.path}: qcow2 is not supported; convert it with qemu-img convert -O raw")
    if disk.snapshot:
        return await SnapshotBlock.open(disk.path, io=disk.io)
    return await FileBlock.open(disk.path, read_only=disk.readonly, cache=disk.cache, io=disk.io)


def _first_bytes(disk: Disk) -> bytes:
    try:
        with disk.path.open("rb") as file:
            return file.read(4)
    except OSError:
        return b""  # opening it says what is wrong


class _Net:
    def __init__(self, net: Net, assembly: Assembly) -> None:
        self.net = net
        # Now, so that with a seed it does not depend on when other devices ask for chance.
        self.mac = parse_mac(net.mac) if net.mac else b"\x52\x54\x00" + assembly.machine.random(3)

    async def make(self) -> Device:
        net = self.net
        backend: NetBackend
        if net.kind == "user":
            ports = ["-t", net.forward.replace("+", ",")] if net.forward else []
            backend = await UserNet.start(ports)
        elif net.kind == "tap":
            backend = TapNet(net.target, queues=net.queues)
        else:
            backend = await connect_socket(net.target)
        if net.pcap is not None:
            try:
                backend = PcapNet(backend, net.pcap)
            except BaseException:
                await backend.aclose()
                raise
        return NetDevice(backend, self.mac)


class _Console:
    def __init__(self, config: Config, hub: CharacterPort) -> None:
        self.config, self.hub = config, hub

    async def make(self) -> Device:
        ports: list[Port] = []
        if self.config.hvc:
            # what is typed goes to hvc0 if the guest's console is there, else to the serial port
            typed = "hvc0" in f"{self.config.cmdline or ''} {self.config.append}"
            ports.append(Port(HubChar(self.hub, input=typed)))
        try:
            for port in self.config.ports:
                ports.append(Port(await SocketChar(port.path).start(), port.name, console=False))
            return ConsoleDevice(ports)
        except BaseException:
            for made in ports:
                await made.backend.aclose()
            raise


class _Entropy:
    def __init__(self, assembly: Assembly) -> None:
        self.random = assembly.machine.random

    async def make(self) -> Device:
        return EntropyDevice(self.random)


class _Vsock:
    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly

    async def make(self) -> Device:
        config = self.assembly.config
        backend: VsockBackend | None = None if config.vsock is None else UnixVsock(config.vsock)
        if not config.agent:
            return VsockDevice(backend or MemoryVsock(), GUEST_CID)
        from vmm.guest.agent import AGENT_PORT, Agent
        from vmm.guest.link import AgentVsock

        agent = Agent(lambda: device.open(AGENT_PORT), waits=True)
        agent.on_ready = partial(self.assembly.mark, "agent")
        self.assembly.add("agent", agent)
        device = VsockDevice(AgentVsock(agent, backend), GUEST_CID)
        return device


def attach(assembly: Assembly) -> None:
    """Component "virtio", if the configuration asks for any device."""
    devices = VirtioDevices(assembly)
    assembly.add("virtio", devices)
    devices.begin()
