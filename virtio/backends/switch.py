"""An Ethernet switch: ports, the hardware addresses that are behind each, and queues with limits. Loop thread only."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from virtio.backends.net import FRAME_MAX, NetBackend
from virtio.errors import HostError

MAX_PORTS = 256
MAX_ADDRESSES = 4096
"""Hardware addresses that are known; the oldest gives way, and frames for it go to every port."""
QUEUE_FRAMES, QUEUE_BYTES = 512, 1 << 20
"""What waits for one port; what does not fit is lost, so a port that nobody reads costs the others nothing."""
HEADER = 14


class SwitchPort(NetBackend):
    """One port, as a card's backend."""

    def __init__(self, switch: SwitchCore) -> None:
        self._switch: SwitchCore | None = switch
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._event = asyncio.Event()
        self.lost = 0
        """Frames that found its queue full."""

    async def send(self, frame: bytes) -> None:
        if self._switch is not None:
            self._switch.forward(self, frame)

    async def receive(self) -> bytes:
        while not self._queue:
            if self._switch is None:
                raise HostError("the switch is gone")
            self._event.clear()
            await self._event.wait()
        frame = self._queue.popleft()
        self._bytes -= len(frame)
        return frame

    def deliver(self, frame: bytes) -> None:
        """A frame leaves the switch here."""
        if len(self._queue) >= QUEUE_FRAMES or self._bytes + len(frame) > QUEUE_BYTES:
            self.lost += 1
            return
        self._queue.append(frame)
        self._bytes += len(frame)
        self._event.set()

    def unplug(self) -> None:
        """Idempotent."""
        switch, self._switch = self._switch, None
        self._event.set()
        if switch is not None:
            switch.remove(self)

    async def aclose(self) -> None:
        self.unplug()


class SwitchCore:
    """Frames between ports (IEEE 802.1D, 7.7 and 7.8, without a spanning tree: there is one way to everyone)."""

    def __init__(self) -> None:
        self.ports: list[SwitchPort] = []
        self._addresses: OrderedDict[bytes, SwitchPort] = OrderedDict()

    def port(self) -> SwitchPort:
        """A new one. HostError if there are too many."""
        if len(self.ports) >= MAX_PORTS:
            raise HostError(f"a switch has {MAX_PORTS} ports, and all are taken")
        self.ports.append(SwitchPort(self))
        return self.ports[-1]

    def remove(self, port: SwitchPort) -> None:
        """It is unplugged, and what was behind it is unknown."""
        self.ports.remove(port)
        for address in [address for address, at in self._addresses.items() if at is port]:
            del self._addresses[address]

    def forward(self, source: SwitchPort, frame: bytes) -> None:
        """From one port to the one that its target is behind, or to all others."""
        if not HEADER <= len(frame) <= FRAME_MAX:
            return
        target, sender = frame[:6], frame[6:12]
        if not sender[0] & 1:
            self._addresses[sender] = source
            self._addresses.move_to_end(sender)
            if len(self._addresses) > MAX_ADDRESSES:
                self._addresses.popitem(last=False)
        known = None if target[0] & 1 else self._addresses.get(target)
        for port in [known] if known is not None else self.ports:
            if port is not source:
                port.deliver(frame)
