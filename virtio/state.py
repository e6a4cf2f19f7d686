"""What virtio's parts save: declarations of their states, as plain dataclasses.

The annotations say what a value may be: `Annotated[int, range(…)]` is an integer and its bounds, `Annotated[bytes,
range(…)]` bytes and how many there may be. Whoever stores states reads them off; nothing here knows how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from virtio.constants import QUEUE_SIZE_MAX

U8 = Annotated[int, range(1 << 8)]
U16 = Annotated[int, range(1 << 16)]
U32 = Annotated[int, range(1 << 32)]
U64 = Annotated[int, range(1 << 64)]
"""Integers by their width in bits, as in cpu/values.py: neither package imports the other."""
MAX_QUEUES = 1024


@dataclass(frozen=True, slots=True)
class RingState:
    """Where a ring goes on (2.7, 2.8); the wrap counters are the packed ring's."""

    next_avail: U16
    next_used: U16
    avail_wrap: bool
    used_wrap: bool


@dataclass(frozen=True, slots=True)
class QueueState:
    """What the driver configured of a queue. Addresses are guest-physical."""

    size: Annotated[int, range(QUEUE_SIZE_MAX + 1)]
    enabled: bool
    desc: U64
    driver: U64
    device: U64
    vector: U16
    ring: RingState | None
    """None while the device is not active, or the queue not enabled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportState:
    """A transport, its rings and the device behind it."""

    device_id: U32
    status: U8
    active: bool
    """The driver has set DRIVER_OK, and the device works on its queues."""
    features: Annotated[int, range(1 << 128)]
    driver_features: Annotated[int, range(1 << 128)]
    device_feature_select: U32
    driver_feature_select: U32
    queue_select: U32
    config_generation: U32
    config_seen: Annotated[bytes, range(4097)] | None
    queues: Annotated[tuple[QueueState, ...], range(MAX_QUEUES + 1)]
    device: object


@dataclass(frozen=True, slots=True)
class NoState:
    """A device that keeps nothing besides its rings."""

    kind: ClassVar = "virtio-device"
    version: ClassVar = 1
