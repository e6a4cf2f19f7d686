"""Loaders: what stands in memory and in the registers afterwards, by the boot protocols' own documents."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import struct
import sys
from pathlib import Path

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ram import Ram
from vmm import boot
from vmm.boot import coreboot, elf, layouts, linux, multiboot, pvh, unpack
from vmm.boot.initrd import check_whole
from vmm.errors import ConfigError
from vmm.machine import layout

MIB = 1 << 20


def elf64(entry: int, paddr: int, code: bytes, *, note: int | None = None, memsz: int | None = None) -> bytes:
    """An x86-64 ELF executable with one segment, and a PVH note if `note` is its entry."""
    body = code
    notes = b"" if note is None else struct.pack("<III4sI", 4, 4, 18, b"Xen\0", note)
    count = 1 if note is None else 2
    offset = 64 + 56 * count
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0
    )
    size = len(code) if memsz is None else memsz
    programs = struct.pack("<IIQQQQQQ", 1, 5, offset, 0xFFFF_FFFF_8000_0000 + paddr, paddr, len(code), size, 4096)
    if note is not None:
        programs += struct.pack("<IIQQQQQQ", 4, 4, offset + len(code), 0, 0, len(notes), len(notes), 4)
    return header + programs + body + notes


def bzimage(payload: bytes, *, pref: int = 0x100_0000, xload: int = 1, version: int = 0x20F) -> bytes:
    header = dict(linux.SETUP_HEADER.parse(bytes(linux.SETUP_HEADER.sizeof())))
    header.update(
        setup_sects=1, boot_flag=0xAA55, header=b"HdrS", version=version, loadflags=1, code32_start=0x10_0000,
        initrd_addr_max=0x7FFF_FFFF, kernel_alignment=0x20_0000, relocatable_kernel=1, xloadflags=xload,
        cmdline_size=2047, payload_offset=0x400, payload_length=len(payload), pref_address=pref, init_size=0x40_0000,
    )
    setup = bytearray(1024)
    raw = linux.SETUP_HEADER.build(header)
    setup[0x1F1 : 0x1F1 + len(raw)] = raw
    return bytes(setup) + bytes(0x400) + payload


def with_size(packed: bytes, data: bytes) -> bytes:
    return packed + struct.pack("<I", len(data))


def lz4_legacy(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


PACKERS = {
    "gzip": gzip.compress,
    "bzip2": lambda data: with_size(bz2.compress(data), data),
    "lzma": lambda data: with_size(lzma.compress(data, format=lzma.FORMAT_ALONE), data),
    "xz": lambda data: with_size(
        lzma.compress(data, check=lzma.CHECK_CRC32, filters=[{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2}]), data
    ),
    "lz4": lambda data: with_size(lz4_legacy(data), data),
    "zstd": lambda data: with_size(zstandard.compress(data), data),
    "none": lambda data: data,
}


@pytest.mark.parametrize("kind", PACKERS)
def test_payload_of_each_compression_unpacks(kind: str) -> None:
    data = elf64(0x100_0000, 0x100_0000, bytes(range(256)) * 64)
    packed = PACKERS[kind](data)
    assert unpack.compression(packed) == kind
    assert unpack.unpack(packed) == data


LZO_HEADER = (
    b"\x89LZO\0\r\n\x1a\n" + struct.pack(">HHHBBIIIIB", 0x1030, 0x2080, 0x0940, 1, 5, 0, 0, 0, 0, 0) + bytes(4)
)


def lzop(*blocks: tuple[int, bytes]) -> bytes:
    """The lzop file format without checksums: (unpacked size, data) of each block."""
    return LZO_HEADER + b"".join(struct.pack(">II", size, len(data)) + data for size, data in blocks) + bytes(4)


def test_lzo_unpacks() -> None:
    lzallright = pytest.importorskip("lzallright", reason="needs lzallright for lzo")
    data = elf64(0x100_0000, 0x100_0000, bytes(range(256)) * 64)
    packed = lzallright.LZOCompressor().compress(data)
    assert unpack.unpack(lzop((len(data), packed), (40, bytes(40)))) == data + bytes(40)
    for wrong in (
        lzop((len(data) + 1, packed)), lzop((len(data), packed[:-9])), lzop((1 << 30, packed)), lzop((5, bytes(6))),
        lzop((len(data), packed))[:-5], LZO_HEADER[:20],
    ):  # fmt: skip
        with pytest.raises(unpack.UnpackError, match="lzo payload: "):
            unpack.unpack(wrong)


def test_lzo_without_its_library_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzallright", None)
    with pytest.raises(unpack.UnpackError, match="lzo needs the Python package lzallright: pip install lzallright"):
        unpack.unpack(lzop((40, bytes(40))))


def test_unpacked_kernel_is_cached_by_content(tmp_path: Path) -> None:
    data = elf64(0x100_0000, 0x100_0000, b"\xf4" * 100)
    packed = gzip.compress(data)
    assert bytes(unpack.unpack_cached(packed, cache=tmp_path)) == data
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(b"taken from the cache")
    assert bytes(unpack.unpack_cached(packed, cache=tmp_path)) == b"taken from the cache"


def test_a_kernel_file_that_is_as_it_was_is_found_without_its_payload(tmp_path: Path) -> None:
    kernel, cache = tmp_path / "kernel", tmp_path / "cache"
    packed, other = (gzip.compress(elf64(0x100_0000, 0x100_0000, code * 100)) for code in (b"\xf4", b"\x90"))
    kernel.write_bytes(packed)
    fresh = kernel.stat()
    data = bytes(unpack.unpack_cached(packed, cache=cache, file=fresh))
    assert [entry.suffix for entry in cache.iterdir()] == [".elf"]  # it may change again within its clock's tick
    fields = list(fresh)
    settled = os.stat_result(fields, {"st_mtime_ns": 10**18, "st_ctime_ns": 10**18})
    assert bytes(unpack.unpack_cached(packed, cache=cache, file=settled)) == data
    assert bytes(unpack.unpack_cached(b"\x1f\x8b never read", cache=cache, file=settled)) == data
    changed = os.stat_result(fields, {"st_mtime_ns": 10**18, "st_ctime_ns": 10**18 + 1})
    assert bytes(unpack.unpack_cached(other, cache=cache, file=changed)) == gzip.decompress(other)
    for entry in cache.glob("*.elf"):
        entry.unlink()  # what a link leads to may go
    assert bytes(unpack.unpack_cached(packed, cache=cache, file=settled)) == data
    assert bytes(unpack.unpack_cached(b"\x1f\x8b never read", cache=cache, file=settled)) == data


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    data = elf64(0x100_0000, 0x100_0000, b"\xf4")
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert bytes(unpack.unpack_cached(gzip.compress(data), cache=blocked)) == data


def test_linux64_zero_page_and_registers(tmp_path: Path) -> None:
    code = b"\x90" * 5000
    image = tmp_path / "bzImage"
    image.write_bytes(bzimage(PACKERS["lz4"](elf64(0x100_0000, 0x100_0000, code, memsz=0x30_0000))))
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"cpio" * 3000)
    memory = Ram(64 * MIB)
    state = boot.load(memory, image, initrd=initrd, cmdline="console=ttyS0 a=b", rsdp=0xE_0000, cache=tmp_path / "c")

    assert state.protocol == "linux64"
    assert state.registers.rip == 0x100_0000 and state.registers.rflags == 2
    assert memory.read(0x100_0000, len(code)) == code
    page = linux.ZERO_PAGE.parse(memory.read(state.registers.rsi, 4096))
    assert page.acpi_rsdp_addr == 0xE_0000
    assert page.header.type_of_loader == 0xFF and page.header.header == b"HdrS"
    assert memory.text(page.header.cmd_line_ptr) == "console=ttyS0 a=b"
    assert memory.read(page.header.ramdisk_image, page.header.ramdisk_size) == b"cpio" * 3000
    assert page.header.ramdisk_image % 4096 == 0
    assert page.header.ramdisk_image + page.header.ramdisk_size <= 64 * MIB
    entries = [(item.start, item.size, item.type) for item in page.e820_table[: page.e820_entries]]
    assert entries == [(item.start, item.size, item.type) for item in layout.Layout(64 * MIB).e820()]

    # "64-bit Boot Protocol": __BOOT_CS(0x10) execute/read, __BOOT_DS(0x18) read/write, paging on, identity mapped.
    system = state.system_registers
    assert (system.cs.selector, system.cs.l, system.ds.selector, system.ss.selector) == (0x10, 1, 0x18, 0x18)
    assert system.cr0 & 0x8000_0001 == 0x8000_0001 and system.cr4 & 0x20 and system.efer == 0x500
    (gdt_code,) = struct.unpack("<Q", memory.read(system.gdt[0] + 0x10, 8))
    assert gdt_code == 0x00AF_9B00_0000_FFFF
    (pml4,) = struct.unpack("<Q", memory.read(system.cr3, 8))
    (pdpt,) = struct.unpack("<Q", memory.read((pml4 & ~0xFFF) + 8 * 3, 8))
    (page_entry,) = struct.unpack("<Q", memory.read((pdpt & ~0xFFF) + 8 * 511, 8))
    assert page_entry == 0xFFE0_0083


def test_pvh_start_info(tmp_path: Path) -> None:
    image = tmp_path / "guest"
    image.write_bytes(elf64(0x10_0000, 0x10_0000, b"\xf4" * 64, note=0x10_0010))
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x" * 5000)
    memory = Ram(32 * MIB)
    state = boot.load(memory, image, initrd=initrd, cmdline="10", rsdp=0xE_0000)
    assert state.protocol == "pvh" and state.registers.rip == 0x10_0010
    info = layouts.START_INFO.parse(memory.read(state.registers.rbx, layouts.START_INFO.sizeof()))
    assert (info.magic, info.version, info.nr_modules, info.rsdp_paddr) == (0x336E_C578, 1, 1, 0xE_0000)
    assert memory.text(info.cmdline_paddr) == "10"
    module = layouts.MODULE.parse(memory.read(info.modlist_paddr, layouts.MODULE.sizeof()))
    assert memory.read(module.paddr, module.size) == b"x" * 5000
    assert info.memmap_entries == len(layout.Layout(32 * MIB).e820())
    system = state.system_registers
    assert system.cr0 & 0x8000_0001 == 1 and system.cs.db == 1 and system.efer == 0


def test_multiboot_elf_and_addresses(tmp_path: Path) -> None:
    flags = 0x3 | multiboot.ADDRESSES
    load_at = 0x20_0000
    header = struct.pack("<III5I", multiboot.MAGIC, flags, -(multiboot.MAGIC + flags) & 0xFFFF_FFFF, load_at, load_at,
                         0, load_at + 0x8000, load_at + 32)
    kernel = header + b"\xf4" * 100
    path = tmp_path / "kernel"
    path.write_bytes(kernel)
    memory = Ram(32 * MIB)
    state = boot.load(memory, path, cmdline="hello", rsdp=None)
    assert state.protocol == "multiboot" and state.registers.rip == load_at + 32
    assert state.registers.rax == 0x2BAD_B002
    assert memory.read(load_at, len(kernel)) == kernel
    info = multiboot.INFO.parse(memory.read(state.registers.rbx, multiboot.INFO.sizeof()))
    assert info.flags & 0b1000101 == 0b1000101 and info.mem_upper == 31 * 1024
    assert memory.text(info.cmdline) == "hello"
    first = multiboot.MEMORY_MAP.parse(memory.read(info.mmap_addr, 24))
    assert (first.size, first.address, first.type) == (20, 0, 1)


def elf32(entry: int, *segments: tuple[int, bytes]) -> bytes:
    """An i386 ELF executable with a segment at each physical address."""
    at = 52 + 32 * len(segments)
    header = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9) + struct.pack(
        "<HHIIIIIHHHHHH", 2, 3, 1, entry, 52, 0, 0, 52, 32, len(segments), 0, 0, 0
    )
    programs, bodies = b"", b""
    for paddr, body in segments:
        programs += struct.pack("<8I", 1, at + len(bodies), paddr, paddr, len(body), len(body), 7, 4)
        bodies += body
    return header + programs + bodies


def test_multiboot_elf_of_32_bits_and_its_module(tmp_path: Path) -> None:
    flags = 0x3
    header = struct.pack("<III", multiboot.MAGIC, flags, -(multiboot.MAGIC + flags) & 0xFFFF_FFFF)
    path, initrd = tmp_path / "kernel", tmp_path / "module"
    path.write_bytes(elf32(0x10_000C, (0x10_0000, header + b"\xf4" * 20), (0x20_0000, b"data")))
    initrd.write_bytes(b"module" * 1000)
    memory = Ram(32 * MIB)
    state = boot.load(memory, path, initrd=initrd, cmdline="kernel a=b -- module c=d")
    assert (state.protocol, state.registers.rip, state.registers.rax) == ("multiboot", 0x10_000C, 0x2BAD_B002)
    assert memory.read(0x20_0000, 4) == b"data"
    info = multiboot.INFO.parse(memory.read(state.registers.rbx, multiboot.INFO.sizeof()))
    assert info.mods_count == 1 and memory.text(info.cmdline) == "kernel a=b"
    module = multiboot.MODULE.parse(memory.read(info.mods_addr, multiboot.MODULE.sizeof()))
    assert memory.read(module.start, module.end - module.start) == b"module" * 1000 and module.start % 4096 == 0
    assert memory.text(module.string) == "module c=d"


def internet_checksum(data: bytes) -> int:
    """RFC 1071, of little-endian words; 0 over what holds its own checksum."""
    total = sum(struct.unpack(f"<{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def test_coreboot_payload_and_its_table(tmp_path: Path) -> None:
    """Also one with a multiboot header that stands below 1 MiB, as GRUB's."""
    flags = 2
    header = struct.pack("<III", multiboot.MAGIC, flags, -(multiboot.MAGIC + flags) & 0xFFFF_FFFF)
    path = tmp_path / "payload"
    path.write_bytes(elf32(0x9000, (0x9000, b"\xeb\x0e\x90\x90" + header + b"\xf4" * 16), (0x10_0000, b"modules")))
    assert boot.identify(path) == "coreboot"
    memory = Ram(64 * MIB)
    state = boot.load(memory, path, cmdline="is not for it", rsdp=0xE_0000)
    assert state.protocol == "coreboot" and state.registers.rip == 0x9000
    assert state.system_registers.cr0 & 0x8000_0001 == 1 and state.system_registers.cs.db == 1
    assert memory.read(0x10_0000, 7) == b"modules" and memory.read(0x9000, 2) == b"\xeb\x0e"
    at = layout.COREBOOT_TABLE.start
    head = memory.read(at, coreboot.HEADER.sizeof())
    table = coreboot.HEADER.parse(head)
    body = memory.read(at + table.header_bytes, table.table_bytes)
    assert at < 0x1000 and at % 16 == 0 and internet_checksum(head) == 0
    assert internet_checksum(body) == table.table_checksum
    records, offset = {}, 0
    while offset < len(body):
        tag, size = struct.unpack_from("<II", body, offset)
        records[tag] = body[offset + 8 : offset + size]
        offset += size
    assert len(records) == table.table_entries and offset == len(body)
    ranges = list(struct.iter_unpack("<QQI", records[1]))
    assert ranges == [(item.start, item.size, item.type) for item in layout.Layout(64 * MIB).e820()]
    assert struct.unpack_from("<III", records[0xF]) == (1, 0x3F8, 115200)
    assert records[0x43] == struct.pack("<Q", 0xE_0000)


