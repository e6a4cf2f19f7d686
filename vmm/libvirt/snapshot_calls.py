"""Procedures about saved states and snapshots."""

from __future__ import annotations

from vmm.libvirt.client import Call
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.wire import DomainRef, SnapshotRef

calls = Procedures()


@calls.query(183, "domain_has_managed_save_image", "dom:domain flags:uint", "result:int")
async def domain_has_managed_save_image(call: Call, dom: DomainRef, flags: int) -> int:
    call.daemon.domains.of(dom)
    return 0


@calls.query(187, "domain_snapshot_num", "dom:domain flags:uint", "count:int")
async def domain_snapshot_num(call: Call, dom: DomainRef, flags: int) -> int:
    call.daemon.domains.of(dom)
    return 0


@calls.query(188, "domain_snapshot_list_names", "dom:domain max:int flags:uint", "names:string<16384>")
async def domain_snapshot_list_names(call: Call, dom: DomainRef, max: int, flags: int) -> list[str]:
    call.daemon.domains.of(dom)
    return []


@calls.query(274, "domain_list_all_snapshots", "dom:domain need:int flags:uint", "snapshots:snapshot<16384> count:int")
async def domain_list_all_snapshots(call: Call, dom: DomainRef, need: int, flags: int) -> tuple[list[SnapshotRef], int]:
    call.daemon.domains.of(dom)
    return [], 0


@calls.query(190, "domain_has_current_snapshot", "dom:domain flags:uint", "result:int")
async def domain_has_current_snapshot(call: Call, dom: DomainRef, flags: int) -> int:
    call.daemon.domains.of(dom)
    return 0


@calls.query(189, "domain_snapshot_lookup_by_name", "dom:domain name:string flags:uint", "snap:snapshot")
async def domain_snapshot_lookup_by_name(call: Call, dom: DomainRef, name: str, flags: int) -> SnapshotRef:
    call.daemon.domains.of(dom)
    raise LibvirtError(Code.NO_DOMAIN_SNAPSHOT, f"no domain snapshot with matching name '{name}'", From.DOMAIN_SNAPSHOT)


@calls.query(
    413, "domain_list_all_checkpoints", "dom:domain need:int flags:uint", "checkpoints:snapshot<16384> count:int"
)
async def domain_list_all_checkpoints(
    call: Call, dom: DomainRef, need: int, flags: int
) -> tuple[list[SnapshotRef], int]:
    call.daemon.domains.of(dom)
    return [], 0
