"""Procedures that change disks of running machines: size, jobs (commit, pull, copy), limits; and limits of cards."""

from __future__ import annotations

import asyncio
from typing import Any

from vmm.convert import KIB
from vmm.errors import StateError
from vmm.libvirt import live
from vmm.libvirt.client import Call
from vmm.libvirt.domain import Domain
from vmm.libvirt.domain_calls import AFFECT_CONFIG, AFFECT_LIVE, check_flags, wants
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.iotune import BANDWIDTH, IO_TUNE, REFUSED_BANDWIDTH
from vmm.libvirt.machines import ask
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.spec import disk_ids
from vmm.libvirt.statistics import devices, find_disk, find_interface
from vmm.libvirt.wire import DomainRef, Param
from vmm.libvirt.xmltree import malformed, parse

calls = Procedures()

RESIZE_BYTES = 1
ABORT_ASYNC, ABORT_PIVOT = 1, 2
COMMIT_SHALLOW, COMMIT_DELETE, COMMIT_ACTIVE, COMMIT_RELATIVE = 1, 2, 4, 8
COMMIT_BYTES = 16
COPY_SHALLOW, COPY_REUSE, COPY_TRANSIENT = 1, 2, 4
REBASE_SHALLOW, REBASE_REUSE, REBASE_RAW, REBASE_COPY = 1, 2, 4, 8
REBASE_RELATIVE, REBASE_DEVICE, REBASE_BYTES = 16, 32, 64
PULL_BYTES = INFO_BYTES = SPEED_BYTES = 1
"""Bandwidth in bytes a second, of each procedure's own flags; else it is in MiB."""
JOB_SECONDS = 60


def _disk(call: Call, dom: DomainRef, path: str) -> tuple[Domain, str]:
    """(a running domain, what its machine calls the disk). Raises LibvirtError."""
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    return domain, disk_ids(domain.spec.config)[find_disk(domain, path)]


async def _block(domain: Domain, disk: str, action: str, **values: Any) -> dict[str, Any]:
    return await ask(domain.running_entry(), "block", JOB_SECONDS, disk=disk, action=action, **values)


@calls.change(251, "domain_block_resize", "dom:domain disk:string size:uhyper flags:uint")
async def domain_block_resize(call: Call, dom: DomainRef, disk: str, size: int, flags: int) -> None:
    check_flags(flags, RESIZE_BYTES)
    domain, name = _disk(call, dom, disk)
    await _block(domain, name, "resize", size=size if flags & RESIZE_BYTES else size * KIB)


@calls.change(240, "domain_block_pull", "dom:domain path:string bandwidth:uhyper flags:uint")
async def domain_block_pull(call: Call, dom: DomainRef, path: str, bandwidth: int, flags: int) -> None:
    check_flags(flags, PULL_BYTES)
    domain, name = _disk(call, dom, path)
    await _block(domain, name, "stream", speed=_speed(bandwidth, in_bytes=bool(flags & PULL_BYTES)))


@calls.change(266, "domain_block_rebase", "dom:domain path:string base:string? bandwidth:uhyper flags:uint")
async def domain_block_rebase(
    call: Call, dom: DomainRef, path: str, base: str | None, bandwidth: int, flags: int
) -> None:
    if flags & REBASE_COPY:
        check_flags(flags, REBASE_SHALLOW | REBASE_REUSE | REBASE_RAW | REBASE_COPY | REBASE_DEVICE | REBASE_BYTES)
        if not base:
            raise LibvirtError(Code.INVALID_ARG, "a copy needs the file that it goes into")
        speed = _speed(bandwidth, in_bytes=bool(flags & REBASE_BYTES))
        there = bool(flags & (REBASE_REUSE | REBASE_DEVICE))
        format = "raw" if flags & (REBASE_RAW | REBASE_DEVICE) else None
        await _copy(call, dom, path, base, format, speed, shallow=bool(flags & REBASE_SHALLOW), there=there)
        return
    check_flags(flags, REBASE_RELATIVE | REBASE_BYTES)
    if base:
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED, "a disk is pulled from its whole chain, or copied by blockcopy; leave base out"
        )
    await domain_block_pull(call, dom, path, bandwidth, PULL_BYTES if flags & REBASE_BYTES else 0)


async def _copy(
    call: Call, dom: DomainRef, path: str, file: str, format: str | None, speed: int, *, shallow: bool, there: bool
) -> None:
    """Copy a disk; without a format into one of its own."""
    domain, name = _disk(call, dom, path)
    format = format or domain.spec.config.disks[find_disk(domain, path)].format or "raw"
    await _block(
        domain, name, "mirror", path=file, format=format, follow=True, shallow=shallow, there=there, speed=speed
    )


