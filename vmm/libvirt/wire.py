"""The values of libvirt's remote protocol: its structures with their limits, and the notation for arguments and
results.

A signature is text such as "dom:domain flags:uint names:string<16384>": a name and a type for each field. A type is a
word of TYPES, `?` behind it makes it optional, `<n>` an array of at most n. The limits are those that libvirt states
for its protocol. Pure.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from vmm.libvirt.errors import LibvirtError
from vmm.libvirt.xdr import (
    DOUBLE,
    HYPER,
    INT,
    UHYPER,
    UINT,
    Array,
    CharArray,
    DiscriminatedUnion,
    Fixed,
    Opaque,
    Optional,
    Record,
    String,
    Type,
)

STRING_MAX = 4 << 20
"""Bytes of a string."""


class DomainRef(NamedTuple):
    """A domain as clients name it: `id` is -1 while it does not run."""

    name: str
    uuid: bytes
    id: int


class NetworkRef(NamedTuple):
    name: str
    uuid: bytes


class PoolRef(NamedTuple):
    name: str
    uuid: bytes


class VolumeRef(NamedTuple):
    pool: str
    name: str
    key: str


class InterfaceRef(NamedTuple):
    name: str
    mac: str


class NodeDeviceRef(NamedTuple):
    name: str


class SecretRef(NamedTuple):
    uuid: bytes
    usage_type: int
    usage_id: str


class SnapshotRef(NamedTuple):
    name: str
    dom: DomainRef


class FilterRef(NamedTuple):
    name: str
    uuid: bytes


class VcpuInfo(NamedTuple):
    """`state`: 1 is running, 2 blocked; `time`: nanoseconds; `cpu`: the host's processor, -1 if not known."""

    number: int
    state: int
    time: int
    cpu: int


class Stat(NamedTuple):
    """A named or numbered counter."""

    name: Any
    value: int


class IpAddress(NamedTuple):
    """`type`: 0 IPv4, 1 IPv6."""

    type: int
    address: str
    prefix: int


class Addresses(NamedTuple):
    name: str
    mac: str | None
    addresses: list[IpAddress]


class FileSystem(NamedTuple):
    """Of a guest. `disks`: targets of the domain's."""

    point: str
    name: str
    kind: str
    disks: list[str]


class StatsRecord(NamedTuple):
    dom: DomainRef
    params: list[Param]


class ServerRef(NamedTuple):
    """One of the daemon's servers, as virt-admin names them."""

    name: str


class ClientRef(NamedTuple):
    """A client of the daemon. `since`: seconds since 1970; `transport`: 0 UNIX socket, 2 TLS."""

    server: ServerRef
    id: int
    since: int
    transport: int


class Param(NamedTuple):
    """A typed parameter: a name and a pair of a kind (PARAM_INT …) and a value."""

    field: str
    value: tuple[int, Any]


PARAM_INT, PARAM_UINT, PARAM_LLONG, PARAM_ULLONG, PARAM_DOUBLE, PARAM_BOOLEAN, PARAM_STRING = range(1, 8)


def int_param(name: str, value: int) -> Param:
    return Param(name, (PARAM_INT, value))


def uint_param(name: str, value: int) -> Param:
    return Param(name, (PARAM_UINT, value))


def ullong_param(name: str, value: int) -> Param:
    return Param(name, (PARAM_ULLONG, max(value, 0) & 0xFFFF_FFFF_FFFF_FFFF))


def llong_param(name: str, value: int) -> Param:
    return Param(name, (PARAM_LLONG, value))


def boolean_param(name: str, value: bool) -> Param:
    return Param(name, (PARAM_BOOLEAN, int(value)))


def string_param(name: str, value: str) -> Param:
    return Param(name, (PARAM_STRING, value))


def some(values: list[Any], wanted: int) -> tuple[list[Any], int]:
    """(the values, how many there are) for a client that wants so many; clients want none first, to hear how many."""
    return (values[:wanted], len(values)) if wanted > 0 else ([], len(values))


_STRING = String(STRING_MAX)
_UUID = Fixed(16)
_DOMAIN = Record(DomainRef, (_STRING, _UUID, INT))
_NETWORK = Record(NetworkRef, (_STRING, _UUID))
_PARAM = Record(
    Param,
    (
        _STRING,
        DiscriminatedUnion(
            {
                PARAM_INT: INT,
                PARAM_UINT: UINT,
                PARAM_LLONG: HYPER,
                PARAM_ULLONG: UHYPER,
                PARAM_DOUBLE: DOUBLE,
                PARAM_BOOLEAN: INT,
                PARAM_STRING: _STRING,
            }
        ),
    ),
)
_SERVER = Record(ServerRef, (_STRING,))
_ADDRESS = Record(IpAddress, (INT, _STRING, UINT))

