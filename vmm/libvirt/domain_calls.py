"""Procedures about domains: finding, defining, starting, ending, and what they are."""

from __future__ import annotations

from typing import Any

from vmm.convert import KIB
from vmm.libvirt import guest, host
from vmm.libvirt.client import Call
from vmm.libvirt.domain import Domain, DomainState
from vmm.libvirt.errors import Code, From, LibvirtError, not_running
from vmm.libvirt.machines import ask
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.spec import Spec
from vmm.libvirt.wire import DomainRef

calls = Procedures()

XML_SECURE, XML_INACTIVE, XML_UPDATE_CPU, XML_MIGRATABLE = 1, 2, 4, 8
START_PAUSED, START_AUTODESTROY, START_BYPASS_CACHE, START_FORCE_BOOT, START_VALIDATE = 1, 2, 4, 8, 16
AFFECT_LIVE, AFFECT_CONFIG = 1, 2
VCPU_MAXIMUM, VCPU_GUEST = 4, 8
MEM_MAXIMUM = 4
REBOOT = 1
LIFECYCLE_ACTIONS = ((0, 0), (REBOOT, 0), (REBOOT, 1), (2, 0))
"""virDomainLifecycle and virDomainLifecycleAction: power off, reboot and crash; 0 is destroy, 1 restart."""
UNDEFINE_MANAGED_SAVE, UNDEFINE_SNAPSHOTS = 1, 2
UNDEFINE_KNOWN = 1 | 2 | 4 | 8 | 16 | 32 | 64
SHUTDOWN_ACPI, SHUTDOWN_AGENT = 1, 2
LIST_ACTIVE, LIST_INACTIVE, LIST_PERSISTENT, LIST_TRANSIENT = 1, 2, 4, 8
LIST_RUNNING, LIST_PAUSED, LIST_SHUTOFF, LIST_OTHER = 16, 32, 64, 128
LIST_MANAGEDSAVE, LIST_NO_MANAGEDSAVE, LIST_AUTOSTART, LIST_NO_AUTOSTART = 256, 512, 1024, 2048
LIST_HAS_SNAPSHOT, LIST_NO_SNAPSHOT, LIST_HAS_CHECKPOINT, LIST_NO_CHECKPOINT = 4096, 8192, 16384, 32768


def check_flags(flags: int, known: int) -> None:
    """Raises LibvirtError for a flag that would be ignored."""
    if flags & ~known:
        raise LibvirtError(Code.INVALID_ARG, f"unsupported flags (0x{flags & ~known:x})")


def wants(call: Call, domain: Domain, flags: int) -> tuple[bool, bool]:
    """(live, configuration): what VIR_DOMAIN_AFFECT_… means for this domain now. Raises LibvirtError."""
    live, config = bool(flags & AFFECT_LIVE), bool(flags & AFFECT_CONFIG)
    if not live and not config:
        live, config = domain.active, not domain.active
    if live and not domain.active:
        raise not_running()
    if config and domain.persistent is None:
        raise LibvirtError(Code.OPERATION_INVALID, "transient domains do not have any persistent config")
    return live, config


def spec_for(call: Call, domain: Domain, flags: int) -> Spec:
    """The one definition that flags of a question ask for. Raises LibvirtError."""
    if flags & AFFECT_LIVE and flags & AFFECT_CONFIG:
        raise LibvirtError(
            Code.INVALID_ARG, "flags 'VIR_DOMAIN_AFFECT_LIVE' and 'VIR_DOMAIN_AFFECT_CONFIG' exclude each other"
        )
    live, _ = wants(call, domain, flags)
    found = domain.live if live else domain.persistent
    assert found is not None
    return found


# Finding.


@calls.query(273, "connect_list_all_domains", "need:int flags:uint", "domains:domain<16384> count:uint")
async def connect_list_all_domains(call: Call, need: int, flags: int) -> tuple[list[DomainRef], int]:
    check_flags(flags, 0xFFFF)
    domains = call.daemon.domains
    await domains.scan()
    found = [domain.ref for domain in domains.all() if listed(call, domain, flags)]
    return (found if need else []), len(found)


