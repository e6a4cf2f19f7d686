"""The registers by which processors come and go, and which vCPUs may run."""

from __future__ import annotations

import random
from typing import Any

import pytest

from vmm.acpi import tables
from vmm.config import Config
from vmm.convert import ConfigError
from vmm.devices.cpus import ASKED, EJECT, INSERTED, OST, PRESENT, CpuHotplug, terms


class Board:
    """Counts events, and what vCPUs may do."""

    def __init__(self, count: int, present: set[int]) -> None:
        self.events = 0
        self.allowed: dict[int, bool] = {}
        self.heard: list[tuple[int, str | None]] = []
        self.hotplug = CpuHotplug(count, present, self._event, self.allowed.__setitem__)
        self.hotplug.on_change = lambda index, reason: self.heard.append((index, reason))
        self.hotplug.start()

    def _event(self) -> None:
        self.events += 1

    def get(self, at: int) -> int:
        return self.hotplug.read(at, 4) | self.hotplug.read(at + 4, 4) << 32

    def put(self, at: int, value: int) -> None:
        self.hotplug.write(at, 4, value & 0xFFFFFFFF)
        self.hotplug.write(at + 4, 4, value >> 32)


def test_a_processor_comes() -> None:
    board = Board(64, {0})
    assert board.allowed == {index: False for index in range(1, 64)}
    for index in (1, 40):
        board.hotplug.insert(index)
    assert board.events == 2 and board.allowed[40]
    assert board.get(PRESENT) == board.get(INSERTED) | 1 == 1 | 1 << 1 | 1 << 40
    board.put(INSERTED, 1 << 40)
    assert board.get(INSERTED) == 1 << 1, "what is written is cleared"


def test_a_processor_leaves_when_the_guest_gives_it_up() -> None:
    board = Board(64, {0, 1, 40})
    board.hotplug.ask(40)
    assert board.get(ASKED) == 1 << 40 and 40 in board.hotplug.present
    board.hotplug.write(EJECT, 4, 40)
    assert board.heard == [(40, None)] and board.allowed[40] is False
    assert board.get(PRESENT) == 0b11
    board.hotplug.write(EJECT, 4, 0)
    board.hotplug.write(EJECT, 4, 40)
    board.hotplug.write(EJECT, 4, 0xFFFFFFFF)
    assert board.get(PRESENT) == 0b11, "the first processor stays, and others are not there"
    board.hotplug.ask(1)
    board.hotplug.write(OST, 4, 1 << 24 | 3 << 8 | 0x84)
    board.hotplug.write(OST, 4, 1 << 24 | 3 << 8 | 0x82)
    assert board.heard[1:] == [(1, "the guest does not give it up (status 0x82)")]


def test_state() -> None:
    board = Board(4, {0})
    board.hotplug.insert(2)
    other = Board(4, {0, 1})
    other.hotplug.restore(board.hotplug.save())
    assert other.hotplug.present == {0, 2} and other.hotplug.save() == board.hotplug.save()
    assert other.allowed == {0: True, 1: False, 2: True, 3: False}


def test_any_access_is_harmless() -> None:
    source = random.Random(1)
    board = Board(8, {0, 1, 2})
    for _ in range(3000):
        at, size = source.randrange(32), source.choice((1, 2, 4))
        if source.random() < 0.5:
            value = source.choice((0, 1, 0xFFFFFFFF, source.randrange(1 << 32)))
            board.hotplug.write(at, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= board.hotplug.read(at, size) < 1 << 8 * size
        assert 0 in board.hotplug.present


def test_the_tables_tell_absent_processors_from_present_ones() -> None:
    madt = tables.madt(3, {1})
    flags = [madt[44 + 8 * index + 4 : 44 + 8 * index + 8] for index in range(3)]
    assert flags == [b"\1\0\0\0", b"\2\0\0\0", b"\1\0\0\0"]
    assert len(terms(64)) < 1 << 16


@pytest.mark.parametrize(
    "values", [{"cpus": 3, "max_cpus": 2}, {"cpus": 1, "max_cpus": 2, "platform": "bare"}, {"max_cpus": 65}]
)
def test_impossible_numbers_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="max_cpus"):
        Config(**values)
