"""Procedures that move a running machine to another daemon: version 3 of libvirt's migration.

The client manages it, or, from peer to peer, the source's daemon does: Perform then is all that the client calls, and
this daemon calls the rest at the target. Begin (source) tells the description, Prepare (target) starts a process that
waits for the machine and says where, Perform (source) moves it, Finish (target) takes it up as a domain, Confirm
(source) looks whether it has gone. What moves is vmm.migration's; the machine is on one side throughout, whatever
becomes of the client.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm.config import Config
from vmm.convert import MIB
from vmm.errors import HostError, VmmError
from vmm.libvirt import jobs
from vmm.libvirt.client import Call, Client
from vmm.libvirt.domain import Domain, DomainState
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.machines import Process, ask, last_words
from vmm.libvirt.peer import Peer, own_certificates
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.spec import Spec, disk_ids
from vmm.libvirt.wire import DomainRef, Param, string_param
from vmm.management.registry import entries

if TYPE_CHECKING:
    from vmm.libvirt.daemon import Daemon

calls = Procedures()

LIVE, PEER2PEER, TUNNELLED, PERSIST_DEST, UNDEFINE_SOURCE, PAUSED = (1 << bit for bit in range(6))
NON_SHARED_DISK, UNSAFE, COMPRESSED, ABORT_ON_ERROR, AUTO_CONVERGE = 1 << 6, 1 << 9, 1 << 11, 1 << 12, 1 << 13
POSTCOPY, TLS, PARALLEL = 1 << 15, 1 << 16, 1 << 17
KNOWN = (
    LIVE | PERSIST_DEST | UNDEFINE_SOURCE | PAUSED | NON_SHARED_DISK | UNSAFE | COMPRESSED | ABORT_ON_ERROR
    | AUTO_CONVERGE | TLS | PARALLEL | PEER2PEER | POSTCOPY
)  # fmt: skip
REFUSED = {
    TUNNELLED: "--tunnelled: a machine goes to the other host by a connection of its own; --tls protects it",
    1 << 7: "--copy-storage-inc: disks are copied whole, by --copy-storage-all",
    1 << 10: "--offline: only what runs moves; define it on the other host",
}
"""What is not here, by flag."""
PARAMS = (
    "migrate_uri", "destination_name", "destination_xml", "persistent_xml", "bandwidth", "parallel.connections",
)  # fmt: skip
PREPARE, FINISH = 303, 306
PREPARE_FORM = ("params:param<64> cookie:opaque<4194304> flags:uint", "cookie:opaque<4194304> uri:string?")
FINISH_FORM = (
    "params:param<64> cookie:opaque<4194304> flags:uint cancelled:int", "dom:domain cookie:opaque<4194304>",
)  # fmt: skip
LISTEN_SECONDS = 20.0
ARRIVE_SECONDS = 60.0
LEFT_SECONDS = 30.0
"""How long a process waits for a machine whose client has gone."""
PERFORM_SECONDS = 24 * 3600.0
MAX_CONNECTIONS = 16
_ADDRESS = re.compile(r"waiting at (tcp|unix):(.*)")


class AwaitedMachine:
    """A process that waits for a machine, from Prepare to Finish."""

    def __init__(self, process: Process, spec: Spec, log: Path, client: Client) -> None:
        self.process, self.spec, self.log, self.client = process, spec, log, client
        self.left: float | None = None
        """Since when its client has been gone, by the loop's clock, while no machine comes."""


def _arrivals(call: Call) -> dict[str, AwaitedMachine]:
    return call.daemon.arrivals


def _params(params: list[Param], flags: int) -> dict[str, Any]:
    """Raises LibvirtError for what is not here, by name."""
    for bit, why in REFUSED.items():
        if flags & bit:
            raise LibvirtError(Code.OPERATION_UNSUPPORTED, why)
    if flags & ~KNOWN:
        raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"migration flags 0x{flags & ~KNOWN:x} are not supported here")
    found: dict[str, Any] = {}
    for param in params:
        if param.field not in PARAMS:
            what = f"the migration parameter '{param.field}' is not supported here"
            raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, what)
        found[param.field] = param.value[1]
    return found


