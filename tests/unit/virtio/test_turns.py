"""What a device does in one turn of the loop is bounded, whatever its driver asks for and however often it notifies."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from virtio.backends.block import MemoryBlock
from virtio.backends.char import MemoryChar
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.devices.console import ConsoleDevice
from virtio.devices.rng import EntropyDevice

from .conftest import Connect

DISK = 4 << 20


class Turns:
    """Counts the loop's turns."""

    def __init__(self) -> None:
        self.now = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self.now += 1
        self._handle = self._loop.call_soon(self._turn)

    def end(self) -> None:
        self._handle.cancel()


@pytest.fixture
async def turns() -> AsyncIterator[Turns]:
    counted = Turns()
    yield counted
    counted.end()


class Counting(MemoryBlock):
    """How many reads and bytes each turn brought."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(DISK)
        self.turns = turns
        self.reads: Counter[int] = Counter()
        self.bytes: Counter[int] = Counter()

    async def read(self, offset: int, length: int) -> bytes:
        self.reads[self.turns.now] += 1
        self.bytes[self.turns.now] += length
        return await super().read(offset, length)


async def test_a_driver_that_notifies_and_notifies(
    connect: Connect, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often: one call a queue and turn."""
    monkeypatch.setattr(blk, "REQUESTS_MAX", 1000)
    backend = Counting(turns)
    driver = connect(BlockDevice(backend))
    driver.initialize()
    head = driver.buffer(struct.pack("<IIQ", blk.IN, 0, 0))
    data, status = driver.buffer(512), driver.buffer(1)
    done = 0
    while done < 600:
        try:
            driver.queues[0].add([head], [data, status])
        except MemoryError:
            for _ in range(20):
                driver.notify(0)
            await asyncio.sleep(0)
            done += len(driver.queues[0].used())
    assert sum(backend.reads.values()) >= 600
    # a turn of the counter may see the end of one of the loop's and the beginning of the next
    assert max(backend.reads.values()) <= 64


async def test_large_requests_to_a_backend_that_answers_at_once(connect: Connect, turns: Turns) -> None:
    backend = Counting(turns)
    driver = connect(BlockDevice(backend))
    driver.initialize()
    head = driver.buffer(struct.pack("<IIQ", blk.IN, 0, 0))
    data, status = driver.buffer(1 << 20), driver.buffer(1)
    for _ in range(20):
        driver.submit(0, [head], [data, status])
    await driver.used(0, 20)
    assert sum(backend.bytes.values()) == 20 << 20
    assert max(backend.bytes.values()) <= 2 << 20


async def test_large_buffers_for_random_bytes(connect: Connect, turns: Turns) -> None:
    given: Counter[int] = Counter()

    def random(count: int) -> bytes:
        given[turns.now] += count
        return bytes(count)

    driver = connect(EntropyDevice(random))
    driver.initialize()
    room = driver.buffer(65536)
    for _ in range(60):
        driver.submit(0, [], [room])
    await driver.used(0, 60)
    assert max(given.values()) <= 2 << 20


async def test_small_pieces_of_output(connect: Connect, turns: Turns) -> None:
    class Output(MemoryChar):
        def __init__(self) -> None:
            super().__init__()
            self.writes: Counter[int] = Counter()

        async def write(self, data: bytes) -> None:
            self.writes[turns.now] += 1

    backend = Output()
    driver = connect(ConsoleDevice(backend))
    driver.initialize()
    piece = driver.buffer(b"x")
    for _ in range(120):
        driver.submit(1, [piece])
    await driver.used(1, 120)
    assert max(backend.writes.values()) <= 64
