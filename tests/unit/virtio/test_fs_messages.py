"""FUSE messages are declared twice, with construct and in C: both are the same."""

from typing import Any

import pytest

from virtio import _ring
from virtio.fs import messages

LAYOUTS = _ring.FsEngine.layouts()


def _construct_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.removeprefix("fuse_").split("_"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_message_is_the_same_in_c_and_in_construct(name: str) -> None:
    declared: Any = getattr(messages, _construct_name(name))
    offset, found = 0, []
    for one in declared.subcons:
        found.append((one.name, offset, one.sizeof()))
        offset += one.sizeof()
    assert found == LAYOUTS[name]


def test_every_declared_message_is_used_in_c() -> None:
    kinds = {name for name, value in vars(messages).items() if hasattr(value, "subcons") and name != "Struct"}
    assert kinds == {_construct_name(name) for name in LAYOUTS}
