"""Every declared state: what is written is read back equal, and whatever else is read is refused in one way."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.errors import StateError
from vmm.state.declared import state_types
from vmm.state.payload import decode, describe, encode, field_types, parse

TYPES = state_types()


class Part:
    """A component behind an `object` field."""

    @dataclass(frozen=True, slots=True)
    class State:
        kind: ClassVar = "part"
        version: ClassVar = 1
        value: Annotated[int, range(10)]

    state_type = State


class Whole:
    """A component whose parts are Parts, whatever their names."""

    def __init__(self, state_type: Any) -> None:
        self.state_type = state_type

    def state_parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name, hint in field_types(self.state_type).items():
            if hint is object:
                parts[name] = Part()
            elif get_origin(hint) is dict and get_args(hint)[1] is object:
                parts[name] = {"one": Part(), "two": Part()}
        return parts


def values(hint: Any) -> st.SearchStrategy[Any]:
    """What a field's annotation allows."""
    allowed = None
    if get_origin(hint) is Annotated:
        hint, allowed = get_args(hint)[:2]
    origin, inner = get_origin(hint), get_args(hint)
    length = allowed or range(0, 20)
    most = min(length.stop - 1, length.start + 12)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers() if allowed is None else st.integers(allowed.start, allowed.stop - 1)
    if hint is str:
        return st.text(min_size=length.start, max_size=most)
    if hint is bytes:
        if length.start > 64:
            return st.integers(0, 255).map(lambda byte: bytes([byte]) * length.start)
        return st.binary(min_size=length.start, max_size=most)
    if hint is object:
        return st.builds(Part.State, st.integers(0, 9))
    if origin in (Union, types.UnionType):
        return st.none() | values(next(kind for kind in inner if kind is not type(None)))
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple and inner[-1] is Ellipsis:
        most = max(min(most, 4), length.start)
        return st.lists(values(inner[0]), min_size=length.start, max_size=most).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, inner))
    if origin is dict:
        names = st.just(("one", "two")) if inner[1] is object else st.just(("one",))
        return names.flatmap(lambda keys: st.fixed_dictionaries({key: values(inner[1]) for key in keys}))
    return instances(hint)


def instances(state_type: Any) -> st.SearchStrategy[Any]:
    return st.builds(state_type, **{name: values(hint) for name, hint in field_types(state_type).items()})


@pytest.mark.parametrize("state_type", TYPES, ids=lambda kind: kind.__name__)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_round_trip(state_type: Any, data: st.DataObject) -> None:
    state = data.draw(instances(state_type))
    text = json.dumps(encode(state))
    assert decode(Whole(state_type), "it", json.loads(text)) == state


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON-like value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("state_type", TYPES, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_malformed_is_refused(state_type: Any, data: st.DataObject) -> None:
    """Anything anywhere in it, and anything left out: StateError that names the component, or a state of that type."""
    plain = json.loads(json.dumps(encode(data.draw(instances(state_type)))))
    path = data.draw(st.sampled_from(places(plain)))
    if path and isinstance(path[-1], str) and data.draw(st.booleans()):
        parent = plain
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
    else:
        plain = replaced(plain, path, data.draw(JUNK))
    try:
        state = decode(Whole(state_type), "component", plain)
    except StateError as error:
        assert str(error).startswith("component") and "\n" not in str(error) and len(str(error)) < 500
    else:
        assert isinstance(state, state_type)


@dataclass(frozen=True, slots=True)
class FirstVersion:
    kind: ClassVar = "lamp"
    version: ClassVar = 1
    on: bool


@dataclass(frozen=True, slots=True)
class SecondVersion:
    kind: ClassVar = "lamp"
    version: ClassVar = 2
    previous: ClassVar = FirstVersion
    brightness: Annotated[int, range(101)]

    @classmethod
    def upgrade(cls, old: FirstVersion) -> Self:
        return cls(100 if old.on else 0)


def test_the_previous_version_is_taken_and_a_newer_one_refused() -> None:
    assert parse(SecondVersion, "lamp", encode(FirstVersion(True))) == SecondVersion(100)
    with pytest.raises(StateError, match="lamp: version 2 is newer than 1"):
        parse(FirstVersion, "lamp", encode(SecondVersion(3)))
    with pytest.raises(StateError, match="lamp: the state is of kind 'part', not 'lamp'"):
        parse(FirstVersion, "lamp", encode(Part.State(1)))


PREVIOUS = [kind for kind in TYPES if getattr(kind, "previous", None) is not None]


def older(state_type: Any) -> list[Any]:
    """The versions before it, the newest first."""
    found = []
    while (state_type := getattr(state_type, "previous", None)) is not None:
        found.append(state_type)
    return found


@pytest.mark.parametrize("state_type", PREVIOUS, ids=lambda kind: kind.__name__)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_previous_version_is_brought_up_to_date(state_type: Any, data: st.DataObject) -> None:
    """Whatever such a state holds: it becomes one of the present version, which can be written and read again."""
    for old in older(state_type):
        assert old.kind == state_type.kind and old.version < state_type.version
        state = data.draw(instances(old))
        found = decode(Whole(state_type), "it", json.loads(json.dumps(encode(state))))
        assert isinstance(found, state_type)
        assert decode(Whole(state_type), "it", json.loads(json.dumps(encode(found)))) == found


@pytest.mark.parametrize("state_type", TYPES, ids=lambda kind: kind.__name__)
def test_each_version_has_the_one_before_it(state_type: Any) -> None:
    """A version that nobody can read any more would leave snapshots behind."""
    assert [kind.version for kind in older(state_type)] == list(range(state_type.version - 1, 0, -1))


def test_a_message_names_component_and_field() -> None:
    data = encode(SecondVersion(3))
    data["fields"]["brightness"] = 101
    with pytest.raises(StateError, match="^lamp: brightness: 101 is not within 0 to 100$"):
        parse(SecondVersion, "lamp", data)


def test_every_declaration_can_be_described() -> None:
    """The documentation is made of it."""
    kinds = [kind.kind for kind in TYPES]
    assert len(set(kinds)) == len(kinds) and len(kinds) > 15
    for state_type in TYPES:
        for field, text in describe(state_type):
            assert field and text
