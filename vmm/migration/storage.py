"""Disks of a migration: whose file they are afterwards, and the content of those that are sent.

A disk that is sent is read while the guest writes it: what was written meanwhile is entered in a bitmap of granules by
its device, and sent again. The last of it goes while the machine stands still. Loop thread; *worker threads* read and
write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from virtio import _ring
from virtio.backends.image import ImageBlock
from virtio.devices.blk import BlockDevice
from vmm._native import merge, runs
from vmm.errors import ConfigError, HostError, StateError, core_errors, os_reason
from vmm.migration.link import Link
from vmm.migration.precopy import Pace, Progress
from vmm.migration.protocol import DISK, DISK_BYTES, DiskOffer, Kind

SHIFT = 16
GRANULE = 1 << SHIFT
SAMPLES, SAMPLE = 64, 64 << 10


def image_of(name: str, device: BlockDevice) -> ImageBlock:
    """The disk's image. Raises ConfigError for a disk that is no file."""
    backend = device.backend
    if not isinstance(backend, ImageBlock):
        raise ConfigError(f"{name}: a disk of {type(backend).__name__} cannot move; only files can")
    return backend


def fingerprint(image: _ring.Image, capacity: int) -> bytes:
    """SHA-256 of a part of what a disk shows: as good as all of it to tell one image from another. Blocks; OSError."""
    total = hashlib.sha256(capacity.to_bytes(8, "little"))
    step = max(capacity // SAMPLES // 512 * 512, SAMPLE)
    for at in range(0, capacity, step):
        part = bytearray(min(SAMPLE, capacity - at))
        image.read(at, part)
        total.update(part)
    return total.digest()


def offer(name: str, device: BlockDevice, *, copy: bool) -> DiskOffer:
    """How the disk would move. Blocks. Raises ConfigError, HostError."""
    backend = image_of(name, device)
    top = backend.chain.top
    how, print_ = "shared", b""
    try:
        if backend.overlay >= 0:
            how, print_ = "overlay", fingerprint(backend.chain.image, backend.capacity)
        elif backend.read_only:
            how, print_ = "reference", fingerprint(backend.image(), backend.capacity)
        elif copy:
            how = "copy"
    except OSError as error:
        raise HostError(f"{name}: {top.path}: {os_reason(error)}") from error
    return DiskOffer(name, how, top.path, backend.capacity, top.format, print_)  # type: ignore[arg-type]


@dataclass
class Sending:
    """A disk on its way."""

    index: int
    device: BlockDevice
    bits: bytearray
    todo: bytes


class DiskSender:
    """The contents of disks that do not stand on shared storage."""

    def __init__(self, disks: Sequence[tuple[DiskOffer, BlockDevice]], pace: Pace, progress: Progress) -> None:
        """In the offer's order; those that are not sent are left out."""
        self.disks: list[Sending] = []
        self._pace, self._progress = pace, progress
        for index, (entry, device) in enumerate(disks):
            if entry.how in ("overlay", "copy"):
                granules = -(-entry.capacity // GRANULE)
                self.disks.append(Sending(index, device, bytearray(-(-granules // 64) * 8), b""))

    def start(self) -> None:
        """Track writes from now on; everything that is there is to be sent."""
        for disk in self.disks:
            disk.device.track(disk.bits, SHIFT)
            backend = image_of("disk", disk.device)
            first = bytearray(len(disk.bits))
            granules = -(-backend.capacity // GRANULE)
            if backend.overlay >= 0:
                # A bit for each sector: 16 bytes of them are a granule.
                step = GRANULE // 512 // 8
                for at in range(granules):
                    if any(backend.written[at * step : (at + 1) * step]):
                        first[at // 8] |= 1 << at % 8
            else:
                first[: granules // 8] = b"\xff" * (granules // 8)
                if granules % 8:
                    first[granules // 8] = (1 << granules % 8) - 1
            disk.todo = bytes(first)
        self._progress.disk_total += self.remaining

    def take(self) -> None:
        """What was written since start() or the last take() is next, with what was not sent yet."""
        for disk in self.disks:
            todo = bytearray(disk.bits)
            if disk.todo:
                merge(todo, disk.todo)
            disk.todo = bytes(todo)
            disk.bits[:] = bytes(len(disk.bits))
        self._progress.disk_total += self.remaining

    @property
    def remaining(self) -> int:
        """Bytes that the next send() has."""
        return sum(int.from_bytes(disk.todo, "little").bit_count() for disk in self.disks) * GRANULE

    def stop(self) -> None:
        """Idempotent."""
        for disk in self.disks:
            disk.device.track(None)

    def send(self, link: Link) -> None:
        """A round. *worker thread*. Raises Closed, HostError."""
        buffer = bytearray(DISK_BYTES)
        for disk in self.disks:
            backend = image_of("disk", disk.device)
            image, todo, disk.todo = backend.image(), disk.todo, b""
            for first, count in runs(todo):
                at, end = first * GRANULE, min((first + count) * GRANULE, backend.capacity)
                while at < end:
                    part = memoryview(buffer)[: min(DISK_BYTES, end - at)]
                    try:
                        image.read(at, part)
                    except OSError as error:
                        raise HostError(f"{backend.path}: {os_reason(error)}") from error
                    zero = not any(part[:64]) and bytes(part).count(0) == len(part)
                    head = DISK.pack(disk.index, int(zero), at, len(part))
                    self._pace.wait(0 if zero else len(part))
                    link.send(Kind.DISK, head, b"" if zero else part)
                    self._progress.disk_sent += len(part)
                    at += len(part)


class DiskReceiver:
    """Writes what comes. *worker thread*"""

    def __init__(self, disks: Sequence[tuple[DiskOffer, ImageBlock]]) -> None:
        self._disks = disks

    def write(self, payload: memoryview) -> None:
        """A DISK frame. Raises StateError for what is out of bounds, HostError."""
        if len(payload) < DISK.size:
            raise StateError("a DISK frame without its head")
        index, zero, at, length = DISK.unpack_from(payload)
        data = payload[DISK.size :]
        if index >= len(self._disks) or zero > 1 or len(data) != (0 if zero else length):
            raise StateError("a DISK frame that is malformed")
        entry, backend = self._disks[index]
        if entry.how not in ("overlay", "copy"):
            raise StateError(f"{entry.name}: content of a disk that is not sent")
        if not length or length > DISK_BYTES or at % 512 or length % 512 or at + length > backend.capacity:
            raise StateError(f"{entry.name}: content out of bounds: {length} bytes at {at}")
        try:
            if zero:
                backend.image().zero(at, length, entry.how == "copy")
            else:
                backend.image().write(at, data, False)
        except OSError as error:
            raise HostError(f"{entry.path}: {os_reason(error)}") from error


async def give_up(disks: Sequence[tuple[DiskOffer, BlockDevice]]) -> list[BlockDevice]:
    """Write everything out and give up the locks of shared disks; those that were. The machine stands still. Raises
    HostError; nothing is given up then."""
    given: list[BlockDevice] = []
    try:
        with core_errors():
            for entry, device in disks:
                if entry.how == "shared":
                    given.append(device)
                    await image_of(entry.name, device).deactivate()
    except BaseException:
        for device in given:
            await take(device)
        raise
    return given


async def take(device: BlockDevice) -> None:
    """Take a shared disk's lock, and what its file says now. Raises ConfigError, HostError."""
    backend = image_of("disk", device)
    with core_errors():
        await device.exchange(backend.activate)
