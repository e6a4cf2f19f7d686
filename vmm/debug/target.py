"""What GDB is told of the processor: registers in order, and the target description ("Debugging with GDB", appendix G).

Features `org.gnu.gdb.i386.core`, `.sse`, `.avx` (of a guest that has AVX) and `.segments` are GDB's own;
`org.loopvisor.system` has the registers that only a machine's debugger can see. `rip` (`eip`) is the *linear* address,
CS.base + IP: what GDB compares with the addresses of symbols and breakpoints. It differs from the register where CS has
a base, as in real mode.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from cpu.contract import Registers, Segment, SystemRegisters
from cpu.values import dataclass
from vmm.errors import ConfigError

ARCHITECTURES = ("x86-64", "i386", "i8086")
_ARCHITECTURE = {"x86-64": "i386:x86-64", "i386": "i386", "i8086": "i8086"}
KERNEL_GS_BASE = 0xC0000102
XSAVE_LEGACY = 512
XSAVE_HEADER = 64
XSAVE_UPPER = 256
"""Bytes of component 2, the upper halves of YMM registers, which stands behind the header (SDM 1, 13.5.2)."""
_FLAGS = (
    ("CF", 0), ("", 1), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8), ("IF", 9), ("DF", 10), ("OF", 11),
    ("NT", 14), ("RF", 16), ("VM", 17), ("AC", 18), ("VIF", 19), ("VIP", 20), ("ID", 21),
)  # fmt: skip
_MXCSR = (
    ("IE", 0), ("DE", 1), ("ZE", 2), ("OE", 3), ("UE", 4), ("PE", 5), ("DAZ", 6), ("IM", 7), ("DM", 8), ("ZM", 9),
    ("OM", 10), ("UM", 11), ("PM", 12), ("FZ", 15),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CpuState:
    """What GDB's registers are made of. `legacy`: the first 512 bytes of XSAVE's area (SDM 1, 10.5.1); `upper`: bits
    255:128 of each YMM register (13.5.2), without meaning for a guest without AVX."""

    general: Registers
    system: SystemRegisters
    legacy: bytes
    kernel_gs_base: int
    upper: bytes = bytes(XSAVE_UPPER)

    @property
    def code64(self) -> bool:
        """64-bit code: EFER.LMA and CS.L."""
        return bool(self.system.efer & 1 << 10 and self.system.cs.l)

    @property
    def pc(self) -> int:
        """The linear address of the next instruction."""
        if self.code64:
            return self.general.rip
        return self.system.cs.base + self.general.rip & 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class GdbRegister:
    """`get` and `set` are about the value as an unsigned number, `set` gives the changed state."""

    name: str
    bits: int
    type: str
    feature: str
    group: str
    get: Callable[[CpuState], int]
    set: Callable[[CpuState, int], CpuState]


def _general(field: str, state: CpuState) -> int:
    return int(getattr(state.general, field))


def _set_general(field: str, state: CpuState, value: int) -> CpuState:
    return replace(state, general=replace(state.general, **{field: value}))


def _set_pc(state: CpuState, value: int) -> CpuState:
    if not state.code64:
        value = value - state.system.cs.base & 0xFFFF_FFFF
    return _set_general("rip", state, value)


def _replaced(system: SystemRegisters, field: str, value: Any) -> SystemRegisters:
    return replace(system, **{field: value})


def _system(field: str, state: CpuState) -> int:
    return int(getattr(state.system, field))


def _set_system(field: str, state: CpuState, value: int) -> CpuState:
    return replace(state, system=_replaced(state.system, field, value))


def _segment(name: str, field: str, state: CpuState) -> int:
    return int(getattr(getattr(state.system, name), field))


def _set_selector(name: str, state: CpuState, value: int) -> CpuState:
    """In real and virtual-8086 mode with its base; else the selector alone, since its descriptor is not looked at."""
    segment: Segment = getattr(state.system, name)
    changed = replace(segment, selector=value & 0xFFFF)
    if not state.system.cr0 & 1 or state.general.rflags & 1 << 17:
        changed = replace(changed, base=(value & 0xFFFF) << 4)
    return replace(state, system=_replaced(state.system, name, changed))


def _set_base(name: str, state: CpuState, value: int) -> CpuState:
    segment: Segment = getattr(state.system, name)
    return replace(state, system=_replaced(state.system, name, replace(segment, base=value)))


def _legacy(at: int, size: int, state: CpuState) -> int:
    return int.from_bytes(state.legacy[at : at + size], "little")


def _set_legacy(at: int, size: int, state: CpuState, value: int) -> CpuState:
    changed = state.legacy[:at] + value.to_bytes(size, "little") + state.legacy[at + size :]
    return replace(state, legacy=changed)


def _upper(n: int, state: CpuState) -> int:
    return int.from_bytes(state.upper[16 * n : 16 * n + 16], "little")


def _set_upper(n: int, state: CpuState, value: int) -> CpuState:
    changed = state.upper[: 16 * n] + value.to_bytes(16, "little") + state.upper[16 * n + 16 :]
    return replace(state, upper=changed)


def _x87_tags(state: CpuState) -> int:
    """The full tag word (SDM 1, 8.1.7) of XSAVE's abridged one."""
    abridged, top, word = state.legacy[4], _legacy(2, 2, state) >> 11 & 7, 0
    for physical in range(8):
        tag = 3
        if abridged >> physical & 1:
            low, high = struct.unpack_from("<QH", state.legacy, 32 + 16 * (physical - top & 7))
            exponent = high & 0x7FFF
            if exponent == 0:
                tag = 2 if low else 1
            else:
                tag = 2 if exponent == 0x7FFF or not low >> 63 else 0
        word |= tag << 2 * physical
    return word


