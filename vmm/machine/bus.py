"""The two address spaces of a machine (I/O ports and MMIO): ranges, look-up, and declared registers.

One class serves both. Where no range claims an address, a guest's read yields all ones and its write is ignored. An
access that lies only partly in a range is split into bytes. `RegisterMap` turns declared registers into a bus device,
so that partial and wide accesses are handled once. This module knows nothing of cores, machines or particular devices.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Literal, Protocol

from cpu.values import dataclass
from vmm.errors import ConfigError, StateError

ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}
"""All ones, by access size in bytes."""
_CACHE_LIMIT = 4096


class BusDevice(Protocol):
    """What a bus range leads to. `offset` is relative to the range; size 1, 2, 4 or 8 bytes; values little-endian.

    A read returns a value of `size` bytes. Where the device defines nothing, a read yields all ones and a write is
    ignored. Guest input must raise nothing but GuestError.
    """

    def read(self, offset: int, size: int) -> int:
        """The value at `offset`."""

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes `value` at `offset`."""


@dataclass(frozen=True, slots=True)
class BusRange:
    """`device` answers [start, end)."""

    start: int
    end: int
    device: BusDevice
    name: str


class Bus:
    """An address space of `limit` addresses. Confined to the loop thread."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self._starts: list[int] = []
        self._ranges: list[BusRange] = []
        self._cache: dict[int, BusRange | None] = {}
        self.unclaimed = 0
        """Accesses that no range claimed."""

    @property
    def ranges(self) -> tuple[BusRange, ...]:
        """All ranges, by address."""
        return tuple(self._ranges)

    def add(self, start: int, size: int, device: BusDevice, name: str) -> None:
        """Put a device at [start, start + size). Raises ConfigError if the range overlaps another or leaves the address
        space."""
        end = start + size
        if size <= 0 or start < 0 or end > self.limit:
            raise ConfigError(f"{name}: {self.name} range {start:#x}+{size:#x} is outside the address space")
        index = bisect_right(self._starts, start)
        for other in self._ranges[max(0, index - 1) : index + 1]:
            if other.start < end and start < other.end:
                raise ConfigError(
                    f"{name}: {self.name} range {start:#x}+{size:#x} overlaps {other.name} at "
                    f"{other.start:#x}+{other.end - other.start:#x}"
                )
        self._starts.insert(index, start)
        self._ranges.insert(index, BusRange(start, end, device, name))
        self._cache.clear()

    def remove(self, start: int) -> None:
        """Take away the range that starts at `start`. Raises StateError if there is none."""
        index = bisect_right(self._starts, start) - 1
        if index < 0 or self._starts[index] != start:
            raise StateError(f"no {self.name} range starts at {start:#x}")
        del self._starts[index], self._ranges[index]
        self._cache.clear()

    def find(self, address: int) -> BusRange | None:
        """The range that claims an address; None: none does."""
        try:
            return self._cache[address]
        except KeyError:
            pass
        index = bisect_right(self._starts, address) - 1
        found = self._ranges[index] if index >= 0 and address < self._ranges[index].end else None
        if len(self._cache) >= _CACHE_LIMIT:
            self._cache.clear()
        self._cache[address] = found
        return found

    def read(self, address: int, size: int) -> int:
        """A guest's read of 1, 2, 4 or 8 bytes."""
        found = self.find(address)
        if found is not None and address + size <= found.end:
            return found.device.read(address - found.start, size) & ONES[size]
        if found is None and self._untouched(address, size):
            self.unclaimed += 1
            return ONES[size]
        return sum(self.read(address + index, 1) << 8 * index for index in range(size))

    def write(self, address: int, size: int, value: int) -> None:
        """A guest's write of 1, 2, 4 or 8 bytes."""
        found = self.find(address)
        if found is not None and address + size <= found.end:
            found.device.write(address - found.start, size, value & ONES[size])
        elif found is None and self._untouched(address, size):
            self.unclaimed += 1
        else:
            for index in range(size):
                self.write(address + index, 1, value >> 8 * index & 0xFF)

    def _untouched(self, address: int, size: int) -> bool:
        return size == 1 or all(self.find(address + index) is None for index in range(1, size))


@dataclass(frozen=True, slots=True)
class Register:
    """One register: where it is and what reading and writing it does.

    Without `read` it reads as all ones; without `write`, writes are ignored. When the guest writes only some of its
    bytes, the others come from `held()` (default: `read`), or with partial="ignore" the write is dropped. When the
    guest reads only some bytes, they come from a read of the whole register.
    """

    name: str
    offset: int
    size: int = 1
    read: Callable[[], int] | None = None
    write: Callable[[int], None] | None = None
    held: Callable[[], int] | None = None
    partial: Literal["merge", "ignore"] = "merge"


class RegisterMap:
    """A bus device made of declared registers, in a window of `size` bytes. Each byte between registers reads as `gap`,
    and ignores writes."""

    def __init__(self, size: int, registers: Iterable[Register], *, gap: int = 0xFF) -> None:
        self.size = size
        self.registers = tuple(sorted(registers, key=lambda register: register.offset))
        self._gap = gap
        self._exact: dict[tuple[int, int], Register] = {}
        self._at: list[Register | None] = [None] * size
        for register in self.registers:
            for offset in range(register.offset, register.offset + register.size):
                if not 0 <= offset < size or self._at[offset] is not None:
                    raise ConfigError(f"register {register.name} does not fit at {register.offset:#x}")
                self._at[offset] = register
            self._exact[register.offset, register.size] = register

    def read(self, offset: int, size: int) -> int:
        """BusDevice.read"""
        register = self._exact.get((offset, size))
        if register is not None:
            return ONES[size] if register.read is None else register.read()
        value, position = 0, offset
        while position < offset + size:
            found = self._at[position] if 0 <= position < self.size else None
            if found is None:
                value |= self._gap << 8 * (position - offset)
                position += 1
                continue
            start, end = max(offset, found.offset), min(offset + size, found.offset + found.size)
            whole = (1 << 8 * found.size) - 1 if found.read is None else found.read()
            part = whole >> 8 * (start - found.offset) & (1 << 8 * (end - start)) - 1
            value |= part << 8 * (start - offset)
            position = end
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """BusDevice.write"""
        register = self._exact.get((offset, size))
        if register is not None:
            if register.write is not None:
                register.write(value)
            return
        position = offset
        while position < offset + size:
            found = self._at[position] if 0 <= position < self.size else None
            if found is None:
                position += 1
                continue
            start, end = max(offset, found.offset), min(offset + size, found.offset + found.size)
            part = value >> 8 * (start - offset) & (1 << 8 * (end - start)) - 1
            self._write_part(found, start - found.offset, end - start, part)
            position = end

    def _write_part(self, register: Register, skip: int, count: int, part: int) -> None:
        if register.write is None:
            return
        if count < register.size:
            if register.partial == "ignore":
                return
            held = register.held or register.read
            mask = (1 << 8 * count) - 1 << 8 * skip
            part = (held() if held is not None else 0) & ~mask | part << 8 * skip
        register.write(part)
