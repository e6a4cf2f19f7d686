"""Lifecycle table, interrupt lines, clock, guest memory, topology."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu.contract import CpuidEntry
from cpu.cpuid import for_vcpu, vendor, without_unsaved
from tests.support.pc import FakeTime
from virtio.errors import GuestError as VirtioGuestError
from vmm.errors import ConfigError, GuestError, HostError, StateError
from vmm.lifecycle import TABLE, Change, Lifecycle, Outcome, Reason, State
from vmm.machine.clock import MachineClock
from vmm.machine.lines import InterruptLines
from vmm.machine.memory import GuestMemory


@given(st.lists(st.sampled_from(Change)))
def test_illegal_changes_change_nothing(changes: list[Change]) -> None:
    life = Lifecycle()
    for change in changes:
        before = life.state
        if (before, change) in TABLE:
            assert life.change(change) is TABLE[before, change]
        else:
            with pytest.raises(StateError, match=f"cannot {change.value} a machine that is {before.value}"):
                life.change(change)
            assert life.state is before


def test_stopped_is_final() -> None:
    assert not [change for state, change in TABLE if state is State.STOPPED]


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome(Reason.SHUTDOWN), 0),
        (Outcome(Reason.RESET), 0),
        (Outcome(Reason.TRIPLE_FAULT), 3),
        (Outcome(Reason.CRASH), 3),
        (Outcome(Reason.HOST_ERROR), 4),
        (Outcome(Reason.TIMEOUT), 124),
        (Outcome(Reason.KILLED), 137),
        (Outcome(Reason.SIGNAL, code=15), 143),
        (Outcome(Reason.EXIT, code=0), 1),
        (Outcome(Reason.EXIT, code=21), 43),
        (Outcome(Reason.EXIT, code=0x1FF), 255),
    ],
)
def test_exit_status(outcome: Outcome, status: int) -> None:
    assert outcome.status == status


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans())))
def test_lines_are_ored_and_only_changes_reach_the_core(changes: list[tuple[int, bool]]) -> None:
    driven: list[tuple[int, bool]] = []
    lines = InterruptLines(lambda gsi, level: driven.append((gsi, level)))
    owners = [lines.line(4) for _ in range(3)]
    levels = [False] * 3
    for owner, level in changes:
        owners[owner].set(level)
        levels[owner] = level
        assert (driven[-1][1] if driven else False) == any(levels)
    assert all(first != second for first, second in zip(driven, driven[1:], strict=False))


def test_lines_outside_the_ioapic_are_refused() -> None:
    with pytest.raises(ConfigError, match="GSI 24 is outside 0 to 23"):
        InterruptLines(lambda gsi, level: None).line(24)


def test_timers_in_order_and_cancelled() -> None:
    time = FakeTime()
    clock = MachineClock(time, 5_000)
    fired: list[str] = []
    clock.call_at(30, lambda: fired.append("c"))
    clock.call_at(10, lambda: fired.append("a"))
    cancelled = clock.call_at(20, lambda: fired.append("x"))
    clock.call_at(20, lambda: fired.append("b"))
    assert time.alarm == 10
    cancelled.cancel()
    time.now = 25
    clock.expire()
    assert fired == ["a", "b"]
    assert time.alarm == 30
    assert clock.wall_ns() == 5_025
    time.now = 30
    clock.expire()
    assert fired == ["a", "b", "c"]


def test_a_timer_armed_again_and_again_does_not_pile_up() -> None:
    clock = MachineClock(FakeTime(), 0)
    for deadline in range(10_000):
        clock.call_at(deadline, lambda: None).cancel()
    assert len(clock._queue) < 200


def test_a_callback_may_arm_another() -> None:
    time = FakeTime()
    clock = MachineClock(time, 0)
    fired: list[int] = []

    def again() -> None:
        fired.append(time.now)
        if len(fired) < 3:
            clock.call_at(time.now, again)

    clock.call_at(0, again)
    for _ in range(3):
        clock.expire()
    assert len(fired) == 3


def test_memory_above_the_hole() -> None:
    memory = GuestMemory((3 << 30) + (1 << 20))
    try:
        assert [(start, len(buffer)) for start, buffer in memory.regions()] == [(0, 3 << 30), (1 << 32, 1 << 20)]
        memory.write(1 << 32, b"high")
        assert memory.read(1 << 32, 4) == b"high"
        for gpa, length in [((3 << 30) - 2, 4), (0xC0000000, 1), ((1 << 32) + (1 << 20) - 1, 2), (0, -1), (-1, 1)]:
            with pytest.raises(GuestError) as error:
                memory.view(gpa, length)
            assert isinstance(error.value, VirtioGuestError)
    finally:
        memory.close()


def test_memory_tells_the_core_of_writes() -> None:
    memory = GuestMemory(1 << 20)
    told: list[tuple[int, int]] = []
    memory.on_written = lambda gpa, length: told.append((gpa, length))
    memory.write(0x1000, b"abc")
    memory.written(0x2000, 5)
    memory.close()
    assert told == [(0x1000, 3), (0x2000, 5)]


def test_memory_that_somebody_still_views_is_closed_later() -> None:
    memory = GuestMemory(1 << 20)
    view = memory.view(0, 16)
    memory.close()
    view[:] = bytes(16)
    view.release()


def test_memory_that_the_host_refuses() -> None:
    with pytest.raises(HostError, match="memory: cannot map 1024T: .*; ask for less memory"):
        GuestMemory(1 << 50)


def test_topology() -> None:
    """One package of single-threaded cores, whatever the host is."""
    entries = [
        CpuidEntry(0, 0, 0, 0xD, 0x6874_7541, 0x444D_4163, 0x6974_6E65),
        CpuidEntry(1, 0, 0, 0, 0x0720_0800, 1 << 31, 1 << 28),
        CpuidEntry(4, 0, 1, 0xFC1F_C121, 0, 0, 0),
        CpuidEntry(4, 3, 1, 0xFC1F_C163, 0, 0, 0),
        CpuidEntry(0xB, 0, 1, 1, 2, 0x100, 0),
        CpuidEntry(0xB, 1, 1, 5, 32, 0x201, 0),
        CpuidEntry(0x8000_0001, 0, 0, 0, 0, 1 << 22, 0),
        CpuidEntry(0x8000_0008, 0, 0, 0x3030, 0, 0x501F, 0),
        CpuidEntry(0x8000_001E, 0, 0, 7, 0x103, 1, 0),
        CpuidEntry(0x8000_0026, 0, 1, 5, 32, 0x201, 7),
    ]
    leaves = {(entry.function, entry.index): entry for entry in for_vcpu(entries, 2, 4)}
    assert leaves[1, 0].ebx == 0x0204_0800
    assert leaves[1, 0].edx >> 28 & 1 and leaves[1, 0].ecx >> 31
    assert leaves[4, 0].eax >> 26 == 3 and leaves[4, 0].eax >> 14 & 0xFFF == 0, "own caches are not shared"
    assert leaves[4, 3].eax >> 26 == 3 and leaves[4, 3].eax >> 14 & 0xFFF == 3
    assert [leaves[0xB, level].edx for level in (0, 1)] == [2, 2]
    assert leaves[0xB, 1].ebx == 4 and leaves[0xB, 1].eax == 2
    assert leaves[0x8000_0001, 0].ecx == 2, "CmpLegacy, no extended topology"
    assert leaves[0x8000_0008, 0].ecx == 2 << 12 | 3
    assert leaves[0x8000_001E, 0].eax == 2 and leaves[0x8000_001E, 0].ecx == 0
    assert (0x8000_0026, 0) not in leaves
    single = {(entry.function, entry.index): entry for entry in for_vcpu(entries, 0, 1)}
    assert not single[1, 0].edx >> 28 & 1 and single[0x8000_0001, 0].ecx == 0
    entries[0] = CpuidEntry(0, 0, 0, 0x20, 0x756E_6547, 0x6C65_746E, 0x4965_6E69)
    intel = {(entry.function, entry.index): entry for entry in for_vcpu(entries, 2, 4)}
    assert vendor(intel.values()) == b"GenuineIntel"
    assert intel[0x8000_0001, 0].ecx == 1 << 22 and intel[0x8000_0008, 0].ecx == 0x501F, "reserved there: as they were"
    assert intel[0xB, 1].ebx == 4 and intel[4, 0].eax >> 26 == 3


def test_features_that_a_saved_machine_does_not_hold() -> None:
    """Intel's SGX, processor trace, last branch records, AMX, shadow stacks; both vendors' virtualization."""
    everything = 0xFFFF_FFFF
    leaves = [(1, 0), (7, 0), (7, 1), (0xA, 0), (0xD, 0), (0xD, 1), (0xD, 2), (0xD, 11), (0xD, 18)]
    leaves += [(0x12, 0), (0x14, 0), (0x1C, 0), (0x8000_0001, 0)]
    entries = [CpuidEntry(leaf, index, 1, everything, everything, everything, everything) for leaf, index in leaves]
    kept = {(entry.function, entry.index): entry for entry in without_unsaved(entries)}
    assert not {(0xD, 11), (0xD, 18)} & kept.keys() and (0xD, 2) in kept
    assert [kept[leaf, 0].eax for leaf in (0xA, 0x12, 0x14, 0x1C)] == [0, 0, 0, 0]
    assert not kept[7, 0].ebx & (1 << 2 | 1 << 25) and kept[7, 0].ebx & 1 << 9
    assert not kept[7, 0].ecx & (1 << 7 | 1 << 30) and not kept[7, 0].edx & (1 << 19 | 1 << 20 | 1 << 22 | 3 << 24)
    assert kept[7, 1].edx == everything and not kept[0xD, 1].ecx & 3 << 11
    assert not kept[1, 0].ecx & 1 << 5 and not kept[0x8000_0001, 0].ecx & 1 << 2