def listed(call: Call, domain: Domain, flags: int) -> bool:
    """Flags are groups: of each group that is asked for at all, one must fit."""
    active, persistent = domain.active, domain.persistent is not None
    autostart = call.daemon.domains.autostart(domain)
    saves = call.daemon.saves
    saved = bool(flags & (LIST_MANAGEDSAVE | LIST_NO_MANAGEDSAVE)) and saves.has_managed(domain)
    snapshots = bool(flags & (LIST_HAS_SNAPSHOT | LIST_NO_SNAPSHOT)) and bool(saves.all(domain))
    groups = (
        {LIST_ACTIVE: active, LIST_INACTIVE: not active},
        {LIST_PERSISTENT: persistent, LIST_TRANSIENT: not persistent},
        {
            LIST_RUNNING: domain.state == DomainState.RUNNING,
            LIST_PAUSED: domain.state == DomainState.PAUSED,
            LIST_SHUTOFF: domain.state == DomainState.SHUTOFF,
            LIST_OTHER: domain.state not in (DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUTOFF),
        },
        {LIST_MANAGEDSAVE: saved, LIST_NO_MANAGEDSAVE: not saved},
        {LIST_AUTOSTART: autostart, LIST_NO_AUTOSTART: not autostart},
        {LIST_HAS_SNAPSHOT: snapshots, LIST_NO_SNAPSHOT: not snapshots},
        {LIST_HAS_CHECKPOINT: False, LIST_NO_CHECKPOINT: True},
    )
    for group in groups:
        asked = [fits for flag, fits in group.items() if flags & flag]
        if asked and not any(asked):
            return False
    return True


@calls.query(51, "connect_num_of_domains", "", "count:int")
async def connect_num_of_domains(call: Call) -> int:
    await call.daemon.domains.scan()
    return sum(domain.active for domain in call.daemon.domains.all())


@calls.query(37, "connect_list_domains", "max:int", "ids:int<16384>")
async def connect_list_domains(call: Call, max: int) -> list[int]:
    await call.daemon.domains.scan()
    return [domain.id for domain in call.daemon.domains.all() if domain.active][: at_least_zero(max)]


@calls.query(25, "connect_num_of_defined_domains", "", "count:int")
async def connect_num_of_defined_domains(call: Call) -> int:
    return sum(not domain.active for domain in call.daemon.domains.all())


@calls.query(21, "connect_list_defined_domains", "max:int", "names:string<16384>")
async def connect_list_defined_domains(call: Call, max: int) -> list[str]:
    return [domain.name for domain in call.daemon.domains.all() if not domain.active][: at_least_zero(max)]


def at_least_zero(count: int) -> int:
    """A client's idea of how many."""
    return count if count > 0 else 0


@calls.query(22, "domain_lookup_by_id", "id:int", "dom:domain")
async def domain_lookup_by_id(call: Call, id: int) -> DomainRef:
    return call.daemon.domains.with_id(id).ref


@calls.query(23, "domain_lookup_by_name", "name:string", "dom:domain")
async def domain_lookup_by_name(call: Call, name: str) -> DomainRef:
    await call.daemon.domains.scan()
    return call.daemon.domains.named(name).ref


@calls.query(24, "domain_lookup_by_uuid", "uuid:uuid", "dom:domain")
async def domain_lookup_by_uuid(call: Call, uuid: bytes) -> DomainRef:
    return call.daemon.domains.with_uuid(uuid).ref


# Defining.


@calls.change(11, "domain_define_xml", "xml:string", "dom:domain")
async def domain_define_xml(call: Call, xml: str) -> DomainRef:
    return await domain_define_xml_flags(call, xml, 0)


