"""What every block backend promises (virtio.backends.block.BlockBackend)."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from virtio.backends.block import BlockBackend, MemoryBlock
from virtio.backends.file import FileBlock, SnapshotBlock
from virtio.backends.image import ImageBlock
from virtio.images.create import create_qcow2

CAPACITY = 256 << 10


class DictBlock(BlockBackend):
    """A backend as a user writes one: sectors in a dict."""

    capacity = CAPACITY

    def __init__(self) -> None:
        self.sectors: dict[int, bytes] = {}

    async def read(self, offset: int, length: int) -> bytes:
        return b"".join(self.sectors.get(at, bytes(512)) for at in range(offset, offset + length, 512))

    async def write(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), 512):
            self.sectors[offset + at] = data[at : at + 512]


@pytest.fixture(params=["memory", "dict", "file", "writethrough", "direct", "snapshot", "qcow2", "qcow2snapshot"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlockBackend]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(CAPACITY - 100))  # the last sector is whole all the same
    made: BlockBackend
    match request.param:
        case "memory":
            made = MemoryBlock(CAPACITY)
        case "dict":
            made = DictBlock()
        case "snapshot":
            made = await SnapshotBlock.open(path)
        case "qcow2" | "qcow2snapshot":
            create_qcow2(str(path), CAPACITY, cluster_size=1024)
            made = await ImageBlock.open_image(path, snapshot=request.param == "qcow2snapshot")
        case "direct":
            made = await FileBlock.open(path, cache="none")
        case kind:
            made = await FileBlock.open(path, cache="writeback" if kind == "file" else "writethrough")
    yield made
    await made.aclose()
    await made.aclose()


async def test_a_model_of_bytes(backend: BlockBackend) -> None:
    """Random reads, writes, zeroes and discards against a bytearray."""
    assert backend.capacity == CAPACITY
    model = bytearray(CAPACITY)
    source = random.Random(7)
    unit = backend.block_size
    for _ in range(150):
        offset = source.randrange(CAPACITY // unit) * unit
        length = min(source.choice((1, 2, 3, 8, 64)) * unit, CAPACITY - offset)
        match source.randrange(4):
            case 0 | 1:
                data = source.randbytes(length)
                await backend.write(offset, data)
                model[offset : offset + length] = data
            case 2:
                await backend.write_zeroes(offset, length, source.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case 3:
                assert await backend.read(offset, length) == model[offset : offset + length]
    await backend.flush()
    assert await backend.read(0, CAPACITY) == model
    await backend.discard(0, 64 * 512)
    assert await backend.read(64 * 512, CAPACITY - 64 * 512) == model[64 * 512 :], "a discard touches only its range"
