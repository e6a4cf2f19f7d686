"""Operations of the control socket for live migration (vmm/management/control.py):

    {"command": "migrate", "uri": "tcp:host:4444", …}  -> {"ok": true, "migration": {…}} when it runs there
    {"command": "migrate-cancel"}                      -> {"ok": true}; the request above then fails
    {"command": "migrate", "uri": …, "recover": true}  -> likewise: post-copy goes on over a new connection
    {"command": "migrate-set", "bandwidth": …}         -> {"ok": true}; also "downtime", seconds
    {"command": "migrate-postcopy"}                    -> {"ok": true}: what is left of its memory follows the machine
    {"command": "receive-recover", "uri": …}           -> {"ok": true, "uri": where the source may come back}

Loop thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError, StateError
from vmm.migration.link import parse_uri
from vmm.migration.precopy import Options
from vmm.migration.source import Outgoing

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

_FIELDS: dict[str, tuple[type, ...]] = {
    "bandwidth": (int,),
    "downtime": (int, float),
    "connections": (int,),
    "compress": (bool,),
    "throttle": (int,),
    "postcopy": (bool, str),
    "copy_storage": (bool,),
    "drop_connections": (bool,),
}


def _typed(request: dict[str, Any], name: str) -> Any:
    value, kinds = request[name], _FIELDS[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{name}: {str(value)[:60]!r} is not what belongs there")
    return value


def _place(request: dict[str, Any], word: str) -> tuple[str, str | None]:
    """The address, and the directory of a certificate. Raises ConfigError."""
    uri, tls = request.get("uri"), request.get("tls")
    if not isinstance(uri, str) or not (tls is None or isinstance(tls, str)):
        raise ConfigError(f"{word}: uri and tls are text")
    return uri, tls


async def migrate(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """To its end. Raises ConfigError, StateError, HostError."""
    uri, tls = _place(request, "migrate")
    if request.get("recover"):
        outgoing = _under_way(vm)
        return {"migration": (await outgoing.recover(parse_uri(uri), tls)).as_dict()}
    options = Options(**{name: _typed(request, name) for name in _FIELDS if request.get(name) is not None})
    address = parse_uri(uri)
    if address.kind == "fd":
        raise ConfigError(f"{uri}: a descriptor of the client's is none of the machine's; use tcp: or unix:")
    progress = await Outgoing(vm, address, options, tls).run()
    return {"migration": progress.as_dict()}


def _under_way(vm: VirtualMachine) -> Outgoing:
    if vm.migration is None:
        raise StateError("no migration is under way")
    return vm.migration


async def cancel(vm: VirtualMachine, _request: dict[str, Any]) -> dict[str, Any]:
    """The machine stays. Raises StateError."""
    _under_way(vm).cancel()
    return {}


async def start_postcopy(vm: VirtualMachine, _request: dict[str, Any]) -> dict[str, Any]:
    """Raises StateError."""
    _under_way(vm).start_postcopy()
    return {}


async def listen_again(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises ConfigError, StateError, HostError."""
    uri, tls = _place(request, "receive")
    if vm.fetching is None or not vm.fetching.needed:
        raise StateError("the machine waits for no memory of another host")
    return {"uri": await vm.fetching.listen(uri, None if tls is None else Path(tls))}


async def change(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """While it is under way. Raises ConfigError, StateError."""
    outgoing = _under_way(vm)
    if request.get("bandwidth") is not None:
        outgoing.set_bandwidth(_typed(request, "bandwidth"))
    if request.get("downtime") is not None:
        outgoing.set_downtime(_typed(request, "downtime"))
    return {}
