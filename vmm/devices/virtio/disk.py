"""Disks: which backend a configured one gets. Loop thread."""

from __future__ import annotations

from virtio.backends.block import BlockBackend
from virtio.backends.image import ImageBlock
from virtio.device import Device
from virtio.devices.blk import BlockDevice
from virtio.errors import HostError
from vmm.config import Disk
from vmm.devices.virtio.pool import Maker, TransportKind


class DiskMaker(Maker):
    """One disk of the configuration."""

    def __init__(self, disk: Disk, serial: str) -> None:
        self.transport: TransportKind = disk.transport
        self._disk, self._serial = disk, serial

    async def make(self) -> Device:
        backend = await open_disk(self._disk)
        try:
            return BlockDevice(backend, serial=self._serial, queues=self._disk.queues)
        except OSError as error:
            await backend.aclose()
            raise HostError(f"{self._disk.path}: {error.strerror}") from error


async def open_disk(disk: Disk) -> BlockBackend:
    """The backend of a configured disk. Raises ConfigError."""
    return await ImageBlock.open_image(
        disk.path,
        format=None if disk.format == "auto" else disk.format,
        read_only=disk.readonly,
        snapshot=disk.snapshot,
        cache=disk.cache,
        io=disk.io,
        backing=disk.backing,
        data=disk.data,
    )
