"""Numbers of virtio 1.2 that more than one module needs. Device-specific ones stand in the device's
module."""

from __future__ import annotations

import enum


class Status(enum.IntFlag):
    """Device status field (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


class Feature(enum.IntFlag):
    """Reserved feature bits (6)."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36


class DeviceId(enum.IntEnum):
    """Device types (5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    SOCKET = 19
    FS = 26


DEVICE_FEATURES = (1 << 24) - 1 | (1 << 128) - (1 << 50)
"""2.2: bits 0 to 23 and 50 to 127 are the device type's."""

QUEUE_SIZE_MAX = 32768
"""2.7, 2.8: the maximum Queue Size value."""

RING_FEATURES = Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.VERSION_1
"""What every device offers. RING_PACKED and IN_ORDER are the embedder's choice."""
