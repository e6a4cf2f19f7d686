"""Procedures about saved states and snapshots."""

from __future__ import annotations

import asyncio
from pathlib import Path

from vmm.libvirt.client import Call
from vmm.libvirt.domain import Domain
from vmm.libvirt.domain_calls import at_least_zero, check_flags
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.format import domain_xml
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.saves import Info, read_snapshot
from vmm.libvirt.storage import any_of
from vmm.libvirt.wire import DomainRef, SnapshotRef

calls = Procedures()

SAVE_BYPASS_CACHE, SAVE_RUNNING, SAVE_PAUSED = 1, 2, 4
CREATE_ATOMIC, CREATE_VALIDATE = 128, 512
REVERT_RUNNING, REVERT_PAUSED, REVERT_FORCE = 1, 2, 4
DELETE_CHILDREN, DELETE_METADATA_ONLY, DELETE_CHILDREN_ONLY = 1, 2, 4
ROOTS, DESCENDANTS = 1, 1
"""Of a domain's snapshots: only those without a parent. Of a snapshot's children: theirs as well."""
METADATA, LEAVES, NO_LEAVES, NO_METADATA = 2, 4, 8, 16
INACTIVE, ACTIVE, DISK_ONLY, INTERNAL, EXTERNAL = 32, 64, 128, 256, 512


def _path(text: str) -> Path:
    """A path on the daemon's host. Raises LibvirtError."""
    if not text.startswith("/"):
        raise LibvirtError(Code.INVALID_ARG, f"{text!r} is no absolute path")
    return Path(text)


def _paused(flags: int) -> bool | None:
    """Raises LibvirtError."""
    check_flags(flags, SAVE_BYPASS_CACHE | SAVE_RUNNING | SAVE_PAUSED)
    if flags & SAVE_RUNNING and flags & SAVE_PAUSED:
        raise LibvirtError(Code.INVALID_ARG, "running and paused exclude each other")
    return True if flags & SAVE_PAUSED else False if flags & SAVE_RUNNING else None


# Saved states.


@calls.change(55, "domain_save", "dom:domain to:string")
async def domain_save(call: Call, dom: DomainRef, to: str) -> None:
    await domain_save_flags(call, dom, to, None, 0)


@calls.change(232, "domain_save_flags", "dom:domain to:string xml:string? flags:uint")
async def domain_save_flags(call: Call, dom: DomainRef, to: str, xml: str | None, flags: int) -> None:
    paused = _paused(flags)
    if xml is not None:
        raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, "a saved state keeps the machine's own XML")
    domain = call.daemon.domains.of(dom)
    await call.daemon.saves.save(domain, _path(to), paused=paused)


@calls.change(54, "domain_restore", "source:string")
async def domain_restore(call: Call, source: str) -> None:
    await domain_restore_flags(call, source, None, 0)


@calls.change(233, "domain_restore_flags", "source:string xml:string? flags:uint")
async def domain_restore_flags(call: Call, source: str, xml: str | None, flags: int) -> None:
    paused = _paused(flags)
    if xml is not None:
        raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, "a saved state keeps the machine's own XML")
    await call.daemon.saves.restore(_path(source), paused=paused)


@calls.change(235, "domain_save_image_get_xml_desc", "file:string flags:uint", "xml:string")
async def domain_save_image_get_xml_desc(call: Call, file: str, flags: int) -> str:
    spec = await asyncio.to_thread(call.daemon.saves.saved_spec, _path(file))
    return domain_xml(spec, call.daemon.emulator)


@calls.change(182, "domain_managed_save", "dom:domain flags:uint")
async def domain_managed_save(call: Call, dom: DomainRef, flags: int) -> None:
    paused = _paused(flags)
    domain = call.daemon.domains.of(dom)
    if domain.persistent is None:
        raise LibvirtError(Code.OPERATION_INVALID, "cannot do managed save for transient domain")
    await call.daemon.saves.save(domain, call.daemon.saves.managed(domain), paused=paused)


@calls.query(183, "domain_has_managed_save_image", "dom:domain flags:uint", "result:int")
async def domain_has_managed_save_image(call: Call, dom: DomainRef, flags: int) -> int:
    return int(call.daemon.saves.has_managed(call.daemon.domains.of(dom)))


