"""Disks: which backend a configured one gets. Loop thread."""

from __future__ import annotations

import asyncio

from virtio.backends.block import BlockBackend
from virtio.backends.file import FileBlock, SnapshotBlock
from virtio.device import Device
from virtio.devices.blk import BlockDevice
from virtio.errors import HostError
from vmm.config import Disk
from vmm.devices.virtio.pool import Maker, TransportKind
from vmm.errors import ConfigError

QCOW2_MAGIC = b"QFI\xfb"


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
    if disk.format != "raw":
        magic = await asyncio.to_thread(_first_bytes, disk)
        if disk.format == "qcow2" or magic == QCOW2_MAGIC:
            raise ConfigError(f"disk: {disk.path}: qcow2 is not supported; convert it with qemu-img convert -O raw")
    if disk.snapshot:
        return await SnapshotBlock.open(disk.path, io=disk.io)
    return await FileBlock.open(disk.path, read_only=disk.readonly, cache=disk.cache, io=disk.io)


def _first_bytes(disk: Disk) -> bytes:
    try:
        with disk.path.open("rb") as file:
            return file.read(4)
    except OSError:
        return b""  # opening it says what is wrong


