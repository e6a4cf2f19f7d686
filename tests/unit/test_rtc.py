"""MC146818A data sheet, by section title: what a driver reads, and when it interrupts."""

from __future__ import annotations

import calendar

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pc import SECOND, Pc
from vmm.devices.rtc import Rtc
from vmm.state.payload import decode, encode

GSI = 8


class Cmos:
    def __init__(self) -> None:
        self.pc = Pc()
        self.rtc = Rtc(self.pc)
        self.rtc.attach()

    def get(self, index: int) -> int:
        self.pc.out(0x70, index)
        return self.pc.inp(0x71)

    def put(self, index: int, value: int) -> None:
        self.pc.out(0x70, index)
        self.pc.out(0x71, value)

    def date(self) -> tuple[int, ...]:
        """Century, year, month, day, hours, minutes, seconds."""
        return tuple(self.get(index) for index in (0x32, 9, 8, 7, 4, 2, 0))

    @property
    def line(self) -> bool:
        return self.pc.levels.get(GSI, False)


def test_time_locations_in_bcd_and_binary_across_a_leap_day() -> None:
    cmos = Cmos()
    assert cmos.date() == (0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x00)
    assert cmos.get(6) == 5, "a Thursday"
    cmos.pc.clock.advance(61 * SECOND)
    assert cmos.date() == (0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x01)
    cmos.put(0x0B, 0x06)
    assert cmos.date() == (20, 24, 3, 1, 0, 0, 1)


def test_12_hour_mode_sets_the_high_bit_in_the_afternoon() -> None:
    cmos = Cmos()
    cmos.put(0x0B, 0x00)
    assert cmos.get(4) == 0x91
    cmos.pc.clock.advance(60 * SECOND)
    assert cmos.get(4) == 0x12
    cmos.pc.clock.advance(12 * 3600 * SECOND)
    assert cmos.get(4) == 0x92


def test_update_in_progress_goes_before_the_second() -> None:
    cmos = Cmos()
    assert not cmos.get(0x0A) & 0x80
    cmos.pc.clock.advance(SECOND - 2_000_000)
    assert cmos.get(0x0A) & 0x80
    cmos.pc.clock.advance(2_000_000)
    assert not cmos.get(0x0A) & 0x80


def test_set_freezes_time_and_starts_the_one_that_was_written() -> None:
    cmos = Cmos()
    cmos.put(0x0B, 0x82)
    for index, value in ((9, 0x31), (7, 0x31), (8, 0x12), (4, 0x11), (2, 0x22), (0, 0x33)):
        cmos.put(index, value)
    cmos.pc.clock.advance(5 * SECOND)
    assert cmos.date() == (0x20, 0x31, 0x12, 0x31, 0x11, 0x22, 0x33)
    assert not cmos.get(0x0A) & 0x80
    cmos.put(0x0B, 0x02)
    cmos.pc.clock.advance(2 * SECOND)
    assert cmos.date() == (0x20, 0x31, 0x12, 0x31, 0x11, 0x22, 0x35)


def test_interrupt_flags_are_set_without_being_enabled_and_cleared_by_reading() -> None:
    cmos = Cmos()
    cmos.get(0x0C)
    cmos.pc.clock.advance(SECOND)
    assert cmos.get(0x0C) & 0xF0 == 0x50, "update ended and periodic, no IRQF"
    assert cmos.get(0x0C) == 0
    assert not cmos.line and cmos.pc.clock.pending == 0


def test_update_ended_interrupt() -> None:
    cmos = Cmos()
    cmos.put(0x0B, 0x12)
    cmos.pc.clock.advance(SECOND - 1)
    assert not cmos.line
    cmos.pc.clock.advance(1)
    assert cmos.line and cmos.get(0x0C) & 0x90 == 0x90 and not cmos.line
    cmos.pc.clock.advance(10 * SECOND)
    assert cmos.line and cmos.pc.clock.pending == 0, "one interrupt until the flag is read"


def test_alarm_interrupt_at_a_time_and_with_dont_care() -> None:
    cmos = Cmos()
    cmos.put(5, 0x00), cmos.put(3, 0x05), cmos.put(1, 0x10)
    cmos.put(0x0B, 0x22)
    cmos.pc.clock.advance(6 * 60 * SECOND + 9 * SECOND)
    assert not cmos.line
    cmos.pc.clock.advance(SECOND)
    assert cmos.line and cmos.get(0x0C) & 0xA0 == 0xA0
    cmos.put(5, 0xFF), cmos.put(3, 0xC0), cmos.put(1, 0x30)
    cmos.pc.clock.advance(20 * SECOND)
    assert cmos.line and cmos.get(4) == 0x00 and cmos.get(2) == 0x05 and cmos.get(0) == 0x30


def test_alarm_that_never_matches_waits_for_nothing() -> None:
    cmos = Cmos()
    cmos.put(5, 0x77)
    cmos.put(0x0B, 0x22)
    assert cmos.pc.clock.pending == 0


def test_periodic_interrupt_rates() -> None:
    for rate, hertz in ((6, 1024), (15, 2), (1, 256), (2, 128), (3, 8192)):
        cmos = Cmos()
        cmos.put(0x0A, 0x20 | rate)
        cmos.put(0x0B, 0x42)
        count = 0
        for _ in range(64):
            cmos.pc.clock.advance(SECOND // hertz + 1)
            count += cmos.line
            cmos.get(0x0C)
        assert count == 64, rate


def test_cmos_ram_and_register_d() -> None:
    cmos = Cmos()
    cmos.put(0x40, 0x5A)
    assert cmos.get(0x40) == 0x5A and cmos.get(0xC0) == 0x5A
    cmos.put(0x0D, 0)
    assert cmos.get(0x0D) == 0x80


def test_state_moves_with_its_alarm() -> None:
    cmos = Cmos()
    cmos.put(5, 0x00), cmos.put(3, 0x00), cmos.put(1, 0x05)
    cmos.put(0x0B, 0x22)
    cmos.put(9, 0x30)
    other = Cmos()
    other.rtc.restore(cmos.rtc.save())
    assert other.date() == cmos.date() and other.rtc.save() == cmos.rtc.save()
    other.pc.clock.advance(65 * SECOND)
    assert other.line


def test_a_time_in_another_millennium_moves() -> None:
    """A guest may set any year, however far that is from the machine's wall clock."""
    cmos = Cmos()
    cmos.put(0x32, 0x99), cmos.put(9, 0x99)
    assert cmos.date()[:2] == (0x99, 0x99)
    other = Cmos()
    other.rtc.restore(decode(other.rtc, "rtc", encode(cmos.rtc.save())))
    assert other.date() == cmos.date()
    other.put(0x32, 0x20)
    assert other.date()[:2] == (0x20, 0x99)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 100 * SECOND)), max_size=30))
def test_any_use_is_answered_with_a_date(uses: list[tuple[int, int, int]]) -> None:
    cmos = Cmos()
    for index, value, ns in uses:
        cmos.put(index, value)
        cmos.pc.clock.advance(ns if cmos.pc.clock.pending == 0 else min(ns, SECOND // 100))
        assert 0 <= cmos.get(index) <= 255
    cmos.put(0x0B, 0x06)
    century, year, month, day, hour, minute, second = cmos.date()
    calendar.timegm((century * 100 + year, month, day, hour, minute, second))
    cmos.rtc.restore(cmos.rtc.save())
    assert cmos.pc.clock.pending <= 1
