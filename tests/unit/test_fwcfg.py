"""fw_cfg as its driver sees it, the relocatable ACPI tables, and the test device; by their specifications."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pc import FakeAssembly, Pc
from tests.support.ram import Ram
from vmm.acpi import Acpi, loader
from vmm.config import Config
from vmm.devices import fwcfg, testdev
from vmm.errors import ConfigError, StateError
from vmm.machine.layout import Layout
from vmm.state import payload

MIB = 1 << 20
MEMORY = 64 * MIB


class Memory(Ram):
    """GuestMemory's part that fw_cfg uses."""

    def view(self, gpa: int, length: int) -> bytes:
        return self.read(gpa, length)

    absent = None

    def here(self, gpa: int, length: int) -> bool:
        return True

    def written(self, gpa: int, length: int) -> None:
        self.forgotten = (gpa, length)


class Guest:
    """A driver of fw_cfg: the two ports, or DMA with its control structure at 0x1000."""

    def __init__(self, **config: Any) -> None:
        self.memory = Memory(MEMORY)
        self.assembly = FakeAssembly(Config(memory=MEMORY, **config), self.memory)
        self.pc: Pc = self.assembly.board
        self.assembly.services.acpi = Acpi(Layout(MEMORY), 1, self.memory.write)
        fwcfg.attach(self.assembly)
        self.device: fwcfg.FwCfg = self.assembly.get("fw_cfg")

    def select(self, key: int) -> None:
        self.pc.out(0x510, key, 2)

    def read(self, count: int) -> bytes:
        return bytes(self.pc.inp(0x511) for _ in range(count))

    def item(self, key: int, count: int) -> bytes:
        self.select(key)
        return self.read(count)

    def number(self, key: int, size: int) -> int:
        return int.from_bytes(self.item(key, size), "little")

    def start(self, control: int, length: int, address: int, at: int = 0x1000) -> None:
        if at + 16 <= MEMORY:
            self.memory.write(at, struct.pack(">IIQ", control, length, address))
        self.pc.out(0x514, int.from_bytes((at >> 32).to_bytes(4, "big"), "little"), 4)
        self.pc.out(0x518, int.from_bytes((at & 0xFFFF_FFFF).to_bytes(4, "big"), "little"), 4)

    @property
    def answer(self) -> int:
        return int.from_bytes(self.memory.read(0x1000, 4), "big")

    async def dma(self, key: int, length: int, address: int = 0x10_0000) -> bytes:
        """Select and read, as Linux's driver does; waits as a vCPU that stands in the access does."""
        self.start(key << 16 | 8 | 2, length, address)
        while self.pc.stalls:
            await asyncio.sleep(0)
        assert self.answer == 0
        return self.memory.read(address, length)

    def directory(self) -> dict[str, tuple[int, int]]:
        self.select(0x19)
        found = {}
        for _ in range(int.from_bytes(self.read(4), "big")):
            size, key, _, name = struct.unpack(">IHH56s", self.read(64))
            found[name.rstrip(b"\0").decode()] = (key, size)
        return found

    def file(self, name: str) -> bytes:
        key, size = self.directory()[name]
        return self.item(key, size)


def test_signature_features_and_dma_signature() -> None:
    guest = Guest()
    assert guest.item(0, 4) == b"QEMU"
    assert guest.number(1, 4) == 3, "the ports, and DMA"
    assert guest.pc.inp(0x514, 4).to_bytes(4, "little") + guest.pc.inp(0x518, 4).to_bytes(4, "little") == b"QEMU CFG"


def test_numbers() -> None:
    guest = Guest(cpus=3)
    assert guest.number(3, 8) == MEMORY
    assert guest.number(5, 2) == guest.number(0xF, 2) == 3


def test_beyond_an_item_and_of_no_item_zeros_are_read() -> None:
    guest = Guest()
    assert guest.item(0, 6) == b"QEMU\0\0"
    assert guest.item(0x3FFF, 4) == bytes(4)
    assert guest.item(0x4000, 4) == b"QEMU", "the bit that once chose writing selects the same item"