def test_coreboot_table_fits_before_what_follows_it() -> None:
    e820 = layout.Layout(1 << 40).e820()
    size = len(coreboot.table(coreboot.Request(e820=e820, rsdp=0xE_0000)))
    assert size <= layout.COREBOOT_TABLE.size and layout.COREBOOT_TABLE.end <= layout.BOOT_GDT


def test_mistakes_with_coreboot_payloads(tmp_path: Path) -> None:
    path, initrd = tmp_path / "payload", tmp_path / "initrd"
    initrd.write_bytes(b"x")
    path.write_bytes(elf32(0x9000, (0x9000, b"\xf4")))
    with pytest.raises(ConfigError, match="initrd: .*payload is a coreboot payload, which takes none"):
        boot.load(Ram(8 * MIB), path, initrd=initrd)
    for segment in ((0x500, b"\xf4"), (0x9_F000, bytes(0x1000)), (0xF_0000, b"\xf4")):
        path.write_bytes(elf32(segment[0], segment))
        with pytest.raises(ConfigError, match="a segment wants to stand at"):
            boot.load(Ram(8 * MIB), path)
    path.write_bytes(elf32(0x80_0000, (0x80_0000, bytes(MIB))))
    with pytest.raises(ConfigError, match="give it 9M or more"):
        boot.load(Ram(8 * MIB), path)


