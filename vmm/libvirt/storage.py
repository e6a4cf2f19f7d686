"""Storage pools that are directories, and the volumes in them, which are their files.

A volume's key is its path. Names are single components of a path, and no link is followed to a volume, so nothing
outside the pool's directory is touched by them. What may take long (copies, wipes) is for threads: those functions say
so.
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from vmm.errors import ConfigError, HostError, VmmError, os_reason
from vmm.libvirt.domain_xml import scaled
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.events import POOL_LIFECYCLE, Hub
from vmm.libvirt.store import Store
from vmm.libvirt.wire import PoolRef, VolumeRef
from vmm.libvirt.xmltree import Reader, add, malformed, parse, serialise, unsupported

MAX_POOLS = 1000
MAX_VOLUMES = 16_384
MAX_SIZE = 1 << 60
NAME = re.compile(r"[^/\0]{1,200}")
COPY = 8 << 20
"""Bytes that are copied or wiped at a time."""
QCOW2_MAGIC = b"QFI\xfb"
DEFINED, UNDEFINED, STARTED, STOPPED, CREATED, DELETED = range(6)
"""virStoragePoolEventLifecycleType."""


@dataclass(frozen=True)
class Volume:
    """One file of a pool, as it was looked at; sizes in bytes."""

    pool: str
    path: Path
    capacity: int
    allocation: int
    physical: int
    format: str
    status: os.stat_result

    @property
    def ref(self) -> VolumeRef:
        return VolumeRef(self.pool, self.path.name, str(self.path))


@dataclass(frozen=True)
class Pool:
    """One pool; `active`: its volumes can be used."""

    name: str
    uuid: uuid.UUID
    path: Path
    active: bool = False
    persistent: bool = True

    @property
    def ref(self) -> PoolRef:
        return PoolRef(self.name, self.uuid.bytes)

    def needs_active(self) -> None:
        """Raises LibvirtError."""
        if not self.active:
            raise LibvirtError(Code.OPERATION_INVALID, f"storage pool '{self.name}' is not active", From.STORAGE)

    def sizes(self) -> tuple[int, int, int]:
        """(capacity, allocation, available) of the file system below it; zeros while it is not active."""
        if not self.active:
            return 0, 0, 0
        try:
            found = os.statvfs(self.path)
        except OSError as error:
            raise HostError(f"{self.path}: {os_reason(error)}") from error
        total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        return total, total - free, free

    def file(self, name: str) -> Path:
        """Where a volume of that name is. Raises LibvirtError for what is no name."""
        if not NAME.fullmatch(name) or name in (".", "..") or name.startswith("."):
            raise LibvirtError(Code.INVALID_ARG, f"{name!r} is no name for a volume", From.STORAGE)
        return self.path / name

    def volume(self, name: str) -> Volume:
        """Raises LibvirtError."""
        self.needs_active()
        path = self.file(name)
        found = _look(self.name, path)
        if found is None:
            raise LibvirtError(Code.NO_STORAGE_VOL, f"no storage vol with matching name '{name}'", From.STORAGE)
        return found

    def volumes(self) -> list[Volume]:
        """By name. Raises LibvirtError, HostError."""
        self.needs_active()
        found = []
        try:
            for path in sorted(self.path.iterdir()):
                if not path.name.startswith(".") and (volume := _look(self.name, path)) is not None:
                    found.append(volume)
                    if len(found) >= MAX_VOLUMES:
                        break
        except OSError as error:
            raise HostError(f"{self.path}: {os_reason(error)}") from error
        return found

    def xml(self) -> str:
        """The pool's document."""
        root = Element("pool", {"type": "dir"})
        add(root, "name", self.name)
        add(root, "uuid", str(self.uuid))
        for tag, size in zip(("capacity", "allocation", "available"), self.sizes(), strict=True):
            add(root, tag, str(size), unit="bytes")
        add(root, "source")
        target = add(root, "target")
        add(target, "path", str(self.path))
        if self.active and self.path.exists():
            _permissions(target, self.path.stat())
        return serialise(root)