# The source.


@calls.change(
    302, "domain_migrate_begin3_params", "dom:domain params:param<64> flags:uint", "cookie:opaque<4194304> xml:string"
)
async def domain_migrate_begin3_params(
    call: Call, dom: DomainRef, params: list[Param], flags: int
) -> tuple[bytes, str]:
    given = _params(params, flags)
    domain = call.daemon.domains.of(dom)
    description = _begin(call, domain, flags)
    wanted = given.get("destination_xml")
    if isinstance(wanted, str):  # the client gives the target what is returned here
        if call.daemon.domains.read(wanted).uuid != domain.uuid:
            raise LibvirtError(Code.INVALID_ARG, f"--xml: describes another domain than '{domain.name}'")
        description = wanted
    return _cookie(domain), description


def _begin(call: Call, domain: Domain, flags: int) -> str:
    """The description of what is to move. Raises LibvirtError."""
    domain.running_entry()
    if not flags & LIVE:
        raise LibvirtError(Code.OPERATION_UNSUPPORTED, "a machine moves as it runs; add --live")
    if jobs.job_of(domain) is not None:
        raise LibvirtError(Code.OPERATION_INVALID, "another migration job is already running for domain")
    return domain.xml(call.daemon.emulator)


def _cookie(domain: Domain) -> bytes:
    """What the target is to know of the machine beside what may be changed for it: where its disks' files are here."""
    return json.dumps({"disks": _files(domain.spec.config)}).encode()


def _files(config: Config) -> dict[str, str]:
    """Where the file of each disk is, by the disk's name."""
    return dict(zip(disk_ids(config), (str(disk.path) for disk in config.disks), strict=True))


@calls.change(
    305,
    "domain_migrate_perform3_params",
    "dom:domain uri:string? params:param<64> cookie:opaque<4194304> flags:uint",
    "cookie:opaque<4194304>",
)
async def domain_migrate_perform3_params(
    call: Call, dom: DomainRef, uri: str | None, params: list[Param], cookie: bytes, flags: int
) -> bytes:
    given = _params(params, flags)
    domain = call.daemon.domains.of(dom)
    if flags & PEER2PEER:
        if not uri:
            raise LibvirtError(Code.INVALID_ARG, "--p2p: the other daemon's name is missing")
        await _to_peer(call, domain, uri, params, flags)
    else:
        await _perform(call, domain, given, flags)
    return b""


async def _perform(call: Call, domain: Domain, given: dict[str, Any], flags: int) -> None:
    """Move it to where it is awaited. Raises VmmError; then it is here."""
    entry = domain.running_entry()
    address = given.get("migrate_uri")
    if not isinstance(address, str):
        raise LibvirtError(Code.INVALID_ARG, "the target said not where it waits")
    options: dict[str, Any] = {"uri": address, "copy_storage": bool(flags & NON_SHARED_DISK)}
    if given.get("bandwidth"):
        options["bandwidth"] = int(given["bandwidth"]) * MIB
    if flags & COMPRESSED:
        options["compress"] = True
    if flags & POSTCOPY:  # it is begun by domain_migrate_start_post_copy
        options["postcopy"] = "allowed"
    if flags & PARALLEL:
        options["connections"] = max(1, min(int(given.get("parallel.connections", 2)), MAX_CONNECTIONS))
    if flags & TLS:
        options["tls"] = str(own_certificates(call.daemon.settings.tls))
    job = jobs.begin(domain)
    try:
        await ask(entry, "migrate", PERFORM_SECONDS, **options)
    finally:
        job["over"] = True


