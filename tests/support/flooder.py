"""A driver that floods a virtio device, in a process of its own, as a guest's vCPU runs beside the loop and not in it.

Guest memory is shared between the processes, notifications are eventfds; what goes through registers is done by the
parent, as an exit of a vCPU would be. The child lays the queues out, then fills them with requests of one kind as fast
as it can, until told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.support.virtio import BASE, MmioDriver
from virtio.constants import Feature, Status
from virtio.device import Device
from virtio.driver import Allocator, AnyDriverQueue, Buffer, driver_queue
from virtio.fake import FakeMemory

MEMORY = 16 << 20
QUEUES_MAX = 16
Shape = tuple[int, Sequence[Buffer], Sequence[Buffer]]
"""queue, device-readable buffers, device-writable buffers: one request, which may be made again and again."""


class SharedMemory(FakeMemory):
    """Guest memory that a child process shares (mmap is MAP_SHARED unless told otherwise)."""

    def __init__(self) -> None:
        super().__init__(MEMORY, BASE)
        self.buffer.write(bytes(MEMORY))  # touched now, so that the process's size is not the driver's affair

    def written(self, gpa: int, length: int) -> None:
        return None


class Child:
    """The driver's side, in the child."""

    def __init__(self, memory: SharedMemory, allocator: Allocator, doorbells: Sequence[int]) -> None:
        self.memory = memory
        self.allocator = allocator
        self.doorbells = doorbells
        self.queues: list[AnyDriverQueue] = []

    def buffer(self, data: bytes | int) -> Buffer:
        """A buffer with these bytes, or of that many zeroes."""
        if isinstance(data, int):
            return self.allocator.take(data), data
        return self.allocator.put(data), len(data)

    def lay_out(self, features: int, sizes: Sequence[int]) -> None:
        self.allocator.free_all()
        self.queues = [driver_queue(self.allocator, size, features) for size in sizes]

    def flood(self, shapes: Sequence[Shape], over: Callable[[], bool]) -> None:
        """Make these requests in turn until `over`. A queue that is full is waited for a moment and then passed."""
        while not over():
            added = 0
            for index, readable, writable in shapes:
                queue = self.queues[index]
                with contextlib.suppress(MemoryError, KeyError, IndexError):
                    queue.used()
                    queue.add(readable, writable)
                    added += 1
                if queue.needs_notification() or not added:
                    os.eventfd_write(self.doorbells[index], 1)
            if not added:
                time.sleep(0.0002)


Kind = Callable[[Child], Sequence[Shape]]


class Flooder:
    """In `with`: the child. Made before the loop runs, since it forks."""

    def __init__(self, kinds: dict[str, Kind]) -> None:
        self.kinds = kinds
        self.memory = SharedMemory()
        self.doorbells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(QUEUES_MAX)]
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._socket.close()
                self._serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._socket.setblocking(False)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._socket.close()
        for doorbell in self.doorbells:
            os.close(doorbell)

    # the child

    def _serve(self, control: socket.socket) -> None:
        start = self.memory.base
        child = Child(self.memory, Allocator(self.memory, start, start + MEMORY), self.doorbells)
        while order := control.recv(65536):
            values = json.loads(order)
            child.lay_out(values["features"], values["sizes"])
            shapes = self.kinds[values["kind"]](child)
            control.send(b"laid out")
            control.recv(64)
            control.setblocking(False)

            def over() -> bool:
                try:
                    return bool(control.recv(64)) or True
                except BlockingIOError:
                    return False

            child.flood(shapes, over)
            control.setblocking(True)
            control.send(b"stopped")

    # the parent

    async def begin(self, driver: MmioDriver, kind: str) -> None:
        """Set the device up for the child, as exits of a vCPU do: one register access in a turn of the loop. It floods
        the device from then on."""
        loop = asyncio.get_running_loop()
        for value in (0, Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER):
            await asyncio.sleep(0)
            driver.write_status(value)
        driver.features = driver.read_features() & ~int(Feature.RING_PACKED)
        driver.write_features(driver.features)
        driver.write_status(driver.read_status() | Status.FEATURES_OK)
        assert driver.read_status() & Status.FEATURES_OK
        driver.allocator.free_all()
        driver.queues = []
        sizes = []
        while size := driver.queue_size_max(len(sizes)):
            sizes.append(size)
            driver.queues.append(driver_queue(driver.allocator, size, driver.features))
            driver.configure_queue(len(sizes) - 1, driver.queues[-1])
            await asyncio.sleep(0)
        order: dict[str, Any] = {"features": driver.features, "sizes": sizes, "kind": kind}
        await loop.sock_sendall(self._socket, json.dumps(order).encode())
        assert await loop.sock_recv(self._socket, 64) == b"laid out"
        driver.write_status(driver.read_status() | Status.DRIVER_OK)
        await loop.sock_sendall(self._socket, b"go")

    async def stop(self) -> None:
        """The child floods no more."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, b"stop")
        assert await loop.sock_recv(self._socket, 64) == b"stopped"

    def driver(self, device: Device) -> MmioDriver:
        """The parent's part of the driver: registers, and the notifications that the child sends."""
        driver = MmioDriver(device, self.memory)
        loop = asyncio.get_running_loop()

        def rung(index: int) -> None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.doorbells[index])
                driver.transport.notify(index)

        for index in range(len(device.queue_sizes)):
            loop.add_reader(self.doorbells[index], rung, index)
        return driver

    def unplug(self) -> None:
        loop = asyncio.get_running_loop()
        for doorbell in self.doorbells:
            loop.remove_reader(doorbell)
