"""Console device (virtio 1.2, 5.3): one console, or several named ports with a control queue. Loop thread
only."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from dataclasses import dataclass

from virtio.backends.char import CHUNK, CharBackend
from virtio.constants import DeviceId
from virtio.device import Activation, Device
from virtio.layouts import ConsoleConfig, ConsoleControl, ConsoleResize, fast
from virtio.protocols import State
from virtio.queue import Queue


class Feature(enum.IntFlag):
    """5.3.3"""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1


class Control(enum.IntEnum):
    """5.3.6.2: events of the control queues."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


_control = fast(ConsoleControl)
_resize = fast(ConsoleResize)
MESSAGES_MAX = 256
"""Control messages that wait for the driver's buffers; more are dropped."""


@dataclass(slots=True)
class Port:
    """One port. A console port becomes hvcN in Linux, others /dev/virtio-ports/NAME."""

    backend: CharBackend
    name: str = ""
    console: bool = True
    open: bool = False
    """The driver opened it."""


class ConsoleDevice(Device):
    """`ports`: the first is port 0. With one nameless console port there is no control queue."""

    device_id = DeviceId.CONSOLE

    def __init__(self, ports: Sequence[Port] | CharBackend, *, columns: int = 80, rows: int = 25) -> None:
        super().__init__()
        self.ports = list(ports) if isinstance(ports, Sequence) else [Port(ports)]
        self.columns, self.rows = columns, rows
        self.multiport = len(self.ports) > 1 or bool(self.ports[0].name) or not self.ports[0].console
        self.device_features = Feature.SIZE | (Feature.MULTIPORT if self.multiport else 0)
        self.queue_sizes = (128, 128) + ((64, 64) + (128, 128) * (len(self.ports) - 1) if self.multiport else ())
        self._messages: asyncio.Queue[bytes] = asyncio.Queue(MESSAGES_MAX)
        self._opened = asyncio.Event()

    def config(self) -> bytes:
        result: bytes = ConsoleConfig.build(
            {"cols": self.columns, "rows": self.rows, "max_nr_ports": len(self.ports), "emerg_wr": 0}
        )
        return result

    def resize(self, columns: int, rows: int) -> None:
        """The terminal changed its size (characters)."""
        self.columns, self.rows = columns, rows
        self.config_changed()
        if self.is_active and self.active.features & Feature.MULTIPORT:
            for index, port in enumerate(self.ports):
                if port.console:
                    self._send(index, Control.RESIZE, 0, _resize.pack(columns, rows))

    def started(self, active: Activation) -> None:
        self._messages = asyncio.Queue(MESSAGES_MAX)
        self._opened = asyncio.Event()
        multiport = bool(active.features & Feature.MULTIPORT)
        if multiport:
            self.spawn(self._send_control(active.queues[2]), "control-receive")
            self.spawn(self._control(active.queues[3]), "control-transmit")
        for index, port in enumerate(self.ports if multiport else self.ports[:1]):
            first = 0 if index == 0 else 2 * index + 2  # 5.3.2: 0 and 1 are port 0's, 2 and 3 control, then port 1's
            self.spawn(self._receive(port, active.queues[first], not multiport), f"receive-{index}")
            self.spawn(self._transmit(port, active.queues[first + 1]), f"transmit-{index}")

    def stopped(self) -> bool:
        for port in self.ports:
            port.open = False
        return True

    async def aclose(self) -> None:
        await super().aclose()
        for port in self.ports:
            await port.backend.aclose()

    def save_device(self) -> State:
        return {
            "version": 1,
            "open": [port.open for port in self.ports],
            "columns": self.columns,
            "rows": self.rows,
        }

    def restore_device(self, state: State) -> None:
        self.columns, self.rows = state["columns"], state["rows"]
        for port, is_open in zip(self.ports, state["open"], strict=True):
            port.open = is_open

    # Data (5.3.6)

    async def _transmit(self, port: Port, queue: Queue) -> None:
        async for chain in queue:
            length = chain.readable_length
            at = 0
            while length - at > CHUNK:  # a chain may be 4 GiB long: never all of it at once
                await port.backend.write(chain.read(CHUNK, at))
                at += CHUNK
            data = chain.read(CHUNK, at)
            queue.complete(chain, 0)
            if data:
                await port.backend.write(data)

    async def _receive(self, port: Port, queue: Queue, always_open: bool) -> None:
        while True:
            while not (port.open or always_open):
                self._opened.clear()
                await self._opened.wait()
            data = await port.backend.read()
            while data:
                chain = await anext(queue)
                data = data[chain.write(data) :]
                queue.complete(chain)

    # Control (5.3.6.2)

    def _send(self, port: int, event: Control, value: int, data: bytes = b"") -> None:
        try:
            self._messages.put_nowait(_control.pack(port, event, value) + data)
        except asyncio.QueueFull:
            return  # the driver asks and asks, and takes no answers

    async def _send_control(self, queue: Queue) -> None:
        while True:
            message = await self._messages.get()
            chain = await anext(queue)
            # 5.3.6.2.1: "the device MUST" give the driver whole messages: one that does not fit is cut by the
            # buffer
            chain.write(message)
            queue.complete(chain)

    async def _control(self, queue: Queue) -> None:
        async for chain in queue:
            message = chain.read(_control.size)
            queue.complete(chain, 0)
            if len(message) == _control.size:
                self._control_message(*_control.unpack(message))

    def _control_message(self, index: int, event: int, value: int) -> None:
        if event == Control.DEVICE_READY and value:
            # 5.3.6.2: "the device ... sends a PORT_ADD"(VIRTIO_CONSOLE_DEVICE_ADD) for each port it has
            for number in range(len(self.ports)):
                self._send(number, Control.DEVICE_ADD, 1)
            return
        if index >= len(self.ports):
            return
        port = self.ports[index]
        if event == Control.PORT_READY and value:
            if port.console:
                self._send(index, Control.CONSOLE_PORT, 1)
                self._send(index, Control.RESIZE, 0, _resize.pack(self.columns, self.rows))
            if port.name:
                self._send(index, Control.PORT_NAME, 1, port.name.encode() + b"\0")
            self._send(index, Control.PORT_OPEN, 1)
        elif event == Control.PORT_OPEN:
            port.open = bool(value)
            if port.open:
                self._opened.set()
