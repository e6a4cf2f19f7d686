"""GDB's packets, target descriptions, where breakpoints go, and kernel symbols."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu.contract import Capability, Registers, Segment, SystemRegisters
from cpu.debug import Debugging, Point, PointKind
from vmm.debug import target
from vmm.debug.packets import MAX_PACKET, Packet, Parser, ProtocolError, Signal, checksum, encode
from vmm.debug.points import INT3, Patches, Wanted, place
from vmm.debug.server import GdbAddress
from vmm.debug.symbols import Names, Symbol, move, offset, parse_elf, parse_map, read_symbols, write_elf
from vmm.errors import ConfigError, StateError
from vmm.machine.memory import GuestMemory

WATCH = Point(PointKind.WRITE, 0x1000, 8)


# Packets.


@given(st.binary(max_size=300), st.integers(1, 17))
def test_what_is_encoded_is_parsed_back_however_it_is_cut(data: bytes, size: int) -> None:
    wire, parser = b"+" + encode(data) + b"\x03", Parser()
    found = [item for at in range(0, len(wire), size) for item in parser.feed(wire[at : at + size])]
    assert found == [Signal.ACK, Packet(data), Signal.INTERRUPT]


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_garbage_is_parsed_or_refused(pieces: list[bytes]) -> None:
    parser = Parser()
    try:
        for piece in pieces:
            parser.feed(piece)
    except ProtocolError:
        pass


def test_a_wrong_checksum_asks_for_the_packet_again() -> None:
    assert Parser().feed(b"$g#00$?#3f") == [Signal.BAD, Packet(b"?")]
    assert Parser().feed(b"$g#zz") == [Signal.BAD]


def test_a_packet_that_never_ends_is_refused() -> None:
    parser = Parser()
    with pytest.raises(ProtocolError):
        for _ in range(100):
            parser.feed(b"$" + b"0" * MAX_PACKET)


def test_special_characters_are_escaped() -> None:
    assert encode(b"#$}*") == b"$}\x03}\x04}]}\x0a#" + b"%02x" % checksum(b"}\x03}\x04}]}\x0a")


# The target.


def cpu(**system: object) -> target.CpuState:
    fpu = bytes(range(256)) * 2
    long_mode = {"efer": 0x500, "cs": Segment(l=1, db=0, base=0), "cr0": 0x80000001, **system}
    return target.CpuState(Registers(rip=0x1234, rax=7), SystemRegisters(**long_mode), fpu, 9)  # type: ignore[arg-type]


@pytest.mark.parametrize("avx", [False, True])
@pytest.mark.parametrize("architecture", target.ARCHITECTURES)
def test_the_description_has_every_register_at_its_number(architecture: str, avx: bool) -> None:
    root = ElementTree.fromstring(target.description(architecture, avx).split(b"?>", 1)[1].split(b">", 1)[1])
    found = [(int(reg.attrib["regnum"]), reg.attrib["name"], int(reg.attrib["bitsize"])) for reg in root.iter("reg")]
    declared = target.registers(architecture, avx)
    assert found == [(number, each.name, each.bits) for number, each in enumerate(declared)]
    assert len({each.name for each in declared}) == len(declared)
    types = {each.attrib["id"] for each in root.iter() if "id" in each.attrib}
    known = types | {"int", "int32", "int64", "data_ptr", "code_ptr", "i387_ext", "uint128"}
    assert {reg.attrib["type"] for reg in root.iter("reg")} <= known
    upper = [reg.attrib["name"] for feature in root if feature.get("name") == "org.gnu.gdb.i386.avx" for reg in feature]
    vectors = 16 if architecture == "x86-64" else 8
    assert upper == ([f"ymm{n}h" for n in range(vectors)] if avx else [])


@pytest.mark.parametrize("avx", [False, True])
@pytest.mark.parametrize("architecture", target.ARCHITECTURES)
def test_registers_that_are_written_back_change_nothing(architecture: str, avx: bool) -> None:
    state, registers = cpu(), target.registers(architecture, avx)
    assert target.unpack(registers, state, target.pack(registers, state)) == state


def test_one_changed_register_changes_one() -> None:
    state, registers = cpu(), {each.name: each for each in target.registers("x86-64", avx=True)}
    values = {"rax": 1 << 63, "xmm15": 5, "ymm15h": 6, "fs_base": 1 << 40, "cr2": 3, "mxcsr": 0x1F80, "st3": 4}
    for name, value in values.items():
        changed = registers[name].set(state, value)
        different = [each.name for each in registers.values() if each.get(each.set(state, 0)) is None or
                     each.get(changed) != each.get(state)]
        assert registers[name].get(changed) == value
        assert set(different) <= {name, "ftag"}


def test_the_program_counter_is_linear_in_real_mode() -> None:
    state = cpu(efer=0, cr0=0x10, cs=Segment(base=0xF0000, selector=0xF000))
    pc = next(each for each in target.registers("i8086") if each.name == "eip")
    assert pc.get(state) == 0xF1234
    assert pc.set(state, 0xF2000).general.rip == 0x2000
    selector = next(each for each in target.registers("i8086") if each.name == "ds")
    assert selector.set(state, 0x1234).system.ds.base == 0x12340


@pytest.mark.parametrize("data", [b"", bytes(10), bytes(5000)])
def test_registers_of_another_length_are_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        target.unpack(target.registers("x86-64"), cpu(), data)


# Breakpoints.


def test_a_core_with_breakpoints_takes_them_all() -> None:
    many = [Wanted(Point(PointKind.EXECUTE, at), True, at) for at in range(100)]
    assert len(place(many, {Capability.BREAKPOINTS}).points) == 100
    assert place(many, {Capability.BREAKPOINTS}).int3 == {}
    with pytest.raises(ConfigError, match="too many"):
        place(many * 11, {Capability.BREAKPOINTS})


def test_breakpoints_are_in_memory_where_int3_works_else_in_registers() -> None:
    few = [Wanted(Point(PointKind.EXECUTE, at), True, at + 0x1000) for at in range(3)]
    placed = place([*few, Wanted(WATCH), Wanted(Point(PointKind.EXECUTE, 9))], {Capability.STOCK_KERNELS})
    assert placed.points == (WATCH, Point(PointKind.EXECUTE, 9))
    assert placed.int3 == {at: at + 0x1000 for at in range(3)}
    placed = place([*few, Wanted(WATCH)], ())
    assert len(placed.points) == 4
    assert placed.int3 == {}


@pytest.mark.parametrize(
    ("address", "length", "parts"),
    [(0x1000, 8, [8]), (0x1001, 8, [1, 2, 4, 1]), (0x1004, 8, [4, 4]), (0x1002, 2, [2])],
)
def test_a_watched_range_is_covered_by_aligned_parts(address: int, length: int, parts: list[int]) -> None:
    placed = place([Wanted(Point(PointKind.ACCESS, address, length))], ())
    assert [point.length for point in placed.points] == parts
    assert all(point.address % point.length == 0 for point in placed.points)
    covered = sorted(byte for point in placed.points for byte in range(point.address, point.address + point.length))
    assert covered == list(range(address, address + length))


def test_more_watched_ranges_than_registers_are_refused() -> None:
    with pytest.raises(ConfigError, match="debug registers"):
        place([Wanted(Point(PointKind.WRITE, 0x1000, 64))], ())
    with pytest.raises(ConfigError, match="debug registers"):
        place([Wanted(Point(PointKind.EXECUTE, at)) for at in range(5)], ())


def test_int3_leaves_memory_as_it_was_but_for_what_the_guest_wrote() -> None:
    memory = GuestMemory(1 << 20)
    memory.write(0x100, b"abc")
    patches = Patches(memory)
    patches.insert([0x100, 0x101, 0x102, 1 << 40])
    assert memory.read(0x100, 3) == INT3 * 3
    memory.write(0x101, b"X")
    patches.remove()
    assert memory.read(0x100, 3) == b"aXc"
    memory.close()


def test_what_is_packed_is_the_native_structure() -> None:
    debugging = Debugging(step=True, int3=True, points=(Point(PointKind.READ, 0x10, 4),))
    assert debugging.pack() == struct.pack("<IIQII", 1 | 8, 1, 0x10, 4, 2)


# Addresses.


@pytest.mark.parametrize(
    ("text", "target_text"),
    [("1234", "127.0.0.1:1234"), ("localhost:1", "localhost:1"), ("[::1]:5", "[::1]:5"), (":7", "127.0.0.1:7"),
     ("unix:/run/x", "/run/x")],
)  # fmt: skip
def test_addresses(text: str, target_text: str) -> None:
    assert GdbAddress.parse(text).target == target_text


@pytest.mark.parametrize("text", ["", "x", "host:", "host:99999", "unix:", "unix:/" + "a" * 200, "1:-2", "1 2"])
def test_wrong_addresses_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="gdb"):
        GdbAddress.parse(text)


# Symbols.

KALLSYMS = """\
0000000000000000 A fixed_percpu_data
000000000001f000 A pcpu_hot
ffffffff81000000 T _text
ffffffff81000100 T asm_exc_divide_error
ffffffff81000200 T asm_exc_page_fault
ffffffff81000300 t entry_SYSCALL_64
ffffffff82000000 D jiffies
ffffffff82000008 d hidden
ffffffffc0000000 t in_a_module\t[module]
"""
SYMBOLS = parse_map(KALLSYMS, "kallsyms")


def test_a_map_is_read() -> None:
    assert [symbol.name for symbol in SYMBOLS] == [line.split()[2] for line in KALLSYMS.splitlines()[2:]]
    assert [symbol.code for symbol in SYMBOLS] == [True] * 4 + [False] * 2 + [True]


@pytest.mark.parametrize("text", ["", "0000000000000000 T _text\n" * 3, "what is this\n", "12\n"])
def test_maps_without_addresses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_map(text, "System.map")


def test_an_elf_file_has_the_same_symbols(tmp_path: Path) -> None:
    data = write_elf(SYMBOLS)
    assert sorted(parse_elf(data, "x"), key=lambda each: each.address) == SYMBOLS
    (tmp_path / "kernel.sym").write_bytes(data)
    assert len(read_symbols(tmp_path / "kernel.sym")) == len(SYMBOLS)


@given(st.integers(0, 2000), st.integers(0, 255))
def test_damaged_elf_files_are_read_or_refused(at: int, byte: int) -> None:
    data = bytearray(write_elf(SYMBOLS))
    data[at % len(data)] = byte
    try:
        parse_elf(bytes(data), "x")
    except ConfigError:
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        parse_elf(b"\x7fELF\x02\x01" + data, "x")
    except ConfigError:
        pass


@pytest.mark.parametrize("moved", [0, 0x1DE00000])
def test_where_the_kernel_runs_is_found(moved: int) -> None:
    where = {each.name: each.address + moved for each in SYMBOLS}
    found = {"handlers": {"0": where["asm_exc_divide_error"], "14": where["asm_exc_page_fault"]},
             "msrs": {"lstar": where["entry_SYSCALL_64"]}}
    assert offset(SYMBOLS, found) == moved
    assert move(SYMBOLS, moved)[0].address == 0xFFFFFFFF81000000 + moved


@pytest.mark.parametrize("found", [{}, {"handlers": {"14": 0x1234}}, {"msrs": {"lstar": 0xFFFFFFFF81000300}}])
def test_another_kernel_is_told(found: dict[str, object]) -> None:
    with pytest.raises(StateError, match="does not run"):
        offset(SYMBOLS, found)


def test_addresses_have_names() -> None:
    name = Names(SYMBOLS)
    assert name(0xFFFFFFFF81000212) == "asm_exc_page_fault+0x12"
    assert name(0xFFFFFFFF82000000) == "jiffies"
    assert name(0x1000) == name(0xFFFFFFFFE0000000) == ""


def test_symbols_at_one_address_all_stay() -> None:
    two = [Symbol(0x200000, "a", True), Symbol(0x200000, "b", True)]
    assert parse_elf(write_elf(two), "x") == two