TYPES: dict[str, Type] = {
    "int": INT,
    "uint": UINT,
    "hyper": HYPER,
    "uhyper": UHYPER,
    "string": _STRING,
    "uuid": _UUID,
    "model": CharArray(32),
    "domain": _DOMAIN,
    "network": _NETWORK,
    "pool": Record(PoolRef, (_STRING, _UUID)),
    "volume": Record(VolumeRef, (_STRING, _STRING, _STRING)),
    "interface": Record(InterfaceRef, (_STRING, _STRING)),
    "nodedev": Record(NodeDeviceRef, (_STRING,)),
    "secret": Record(SecretRef, (_UUID, INT, _STRING)),
    "snapshot": Record(SnapshotRef, (_STRING, _DOMAIN)),
    "nwfilter": Record(FilterRef, (_STRING, _UUID)),
    "param": _PARAM,
    "vcpuinfo": Record(VcpuInfo, (UINT, INT, UHYPER, INT)),
    "stat": Record(Stat, (_STRING, UHYPER)),
    "memorystat": Record(Stat, (INT, UHYPER)),
    "addresses": Record(Addresses, (_STRING, Optional(_STRING), Array(_ADDRESS, 2048))),
    "statsrecord": Record(StatsRecord, (_DOMAIN, Array(_PARAM, 262144))),
    "diskerror": Record(Stat, (_STRING, INT)),
    "filesystem": Record(FileSystem, (_STRING, _STRING, _STRING, Array(_STRING, 256))),
    "server": _SERVER,
    "client": Record(ClientRef, (_SERVER, UHYPER, HYPER, UINT)),
    "lease": Record(
        lambda *values: values,
        (
            *(_STRING, HYPER, INT, Optional(_STRING), Optional(_STRING)),
            *(_STRING, UINT, Optional(_STRING), Optional(_STRING)),
        ),
    ),
}
_FIELD = re.compile(r"(\w+):(\w+)(\?)?(?:<(\d+)>)?")


class Signature:
    """Fields by name, in order: arguments, a result, or an event's message."""

    def __init__(self, text: str) -> None:
        names, kinds = [], []
        for word in text.split():
            match = _FIELD.fullmatch(word)
            assert match is not None, word
            names.append(match[1])
            kinds.append(_type(match[2], optional=match[3] is not None, limit=int(match[4]) if match[4] else None))
        self.text = text
        self.names = tuple(names)
        self._record = Record(lambda *values: values, kinds)

    def read(self, data: bytes) -> dict[str, Any]:
        """The fields' values by name. Raises XdrError."""
        from vmm.libvirt.xdr import decode

        return dict(zip(self.names, decode(self._record, data), strict=True))

    def write(self, value: Any) -> bytes:
        """What a handler gave back: nothing for no field, the value itself for one, a tuple for several."""
        values = () if not self.names else (value,) if len(self.names) == 1 else tuple(value)
        out = bytearray()
        self._record.write(out, values)
        return bytes(out)


def _type(word: str, *, optional: bool, limit: int | None) -> Type:
    if word == "opaque":
        assert limit is not None
        return Opaque(limit)
    kind: Type = TYPES[word]
    if optional:
        kind = Optional(kind)
    return kind if limit is None else Array(kind, limit)


_ERROR = Record(
    lambda *values: values,
    (
        *(INT, INT, Optional(_STRING), INT, Optional(_DOMAIN)),
        *(Optional(_STRING), Optional(_STRING), Optional(_STRING), INT, INT, Optional(_NETWORK)),
    ),
)
LEVEL_ERROR = 2


def encode_error(error: LibvirtError) -> bytes:
    """An error as the body of a reply."""
    out = bytearray()
    message = str(error)[: 64 << 10]
    values = (int(error.code), int(error.source), message, LEVEL_ERROR, None, message, error.detail, None, -1, -1, None)
    _ERROR.write(out, values)
    return bytes(out)


def decode_error(body: bytes) -> str:
    """The text of an error in a peer's reply. Raises XdrError."""
    from vmm.libvirt.xdr import decode

    _, _, message, *_ = decode(_ERROR, body)
    return " ".join(str(message or "it failed and says not why").split())[:2000]