def test_a_selector_of_one_byte_selects_nothing() -> None:
    guest = Guest()
    guest.item(5, 1)
    guest.pc.out(0x510, 0, 1)
    assert guest.read(1) == b"\0"


def test_directory_is_sorted_and_users_files_are_in_it(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_bytes(bytes(range(256)) * 20)
    guest = Guest(fw_cfg=(f"name=opt/own,file={own}", "name=opt/a,string=hello"))
    found = guest.directory()
    assert list(found) == sorted(found)
    assert [key for key, _ in found.values()] == list(range(0x20, 0x20 + len(found)))
    assert guest.file("opt/own") == own.read_bytes()
    assert guest.file("opt/a") == b"hello"


def test_e820_is_the_memory_map() -> None:
    entries = list(struct.iter_unpack("<QQI", Guest().file("etc/e820")))
    assert (0x10_0000, MEMORY - 0x10_0000, 1) in entries
    assert sum(size for _, size, kind in entries if kind == 1) <= MEMORY


def test_names_and_files_that_do_not_do() -> None:
    for spec, error in {
        "opt/x": "not understood",
        "name=opt/x": "needs either",
        "name=opt/x,file=a,string=b": "needs either",
        f"name={'x' * 56},string=": "1 to 55",
        "file=x": "not understood",
    }.items():
        with pytest.raises(ConfigError, match=error):
            Config(fw_cfg=(spec,))
    with pytest.raises(ConfigError, match="given twice"):
        Config(fw_cfg=("name=a,string=", "name=a,string="))
    with pytest.raises(ConfigError, match="is there already"):
        Guest(fw_cfg=("name=etc/e820,string=",))
    with pytest.raises(ConfigError, match=r"/no/such: no such file"):
        Guest(fw_cfg=("name=opt/x,file=/no/such",))


def test_a_bzimage_comes_in_its_parts(tmp_path: Path) -> None:
    setup = bytearray(3 * 512)
    setup[0x1F1], setup[0x1FE:0x200], setup[0x202:0x206] = 2, b"\x55\xaa", b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(bytes(setup) + b"payload")
    initrd.write_bytes(b"initrd")
    guest = Guest(kernel=kernel, initrd=initrd, cmdline="quiet", append="more")
    assert guest.item(0x11, guest.number(0x08, 4)) == b"payload"
    assert guest.item(0x12, guest.number(0x0B, 4)) == b"initrd"
    assert guest.item(0x15, guest.number(0x14, 4)) == b"quiet more\0"
    loaded = guest.item(0x18, guest.number(0x17, 4))
    assert len(loaded) == len(setup)
    assert struct.unpack_from("<II", loaded, 0x218) == (guest.number(0x0A, 4), 6), "where the initrd is to stand"
    assert struct.unpack_from("<I", loaded, 0x228) == (guest.number(0x13, 4),), "where the command line is to stand"
    guest.device.close()


async def test_dma_reads_selects_and_skips() -> None:
    guest = Guest(fw_cfg=("name=opt/a,string=0123456789",))
    key, _ = guest.directory()["opt/a"]
    assert await guest.dma(key, 4) == b"0123"
    guest.start(4, 3, 0)  # skip
    assert guest.answer == 0
    guest.start(2, 5, 0x2000)
    assert (guest.answer, guest.memory.read(0x2000, 5)) == (0, b"789\0\0"), "zeros beyond the end"
    guest.start(4, 0xFFFF_FFFF, 0)
    assert guest.answer == 0
    assert guest.read(1) == b"\0"


async def test_a_write_is_refused() -> None:
    guest = Guest()
    guest.start(0x20 << 16 | 8 | 0x10, 4, 0x2000)
    assert guest.answer == 1


@pytest.mark.parametrize("address", [MEMORY, MEMORY - 3, 1 << 40, (1 << 64) - 1])
async def test_dma_outside_memory_is_an_error(address: int) -> None:
    guest = Guest()
    guest.start(8 | 2, 4, address)
    assert guest.answer == 1
    assert not guest.pc.stalls
    guest.start(8 | 2, 4, 0x2000, at=address)  # no place for the answer: nothing happens


async def test_a_long_dma_does_not_hold_the_loop(tmp_path: Path) -> None:
    """Slice by slice; the vCPU waits, a second one's transfer comes after it, and everything arrives."""
    own = tmp_path / "own"
    own.write_bytes(b"0123456789abcdef" * (5 * MIB // 16))
    guest = Guest(fw_cfg=(f"name=opt/own,file={own}",))
    key, size = guest.directory()["opt/own"]
    guest.start(key << 16 | 8 | 2, size, 16 * MIB)
    guest.start(2, 8, 0x3000, at=0x5000)
    assert guest.pc.stalls == 2
    turns = 0
    while guest.pc.stalls:
        with pytest.raises(StateError, match="in flight"):
            guest.device.save()
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 4
    assert guest.memory.read(16 * MIB, size) == own.read_bytes()
    assert guest.memory.read(0x3000, 8) == bytes(8), "the second read goes on where the first ended"
    guest.device.close()


async def test_what_is_in_flight_ends_with_the_machine() -> None:
    guest = Guest()
    guest.start(8 | 2, 20 * MIB, 16 * MIB)
    assert guest.pc.stalls == 1
    quiet = asyncio.ensure_future(guest.device.quiesce())
    guest.device.close()
    await quiet
    assert not guest.pc.stalls
    before = guest.memory.read(1000, 1)
    await asyncio.sleep(0)
    assert guest.memory.read(1000, 1) == before


def test_state() -> None:
    guest, other = Guest(), Guest()
    guest.item(0, 2)
    moved = payload.encode(guest.device.save())
    other.device.restore(payload.decode(other.device, "fw_cfg", moved))
    assert other.read(2) == b"MU"
    moved["fields"]["offset"] = -1
    with pytest.raises(StateError, match="offset"):
        payload.decode(other.device, "fw_cfg", moved)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from([1, 2, 4]), st.integers(0, (1 << 32) - 1))))