def _set_x87_tags(state: CpuState, value: int) -> CpuState:
    abridged = sum(1 << physical for physical in range(8) if value >> 2 * physical & 3 != 3)
    return _set_legacy(4, 1, state, abridged)


def _set_kernel_gs_base(state: CpuState, value: int) -> CpuState:
    return replace(state, kernel_gs_base=value)


def _part(function: Callable[..., int], *arguments: object) -> Callable[[CpuState], int]:
    return lambda state: function(*arguments, state)


def _change(function: Callable[..., CpuState], *arguments: object) -> Callable[[CpuState, int], CpuState]:
    return lambda state, value: function(*arguments, state, value)


@cache
def registers(architecture: str, avx: bool = False) -> tuple[GdbRegister, ...]:
    """All registers of a description, by number. `avx`: the guest has YMM registers."""
    wide = architecture == "x86-64"
    word = 64 if wide else 32
    core, sse, system = "org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse", "org.loopvisor.system"
    vectors = range(16 if wide else 8)
    found: list[GdbRegister] = []

    def add(
        name: str, bits: int, type: str, feature: str, group: str, get: Callable[[CpuState], int],
        set: Callable[[CpuState, int], CpuState],
    ) -> None:  # fmt: skip
        found.append(GdbRegister(name, bits, type, feature, group, get, set))

    if wide:
        names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
    else:
        names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    for field in names:
        name = field if wide else f"e{field[1:]}"
        kind = "data_ptr" if field in ("rbp", "rsp") else f"int{word}"
        add(name, word, kind, core, "", _part(_general, field), _change(_set_general, field))
    add("rip" if wide else "eip", word, "code_ptr", core, "", lambda state: state.pc, _set_pc)
    add("eflags", 32, "i386_eflags", core, "", _part(_general, "rflags"), _change(_set_general, "rflags"))
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        add(name, 32, "int32", core, "", _part(_segment, name, "selector"), _change(_set_selector, name))
    for n in range(8):
        at = 32 + 16 * n
        add(f"st{n}", 80, "i387_ext", core, "", _part(_legacy, at, 10), _change(_set_legacy, at, 10))
    for name, at, size in (
        ("fctrl", 0, 2), ("fstat", 2, 2), ("ftag", 0, 0), ("fiseg", 12, 2), ("fioff", 8, 4), ("foseg", 20, 2),
        ("fooff", 16, 4), ("fop", 6, 2),
    ):  # fmt: skip
        if name == "ftag":
            add(name, 32, "int", core, "float", _x87_tags, _set_x87_tags)
        else:
            setter = _change(_set_masked, at, size)
            add(name, 32, "int", core, "float", _part(_legacy, at, size), setter)
    for n in vectors:
        at = 160 + 16 * n
        add(f"xmm{n}", 128, "vec128", sse, "", _part(_legacy, at, 16), _change(_set_legacy, at, 16))
    add("mxcsr", 32, "i386_mxcsr", sse, "vector", _part(_legacy, 24, 4), _change(_set_masked, 24, 4))
    for n in vectors if avx else ():
        add(f"ymm{n}h", 128, "uint128", "org.gnu.gdb.i386.avx", "", _part(_upper, n), _change(_set_upper, n))
    if wide:
        for name in ("fs", "gs"):
            getter, setter = _part(_segment, name, "base"), _change(_set_base, name)
            add(f"{name}_base", 64, "int64", "org.gnu.gdb.i386.segments", "", getter, setter)
        add("k_gs_base", 64, "int64", system, "system", lambda state: state.kernel_gs_base, _set_kernel_gs_base)
    for name in ("cs", "ss", "ds", "es") if wide else ("cs", "ss", "ds", "es", "fs", "gs"):
        getter, setter = _part(_segment, name, "base"), _change(_set_base, name)
        add(f"{name}_base", word, f"int{word}", system, "system", getter, setter)
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"):
        add(name, 64, "int64", system, "system", _part(_system, name), _change(_set_system, name))
    for name in ("tr", "ldt"):
        getter, setter = _part(_segment, name, "base"), _change(_set_base, name)
        add(f"{name}_base", 64, "int64", system, "system", getter, setter)
    for name in ("gdt", "idt"):
        add(f"{name}_base", 64, "int64", system, "system", _part(_table, name), _change(_set_table, name))
    return tuple(found)


