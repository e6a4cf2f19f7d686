"""Backends whose requests take one particular path through virtio._ring.BlockEngine."""

from __future__ import annotations

from pathlib import Path

import pytest

from virtio import _ring
from virtio.backends.block import BlockBackend, MemoryBlock
from virtio.backends.file import FileBlock, Io, SnapshotBlock
from virtio.errors import ConfigError


class Uncached(FileBlock):
    """As FileBlock, but nothing is answered from the page cache in the loop's turn: all goes to the engine."""

    def engine(self, serial: bytes, *, inline: bool = False) -> _ring.BlockEngine:
        return super().engine(serial, inline=inline)


class UncachedSnapshot(SnapshotBlock):
    """As SnapshotBlock, but nothing is answered in the loop's turn."""

    def engine(self, serial: bytes, *, inline: bool = False) -> _ring.BlockEngine:
        return super().engine(serial, inline=inline)


ENGINES: tuple[Io, ...] = ("io_uring", "threads")
PATHS = [
    *(f"{engine}-{kind}" for engine in ENGINES for kind in ("cached", "uncached", "through", "direct", "snapshot")),
    "coroutines",
]


async def open_path(name: str, image: Path) -> BlockBackend:
    """The backend of one of PATHS over an image; the test is skipped where the host cannot have it."""
    engine, _, kind = name.partition("-")
    if engine == "coroutines":
        memory = MemoryBlock(image.stat().st_size)
        memory.data[:] = image.read_bytes()
        return memory
    assert engine in ENGINES
    try:
        match kind:
            case "cached":
                return await FileBlock.open(image, io=engine)  # type: ignore[arg-type]
            case "uncached":
                return await Uncached.open(image, io=engine)  # type: ignore[arg-type]
            case "through":
                return await Uncached.open(image, cache="writethrough", io=engine)  # type: ignore[arg-type]
            case "direct":
                return await FileBlock.open(image, cache="none", io=engine)  # type: ignore[arg-type]
            case _:
                return await UncachedSnapshot.open(image, io=engine)  # type: ignore[arg-type]
    except ConfigError as error:
        pytest.skip(str(error))