def test_any_accesses_raise_nothing(accesses: list[tuple[int, int, int]]) -> None:
    async def run() -> None:
        guest = Guest()
        for offset, size, value in accesses:
            guest.pc.out(0x510 + offset, value & (1 << 8 * size) - 1, size)
            guest.pc.inp(0x510 + offset, size)
        guest.device.close()

    asyncio.run(run())


class Firmware:
    """What firmware does with `etc/table-loader`: every command, by the specification."""

    def __init__(self, guest: Guest, base: int) -> None:
        self.memory: dict[str, tuple[int, bytearray]] = {}
        script = guest.file(loader.LOADER)
        assert len(script) % 128 == 0
        for start in range(0, len(script), 128):
            command, body = int.from_bytes(script[start : start + 4], "little"), script[start + 4 : start + 128]
            name = body[:56].rstrip(b"\0").decode()
            if command == 1:
                alignment, zone = struct.unpack_from("<IB", body, 56)
                assert zone in (1, 2)
                address = 0xF_0000 if zone == 2 else -(-base // alignment) * alignment
                self.memory[name] = (address, bytearray(guest.file(name)))
            elif command == 2:
                to, (offset, size) = body[56:112].rstrip(b"\0").decode(), struct.unpack_from("<IB", body, 112)
                data = self.memory[name][1]
                value = int.from_bytes(data[offset : offset + size], "little") + self.memory[to][0]
                data[offset : offset + size] = value.to_bytes(size, "little")
            else:
                assert command == 3
                at, first, length = struct.unpack_from("<III", body, 56)
                data = self.memory[name][1]
                data[at] = (data[at] - sum(data[first : first + length])) & 0xFF

    def read(self, address: int, length: int) -> bytes:
        for start, data in self.memory.values():
            if start <= address < start + len(data):
                return bytes(data[address - start : address - start + length])
        raise AssertionError(f"{address:#x} is in no file")

    def table(self, address: int) -> bytes:
        return self.read(address, int.from_bytes(self.read(address + 4, 4), "little"))


@pytest.mark.parametrize("base", [0x7FE0_0000, 0x12_3456])
def test_firmware_can_place_the_tables_anywhere(base: int) -> None:
    """Every pointer leads to the table it should, every checksum is right, and the bytes are the machine's own."""
    guest = Guest()
    firmware = Firmware(guest, base)
    own = {signature: data for signature, _, data in guest.assembly.services.acpi.tables()}
    root = firmware.read(0xF_0000, 36)
    assert sum(root) & 0xFF == sum(root[:20]) & 0xFF == 0
    for at, size in ((16, 4), (24, 8)):
        listing = firmware.table(int.from_bytes(root[at : at + size], "little"))
        assert sum(listing) & 0xFF == 0
        signatures = []
        for offset in range(36, len(listing), size):
            data = firmware.table(int.from_bytes(listing[offset : offset + size], "little"))
            assert sum(data) & 0xFF == 0
            signatures.append(data[:4])
            if data[:4] == b"FACP":
                for pointer, width in ((36, 4), (40, 4), (140, 8)):
                    target = firmware.table(int.from_bytes(data[pointer : pointer + width], "little"))
                    assert target == own[target[:4].decode()]
            else:
                assert data == own[data[:4].decode()]
        assert signatures == [b"FACP", b"APIC", b"MCFG"]


class TestTestDevice:
    def make(self) -> tuple[Pc, Memory]:
        memory = Memory(MEMORY)
        assembly = FakeAssembly(Config(memory=MEMORY, testdev=True), memory)
        testdev.attach(assembly)
        pc: Pc = assembly.board
        return pc, memory

    def test_lines(self) -> None:
        pc, _ = self.make()
        pc.out(0x2004, 1)
        pc.out(0x2017, 7)
        assert (pc.levels[4], pc.levels[23]) == (True, True)
        pc.out(0x2004, 0)
        assert pc.edges == [(4, True), (23, True), (4, False)]

    def test_io_ram_and_memory_keep_any_width(self) -> None:
        pc, _ = self.make()
        pc.out(0xE0, 0x1234_5678, 4)
        assert [pc.inp(0xE0 + at) for at in range(4)] == [0x78, 0x56, 0x34, 0x12]
        pc.out(0xE2, 0xABCD, 2)
        assert pc.inp(0xE0, 4) == 0xABCD_5678
        pc.write(0xFF00_FFF8, 0x1122_3344_5566_7788, 8)
        assert pc.read(0xFF00_FFF9, 2) == 0x6677

    def test_flush_names_the_page(self) -> None:
        pc, memory = self.make()
        pc.out(0xE4, 0x1234, 4)
        assert memory.forgotten == (0x1000, 4096)

    def test_without_being_asked_for_it_is_not_there(self) -> None:
        assembly = FakeAssembly(Config(memory=MEMORY), Memory(MEMORY))
        testdev.attach(assembly)
        assert assembly.board.inp(0xE0) == 0xFF

    def test_state(self) -> None:
        memory, machines = Memory(MEMORY), [Pc(), Pc()]
        first, second = (testdev.TestDevice(pc, memory.written) for pc in machines)
        machines[0].out(0x2005, 1)
        machines[0].out(0xE1, 9)
        machines[0].write(0xFF00_0010, 3)
        moved = payload.encode(first.save())
        second.restore(payload.decode(second, "testdev", moved))
        assert machines[1].levels[5]
        assert (machines[1].inp(0xE1), machines[1].read(0xFF00_0010)) == (9, 3)
        second.reset()
        assert not machines[1].levels[5]
        for field, value in (("levels", [True]), ("memory", "")):
            broken = {**moved, "fields": {**moved["fields"], field: value}}
            with pytest.raises(StateError, match=field):
                payload.decode(second, "testdev", broken)
