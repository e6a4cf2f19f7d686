"""What both transports share: device status, feature negotiation, queue configuration (virtio 1.2, 2.1 to
2.4, 3.1).

Sans-I/O: register accesses come in as method calls, interrupts go out through the two abstract methods of a
subclass. The state machine is TRANSITIONS: illegal input changes nothing. Loop thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from virtio import _ring
from virtio.constants import DEVICE_FEATURES, QUEUE_SIZE_MAX, RING_FEATURES, Feature, Status
from virtio.device import FAULTS_LOGGED, Activation, Device
from virtio.errors import ConfigError, GuestError, HostError, StateError
from virtio.protocols import DmaMemory, Ring
from virtio.queue import Queue
from virtio.state import QueueState, RingState, TransportState

log = logging.getLogger(__name__)

RingFactory = Callable[[DmaMemory, int, int, int, int, int], Ring]
"""(memory, size, descriptor area, driver area, device area, features) -> ring."""


@dataclass(slots=True)
class QueueConfig:
    """What the driver configures about a queue. Addresses are guest-physical."""

    size: int
    enabled: bool = False
    desc: int = 0
    driver: int = 0
    device: int = 0
    vector: int = 0xFFFF


def _nobody() -> None:
    """Nobody waits for a change of status."""


class Transport:
    """Base of virtio-pci and virtio-mmio."""

    QUEUES_RESTART = False
    """Whether a driver may set a queue up again that it has stopped, or not used so far, while DRIVER_OK is set."""

    # newly set bit -> bits that must be set already (3.1.1); FEATURES_OK and DRIVER_OK have an effect besides
    TRANSITIONS: dict[Status, Status] = {
        Status.ACKNOWLEDGE: Status(0),
        Status.DRIVER: Status.ACKNOWLEDGE,
        Status.FEATURES_OK: Status.ACKNOWLEDGE | Status.DRIVER,
        Status.DRIVER_OK: Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK,
        Status.FAILED: Status(0),
    }

    def __init__(
        self,
        device: Device,
        memory: DmaMemory,
        *,
        packed: bool = False,
        in_order: bool = False,
        ring_factory: RingFactory | None = None,
    ) -> None:
        self.device = device
        device.memory = memory
        self._memory = memory
        self._native: _ring.Memory | None = None
        self._ring_factory = ring_factory or self._native_ring
        features = int(device.device_features) | RING_FEATURES
        if packed:
            features |= Feature.RING_PACKED
        if in_order:
            features |= Feature.IN_ORDER
        self.features = int(features)  # not an IntFlag: their complement knows only named bits
        self._check_device()
        self._generation = 0
        self._config_seen: bytes | None = None
        self._faults = 0
        self._resetting = False
        self.on_status: Callable[[], None] = _nobody
        """Called when the driver has set a bit of the status, or a reset is complete."""
        self._clear()
        device.on_config_change(self._config_changed)

    def _check_device(self) -> None:
        """The device's declaration is one that the specification allows; ConfigError."""
        name, device = type(self.device).__name__, self.device
        if device.device_features & ~DEVICE_FEATURES:
            raise ConfigError(f"{name}: features {device.device_features & ~DEVICE_FEATURES:#x} are no device type's")
        # 2.2.2: "The device MUST NOT offer a feature which requires another feature which was not offered."
        for feature, needed in device.feature_requirements.items():
            if self.features & feature and needed & ~self.features:
                raise ConfigError(f"{name}: feature {int(feature):#x} requires feature {int(needed):#x}")
        # 4.1.4.3.1: "If VIRTIO_F_RING_PACKED has not been negotiated, the device MUST present either a value of 0 or
        # a power of 2 in queue_size."
        for size in device.queue_sizes:
            if not 0 < size <= QUEUE_SIZE_MAX or size & (size - 1):
                raise ConfigError(f"{name}: {size} is no queue size; powers of two up to {QUEUE_SIZE_MAX} are")

    def _clear(self) -> None:
        self.status = Status(0)
        self.driver_features = 0
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self.queues = [QueueConfig(size) for size in self.device.queue_sizes]
        self.active: Activation | None = None

    # Interrupts: the subclass's part.

    def signal_queue(self, index: int) -> None:
        raise NotImplementedError

    def signal_config(self) -> None:
        raise NotImplementedError

    def interrupts_reset(self) -> None:
        """Withdraw what is asserted."""
        raise NotImplementedError

    # Status (2.1)

    def read_status(self) -> int:
        if self._resetting and self.device.idle():
            self._finish_reset()
        return int(self.status)

    def write_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        if self._resetting:
            return
        for bit, needed in self.TRANSITIONS.items():
            if not value & bit or self.status & bit:
                continue
            if self.status & needed != needed:
                continue
            if bit is Status.FEATURES_OK and not self._features_acceptable():
                # 2.2.2: "otherwise it MUST fail to set the FEATURES_OK device status bit when the driver writes it."
                continue
            self.status |= bit
            if bit is Status.FEATURES_OK:
                self.device.negotiated(self.driver_features)
            if bit is Status.DRIVER_OK:
                self._activate()
            self.on_status()

    def _features_acceptable(self) -> bool:
        # 2.2.1: "The driver MUST NOT accept a feature which the device did not offer, and MUST NOT accept a feature
        # which requires another feature which was not accepted."; 6.2: "A device MAY fail to operate further if
        # VIRTIO_F_VERSION_1 is not accepted."
        if self.driver_features & ~self.features or not self.driver_features & Feature.VERSION_1:
            return False
        return not any(
            self.driver_features & feature and needed & ~self.driver_features
            for feature, needed in self.device.feature_requirements.items()
        )

    def _activate(self) -> None:
        # 2.1.2: "The device MUST NOT consume buffers or send any used buffer notifications to the driver
        # before DRIVER_OK": there are no rings before.
        try:
            queues = [
                Queue(index, self._make_ring(config) if config.enabled else None, self)
                for index, config in enumerate(self.queues)
            ]
        except GuestError as error:
            self.fault(error)
            return
        self._start(queues)

    def _make_ring(self, config: QueueConfig) -> Ring:
        return self._ring_factory(
            self._memory, config.size, config.desc, config.driver, config.device, self.driver_features
        )

    def _native_ring(self, memory: DmaMemory, size: int, desc: int, driver: int, device: int, features: int) -> Ring:
        if self._native is None:
            self._native = _ring.Memory(
                list(memory.regions()),
                *(getattr(memory, name, None) for name in ("written", "written_ranges", "missing", "want")),
            )
        return _ring.Ring(self._native, size, desc, driver, device, features)

    def _start(self, queues: list[Queue]) -> None:
        self.active = Activation(self.driver_features, queues, self, self.fault)
        self._guard(self.device.activate, self.active)

    def fault(self, error: Exception) -> None:
        """The device cannot go on until the driver resets it. Latched: notifications are ignored until
        then."""
        if self.status & Status.DEVICE_NEEDS_RESET:
            return
        self._faults += 1
        level = logging.WARNING if self._faults <= FAULTS_LOGGED else logging.DEBUG
        log.log(level, "%s needs a reset: %s", type(self.device).__name__, error)
        # 2.1.2: "The device SHOULD set DEVICE_NEEDS_RESET when it enters an error state that a reset is
        # needed."
        self.status |= Status.DEVICE_NEEDS_RESET
        self.device.needs_reset()
        if self.status & Status.DRIVER_OK:
            # 2.1.2: "If DRIVER_OK is set, after it sets DEVICE_NEEDS_RESET, the device MUST send a device
            # configuration change notification to the driver."
            self.signal_config()

    def _guard(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except (GuestError, HostError) as error:
            self.fault(error)

    def reset(self) -> None:
        """The driver wrote 0 to device status, or the machine is reset."""
        # 2.4.1: "A device MUST reinitialize device status to 0 after receiving a reset." "A device MUST NOT
        # send notifications or interact with the queues after indicating completion of the reset by
        # reinitializing device status to 0, until the driver re-initializes the device." So until nothing touches guest
        # memory any more the status stays what it is.
        done = self.device.deactivate()
        self.active = None
        self.interrupts_reset()
        self._resetting = not done
        if done:
            self._finish_reset()
        else:
            self.device.spawn(self._await_reset(), "reset")

    async def _await_reset(self) -> None:
        await self.device.settle()
        self.read_status()

    def close(self) -> None:
        """The machine has ended: its memory is not touched and no interrupt is driven from now on."""
        self.device.deactivate()
        self.active = None
        self._native = None

    def _finish_reset(self) -> None:
        self._resetting = False
        self._native = None  # keeps no part of guest memory exported while no driver is there
        self._clear()
        self.on_status()

    # Features (2.2), in words of 32 bits

    def device_feature_word(self) -> int:
        return (
            (self.features >> (32 * self.device_feature_select)) & 0xFFFFFFFF if self.device_feature_select < 4 else 0
        )

    def driver_feature_word(self) -> int:
        return (
            (self.driver_features >> (32 * self.driver_feature_select)) & 0xFFFFFFFF
            if self.driver_feature_select < 4
            else 0
        )

    def write_driver_features(self, value: int) -> None:
        # 3.1.1: feature bits are written before FEATURES_OK: "The driver MUST NOT accept new feature bits
        # after"
        if self.status & Status.FEATURES_OK or self.driver_feature_select >= 4:
            return
        shift = 32 * self.driver_feature_select
        self.driver_features = self.driver_features & ~(0xFFFFFFFF << shift) | value << shift

    # Queues

    @property
    def queue(self) -> QueueConfig | None:
        """The selected queue; None if the device has no such queue."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    def _configurable(self) -> QueueConfig | None:
        queue = self.queue
        if queue is None or self.queue_ready() or (self.status & Status.DRIVER_OK and not self.QUEUES_RESTART):
            return None
        return queue

    def set_queue_size(self, size: int) -> None:
        queue = self._configurable()
        most = self.device.queue_sizes[self.queue_select] if queue else 0
        packed = self.status & Status.FEATURES_OK and self.driver_features & Feature.RING_PACKED
        # 2.7: "Queue Size value is always a power of 2" for split; 4.1.5.1.3: the driver may only lower it
        if queue and 0 < size <= most and (packed or not size & (size - 1)):
            queue.size = size

    def set_queue_address(self, which: str, high: bool, value: int) -> None:
        queue = self._configurable()
        if queue:
            old = getattr(queue, which)
            setattr(queue, which, old & 0xFFFFFFFF | value << 32 if high else old & ~0xFFFFFFFF | value)

    def enable_queue(self) -> None:
        queue = self._configurable()
        if queue is None:
            return
        if self.active is None:
            queue.enabled = True
            return
        try:
            ring = self._make_ring(queue)
        except GuestError as error:
            self.fault(error)
            return
        queue.enabled = True
        self.active.queues[self.queue_select].restart(ring)
        self.notify(self.queue_select)

    def stop_queue(self) -> None:
        """The driver stops using the selected queue (virtio-mmio). `queue_ready` says when it is over."""
        if self.queue is None:
            return
        if self.active is None:
            self.queue.enabled = False
        else:
            self.active.queues[self.queue_select].stop()

    def queue_ready(self) -> bool:
        """Whether the selected queue is in use; until its last chain is returned when the driver stopped it."""
        if self.queue is None:
            return False
        if self.active is not None and self.active.queues[self.queue_select].stopped():
            self.queue.enabled = False
        return self.queue.enabled

    def notify(self, index: int) -> None:
        """The driver made buffers available in queue `index`."""
        active = self.active
        if active is None or index >= len(active.queues) or not active.queues[index].enabled:
            return
        if self.status & Status.DEVICE_NEEDS_RESET or self.device.paused:
            return
        self._guard(self.device.queue_notified, index)

    # Device configuration space (2.5)

    def _config(self) -> bytes:
        # 4.1.4.3.1: "The device MUST present a changed config_generation after the driver has read a device-specific
        # configuration value which has changed since any part of the device-specific configuration was last read."
        data = self.device.config()
        if self._config_seen is not None and data != self._config_seen:
            self._generation = (self._generation + 1) & 0xFFFFFFFF
        self._config_seen = data
        return data

    @property
    def config_generation(self) -> int:
        """Changes whenever the driver may have read parts of different configurations. A read of it counts as one of
        the configuration, so that it does not change between two reads without a change."""
        self._config()
        return self._generation

    def config_read_device(self, offset: int, size: int) -> int:
        data = self._config()[offset : offset + size]
        return int.from_bytes(data.ljust(size, b"\0"), "little")

    def config_write_device(self, offset: int, size: int, value: int) -> None:
        if offset + size <= len(self.device.config()):
            self._guard(self.device.config_written, offset, value.to_bytes(size, "little"))

    def _config_changed(self) -> None:
        if self.status & Status.DRIVER_OK and self.active is not None:
            self.signal_config()

    # State

    async def quiesce(self) -> None:
        """Take no more chains and wait for those in flight; then `save` may be called."""
        await self.device.quiesce()
        self._abandon_faulty()
        if self.active is None:
            await self.device.settle()
            self.read_status()

    def _abandon_faulty(self) -> None:
        """Of a device that needs a reset some chains will never be returned: all are abandoned, as by that reset."""
        if self.active is not None and self.status & Status.DEVICE_NEEDS_RESET:
            self.device.deactivate()
            self.active = None

    def resume(self) -> None:
        self._guard(self.device.resume)

    state_type: ClassVar[type[TransportState]]
    """The subclass's state."""

    def state_parts(self) -> Mapping[str, Device]:
        """The components behind the `object` fields of its state."""
        return {"device": self.device}

    def save(self) -> TransportState:
        """State of transport, rings and device; StateError while requests are in flight."""
        if self._resetting:
            raise StateError("a reset is not complete")
        self._abandon_faulty()  # the fault may have come since `quiesce`
        if self.active is None and not self.device.idle():
            raise StateError("requests are in flight")
        rings: list[RingState | None] = [None] * len(self.queues)
        for index, queue in enumerate(self.active.queues if self.active else ()):
            if queue.in_flight:
                raise StateError(f"queue {queue.index} has {queue.in_flight} requests in flight")
            self.queues[index].enabled &= not queue.stopped()
            rings[index] = RingState(**queue.ring.save()) if queue.enabled else None
        return self.state_type(
            device_id=self.device.device_id,
            status=int(self.status),
            active=self.active is not None,
            features=self.features,
            driver_features=self.driver_features,
            device_feature_select=self.device_feature_select,
            driver_feature_select=self.driver_feature_select,
            queue_select=self.queue_select,
            config_generation=self._generation,
            config_seen=self._config_seen,
            queues=tuple(
                QueueState(queue.size, queue.enabled, queue.desc, queue.driver, queue.device, queue.vector, ring)
                for queue, ring in zip(self.queues, rings, strict=True)
            ),
            device=self.device.save_device(),
            **self._save_interrupts(),
        )

    def _save_interrupts(self) -> dict[str, Any]:
        """The fields that the subclass adds."""
        raise NotImplementedError

    def restore(self, state: TransportState) -> None:
        """Into a fresh transport over the same memory contents and an equal device; it is paused until `resume`.
        StateError, before anything changes, if the state does not fit; GuestError for rings outside memory."""
        if state.device_id != self.device.device_id:
            raise StateError("the state is another device's")
        if state.features & ~self.features:
            raise StateError(f"the state needs features {state.features & ~self.features:#x}")
        # until FEATURES_OK is asked for a driver may have written anything
        if state.status & Status.FEATURES_OK and state.driver_features & ~state.features:
            raise StateError("the driver has features that were not offered")
        if len(state.queues) != len(self.queues):
            raise StateError("the state has another number of queues")
        for queue, ours in zip(state.queues, self.device.queue_sizes, strict=True):
            if queue.size > ours:
                raise StateError(f"a queue of {queue.size} entries; this device has {ours} at most")
            if queue.ring is not None and not (state.active and queue.enabled):
                raise StateError("a queue that is not enabled has a ring")
        if state.active and not state.status & Status.DRIVER_OK:
            raise StateError("the device is active without DRIVER_OK")
        rings = self._restored_rings(state) if state.active else None
        self.device.restore_device(state.device)
        self.features = state.features
        self.status = Status(state.status)
        self.driver_features = state.driver_features
        self.device_feature_select = state.device_feature_select
        self.driver_feature_select = state.driver_feature_select
        self.queue_select = state.queue_select
        self._generation = state.config_generation
        self._config_seen = state.config_seen
        self.queues = [
            QueueConfig(queue.size, queue.enabled, queue.desc, queue.driver, queue.device, queue.vector)
            for queue in state.queues
        ]
        self.device.pause()
        if rings is not None:
            self._start([Queue(index, ring, self) for index, ring in enumerate(rings)])

    def _restored_rings(self, state: TransportState) -> list[Ring | None]:
        """The rings of an active device, at their positions. StateError."""
        rings: list[Ring | None] = []
        for index, queue in enumerate(state.queues):
            if queue.ring is None:
                rings.append(None)
                continue
            try:
                ring = self._ring_factory(
                    self._memory, queue.size, queue.desc, queue.driver, queue.device, state.driver_features
                )
                ring.restore(**asdict(queue.ring))
            except (GuestError, ValueError) as error:
                raise StateError(f"queue {index}: {error}") from error
            rings.append(ring)
        return rings
