"""MC146818A real-time clock and 128 bytes of CMOS RAM, on the machine's clock.

Specification: Motorola MC146818A data sheet (section titles below are its own); the century stands at 0x32, as the FADT
says. The time is never counted: it is the clock's wall time plus an offset that setting the time changes. Flags are
computed when they are looked at; a timer runs only for an interrupt that is enabled and not pending yet. Loop thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, ClassVar

from cpu.contract import Space
from cpu.values import U8, dataclass
from vmm.errors import StateError
from vmm.machine import layout
from vmm.machine.interfaces import Assembly, Board, TimerHandle

INDEX_PORT, DATA_PORT = 0x70, 0x71
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, DAY_OF_WEEK, DAY, MONTH, YEAR = range(10)
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32
SIZE = 128
# Register A
UIP, DIVIDER_MASK, DIVIDER_RUN, RATE_MASK = 0x80, 0x70, 0x20, 0x0F
# Register B
SET, PIE, AIE, UIE, SQWE, DM, HOURS_24, DSE = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02, 0x01
# Register C
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
# Register D
VRT = 0x80
DO_NOT_CARE = 0xC0

SECOND = 1_000_000_000
DAY_SECONDS = 86400
UPDATE_NS = 244_000 + 1_984_000
"""UIP is set 244 us before the update cycle, which takes 1984 us with a 32.768 kHz time base ("Update cycle")."""
CLOCK_REGISTERS = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY)
FIRST_SECOND, LAST_SECOND = 0, 253402300799
"""1970-01-01 00:00:00 and 9999-12-31 23:59:59, s since 1970."""


@dataclass(frozen=True, slots=True)
class RtcState:
    """The clock's registers, and how far its time is from the machine's wall clock."""

    kind: ClassVar = "rtc"
    version: ClassVar = 1
    index: Annotated[int, range(SIZE)]
    ram: Annotated[bytes, range(SIZE, SIZE + 1)]
    offset_ns: Annotated[int, range(-(1 << 69), 1 << 69)]
    """From any moment of the machine's wall clock to any second that can be shown."""
    frozen: Annotated[int, range(FIRST_SECOND, LAST_SECOND + 1)] | None
    """The second shown while SET is on."""
    wanted_day: Annotated[int, range(1, 32)] | None
    """The day last written while SET is on."""
    flags: U8