async def _to_peer(call: Call, domain: Domain, uri: str, params: list[Param], flags: int) -> None:
    """All five steps, with the target's by this daemon's own calls. Raises VmmError; then the machine is here."""
    description = _begin(call, domain, flags)
    flags &= ~PEER2PEER
    if domain.state == DomainState.PAUSED:
        flags |= PAUSED
    named = {param.field for param in params}
    told = [*params]
    if "destination_xml" not in named:
        told.append(string_param("destination_xml", description))
    if "destination_name" not in named:
        told.append(string_param("destination_name", domain.name))
    async with await Peer.open(uri, call.daemon.settings.tls) as peer:
        answer = await peer.call(PREPARE, *PREPARE_FORM, told, _cookie(domain), flags)
        given = {param.field: param.value[1] for param in params} | {"migrate_uri": answer["uri"]}
        try:
            await _perform(call, domain, given, flags)
        except BaseException:
            with suppress(VmmError):  # the peer answers a cancelled migration with an error, by which it agrees
                await peer.call(FINISH, *FINISH_FORM, told, b"", flags, 1)
            raise
        try:
            await peer.call(FINISH, *FINISH_FORM, told, b"", flags, 0)
        finally:
            await _confirm(call, domain, flags)  # it is there, whether or not the peer said so


@calls.change(
    307,
    "domain_migrate_confirm3_params",
    "dom:domain params:param<64> cookie:opaque<4194304> flags:uint cancelled:int",
)
async def domain_migrate_confirm3_params(
    call: Call, dom: DomainRef, params: list[Param], cookie: bytes, flags: int, cancelled: int
) -> None:
    if not cancelled:  # else the machine is here and runs, or is paused and says why
        await _confirm(call, call.daemon.domains.of(dom), flags)


async def _confirm(call: Call, domain: Domain, flags: int) -> None:
    """It has gone. Raises VmmError."""
    domains = call.daemon.domains
    if domain.active:
        await domains.gone(domain)
    if flags & UNDEFINE_SOURCE and domain.persistent is not None:
        domains.undefine(domain)


def _tls(call: Call) -> Path:
    directory = call.daemon.settings.tls
    if directory is None:
        raise LibvirtError(Code.OPERATION_UNSUPPORTED, "--tls: this daemon has no certificates; run it with --tls DIR")
    return directory


# The target.


@calls.change(PREPARE, "domain_migrate_prepare3_params", *PREPARE_FORM)
async def domain_migrate_prepare3_params(
    call: Call, params: list[Param], cookie: bytes, flags: int
) -> tuple[bytes, str | None]:
    given = _params(params, flags)
    text = given.get("destination_xml")
    if not isinstance(text, str):
        raise LibvirtError(Code.INVALID_ARG, "no domain XML passed")
    domains = call.daemon.domains
    spec = domains.read(text)
    if name := given.get("destination_name"):
        spec = spec.with_config(name=name)
    there = next((domain for domain in domains.all() if spec.name == domain.name or spec.uuid == domain.uuid), None)
    if there is not None and (there.active or there.name != spec.name or there.uuid != spec.uuid):
        raise LibvirtError(Code.OPERATION_INVALID, f"domain '{there.name}' is already active or another one here")
    domains.networks.check(spec)
    if old := _arrivals(call).get(spec.name):
        # What ended, what arrived, and what a client left behind that has gone is no arrival any more.
        if there is None or there.pid != old.process.pid:
            if not old.process.ended.is_set() and not old.client.gone:
                raise LibvirtError(Code.OPERATION_INVALID, f"domain '{spec.name}' is being received already")
            old.process.kill()
        del _arrivals(call)[spec.name]
    listen, host = _where(given.get("migrate_uri"))
    arguments = ["receive", listen, "--name", spec.name, "--console", "none", "--trust"]
    if spec.config.core != "auto":
        arguments += ["--core", spec.config.core]
    if flags & TLS:
        arguments += ["--tls", str(_tls(call))]
    for name, path in _elsewhere(cookie, spec).items():
        arguments += ["--disk", f"{name}={path}"]
    log = call.daemon.store.file("log", f"{spec.name}.log")
    process = Process.start([*call.daemon.settings.launcher, *arguments], log)
    arrival = _arrivals(call)[spec.name] = AwaitedMachine(process, spec, log, call.client)
    try:
        domains.expect(spec, process.pid)
        place = await _listening(arrival)
    except BaseException:
        _abandon(call.daemon, spec.name)
        raise
    if place.startswith("tcp:"):
        port = place.rpartition(":")[2]
        place = f"tcp:{host}:{port}"
    return b"", place


