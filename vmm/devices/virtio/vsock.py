"""The socket device: sockets of the host, and the way to the guest's agent. Loop thread."""

from __future__ import annotations

from collections.abc import Callable

from virtio.backends.vsock import MemoryVsock, Streams, UnixVsock, VsockBackend
from virtio.device import Device
from virtio.devices.vsock import VsockDevice
from vmm.config import Config
from vmm.devices.virtio.pool import Maker, TransportKind
from vmm.guest.agent import Agent
from vmm.guest.frames import AGENT_PORT
from vmm.guest.link import AgentVsock

GUEST_CID = 3


class VsockMaker(Maker):
    """The socket device of the configuration; with an agent, `agent` reaches it."""

    def __init__(self, config: Config, on_agent: Callable[[], None]) -> None:
        self.transport: TransportKind = config.transport
        self._config = config
        self._device: VsockDevice | None = None
        self.agent: Agent | None = None
        if config.agent:
            self.agent = Agent(lambda: self._reach(AGENT_PORT), waits=True, reach=self._reach)
            self.agent.on_ready = on_agent

    async def make(self) -> Device:
        backend: VsockBackend | None = None if self._config.vsock is None else UnixVsock(self._config.vsock)
        if self.agent is not None:
            backend = AgentVsock(self.agent, backend)
        self._device = VsockDevice(backend or MemoryVsock(), GUEST_CID)
        await self._device.start()
        return self._device

    async def _reach(self, port: int) -> Streams:
        if self._device is None:
            raise ConnectionRefusedError("the machine is not built")
        return await self._device.open(port)