class Rtc:
    """Ports 0x70 and 0x71, interrupting through IRQ 8. Guest time is UTC."""

    state_type = RtcState

    def __init__(self, board: Board, gsi: int = layout.RTC_GSI) -> None:
        self._board = board
        self._clock = board.clock
        self._irq = board.irq_line(gsi)
        self._timer: TimerHandle | None = None
        self._index = 0
        self._ram = bytearray(SIZE)
        self._ram[REGISTER_A] = DIVIDER_RUN | 6
        self._ram[REGISTER_B] = HOURS_24
        self._offset_ns = 0
        self._frozen: int | None = None
        """Second shown while SET is on, None while the clock runs."""
        self._wanted_day: int | None = None
        """The day last written while SET is on: the month may be written after a day that the old one lacks."""
        self._flags = 0
        self._seen_ns = self._time_ns()
        """Guest time up to which the flags are up to date."""

    def attach(self) -> None:
        """The index is written by posted writes: only the data port makes a vCPU wait."""
        self._board.map(Space.PORT, INDEX_PORT, 1, _Index(self), "rtc index")
        self._board.post(Space.PORT, INDEX_PORT, 1, _Index(self), 0)
        self._board.map(Space.PORT, DATA_PORT, 1, self, "rtc data")

    def set_memory_size(self, low: int, high: int) -> None:
        """What firmware would have stored: conventional memory, memory above 1 MiB, 16 MiB and 4 GiB (bytes)."""
        extended = min(max(low - layout.KERNEL_BASE, 0) >> 10, 0xFFFF)
        above16 = min(max(low - (16 << 20), 0) >> 16, 0xFFFF)
        above4g = min(high >> 16, 0xFF_FFFF)
        self._ram[0x15:0x17] = (layout.EBDA.start >> 10).to_bytes(2, "little")
        self._ram[0x17:0x19] = self._ram[0x30:0x32] = extended.to_bytes(2, "little")
        self._ram[0x34:0x36] = above16.to_bytes(2, "little")
        self._ram[0x5B:0x5E] = above4g.to_bytes(3, "little")

    # Time

    def _time_ns(self) -> int:
        """Guest time, ns since 1970, as if the clock ran."""
        return self._clock.wall_ns() + self._offset_ns

    def _second(self) -> int:
        second = self._time_ns() // SECOND if self._frozen is None else self._frozen
        return min(max(second, FIRST_SECOND), LAST_SECOND)

    def _encode(self, value: int) -> int:
        return value if self._ram[REGISTER_B] & DM else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._ram[REGISTER_B] & DM else (value >> 4) * 10 + (value & 15)

    def _encode_hour(self, hour: int) -> int:
        if self._ram[REGISTER_B] & HOURS_24:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self._ram[REGISTER_B] & HOURS_24:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _time_register(self, index: int) -> int:
        fields = time.gmtime(self._second())
        match index:
            case 0x00:
                return self._encode(fields.tm_sec)
            case 0x02:
                return self._encode(fields.tm_min)
            case 0x04:
                return self._encode_hour(fields.tm_hour)
            case 0x06:
                return (fields.tm_wday + 1) % 7 + 1  # 1 is Sunday
            case 0x07:
                return self._encode(fields.tm_mday)
            case 0x08:
                return self._encode(fields.tm_mon)
            case 0x09:
                return self._encode(fields.tm_year % 100)
            case _:
                return self._encode(fields.tm_year // 100)

    def _set_time_register(self, index: int, value: int) -> None:
        """Change one field of the time; a value outside its range becomes the nearest one inside."""
        fields = time.gmtime(self._second())
        year, month, day = fields.tm_year, fields.tm_mon, fields.tm_mday
        hour, minute, second = fields.tm_hour, fields.tm_min, fields.tm_sec
        number = self._decode(value)
        match index:
            case 0x00:
                second = min(number, 59)
            case 0x02:
                minute = min(number, 59)
            case 0x04:
                hour = min(self._decode_hour(value), 23)
            case 0x06:
                return  # follows from the date
            case 0x07:
                day = min(max(number, 1), 31)
            case 0x08:
                month = min(max(number, 1), 12)
            case 0x09:
                year = year // 100 * 100 + min(number, 99)
            case _:
                year = min(number, 99) * 100 + year % 100
        year = min(max(year, 1970), 9999)
        if index == DAY:
            self._wanted_day = day if self._frozen is not None else None
        elif self._wanted_day is not None:
            day = self._wanted_day
        import calendar  # loads locale and datetime; guests seldom set the clock

        day = min(day, calendar.monthrange(year, month)[1])
        moment = calendar.timegm((year, month, day, hour, minute, second))
        if self._frozen is not None:
            self._frozen = moment
        else:
            self._offset_ns += (moment - self._time_ns() // SECOND) * SECOND
        self._seen_ns = self._time_ns()

    # Flags and interrupts

    def _running(self) -> bool:
        return self._frozen is None and self._ram[REGISTER_A] & DIVIDER_MASK == DIVIDER_RUN

    def _period_ns(self) -> int:
        """The periodic rate; 0: none ("Periodic interrupt", table 5)."""
        rate = self._ram[REGISTER_A] & RATE_MASK
        if not rate or self._ram[REGISTER_A] & DIVIDER_MASK != DIVIDER_RUN:
            return 0
        shift = rate - 1 if rate >= 3 else rate + 6
        return (SECOND << shift) // 32768

    def _alarm_fields(self) -> tuple[range, range, range]:
        """Hours, minutes, seconds that match the alarm registers; "don't care" matches all."""

        def matching(raw: int, decode: Callable[[int], int], count: int) -> range:
            if raw & DO_NOT_CARE == DO_NOT_CARE:
                return range(count)
            value = decode(raw)
            return range(value, value + 1) if value < count else range(0)

        ram = self._ram
        return (
            matching(ram[HOURS_ALARM], self._decode_hour, 24), matching(ram[MINUTES_ALARM], self._decode, 60),
            matching(ram[SECONDS_ALARM], self._decode, 60),
        )

    def _next_alarm(self, after: int) -> int | None:
        """The first second (since 1970) later than `after` that the alarm matches; None: never."""
        hours, minutes, seconds = self._alarm_fields()
        if not hours or not minutes or not seconds:
            return None
        midnight = after - after % DAY_SECONDS
        for day in (midnight, midnight + DAY_SECONDS):
            for hour in hours:
                for minute in minutes:
                    start = day + hour * 3600 + minute * 60
                    first = max(start + seconds.start, after + 1)
                    if first < start + seconds.stop:
                        return first
        return None

    def _catch_up(self) -> None:
        """Set the flags for what happened since the last look."""
        now, before = self._time_ns(), self._seen_ns
        self._seen_ns = now
        if now <= before:
            return
        period = self._period_ns()
        if period and now // period != before // period:
            self._flags |= PF
        if self._running() and now // SECOND != before // SECOND:
            self._flags |= UF
            alarm = self._next_alarm(before // SECOND)
            if alarm is not None and alarm <= now // SECOND:
                self._flags |= AF

    def _update(self) -> None:
        """The interrupt line, and a timer for the next enabled event that is not pending."""
        self._catch_up()
        enabled = self._ram[REGISTER_B] & (PIE | AIE | UIE)
        self._irq.set(bool(self._flags & enabled))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = enabled & ~self._flags
        moments = []
        if waiting & PF and (period := self._period_ns()):
            moments.append((self._seen_ns // period + 1) * period)
        if self._running():
            second = self._seen_ns // SECOND
            if waiting & UF:
                moments.append((second + 1) * SECOND)
            if waiting & AF and (alarm := self._next_alarm(second)) is not None:
                moments.append(alarm * SECOND)
        if moments and not self._flags & enabled:
            delay = min(moments) - self._seen_ns
            self._timer = self._clock.call_at(self._clock.now_ns() + delay, self._due)

    def _due(self) -> None:
        self._timer = None
        self._update()

    # Registers

    def read(self, offset: int, size: int) -> int:
        index = self._index
        if index in CLOCK_REGISTERS:
            return self._time_register(index)
        match index:
            case 0x0A:
                updating = self._running() and self._time_ns() % SECOND >= SECOND - UPDATE_NS
                return self._ram[REGISTER_A] | (UIP if updating else 0)
            case 0x0C:
                self._catch_up()
                flags, self._flags = self._flags, 0
                active = flags & self._ram[REGISTER_B] & (PF | AF | UF)
                self._irq.set(False)
                self._update()
                return flags | (IRQF if active else 0)
            case 0x0D:
                return VRT
            case _:
                return self._ram[index]

    def write(self, offset: int, size: int, value: int) -> None:
        index = self._index
        if index in CLOCK_REGISTERS:
            self._catch_up()
            self._set_time_register(index, value)
            self._update()
            return
        match index:
            case 0x0A:
                self._catch_up()
                self._ram[index] = value & ~UIP
            case 0x0B:
                self._catch_up()
                self._write_b(value)
            case 0x0C | 0x0D:
                return
            case _:
                self._catch_up()
                self._ram[index] = value
                if index not in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
                    return
        self._update()

    def _write_b(self, value: int) -> None:
        before = self._ram[REGISTER_B]
        if value & SET:
            value &= ~UIE  # "SET": "it clears UIE"
            if not before & SET:
                self._frozen = self._second()
                self._wanted_day = None
        self._ram[REGISTER_B] = value
        if before & SET and not value & SET:
            assert self._frozen is not None
            self._offset_ns += self._frozen * SECOND - self._time_ns()
            self._frozen = self._wanted_day = None
            self._seen_ns = self._time_ns()

    def set_index(self, value: int) -> None:
        """Port 0x70; bit 7 (NMI mask) has no effect."""
        self._index = value & 0x7F

    def reset(self) -> None:
        """RESET: interrupt enables and flags go, time and RAM stay."""
        self._catch_up()
        self._ram[REGISTER_B] &= ~(PIE | AIE | UIE | SQWE)
        self._flags = 0
        self._index = 0
        self._update()

    def save(self) -> RtcState:
        self._catch_up()
        return RtcState(
            self._index, bytes(self._ram), self._offset_ns, self._frozen, self._wanted_day, self._flags
        )

    def restore(self, state: RtcState) -> None:
        """Raises StateError."""
        if bool(state.ram[REGISTER_B] & SET) != (state.frozen is not None):
            raise StateError("rtc: frozen: the clock stands while SET is on, and only then")
        self._index, self._flags = state.index, state.flags & (PF | AF | UF)
        self._ram[:] = state.ram
        self._offset_ns = state.offset_ns
        self._frozen, self._wanted_day = state.frozen, state.wanted_day
        self._seen_ns = self._time_ns()
        self._update()


class _Index:
    def __init__(self, rtc: Rtc) -> None:
        self._rtc = rtc

    def read(self, offset: int, size: int) -> int:
        return 0xFF  # write-only on the PC

    def write(self, offset: int, size: int, value: int) -> None:
        self._rtc.set_index(value)

    def posted(self, offset: int, size: int, data: bytes) -> None:
        self._rtc.set_index(data[-1])


def attach(assembly: Assembly) -> None:
    rtc = Rtc(assembly.board)
    machine_layout = layout.Layout(assembly.memory.size)
    rtc.set_memory_size(machine_layout.low_end, machine_layout.high_end - layout.HIGH_MEMORY)
    rtc.attach()
    assembly.add("rtc", rtc)