@calls.change(184, "domain_managed_save_remove", "dom:domain flags:uint")
async def domain_managed_save_remove(call: Call, dom: DomainRef, flags: int) -> None:
    await call.daemon.saves.drop_managed(call.daemon.domains.of(dom))


@calls.query(388, "domain_managed_save_get_xml_desc", "dom:domain flags:uint", "xml:string")
async def domain_managed_save_get_xml_desc(call: Call, dom: DomainRef, flags: int) -> str:
    domain = call.daemon.domains.of(dom)
    if not call.daemon.saves.has_managed(domain):
        raise LibvirtError(Code.OPERATION_INVALID, "domain does not have managed save image")
    spec = await asyncio.to_thread(call.daemon.saves.saved_spec, call.daemon.saves.managed(domain))
    return domain_xml(spec, call.daemon.emulator)


# Snapshots.


def _of(call: Call, snap: SnapshotRef) -> tuple[Domain, Info]:
    domain = call.daemon.domains.of(snap.dom)
    return domain, call.daemon.saves.named(domain, snap.name)


def _listed(call: Call, domain: Domain, flags: int, under: Info | None = None) -> list[Info]:
    """The first flag means another thing for a domain's than for a snapshot's."""
    saves = call.daemon.saves
    known = saves.all(domain)
    parents = {info.parent for info in known}
    if under is not None:
        chosen = saves.descendants(domain, under) if flags & DESCENDANTS else [
            info for info in known if info.parent == under.name
        ]  # fmt: skip
    else:
        chosen = [info for info in known if info.parent is None] if flags & ROOTS else known

    def fits(info: Info) -> bool:
        leaf, off = info.name not in parents, info.state == "shutoff"
        groups = (
            {METADATA: True, NO_METADATA: False},
            {LEAVES: leaf, NO_LEAVES: not leaf},
            {INACTIVE: off, ACTIVE: not off, DISK_ONLY: False},
            {INTERNAL: True, EXTERNAL: False},
        )
        return any_of(groups, flags & ~1)

    return [info for info in chosen if fits(info)]


@calls.change(185, "domain_snapshot_create_xml", "dom:domain xml:string flags:uint", "snap:snapshot")
async def domain_snapshot_create_xml(call: Call, dom: DomainRef, xml: str, flags: int) -> SnapshotRef:
    check_flags(flags, CREATE_ATOMIC | CREATE_VALIDATE)
    domain = call.daemon.domains.of(dom)
    if domain.persistent is None:
        raise LibvirtError(Code.OPERATION_INVALID, "a transient domain has no snapshots here")
    return call.daemon.saves.ref(domain, await call.daemon.saves.create(domain, *read_snapshot(xml)))


@calls.query(186, "domain_snapshot_get_xml_desc", "snap:snapshot flags:uint", "xml:string")
async def domain_snapshot_get_xml_desc(call: Call, snap: SnapshotRef, flags: int) -> str:
    return call.daemon.saves.xml(*_of(call, snap))


@calls.query(187, "domain_snapshot_num", "dom:domain flags:uint", "count:int")
async def domain_snapshot_num(call: Call, dom: DomainRef, flags: int) -> int:
    return len(_listed(call, call.daemon.domains.of(dom), flags))


@calls.query(188, "domain_snapshot_list_names", "dom:domain max:int flags:uint", "names:string<16384>")
async def domain_snapshot_list_names(call: Call, dom: DomainRef, max: int, flags: int) -> list[str]:
    return [info.name for info in _listed(call, call.daemon.domains.of(dom), flags)][: at_least_zero(max)]


@calls.query(274, "domain_list_all_snapshots", "dom:domain need:int flags:uint", "snapshots:snapshot<16384> count:int")
async def domain_list_all_snapshots(call: Call, dom: DomainRef, need: int, flags: int) -> tuple[list[SnapshotRef], int]:
    domain = call.daemon.domains.of(dom)
    found = [call.daemon.saves.ref(domain, info) for info in _listed(call, domain, flags)]
    return (found if need else []), len(found)


@calls.query(246, "domain_snapshot_num_children", "snap:snapshot flags:uint", "count:int")
async def domain_snapshot_num_children(call: Call, snap: SnapshotRef, flags: int) -> int:
    domain, info = _of(call, snap)
    return len(_listed(call, domain, flags, info))


