"""Console device (virtio 1.2, 5.3): one console, or several named ports with a control queue. Loop thread
only."""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from virtio.backends.char import CHUNK, INPUT_MAX, CharBackend
from virtio.constants import DeviceId
from virtio.device import Activation, Device
from virtio.errors import HostError, StateError
from virtio.layouts import ConsoleConfig, ConsoleControl, ConsoleResize, fast
from virtio.queue import Queue
from virtio.state import U16
from virtio.trust import Backend


class ConsoleFeature(enum.IntFlag):
    """5.3.3"""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1


class ControlEvent(enum.IntEnum):
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
    input: bytearray = field(default_factory=bytearray)
    """Read from the backend, not yet in the driver's buffers."""


@dataclass(frozen=True, slots=True)
class PortState:
    """One port: whether the driver opened it, and input that it has not got yet."""

    open: bool
    input: Annotated[bytes, range(INPUT_MAX + 1)]


@dataclass(frozen=True, slots=True)
class ConsoleState:
    """A console: control messages that wait for the driver, ports, the terminal's size in characters."""

    kind: ClassVar = "virtio-console"
    version: ClassVar = 1
    announced: bool
    messages: Annotated[tuple[bytes, ...], range(MESSAGES_MAX + 1)]
    ports: Annotated[tuple[PortState, ...], range(512)]
    columns: U16
    rows: U16