def _elsewhere(cookie: bytes, spec: Spec) -> dict[str, str]:
    """Disks that have another file in the description for this host than at the source. Raises LibvirtError."""
    if not cookie:
        return {}
    paths = _files(spec.config)
    try:
        disks = json.loads(cookie)["disks"]
        there = {name: disks[name] for name in paths if name in disks}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise LibvirtError(Code.INVALID_ARG, "the source's cookie is not one of vmm daemon's") from error
    return {name: paths[name] for name, path in there.items() if path != paths[name]}


def _where(wanted: object) -> tuple[str, str]:
    """(where the process listens, the name under which the source reaches it). Raises LibvirtError."""
    if not isinstance(wanted, str):
        return "tcp:[::]:0" if socket.has_ipv6 else "tcp:0.0.0.0:0", socket.gethostname()
    if found := re.fullmatch(r"unix:(?://)?(/.*)", wanted):
        return f"unix:{found[1]}", ""
    found = re.fullmatch(r"tcp:(?://)?(\[[0-9a-fA-F:.]+\]|[^:/\[\]]+)(?::([0-9]{1,5}))?/?", wanted)
    if found is None:
        what = f"{wanted}: not an address to move to; write tcp://HOST[:PORT] or unix:///PATH"
        raise LibvirtError(Code.INVALID_ARG, what)
    return f"tcp:{found[1]}:{found[2] or 0}", found[1]


async def _listening(arrival: AwaitedMachine) -> str:
    """Where the process says that it waits. Raises HostError with what it says instead."""
    deadline = asyncio.get_running_loop().time() + LISTEN_SECONDS
    while not arrival.process.ended.is_set() and asyncio.get_running_loop().time() < deadline:
        said = await last_words(arrival.log)
        if found := _ADDRESS.search(said):
            return f"{found[1]}:{found[2]}"
        with suppress(TimeoutError):
            await asyncio.wait_for(arrival.process.ended.wait(), 0.02)
    said = await last_words(arrival.log)
    raise HostError(f"{arrival.spec.name}: {said or 'nothing waits for the machine'}")


def _abandon(daemon: Daemon, name: str) -> None:
    arrival = daemon.arrivals.pop(name, None)
    if arrival is not None:
        arrival.process.kill()
        daemon.domains.unexpect(name)


def end_left(daemon: Daemon) -> None:
    """End processes whose client has gone for a while, and to which no machine has begun to come. Raises HostError."""
    if not daemon.arrivals:
        return
    now = asyncio.get_running_loop().time()
    there = {entry.info.get("pid") for entry in entries()}
    for name, arrival in tuple(daemon.arrivals.items()):
        if not arrival.client.gone or arrival.process.pid in there:
            arrival.left = None
        elif arrival.left is None:
            arrival.left = now
        elif now - arrival.left > LEFT_SECONDS:
            _abandon(daemon, name)


@calls.change(FINISH, "domain_migrate_finish3_params", *FINISH_FORM)
async def domain_migrate_finish3_params(
    call: Call, params: list[Param], cookie: bytes, flags: int, cancelled: int
) -> tuple[DomainRef, bytes]:
    given = _params(params, flags)
    name = given.get("destination_name")
    if not isinstance(name, str) or name not in _arrivals(call):
        raise LibvirtError(Code.OPERATION_INVALID, f"no machine '{name}' is expected here")
    arrival = _arrivals(call)[name]
    if cancelled:
        if await _waits_for_memory(call, arrival):
            _arrivals(call).pop(name, None)
            raise LibvirtError(
                Code.OPERATION_FAILED,
                f"'{name}' runs here since post-copy, and waits for memory that is still at its source: "
                f"vmm migrate --recover {name} URI there",
            )
        _abandon(call.daemon, name)
        # The client tells what went wrong before, for which this code stands.
        raise LibvirtError(Code.MIGRATE_FINISH_OK, f"'{name}' stays where it is")
    domain = await _arrived(call, arrival)
    _arrivals(call).pop(name, None)
    domains = call.daemon.domains
    if flags & PAUSED:
        domain.extra.pop("arrives", None)  # it stays paused: when it runs, a user has resumed it
    if flags & PERSIST_DEST and domain.persistent is None:
        text = given.get("persistent_xml")
        domains.define(domains.read(text) if isinstance(text, str) else arrival.spec)
    if domain.entry is not None:
        # Clients set the flag for a machine that was paused when it began; one that was paused since, as by virsh
        # migrate --timeout, runs on here. Whatever becomes of it, it is not at its source any more.
        with suppress(VmmError):
            paused = (await ask(domain.entry, "status")).get("state") == "paused"
            if paused != bool(flags & PAUSED):
                await ask(domain.entry, "pause" if flags & PAUSED else "resume")
    return domain.ref, b""


