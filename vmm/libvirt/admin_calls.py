"""Procedures of libvirt's admin program, which virt-admin speaks on a socket of its own: who is connected, how many may
be, what is logged.

There are two servers, as with libvirtd: `libvirtd`, which the sockets of managing clients are, and `admin`, which is
this one. Calls are tasks of one loop, so pools of workers are told as they are, without threads.
"""

from __future__ import annotations

import grp
import logging
import pwd
import re
from contextlib import suppress
from typing import TYPE_CHECKING

from vmm.errors import ConfigError
from vmm.libvirt.client import Call
from vmm.libvirt.connect_calls import LIBVIRT_VERSION
from vmm.libvirt.domain_calls import check_flags
from vmm.libvirt.errors import Code, From, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.wire import PARAM_BOOLEAN, ClientRef, Param, ServerRef, int_param, string_param, uint_param

if TYPE_CHECKING:
    from vmm.libvirt.client import Client

calls = Procedures()

MANAGING, ADMIN = "libvirtd", "admin"
UNIX, TLS = 0, 2
"""virClientTransport."""
MOST_CLIENTS = 100_000
LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
"""libvirt's levels of messages."""
MAX_FILTERS = 64
ROOT = "vmm"


def _server(server: ServerRef) -> str:
    if server.name not in (MANAGING, ADMIN):
        raise LibvirtError(Code.NO_SERVER, f"No server named '{server.name}'", From.ADMIN)
    return server.name


def _clients(call: Call, name: str) -> list[Client]:
    return [client for client in call.daemon.clients() if client.admin == (name == ADMIN)]


def _ref(client: Client) -> ClientRef:
    transport = TLS if client.subject else UNIX
    return ClientRef(ServerRef(ADMIN if client.admin else MANAGING), client.number, int(client.since), transport)


def _client(call: Call, server: ServerRef, number: int) -> Client:
    for client in _clients(call, _server(server)):
        if client.number == number:
            return client
    raise LibvirtError(Code.NO_CLIENT, f"no client with matching id '{number}'", From.ADMIN)


@calls.change(1, "connect_open", "flags:uint")
async def connect_open(call: Call, flags: int) -> None:
    check_flags(flags, 0)
    call.client.uri = "libvirtd:///system"


@calls.change(2, "connect_close")
async def connect_close(call: Call) -> None:
    return None


@calls.change(3, "connect_get_lib_version", "", "version:uhyper")
async def connect_get_lib_version(call: Call) -> int:
    return LIBVIRT_VERSION


@calls.change(4, "connect_list_servers", "need:uint flags:uint", "servers:server<16384> count:uint")
async def connect_list_servers(call: Call, need: int, flags: int) -> tuple[list[ServerRef], int]:
    check_flags(flags, 0)
    found = [ServerRef(MANAGING), ServerRef(ADMIN)]
    return (found if need else []), len(found)


@calls.change(5, "connect_lookup_server", "name:string flags:uint", "server:server")
async def connect_lookup_server(call: Call, name: str, flags: int) -> ServerRef:
    check_flags(flags, 0)
    return ServerRef(_server(ServerRef(name)))


@calls.change(6, "server_get_threadpool_parameters", "server:server flags:uint", "params:param<32>")
async def server_get_threadpool_parameters(call: Call, server: ServerRef, flags: int) -> list[Param]:
    check_flags(flags, 0)
    working = sum(client.working for client in _clients(call, _server(server)))
    values = {"minWorkers": 0, "maxWorkers": 0, "nWorkers": working, "freeWorkers": 0, "prioWorkers": 0}
    return [uint_param(name, value) for name, value in {**values, "jobQueueDepth": 0}.items()]


@calls.change(7, "server_set_threadpool_parameters", "server:server params:param<32> flags:uint")
async def server_set_threadpool_parameters(call: Call, server: ServerRef, params: list[Param], flags: int) -> None:
    _server(server)
    raise LibvirtError(
        Code.OPERATION_UNSUPPORTED, "calls are tasks of one loop; there are no workers to count", From.ADMIN
    )


@calls.change(8, "server_list_clients", "server:server need:uint flags:uint", "clients:client<16384> count:uint")
async def server_list_clients(call: Call, server: ServerRef, need: int, flags: int) -> tuple[list[ClientRef], int]:
    check_flags(flags, 0)
    found = [_ref(client) for client in _clients(call, _server(server))]
    return (found if need else []), len(found)


@calls.change(9, "server_lookup_client", "server:server id:uhyper flags:uint", "client:client")
async def server_lookup_client(call: Call, server: ServerRef, id: int, flags: int) -> ClientRef:
    check_flags(flags, 0)
    return _ref(_client(call, server, id))