@calls.change(350, "domain_define_xml_flags", "xml:string flags:uint", "dom:domain")
async def domain_define_xml_flags(call: Call, xml: str, flags: int) -> DomainRef:
    check_flags(flags, 1)
    domains = call.daemon.domains
    return domains.define(call.daemon.checked(domains.read(xml))).ref


@calls.change(35, "domain_undefine", "dom:domain")
async def domain_undefine(call: Call, dom: DomainRef) -> None:
    await domain_undefine_flags(call, dom, 0)


@calls.change(231, "domain_undefine_flags", "dom:domain flags:uint")
async def domain_undefine_flags(call: Call, dom: DomainRef, flags: int) -> None:
    check_flags(flags, UNDEFINE_KNOWN)
    domains, saves = call.daemon.domains, call.daemon.saves
    domain = domains.of(dom)
    if domain.persistent is not None:
        if saves.has_managed(domain) and not flags & UNDEFINE_MANAGED_SAVE:
            raise LibvirtError(Code.OPERATION_INVALID, "Refusing to undefine while domain managed save image exists")
        if not domain.active and (count := len(saves.all(domain))) and not flags & UNDEFINE_SNAPSHOTS:
            raise LibvirtError(Code.OPERATION_INVALID, f"cannot delete inactive domain with {count} snapshots")
    domains.undefine(domain)
    await saves.forget(domain)


@calls.change(358, "domain_rename", "dom:domain name:string? flags:uint", "result:int")
async def domain_rename(call: Call, dom: DomainRef, name: str | None, flags: int) -> int:
    check_flags(flags, 0)
    domain = call.daemon.domains.of(dom)
    if call.daemon.saves.has_managed(domain) or call.daemon.saves.all(domain):
        raise LibvirtError(Code.OPERATION_INVALID, "cannot rename a domain with a saved state or snapshots")
    if not name:
        raise LibvirtError(Code.INVALID_ARG, "new_name must not be empty")
    call.daemon.domains.rename(domain, name)
    return 0


@calls.query(15, "domain_get_autostart", "dom:domain", "autostart:int")
async def domain_get_autostart(call: Call, dom: DomainRef) -> int:
    domains = call.daemon.domains
    return int(domains.autostart(domains.of(dom)))


@calls.change(29, "domain_set_autostart", "dom:domain autostart:int")
async def domain_set_autostart(call: Call, dom: DomainRef, autostart: int) -> None:
    domains = call.daemon.domains
    domains.set_autostart(domains.of(dom), on=bool(autostart))


# Life.


async def start(call: Call, domain: Domain, flags: int) -> None:
    """A persistent domain, from its saved state if it has one. Raises VmmError."""
    check_flags(flags, START_PAUSED | START_BYPASS_CACHE | START_FORCE_BOOT)
    if flags & START_FORCE_BOOT:
        await call.daemon.saves.drop_managed(domain)
    await call.daemon.start(domain, paused=bool(flags & START_PAUSED))


@calls.change(9, "domain_create", "dom:domain")
async def domain_create(call: Call, dom: DomainRef) -> None:
    await start(call, call.daemon.domains.of(dom), 0)


@calls.change(196, "domain_create_with_flags", "dom:domain flags:uint", "dom:domain")
async def domain_create_with_flags(call: Call, dom: DomainRef, flags: int) -> DomainRef:
    domain = call.daemon.domains.of(dom)
    await start(call, domain, flags)
    return domain.ref


@calls.change(10, "domain_create_xml", "xml:string flags:uint", "dom:domain")
async def domain_create_xml(call: Call, xml: str, flags: int) -> DomainRef:
    check_flags(flags, START_PAUSED | START_BYPASS_CACHE | START_VALIDATE)
    domains = call.daemon.domains
    spec = call.daemon.checked(domains.read(xml))
    return (await domains.create(spec, paused=bool(flags & START_PAUSED))).ref


@calls.change(33, "domain_shutdown", "dom:domain")
async def domain_shutdown(call: Call, dom: DomainRef) -> None:
    await domain_shutdown_flags(call, dom, 0)