def _set_masked(at: int, size: int, state: CpuState, value: int) -> CpuState:
    return _set_legacy(at, size, state, value & (1 << 8 * size) - 1)


def _table(name: str, state: CpuState) -> int:
    return int(getattr(state.system, name)[0])


def _set_table(name: str, state: CpuState, value: int) -> CpuState:
    return replace(state, system=_replaced(state.system, name, (value, getattr(state.system, name)[1])))


def read(register: GdbRegister, state: CpuState) -> bytes:
    """As GDB wants it: little-endian, of the register's width."""
    return (register.get(state) & (1 << register.bits) - 1).to_bytes(register.bits // 8, "little")


def pack(registers: Iterable[GdbRegister], state: CpuState) -> bytes:
    """All of `registers`, as packet `g` has them before they are hexadecimal."""
    return b"".join(read(register, state) for register in registers)


def unpack(registers: Iterable[GdbRegister], state: CpuState, data: bytes) -> CpuState:
    """`state` with what packet `G` says of `registers`; those whose value is not another stay as they are to the last
    bit. Raises ConfigError if the length is wrong."""
    at = 0
    for register in registers:
        size = register.bits // 8
        part = data[at : at + size]
        if len(part) < size:
            raise ConfigError("registers: too few bytes")
        if part != read(register, state):
            state = register.set(state, int.from_bytes(part, "little"))
        at += size
    if at != len(data):
        raise ConfigError("registers: too many bytes")
    return state


def _flag_type(name: str, fields: Iterable[tuple[str, int]]) -> str:
    inner = "".join(f'<field name="{field}" start="{bit}" end="{bit}"/>' for field, bit in fields)
    return f'<flags id="{name}" size="4">{inner}</flags>'


def _vector_types() -> str:
    parts = (
        ("v4f", "ieee_single", 4, "v4_float"), ("v2d", "ieee_double", 2, "v2_double"),
        ("v16i8", "int8", 16, "v16_int8"), ("v8i16", "int16", 8, "v8_int16"), ("v4i32", "int32", 4, "v4_int32"),
        ("v2i64", "int64", 2, "v2_int64"),
    )  # fmt: skip
    vectors = "".join(f'<vector id="{id}" type="{type}" count="{count}"/>' for id, type, count, _ in parts)
    fields = "".join(f'<field name="{name}" type="{id}"/>' for id, _, _, name in parts)
    return f'{vectors}<union id="vec128">{fields}<field name="uint128" type="uint128"/></union>'


@cache
def description(architecture: str, avx: bool = False) -> bytes:
    """target.xml"""
    types = {
        "org.gnu.gdb.i386.core": _flag_type("i386_eflags", _FLAGS),
        "org.gnu.gdb.i386.sse": _vector_types() + _flag_type("i386_mxcsr", _MXCSR),
    }
    text = [
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">',
        f"<architecture>{_ARCHITECTURE[architecture]}</architecture>",
    ]
    feature = ""
    for number, register in enumerate(registers(architecture, avx)):
        if register.feature != feature:
            text.append("</feature>" if feature else "")
            feature = register.feature
            text.append(f'<feature name="{feature}">{types.get(feature, "")}')
        group = f' group="{register.group}"' if register.group else ""
        text.append(
            f'<reg name="{register.name}" bitsize="{register.bits}" type="{register.type}" regnum="{number}"{group}/>'
        )
    text.append("</feature></target>\n")
    return "".join(text).encode()