@calls.change(10, "client_get_info", "client:client flags:uint", "params:param<64>")
async def client_get_info(call: Call, client: ClientRef, flags: int) -> list[Param]:
    check_flags(flags, 0)
    found = _client(call, client.server, client.id)
    params = [Param("readonly", (PARAM_BOOLEAN, int(found.read_only)))]
    if found.subject:
        return [*params, string_param("sock_addr", found.address), string_param("tls_x509_dname", found.subject)]
    pid, uid, gid = found.credentials
    user, group = str(uid), str(gid)
    with suppress(KeyError):
        user = pwd.getpwuid(uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(gid).gr_name
    return [
        *params,
        string_param("sock_addr", "127.0.0.1:0"),
        int_param("unix_user_id", uid),
        string_param("unix_user_name", user),
        int_param("unix_group_id", gid),
        string_param("unix_group_name", group),
        int_param("unix_process_id", pid),
    ]


@calls.change(11, "client_close", "client:client flags:uint")
async def client_close(call: Call, client: ClientRef, flags: int) -> None:
    check_flags(flags, 0)
    found = _client(call, client.server, client.id)
    if found is call.client:
        call.afterwards.append(found.abort)
    else:
        found.abort()


@calls.change(12, "server_get_client_limits", "server:server flags:uint", "params:param<32>")
async def server_get_client_limits(call: Call, server: ServerRef, flags: int) -> list[Param]:
    check_flags(flags, 0)
    clients = _clients(call, _server(server))
    limits = call.daemon.limits
    values = {
        "nclients_max": limits.clients,
        "nclients": len(clients),
        "nclients_unauth_max": limits.greeting,
        "nclients_unauth": sum(client.uri is None for client in clients),
    }
    return [uint_param(name, value) for name, value in values.items()]


@calls.change(13, "server_set_client_limits", "server:server params:param<32> flags:uint")
async def server_set_client_limits(call: Call, server: ServerRef, params: list[Param], flags: int) -> None:
    check_flags(flags, 0)
    _server(server)
    limits = call.daemon.limits
    wanted = {"nclients_max": limits.clients, "nclients_unauth_max": limits.greeting}
    for param in params:
        if param.field not in wanted:
            raise LibvirtError(Code.INVALID_ARG, f"'{param.field}' is not set; {' and '.join(wanted)} are", From.ADMIN)
        wanted[param.field] = int(param.value[1])
    if not 1 <= wanted["nclients_unauth_max"] <= wanted["nclients_max"] <= MOST_CLIENTS:
        raise LibvirtError(
            Code.INVALID_ARG,
            f"1 to {MOST_CLIENTS} clients are allowed, and no more of them that have not opened their connection",
            From.ADMIN,
        )
    limits.clients, limits.greeting = wanted["nclients_max"], wanted["nclients_unauth_max"]


# What is logged.


def _level() -> int:
    chosen = logging.getLogger().getEffectiveLevel()
    return next((number for number, level in LEVELS.items() if chosen <= level), 4)


def read_filters(text: str) -> dict[str, int]:
    """ "1:client 3:domains" as levels by the names of loggers. Raises ConfigError."""
    found: dict[str, int] = {}
    for word in text.split():
        match = re.fullmatch(r"([1-4]):([A-Za-z0-9_.]{1,60})", word)
        if match is None or len(found) >= MAX_FILTERS:
            what = "a filter is LEVEL:NAME, from 1 (everything) to 4 (errors), as 1:libvirt.client"
            raise ConfigError(f"{word:.80}: {what}")
        found[f"{ROOT}.{match[2].removeprefix(f'{ROOT}.')}"] = int(match[1])
    return found


@calls.change(14, "connect_get_logging_outputs", "flags:uint", "outputs:string count:uint")
async def connect_get_logging_outputs(call: Call, flags: int) -> tuple[str, int]:
    check_flags(flags, 0)
    return f"{_level()}:stderr", 1


@calls.change(15, "connect_get_logging_filters", "flags:uint", "filters:string? count:uint")
async def connect_get_logging_filters(call: Call, flags: int) -> tuple[str | None, int]:
    check_flags(flags, 0)
    filters = call.daemon.log_filters
    text = " ".join(f"{level}:{name.removeprefix(f'{ROOT}.')}" for name, level in filters.items())
    return text or None, len(filters)


@calls.change(16, "connect_set_logging_outputs", "outputs:string? flags:uint")
async def connect_set_logging_outputs(call: Call, outputs: str | None, flags: int) -> None:
    check_flags(flags, 0)
    match = re.fullmatch(r"\s*([1-4]):stderr\s*", outputs or "2:stderr")
    if match is None:
        what = "messages go to LEVEL:stderr, from 1 (everything) to 4 (errors)"
        raise LibvirtError(Code.INVALID_ARG, f"{outputs!r:.80}: {what}", From.ADMIN)
    logging.getLogger().setLevel(LEVELS[int(match[1])])


@calls.change(17, "connect_set_logging_filters", "filters:string? flags:uint")
async def connect_set_logging_filters(call: Call, filters: str | None, flags: int) -> None:
    check_flags(flags, 0)
    wanted = read_filters(filters or "")
    for name in call.daemon.log_filters.keys() - wanted.keys():
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name, level in wanted.items():
        logging.getLogger(name).setLevel(LEVELS[level])
    call.daemon.log_filters = wanted


@calls.change(18, "server_update_tls_files", "server:server flags:uint")
async def server_update_tls_files(call: Call, server: ServerRef, flags: int) -> None:
    check_flags(flags, 0)
    if _server(server) != MANAGING or call.daemon.tls is None:
        raise LibvirtError(Code.OPERATION_UNSUPPORTED, f"server '{server.name}' does not listen for TLS", From.ADMIN)
    call.daemon.tls.reload()


@calls.change(19, "connect_set_daemon_timeout", "timeout:uint flags:uint")
async def connect_set_daemon_timeout(call: Call, timeout: int, flags: int) -> None:
    raise LibvirtError(Code.OPERATION_UNSUPPORTED, "this daemon stays until it is told to end", From.ADMIN)
