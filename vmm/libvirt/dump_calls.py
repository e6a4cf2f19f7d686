"""Procedures for who looks for the cause of a guest's hang: its memory as a core file, a non-maskable interrupt."""

from __future__ import annotations

from vmm.libvirt.client import Call
from vmm.libvirt.domain_calls import check_flags
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.machines import ask
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.wire import DomainRef

calls = Procedures()

DUMP_CRASH, DUMP_LIVE, DUMP_BYPASS_CACHE, DUMP_RESET, DUMP_MEMORY_ONLY = 1, 2, 4, 8, 16
RAW = 0
"""virDomainCoreDumpFormat."""
DUMP_SECONDS = 6 * 3600.0


@calls.change(53, "domain_core_dump", "dom:domain to:string flags:uint")
async def domain_core_dump(call: Call, dom: DomainRef, to: str, flags: int) -> None:
    await domain_core_dump_with_format(call, dom, to, RAW, flags)


@calls.change(334, "domain_core_dump_with_format", "dom:domain to:string format:uint flags:uint")
async def domain_core_dump_with_format(call: Call, dom: DomainRef, to: str, format: int, flags: int) -> None:
    check_flags(flags, DUMP_CRASH | DUMP_LIVE | DUMP_BYPASS_CACHE | DUMP_RESET | DUMP_MEMORY_ONLY)
    if format != RAW:
        raise LibvirtError(Code.OPERATION_UNSUPPORTED, "a dump is an ELF core file; leave --format out")
    if flags & DUMP_CRASH and flags & DUMP_RESET:
        raise LibvirtError(Code.INVALID_ARG, "crash and reset flags are mutually exclusive")
    domain = call.daemon.domains.of(dom)
    entry = domain.running_entry()
    await ask(entry, "dump", DUMP_SECONDS, path=to)
    if flags & DUMP_CRASH:
        await call.daemon.domains.destroy(domain)
    elif flags & DUMP_RESET:
        await ask(entry, "reset")


@calls.change(210, "domain_inject_nmi", "dom:domain flags:uint")
async def domain_inject_nmi(call: Call, dom: DomainRef, flags: int) -> None:
    check_flags(flags, 0)
    await ask(call.daemon.domains.of(dom).running_entry(), "nmi")
