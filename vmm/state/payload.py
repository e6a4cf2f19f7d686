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
        frozen: int | None                          # an integer, or None
        device: object                              # a part that is a component of its own (state_parts)

        @classmethod
        def upgrade(cls, old: PortStateV1) -> Self: ...

The annotations use the standard library alone, so that packages which may not import this one can declare state too.

A state is hostile until it is parsed. `decode` parses all of it before anything changes; what is malformed, foreign or
newer raises StateError with the component's name and the field. Nothing is pickled.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import types
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Annotated, Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from vmm.errors import StateError

MAX_DEPTH = 16
"""How deep payloads may be nested."""
DEFAULT_LENGTH = range(0, 4097)
"""How long bytes, text, lists and mappings may be where the declaration does not say."""


class Stateful(Protocol):
    """A component whose state is saved and restored.

    A component whose state has `object` fields also has `state_parts()`. It returns a mapping from the name of each
    such field to the component behind it, or to a mapping of components by name.
    """

    state_type: ClassVar[type]
    """The dataclass of its state."""

    def save(self) -> Any:
        """The component's state now: an instance of `state_type`."""

    def restore(self, state: Any) -> None:
        """Take over what `save` gave. The values are ones that the declaration allows. If it raises StateError, it has
        changed nothing."""


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
        return int(value)  # a member of an enumeration becomes its number
    return str(value) if isinstance(value, str) else value


class _Malformed(Exception):
    """What is wrong with a value. On its way out, the parser of each enclosing value adds that value's name, so that no
    names are made for values that are well formed."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._names: list[str] = []

    def within(self, name: object) -> None:
        """Say that the value is part of one with this name."""
        self._names.append(str(name))

    def __str__(self) -> str:
        return ": ".join([*reversed(self._names), self._message])


Parser = Callable[[Any, Any, int], Any]
"""Takes the component or components behind the value, the value, and how deep it may be nested. Returns the typed
value. Raises _Malformed."""


def decode(component: Any, name: str, data: Any) -> Any:
    """The state of `component`, parsed from what `encode` gave. `name` is what messages call it. Raises StateError."""
    parts = component.state_parts() if hasattr(component, "state_parts") else {}
    return _parse(component.state_type, parts, name, data)


def parse(state_type: type, name: str, data: Any) -> Any:
    """Like decode(), for a state without parts, of which only the type is known."""
    return _parse(state_type, {}, name, data)


def prepare(component: Any) -> None:
    """Make the parsers for the state of `component` and its parts now. Otherwise they are made when the first state is
    parsed. *any thread*; two threads at once make some parsers twice, which does no harm."""
    if component is None:
        return
    if isinstance(component, Mapping):
        for part in component.values():
            prepare(part)
        return
    _prepare_type(component.state_type)
    if hasattr(component, "state_parts"):
        prepare(component.state_parts())


def _prepare_type(hint: Any) -> None:
    """prepare() for a declared state, or for the declared states within an annotation."""
    for inner in get_args(hint):
        _prepare_type(inner)
    if dataclasses.is_dataclass(hint) and hint not in _parsers:
        for field in field_types(hint).values():
            _prepare_type(field)
        _parsers_of(hint)


def _parse(state_type: Any, parts: Mapping[str, Any], name: str, data: Any) -> Any:
    try:
        return _payload(state_type, parts, data, MAX_DEPTH)
    except _Malformed as malformed:
        malformed.within(name)
        raise StateError(str(malformed)) from None


def _payload(state_type: Any, parts: Mapping[str, Any], data: Any, depth: int) -> Any:
    if not isinstance(data, dict) or data.keys() != {"kind", "version", "fields"}:
        raise _Malformed("not a state: kind, version and fields are expected")
    if depth <= 0:
        raise _Malformed("nested too deeply")
    if data["kind"] != state_type.kind:
        raise _Malformed(f"the state is of kind {_short(data['kind'])}, not {state_type.kind!r}")
    version, wanted = data["version"], state_type.version
    if type(version) is not int or version < 1:
        raise _Malformed(f"{_short(version)} is no version")
    if version > wanted:
        raise _Malformed(f"version {version} is newer than {wanted}, which this program knows")
    if version < wanted:
        previous = getattr(state_type, "previous", None)
        if previous is None:
            raise _Malformed(f"version {version} is too old; this program knows {wanted}")
        return state_type.upgrade(_payload(previous, parts, data, depth - 1))
    return _fields(state_type, parts, data["fields"], depth)


def _fields(state_type: Any, parts: Mapping[str, Any], data: Any, depth: int) -> Any:
    if depth <= 0:
        raise _Malformed("nested too deeply")
    parsers = _parsers_of(state_type)
    if not isinstance(data, dict):
        raise _Malformed(f"{_short(data)} instead of fields")
    if data.keys() != parsers.keys():
        for missing in parsers.keys() - data.keys():
            raise _Malformed(f"field {missing} is missing")
        for extra in data.keys() - parsers.keys():
            raise _Malformed(f"{_short(extra)} is no field")
    values, name = {}, ""
    try:
        for name, parser in parsers.items():
            values[name] = parser(parts.get(name), data[name], depth - 1)
    except _Malformed as malformed:
        malformed.within(name)
        raise
    return state_type(**values)


def _parsers_of(state_type: Any) -> dict[str, Parser]:
    """The parser of each field by name, in the fields' order."""
    found = _parsers.get(state_type)
    if found is None:
        found = _parsers[state_type] = {name: _parser(hint) for name, hint in field_types(state_type).items()}
    return found


