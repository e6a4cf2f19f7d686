"""Declarations of what the loaders of tiny guests and PVH kernels read and write; little-endian, packed.

Specification: System V gABI chapters 4 and 5; the x86/HVM direct boot ABI. vmm/boot/elf.py and pvh.py use
struct.Struct with the same fields (importing construct takes longer than loading a small guest);
tests/unit/test_boot_layouts.py holds them equal.
"""

from __future__ import annotations

from typing import Any

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Struct

IDENT = Struct("magic" / Const(b"\x7fELF"), "klass" / Int8ul, "data" / Int8ul, "version" / Int8ul, "rest" / Bytes(9))


def _header(word: Any) -> Any:
    return Struct(
        "ident" / IDENT, "type" / Int16ul, "machine" / Int16ul, "version" / Int32ul, "entry" / word, "phoff" / word,
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

START_INFO = Struct(
    "magic" / Int32ul, "version" / Int32ul, "flags" / Int32ul, "nr_modules" / Int32ul, "modlist_paddr" / Int64ul,
    "cmdline_paddr" / Int64ul, "rsdp_paddr" / Int64ul, "memmap_paddr" / Int64ul, "memmap_entries" / Int32ul,
    "reserved" / Int32ul,
)
MODULE = Struct("paddr" / Int64ul, "size" / Int64ul, "cmdline_paddr" / Int64ul, "reserved" / Int64ul)
MEMORY_MAP = Struct("address" / Int64ul, "size" / Int64ul, "type" / Int32ul, "reserved" / Int32ul)
