"""The virtio devices of a machine with what the host gave them: files, taps, sockets, processes.

They are opened once, before the first instruction or when they are attached, and live until the machine is closed or
they are detached. A reboot plugs the same
devices into the new machine, as a reboot finds the same hardware: so MAC addresses, the private copies of
snapshot disks, passt and sockets stay. Found by name: a disk's or net's id (else disk0, net0, …), "console", "rng",
"vsock", "balloon", or one of the embedder's. Loop thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from virtio.device import Device
from virtio.devices.rng import EntropyDevice
from virtio.errors import VirtioError
from virtio.protocols import RandomSource
from vmm.config import Config
from vmm.cores import is_stock_kernel
from vmm.errors import ConfigError, StateError
from vmm.machine.interfaces import CharacterPort
from vmm.machine.origin import ArrivingDisk, SavedDisk

if TYPE_CHECKING:
    from vmm.guest.agent import Agent

TransportKind = Literal["pci", "mmio"]


class Maker:
    """How one device is made: the base of the makers in this folder."""

    transport: TransportKind
    optional = False
    """The machine runs without it where the host cannot give it, and a warning says so."""
    packed = False
    """The device offers packed rings."""
    slow = False
    """It is begun early, while the kernel is loaded."""

    async def make(self) -> Device:
        """The device with all that it needs of the host. Raises virtio's errors."""
        raise NotImplementedError


class EntropyMaker(Maker):
    """The entropy device."""

    def __init__(self, transport: TransportKind, random: RandomSource) -> None:
        self.transport = transport
        self._random = random

    async def make(self) -> Device:
        return EntropyDevice(self._random)


class BalloonMaker(Maker):
    """The balloon."""

    def __init__(self, transport: TransportKind) -> None:
        self.transport = transport

    async def make(self) -> Device:
        from virtio.devices.balloon import BalloonDevice

        return BalloonDevice()


class OwnMaker(Maker):
    """A device of the embedder's."""

    def __init__(self, transport: TransportKind, device: Device) -> None:
        self.transport = transport
        self._device = device

    async def make(self) -> Device:
        return self._device


class DevicePool:
    """Every virtio device of one machine, over all its reboots."""

    def __init__(
        self,
        config: Config,
        random: RandomSource,
        own: Mapping[str, Device],
        warn: Callable[[str], None],
        mark: Callable[[str], None],
        saved_disks: Mapping[str, SavedDisk | ArrivingDisk] | None,
    ) -> None:
        """`saved_disks`: None for a machine that boots. Raises ConfigError. Nothing is opened yet."""
        self._restored = saved_disks is not None
        self._saved_disks = saved_disks or {}
        self.makers: dict[str, Maker] = {}
        """In the order in which guests find them."""
        self.devices: dict[str, Device] = {}
        self.agent: Agent | None = None
        self._warn = warn
        self._synchronous = config.clock == "virtual"
        self._begun: dict[str, asyncio.Task[Device]] = {}
        self._console: Any = None
        self._opened = self._closed = False
        self._packed = config.packed
        self._describe(config, random, own, warn, mark)

    def _describe(
        self,
        config: Config,
        random: RandomSource,
        own: Mapping[str, Device],
        warn: Callable[[str], None],
        mark: Callable[[str], None],
    ) -> None:
        # Imported here: a machine without such devices starts sooner.
        if config.disks:
            from vmm.devices.virtio.disk import DiskMaker

            for index, disk in enumerate(config.disks):
                name = disk.id or f"disk{index}"
                self._want(name, DiskMaker(disk, name, self._saved_disks.get(name)), disk.packed)
        if config.nets:
            from vmm.devices.virtio.net import NetMaker

            for index, net in enumerate(config.nets):
                name = net.id or f"net{index}"
                self._want(name, NetMaker(net, random, name, warn, restored=self._restored), net.packed)
        if shares := config.all_shares:
            from vmm.devices.virtio.share import ShareMaker

            for share in shares:
                self._want(share.id, ShareMaker(share))
        if config.hvc or config.ports:
            from vmm.devices.virtio.console import ConsoleMaker

            console = ConsoleMaker(config)
            self._console = console.hub
            self._want("console", console)
        if config.rng and is_stock_kernel(config):
            self._want("rng", EntropyMaker(config.transport, random))
        if config.vsock is not None or config.agent:
            from vmm.devices.virtio.vsock import VsockMaker

            vsock = VsockMaker(config, lambda: mark("agent"))
            self.agent = vsock.agent
            self._want("vsock", vsock)
        if config.balloon:
            self._want("balloon", BalloonMaker(config.transport))
        for name, device in own.items():
            self._want(name, OwnMaker(config.transport, device))

    def _want(self, name: str, maker: Maker, packed: bool = False) -> None:
        if name in self.makers:
            raise ConfigError(f"two devices are called {name!r}; give one another id")
        maker.packed = packed or self._packed
        self.makers[name] = maker

    def __getitem__(self, name: str) -> Device:
        """The device of that name. Raises KeyError."""
        return self.devices[name]

    async def add(self, name: str, maker: Maker, packed: bool = False) -> Device:
        """Make one more device. Nothing is left behind if that fails. Raises ConfigError, HostError (virtio's)."""
        self._want(name, maker, packed)
        try:
            device = await maker.make()
        except BaseException:
            del self.makers[name]
            raise
        if self._closed:
            await device.aclose()
            raise StateError("the machine has ended meanwhile")
        device.synchronous = self._synchronous
        self.devices[name] = device
        return device

    def take(self, name: str) -> Device:
        """Forget a device, which is the caller's to close from now on. Raises KeyError."""
        device = self.devices.pop(name)
        del self.makers[name]
        return device

    def begin(self) -> None:
        """Start making what takes its time. Idempotent."""
        if self._opened:
            return
        for name, maker in self.makers.items():
            if maker.slow and name not in self._begun:
                self._begun[name] = asyncio.create_task(maker.make(), name=f"start {name}")

    async def open(self) -> None:
        """Make every device that there is not yet. Raises ConfigError, HostError (virtio's)."""
        if self._opened:
            return
        for name, maker in self.makers.items():
            try:
                device = await (self._begun[name] if name in self._begun else maker.make())
            except VirtioError as error:
                if not maker.optional:
                    raise
                self._warn(f"{error}; the machine runs without {name}")
                continue
            device.synchronous = self._synchronous
            self.devices[name] = device
            self._begun.pop(name, None)
        self._opened = True

    def join_console(self, port: Callable[[], CharacterPort]) -> None:
        """The machine is built, or built again: a virtio console gets its port of the machine's console."""
        if self._console is not None:
            self._console.join(port())

    async def settle(self) -> None:
        """Until no device works on anything any more that it took from a driver: guest memory may go then."""
        for device in self.devices.values():
            await device.settle()

    def restarted(self) -> None:
        """The guest boots again: its agent is not there yet."""
        if self.agent is not None:
            self.agent.restarted()

    async def aclose(self) -> None:
        """Close every device and backend. Raises the first failure, after all were tried. Idempotent."""
        self._closed = True
        begun, self._begun = self._begun, {}
        for task in begun.values():
            task.cancel()
        for made in await asyncio.gather(*begun.values(), return_exceptions=True):
            if isinstance(made, Device):
                await made.aclose()
        if self.agent is not None:
            self.agent.close()
        devices, self.devices = self.devices, {}
        failure: BaseException | None = None
        for device in devices.values():
            try:
                await device.aclose()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