async def _waits_for_memory(call: Call, arrival: AwaitedMachine) -> bool:
    """Whether the machine runs here already, and its source has to go on; it is a domain of this daemon then."""
    domains = call.daemon.domains
    await domains.scan()
    try:
        domain = domains.named(arrival.spec.name)
        if not domain.active or domain.pid != arrival.process.pid or domain.entry is None:
            return False
        if (await ask(domain.entry, "status")).get("fetching") is None:
            return False
    except VmmError:
        return False
    await domains.received(domain, arrival.spec, arrival.process)
    return True


async def _arrived(call: Call, arrival: AwaitedMachine) -> Domain:
    """The domain that the process's machine is. Raises HostError."""
    domains = call.daemon.domains
    deadline = asyncio.get_running_loop().time() + ARRIVE_SECONDS
    while not arrival.process.ended.is_set() and asyncio.get_running_loop().time() < deadline:
        await domains.scan()
        with suppress(VmmError):
            domain = domains.named(arrival.spec.name)
            if domain.active and domain.pid == arrival.process.pid:
                await domains.received(domain, arrival.spec, arrival.process)
                return domain
        await asyncio.sleep(0.02)
    said = await last_words(arrival.log)
    raise HostError(f"{arrival.spec.name}: {said or 'the machine did not arrive'}")


# While it moves.


@calls.change(164, "domain_abort_job", "dom:domain")
async def domain_abort_job(call: Call, dom: DomainRef) -> None:
    domain = call.daemon.domains.of(dom)
    entry = domain.running_entry()
    if jobs.job_of(domain) is None:
        raise LibvirtError(Code.OPERATION_INVALID, "no job is active on the domain")
    await ask(entry, "migrate-cancel")


@calls.change(364, "domain_migrate_start_post_copy", "dom:domain flags:uint")
async def domain_migrate_start_post_copy(call: Call, dom: DomainRef, flags: int) -> None:
    domain = call.daemon.domains.of(dom)
    entry = domain.running_entry()
    if jobs.job_of(domain) is None:
        raise LibvirtError(Code.OPERATION_INVALID, "domain is not being migrated")
    await ask(entry, "migrate-postcopy")


@calls.change(166, "domain_migrate_set_max_downtime", "dom:domain downtime:uhyper flags:uint")
async def domain_migrate_set_max_downtime(call: Call, dom: DomainRef, downtime: int, flags: int) -> None:
    await _change(call, dom, downtime=downtime / 1000)


@calls.change(207, "domain_migrate_set_max_speed", "dom:domain bandwidth:uhyper flags:uint")
async def domain_migrate_set_max_speed(call: Call, dom: DomainRef, bandwidth: int, flags: int) -> None:
    await _change(call, dom, bandwidth=bandwidth * MIB)


async def _change(call: Call, dom: DomainRef, **values: float) -> None:
    domain = call.daemon.domains.of(dom)
    entry = domain.running_entry()
    if jobs.job_of(domain) is None:
        raise LibvirtError(Code.OPERATION_INVALID, "domain is not being migrated")
    await ask(entry, "migrate-set", **values)