def _look(pool: str, path: Path) -> Volume | None:
    """A regular file as a volume; None for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        head = os.pread(descriptor, 32, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    capacity, kind = status.st_size, "raw"
    if head[:4] == QCOW2_MAGIC and len(head) == 32:
        capacity, kind = int.from_bytes(head[24:32], "big"), "qcow2"
    return Volume(pool, path, capacity, status.st_blocks * 512, status.st_size, kind, status)


def _permissions(target: Element, status: os.stat_result) -> None:
    permissions = add(target, "permissions")
    add(permissions, "mode", f"0{stat.S_IMODE(status.st_mode):o}")
    add(permissions, "owner", str(status.st_uid))
    add(permissions, "group", str(status.st_gid))


def volume_xml(volume: Volume) -> str:
    """A volume's document."""
    root = Element("volume", {"type": "file"})
    add(root, "name", volume.path.name)
    add(root, "key", str(volume.path))
    for tag in ("capacity", "allocation", "physical"):
        add(root, tag, str(getattr(volume, tag)), unit="bytes")
    target = add(root, "target")
    add(target, "path", str(volume.path))
    add(target, "format", type=volume.format)
    _permissions(target, volume.status)
    times = add(target, "timestamps")
    for name in ("atime", "mtime", "ctime"):
        nanoseconds = getattr(volume.status, f"st_{name}_ns")
        add(times, name, f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09}")
    return serialise(root)


@dataclass(frozen=True)
class WantedVolume:
    """A volume that is to be made; sizes in bytes."""

    name: str
    capacity: int
    allocation: int
    format: str
    mode: int
    backing: tuple[str, str] | None = None
    """(path, format) of a qcow2 volume's backing file."""


def read_volume(text: str) -> WantedVolume:
    """From a volume's XML. Raises LibvirtError."""
    root = Reader(parse(text, "volume"))
    root.choice("type", ("file",))
    sizes = {}
    for tag in ("capacity", "allocation", "physical"):
        if child := root.child(tag):
            sizes[tag] = scaled(child.text(), child.attribute("unit"), "bytes")
            if sizes[tag] > MAX_SIZE:
                raise malformed(f"<{tag}>: {sizes[tag]} bytes are too many")
    name = root.child("name")
    if name is None or not name.text():
        raise malformed("<volume>: <name> is missing")
    for tag in ("key", "source"):
        if child := root.child(tag):
            child.take_all()
    kind, mode = "raw", 0o600
    if target := root.child("target"):
        for tag in ("path", "timestamps", "compat", "features"):
            if child := target.child(tag):
                child.take_all()
        if shape := target.child("format"):
            kind = shape.choice("type", ("raw", "qcow2")) or "raw"
        if permissions := target.child("permissions"):
            if given := permissions.child("mode"):
                if not re.fullmatch("0?[0-7]{3}", given.text()):
                    raise malformed(f"<mode>: {given.text()!r} is no octal mode")
                mode = int(given.text(), 8)
            for tag in ("owner", "group", "label"):
                if child := permissions.child(tag):
                    child.take_all()
    backing = _read_backing(root)
    root.done()
    if "capacity" not in sizes:
        raise malformed("<volume>: <capacity> is missing")
    return WantedVolume(name.text(), sizes["capacity"], sizes.get("allocation", sizes["capacity"]), kind, mode, backing)


def _read_backing(root: Reader) -> tuple[str, str] | None:
    child = root.child("backingStore")
    path = child.child("path") if child is not None else None
    if child is None or path is None:
        return None
    shape = child.child("format")
    kind = shape.choice("type", ("raw", "qcow2")) if shape is not None else None
    if permissions := child.child("permissions"):
        permissions.take_all()
    return path.text(), kind or "raw"


def create_file(path: Path, wanted: WantedVolume) -> None:
    """A new volume; takes long if it is allocated. Raises VmmError; nothing is left then."""
    if wanted.backing is not None and wanted.format != "qcow2":
        raise unsupported("<backingStore>: only a qcow2 volume has a backing file")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, wanted.mode)
    except FileExistsError:
        raise LibvirtError(Code.STORAGE_VOL_EXIST, path.name, From.STORAGE) from None
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error
    try:
        try:
            if wanted.format == "raw":
                os.ftruncate(descriptor, wanted.capacity)
                if wanted.allocation:
                    os.posix_fallocate(descriptor, 0, min(wanted.allocation, wanted.capacity))
            else:
                _create_qcow2(path, wanted)
                path.chmod(wanted.mode)
        finally:
            os.close(descriptor)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise HostError(f"{path}: {os_reason(error)}") from error
    except VmmError:
        path.unlink(missing_ok=True)
        raise


