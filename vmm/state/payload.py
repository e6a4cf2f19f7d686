"""Typed state: what a component declares, written as JSON-like values and parsed back into typed ones.

A component's state is a dataclass that stands next to the component. Its annotations are the declaration:

    @dataclass(frozen=True, slots=True)
    class PortState:
        kind: ClassVar = "port"
        version: ClassVar = 2
        previous: ClassVar = PortStateV1            # left out for version 1
        level: Annotated[int, range(256)]           # an integer and what it may be
        name: Annotated[str, range(33)]             # text and how many characters it may have
        data: Annotated[bytes, range(17)]           # bytes, likewise
        queue: Annotated[tuple[Entry, ...], range(9)]   # a list of another dataclass, and how long it may be
        parity: Literal["odd", "even"]
        frozen: int | None                          # None, or else
        device: object                              # a part that is a component of its own (state_parts)

        @classmethod
        def upgrade(cls, old: PortStateV1) -> Self: ...

The annotations are made of the standard library alone, so packages that may not import this one declare state too.

A state is hostile until it is parsed. `decode` parses all of it before anything changes; what is malformed, foreign or
newer raises StateError with the component's name and the field. Nothing is pickled.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from vmm.errors import StateError

MAX_DEPTH = 16
"""How deep payloads may be nested."""
DEFAULT_LENGTH = range(0, 4097)
"""Of bytes, text and lists whose declaration says nothing else."""


class Stateful(Protocol):
    """A component whose state is saved and restored.

    One whose state has `object` fields also has `state_parts()`, which returns for each of them the component behind
    it, or a mapping of them by name.
    """

    state_type: ClassVar[type]
    """The dataclass of its state."""

    def save(self) -> Any:
        """Its state now: an instance of `state_type`."""

    def restore(self, state: Any) -> None:
        """Take over what `save` gave; the values are those that the declaration allows. Raises StateError, and
        changes nothing then."""


def encode(state: Any) -> dict[str, Any]:
    """A state as JSON-like values: kind, version and fields; bytes are base64 text."""
    return {"kind": state.kind, "version": state.version, "fields": _record(state)}


def _record(state: Any) -> dict[str, Any]:
    return {name: _plain(getattr(state, name)) for name in field_types(type(state))}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value):
        return encode(value) if hasattr(value, "kind") else _record(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # also an enumeration's
    return str(value) if isinstance(value, str) else value


def decode(component: Any, name: str, data: Any) -> Any:
    """The state of `component`, parsed from what `encode` gave. `name` is what messages call it. Raises StateError."""
    parts = component.state_parts() if hasattr(component, "state_parts") else {}
    return _payload(component.state_type, parts, name, data, MAX_DEPTH)


def parse(state_type: type, name: str, data: Any) -> Any:
    """The same for a state without parts."""
    return _payload(state_type, {}, name, data, MAX_DEPTH)


def _payload(state_type: Any, parts: Mapping[str, Any], where: str, data: Any, depth: int) -> Any:
    if not isinstance(data, dict) or set(data) != {"kind", "version", "fields"}:
        raise StateError(f"{where}: not a state: kind, version and fields are expected")
    if depth <= 0:
        raise StateError(f"{where}: nested too deeply")
    if data["kind"] != state_type.kind:
        raise StateError(f"{where}: the state is of kind {_short(data['kind'])}, not {state_type.kind!r}")
    version, wanted = data["version"], state_type.version
    if type(version) is not int or version < 1:
        raise StateError(f"{where}: {_short(version)} is no version")
    if version > wanted:
        raise StateError(f"{where}: version {version} is newer than {wanted}, which this program knows")
    if version < wanted:
        previous = getattr(state_type, "previous", None)
        if previous is None:
            raise StateError(f"{where}: version {version} is too old; this program knows {wanted}")
        return state_type.upgrade(_payload(previous, parts, where, data, depth - 1))
    return _fields(state_type, parts, where, data["fields"], depth)


def _fields(state_type: Any, parts: Mapping[str, Any], where: str, data: Any, depth: int) -> Any:
    hints = field_types(state_type)
    if not isinstance(data, dict):
        raise StateError(f"{where}: {_short(data)} instead of fields")
    for missing in hints.keys() - data.keys():
        raise StateError(f"{where}: field {missing} is missing")
    for extra in data.keys() - hints.keys():
        raise StateError(f"{where}: {_short(extra)} is no field")
    values = {}
    for name, hint in hints.items():
        values[name] = _value(hint, parts.get(name), f"{where}: {name}", data[name], depth - 1)
    return state_type(**values)


def _value(hint: Any, part: Any, where: str, data: Any, depth: int) -> Any:
    if depth <= 0:
        raise StateError(f"{where}: nested too deeply")
    allowed = None
    if get_origin(hint) is Annotated:
        hint, allowed = get_args(hint)[:2]
    origin = get_origin(hint)
    if hint is bool:
        return _typed(bool, where, data)
    if hint is int:
        value = _typed(int, where, data)
        if allowed is not None and value not in allowed:
            raise StateError(f"{where}: {_short(value)} is not within {allowed.start} to {allowed.stop - 1}")
        return value
    if hint is str:
        return _sized(_typed(str, where, data), allowed, where, "characters")
    if hint is bytes:
        return _sized(_bytes(where, data), allowed, where, "bytes")
    if hint is object:
        return _part(part, where, data, depth)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in get_args(hint):
            return None
        inner = next(kind for kind in get_args(hint) if kind is not type(None))
        return _value(inner, part, where, data, depth)
    if origin is Literal:
        if data not in get_args(hint) or type(data) is not type(get_args(hint)[0]):
            raise StateError(f"{where}: {_short(data)} is not one of {', '.join(map(repr, get_args(hint)))}")
        return data
    if origin is tuple:
        return _tuple(get_args(hint), part, allowed, where, data, depth)
    if origin is dict:
        items = _sized(_typed(dict, where, data), allowed, where, "entries")
        if isinstance(part, Mapping) and set(items) != set(part):
            odd = sorted(map(str, set(items) ^ set(part)))
            raise StateError(f"{where}: the state and this machine differ in {', '.join(odd)[:200]}")
        inside = part if isinstance(part, Mapping) else {}
        kind = get_args(hint)[1]
        return {key: _value(kind, inside.get(key), f"{where}: {key}", item, depth) for key, item in items.items()}
    if dataclasses.is_dataclass(hint):
        if hasattr(hint, "kind"):
            return _payload(hint, {}, where, data, depth)
        return _fields(hint, {}, where, data, depth)
    raise TypeError(f"{where}: {hint} is no type of a state's field")


def _part(part: Any, where: str, data: Any, depth: int) -> Any:
    if part is None:
        if data is not None:
            raise StateError(f"{where}: the state has a part that this machine has not")
        return None
    parts = part.state_parts() if hasattr(part, "state_parts") else {}
    return _payload(part.state_type, parts, where, data, depth)


def _tuple(kinds: tuple[Any, ...], part: Any, allowed: range | None, where: str, data: Any, depth: int) -> Any:
    items = _typed(list, where, data)
    if kinds[-1] is Ellipsis:
        _sized(items, allowed, where, "entries")
        kinds = (kinds[0],) * len(items)
    elif len(items) != len(kinds):
        raise StateError(f"{where}: {len(items)} entries instead of {len(kinds)}")
    return tuple(
        _value(kind, part, f"{where}: {index}", item, depth)
        for index, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _typed(kind: type, where: str, data: Any) -> Any:
    if type(data) is not kind:  # a bool is no int here
        raise StateError(f"{where}: {_short(data)} is no {kind.__name__}")
    return data


def _sized(value: Any, allowed: range | None, where: str, unit: str) -> Any:
    allowed = allowed if allowed is not None else DEFAULT_LENGTH
    if len(value) not in allowed:
        wanted = f"{allowed.start} to {allowed.stop - 1}" if len(allowed) > 1 else f"{allowed.start}"
        raise StateError(f"{where}: {len(value)} {unit}; {wanted} may be")
    return value


def _bytes(where: str, data: Any) -> bytes:
    text = _typed(str, where, data)
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise StateError(f"{where}: not base64") from error


def _short(value: Any) -> str:
    """A foreign value in a message."""
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return "a number of more than 128 bits"  # Python refuses to print the largest
    text = repr(value) if isinstance(value, str | int | bool | float | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}…"


def field_types(state_type: Any) -> dict[str, Any]:
    """Field name -> annotation."""
    found = _known.get(state_type)
    if found is None:
        found = _known[state_type] = _read_hints(state_type)
    return found


_known: dict[Any, dict[str, Any]] = {}


def _read_hints(state_type: Any) -> dict[str, Any]:
    hints = get_type_hints(state_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(state_type)}


def describe(state_type: Any) -> list[tuple[str, str]]:
    """(field, what it may be) of a declaration, for the documentation."""
    return [(name, _describe(hint)) for name, hint in field_types(state_type).items()]


def _describe(hint: Any) -> str:
    allowed = None
    if get_origin(hint) is Annotated:
        hint, allowed = get_args(hint)[:2]
    origin, inner = get_origin(hint), get_args(hint)
    if hint is int:
        return "integer" if allowed is None else _describe_range(allowed)
    if hint in (bytes, str):
        return f"{'bytes' if hint is bytes else 'text'}, {_describe_length(allowed)}"
    if hint is object:
        return "a part's state"
    if hint is bool:
        return "true or false"
    if origin in (Union, types.UnionType):
        return f"{_describe(next(kind for kind in inner if kind is not type(None)))}, or null"
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        return f"list of {_describe(inner[0])}; {_describe_length(allowed)}"
    if origin is tuple:
        return f"list of {len(inner)}: {', '.join(map(_describe, inner))}"
    if origin is dict:
        return f"by name: {_describe(inner[1])}"
    return "; ".join(f"{name} {text}" for name, text in describe(hint))


def _describe_range(allowed: range) -> str:
    for bits in (8, 16, 32, 64):
        if allowed == range(1 << bits):
            return f"u{bits}"
        if allowed == range(-1 << bits - 1, 1 << bits - 1):
            return f"i{bits}"
    return f"{allowed.start} to {allowed.stop - 1}"


def _describe_length(allowed: range | None) -> str:
    allowed = allowed if allowed is not None else DEFAULT_LENGTH
    return f"length {allowed.start}" if len(allowed) == 1 else f"length {allowed.start} to {allowed.stop - 1}"