@calls.change(290, "domain_block_commit", "dom:domain disk:string base:string? top:string? bandwidth:uhyper flags:uint")
async def domain_block_commit(
    call: Call, dom: DomainRef, disk: str, base: str | None, top: str | None, bandwidth: int, flags: int
) -> None:
    check_flags(flags, COMMIT_SHALLOW | COMMIT_DELETE | COMMIT_ACTIVE | COMMIT_RELATIVE | COMMIT_BYTES)
    speed = _speed(bandwidth, in_bytes=bool(flags & COMMIT_BYTES))
    domain, name = _disk(call, dom, disk)
    chain = (await _block(domain, name, "look"))["chain"]
    if len(chain) < 2:
        raise LibvirtError(Code.INVALID_ARG, f"disk '{disk}' has no backing file to commit to")
    if top not in (None, chain[0], disk) or base not in (None, chain[1]):
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED, "the active image is committed into the one behind it; leave top and base out"
        )
    if base is None and not flags & COMMIT_SHALLOW and len(chain) > 2:
        raise LibvirtError(Code.OPERATION_UNSUPPORTED, f"a commit goes one image down, to {chain[1]}; say --shallow")
    if not flags & COMMIT_ACTIVE:
        raise LibvirtError(Code.INVALID_ARG, f"commit of '{disk}' active layer requires active flag")
    await _block(domain, name, "commit", speed=speed)


@calls.change(345, "domain_block_copy", "dom:domain path:string destxml:string params:param<16> flags:uint")
async def domain_block_copy(
    call: Call, dom: DomainRef, path: str, destxml: str, params: list[Param], flags: int
) -> None:
    # No job outlives its machine here, which is what a transient job says.
    check_flags(flags, COPY_SHALLOW | COPY_REUSE | COPY_TRANSIENT)
    speed = 0
    for param in params:
        if param.field == "bandwidth":
            speed = _speed(int(param.value[1]), in_bytes=True)
        elif param.value[1]:
            raise LibvirtError(Code.OPERATION_UNSUPPORTED, f"a copy's {param.field!r} is not chosen here; leave it out")
    target = parse(destxml, "disk")
    source, driver = target.find("source"), target.find("driver")
    kind = target.get("type", "file")
    file = source.get("dev" if kind == "block" else "file") if source is not None else None
    if not file or kind not in ("file", "block"):
        raise malformed("<disk type='file'>: <source file='…'/> is missing")
    format = driver.get("type") if driver is not None else None
    there = bool(flags & COPY_REUSE) or kind == "block"
    await _copy(call, dom, path, file, format, speed, shallow=bool(flags & COPY_SHALLOW), there=there)


def _speed(bandwidth: int, *, in_bytes: bool) -> int:
    """Bytes a second; libvirt's own unit is MiB. Raises LibvirtError."""
    speed = bandwidth if in_bytes else bandwidth << 20
    if speed >= 1 << 62:
        raise LibvirtError(Code.INVALID_ARG, f"bandwidth {bandwidth} is too large; 0 is as fast as it goes")
    return speed


@calls.change(237, "domain_block_job_abort", "dom:domain path:string flags:uint")
async def domain_block_job_abort(call: Call, dom: DomainRef, path: str, flags: int) -> None:
    check_flags(flags, ABORT_ASYNC | ABORT_PIVOT)
    domain, name = _disk(call, dom, path)
    try:
        job = (await _block(domain, name, "job"))["job"]
    except StateError:
        raise LibvirtError(Code.OPERATION_INVALID, f"no current block job on disk '{path}'") from None
    if not flags & ABORT_PIVOT:
        if job["state"] not in ("running", "ready"):
            raise LibvirtError(Code.OPERATION_INVALID, f"no current block job on disk '{path}'")
        # What has everything stays as a copy of this moment; what has not is removed.
        copied = job["kind"] == "mirror" and job["state"] == "ready"
        await (_block(domain, name, "finish", apart=True) if copied else _block(domain, name, "cancel"))
    elif job["kind"] == "mirror" and job["state"] == "ready":
        await _block(domain, name, "finish")
    elif job["state"] != "done":  # a commit goes over by itself
        raise LibvirtError(Code.BLOCK_COPY_ACTIVE, f"disk '{path}' not ready for pivot yet")
    if not flags & ABORT_ASYNC:
        await _end_of_job(domain, name)