class ConsoleDevice(Device):
    """`ports`: the first is port 0. With one nameless console port there is no control queue."""

    device_id = DeviceId.CONSOLE
    state_type = ConsoleState

    def __init__(self, ports: Sequence[Port] | CharBackend, *, columns: int = 80, rows: int = 25) -> None:
        super().__init__()
        self.ports = list(ports) if isinstance(ports, Sequence) else [Port(ports)]
        self._backends = {id(port): Backend(port.backend, "console backend") for port in self.ports}
        self.columns, self.rows = columns, rows
        self.multiport = len(self.ports) > 1 or bool(self.ports[0].name) or not self.ports[0].console
        self.device_features = ConsoleFeature.SIZE | (ConsoleFeature.MULTIPORT if self.multiport else 0)
        self.queue_sizes = (128, 128) + ((64, 64) + (128, 128) * (len(self.ports) - 1) if self.multiport else ())
        self._messages: deque[bytes] = deque()
        self._message = asyncio.Event()
        self._announced = False
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
        if self.is_active and self.active.features & ConsoleFeature.MULTIPORT:
            for index, port in enumerate(self.ports):
                if port.console:
                    self._send(index, ControlEvent.RESIZE, 0, _resize.pack(columns, rows))

    def started(self, active: Activation) -> None:
        multiport = bool(active.features & ConsoleFeature.MULTIPORT)
        if multiport:
            self.spawn(self._send_control(active.queues[2]), "control-receive")
            self.spawn(self._control(active.queues[3]), "control-transmit")
        for index, port in enumerate(self.ports if multiport else self.ports[:1]):
            first = 0 if index == 0 else 2 * index + 2  # 5.3.2: 0 and 1 are port 0's, 2 and 3 control, then port 1's
            self.spawn(self._receive(port, active.queues[first], not multiport), f"receive-{index}")
            self.spawn(self._transmit(port, active.queues[first + 1]), f"transmit-{index}")

    def stopped(self) -> bool:
        self._messages.clear()
        self._announced = False
        for port in self.ports:
            port.open = False
        return True

    async def aclose(self) -> None:
        await super().aclose()
        for port in self.ports:
            await port.backend.aclose()

    def save_device(self) -> ConsoleState:
        return ConsoleState(
            self._announced,
            tuple(self._messages),
            tuple(PortState(port.open, bytes(port.input)) for port in self.ports),
            self.columns,
            self.rows,
        )

    def restore_device(self, state: ConsoleState) -> None:
        if len(state.ports) != len(self.ports):
            raise StateError(f"the state has {len(state.ports)} console ports, the device {len(self.ports)}")
        self.columns, self.rows = state.columns, state.rows
        self._announced = state.announced
        self._messages = deque(state.messages)
        for port, saved in zip(self.ports, state.ports, strict=True):
            port.open, port.input = saved.open, bytearray(saved.input)

    # Data (5.3.6)

    async def _transmit(self, port: Port, queue: Queue) -> None:
        async for chain in queue:
            length = chain.readable_length
            at = 0
            while length - at > CHUNK:  # a chain may be 4 GiB long: take it in pieces
                await self._write(port, chain.read(CHUNK, at))
                at += CHUNK
                await asyncio.sleep(0)  # and let others have a turn
            if length > at:
                await self._write(port, chain.read(CHUNK, at))
            queue.complete(chain, 0)

    async def _write(self, port: Port, data: bytes) -> None:
        try:
            await self._backends[id(port)].call(port.backend.write, data)
        except (OSError, HostError) as error:  # the output is lost; 5.3.6 knows no answer that would say so
            self._backends[id(port)].warn(error)

    async def _read(self, port: Port) -> bool:
        """False: no more input will come."""
        backend = self._backends[id(port)]
        try:
            data = backend.sized(port.backend.read, await backend.call(port.backend.read), 0, INPUT_MAX)
        except (OSError, HostError) as error:
            backend.warn(error)
            return False
        port.input = bytearray(data)
        return bool(data)

    async def _receive(self, port: Port, queue: Queue, always_open: bool) -> None:
        while True:
            while not (port.open or always_open):
                self._opened.clear()
                await self._opened.wait()
            if not port.input:
                if not await self._read(port):
                    return
                continue  # a driver that closed the port meanwhile would throw it away
            chain = await anext(queue)
            if not (port.open or always_open):
                queue.ring.undo_pop(chain)
                continue
            del port.input[: chain.write(port.input)]
            queue.complete(chain)

    # Control (5.3.6.2)

    def _send(self, port: int, event: ControlEvent, value: int, data: bytes = b"") -> None:
        if len(self._messages) >= MESSAGES_MAX:
            return  # the driver asks and asks, and takes no answers
        self._messages.append(_control.pack(port, event, value) + data)
        self._message.set()

    async def _send_control(self, queue: Queue) -> None:
        while True:
            while not self._messages:
                self._message.clear()
                await self._message.wait()
            chain = await anext(queue)
            chain.write(self._messages.popleft())  # one that does not fit is cut by the buffer
            queue.complete(chain)

    async def _control(self, queue: Queue) -> None:
        async for chain in queue:
            message = chain.read(_control.size)
            queue.complete(chain, 0)
            if len(message) == _control.size:
                self._control_message(*_control.unpack(message))

    def _control_message(self, index: int, event: int, value: int) -> None:
        if event == ControlEvent.DEVICE_READY:
            # 5.3.6.2.1: "The device MUST NOT specify a port which exists in a VIRTIO_CONSOLE_DEVICE_ADD message, nor a
            # port which is equal or greater than max_nr_ports."
            if value and not self._announced:
                self._announced = True
                for number in range(len(self.ports)):
                    self._send(number, ControlEvent.DEVICE_ADD, 1)
            return
        if index >= len(self.ports):
            return
        port = self.ports[index]
        if event == ControlEvent.PORT_READY and value:
            if port.console:
                self._send(index, ControlEvent.CONSOLE_PORT, 1)
                self._send(index, ControlEvent.RESIZE, 0, _resize.pack(self.columns, self.rows))
            if port.name:
                # 5.3.6.2: "the UTF-8 name of the port for identification within the guest (without a NUL terminator)"
                self._send(index, ControlEvent.PORT_NAME, 1, port.name.encode())
            self._send(index, ControlEvent.PORT_OPEN, 1)
        elif event == ControlEvent.PORT_OPEN:
            port.open = bool(value)
            if port.open:
                self._opened.set()
