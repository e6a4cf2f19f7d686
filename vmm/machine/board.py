"""What devices are plugged into (vmm.machine.interfaces.Board): buses, interrupts, clock, chance, requests.

Hands the three kinds of access to the core and keeps the tags by which posted writes come back. An exception in any
callback that starts here ends this machine alone, through `fail`. Loop thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from cpu.contract import Shadow, Space, Vm
from vmm.errors import StateError
from vmm.machine.bus import Bus, BusDevice
from vmm.machine.clock import MachineClock
from vmm.machine.interfaces import PostedDevice
from vmm.machine.lines import InterruptLines, Line

if TYPE_CHECKING:
    from virtio.protocols import RandomSource

Action = Literal["shutdown", "reset", "crash"]
PostedHandler = Callable[[int, bytes], None]
RequestHandler = Callable[[Action, str, int | None], None]


class MachineBoard:
    """The board around one core VM."""

    def __init__(
        self,
        vm: Vm,
        loop: asyncio.AbstractEventLoop,
        *,
        epoch_ns: int,
        random: RandomSource,
        virtual_clock: bool,
        request: RequestHandler,
        fail: Callable[[BaseException], None],
    ) -> None:
        self._vm = vm
        self._loop = loop
        self._virtual = virtual_clock
        self.fail = fail
        self.clock = MachineClock(vm, epoch_ns)
        self.random = random
        self.ports = Bus("port", 1 << 16)
        self.mmio = Bus("MMIO", 1 << 52)
        self._buses = (self.ports, self.mmio)
        self.lines = InterruptLines(vm.set_irq)
        self.signal_msi: Callable[[int, int], None] = vm.signal_msi
        self.request = request
        self.stall: Callable[[], Callable[[], None]] = _no_vcpu
        """Set by the dispatcher: its `stall`."""
        self.posted: dict[int, PostedHandler] = {}
        """Handlers of posted writes by their tags, for the dispatcher."""
        self._tags: dict[tuple[Literal["post", "shadow"], Space, int, int], int] = {}
        self._free: list[int] = []
        self._next_tag = 1
        self._undo: list[Callable[[], None]] = []

    def irq_line(self, gsi: int) -> Line:
        return self.lines.line(gsi)

    def map(self, space: Space, address: int, size: int, device: BusDevice, name: str) -> None:
        self._buses[space].add(address, size, device, name)

    def unmap(self, space: Space, address: int) -> None:
        self._buses[space].remove(address)

    def post(self, space: Space, address: int, size: int, device: PostedDevice, offset: int) -> None:
        tag = self._add_tag("post", space, address, size, partial(device.posted, offset))
        self._vm.add_posted(space, address, size, tag)

    def unpost(self, space: Space, address: int, size: int) -> None:
        self._vm.remove_posted(space, address, size)
        self._drop_tag("post", space, address, size)

    def shadow(self, space: Space, address: int, size: int, notice: Callable[[], None] | None = None) -> Shadow:
        if notice is None:
            return self._vm.add_shadow(space, address, size)
        called = notice

        def handle(_size: int, _data: bytes) -> None:
            called()

        return self._vm.add_shadow(space, address, size, self._add_tag("shadow", space, address, size, handle))

    def unshadow(self, space: Space, address: int, size: int) -> None:
        self._vm.remove_shadow(space, address, size)
        self._drop_tag("shadow", space, address, size)

    def ioeventfd(
        self,
        space: Space,
        address: int,
        size: int,
        match: int | None,
        callback: Callable[[], None],
        answerer: object = None,
    ) -> Callable[[], None]:
        """With a virtual clock the write is posted instead, so that the run stays a function of its inputs."""
        if self._virtual:
            return self._posted_doorbell(space, address, size, match, callback)
        descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

        def ready() -> None:
            try:
                os.eventfd_read(descriptor)
                callback()
            except BlockingIOError:
                pass
            except Exception as error:
                self.fail(error)

        def undo() -> None:
            if undo in self._undo:
                self._undo.remove(undo)
                self._loop.remove_reader(descriptor)
                try:
                    self._vm.remove_ioeventfd(descriptor, space, address, size, match)
                finally:
                    os.close(descriptor)

        try:
            self._vm.add_ioeventfd(descriptor, space, address, size, match, answerer)
        except BaseException:
            os.close(descriptor)
            raise
        self._loop.add_reader(descriptor, ready)
        self._undo.append(undo)
        return undo

    def _posted_doorbell(
        self, space: Space, address: int, size: int, match: int | None, callback: Callable[[], None]
    ) -> Callable[[], None]:
        def handle(width: int, data: bytes) -> None:
            wanted = None if match is None else match.to_bytes(width, "little")
            if wanted is None or any(data[at : at + width] == wanted for at in range(0, len(data), width)):
                callback()

        doorbells = self._doorbells(space, address, size)
        doorbells.append(handle)

        def undo() -> None:
            if handle in doorbells:
                doorbells.remove(handle)
                if not doorbells:
                    self.unpost(space, address, size)

        return undo

    def _doorbells(self, space: Space, address: int, size: int) -> list[PostedHandler]:
        """The handlers of one posted doorbell, which is made when the first is added."""
        tag = self._tags.get(("post", space, address, size))
        if tag is not None:
            return self.posted[tag].handlers  # type: ignore[attr-defined,no-any-return]
        fan = _Fan()
        self._vm.add_posted(space, address, size, self._add_tag("post", space, address, size, fan))
        return fan.handlers

    def _add_tag(
        self, kind: Literal["post", "shadow"], space: Space, address: int, size: int, handler: PostedHandler
    ) -> int:
        key = (kind, space, address, size)
        if key in self._tags:
            raise StateError(f"{kind} of {size} bytes at {space.name} {address:#x} exists already")
        if self._free:
            tag = self._free.pop()
        else:
            tag = self._next_tag
            self._next_tag += 1
        self._tags[key] = tag
        self.posted[tag] = handler
        return tag

    def _drop_tag(self, kind: Literal["post", "shadow"], space: Space, address: int, size: int) -> None:
        tag = self._tags.pop((kind, space, address, size), None)
        if tag is not None:
            # Writes under this tag may still be on their way; the dispatcher ignores tags without a handler. A tag
            # is used again only after as many others, so that such a straggler does not reach a new owner.
            del self.posted[tag]
            self._free.insert(0, tag)

    def close(self) -> None:
        """Take back every ioeventfd; a device that interrupts while it closes is not heard. The core may be closed
        already. Idempotent."""
        self.lines.disconnect()
        self.signal_msi = _unheard
        for undo in tuple(self._undo):
            try:
                undo()
            except Exception:  # the core is gone, or never took it: the descriptor is closed all the same
                pass
        self.posted.clear()


def _unheard(address: int, data: int) -> None:
    """signal_msi of a machine that closes."""


def _no_vcpu() -> Callable[[], None]:
    """stall of a machine that has no dispatcher yet."""
    raise StateError("no vCPU runs")


class _Fan:
    """A posted handler that calls several."""

    def __init__(self) -> None:
        self.handlers: list[PostedHandler] = []

    def __call__(self, size: int, data: bytes) -> None:
        for handler in tuple(self.handlers):
            handler(size, data)
