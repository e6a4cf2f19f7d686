"""The base of every virtio device (virtio 1.2, 2): what a transport asks of it, and what it gets when it is
active.

A device states its type, features, queue sizes and configuration space. It has no memory and no interrupts
until the driver has set DRIVER_OK and `activate` gave it both; after `reset` it has neither again. A device
whose work is one coroutine only writes `serve`; one that works in batches overrides `queue_notified`. Loop
thread only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from virtio.errors import GuestError, HostError, StateError
from virtio.limits import LoopClock
from virtio.protocols import DeviceClock, DmaMemory, Interrupts
from virtio.queue import Queue
from virtio.state import NoState

log = logging.getLogger(__name__)

FAULTS_LOGGED = 8
"""Log at most this many faults per device, and as many mistakes; later ones at DEBUG. A driver that resets the device
can make any number."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What an active device has. `features` are the negotiated ones (2.2)."""

    features: int
    queues: Sequence[Queue]
    interrupts: Interrupts
    fault: Callable[[Exception], None]
    """Tell the transport that the driver (GuestError) or the host broke this device: DEVICE_NEEDS_RESET."""


class Device:
    """One virtio device. Subclasses set the attributes and override what they need."""

    device_id: int = 0
    """5: virtio device ID."""
    device_features: int = 0
    """Bits of this device type (0 to 23, 50 to 127); ring and transport features are the transport's."""
    queue_sizes: Sequence[int] = (128,)
    """The largest size of each queue, powers of two."""
    feature_requirements: Mapping[int, int] = {}
    """A feature of this device type -> the features without which it means nothing (for instance 5.1.3.1)."""

    def __init__(self) -> None:
        self._active: Activation | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._due: set[tuple[Callable[..., object], tuple[object, ...]]] = set()
        self._config_listener: Callable[[], None] | None = None
        self.synchronous = False
        """Requests are answered before the driver runs on, however long that takes: for a guest whose time stands still
        meanwhile, and whose run is to depend on nothing else. Set before the device is active."""
        self.clock: DeviceClock = LoopClock()
        """The time by which a device does what it does later. Set before the device is active."""
        self.memory: DmaMemory | None = None
        """The guest's, from the time when the device has a transport."""
        self._paused = False
        self._broken = False
        self._progress = asyncio.Event()
        self._mistakes = 0

    # What a subclass may override.

    def config(self) -> bytes:
        """The device-specific configuration space (2.5)."""
        return b""

    def negotiated(self, features: int) -> None:
        """FEATURES_OK was accepted for these (2.2); the driver may read what depends on them before DRIVER_OK."""

    def config_written(self, offset: int, data: bytes) -> None:
        """The driver wrote there; what is not writable is ignored."""

    async def serve(self, queues: Sequence[Queue]) -> None:
        """The device's work, from DRIVER_OK until the reset that cancels it."""

    def started(self, active: Activation) -> None:
        """DRIVER_OK: by default `serve` runs."""
        self.spawn(self.serve(active.queues), "serve")

    def stopped(self) -> bool:
        """The driver resets the device: nothing may touch guest memory from now on. Tasks are cancelled
        already. It does not wait.

        False if something still does (a system call that runs); `idle` then says when it is over."""
        return True

    def idle(self) -> bool:
        """Nothing that was taken from a queue is still being worked on."""
        return True

    async def settle(self) -> None:
        """Wait until `idle`, or until it is active again."""

    def queue_notified(self, index: int) -> None:
        """Available buffer notification (2.3)."""
        self.active.queues[index].wake()

    def answerer(self, index: int) -> object | None:
        """A capsule (native/answerer.h) that may answer what comes in this queue on the thread of the vCPU that
        notified it, while `queue_message` has told the device how to interrupt; None: there is no such way."""
        return None

    def queue_message(self, index: int, message: tuple[int, int] | None) -> None:
        """The queue's interrupt is this message signalled one now: (address, data); None: only the transport can
        send it. For devices with answerers."""

    state_type: type = NoState
    """The dataclass of what `save_device` returns: virtio/state.py says how it is declared."""

    def save_device(self) -> Any:
        """What survives besides the rings, a `state_type`; requests are drained."""
        return self.state_type()

    def restore_device(self, state: Any) -> None:
        """Take over a `state_type`, before `activate`. Raises StateError, and changes nothing then."""

    async def aclose(self) -> None:
        """Give up backends and descriptors."""
        self.deactivate()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What a subclass uses.

    @property
    def active(self) -> Activation:
        """What the device has while it is active; StateError otherwise."""
        if self._active is None:
            raise StateError("the device is not active")
        return self._active

    @property
    def is_active(self) -> bool:
        """The driver has set DRIVER_OK and the device was not reset since."""
        return self._active is not None

    @property
    def paused(self) -> bool:
        """Take no chains: the machine is paused, or the device needs a reset."""
        return self._paused or self._broken

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a coroutine until it ends or the device is reset. Its errors are this device's fault state."""
        task = asyncio.get_running_loop().create_task(work, name=f"{type(self).__name__}.{name}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._task_done, self._active))
        return task

    def guarded(self, call: Callable[..., object], *args: object) -> None:
        """Run a loop callback of an active device: a GuestError is its fault state; nothing after a reset."""
        active = self._active
        if active is None:
            return
        try:
            call(*args)
        except GuestError as error:
            active.fault(error)

    def next_turn(self, call: Callable[..., object], *arguments: object) -> None:
        """`guarded` in the loop's next turn, if the device is active then. However often a driver's notifications ask
        for it, there is one call."""
        due = call, arguments
        if due not in self._due:
            self._due.add(due)
            asyncio.get_running_loop().call_soon(self._run_due, self._active, due)

    def is_due(self, call: Callable[..., object], *arguments: object) -> bool:
        """Whether `next_turn` will make this call, so that there is nothing to do until then."""
        return (call, arguments) in self._due

    def config_changed(self) -> None:
        """Configuration space changed: generation count and configuration change notification (2.5, 2.3)."""
        if self._config_listener is not None:
            self._config_listener()

    # What a transport calls.

    def on_config_change(self, listener: Callable[[], None]) -> None:
        """The transport's: call this when the configuration space has changed."""
        self._config_listener = listener

    def activate(self, active: Activation) -> None:
        """The driver has set DRIVER_OK: `serve` begins."""
        self._active = active
        self._broken = False
        for queue in active.queues:
            queue.paused = self._paused
            queue.fair = not self.synchronous
        self.started(active)

    def needs_reset(self) -> None:
        """The device is broken: it takes no chain from any queue until the driver resets it."""
        self._broken = True
        for queue in self._active.queues if self._active else ():
            queue.paused = True
        self._progress.set()

    def deactivate(self) -> bool:
        """Abandon everything (2.4). True: nothing touches guest memory any more."""
        active, self._active = self._active, None
        self._progress.set()
        self._due.clear()
        for task in tuple(self._tasks):
            task.cancel()
        if active is None:
            return self.idle()
        for queue in active.queues:
            queue.close()
        return self.stopped()

    def pause(self) -> None:
        """Take no more chains until `resume`."""
        self._paused = True
        for queue in self._active.queues if self._active else ():
            queue.paused = True

    def resume(self) -> None:
        """After `pause`: take requests again."""
        self._paused = False
        for queue in self._active.queues if self._active else ():
            queue.paused = self._broken
            queue.on_push = None
            if queue.enabled and not self._broken:
                self.queue_notified(queue.index)

    def memory_came(self) -> None:
        """Pages of guest memory that a queue waits for may have come: it is looked at again."""
        for queue in self._active.queues if self._active is not None and not self.paused else ():
            if queue.look_again():
                self.guarded(self.queue_notified, queue.index)

    async def quiesce(self) -> None:
        """Pause, and wait until every chain taken is returned; not if the device is reset, or needs to be. A device
        takes no chain that it cannot answer soon."""
        self.pause()
        while self._active is not None and not self._broken and any(queue.in_flight for queue in self._active.queues):
            for queue in self._active.queues:
                queue.on_push = self._progress.set
            self._progress.clear()
            await self._progress.wait()

    def progressed(self) -> None:
        """A subclass returned chains without `Queue.push`."""
        self._progress.set()

    def _run_due(self, active: Activation | None, due: tuple[Callable[..., object], tuple[object, ...]]) -> None:
        if self._active is active:
            self._due.discard(due)
            self.guarded(due[0], *due[1])

    def _task_done(self, active: Activation | None, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        if active is None or self._active is not active:  # also if the driver has set the device up again since
            if not isinstance(error, (GuestError, StateError)):
                self._mistake("%s failed after its reset", task, error)
        elif isinstance(error, Exception):
            if not isinstance(error, (GuestError, HostError)):
                self._mistake("%s failed", task, error)
            active.fault(error)

    def _mistake(self, what: str, task: asyncio.Task[None], error: BaseException) -> None:
        self._mistakes += 1
        level = logging.ERROR if self._mistakes <= FAULTS_LOGGED else logging.DEBUG
        log.log(level, what, task.get_name(), exc_info=error)
