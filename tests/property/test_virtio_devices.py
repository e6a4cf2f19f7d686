"""Hostile drivers: spoiled requests, random rings and register accesses against every device on both transports.

Nothing may come out of a register access, whatever happens; after a reset the device works. VIRTIO_EXAMPLES is the
number of examples per device (default 15). `python -m tests.fuzz.virtio_fuzz` runs the same for as long as wanted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.hostile import WORLDS, campaign
from tests.support.virtio import PciDriver
from virtio.backends.block import MemoryBlock
from virtio.backends.file import FileBlock
from virtio.devices import blk
from virtio.devices.blk import BlockDevice

EXAMPLES = int(os.environ.get("VIRTIO_EXAMPLES", "15"))
DISK = 64 << 10


@pytest.mark.parametrize("kind", ["pci", "mmio"])
@pytest.mark.parametrize("name", WORLDS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32))
def test_hostile_driver(name: str, kind: str, seed: int, tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    try:
        asyncio.run(campaign(name, kind, seed, tmp_path))
    finally:
        logging.disable(logging.NOTSET)


async def both_disks(seed: int, folder: Path) -> None:
    """The same requests to the path in C and to the coroutines: the same answers, the same disk."""
    source = random.Random(seed)
    content = source.randbytes(DISK)
    (folder / "disk").write_bytes(content)
    memory = MemoryBlock(DISK)
    memory.data[:] = content
    drivers = [PciDriver(BlockDevice(backend)) for backend in (await FileBlock.open(folder / "disk"), memory)]
    try:
        wanted = source.choice((-1, ~blk.BlockFeature.DISCARD, ~blk.BlockFeature.FLUSH))
        for driver in drivers:
            driver.initialize(wanted)
        for _ in range(20):
            kind = source.choice((blk.IN, blk.IN, blk.OUT, blk.OUT, blk.FLUSH, blk.WRITE_ZEROES, blk.GET_ID, 99))
            sector = source.choice(
                (source.randrange(DISK // 512), source.randrange(DISK // 512), 2**64 - 1, DISK // 512)
            )
            payload = source.randbytes(512 * source.randrange(5) + source.choice((0, 0, 0, 7)))
            if kind == blk.WRITE_ZEROES:
                entries = [(source.randrange(140), source.randrange(9), source.choice((0, 1, 2))) for _ in range(3)]
                payload = b"".join(struct.pack("<QII", *entry) for entry in entries)
            cut = source.randrange(1, 16)
            head = struct.pack("<IIQ", kind, 0, sector)
            readable = [head[:cut], head[cut:]] + ([payload] if payload and kind != blk.IN else [])
            space = source.choice((0, 512, 1024, 20, 700))
            writable = ([space] if space and kind != blk.OUT else []) + [1]
            answers = [await driver.request(0, readable, writable) for driver in drivers]
            assert answers[0][-1] == answers[1][-1], (kind, sector, len(payload), space)
            if answers[0][-1] == blk.OK:
                assert answers[0] == answers[1]
        assert (folder / "disk").read_bytes() == bytes(memory.data)
    finally:
        for driver in drivers:
            driver.transport.reset()
            await driver.transport.device.aclose()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_both_block_paths_do_the_same(seed: int, tmp_path: Path) -> None:
    asyncio.run(both_disks(seed, tmp_path))