@calls.change(258, "domain_shutdown_flags", "dom:domain flags:uint")
async def domain_shutdown_flags(call: Call, dom: DomainRef, flags: int) -> None:
    await _by_agent_or_button(call.daemon.domains.of(dom), flags, "poweroff", "shutdown")


@calls.change(27, "domain_reboot", "dom:domain flags:uint")
async def domain_reboot(call: Call, dom: DomainRef, flags: int) -> None:
    await _by_agent_or_button(call.daemon.domains.of(dom), flags, "reboot", "reboot")


async def _by_agent_or_button(domain: Domain, flags: int, program: str, command: str) -> None:
    """The button if nothing is said, or if it is among what is."""
    entry = domain.running_entry()
    if flags and not flags & (SHUTDOWN_ACPI | SHUTDOWN_AGENT):
        raise LibvirtError(
            Code.ARGUMENT_UNSUPPORTED, "a machine is asked by its button or its agent: mode acpi or agent"
        )
    if flags & SHUTDOWN_AGENT and not flags & SHUTDOWN_ACPI:
        await guest.power(domain, program)
    else:
        await ask(entry, command)


@calls.change(245, "domain_reset", "dom:domain flags:uint")
async def domain_reset(call: Call, dom: DomainRef, flags: int) -> None:
    check_flags(flags, 0)
    await ask(call.daemon.domains.of(dom).running_entry(), "reset")


@calls.change(12, "domain_destroy", "dom:domain")
async def domain_destroy(call: Call, dom: DomainRef) -> None:
    await domain_destroy_flags(call, dom, 0)


@calls.change(234, "domain_destroy_flags", "dom:domain flags:uint")
async def domain_destroy_flags(call: Call, dom: DomainRef, flags: int) -> None:
    check_flags(flags, 3)  # graceful; and one that is about removed logs
    domains = call.daemon.domains
    await domains.destroy(domains.of(dom))


@calls.change(34, "domain_suspend", "dom:domain")
async def domain_suspend(call: Call, dom: DomainRef) -> None:
    domain = call.daemon.domains.of(dom)
    entry = domain.running_entry()
    if domain.state != DomainState.PAUSED:
        await ask(entry, "pause")
        await call.daemon.settled(lambda: domain.state == DomainState.PAUSED or not domain.active)


@calls.change(28, "domain_resume", "dom:domain")
async def domain_resume(call: Call, dom: DomainRef) -> None:
    domain = call.daemon.domains.of(dom)
    entry = domain.running_entry()
    if domain.state == DomainState.RUNNING:
        raise LibvirtError(Code.OPERATION_INVALID, "domain is already running")
    await ask(entry, "resume")
    await call.daemon.settled(lambda: domain.state == DomainState.RUNNING or not domain.active)


# What they are.


@calls.query(14, "domain_get_xml_desc", "dom:domain flags:uint", "xml:string")
async def domain_get_xml_desc(call: Call, dom: DomainRef, flags: int) -> str:
    check_flags(flags, XML_SECURE | XML_INACTIVE | XML_UPDATE_CPU | XML_MIGRATABLE)
    if flags & XML_SECURE:
        call.client.may_change()
    domains = call.daemon.domains
    return domains.of(dom).xml(domains.emulator, inactive=bool(flags & XML_INACTIVE))


@calls.query(16, "domain_get_info", "dom:domain", "state:int max:uhyper memory:uhyper cpus:int time:uhyper")
async def domain_get_info(call: Call, dom: DomainRef) -> tuple[int, int, int, int, int]:
    domain = call.daemon.domains.of(dom)
    from vmm.libvirt.live import balloon_of

    config = domain.spec.config
    kib = config.memory // KIB
    balloon = await balloon_of(domain)
    now = kib if balloon is None else int(balloon["actual"]) // KIB
    return int(domain.state), kib, now, config.cpus, sum(host.process_times(domain.pid))


