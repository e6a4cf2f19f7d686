"""Backends whose requests take one particular path through virtio._ring.BlockEngine."""

from __future__ import annotations

from pathlib import Path

import pytest

from virtio import _ring
from virtio.backends.block import BlockBackend, MemoryBlock
from virtio.backends.file import FileBlock, Io, SnapshotBlock
from virtio.backends.image import ImageBlock
from virtio.errors import ConfigError
from virtio.images.create import create_qcow2


class Uncached(FileBlock):
    """As FileBlock, but nothing is answered from the page cache in the loop's turn: all goes to the engine."""

    def engine(self, serial: bytes, *, inline: bool = False) -> _ring.BlockEngine:
        return super().engine(serial, inline=inline)


class UncachedSnapshot(SnapshotBlock):
    """As SnapshotBlock, but nothing is answered in the loop's turn."""

    def engine(self, serial: bytes, *, inline: bool = False) -> _ring.BlockEngine:
        return super().engine(serial, inline=inline)


class UncachedImage(ImageBlock):
    """As ImageBlock, but nothing is answered in the loop's turn."""

    def engine(self, serial: bytes, *, inline: bool = False) -> _ring.BlockEngine:
        return super().engine(serial, inline=inline)


async def open_over(image: Path, io: Io, *, inline: bool) -> BlockBackend:
    """A qcow2 image, made if there is none, over a raw one."""
    top = image.with_name("top.qcow2")
    if not top.exists():
        create_qcow2(
            str(top), image.stat().st_size, cluster_size=4096, backing=image.name, backing_format="raw", version=3
        )
    return await (ImageBlock if inline else UncachedImage).open_image(top, format="qcow2", io=io)


ENGINES: tuple[Io, ...] = ("io_uring", "threads")
KINDS = ("cached", "uncached", "through", "direct", "snapshot", "qcow2", "qcow2uncached")
PATHS = [
    *(f"{engine}-{kind}" for engine in ENGINES for kind in KINDS),
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
            case "qcow2" | "qcow2uncached":
                return await open_over(image, engine, inline=kind == "qcow2")
            case _:
                return await UncachedSnapshot.open(image, io=engine)  # type: ignore[arg-type]
    except ConfigError as error:
        pytest.skip(str(error))
