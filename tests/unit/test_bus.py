"""The bus and declared registers, against a byte-by-byte model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import ConfigError, StateError
from vmm.machine.bus import ONES, Bus, Register, RegisterMap

SIZES = st.sampled_from([1, 2, 4, 8])


class Ram:
    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.data[offset : offset + size] = value.to_bytes(size, "little")


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=6),
    st.lists(st.tuples(st.integers(0, 63), SIZES, st.integers(0, (1 << 64) - 1)), max_size=20),
)
def test_accesses_reach_exactly_their_bytes(
    ranges: list[tuple[int, int]], accesses: list[tuple[int, int, int]]
) -> None:
    bus = Bus("test", 128)
    owned: dict[int, int] = {}
    for start, size in ranges:
        try:
            bus.add(start, size, Ram(size), f"{start}")
        except ConfigError:
            assert any(address in owned for address in range(start, start + size))
        else:
            owned |= dict.fromkeys(range(start, start + size), 0)
    for address, size, value in accesses:
        bus.write(address, size, value & ONES[size])
        for index in range(size):
            if address + index in owned:
                owned[address + index] = value >> 8 * index & 0xFF
        assert bus.read(address, size) == sum(owned.get(address + index, 0xFF) << 8 * index for index in range(size))


def test_overlap_names_both() -> None:
    bus = Bus("port", 1 << 16)
    bus.add(0x3F8, 8, Ram(8), "com1")
    with pytest.raises(ConfigError, match=r"mouse: port range 0x3ff\+0x2 overlaps com1 at 0x3f8\+0x8"):
        bus.add(0x3FF, 2, Ram(2), "mouse")
    with pytest.raises(ConfigError, match="outside the address space"):
        bus.add(0xFFFF, 2, Ram(2), "edge")


def test_removed_range_is_gone_from_the_cache() -> None:
    bus = Bus("port", 1 << 16)
    bus.add(0x10, 1, Ram(1), "x")
    assert bus.read(0x10, 1) == 0
    bus.remove(0x10)
    assert bus.read(0x10, 1) == 0xFF
    assert bus.unclaimed == 1
    with pytest.raises(StateError):
        bus.remove(0x10)


class Registers:
    """byte 0, word 2 (merge), long 4 (partial writes ignored), write-only byte 8; byte 1 and 9-15 are gaps."""

    def __init__(self) -> None:
        self.values = {"byte": 0, "word": 0, "long": 0, "trigger": 0}
        self.map = RegisterMap(
            16,
            [
                self._register("byte", 0, 1),
                self._register("word", 2, 2),
                self._register("long", 4, 4, partial="ignore"),
                Register("trigger", 8, 1, write=lambda value: self.values.__setitem__("trigger", value)),
            ],
            gap=0,
        )

    def _register(self, name: str, offset: int, size: int, **more: str) -> Register:
        return Register(
            name,
            offset,
            size,
            read=lambda: self.values[name],
            write=lambda value: self.values.__setitem__(name, value),
            **more,  # type: ignore[arg-type]
        )


def test_exact_accesses() -> None:
    registers = Registers()
    registers.map.write(2, 2, 0xBEEF)
    registers.map.write(4, 4, 0x12345678)
    assert registers.values["word"] == 0xBEEF
    assert registers.map.read(4, 4) == 0x12345678
    assert registers.map.read(8, 1) == 0xFF


def test_partial_write_merges_or_is_ignored() -> None:
    registers = Registers()
    registers.map.write(2, 2, 0x1122)
    registers.map.write(3, 1, 0xAA)
    assert registers.values["word"] == 0xAA22
    registers.map.write(4, 2, 0xFFFF)
    assert registers.values["long"] == 0


def test_wide_access_covers_neighbours_and_gaps() -> None:
    registers = Registers()
    registers.map.write(0, 8, 0x44444444_2222_00_11)
    assert registers.values == {"byte": 0x11, "word": 0x2222, "long": 0x44444444, "trigger": 0}
    assert registers.map.read(0, 8) == 0x44444444_2222_00_11
    assert registers.map.read(3, 2) == 0x4422


@given(st.integers(0, 15), SIZES, st.integers(0, (1 << 64) - 1))
def test_reads_agree_with_bytes(offset: int, size: int, value: int) -> None:
    registers = Registers()
    registers.map.write(offset, size, value & ONES[size])
    whole = registers.map.read(offset, size)
    parts = [registers.map.read(offset + index, 1) for index in range(size)]
    assert whole == sum(part << 8 * index for index, part in enumerate(parts))


def test_overlapping_registers_are_refused() -> None:
    with pytest.raises(ConfigError, match="register b does not fit at 0x1"):
        RegisterMap(4, [Register("a", 0, 2), Register("b", 1, 2)])
