"""Disk images as files: what `vmm disk` does, for programs. No machine may be using them.

Every function blocks, also for long; call from a thread. Raises ConfigError, HostError. `progress` is called with
(bytes done, bytes in all).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from virtio.backends.file import open_locked
from virtio.errors import ConfigError as VirtioConfigError
from virtio.images import changes, copy, create
from virtio.images.chain import Format, open_chain, probe, read_start
from virtio.images.check import Report, reread
from virtio.images.check import check as check_image
from virtio.images.check import repair as repair_image
from virtio.images.header import DIRTY, LAZY_REFCOUNTS, RAW_DATA_FILE, ZSTD, parse
from virtio.images.progress import Progress, silent
from vmm.errors import ConfigError, core_errors

SnapshotAction = Literal["create", "apply", "delete"]
SECTOR = 512


def create_disk(path: str, size: int | None, format: Format = "qcow2", **options: Any) -> None:
    """A new image for a disk of `size` bytes; without it, as large as its backing file. `options`: those of
    virtio.images.create."""
    with core_errors():
        backing = options.get("backing")
        if backing is not None:
            if format == "raw":
                raise ConfigError("a raw image has no backing file; create a qcow2 one")
            where = os.path.join(os.path.dirname(path), backing)
            known: Format | None = options.get("backing_format")
            # The format is recorded: else each opening would guess it from content that a guest may have written.
            with open_chain(where, format=known, read_only=True, backing="any") as chain:
                options["backing_format"] = chain.top.format
                size = chain.size if size is None else size
        if size is None:
            raise ConfigError(f"{path}: give a size, or a backing file whose size it takes")
        size = -(-size // SECTOR) * SECTOR
        if format == "raw":
            create.create_raw(path, size, **options)
        else:
            create.create_qcow2(path, size, **options)


def info(path: str, *, format: Format | None = None) -> dict[str, Any]:
    """What an image is, as JSON-like values; no other file is opened."""
    with core_errors():
        fd, in_use = _open_to_look(path)
        try:
            status = os.fstat(fd)
            found = format or probe(fd)
            facts: dict[str, Any] = {
                "file": path,
                "format": found,
                "in_use": in_use,
                "size": os.lseek(fd, 0, os.SEEK_END),
                "file_size": os.lseek(fd, 0, os.SEEK_END),
                "disk_usage": status.st_blocks * 512,
            }
            if found == "raw":
                return facts
            header = parse(path, read_start(fd), facts["file_size"])
            facts |= {
                "size": header.size,
                "version": header.version,
                "cluster_size": header.cluster_size,
                "refcount_bits": 1 << header.refcount_order,
                "compression": "zstd" if header.compression == ZSTD else "zlib",
                "extended_l2": header.extended,
                "lazy_refcounts": bool(header.compatible & LAZY_REFCOUNTS),
                "dirty": bool(header.incompatible & DIRTY),
                "corrupt": bool(header.incompatible & 2),
            }
            if header.backing is not None:
                facts["backing"] = header.backing
                facts["backing_format"] = header.backing_format
            if header.has_data_file:
                facts["data_file"] = header.data_file
                facts["data_file_raw"] = bool(header.autoclear & RAW_DATA_FILE)
            facts["snapshots"] = [
                {
                    "id": item.id,
                    "name": item.name,
                    "size": item.size,
                    "taken": item.seconds + item.nanoseconds / 1e9,
                    "machine_state": item.state_size,
                }
                for item in changes.list_snapshots(path, fd)
            ]
            return facts
        finally:
            os.close(fd)


def _open_to_look(path: str) -> tuple[int, bool]:
    """(descriptor, whether somebody writes to the image). Its header may be looked at all the same."""
    try:
        return open_locked(path, read_only=True), False
    except VirtioConfigError:
        if not os.path.isfile(path):
            raise
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), True
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error


def check(path: str, *, repair: bool = False, progress: Progress = silent) -> tuple[Report, bool]:
    """Whether a qcow2 image is consistent, and whether it was repaired. The report is of the time before."""
    with core_errors():
        fd = open_locked(path, read_only=not repair)
        try:
            if probe(fd) == "raw":
                raise ConfigError(f"{path}: a raw image, in which nothing can be inconsistent")
            report = check_image(path, fd, reread(path, fd), progress)
            mend = repair and (not report.clean or report.dirty or report.corrupt)
            if mend:
                repair_image(path, fd, reread(path, fd), progress)
            return report, mend
        finally:
            os.close(fd)


def convert(source: str, target: str, **options: Any) -> None:
    """As virtio.images.copy.convert."""
    with core_errors():
        copy.convert(source, target, **options)


def resize(path: str, size: int, **options: Any) -> None:
    """As virtio.images.copy.resize; sizes are rounded up to whole sectors."""
    with core_errors():
        copy.resize(path, -(-size // SECTOR) * SECTOR, **options)


def size_of(path: str, *, format: Format | None = None) -> int:
    """Of the disk in an image, bytes."""
    return int(info(path, format=format)["size"])


def snapshot(path: str, action: SnapshotAction, name: str) -> None:
    """Take, go back to, or forget an internal snapshot."""
    with core_errors():
        fd = open_locked(path, read_only=False)
        try:
            if probe(fd) == "raw":
                raise ConfigError(f"{path}: a raw image has no snapshots; convert it to qcow2")
            call = {
                "create": changes.create_snapshot,
                "apply": changes.apply_snapshot,
                "delete": changes.delete_snapshot,
            }[action]
            call(path, fd, name)
        finally:
            os.close(fd)


def commit(path: str, **options: Any) -> str:
    """As virtio.images.copy.commit."""
    with core_errors():
        return copy.commit(path, **options)


def rebase(path: str, name: str | None, format: Format | None = None, *, unsafe: bool = False, **options: Any) -> None:
    """Give an image another backing file, named as seen from the image's directory; None: none."""
    with core_errors():
        if name is not None and format is None:
            where = Path(path).parent / name
            if not where.exists():
                raise ConfigError(f"{where}: no such file; say --format if it will be there later")
            with open_chain(where, read_only=True, backing="any") as chain:
                format = chain.top.format
        copy.rebase(path, name, format, unsafe=unsafe, **options)
