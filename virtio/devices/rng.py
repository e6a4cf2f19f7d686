"""Entropy device (virtio 1.2, 5.4): random bytes from an injected source, at a limited rate if asked. Loop
thread only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from virtio.constants import DeviceId
from virtio.device import Device
from virtio.errors import GuestError, HostError
from virtio.protocols import RandomSource
from virtio.queue import Queue
from virtio.trust import Backend

LARGEST = 65536
"""Bytes of one answer at most."""


class EntropyDevice(Device):
    """`bytes_per_second`: None means no limit."""

    device_id = DeviceId.ENTROPY
    queue_sizes = (64,)

    def __init__(self, random: RandomSource, *, bytes_per_second: int | None = None) -> None:
        super().__init__()
        self._random = random
        self._source = Backend(random, "entropy source")
        self._rate = bytes_per_second

    async def serve(self, queues: Sequence[Queue]) -> None:
        async for chain in queues[0]:
            # 5.4.6.1: "The driver MUST NOT place device-readable buffers into the queue."
            if chain.readable_length:
                raise GuestError("the entropy queue got a device-readable buffer")
            # 5.4.6.2: "The device MUST place one or more random bytes into the buffer, but it MAY use less
            # than the entire buffer length."
            count = min(chain.writable_length, LARGEST if self._rate is None else max(self._rate // 10, 1), LARGEST)
            chain.write(self._chance(count))
            queues[0].complete(chain)
            if self._rate is not None:
                await asyncio.sleep(count / self._rate)

    def _chance(self, count: int) -> bytes | bytearray | memoryview:
        """1 to `count` random bytes. HostError if the source breaks its contract: 5.4 has no answer that says so, and
        bytes that are not random are worse than none."""
        try:
            return self._source.sized(self._random, self._random(count), 1, count)
        except Exception as error:
            raise HostError(f"{self._source.name}: {type(error).__name__}: {error}") from error
