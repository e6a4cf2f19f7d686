"""A vCPU's general and system registers in the layouts of the KVM API (struct kvm_regs, struct kvm_sregs).

Apart from cpu/state.py because each start sets registers, and that declares the dataclasses of whole states.
"""

from __future__ import annotations

import struct

from cpu.contract import Registers, Segment, SystemRegisters
from cpu.errors import ConfigError
from cpu.views import DTABLE, REGS, SEGMENT, SREGS_CONTROL


def values_of(value: object) -> list[int]:
    """The fields of a dataclass, in order."""
    return [getattr(value, name) for name in value.__match_args__]  # type: ignore[attr-defined]


def pack_values(layout: struct.Struct, *values: int) -> bytes:
    """Raises ConfigError for a number that its field cannot hold."""
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise ConfigError(f"a state holds a number that its field cannot: {error}") from error


def pack_registers(registers: Registers) -> bytes:
    """struct kvm_regs."""
    return pack_values(REGS, *values_of(registers))


def pack_system(r: SystemRegisters, interrupts: tuple[int, ...]) -> bytes:
    """struct kvm_sregs."""
    segments = (r.cs, r.ds, r.es, r.fs, r.gs, r.ss, r.tr, r.ldt)
    return (
        b"".join(pack_values(SEGMENT, *values_of(segment), 0) for segment in segments)
        + pack_values(DTABLE, *r.gdt, 0, 0, 0)
        + pack_values(DTABLE, *r.idt, 0, 0, 0)
        + pack_values(SREGS_CONTROL, r.cr0, r.cr2, r.cr3, r.cr4, r.cr8, r.efer, r.apic_base, *interrupts)
    )


def unpack_system(blob: bytes) -> tuple[SystemRegisters, tuple[int, ...]]:
    """The registers, and the bitmap of pending interrupts as four words."""
    cs, ds, es, fs, gs, ss, tr, ldt = (Segment(*SEGMENT.unpack_from(blob, at * SEGMENT.size)[:12]) for at in range(8))
    gdt = DTABLE.unpack_from(blob, 8 * SEGMENT.size)
    idt = DTABLE.unpack_from(blob, 8 * SEGMENT.size + DTABLE.size)
    control = SREGS_CONTROL.unpack_from(blob, 8 * SEGMENT.size + 2 * DTABLE.size)
    tables = ((gdt[0], gdt[1]), (idt[0], idt[1]))
    return SystemRegisters(cs, ds, es, fs, gs, ss, tr, ldt, *tables, *control[:7]), control[7:]
