"""ELF executables: parsing, the PVH note, and loading of segments.

Specification: System V gABI chapters 4 and 5; the note is XEN_ELFNOTE_PHYS32_ENTRY of the x86/HVM direct boot ABI.
All offsets come from a file that may be malformed: everything is checked against its length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from cpu.values import dataclass
from vmm.boot.state import LoadMemory
from vmm.errors import ConfigError, GuestError

MAGIC = b"\x7fELF"
PT_LOAD, PT_NOTE = 1, 4
EM_386, EM_X86_64 = 3, 62
XEN_ELFNOTE_PHYS32_ENTRY = 18
MAX_SEGMENTS = 256
MAX_NOTES = 1024

# The fields of vmm/boot/layouts.py.
IDENT = struct.Struct("<4sBBB9s")
HEADERS = {32: struct.Struct("<16sHHIIIIIHHHHHH"), 64: struct.Struct("<16sHHIQQQIHHHHHH")}
PROGRAMS = {32: struct.Struct("<IIIIIIII"), 64: struct.Struct("<IIQQQQQQ")}
NOTE = struct.Struct("<III")

@dataclass(frozen=True, slots=True)
class ProgramSegment:
    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int


@dataclass(frozen=True, slots=True)
class Elf:
    """A parsed executable over its file's bytes."""

    data: memoryview
    name: str
    bits: int
    machine: int
    entry: int
    """Virtual, as in the header."""
    segments: tuple[ProgramSegment, ...]

    @property
    def loads(self) -> tuple[ProgramSegment, ...]:
        return tuple(item for item in self.segments if item.type == PT_LOAD and item.memsz)

    @property
    def start(self) -> int:
        """Lowest physical address of all segments."""
        return min(item.paddr for item in self.loads)

    @property
    def end(self) -> int:
        return max(item.paddr + item.memsz for item in self.loads)

    @property
    def physical_entry(self) -> int:
        """The entry point by physical address: some linkers write it virtual, Linux writes it physical."""
        for item in self.loads:
            if item.paddr <= self.entry < item.paddr + item.memsz:
                return self.entry
        for item in self.loads:
            if item.vaddr <= self.entry < item.vaddr + item.memsz:
                return self.entry - item.vaddr + item.paddr
        raise ConfigError(f"{self.name}: the ELF entry point {self.entry:#x} is in none of its segments")

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """(name, type, descriptor) of every well-formed note."""
        budget = MAX_NOTES
        for item in self.segments:
            if item.type != PT_NOTE:
                continue
            data = self.data[item.offset : item.offset + item.filesz]
            at = 0
            while at + 12 <= len(data) and budget:
                budget -= 1
                name_size, size, kind = NOTE.unpack_from(data, at)
                name_at = at + 12
                desc_at = name_at + (name_size + 3 & ~3)
                end = desc_at + (size + 3 & ~3)
                if desc_at + size > len(data):
                    break
                yield (
                    bytes(data[name_at : name_at + name_size]).rstrip(b"\0"),
                    kind,
                    bytes(data[desc_at : desc_at + size]),
                )
                at = end

    @property
    def pvh_entry(self) -> int | None:
        """The 32-bit physical entry point, if the file has the PVH note."""
        for name, kind, descriptor in self.notes():
            if name == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(descriptor) in (4, 8):
                return int.from_bytes(descriptor, "little")
        return None

    def place(self, memory: LoadMemory) -> None:
        """Copy every PT_LOAD segment to its physical address (fresh memory is zero). Raises ConfigError."""
        for item in self.loads:
            try:
                if item.filesz:
                    memory.write(item.paddr, self.data[item.offset : item.offset + item.filesz])
                memory.read(item.paddr + item.memsz - 1, 1)
            except GuestError as error:
                needed = -(-self.end >> 20)
                raise ConfigError(
                    f"{self.name}: a segment needs memory at {item.paddr:#x} to {item.paddr + item.memsz:#x}; "
                    f"give the machine at least {needed + 1}M"
                ) from error


def is_elf(data: bytes | memoryview) -> bool:
    return bytes(data[:4]) == MAGIC


def parse(data: bytes | memoryview, name: str) -> Elf:
    """Parse headers. Raises ConfigError naming what is wrong with the file."""
    view = memoryview(data)
    try:
        _, klass, order, _, _ = IDENT.unpack_from(view)
        if klass not in (1, 2) or order != 1:
            raise ConfigError(f"{name}: an ELF file, but not a little-endian one of 32 or 64 bits")
        bits = 64 if klass == 2 else 32
        _, _, machine, _, entry, table, _, _, _, entry_size, count, *_ = HEADERS[bits].unpack_from(view)
        if machine not in (EM_386, EM_X86_64):
            raise ConfigError(f"{name}: an ELF file for machine {machine}, not for x86")
        if entry_size != PROGRAMS[bits].size or not 0 < count <= MAX_SEGMENTS:
            raise ConfigError(f"{name}: an ELF file without usable program headers; it is not an executable")
        segments = tuple(_segment(view, bits, table + index * entry_size, index, name) for index in range(count))
    except struct.error as error:
        raise ConfigError(f"{name}: the ELF file is cut short") from error
    elf = Elf(view, name, bits, machine, entry, segments)
    if not elf.loads:
        raise ConfigError(f"{name}: the ELF file has nothing to load")
    return elf


def _segment(view: memoryview, bits: int, at: int, index: int, name: str) -> ProgramSegment:
    """The program header at `at`, checked. Raises ConfigError, struct.error."""
    if bits == 64:
        kind, _, offset, vaddr, paddr, filesz, memsz, _ = PROGRAMS[64].unpack(view[at : at + PROGRAMS[64].size])
    else:
        kind, offset, vaddr, paddr, filesz, memsz, _, _ = PROGRAMS[32].unpack(view[at : at + PROGRAMS[32].size])
    if kind in (PT_LOAD, PT_NOTE) and offset + filesz > len(view):
        raise ConfigError(f"{name}: the ELF file is cut short: segment {index} ends beyond it")
    if kind == PT_LOAD and filesz > memsz:
        raise ConfigError(f"{name}: ELF segment {index} has more bytes in the file than in memory")
    return ProgramSegment(kind, offset, vaddr, paddr, filesz, memsz)