async def _end_of_job(domain: Domain, name: str) -> None:
    """Until the disk's job has ended. Raises VmmError if it failed, or if its machine ends meanwhile."""
    while True:
        job = (await _block(domain, name, "job"))["job"]
        if job["state"] not in ("running", "ready"):
            break
        await asyncio.sleep(0.02)
    if job["state"] == "failed":
        raise LibvirtError(Code.OPERATION_FAILED, str(job["detail"]))


@calls.query(
    238,
    "domain_get_block_job_info",
    "dom:domain path:string flags:uint",
    "found:int type:int bandwidth:uhyper cur:uhyper end:uhyper",
)
async def domain_get_block_job_info(call: Call, dom: DomainRef, path: str, flags: int) -> tuple[int, ...]:
    check_flags(flags, INFO_BYTES)
    domain, name = _disk(call, dom, path)
    job = (await _block(domain, name, "look"))["job"]
    if job is None:
        return 0, 0, 0, 0, 0
    done, total = int(job["done"]), max(int(job["total"]), 1)
    if job["state"] == "ready":
        done = total
    elif done >= total:
        done, total = total, total + 1  # equal means ready
    speed = int(job["speed"]) if flags & INFO_BYTES else -(-int(job["speed"]) >> 20)
    return 1, live.JOB_TYPES[job["kind"]], speed, done, total


@calls.change(239, "domain_block_job_set_speed", "dom:domain path:string bandwidth:uhyper flags:uint")
async def domain_block_job_set_speed(call: Call, dom: DomainRef, path: str, bandwidth: int, flags: int) -> None:
    check_flags(flags, SPEED_BYTES)
    domain, name = _disk(call, dom, path)
    speed = _speed(bandwidth, in_bytes=bool(flags & SPEED_BYTES))
    if (await _block(domain, name, "look"))["job"] is None:
        raise LibvirtError(Code.OPERATION_INVALID, f"no current block job on disk '{path}'")
    await _block(domain, name, "speed", speed=speed)


# Limits.


def _numbers(params: list[Param], names: dict[str, str], ignored: tuple[str, ...]) -> dict[str, int]:
    """What was given, by our names. Raises LibvirtError."""
    found = {}
    for param in params:
        if param.field in names:
            found[names[param.field]] = int(param.value[1])
        elif param.field not in ignored or (param.value[1] and param.field != "group_name"):
            raise LibvirtError(Code.OPERATION_UNSUPPORTED, f"there is no limit '{param.field}' here")
    return found


IGNORED_TUNE = ("size_iops_sec", "group_name", *(f"{name}_max_length" for name in IO_TUNE if "_max" not in name))


@calls.change(252, "domain_set_block_io_tune", "dom:domain disk:string params:param<32> flags:uint")
async def domain_set_block_io_tune(call: Call, dom: DomainRef, disk: str, params: list[Param], flags: int) -> None:
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG)
    domain = call.daemon.domains.of(dom)
    index = find_disk(domain, disk)
    limits = _numbers(params, IO_TUNE, IGNORED_TUNE)
    await _limit(call, domain, flags, "disks", index, limits)


@calls.change(256, "domain_set_interface_parameters", "dom:domain device:string params:param<16> flags:uint")
async def domain_set_interface_parameters(
    call: Call, dom: DomainRef, device: str, params: list[Param], flags: int
) -> None:
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG)
    domain = call.daemon.domains.of(dom)
    counters = (await devices(domain))["nets"] if domain.active else []
    index = find_interface(domain, device, counters)
    ignored = ("inbound.peak", "outbound.peak", "inbound.floor")
    for param in params:
        why = REFUSED_BANDWIDTH.get(param.field.rpartition(".")[2])
        if why is not None and param.value[1]:
            raise LibvirtError(Code.OPERATION_UNSUPPORTED, f"{param.field}: {why}")
    limits = {name: value * KIB for name, value in _numbers(params, BANDWIDTH, ignored).items()}
    await _limit(call, domain, flags, "nets", index, limits)


async def _limit(call: Call, domain: Domain, flags: int, kind: str, index: int, limits: dict[str, int]) -> None:
    running, config = wants(call, domain, flags)
    spec = domain.persistent
    if config and spec is not None:
        parts = list(getattr(spec.config, kind))
        if index >= len(parts):
            raise LibvirtError(Code.INVALID_ARG, "the definition has no such device; use --live")
        parts[index] = parts[index].replace(**limits)
        spec = call.daemon.checked(spec.with_config(**{kind: parts}))
    if running:
        await live.set_limits(call.daemon, domain, kind, index, limits)
    if config and spec is not None:
        call.daemon.domains.replace_definition(domain, spec)
        domain.updated = domain.active
