"""The virtio console: its port on the machine's console, and named ports as UNIX sockets. Loop thread."""

from __future__ import annotations

import asyncio

from virtio.backends.char import CharBackend, SocketChar
from virtio.device import Device
from virtio.devices.console import ConsoleDevice, Port
from vmm.config import Config
from vmm.devices.virtio.pool import Maker, TransportKind
from vmm.machine.interfaces import CharacterPort

INPUT = 4096


class HubChar(CharBackend):
    """A virtio console port that joins the machine's console. With `input` it is where what is typed goes."""

    def __init__(self, *, input: bool) -> None:
        self._port: CharacterPort | None = None
        self._input = input
        self._ready = asyncio.Event()

    def join(self, port: CharacterPort) -> None:
        """The machine is built, or built again: this is the device's port of its console."""
        self._port = port

    async def read(self) -> bytes:
        if not self._input or self._port is None:
            await asyncio.Event().wait()
        assert self._port is not None
        while not (data := self._port.read(INPUT)):
            self._ready.clear()
            self._port.set_receiver(self._ready.set)
            await self._ready.wait()
        return data

    async def write(self, data: bytes) -> None:
        if self._port is None:
            return
        # Holding the machine does not end what is available in the queue already, and that may be any number of bytes.
        await self._port.relieved()
        self._port.write(data)


class ConsoleMaker(Maker):
    """The virtio console of the configuration."""

    def __init__(self, config: Config) -> None:
        self.transport: TransportKind = config.transport
        self._config = config
        # what is typed goes to hvc0 if the guest's console is there, else to the serial port
        typed = "hvc0" in f"{config.cmdline or ''} {config.append}"
        self.hub = HubChar(input=typed) if config.hvc else None

    async def make(self) -> Device:
        ports = [Port(self.hub)] if self.hub is not None else []
        try:
            for port in self._config.ports:
                ports.append(Port(await SocketChar(port.path).start(), port.name, console=False))
            return ConsoleDevice(ports)
        except BaseException:
            for made in ports:
                await made.backend.aclose()
            raise
