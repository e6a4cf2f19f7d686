"""vmm.machine.memory: where memory comes from, what is frozen, shared and discarded; the bitmaps of vmm._native."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu.contract import VmConfig
from cpu.errors import CpuError
from vmm._native import Mapping, nonzero_pages, runs
from vmm.errors import HostError
from vmm.machine.layout import HIGH_MEMORY, PCI_HOLE
from vmm.machine.memory import (
    PAGE,
    Anonymous,
    CopyOnWrite,
    Extent,
    GuestMemory,
    MemorySource,
    OutsideMemory,
    Shared,
    _without,
)

SIZE = 1 << 20


@pytest.fixture
def memories() -> Iterator[ExitStack]:
    """enter_context-like: callback(memory.close)."""
    with ExitStack() as stack:
        yield stack


def make(stack: ExitStack, source: MemorySource | None = None, size: int = SIZE) -> GuestMemory:
    memory = GuestMemory(size, source=source)
    stack.callback(memory.close)
    return memory


def contents(memory: GuestMemory) -> bytes:
    return b"".join(bytes(view) for _, view in memory.regions())


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def temporary(stack: ExitStack, data: bytes) -> int:
    fd = os.memfd_create("test")
    stack.callback(os.close, fd)
    os.pwrite(fd, data, 0)
    return fd


@pytest.mark.parametrize("source", [None, Anonymous(), Shared(), CopyOnWrite(())])
def test_memory_begins_as_zeros_and_keeps_what_is_written(memories: ExitStack, source: MemorySource | None) -> None:
    memory = make(memories, source)
    assert contents(memory) == bytes(SIZE)
    memory.write(SIZE - 3, b"end")
    assert memory.read(SIZE - 3, 3) == b"end"
    with pytest.raises(OutsideMemory):
        memory.write(SIZE - 2, b"end")


def test_a_large_buffer_stands_where_large_pages_can(memories: ExitStack) -> None:
    mapping = Mapping(4 << 20)
    assert mapping.address % (2 << 20) == 0
    mapping.close()
    assert mapping.address == 0


def test_shared_memory_is_the_same_in_another_mapping(memories: ExitStack) -> None:
    memory = make(memories, Shared(), PCI_HOLE + SIZE)
    low, high = memory.shared
    assert (low.gpa, low.length, high.gpa, high.length) == (0, PCI_HOLE, HIGH_MEMORY, SIZE)
    other = mmap.mmap(high.fd, high.length, offset=high.offset)
    memory.write(HIGH_MEMORY + 5, b"here")
    assert other[5:9] == b"here"
    other[5:9] = b"back"
    assert memory.read(HIGH_MEMORY + 5, 4) == b"back"
    other.close()


def test_pieces_of_files_are_copied_when_written(memories: ExitStack) -> None:
    data = bytes(range(1, 9)) * 512  # a page
    fd = temporary(memories, data * 4)
    memory = make(memories, CopyOnWrite((Extent(PAGE, 2 * PAGE, fd, PAGE), Extent(8 * PAGE, PAGE, fd, 0))))
    assert contents(memory) == bytes(PAGE) + data * 2 + bytes(5 * PAGE) + data + bytes(SIZE - 9 * PAGE)
    memory.write(PAGE, b"mine")
    assert os.pread(fd, 5 * PAGE, 0) == data * 4
    assert memory.read(PAGE, 8) == b"mine" + data[4:8]


def test_the_descriptors_of_extents_stay_the_callers(memories: ExitStack) -> None:
    before = open_files()
    fd = os.memfd_create("test")
    os.ftruncate(fd, SIZE)
    memory = GuestMemory(SIZE, source=CopyOnWrite((Extent(0, PAGE, fd, 0), Extent(PAGE, PAGE, fd, 0))))
    os.close(fd)
    memory.write(0, b"x")
    memory.freeze()
    memory.close()
    assert open_files() == before


@pytest.mark.parametrize(
    ("extents", "what"),
    [
        (((0, PAGE, 4 * PAGE),), "not whole pages of the file"),
        (((0, 5 * PAGE, 0),), "not whole pages of the file"),
        (((0, PAGE, 1),), "not whole pages"),
        (((1, PAGE, 0),), "not whole pages"),
        (((0, 0, 0),), "not whole pages"),
        (((SIZE, PAGE, 0),), "is not in memory"),
        (((0, 1 << 63, 0),), "is not in memory"),
        (((0, 2 * PAGE, 0), (PAGE, PAGE, 0)), "two extents"),
    ],
)
def test_extents_that_cannot_be_are_refused(
    memories: ExitStack, extents: tuple[tuple[int, int, int], ...], what: str
) -> None:
    fd = temporary(memories, bytes(4 * PAGE))
    before = open_files()
    with pytest.raises(HostError, match=f"memory: cannot map 1M: .*{what}"):
        GuestMemory(SIZE, source=CopyOnWrite(tuple(Extent(gpa, length, fd, at) for gpa, length, at in extents)))
    assert open_files() == before
    with pytest.raises(HostError, match="bad file descriptor"):
        GuestMemory(SIZE, source=CopyOnWrite((Extent(0, PAGE, 9999, 0),)))


@pytest.mark.parametrize("source", [None, Shared(), "file"])
def test_frozen_memory_is_the_same_in_copies_and_each_goes_its_own_way(memories: ExitStack, source: object) -> None:
    chosen = source if not isinstance(source, str) else None
    if source == "file":
        chosen = CopyOnWrite((Extent(0, SIZE, temporary(memories, b"f" * SIZE), 0),))
    parent = make(memories, chosen)  # type: ignore[arg-type]
    expected = bytearray(contents(parent))
    copies: list[tuple[GuestMemory, bytearray]] = []
    for generation in range(4):
        for at in range(generation, 250, 7):
            data = struct.pack("<IQ", generation, at)
            parent.write(at * PAGE + 8 * generation, data)
            expected[at * PAGE + 8 * generation : at * PAGE + 8 * generation + 12] = data
        if generation == 2:  # a page that was not zeros becomes zeros
            parent.write(14 * PAGE, bytes(PAGE))
            expected[14 * PAGE : 15 * PAGE] = bytes(PAGE)
        extents = parent.freeze()
        assert contents(parent) == expected
        for number in range(2):
            copy = make(memories, CopyOnWrite(extents))
            assert contents(copy) == expected
            own = bytearray(expected)
            copy.write(9 * PAGE, bytes([generation, number]))
            own[9 * PAGE : 9 * PAGE + 2] = bytes([generation, number])
            copies.append((copy, own))
    for copy, own in copies:
        assert contents(copy) == own
    grandchild = make(memories, CopyOnWrite(copies[-1][0].freeze()))
    assert contents(grandchild) == copies[-1][1]
    assert contents(parent) == expected
    with pytest.raises(PermissionError):  # what is frozen stays so, whoever has the descriptor
        os.pwrite(parent.freeze()[0].fd, b"x", 0)


def test_freezing_costs_what_was_written_since(memories: ExitStack) -> None:
    parent = make(memories, Shared())
    parent.write(0, b"x" * SIZE)
    parent.freeze()
    assert [bits.count(b"\0") for _, bits in parent.present_pages(private=True)] == [SIZE // PAGE // 8]
    parent.write(5 * PAGE, b"again")
    assert [runs(bits) for _, bits in parent.present_pages(private=True)] == [[(5, 1)]]
    extents = parent.freeze()
    assert [(extent.gpa, extent.length) for extent in extents] == [
        (0, 5 * PAGE), (5 * PAGE, PAGE), (6 * PAGE, SIZE - 6 * PAGE)
    ]  # fmt: skip
    assert os.fstat(extents[1].fd).st_blocks * 512 == PAGE


def test_frozen_memory_has_a_bounded_number_of_pieces(memories: ExitStack) -> None:
    parent = make(memories, CopyOnWrite(()), 64 << 20)
    for at in range(0, 64 << 20, 2 * PAGE):
        parent.write(at, b"\1")
    before = contents(parent)
    assert len(parent.freeze()) <= 2048
    assert contents(parent) == before


def test_a_shared_mapping_elsewhere_forbids_freezing_and_changes_nothing(memories: ExitStack) -> None:
    memory = make(memories, Shared())
    memory.write(0, b"before")
    other = mmap.mmap(memory.shared[0].fd, SIZE)
    with pytest.raises(HostError, match="memory: cannot freeze 1M: "):
        memory.freeze()
    other[0:5] = b"still"
    assert memory.read(0, 6) == b"stille"
    other.close()
    memory.freeze()
    assert memory.shared == ()


@pytest.mark.parametrize("source", [None, Shared(), "frozen"])
def test_discarded_pages_read_as_zeros_and_are_told_as_written(memories: ExitStack, source: object) -> None:
    memory = make(memories, None if isinstance(source, str) else source)  # type: ignore[arg-type]
    memory.write(0, b"x" * SIZE)
    if source == "frozen":
        memory.freeze()
        memory.write(3 * PAGE, b"own")
    told: list[tuple[int, int]] = []
    memory.on_written_ranges = lambda ranges: told.extend(struct.iter_unpack("=2Q", ranges))
    memory.discard(2 * PAGE - 1, 3 * PAGE)  # pages 2 and 3 are whole
    memory.discard(9 * PAGE + 1, PAGE)  # none is
    assert told == [(2 * PAGE, 2 * PAGE)]
    expected = b"x" * 2 * PAGE + bytes(2 * PAGE) + b"x" * (SIZE - 4 * PAGE)
    assert contents(memory) == expected
    assert contents(make(memories, CopyOnWrite(memory.freeze()))) == expected
    with pytest.raises(OutsideMemory):
        memory.discard(SIZE - PAGE, 2 * PAGE)


def test_a_guest_that_discards_without_end_uses_up_no_mappings(memories: ExitStack) -> None:
    memory = make(memories, None, 40 << 20)
    memory.write(0, b"x" * (40 << 20))
    memory.freeze()
    for at in range(0, 40 << 20, 2 * PAGE):
        memory.discard(at, PAGE)
    with open("/proc/self/maps") as maps:
        assert len(maps.readlines()) < 8000
    before = contents(memory)
    assert contents(make(memories, CopyOnWrite(memory.freeze()), 40 << 20)) == before


def test_the_dirty_log_joins_the_core_and_the_vmm(memories: ExitStack) -> None:
    from cpu.system import soft_system

    memory = make(memories, None, PCI_HOLE + SIZE)
    with ExitStack() as stack:
        system = soft_system()
        stack.callback(system.close)
        vm = system.create_vm(VmConfig())
        stack.callback(vm.close)
        memory.attach(vm)
        memory.start_dirty_log()
        memory.write(PAGE * 3 - 1, b"ab")
        memory.written_ranges(struct.pack("=4Q", HIGH_MEMORY, 1, HIGH_MEMORY + 70 * PAGE, 1))
        memory.discard(PAGE * 10, PAGE)
        assert [(gpa, runs(bitmap)) for gpa, bitmap in memory.take_dirty()] == [
            (0, [(2, 2), (10, 1)]), (HIGH_MEMORY, [(0, 1), (70, 1)]),
        ]  # fmt: skip
        assert [runs(bitmap) for _, bitmap in memory.take_dirty()] == [[], []]
        memory.stop_dirty_log()


def test_a_freeze_that_was_prepared_copies_what_was_written_meanwhile(memories: ExitStack) -> None:
    from cpu.system import soft_system

    memory = make(memories, None, PCI_HOLE + SIZE)
    before = open_files()
    with ExitStack() as stack:
        system = soft_system()
        stack.callback(system.close)
        vm = system.create_vm(VmConfig())
        stack.callback(vm.close)
        memory.attach(vm)
        memory.write(0, b"x" * 20 * PAGE)
        memory.write(HIGH_MEMORY, b"high")
        memory.prepare_freeze()
        memory.prepare_freeze()
        memory.write(3 * PAGE, bytes(PAGE))
        memory.write(5 * PAGE, b"later")
        memory.write(100 * PAGE, b"new")
        memory.write(HIGH_MEMORY + PAGE, b"too")
        low, high = memory.freeze()
        with pytest.raises(CpuError):
            vm.dirty_log(0)  # it is nobody's any more
        copy = make(memories, CopyOnWrite((low, high)), PCI_HOLE + SIZE)
        for each in (memory, copy):
            expected = b"x" * 3 * PAGE + bytes(PAGE) + b"x" * PAGE + b"later" + b"x" * (15 * PAGE - 5)
            assert each.read(0, 20 * PAGE) == expected
            assert each.read(100 * PAGE, 3) == b"new"
            assert each.read(HIGH_MEMORY, 4) + each.read(HIGH_MEMORY + PAGE, 3) == b"hightoo"
        memory.prepare_freeze()  # nothing to prepare any more
        unused = make(memories, None)
        unused.attach(vm2 := system.create_vm(VmConfig()))
        unused.prepare_freeze()
        vm2.close()
        unused.close()
        copy.close()
        memory.close()
    assert open_files() == before


def test_populating_is_a_hint_that_stays_in_memory(memories: ExitStack) -> None:
    fd = temporary(memories, b"p" * SIZE)
    memory = make(memories, CopyOnWrite((Extent(0, SIZE, fd, 0),)))
    memory.populate(0, SIZE)
    memory.populate(PAGE, PAGE, write=True)
    assert [runs(bits) for _, bits in memory.present_pages()] == [[(0, SIZE // PAGE)]]
    assert [runs(bits) for _, bits in memory.present_pages(private=True)] == [[(1, 1)]]
    with pytest.raises(OutsideMemory):
        memory.populate(SIZE, PAGE)


@given(st.sets(st.integers(0, 200)), st.integers(0, 5))
def test_runs(bits: set[int], gap: int) -> None:
    bitmap = sum(1 << bit for bit in bits).to_bytes(32, "little")
    found = runs(bitmap, gap)
    covered = [page for first, count in found for page in range(first, first + count)]
    assert len(covered) == len(set(covered))
    assert set(covered) >= bits
    for (first, count), (after, _) in zip(found, found[1:], strict=False):
        assert after - first - count > gap
    for first, count in found:
        assert {first, first + count - 1} <= bits
    if gap == 0:
        assert set(covered) == bits


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9))),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9))),
)
def test_taking_ranges_out_of_extents(have: list[tuple[int, int]], take: list[tuple[int, int]]) -> None:
    def disjoint(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        kept: list[tuple[int, int]] = []
        for start, length in sorted(ranges):
            if not kept or start >= sum(kept[-1]):
                kept.append((start, length))
        return kept

    extents = [Extent(start, length, 7, 1000 + start) for start, length in disjoint(have)]
    taken = disjoint(take)
    gone = {at for start, length in taken for at in range(start, start + length)}
    left = {at: 1000 + at for start, length in disjoint(have) for at in range(start, start + length) if at not in gone}
    result = _without(extents, taken)
    assert {e.gpa + at: e.offset + at for e in result for at in range(e.length)} == left
    assert all(a.gpa + a.length <= b.gpa for a, b in zip(result, result[1:], strict=False))


def test_pages_of_zeros() -> None:
    data = bytearray(70 * PAGE + 5)
    for at in (0, PAGE + 7, 64 * PAGE + PAGE - 1, 70 * PAGE + 4):
        data[at] = 1
    assert runs(nonzero_pages(data)) == [(0, 2), (64, 1), (70, 1)]
    assert nonzero_pages(b"") == b""


def test_mappings_refuse_what_is_not_theirs() -> None:
    mapping = Mapping(4 * PAGE)
    for offset, length in ((0, 5 * PAGE), (4 * PAGE, PAGE), (1, PAGE), (0, 0), ((1 << 64) - PAGE, PAGE)):
        with pytest.raises(ValueError):
            mapping.map_anonymous(offset, length)
    with pytest.raises(ValueError):
        runs(b"123")
    view = memoryview(mapping)
    with pytest.raises(BufferError):
        mapping.close()
    view.release()
    mapping.close()
    for use in (lambda: mapping.map_anonymous(0, PAGE), mapping.present_pages, lambda: mapping.advise(0, PAGE, 4)):
        with pytest.raises(ValueError):
            use()
    with pytest.raises(BufferError):
        memoryview(mapping)
    for size in (0, 1, PAGE + 1):
        with pytest.raises(ValueError):
            Mapping(size)
