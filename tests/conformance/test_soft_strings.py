"""Repeated MOVS and STOS of the software core against a model that goes element by element (SDM vol. 1, 7.3.9; vol. 2,
REP): every size, both directions, overlap, without paging, in large and in small pages, up to a page that is missing, a
page that is read-only, the end of RAM, and the end of a segment. What the dirty log then says is exact.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cpu import _core
from cpu.contract import Registers, Segment, SystemRegisters, VmConfig
from cpu.exits import Entry, Exit, MmioRead, MmioWrite
from cpu.system import soft_system
from tests.support.bare import Bare

pytestmark = pytest.mark.skipif("soft" not in _core.CORES, reason="this build has no software core")

PAGE, LARGE = 1 << 12, 1 << 21
RAM = 8 * LARGE
CODE, GDT, IDT, STACK, PML4 = 0x10000, 0x11000, 0x12000, 0x20000, 0x30000
FAULT, PAGE_FAULT = CODE + 0x100, CODE + 0x200
DATA = range(2 * LARGE, RAM)
WINDOW = 1 << 30
"""Paged modes: linear `WINDOW` is guest-physical 0; below it the first 2 MiB are mapped to themselves."""
MISSING, READ_ONLY = 5 * LARGE, 6 * LARGE
"""Window offsets of the large page (small: of the first small page of it) that is not there, or not writable."""
PRESENT, WRITABLE, ACCESSED, DIRTY, SIZE = 1, 2, 0x20, 0x40, 0x80
CR0_WP, CR0_PG = 1 << 16, 1 << 31
Mode = Literal["flat", "large", "small"]
OPCODES = {("movs", 1): "f3a4", ("movs", 2): "66f3a5", ("movs", 4): "f3a5", ("movs", 8): "f348a5",
           ("stos", 1): "f3aa", ("stos", 2): "66f3ab", ("stos", 4): "f3ab", ("stos", 8): "f348ab"}  # fmt: skip
END = "e6f4f4"
"""out 0xf4, al; hlt"""
PATTERN = bytes((at * 0x9D ^ at >> 8 ^ at >> 16) & 0xFF for at in range(LARGE)) * (len(DATA) // LARGE)


def small_frame(page: int) -> int:
    """The frame of a small page: in every eight the second and third are exchanged."""
    return page ^ 3 if page & 7 in (1, 2) else page


@dataclass
class Machine(Bare):
    """Accesses outside RAM are kept in `outside`."""

    memory: int = RAM
    outside: list[tuple[str, int, int, int]] = field(default_factory=list)

    def answer(self, index: int, exit: Exit) -> Entry | None:
        if isinstance(exit, MmioWrite):
            self.outside.append(("write", exit.address, exit.size, exit.value))
        elif isinstance(exit, MmioRead):
            self.outside.append(("read", exit.address, exit.size, 0))
        return super().answer(index, exit)


def page_tables() -> bytes:
    """PML4; one table with the identity at 0 and each window; directories; small page tables."""
    pdpt, low, large, small, tables = (PML4 + at * PAGE for at in range(1, 6))
    mapped = PRESENT | WRITABLE

    def rights(at: int, first: bool) -> int:
        return 0 if at == MISSING and first else PRESENT if at == READ_ONLY and first else mapped

    parts = [
        [pdpt | mapped],
        [low | mapped, large | mapped, small | mapped],
        [mapped | SIZE],
        [at | SIZE | rights(at, True) for at in range(0, RAM, LARGE)],
        [tables + at // LARGE * PAGE | mapped for at in range(0, RAM, LARGE)],
        *(
            [small_frame((at + n * PAGE) // PAGE) * PAGE | rights(at, n == 0) for n in range(512)]
            for at in range(0, RAM, LARGE)
        ),
    ]
    return b"".join(struct.pack(f"<{len(part)}Q", *part).ljust(PAGE, b"\0") for part in parts)


def system_registers(mode: Mode, limit: int) -> SystemRegisters:
    wide = mode != "flat"
    code = Segment(base=0, limit=0xFFFF_FFFF, selector=8, type=11, present=1, s=1, db=int(not wide), l=int(wide), g=1)
    data = Segment(base=0, limit=0xFFFF_FFFF, selector=16, type=3, present=1, s=1, db=1, g=1)
    short = replace(data, limit=limit, g=int(limit >= 1 << 20))
    task = Segment(base=0x13000, limit=0x67, selector=0, type=11, present=1)
    return SystemRegisters(
        cs=code, ds=short, es=short, fs=data, gs=data, ss=data, tr=task, gdt=(GDT, 23), idt=(IDT, 0xFFF),
        cr0=0x11 | (CR0_PG | CR0_WP if wide else 0), cr3=PML4 if wide else 0, cr4=0x20 if wide else 0,
        efer=0x500 if wide else 0,
    )  # fmt: skip


@dataclass
class Outcome:
    """What an instruction leaves: registers, RAM, page fault address or GENERAL, pages written, accesses outside."""

    ram: bytearray
    rcx: int
    rsi: int
    rdi: int
    fault: int | None = None
    dirty: set[int] = field(default_factory=set)
    outside: list[tuple[str, int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    mode: Mode
    op: str
    size: int
    down: bool
    source: int
    target: int
    count: int
    value: int
    limit: int = 0xFFFF_FFFF
    """Of DS and ES; 64-bit mode does not look."""


GENERAL = -1


def physical(mode: Mode, address: int, write: bool) -> int | None:
    """None: a page fault."""
    if mode == "flat":
        return address
    offset = address - (WINDOW if mode == "large" else 2 * WINDOW)
    page = offset // LARGE * LARGE if mode == "large" else offset // PAGE * PAGE
    if not 0 <= offset < RAM or page == MISSING or (write and page == READ_ONLY):
        return None
    return offset if mode == "large" else small_frame(offset // PAGE) * PAGE | offset % PAGE


def beyond(places: list[int]) -> list[tuple[int, int]]:
    """(address, size) of what lies behind RAM: one access, or single bytes where a bus has no such width."""
    outside = [at for at in places if at >= RAM]
    if len(outside) in (1, 2, 4, 8):
        return [(outside[0], len(outside))]
    return [(at, 1) for at in outside]


def model(case: Case) -> Outcome:
    """One element after the other; an element that faults changes nothing."""
    done = Outcome(bytearray(DATA.start) + PATTERN, case.count, case.source, case.target)
    step = -case.size if case.down else case.size
    value = case.value.to_bytes(8, "little")[: case.size]
    while done.rcx:
        places = []
        for start, write in ((done.rsi, False), (done.rdi, True)) if case.op == "movs" else ((done.rdi, True),):
            if case.mode == "flat" and start + case.size - 1 > case.limit:
                done.fault = GENERAL
                return done
            where = [physical(case.mode, start + n, write) for n in range(case.size)]
            if None in where:
                done.fault = start + where.index(None)
                return done
            places.append([at for at in where if at is not None])
        if case.op == "movs":
            done.outside += [("read", at, size, 0) for at, size in beyond(places[0])]
            value = bytes(done.ram[at] if at < RAM else 0xFF for at in places[0])
        for at, byte in zip(places[-1], value, strict=True):
            if at < RAM:
                done.ram[at] = byte
                done.dirty.add(at // PAGE)
        for at, size in beyond(places[-1]):
            part = value[at - places[-1][0] :][:size]
            done.outside.append(("write", at, size, int.from_bytes(part, "little")))
        done.rcx -= 1
        done.rsi += step if case.op == "movs" else 0
        done.rdi += step
    return done


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine(soft_system(), VmConfig(virtual_clock=True)) as made:
        view = memoryview(made.ram)
        made.vm.set_memory_slot(0, 0, view, log_dirty=True)
        view.release()
        yield made


def run(machine: Machine, case: Case, then: str = "") -> Outcome:
    """The same on the core. then: code that follows."""
    machine.ram[DATA.start :] = PATTERN
    machine.write(PML4, page_tables())
    machine.write(GDT, struct.pack("<3Q", 0, 0x00AF9B000000FFFF if case.mode != "flat" else 0x00CF9B000000FFFF,
                                   0x00CF93000000FFFF))  # fmt: skip
    for vector in range(32):
        handler = PAGE_FAULT if vector == 14 else FAULT
        gate = struct.pack("<HHHHQ", handler & 0xFFFF, 8, 0x8E00, handler >> 16, 0)
        width = 16 if case.mode != "flat" else 8
        machine.write(IDT + vector * width, gate[:width])
    machine.write(CODE, bytes.fromhex(OPCODES[case.op, case.size] + then + END))
    machine.write(FAULT, bytes.fromhex(END))
    machine.write(PAGE_FAULT, bytes.fromhex(END))
    machine.vm.memory_written(0, RAM)
    machine.ended, machine.outside = None, []
    registers = Registers(
        rip=CODE, rsp=STACK, rcx=case.count, rsi=case.source, rdi=case.target, rax=case.value,
        r8=case.count, r9=case.source, r10=case.target,
        rflags=2 | (0x400 if case.down else 0),
    )  # fmt: skip
    machine.vm.dirty_log(0)
    machine.enter(registers, system_registers(case.mode, case.limit))
    machine.start()
    machine.run()
    bitmap = machine.vm.dirty_log(0)
    after = machine.vcpus[0].registers()
    return Outcome(
        bytearray(DATA.start) + machine.ram[DATA.start :], after.rcx, after.rsi, after.rdi,
        machine.vcpus[0].system_registers().cr2 if after.rip >= PAGE_FAULT else GENERAL if after.rip >= FAULT else None,
        {page for page in range(DATA.start // PAGE, RAM // PAGE) if bitmap[page // 8] >> page % 8 & 1},
        machine.outside,
    )  # fmt: skip


BASES = {"flat": 0, "large": WINDOW, "small": 2 * WINDOW}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Places near the edges of pages, of RAM and of what is mapped; targets often near the source; up to 40 pages."""
    mode = draw(st.sampled_from(["flat", "large", "small"]))
    op, size = draw(st.sampled_from(sorted(OPCODES)))
    if mode == "flat" and size == 8:
        size = 4
    down = draw(st.booleans())
    near = st.integers(-20, 20)
    place = st.sampled_from([3 * LARGE, 4 * LARGE, 7 * LARGE, RAM - PAGE])
    source = draw(place) + draw(st.integers(-20, 0)) * PAGE + draw(near)
    apart = draw(st.sampled_from([0, 1, size, 3 * size, 64, PAGE, 5 * PAGE, LARGE, -PAGE, -LARGE]))
    target = source + apart + draw(near) * draw(st.booleans())
    if down:
        source, target = source + 19 * PAGE, target + 19 * PAGE
    pages = draw(st.sampled_from([0, 1, 3, 20, 40] if not down else [0, 1, 3]))
    count = (pages * PAGE) // size + draw(st.integers(0, 40))
    reach = count * size
    limit = RAM - 8 if mode != "flat" else RAM + 200
    low = DATA.start + (reach if down else 0)
    high = limit - (0 if down else reach)
    source, target = (min(max(at, low), high) for at in (source, target))
    value = draw(st.sampled_from([0, 0x4141_4141_4141_4141, 0x0123_4567_89AB_CDEF]))
    base = BASES[mode]
    limit = 0xFFFF_FFFF
    if draw(st.booleans()):
        limit = max(source, target) + draw(st.sampled_from([0, PAGE, 6 * PAGE, 30 * PAGE])) + draw(near)
        limit |= 0xFFF if limit >= 1 << 20 else 0
    return Case(mode, op, size, down, base + source, base + target, count, value, limit)


