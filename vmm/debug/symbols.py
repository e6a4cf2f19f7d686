"""Symbols of a Linux kernel for debuggers: read from System.map, /proc/kallsyms or an ELF file, moved to where the
kernel runs (KASLR), written as an ELF file that has nothing but symbols.

Formats: nm(1), proc(5), the System V ABI's ELF chapters 4 and 5. Files are the user's own, or come from a guest:
bounded. """

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu.values import dataclass
from vmm.errors import ConfigError, StateError, os_reason

MAX_FILE = 2 << 30
MAX_SYMBOLS = 4_000_000
LEAST_ADDRESS = 0x10_0000
"""Below it are offsets of per-CPU variables, and constants."""
MAX_GAP = 1 << 16
ALIGNMENT = 0x1000
ANCHORS = {
    "0": ("asm_exc_divide_error", "divide_error"),
    "6": ("asm_exc_invalid_op", "invalid_op"),
    "13": ("asm_exc_general_protection", "general_protection"),
    "14": ("asm_exc_page_fault", "page_fault", "async_page_fault"),
    "lstar": ("entry_SYSCALL_64",),
}
"""What the processor's tables of a running kernel lead to: exceptions by vector, and MSR LSTAR."""
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_FUNC, _OBJECT = 2, 1
_PROGBITS, _SYMTAB, _STRTAB, _NOBITS = 1, 2, 3, 8


@dataclass(frozen=True, slots=True)
class Symbol:
    """`code`: of functions, not of data."""

    address: int
    name: str
    code: bool


def parse_map(text: str, where: str) -> list[Symbol]:
    """Lines `address type name [module]`. Raises ConfigError."""
    found: list[Symbol] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            address, kind, name = int(words[0], 16), words[1], words[2]
        except (ValueError, IndexError):
            raise ConfigError(f"{where}: line {number} is no symbol; write ADDRESS TYPE NAME") from None
        if LEAST_ADDRESS <= address < 1 << 64 and kind not in "aAU":
            found.append(Symbol(address, name, kind in "tTwW"))
        if len(found) > MAX_SYMBOLS:
            raise ConfigError(f"{where}: more than {MAX_SYMBOLS} symbols")
    if not found:
        raise ConfigError(
            f"{where}: no addresses in it; Debian's /boot/System.map has none, and /proc/kallsyms shows them to root"
        )
    return found


