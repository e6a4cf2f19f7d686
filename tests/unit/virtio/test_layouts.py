"""The fast views of every layout equal its declaration, and the sizes are the specification's."""

from __future__ import annotations

from typing import Any

import pytest
from construct import Struct

from virtio import layouts

DECLARED = {name: value for name, value in vars(layouts).items() if isinstance(value, Struct)}
SIZES = {
    "SplitDescriptor": 16,
    "PackedDescriptor": 16,
    "UsedElement": 8,
    "PciCapability": 16,
    "PciCommonConfig": 60,
    "NetHeader": 12,
    "NetConfig": 24,
    "BlkHeader": 16,
    "BlkZeroes": 16,
    "BlkConfig": 60,
    "ConsoleControl": 8,
    "ConsoleConfig": 12,
    "VsockHeader": 44,
    "VsockConfig": 8,
}


def plain(value: Any) -> list[Any]:
    return [item for item in value] if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", DECLARED)
def test_fast_views_equal_the_declaration(name: str) -> None:
    declaration = DECLARED[name]
    fast = layouts.fast(declaration)
    assert fast.size == declaration.sizeof() == sum(size for _, size in layouts.fields(declaration).values())
    raw = bytes((7 * i + 9) & 0xFF for i in range(fast.size))
    parsed = declaration.parse(raw)
    values = [item for key, value in parsed.items() if key not in ("_io", "padding") for item in plain(value)]
    assert list(fast.unpack(raw)) == values


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_specifications(name: str) -> None:
    assert DECLARED[name].sizeof() == SIZES[name]