@calls.query(212, "domain_get_state", "dom:domain flags:uint", "state:int reason:int")
async def domain_get_state(call: Call, dom: DomainRef, flags: int) -> tuple[int, int]:
    domain = call.daemon.domains.of(dom)
    return int(domain.state), int(domain.reason)


@calls.query(229, "domain_get_control_info", "dom:domain flags:uint", "state:uint details:uint time:uhyper")
async def domain_get_control_info(call: Call, dom: DomainRef, flags: int) -> tuple[int, int, int]:
    call.daemon.domains.of(dom).running_entry()
    return 0, 0, 0


@calls.query(150, "domain_is_active", "dom:domain", "active:int")
async def domain_is_active(call: Call, dom: DomainRef) -> int:
    return int(call.daemon.domains.of(dom).active)


@calls.query(151, "domain_is_persistent", "dom:domain", "persistent:int")
async def domain_is_persistent(call: Call, dom: DomainRef) -> int:
    return int(call.daemon.domains.of(dom).persistent is not None)


@calls.query(202, "domain_is_updated", "dom:domain", "updated:int")
async def domain_is_updated(call: Call, dom: DomainRef) -> int:
    return int(call.daemon.domains.of(dom).updated)


@calls.query(19, "domain_get_os_type", "dom:domain", "type:string")
async def domain_get_os_type(call: Call, dom: DomainRef) -> str:
    call.daemon.domains.of(dom)
    return "hvm"


@calls.query(17, "domain_get_max_memory", "dom:domain", "kib:uhyper")
async def domain_get_max_memory(call: Call, dom: DomainRef) -> int:
    return call.daemon.domains.of(dom).spec.config.memory // KIB


@calls.query(18, "domain_get_max_vcpus", "dom:domain", "count:int")
async def domain_get_max_vcpus(call: Call, dom: DomainRef) -> int:
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    return domain.spec.config.most_cpus


@calls.query(200, "domain_get_vcpus_flags", "dom:domain flags:uint", "count:int")
async def domain_get_vcpus_flags(call: Call, dom: DomainRef, flags: int) -> int:
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG | VCPU_MAXIMUM)
    config = spec_for(call, call.daemon.domains.of(dom), flags & 3).config
    return config.most_cpus if flags & VCPU_MAXIMUM else config.cpus


@calls.change(32, "domain_set_vcpus", "dom:domain count:uint")
async def domain_set_vcpus(call: Call, dom: DomainRef, count: int) -> None:
    await domain_set_vcpus_flags(call, dom, count, AFFECT_LIVE)


@calls.change(199, "domain_set_vcpus_flags", "dom:domain count:uint flags:uint")
async def domain_set_vcpus_flags(call: Call, dom: DomainRef, count: int, flags: int) -> None:
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG | VCPU_MAXIMUM)
    domain = call.daemon.domains.of(dom)
    running, config = wants(call, domain, flags)
    if running and flags & VCPU_MAXIMUM:
        raise LibvirtError(Code.INVALID_ARG, "setting maximum vcpus is only possible for the definition; use --config")
    if running:
        from vmm.libvirt.live import set_processors

        await set_processors(call.daemon, domain, count)
    if config and domain.persistent is not None:
        defined = domain.persistent.config
        if flags & VCPU_MAXIMUM and defined.platform == "bare":  # all run from the start
            _redefine(call, domain, cpus=count)
        elif flags & VCPU_MAXIMUM:
            _redefine(call, domain, max_cpus=count, cpus=min(defined.cpus, count))
        elif defined.max_cpus is None:
            _redefine(call, domain, cpus=count)
        elif count > defined.max_cpus:
            raise LibvirtError(
                Code.INVALID_ARG, f"requested vcpus is greater than max allowable vcpus: {count} > {defined.max_cpus}"
            )
        else:
            _redefine(call, domain, cpus=count)


@calls.change(30, "domain_set_max_memory", "dom:domain kib:uhyper")
async def domain_set_max_memory(call: Call, dom: DomainRef, kib: int) -> None:
    await domain_set_memory_flags(call, dom, kib, MEM_MAXIMUM)