def test_kernel_file_compressed_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "kernel.gz"
    path.write_bytes(gzip.compress(elf64(0x10_0000, 0x10_0000, b"\xf4" * 64, note=0x10_0010)))
    assert boot.identify(path) == "pvh"
    assert boot.load(Ram(32 * MIB), path).registers.rip == 0x10_0010


def test_image_with_unknown_payload_is_entered_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "memtest"
    path.write_bytes(bzimage(b"not packed at all"))
    memory = Ram(32 * MIB)
    state = boot.load(memory, path)
    assert (state.protocol, state.registers.rip) == ("linux64", 0x100_0200)
    path.write_bytes(bzimage(b"not packed at all", xload=0))
    state = boot.load(Ram(32 * MIB), path)
    assert (state.protocol, state.registers.rip) == ("linux32", 0x100_0000)


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
def test_flat_image(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "flat"
    path.write_bytes(b"\xeb\xfe" + bytes(510))
    memory = Ram(8 * MIB)
    at = 0x7C00 if mode == "real" else 0x10_0000
    state = boot.load_flat(memory, path, load=at, mode=mode)  # type: ignore[arg-type]
    assert memory.read(at, 2) == b"\xeb\xfe"
    system = state.system_registers
    assert system.cs.base + state.registers.rip == at
    assert {"real": 0, "protected": 1, "long": 0x8000_0001}[mode] == system.cr0 & 0x8000_0001


def test_mistakes_name_file_and_cure(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    with pytest.raises(ConfigError, match="no such file"):
        boot.load(Ram(32 * MIB), path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="empty"):
        boot.load(Ram(32 * MIB), path)
    path.write_bytes(b"#!/bin/sh\n" * 200)
    with pytest.raises(ConfigError, match="not a kernel"):
        boot.load(Ram(32 * MIB), path)
    path.write_bytes(bzimage(gzip.compress(elf64(0x100_0000, 0x100_0000, b"\xf4", memsz=0x400_0000))))
    with pytest.raises(ConfigError, match="give it 80M or more"):
        boot.load(Ram(32 * MIB), path, cache=tmp_path / "c")
    path.write_bytes(bzimage(gzip.compress(bytes(100000))[:50]))
    with pytest.raises(ConfigError, match="gzip payload"):
        boot.load(Ram(32 * MIB), path, cache=tmp_path / "c")
    path.write_bytes(elf64(0x10_0000, 0x10_0000, b"\xf4", note=0x10_0000))
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(31 * MIB))
    with pytest.raises(ConfigError, match="give the machine"):
        boot.load(Ram(32 * MIB), path, initrd=initrd)
    with pytest.raises(ConfigError, match="cmdline"):
        boot.load(Ram(32 * MIB), path, cmdline="x" * 70000)


@pytest.mark.parametrize("size", [2 * MIB, 32 * MIB, 128 * MIB, 3 << 30, 4 << 30, 6 << 30, 64 << 30])
def test_e820_covers_ram_once_and_leaves_the_hole(size: int) -> None:
    entries = layout.Layout(size).e820()
    assert all(one.end <= two.start for one, two in zip(entries, entries[1:], strict=False))
    ram = [item for item in entries if item.type is layout.E820Type.RAM]
    assert sum(item.size for item in ram) == size - (MIB - layout.EBDA.start)
    assert not any(item.start < 1 << 32 and item.end > layout.PCI_HOLE for item in ram)
    assert layout.Layout(size).mmio64.start >= layout.Layout(size).high_end


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_elf_raises_only_config_error(data: st.DataObject) -> None:
    raw = bytearray(elf64(0x10_0000, 0x10_0000, b"\xf4" * 64, note=0x10_0010))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(4, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(4, len(raw))) :]
    memory = Ram(4 * MIB)
    try:
        image = elf.parse(bytes(raw), "file")
        pvh.load_pvh(memory, image, linux.Request(e820=layout.Layout(4 * MIB).e820()))
    except ConfigError:
        pass