def parse_elf(data: bytes, where: str) -> list[Symbol]:
    """The symbol table of a 64-bit little-endian file. Raises ConfigError."""
    try:
        header = _EHDR.unpack_from(data)
        offset, entry, count = header[6], header[11], header[12]
        sections = [_SHDR.unpack_from(data, offset + entry * index) for index in range(count)]
        table = next((section for section in sections if section[1] == _SYMTAB), None)
        if table is None or table[6] >= count:
            raise ConfigError(f"{where}: has no symbols; it was stripped")
        executable = {index for index, section in enumerate(sections) if section[2] & 4}
        strings = sections[table[6]]
        names = data[strings[4] : strings[4] + strings[5]]
        part = data[table[4] : table[4] + table[5] // _SYM.size * _SYM.size]
        if len(part) // _SYM.size > MAX_SYMBOLS:
            raise ConfigError(f"{where}: more than {MAX_SYMBOLS} symbols")
        found = []
        for at, info, _, section, address, _size in _SYM.iter_unpack(part):
            if info & 15 < 3 and section and section < 0xFF00 and address >= LEAST_ADDRESS:
                end = names.find(b"\0", at)
                name = names[at:end].decode("utf-8", "replace")
                if name:
                    found.append(Symbol(address, name, info & 15 == _FUNC or section in executable))
    except (struct.error, OverflowError) as error:
        raise ConfigError(f"{where}: is no whole 64-bit ELF file") from error
    if not found:
        raise ConfigError(f"{where}: has no symbols; it was stripped")
    return found


def read_symbols(path: Path) -> list[Symbol]:
    """Of System.map, a copy of /proc/kallsyms or an ELF file. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise ConfigError(f"symbols: {path}: too large")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"symbols: {path}: {os_reason(error)}") from error
    if is_elf(data):
        return parse_elf(data, f"symbols: {path}")
    return parse_map(data.decode("utf-8", "replace"), f"symbols: {path}")


def is_elf(data: bytes) -> bool:
    """A 64-bit little-endian ELF file begins so."""
    return data[:6] == b"\x7fELF\x02\x01"


def offset(symbols: Iterable[Symbol], cpu: Mapping[str, Any]) -> int:
    """By how much the kernel that runs was moved from where the symbols say; `cpu` is what inspect.registers() and
    handlers() found of a vCPU. StateError if that is not this kernel, or does not run yet."""
    where = {symbol.name: symbol.address for symbol in symbols}
    seen = {**cpu.get("handlers", {}), "lstar": cpu.get("msrs", {}).get("lstar", 0)}
    votes: dict[int, int] = {}
    for key, names in ANCHORS.items():
        address = seen.get(key, 0)
        for name in names:
            if address and name in where:
                moved = address - where[name]
                if moved % ALIGNMENT == 0:
                    votes[moved] = votes.get(moved, 0) + 1
    best = max(votes.values(), default=0)
    if best < 2:
        raise StateError("the kernel that these symbols are of does not run (yet) in this machine")
    return next(moved for moved, count in votes.items() if count == best)


def move(symbols: Sequence[Symbol], by: int) -> list[Symbol]:
    """The same symbols, elsewhere."""
    return [Symbol(each.address + by & (1 << 64) - 1, each.name, each.code) for each in symbols]


class Names:
    """Symbols by address, for people."""

    def __init__(self, symbols: Sequence[Symbol]) -> None:
        self._symbols = sorted(symbols, key=lambda symbol: symbol.address)
        self._addresses = [symbol.address for symbol in self._symbols]

    def __call__(self, address: int) -> str:
        """name+0x12, or "" if no symbol is near."""
        index = bisect.bisect_right(self._addresses, address) - 1
        if index < 0 or address - self._addresses[index] > MAX_GAP:
            return ""
        symbol = self._symbols[index]
        past = address - symbol.address
        return f"{symbol.name}+{past:#x}" if past else symbol.name


def write_elf(symbols: Iterable[Symbol]) -> bytes:
    """An ELF file (ET_EXEC) with sections without content, one for each run of code or data, and a symbol table. A
    symbol reaches to the next."""
    ordered = sorted(symbols, key=lambda symbol: (symbol.address, symbol.name))
    names = bytearray(b"\0")
    table = bytearray(_SYM.size)
    sections: list[bytes] = [b"\0" * _SHDR.size]
    strings = b"\0.text\0.data\0.symtab\0.strtab\0.shstrtab\0"

    def name(text: bytes) -> int:
        return strings.index(b"\0" + text + b"\0") + 1

    following = {
        one.address: two.address for one, two in itertools.pairwise(ordered) if two.address != one.address
    }
    for _, group in itertools.groupby(ordered, key=_runs()):
        run = list(group)
        first, last = run[0].address, run[-1].address
        end = last + min(following.get(last, last + 16) - last, MAX_GAP)
        kind, flags = (b".text", 6) if run[0].code else (b".data", 3)
        sections.append(_SHDR.pack(name(kind), _NOBITS, flags, first, _EHDR.size, end - first, 0, 0, 1, 0))
        for symbol in run:
            size = min(following.get(symbol.address, symbol.address + 16) - symbol.address, end - symbol.address)
            info = 1 << 4 | (_FUNC if symbol.code else _OBJECT)
            table += _SYM.pack(len(names), info, 0, len(sections) - 1, symbol.address, size)
            names += symbol.name.encode() + b"\0"
    at = _EHDR.size
    first_string = len(sections) + 1
    sections.append(_SHDR.pack(name(b".symtab"), _SYMTAB, 0, 0, at, len(table), first_string, 1, 8, _SYM.size))
    at += len(table)
    sections.append(_SHDR.pack(name(b".strtab"), _STRTAB, 0, 0, at, len(names), 0, 0, 1, 0))
    at += len(names)
    sections.append(_SHDR.pack(name(b".shstrtab"), _STRTAB, 0, 0, at, len(strings), 0, 0, 1, 0))
    at += len(strings)
    header = _EHDR.pack(
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 2, 62, 1, 0, 0, at, 0, _EHDR.size, 0, 0, _SHDR.size, len(sections),
        len(sections) - 1,
    )  # fmt: skip
    return header + bytes(table + names) + strings + b"".join(sections)


def _runs() -> Any:
    """A key for groupby(): another number for each change between code and data, and beyond a gap."""
    number, before = 0, None

    def key(symbol: Symbol) -> int:
        nonlocal number, before
        if before is not None and (before.code != symbol.code or symbol.address - before.address > 1 << 24):
            number += 1
        before = symbol
        return number

    return key