def large(source: int, target: int, count: int, size: int = 8, op: str = "movs") -> Case:
    return Case("large", op, size, False, WINDOW + source, WINDOW + target, count, 0x1122_3344_5566_7788)


@given(case=cases())
@example(case=large(2 * LARGE, 4 * LARGE - 0x9000, 0x3000))  # the target's second large page is missing
@example(case=large(2 * LARGE + 4, 6 * LARGE - 0x9000, 0x3000))  # is read-only; elements lie across pages
@example(case=large(5 * LARGE - 0x8004, 2 * LARGE, 0x3000))  # the source's is missing
@example(case=large(2 * LARGE, 2 * LARGE + 3, 0x4000))
@example(case=large(2 * LARGE, 2 * LARGE + 0x5003, 0x4000))
@example(case=large(2 * LARGE, 3 * LARGE + 7, 0x12345, op="stos", size=2))
@example(case=Case("flat", "movs", 4, False, RAM - 0x9000, 2 * LARGE, 0x2402, 0))  # over the end of RAM
@example(case=Case("flat", "movs", 1, False, 2 * LARGE, RAM - 0x9001, 0x9003, 0))
@example(case=Case("flat", "stos", 2, False, 0, RAM - 0x9000, 0x4803, 0x3344))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_repeated_strings_do_what_single_elements_would(machine: Machine, case: Case) -> None:
    assert run(machine, case) == model(case)


@pytest.mark.parametrize("mode", ["large", "small"])
def test_instructions_that_a_long_repetition_counts_do_not_depend_on_the_tlb(machine: Machine, mode: Mode) -> None:
    """A state that was restored has an empty TLB; under the virtual clock it must take the same time."""
    case = Case(mode, "movs", 8, False, BASES[mode] + 2 * LARGE + 5, BASES[mode] + 3 * LARGE + 0x777, 0x3_4000, 0)
    again = "4c89c1 4c89ce 4c89d7 f348a5"  # mov rcx, r8; mov rsi, r9; mov rdi, r10; rep movsq
    counts = []
    for between in ("0f20d8 0f20d8", "0f20d8 0f22d8"):  # mov rax, cr3 twice; mov rax, cr3; mov cr3, rax
        before = machine.vm.stats()["instructions"]
        assert run(machine, case, between + again).rcx == 0
        counts.append(machine.vm.stats()["instructions"] - before)
    assert counts[0] == counts[1]