@calls.query(247, "domain_snapshot_list_children_names", "snap:snapshot max:int flags:uint", "names:string<16384>")
async def domain_snapshot_list_children_names(call: Call, snap: SnapshotRef, max: int, flags: int) -> list[str]:
    domain, info = _of(call, snap)
    return [one.name for one in _listed(call, domain, flags, info)][: at_least_zero(max)]


@calls.query(
    275, "domain_snapshot_list_all_children", "snap:snapshot need:int flags:uint", "snapshots:snapshot<16384> count:int"
)
async def domain_snapshot_list_all_children(
    call: Call, snap: SnapshotRef, need: int, flags: int
) -> tuple[list[SnapshotRef], int]:
    domain, info = _of(call, snap)
    found = [call.daemon.saves.ref(domain, one) for one in _listed(call, domain, flags, info)]
    return (found if need else []), len(found)


@calls.query(189, "domain_snapshot_lookup_by_name", "dom:domain name:string flags:uint", "snap:snapshot")
async def domain_snapshot_lookup_by_name(call: Call, dom: DomainRef, name: str, flags: int) -> SnapshotRef:
    domain = call.daemon.domains.of(dom)
    return call.daemon.saves.ref(domain, call.daemon.saves.named(domain, name))


@calls.query(190, "domain_has_current_snapshot", "dom:domain flags:uint", "result:int")
async def domain_has_current_snapshot(call: Call, dom: DomainRef, flags: int) -> int:
    return int(call.daemon.saves.current(call.daemon.domains.of(dom)) is not None)


@calls.query(191, "domain_snapshot_current", "dom:domain flags:uint", "snap:snapshot")
async def domain_snapshot_current(call: Call, dom: DomainRef, flags: int) -> SnapshotRef:
    domain = call.daemon.domains.of(dom)
    info = call.daemon.saves.current(domain)
    if info is None:
        raise LibvirtError(Code.NO_DOMAIN_SNAPSHOT, "the domain does not have a current snapshot", From.QEMU)
    return call.daemon.saves.ref(domain, info)


@calls.query(271, "domain_snapshot_is_current", "snap:snapshot flags:uint", "current:int")
async def domain_snapshot_is_current(call: Call, snap: SnapshotRef, flags: int) -> int:
    domain, info = _of(call, snap)
    return int(call.daemon.saves.current(domain) == info)


@calls.query(272, "domain_snapshot_has_metadata", "snap:snapshot flags:uint", "metadata:int")
async def domain_snapshot_has_metadata(call: Call, snap: SnapshotRef, flags: int) -> int:
    _of(call, snap)
    return 1


@calls.query(244, "domain_snapshot_get_parent", "snap:snapshot flags:uint", "parent:snapshot")
async def domain_snapshot_get_parent(call: Call, snap: SnapshotRef, flags: int) -> SnapshotRef:
    domain, info = _of(call, snap)
    if info.parent is None:
        raise LibvirtError(Code.NO_DOMAIN_SNAPSHOT, f"snapshot '{info.name}' does not have a parent", From.QEMU)
    return call.daemon.saves.ref(domain, call.daemon.saves.named(domain, info.parent))


@calls.change(192, "domain_revert_to_snapshot", "snap:snapshot flags:uint")
async def domain_revert_to_snapshot(call: Call, snap: SnapshotRef, flags: int) -> None:
    check_flags(flags, REVERT_RUNNING | REVERT_PAUSED | REVERT_FORCE)
    domain, info = _of(call, snap)
    await call.daemon.saves.revert(
        domain, info, running=bool(flags & REVERT_RUNNING), paused=bool(flags & REVERT_PAUSED)
    )


@calls.change(193, "domain_snapshot_delete", "snap:snapshot flags:uint")
async def domain_snapshot_delete(call: Call, snap: SnapshotRef, flags: int) -> None:
    check_flags(flags, DELETE_CHILDREN | DELETE_CHILDREN_ONLY)
    domain, info = _of(call, snap)
    await call.daemon.saves.delete(domain, info, children=bool(flags), itself=not flags & DELETE_CHILDREN_ONLY)


@calls.query(
    413, "domain_list_all_checkpoints", "dom:domain need:int flags:uint", "checkpoints:snapshot<16384> count:int"
)
async def domain_list_all_checkpoints(
    call: Call, dom: DomainRef, need: int, flags: int
) -> tuple[list[SnapshotRef], int]:
    call.daemon.domains.of(dom)
    return [], 0