@calls.change(31, "domain_set_memory", "dom:domain kib:uhyper")
async def domain_set_memory(call: Call, dom: DomainRef, kib: int) -> None:
    await domain_set_memory_flags(call, dom, kib, AFFECT_LIVE)


@calls.change(204, "domain_set_memory_flags", "dom:domain kib:uhyper flags:uint")
async def domain_set_memory_flags(call: Call, dom: DomainRef, kib: int, flags: int) -> None:
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG | MEM_MAXIMUM)
    domain = call.daemon.domains.of(dom)
    running, config = wants(call, domain, flags)
    if running and flags & MEM_MAXIMUM:
        raise LibvirtError(Code.OPERATION_INVALID, "cannot resize the maximum memory on an active domain")
    if running:
        from vmm.libvirt.live import set_memory

        await set_memory(call.daemon, domain, kib * KIB)
    if config and (flags & MEM_MAXIMUM or not running):
        _redefine(call, domain, memory=kib * KIB)


@calls.change(390, "domain_set_lifecycle_action", "dom:domain type:uint action:uint flags:uint")
async def domain_set_lifecycle_action(call: Call, dom: DomainRef, type: int, action: int, flags: int) -> None:
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG)
    domain = call.daemon.domains.of(dom)
    running, config = wants(call, domain, flags)
    if (type, action) not in LIFECYCLE_ACTIONS:
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED,
            "a machine that powers off or crashes is gone; a reboot may be restart or destroy",
        )
    if type != REBOOT:
        return
    if running and domain.spec.config.reboot != bool(action):
        raise LibvirtError(
            Code.OPERATION_UNSUPPORTED, "what a reboot does is said before a machine starts; use --config"
        )
    if config:
        _redefine(call, domain, reboot=bool(action))


def _redefine(call: Call, domain: Domain, **values: Any) -> None:
    assert domain.persistent is not None
    spec = call.daemon.checked(domain.persistent.with_config(**values))
    call.daemon.domains.replace_definition(domain, spec)
    domain.updated = domain.active


@calls.query(426, "domain_get_messages", "dom:domain flags:uint", "messages:string<2048>")
async def domain_get_messages(call: Call, dom: DomainRef, flags: int) -> list[str]:
    return [f"not provided: {note}" for note in call.daemon.domains.of(dom).spec.notes]


# Title, description, metadata.

DESCRIPTION, TITLE, ELEMENT = 0, 1, 2


@calls.query(265, "domain_get_metadata", "dom:domain type:int uri:string? flags:uint", "metadata:string")
async def domain_get_metadata(call: Call, dom: DomainRef, type: int, uri: str | None, flags: int) -> str:
    from vmm.libvirt.metadata import get_metadata

    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG)
    found = get_metadata(spec_for(call, call.daemon.domains.of(dom), flags), type, uri)
    if not found:
        raise LibvirtError(Code.NO_DOMAIN_METADATA, "Requested metadata element is not present", From.DOMAIN)
    return found


@calls.change(264, "domain_set_metadata", "dom:domain type:int metadata:string? key:string? uri:string? flags:uint")
async def domain_set_metadata(
    call: Call, dom: DomainRef, type: int, metadata: str | None, key: str | None, uri: str | None, flags: int
) -> None:
    from vmm.libvirt.events import DomainEvent
    from vmm.libvirt.metadata import set_metadata

    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG)
    domains = call.daemon.domains
    domain = domains.of(dom)
    live, config = wants(call, domain, flags)
    if live:
        assert domain.live is not None
        domains.set_live(domain, set_metadata(domain.live, type, metadata, key, uri))
    if config:
        assert domain.persistent is not None
        domains.replace_definition(domain, set_metadata(domain.persistent, type, metadata, key, uri))
    call.daemon.events.domain(DomainEvent.METADATA_CHANGE, domain.ref, type, uri)