_parsers: dict[Any, dict[str, Parser]] = {}


def _parser(hint: Any) -> Parser:
    """The parser of values with this annotation."""
    allowed: range | None = None
    if get_origin(hint) is Annotated:
        hint, allowed = get_args(hint)[:2]
    origin, inside = get_origin(hint), get_args(hint)
    if hint is int:
        return _integer(allowed)
    if hint is bool:
        return lambda part, data, depth: _typed(bool, data)
    if hint is str:
        return lambda part, data, depth: _sized(_typed(str, data), allowed, "characters")
    if hint is bytes:
        return lambda part, data, depth: _sized(_bytes(data), allowed, "bytes")
    if hint is object:
        return _part
    if origin in (Union, types.UnionType):
        return _optional(_parser(next(kind for kind in inside if kind is not type(None))), type(None) in inside)
    if origin is Literal:
        return _literal(inside)
    if origin is tuple:
        return _list(inside, allowed)
    if origin is dict:
        return _by_name(_parser(inside[1]), allowed)
    if dataclasses.is_dataclass(hint):
        record = _payload if hasattr(hint, "kind") else _fields
        return lambda part, data, depth: record(hint, {}, data, depth)
    raise TypeError(f"{hint} is no type of a state's field")


def _integer(allowed: range | None) -> Parser:
    def parser(part: Any, data: Any, depth: int) -> int:
        if type(data) is not int:  # a bool is no int here
            raise _Malformed(f"{_short(data)} is no int")
        if allowed is not None and data not in allowed:
            raise _Malformed(f"{_short(data)} is not within {allowed.start} to {allowed.stop - 1}")
        return data

    return parser


def _optional(inner: Parser, none: bool) -> Parser:
    return lambda part, data, depth: None if data is None and none else inner(part, data, depth)


def _literal(allowed: tuple[Any, ...]) -> Parser:
    def parser(part: Any, data: Any, depth: int) -> Any:
        if type(data) is not type(allowed[0]) or data not in allowed:
            raise _Malformed(f"{_short(data)} is not one of {', '.join(map(repr, allowed))}")
        return data

    return parser


def _list(kinds: tuple[Any, ...], allowed: range | None) -> Parser:
    whatever = kinds[-1] is Ellipsis
    parsers = [_parser(kind) for kind in kinds if kind is not Ellipsis]

    def parser(part: Any, data: Any, depth: int) -> tuple[Any, ...]:
        items = _typed(list, data)
        if whatever:
            _sized(items, allowed, "entries")
        elif len(items) != len(parsers):
            raise _Malformed(f"{len(items)} entries instead of {len(parsers)}")
        if depth <= 0:
            raise _Malformed("nested too deeply")
        values: list[Any] = []
        try:
            for each, item in zip(repeat(parsers[0]) if whatever else parsers, items, strict=False):
                values.append(each(part, item, depth - 1))
        except _Malformed as malformed:
            malformed.within(len(values))
            raise
        return tuple(values)

    return parser


def _by_name(inner: Parser, allowed: range | None) -> Parser:
    def parser(part: Any, data: Any, depth: int) -> dict[str, Any]:
        items = _sized(_typed(dict, data), allowed, "entries")
        if isinstance(part, Mapping) and items.keys() != part.keys():
            odd = sorted(map(str, set(items) ^ set(part)))
            raise _Malformed(f"the state and this machine differ in {', '.join(odd)[:200]}")
        if depth <= 0:
            raise _Malformed("nested too deeply")
        inside = part if isinstance(part, Mapping) else {}
        values, key = {}, ""
        try:
            for key, item in items.items():
                values[key] = inner(inside.get(key), item, depth - 1)
        except _Malformed as malformed:
            malformed.within(key)
            raise
        return values

    return parser


def _part(part: Any, data: Any, depth: int) -> Any:
    if part is None:
        if data is not None:
            raise _Malformed("the state has a part that this machine has not")
        return None
    parts = part.state_parts() if hasattr(part, "state_parts") else {}
    return _payload(part.state_type, parts, data, depth)


def _typed(kind: type, data: Any) -> Any:
    if type(data) is not kind:  # a bool is no int here
        raise _Malformed(f"{_short(data)} is no {kind.__name__}")
    return data


def _sized(value: Any, allowed: range | None, unit: str) -> Any:
    allowed = allowed if allowed is not None else DEFAULT_LENGTH
    if len(value) not in allowed:
        wanted = f"{allowed.start} to {allowed.stop - 1}" if len(allowed) > 1 else f"{allowed.start}"
        raise _Malformed(f"{len(value)} {unit}; {wanted} may be")
    return value


def _bytes(data: Any) -> bytes:
    text = _typed(str, data)
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _Malformed("not base64") from error


def _short(value: Any) -> str:
    """A foreign value as messages show it."""
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return "a number of more than 128 bits"  # Python refuses to print very large ones
    text = repr(value) if isinstance(value, str | int | bool | float | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}…"


def field_types(state_type: Any) -> dict[str, Any]:
    """The annotation of each field, by the field's name."""
    found = _known.get(state_type)
    if found is None:
        found = _known[state_type] = _read_hints(state_type)
    return found


_known: dict[Any, dict[str, Any]] = {}


def _read_hints(state_type: Any) -> dict[str, Any]:
    hints = get_type_hints(state_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(state_type)}


def describe(state_type: Any) -> list[tuple[str, str]]:
    """For each field of a declaration its name and what it may be, in words for the documentation."""
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
