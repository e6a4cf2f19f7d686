"""The way from vsock to the guest's agent: a vsock backend that serves the agent's port and leaves the others to UNIX
sockets, if the machine has them. Loop thread."""

from __future__ import annotations

from virtio.backends.vsock import Open, Streams, VsockBackend, stream_pair
from vmm.guest.agent import Agent
from vmm.guest.frames import AGENT_PORT, VERSIONS


class AgentVsock(VsockBackend):
    """`agent`: told when the guest's agent says that it listens. `beyond`: who answers all other ports."""

    def __init__(self, agent: Agent, beyond: VsockBackend | None) -> None:
        self._agent = agent
        self._beyond = beyond

    async def start(self, open: Open) -> None:
        if self._beyond is not None:
            await self._beyond.start(open)

    async def dial(self, port: int) -> Streams:
        if port - AGENT_PORT in VERSIONS:
            self._agent.set_ready(port - AGENT_PORT)
            ours, theirs = await stream_pair()
            theirs[1].close()
            return ours
        if self._beyond is None:
            raise ConnectionRefusedError(f"nobody serves vsock port {port}")
        return await self._beyond.dial(port)

    async def aclose(self) -> None:
        if self._beyond is not None:
            await self._beyond.aclose()