def _create_qcow2(path: Path, wanted: WantedVolume) -> None:
    from vmm.disks import create_disk

    options: dict[str, Any] = {}
    if wanted.backing is not None:
        name, options["backing_format"] = wanted.backing
        if Path(name).parent != path.parent or not Path(name).is_file():
            raise unsupported(f"<backingStore>: {name} is no volume of the same pool")
        options["backing"] = Path(name).name
    create_disk(str(path), wanted.capacity, "qcow2", **options)


def resize_file(volume: Volume, capacity: int, *, allocate: bool, shrink: bool) -> None:
    """Another size for the disk in a volume; takes long if it is allocated. Raises VmmError."""
    from vmm.disks import resize

    if volume.format == "qcow2":
        if allocate:
            raise unsupported("a qcow2 volume is allocated as it is written")
        resize(str(volume.path), capacity, format="qcow2", shrink=shrink)
        return
    try:
        descriptor = os.open(volume.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, capacity)
            if allocate and capacity:
                os.posix_fallocate(descriptor, 0, capacity)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostError(f"{volume.path}: {os_reason(error)}") from error


def clone_file(source: Path, path: Path, wanted: WantedVolume) -> None:
    """A copy, holes as holes, made longer if more is wanted; takes long. Raises LibvirtError, HostError."""
    create_file(path, replace(wanted, format="raw", capacity=0, allocation=0))
    try:
        with source.open("rb") as old, path.open("r+b") as new:
            length = os.fstat(old.fileno()).st_size
            os.ftruncate(new.fileno(), max(length, wanted.capacity if wanted.format == "raw" else 0))
            at = 0
            while at < length:
                try:
                    at = os.lseek(old.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break  # ENXIO: nothing but a hole follows
                end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
                while at < end:
                    data = os.pread(old.fileno(), min(COPY, end - at), at)
                    if not data:
                        break
                    at += os.pwrite(new.fileno(), data, at)
                if at < end:
                    break
            os.fsync(new.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise HostError(f"{path}: {os_reason(error)}") from error


def wipe_file(path: Path) -> None:
    """Zeros over everything; takes long. Raises HostError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            left, zeros = os.fstat(descriptor).st_size, bytes(COPY)
            while left > 0:
                left -= os.write(descriptor, zeros[: min(left, COPY)])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error


class Pools:
    """All pools."""

    def __init__(self, store: Store, events: Hub) -> None:
        self._store, self._events = store, events
        self._pools: dict[str, Pool] = {}

    def load(self) -> None:
        """What is stored; pools that were active, or start by themselves, are active."""
        for name in self._store.names("pools", ".xml"):
            try:
                pool = read_pool(self._store.read("pools", f"{name}.xml") or "")
            except (LibvirtError, ConfigError):
                continue  # left where it is
            active = self._store.exists("pools", f"{name}.active") or self.autostart(pool)
            self._pools[name] = replace(pool, active=active and pool.path.is_dir())

    def all(self) -> list[Pool]:
        return [self._pools[name] for name in sorted(self._pools)]

    def named(self, name: str) -> Pool:
        """Raises LibvirtError."""
        if name not in self._pools:
            raise LibvirtError(Code.NO_STORAGE_POOL, f"no storage pool with matching name '{name}'", From.STORAGE)
        return self._pools[name]

    def with_uuid(self, identity: bytes) -> Pool:
        """Raises LibvirtError."""
        for pool in self._pools.values():
            if pool.uuid.bytes == identity:
                return pool
        text = f"no storage pool with matching uuid '{uuid.UUID(bytes=identity)}'"
        raise LibvirtError(Code.NO_STORAGE_POOL, text, From.STORAGE)

    def of(self, ref: PoolRef) -> Pool:
        """Raises LibvirtError."""
        return self.with_uuid(ref.uuid)

    def volume(self, ref: VolumeRef) -> tuple[Pool, Volume]:
        """Raises LibvirtError."""
        pool = self.named(ref.pool)
        return pool, pool.volume(ref.name)

    def at(self, path: str) -> tuple[Pool, Volume]:
        """The volume with that path. Raises LibvirtError."""
        wanted = Path(path)
        for pool in self._pools.values():
            if pool.active and wanted.parent == pool.path and NAME.fullmatch(wanted.name):
                found = _look(pool.name, wanted)
                if found is not None and not wanted.name.startswith("."):
                    return pool, found
        raise LibvirtError(Code.NO_STORAGE_VOL, f"no storage vol with matching path '{path}'", From.STORAGE)

    def add(self, pool: Pool) -> Pool:
        """A new pool, or another definition of one. Raises LibvirtError, HostError."""
        old = self._pools.get(pool.name)
        for other in self._pools.values():
            if other.name != pool.name and (other.uuid == pool.uuid or other.path == pool.path):
                raise LibvirtError(
                    Code.OPERATION_FAILED, f"pool '{other.name}' has this uuid or this directory", From.STORAGE
                )
        if old is not None and old.uuid != pool.uuid:
            raise LibvirtError(
                Code.OPERATION_FAILED, f"pool '{pool.name}' already exists with uuid {old.uuid}", From.STORAGE
            )
        if old is None and len(self._pools) >= MAX_POOLS:
            raise LibvirtError(Code.OPERATION_FAILED, f"{MAX_POOLS} pools are as many as this daemon takes")
        if pool.persistent:
            self._store.write("pools", f"{pool.name}.xml", replace(pool, active=False).xml())
        self._pools[pool.name] = replace(pool, active=old.active if old is not None else False)
        if pool.persistent:
            self._events.other(POOL_LIFECYCLE, pool.ref, DEFINED, 0)
        return self._pools[pool.name]

    def set_active(self, pool: Pool, *, on: bool) -> None:
        """Raises LibvirtError, HostError."""
        if pool.active == on:
            state = "already active" if on else "not active"
            raise LibvirtError(Code.OPERATION_INVALID, f"storage pool '{pool.name}' is {state}", From.STORAGE)
        if on and not pool.path.is_dir():
            raise HostError(f"cannot open path '{pool.path}': no such directory; build the pool first")
        if on:
            self._store.write("pools", f"{pool.name}.active", "")
        else:
            self._store.remove("pools", f"{pool.name}.active")
        self._pools[pool.name] = replace(pool, active=on)
        if not on and not pool.persistent:
            del self._pools[pool.name]
        self._events.other(POOL_LIFECYCLE, pool.ref, STARTED if on else STOPPED, 0)

    def remove(self, pool: Pool) -> None:
        """Its definition. Raises LibvirtError, HostError."""
        if pool.active:
            raise LibvirtError(Code.OPERATION_INVALID, f"storage pool '{pool.name}' is still active", From.STORAGE)
        for suffix in ("xml", "autostart", "active"):
            self._store.remove("pools", f"{pool.name}.{suffix}")
        del self._pools[pool.name]
        self._events.other(POOL_LIFECYCLE, pool.ref, UNDEFINED, 0)

    def autostart(self, pool: Pool) -> bool:
        return self._store.exists("pools", f"{pool.name}.autostart")

    def set_autostart(self, pool: Pool, *, on: bool) -> None:
        """Raises LibvirtError, HostError."""
        if not pool.persistent:
            raise LibvirtError(Code.INVALID_ARG, "pool has no config file", From.STORAGE)
        if on:
            self._store.write("pools", f"{pool.name}.autostart", "")
        else:
            self._store.remove("pools", f"{pool.name}.autostart")


POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def read_pool(text: str) -> Pool:
    """From a pool's XML. Raises LibvirtError."""
    root = Reader(parse(text, "pool"))
    if root.choice("type", ("dir",)) is None:
        raise malformed("<pool>: attribute 'type' is missing")
    name = root.child("name")
    if name is None or not POOL_NAME.fullmatch(name.text()):
        raise malformed("<pool/name>: up to 63 letters, digits, '-', '_' or '.'")
    identity = uuid.uuid4()
    if given := root.child("uuid"):
        try:
            identity = uuid.UUID(given.text())
        except ValueError:
            raise malformed(f"<uuid>: {given.text()!r} is no UUID") from None
    for tag in ("capacity", "allocation", "available", "source"):
        if child := root.child(tag):
            child.take_all()
    target = root.child("target")
    path = target.child("path") if target is not None else None
    if target is None or path is None or not path.text().startswith("/"):
        raise malformed("<pool/target/path>: an absolute path is needed")
    if permissions := target.child("permissions"):
        permissions.take_all()
    root.done()
    return Pool(name.text(), identity, Path(os.path.normpath(path.text())))


def any_of(groups: tuple[dict[int, Any], ...], flags: int) -> bool:
    """Flags are groups: of each group that is asked for at all, one must fit."""
    for group in groups:
        asked = [fits for flag, fits in group.items() if flags & flag]
        if asked and not any(asked):
            return False
    return True