def cpio(*members: tuple[str, bytes]) -> bytes:
    """A newc archive."""
    out = b""
    for name, data in (*members, ("TRAILER!!!", b"")):
        fields = (1, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % value for value in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return out


WHOLE = {
    "cpio": cpio(("a", b"x" * 999), ("b", b"y")),
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress(bytes(range(256)) * 5000 + os.urandom(300_000)),
    "zstd stream": b"".join(zstandard.ZstdCompressor().read_to_iter(os.urandom(300_000) + bytes(300_000))),
    "gzip": gzip.compress(os.urandom(300_000) + bytes(3_000_000)),
    "bzip2": bz2.compress(os.urandom(300_000)),
    "xz": lzma.compress(os.urandom(300_000) + bytes(3_000_000)) + bytes(4),
    "two of gzip": gzip.compress(b"x" * 70_000) + bytes(4) + gzip.compress(os.urandom(1000)) + bytes(512),
    "xz after gzip": gzip.compress(bytes(5_000_000)) + lzma.compress(os.urandom(1000)),
    "microcode before": cpio(("kernel/x86", b"m" * 100)) + bytes(512) + zstandard.compress(os.urandom(1000)),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_an_initrd_that_is_cut_short_is_told(kind: str) -> None:
    data = WHOLE[kind]
    check_whole(memoryview(data), "initrd")
    for size in {len(data) - 5, len(data.rstrip(b"\0")) - 70, len(data) - len(data) // 3}:
        if size != len(data) - 5 or kind not in ("cpio", "two of gzip"):  # those end with zero bytes
            with pytest.raises(ConfigError, match="initrd: the initrd is cut short"):
                check_whole(memoryview(data)[:size], "initrd")


HEADS = (b"", b"070701", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0")


@given(st.binary(max_size=400), st.sampled_from(HEADS))
def test_any_initrd_is_taken_or_told(tail: bytes, head: bytes) -> None:
    with contextlib.suppress(ConfigError):
        check_whole(memoryview(head + tail), "initrd")


@pytest.mark.parametrize("left", [0.99, 0.5, 0.1])
def test_a_bzimage_that_is_cut_short_is_told(tmp_path: Path, left: float) -> None:
    payload = PACKERS["gzip"](bytes(100_000) + os.urandom(100_000))
    whole = bzimage(payload)
    path = tmp_path / "vmlinuz"
    path.write_bytes(whole[: int(len(whole) * left)])
    with pytest.raises(ConfigError, match=f"cut short: it has .* bytes, its header says {len(whole)}"):
        boot.load(Ram(32 * MIB), path)


def test_a_bzimage_without_a_payload_says_its_size_in_paragraphs(tmp_path: Path) -> None:
    """syssize; a signature may follow the code."""
    image = bytearray(bzimage(b""))
    struct.pack_into("<I", image, 0x1F4, 0x400 // 16)
    linux.parse(memoryview(bytes(image)), "k")
    linux.parse(memoryview(bytes(image) + b"signature"), "k")
    with pytest.raises(ConfigError, match="cut short"):
        linux.parse(memoryview(bytes(image[:-100])), "k")
