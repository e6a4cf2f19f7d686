"""Procedures about storage pools and volumes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar
from xml.etree.ElementTree import Element

from vmm.errors import HostError, os_reason
from vmm.libvirt.client import Call
from vmm.libvirt.domain_calls import at_least_zero, check_flags
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.events import POOL_LIFECYCLE, POOL_REFRESH
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.storage import (
    CREATED,
    DELETED,
    Pool,
    Volume,
    any_of,
    clone_file,
    create_file,
    read_pool,
    read_volume,
    resize_file,
    volume_xml,
    wipe_file,
)
from vmm.libvirt.stream import Stream
from vmm.libvirt.wire import PoolRef, VolumeRef
from vmm.libvirt.xmltree import add, serialise

calls = Procedures()
T = TypeVar("T")

RUNNING = 2
LIST_INACTIVE, LIST_ACTIVE, LIST_PERSISTENT, LIST_TRANSIENT, LIST_AUTOSTART, LIST_NO_AUTOSTART, LIST_DIR = (
    1 << bit for bit in range(7)
)
FILE = 0
"""virStorageVolType."""
RESIZE_ALLOCATE, RESIZE_DELTA, RESIZE_SHRINK = 1, 2, 4
WIPE_ZERO = 0


# Pools.


@calls.query(281, "connect_list_all_storage_pools", "need:int flags:uint", "pools:pool<16384> count:uint")
async def connect_list_all_storage_pools(call: Call, need: int, flags: int) -> tuple[list[PoolRef], int]:
    pools = call.daemon.pools
    found = []
    for pool in pools.all():
        autostart = pools.autostart(pool)
        groups = (
            {LIST_INACTIVE: not pool.active, LIST_ACTIVE: pool.active},
            {LIST_PERSISTENT: pool.persistent, LIST_TRANSIENT: not pool.persistent},
            {LIST_AUTOSTART: autostart, LIST_NO_AUTOSTART: not autostart},
            {LIST_DIR: True, **{1 << bit: False for bit in range(7, 32)}},
        )
        if any_of(groups, flags):
            found.append(pool.ref)
    return (found if need else []), len(found)


def _names(call: Call, *, active: bool) -> list[str]:
    return [pool.name for pool in call.daemon.pools.all() if pool.active == active]


@calls.query(71, "connect_num_of_storage_pools", "", "count:int")
async def connect_num_of_storage_pools(call: Call) -> int:
    return len(_names(call, active=True))


@calls.query(72, "connect_list_storage_pools", "max:int", "names:string<16384>")
async def connect_list_storage_pools(call: Call, max: int) -> list[str]:
    return _names(call, active=True)[: at_least_zero(max)]


@calls.query(73, "connect_num_of_defined_storage_pools", "", "count:int")
async def connect_num_of_defined_storage_pools(call: Call) -> int:
    return len(_names(call, active=False))


@calls.query(74, "connect_list_defined_storage_pools", "max:int", "names:string<16384>")
async def connect_list_defined_storage_pools(call: Call, max: int) -> list[str]:
    return _names(call, active=False)[: at_least_zero(max)]


@calls.query(403, "connect_get_storage_pool_capabilities", "flags:uint", "xml:string")
async def connect_get_storage_pool_capabilities(call: Call, flags: int) -> str:
    root = Element("storagepoolCapabilities")
    pool = add(root, "pool", type="dir", supported="yes")
    kinds = add(add(pool, "volOptions"), "enum", name="targetFormatType")
    for kind in ("raw", "qcow2"):
        add(kinds, "value", kind)
    return serialise(root)


@calls.query(84, "storage_pool_lookup_by_name", "name:string", "pool:pool")
async def storage_pool_lookup_by_name(call: Call, name: str) -> PoolRef:
    return call.daemon.pools.named(name).ref


@calls.query(85, "storage_pool_lookup_by_uuid", "uuid:uuid", "pool:pool")
async def storage_pool_lookup_by_uuid(call: Call, uuid: bytes) -> PoolRef:
    return call.daemon.pools.with_uuid(uuid).ref


@calls.query(86, "storage_pool_lookup_by_volume", "vol:volume", "pool:pool")
async def storage_pool_lookup_by_volume(call: Call, vol: VolumeRef) -> PoolRef:
    return call.daemon.pools.named(vol.pool).ref


@calls.query(391, "storage_pool_lookup_by_target_path", "path:string", "pool:pool")
async def storage_pool_lookup_by_target_path(call: Call, path: str) -> PoolRef:
    for pool in call.daemon.pools.all():
        if pool.active and str(pool.path) == os.path.normpath(path):
            return pool.ref
    raise LibvirtError(Code.NO_STORAGE_POOL, f"no storage pool with matching target path '{path}'", From.STORAGE)


@calls.change(76, "storage_pool_create_xml", "xml:string flags:uint", "pool:pool")
async def storage_pool_create_xml(call: Call, xml: str, flags: int) -> PoolRef:
    check_flags(flags, 7)
    pools = call.daemon.pools
    pool = read_pool(xml)
    if any(other.name == pool.name for other in pools.all()):
        raise LibvirtError(Code.OPERATION_FAILED, f"pool '{pool.name}' already exists", From.STORAGE)
    if flags:
        _build(pool)
    if not pool.path.is_dir():
        raise HostError(f"cannot open path '{pool.path}': no such directory")
    pools.set_active(pools.add(replace(pool, persistent=False)), on=True)
    return pool.ref


@calls.change(77, "storage_pool_define_xml", "xml:string flags:uint", "pool:pool")
async def storage_pool_define_xml(call: Call, xml: str, flags: int) -> PoolRef:
    check_flags(flags, 1)
    return call.daemon.pools.add(read_pool(xml)).ref


@calls.change(78, "storage_pool_create", "pool:pool flags:uint")
async def storage_pool_create(call: Call, pool: PoolRef, flags: int) -> None:
    check_flags(flags, 7)
    pools = call.daemon.pools
    found = pools.of(pool)
    if flags:
        _build(found)
    pools.set_active(found, on=True)


@calls.change(79, "storage_pool_build", "pool:pool flags:uint")
async def storage_pool_build(call: Call, pool: PoolRef, flags: int) -> None:
    check_flags(flags, 0)
    found = call.daemon.pools.of(pool)
    if found.active:
        raise LibvirtError(Code.OPERATION_INVALID, f"storage pool '{found.name}' is already active", From.STORAGE)
    _build(found)
    call.daemon.events.other(POOL_LIFECYCLE, found.ref, CREATED, 0)


def _build(pool: Pool) -> None:
    try:
        pool.path.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{pool.path}: {os_reason(error)}") from error


@calls.change(80, "storage_pool_destroy", "pool:pool")
async def storage_pool_destroy(call: Call, pool: PoolRef) -> None:
    pools = call.daemon.pools
    pools.set_active(pools.of(pool), on=False)


@calls.change(81, "storage_pool_delete", "pool:pool flags:uint")
async def storage_pool_delete(call: Call, pool: PoolRef, flags: int) -> None:
    check_flags(flags, 0)
    found = call.daemon.pools.of(pool)
    if found.active:
        raise LibvirtError(Code.OPERATION_INVALID, f"storage pool '{found.name}' is still active", From.STORAGE)
    try:
        found.path.rmdir()
    except OSError as error:
        raise HostError(f"{found.path}: {os_reason(error)}") from error
    call.daemon.events.other(POOL_LIFECYCLE, found.ref, DELETED, 0)


@calls.change(82, "storage_pool_undefine", "pool:pool")
async def storage_pool_undefine(call: Call, pool: PoolRef) -> None:
    pools = call.daemon.pools
    pools.remove(pools.of(pool))


@calls.change(83, "storage_pool_refresh", "pool:pool flags:uint")
async def storage_pool_refresh(call: Call, pool: PoolRef, flags: int) -> None:
    found = call.daemon.pools.of(pool)
    found.needs_active()
    call.daemon.events.other(POOL_REFRESH, found.ref)


@calls.query(87, "storage_pool_get_info", "pool:pool", "state:int capacity:uhyper allocation:uhyper available:uhyper")
async def storage_pool_get_info(call: Call, pool: PoolRef) -> tuple[int, int, int, int]:
    found = call.daemon.pools.of(pool)
    return RUNNING if found.active else 0, *found.sizes()


@calls.query(88, "storage_pool_get_xml_desc", "pool:pool flags:uint", "xml:string")
async def storage_pool_get_xml_desc(call: Call, pool: PoolRef, flags: int) -> str:
    return call.daemon.pools.of(pool).xml()


@calls.query(89, "storage_pool_get_autostart", "pool:pool", "autostart:int")
async def storage_pool_get_autostart(call: Call, pool: PoolRef) -> int:
    pools = call.daemon.pools
    return int(pools.autostart(pools.of(pool)))


@calls.change(90, "storage_pool_set_autostart", "pool:pool autostart:int")
async def storage_pool_set_autostart(call: Call, pool: PoolRef, autostart: int) -> None:
    pools = call.daemon.pools
    pools.set_autostart(pools.of(pool), on=bool(autostart))


@calls.query(154, "storage_pool_is_active", "pool:pool", "active:int")
async def storage_pool_is_active(call: Call, pool: PoolRef) -> int:
    return int(call.daemon.pools.of(pool).active)


@calls.query(155, "storage_pool_is_persistent", "pool:pool", "persistent:int")
async def storage_pool_is_persistent(call: Call, pool: PoolRef) -> int:
    return int(call.daemon.pools.of(pool).persistent)


@calls.query(91, "storage_pool_num_of_volumes", "pool:pool", "count:int")
async def storage_pool_num_of_volumes(call: Call, pool: PoolRef) -> int:
    return len(await asyncio.to_thread(call.daemon.pools.of(pool).volumes))


@calls.query(92, "storage_pool_list_volumes", "pool:pool max:int", "names:string<16384>")
async def storage_pool_list_volumes(call: Call, pool: PoolRef, max: int) -> list[str]:
    volumes = await asyncio.to_thread(call.daemon.pools.of(pool).volumes)
    return [volume.path.name for volume in volumes][: at_least_zero(max)]


@calls.query(282, "storage_pool_list_all_volumes", "pool:pool need:int flags:uint", "volumes:volume<16384> count:uint")
async def storage_pool_list_all_volumes(
    call: Call, pool: PoolRef, need: int, flags: int
) -> tuple[list[VolumeRef], int]:
    volumes = await asyncio.to_thread(call.daemon.pools.of(pool).volumes)
    return ([volume.ref for volume in volumes] if need else []), len(volumes)


# Volumes.


@calls.query(95, "storage_vol_lookup_by_name", "pool:pool name:string", "vol:volume")
async def storage_vol_lookup_by_name(call: Call, pool: PoolRef, name: str) -> VolumeRef:
    return call.daemon.pools.of(pool).volume(name).ref


@calls.query(96, "storage_vol_lookup_by_key", "key:string", "vol:volume")
async def storage_vol_lookup_by_key(call: Call, key: str) -> VolumeRef:
    return call.daemon.pools.at(key)[1].ref


@calls.query(97, "storage_vol_lookup_by_path", "path:string", "vol:volume")
async def storage_vol_lookup_by_path(call: Call, path: str) -> VolumeRef:
    return call.daemon.pools.at(path)[1].ref


@calls.query(98, "storage_vol_get_info", "vol:volume", "type:int capacity:uhyper allocation:uhyper")
async def storage_vol_get_info(call: Call, vol: VolumeRef) -> tuple[int, int, int]:
    return await storage_vol_get_info_flags(call, vol, 0)


@calls.query(378, "storage_vol_get_info_flags", "vol:volume flags:uint", "type:int capacity:uhyper allocation:uhyper")
async def storage_vol_get_info_flags(call: Call, vol: VolumeRef, flags: int) -> tuple[int, int, int]:
    check_flags(flags, 1)
    _, volume = call.daemon.pools.volume(vol)
    return FILE, volume.capacity, volume.physical if flags else volume.allocation


@calls.query(99, "storage_vol_get_xml_desc", "vol:volume flags:uint", "xml:string")
async def storage_vol_get_xml_desc(call: Call, vol: VolumeRef, flags: int) -> str:
    return volume_xml(call.daemon.pools.volume(vol)[1])


@calls.query(100, "storage_vol_get_path", "vol:volume", "path:string")
async def storage_vol_get_path(call: Call, vol: VolumeRef) -> str:
    return str(call.daemon.pools.volume(vol)[1].path)


@calls.change(93, "storage_vol_create_xml", "pool:pool xml:string flags:uint", "vol:volume")
async def storage_vol_create_xml(call: Call, pool: PoolRef, xml: str, flags: int) -> VolumeRef:
    check_flags(flags, 4)  # validate
    found = call.daemon.pools.of(pool)
    found.needs_active()
    wanted = read_volume(xml)
    await asyncio.to_thread(create_file, found.file(wanted.name), wanted)
    return found.volume(wanted.name).ref


@calls.change(125, "storage_vol_create_xml_from", "pool:pool xml:string clone:volume flags:uint", "vol:volume")
async def storage_vol_create_xml_from(call: Call, pool: PoolRef, xml: str, clone: VolumeRef, flags: int) -> VolumeRef:
    check_flags(flags, 4)
    pools = call.daemon.pools
    found = pools.of(pool)
    found.needs_active()
    _, source = pools.volume(clone)
    wanted = read_volume(xml)
    if wanted.format != source.format:
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED, f"{source.format} is not made {wanted.format} by a clone", From.STORAGE
        )
    await asyncio.to_thread(clone_file, source.path, found.file(wanted.name), wanted)
    return found.volume(wanted.name).ref


@calls.change(94, "storage_vol_delete", "vol:volume flags:uint")
async def storage_vol_delete(call: Call, vol: VolumeRef, flags: int) -> None:
    check_flags(flags, 0)
    _, volume = call.daemon.pools.volume(vol)
    try:
        volume.path.unlink()
    except OSError as error:
        raise HostError(f"{volume.path}: {os_reason(error)}") from error


@calls.change(260, "storage_vol_resize", "vol:volume capacity:uhyper flags:uint")
async def storage_vol_resize(call: Call, vol: VolumeRef, capacity: int, flags: int) -> None:
    check_flags(flags, RESIZE_ALLOCATE | RESIZE_DELTA | RESIZE_SHRINK)
    _, volume = call.daemon.pools.volume(vol)
    if flags & RESIZE_DELTA:
        capacity = volume.capacity + (-capacity if flags & RESIZE_SHRINK else capacity)
    if capacity < volume.capacity and not flags & RESIZE_SHRINK:
        raise LibvirtError(
            Code.INVALID_ARG,
            "Can't shrink capacity below current capacity unless shrink flag is specified",
            From.STORAGE,
        )
    if not 0 <= capacity < 1 << 60:
        raise LibvirtError(Code.INVALID_ARG, f"{capacity} bytes", From.STORAGE)

    allocate, shrink = bool(flags & RESIZE_ALLOCATE), bool(flags & RESIZE_SHRINK)
    await asyncio.to_thread(resize_file, volume, capacity, allocate=allocate, shrink=shrink)


@calls.change(165, "storage_vol_wipe", "vol:volume flags:uint")
async def storage_vol_wipe(call: Call, vol: VolumeRef, flags: int) -> None:
    await storage_vol_wipe_pattern(call, vol, WIPE_ZERO, flags)


@calls.change(259, "storage_vol_wipe_pattern", "vol:volume algorithm:uint flags:uint")
async def storage_vol_wipe_pattern(call: Call, vol: VolumeRef, algorithm: int, flags: int) -> None:
    check_flags(flags, 0)
    if algorithm != WIPE_ZERO:
        raise LibvirtError(Code.INVALID_ARG, f"wiping algorithm {algorithm} is not available; here is zero (0)")
    await asyncio.to_thread(wipe_file, call.daemon.pools.volume(vol)[1].path)


class FileEndpoint:
    """A part of a file as the daemon's side of a stream."""

    def __init__(self, volume: Volume, offset: int, length: int, *, writes: bool) -> None:
        """`length` 0: to its end. Raises OSError."""
        mode = os.O_WRONLY if writes else os.O_RDONLY
        self._descriptor = os.open(volume.path, mode | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._at = offset
        self._end = offset + length if length else max(volume.physical, offset)
        self._writes = writes
        self._work: asyncio.Task[Any] | None = None

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """A cancelled caller leaves the thread at its work, for which `aclose` waits before the descriptor goes."""
        work = asyncio.create_task(asyncio.to_thread(function, *arguments), name="volume")
        self._work = work
        return await asyncio.shield(work)

    async def read(self, limit: int) -> bytes:
        count = min(limit, self._end - self._at)
        if self._writes or count <= 0:
            return b""
        data = await self._in_thread(os.pread, self._descriptor, count, self._at)
        self._at += len(data)
        return data

    async def write(self, data: bytes) -> None:
        if not self._writes:
            raise LibvirtError(Code.OPERATION_INVALID, "this stream is for reading", From.STREAMS)
        if self._at + len(data) > self._end:
            raise LibvirtError(Code.OPERATION_FAILED, "more data than the volume has room for", From.STREAMS)
        while data:
            done = await self._in_thread(os.pwrite, self._descriptor, data, self._at)
            self._at, data = self._at + done, data[done:]

    async def finish(self) -> None:
        if self._writes:
            await self._in_thread(os.fsync, self._descriptor)

    async def aclose(self) -> None:
        if self._work is not None:
            await asyncio.wait([self._work])
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def _open(call: Call, vol: VolumeRef, offset: int, length: int, *, writes: bool) -> Stream:
    _, volume = call.daemon.pools.volume(vol)
    if offset + length > max(volume.physical, volume.capacity) or offset > volume.physical:
        raise LibvirtError(Code.INVALID_ARG, f"the volume has {volume.physical} bytes", From.STORAGE)
    stream = Stream(call.client, call.header, FileEndpoint(volume, offset, length, writes=writes))
    call.client.open_stream(call.header, stream)
    return stream


@calls.change(208, "storage_vol_upload", "vol:volume offset:uhyper length:uhyper flags:uint")
async def storage_vol_upload(call: Call, vol: VolumeRef, offset: int, length: int, flags: int) -> None:
    check_flags(flags, 0)
    _open(call, vol, offset, length, writes=True)


@calls.change(209, "storage_vol_download", "vol:volume offset:uhyper length:uhyper flags:uint")
async def storage_vol_download(call: Call, vol: VolumeRef, offset: int, length: int, flags: int) -> None:
    check_flags(flags, 0)
    call.afterwards.append(_open(call, vol, offset, length, writes=False).start)
