"""Disks: which backend a configured one gets. Loop thread."""

from __future__ import annotations

import asyncio
import os

from virtio.backends.block import BlockBackend
from virtio.backends.image import ImageBlock
from virtio.device import Device
from virtio.devices.blk import BlockDevice
from virtio.errors import HostError
from vmm.config import Disk, limit_names
from vmm.devices.virtio.pool import Maker, TransportKind
from vmm.errors import ConfigError, StateError
from vmm.machine.origin import ArrivingDisk, SavedDisk
from vmm.state.diskcopy import copy_sparse


class DiskMaker(Maker):
    """One disk of the configuration."""

    def __init__(self, disk: Disk, serial: str, saved: SavedDisk | ArrivingDisk | None = None) -> None:
        """`saved`: what was written to a snapshot disk before, or that the disk is another's still."""
        self.transport: TransportKind = disk.transport
        self._disk, self._serial, self._saved = disk, serial, saved

    async def make(self) -> Device:
        backend = await open_disk(self._disk, self._saved if isinstance(self._saved, ArrivingDisk) else None)
        try:
            exclusive = isinstance(self._saved, ArrivingDisk) and self._saved.exclusive
            if exclusive and isinstance(backend, ImageBlock) and await backend.is_free():
                raise ConfigError(
                    f"{self._disk.path}: not the file that the machine uses, for nobody has locked it; "
                    "put it on storage that both hosts share, or copy it along with --copy-storage"
                )
            if isinstance(self._saved, SavedDisk) and isinstance(backend, ImageBlock):
                await asyncio.to_thread(_load, backend, self._saved)
            device = BlockDevice(backend, serial=self._serial, queues=self._disk.queues)
            device.limits.set({name: getattr(self._disk, name) for name in limit_names(Disk)})
            return device
        except OSError as error:
            await backend.aclose()
            raise HostError(f"{self._disk.path}: {error.strerror}") from error
        except ConfigError:
            await backend.aclose()
            raise


def _load(backend: ImageBlock, saved: SavedDisk) -> None:
    """Raises OSError."""
    if backend.overlay < 0 or len(saved.sectors) != len(backend.written):
        raise StateError(f"{saved.path}: the overlay is of another disk")
    source = os.open(saved.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        copy_sparse(source, backend.overlay, backend.capacity)
    finally:
        os.close(source)
    backend.written[:] = saved.sectors


async def open_disk(disk: Disk, arriving: ArrivingDisk | None = None) -> BlockBackend:
    """The backend of a configured disk; of one that is still another's not active. Raises ConfigError."""
    return await ImageBlock.open_image(
        disk.path,
        format=None if disk.format == "auto" else disk.format,
        read_only=disk.readonly,
        snapshot=disk.snapshot,
        cache=disk.cache,
        io=disk.io,
        backing=disk.backing,
        data=disk.data,
        active=arriving is None,
    )
