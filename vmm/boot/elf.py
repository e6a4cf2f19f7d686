"""ELF executables: parsing, the PVH note, and loading of segments.

Specification: System V gABI chapters 4 and 5; the note is XEN_ELFNOTE_PHYS32_ENTRY of the x86/HVM direct boot ABI.
All offsets come from a file that may be malformed: everything is checked against its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from construct import Bytes, Const, ConstructError, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from vmm.boot.state import LoadMemory
from vmm.errors import ConfigError, GuestError

MAGIC = b"\x7fELF"
PT_LOAD, PT_NOTE = 1, 4
EM_386, EM_X86_64 = 3, 62
XEN_ELFNOTE_PHYS32_ENTRY = 18
MAX_SEGMENTS = 256
MAX_NOTES = 1024

_IDENT = Struct("magic" / Const(MAGIC), "klass" / Int8ul, "data" / Int8ul, "version" / Int8ul, "rest" / Bytes(9))


def _header(word: Any) -> Any:
    return Struct(
        "ident" / _IDENT, "type" / Int16ul, "machine" / Int16ul, "version" / Int32ul, "entry" / word, "phoff" / word,
        "shoff" / word, "flags" / Int32ul, "ehsize" / Int16ul, "phentsize" / Int16ul, "phnum" / Int16ul,
        "shentsize" / Int16ul, "shnum" / Int16ul, "shstrndx" / Int16ul,
    )


HEADER32, HEADER64 = _header(Int32ul), _header(Int64ul)
PROGRAM32 = Struct(
    "type" / Int32ul, "offset" / Int32ul, "vaddr" / Int32ul, "paddr" / Int32ul, "filesz" / Int32ul, "memsz" / Int32ul,
    "flags" / Int32ul, "align" / Int32ul,
)
PROGRAM64 = Struct(
    "type" / Int32ul, "flags" / Int32ul, "offset" / Int64ul, "vaddr" / Int64ul, "paddr" / Int64ul, "filesz" / Int64ul,
    "memsz" / Int64ul, "align" / Int64ul,
)
NOTE = Struct("namesz" / Int32ul, "descsz" / Int32ul, "type" / Int32ul)


@dataclass(frozen=True, slots=True)
class Segment:
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
    segments: tuple[Segment, ...]

    @property
    def loads(self) -> tuple[Segment, ...]:
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
                note = NOTE.parse(data[at : at + 12])
                name_at = at + 12
                desc_at = name_at + (note.namesz + 3 & ~3)
                end = desc_at + (note.descsz + 3 & ~3)
                if desc_at + note.descsz > len(data):
                    break
                yield (
                    bytes(data[name_at : name_at + note.namesz]).rstrip(b"\0"),
                    int(note.type),
                    bytes(data[desc_at : desc_at + note.descsz]),
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
        ident = _IDENT.parse(view[:16])
        if ident.klass not in (1, 2) or ident.data != 1:
            raise ConfigError(f"{name}: an ELF file, but not a little-endian one of 32 or 64 bits")
        bits = 64 if ident.klass == 2 else 32
        header_type, program_type = (HEADER64, PROGRAM64) if bits == 64 else (HEADER32, PROGRAM32)
        header = header_type.parse(view[: header_type.sizeof()])
        if header.machine not in (EM_386, EM_X86_64):
            raise ConfigError(f"{name}: an ELF file for machine {header.machine}, not for x86")
        size = program_type.sizeof()
        if header.phentsize != size or not 0 < header.phnum <= MAX_SEGMENTS:
            raise ConfigError(f"{name}: an ELF file without usable program headers; it is not an executable")
        segments = []
        for index in range(header.phnum):
            at = header.phoff + index * size
            raw = program_type.parse(view[at : at + size])
            segment = Segment(raw.type, raw.offset, raw.vaddr, raw.paddr, raw.filesz, raw.memsz)
            if raw.type in (PT_LOAD, PT_NOTE) and raw.offset + raw.filesz > len(view):
                raise ConfigError(f"{name}: the ELF file is cut short: segment {index} ends beyond it")
            if raw.type == PT_LOAD and raw.filesz > raw.memsz:
                raise ConfigError(f"{name}: ELF segment {index} has more bytes in the file than in memory")
            segments.append(segment)
    except ConstructError as error:
        raise ConfigError(f"{name}: the ELF file is cut short") from error
    elf = Elf(view, name, bits, int(header.machine), int(header.entry), tuple(segments))
    if not elf.loads:
        raise ConfigError(f"{name}: the ELF file has nothing to load")
    return elf
