"""The software core decodes an instruction only for a guest whose CPUID has it (FEATURE in cpu/soft/ops/table.h).

Interpreted and translated: the program runs its instruction often enough for host code.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpu import _core
from cpu.contract import CpuidEntry, Registers
from cpu.exits import Shutdown
from cpu.model import table
from cpu.system import soft_system
from tests.support.bare import Bare

pytestmark = pytest.mark.skipif("soft" not in _core.CORES, reason="this build has no software core")

ROUNDS = 200
CODE = 0x10000


def without(entries: list[CpuidEntry], function: int, register: str, bit: int) -> list[CpuidEntry]:
    """The table with one bit clear."""
    return [
        replace(entry, **{register: getattr(entry, register) & ~(1 << bit)}) if entry.function == function else entry
        for entry in entries
    ]


def outcome(instruction: str, source: int, cpuid: list[CpuidEntry]) -> tuple[int, int] | None:
    """(EAX, EFLAGS) after the instruction on EBX; None: it was #UD, of which this machine without an IDT dies."""
    loop = bytes.fromhex(instruction) + bytes.fromhex("9c5a")  # ...; pushf; pop edx
    loop += bytes.fromhex("49") + b"\x75" + (-len(loop) - 3).to_bytes(1, "little", signed=True)  # dec ecx; jnz
    with Bare(soft_system()) as machine:
        machine.vcpus[0].set_cpuid(cpuid)
        machine.code(CODE, loop + bytes.fromhex("e6f4"))  # out 0xf4, al
        registers = machine.vcpus[0].registers()
        machine.vcpus[0].set_registers(replace(registers, rax=0xDEAD, rbx=source, rcx=ROUNDS))
        machine.start()
        machine.run(timeout=30)
        if machine.ended is None or machine.ended == -1:
            assert [type(exit) for _, exit in machine.exits] == [Shutdown]
            return None
        after: Registers = machine.vcpus[0].registers()
        assert after.rcx == 0
        return after.rax, after.rdx & 0x8D5


def test_popcnt_is_undefined_without_its_bit() -> None:
    """SDM 2B POPCNT: "#UD If CPUID.01H:ECX.POPCNT [Bit 23] = 0"."""
    cpuid = list(soft_system().supported_cpuid())
    assert outcome("f30fb8c3", 0x8000_0F01, cpuid) == (6, 0)
    assert outcome("f30fb8c3", 0x8000_0F01, without(cpuid, 1, "ecx", 23)) is None


def test_lzcnt_is_bsr_without_its_bit() -> None:
    """SDM 2A LZCNT: "On processors that do not support the LZCNT instruction, the instruction byte encoding is executed
    as BSR". CF tells that the source is zero, ZF that the result is (BSR: that the source is)."""
    cpuid = list(soft_system().supported_cpuid())
    zf, cf = 0x40, 1
    assert outcome("f30fbdc3", 0x0012_3456, cpuid) == (11, 0)
    assert outcome("f30fbdc3", 0x8000_0000, cpuid) == (0, zf)
    assert outcome("f30fbdc3", 0, cpuid) == (32, cf)
    assert outcome("66f30fbdc3", 0xFFFF_0000, cpuid) == (16, cf)
    assert outcome("66f30fbdc3", 0x0001, cpuid) == (15, 0)
    # SDM 2A LZCNT: OF is undefined. AMD processors keep it, also that of an INC none of whose other flags live on.
    of = 0x800
    after_inc = "b8ffffff7f40f30fbdc3"  # mov eax, 0x7fffffff; inc eax
    assert outcome(after_inc, 1, cpuid) == (31, of)
    assert outcome("b8ffffff7f83c001f30fbdc3", 1, cpuid) == (31, of)
    assert outcome("31c0f30fbdc3", 1, cpuid) == (31, 0)
    lacking = without(cpuid, 0x8000_0001, "ecx", 5)
    found = outcome("f30fbdc3", 0x0012_3456, lacking)
    assert found is not None
    assert found[0] == 20
    assert outcome("f30fbdc3", 0, lacking) == (0xDEAD, zf | 4)
    assert not any(entry.ecx >> 5 & 1 for entry in table("v2", cpuid) if entry.function == 0x8000_0001)


def test_tzcnt_is_bsf_without_bmi1() -> None:
    """SDM 2D TZCNT: "If the processor does not support the TZCNT instruction, the instruction byte encoding is executed
    as BSF". CF tells that the source is zero."""
    cpuid = list(soft_system().supported_cpuid())
    zf, cf = 0x40, 1
    assert outcome("f30fbcc3", 0x0010_0000, cpuid) == (20, 0)
    assert outcome("f30fbcc3", 1, cpuid) == (0, zf)
    assert outcome("f30fbcc3", 0, cpuid) == (32, cf)
    lacking = without(cpuid, 7, "ebx", 3)
    assert outcome("f30fbcc3", 0, lacking) == (0xDEAD, zf | 4)


def test_instructions_of_bmi_are_undefined_without_their_bits() -> None:
    """SDM 2A ANDN, 2B SHLX: #UD without CPUID.7.0:EBX bits 3 and 8."""
    cpuid = list(soft_system().supported_cpuid())
    assert outcome("c4e260f2c3", 0xF0F0, cpuid) == (0, 0x44)  # andn eax, ebx, ebx
    assert outcome("c4e260f2c3", 0xF0F0, without(cpuid, 7, "ebx", 3)) is None
    assert outcome("c4e261f7c3", 0x21, cpuid) == (0x42, 0)  # shlx eax, ebx, ebx
    assert outcome("c4e261f7c3", 0x21, without(cpuid, 7, "ebx", 8)) is None
