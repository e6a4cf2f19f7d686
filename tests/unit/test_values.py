"""cpu/values.py behaves as the standard frozen dataclass with slots."""

import copy
import dataclasses
import pickle
from dataclasses import FrozenInstanceError, field

import pytest

from cpu import values
from cpu.contract import Segment, SystemRegisters
from cpu.exits import CompleteRead, Halt, PortIn, PortOut


def classes(decorator):
    @decorator(frozen=True, slots=True)
    class Point:
        x: int
        y: int = 5
        tags: tuple[int, ...] = field(default_factory=tuple)

    return Point


@pytest.fixture(params=[values.dataclass, dataclasses.dataclass], ids=["ours", "standard"])
def point(request):
    return classes(request.param)


def test_arguments_by_place_name_and_default(point):
    for made in (point(1, 2, (3,)), point(1, y=2, tags=(3,)), point(x=1, tags=(3,), y=2)):
        assert (made.x, made.y, made.tags) == (1, 2, (3,))
    assert (point(1).y, point(1).tags) == (5, ())


@pytest.mark.parametrize(
    ("positional", "named"), [((), {}), ((1, 2, 3, 4), {}), ((1,), {"x": 1}), ((1,), {"z": 1}), ((), {"y": 1})]
)
def test_wrong_arguments(point, positional, named):
    with pytest.raises(TypeError):
        point(*positional, **named)


def test_values_are_equal_by_class_and_fields(point):
    assert point(1, 2) == point(1, 2)
    assert point(1, 2) != point(2, 2)
    assert hash(point(1, 2)) == hash(point(1, 2))
    assert PortIn(1, 2) != CompleteRead(1)
    assert len({PortOut(1, 1, 1), PortOut(1, 1, 1), Halt(), Halt()}) == 2


def test_values_are_frozen_and_have_no_dict(point):
    made = point(1)
    for change in (lambda: setattr(made, "x", 2), lambda: setattr(made, "other", 2), lambda: delattr(made, "x")):
        with pytest.raises((FrozenInstanceError, TypeError)):
            change()
    assert not hasattr(made, "__dict__")


def test_standard_tools_work(point):
    made = point(1)
    assert dataclasses.replace(made, y=7) == point(1, 7)
    assert [each.name for each in dataclasses.fields(point)] == ["x", "y", "tags"]
    assert dataclasses.asdict(made) == {"x": 1, "y": 5, "tags": ()}
    assert "x=1, y=5, tags=()" in repr(made)
    assert copy.copy(made) == made == copy.deepcopy(made)
    match made:
        case point(x, y):
            assert (x, y) == (1, 5)


def test_what_is_public_is_made_of_them():
    assert pickle.loads(pickle.dumps(PortOut(1, 2, 3))) == PortOut(1, 2, 3)
    assert SystemRegisters().cs == Segment()
    with pytest.raises(TypeError):
        CompleteRead()
