"""Every KVM structure that a saved state holds, declared once (Linux: include/uapi/linux/kvm.h and
arch/x86/include/uapi/asm/kvm.h; "KVM API" names the sections of Documentation/virt/kvm/api.rst).

For cold paths: showing, checking and converting states, and tests. `view()` derives the struct.Struct that
cpu/views.py holds for warm paths. All little-endian.
"""

from __future__ import annotations

import struct
from typing import Any

from construct import (
    Array,
    Bytes,
    FormatField,
    Int8ul,
    Int16ul,
    Int32ul,
    Int64sl,
    Int64ul,
    Padding,
    Struct,
    Switch,
    this,
)

# KVM API 4.11 KVM_GET_REGS
Regs = Struct(
    *(
        name / Int64ul
        for name in [
            "rax",
            "rbx",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "rsp",
            "rbp",
            "r8",
            "r9",
            "r10",
            "r11",
            "r12",
            "r13",
            "r14",
            "r15",
            "rip",
            "rflags",
        ]
    )
)

# KVM API 4.13 KVM_GET_SREGS
Segment = Struct(
    "base" / Int64ul,
    "limit" / Int32ul,
    "selector" / Int16ul,
    *(name / Int8ul for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
)
DTable = Struct("base" / Int64ul, "limit" / Int16ul, "padding" / Array(3, Int16ul))
SregsControl = Struct(
    *(name / Int64ul for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
    "interrupt_bitmap" / Array(4, Int64ul),
)
Sregs = Struct(
    *(name / Segment for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
    "gdt" / DTable,
    "idt" / DTable,
    "control" / SregsControl,
)

# KVM API 4.46 KVM_GET_SUPPORTED_CPUID
CpuidEntry2 = Struct(
    *(name / Int32ul for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
    "padding" / Array(3, Int32ul),
)

# KVM API 4.18 KVM_GET_MSRS
MsrEntry = Struct("index" / Int32ul, "reserved" / Int32ul, "data" / Int64ul)
MsrsHead = Struct("nmsrs" / Int32ul, "pad" / Int32ul)
Msrs = Struct("nmsrs" / Int32ul, "pad" / Int32ul, "entries" / Array(this.nmsrs, MsrEntry))

# KVM API 4.57 KVM_GET_LAPIC: the APIC page as memory-mapped (SDM 3A 11.4.1)
Lapic = Struct("regs" / Bytes(1024))

# KVM API 4.42 KVM_GET_XSAVE: standard format (SDM 1 13.4)
Xsave = Struct(
    "legacy" / Bytes(512), "xstate_bv" / Int64ul, "xcomp_bv" / Int64ul, "header" / Bytes(48), "extended" / Bytes(3520)
)

# KVM API 4.44 KVM_GET_XCRS
Xcr = Struct("xcr" / Int32ul, "reserved" / Int32ul, "value" / Int64ul)
Xcrs = Struct("nr_xcrs" / Int32ul, "flags" / Int32ul, "xcrs" / Array(16, Xcr), "padding" / Array(16, Int64ul))

# KVM API 4.31 KVM_GET_VCPU_EVENTS
VcpuEvents = Struct(
    "exception"
    / Struct("injected" / Int8ul, "nr" / Int8ul, "has_error_code" / Int8ul, "pending" / Int8ul, "error_code" / Int32ul),
    "interrupt" / Struct("injected" / Int8ul, "nr" / Int8ul, "soft" / Int8ul, "shadow" / Int8ul),
    "nmi" / Struct("injected" / Int8ul, "pending" / Int8ul, "masked" / Int8ul, "pad" / Int8ul),
    "sipi_vector" / Int32ul,
    "flags" / Int32ul,
    "smi" / Struct("smm" / Int8ul, "pending" / Int8ul, "smm_inside_nmi" / Int8ul, "latched_init" / Int8ul),
    "triple_fault" / Int8ul,
    "reserved" / Bytes(26),
    "exception_has_payload" / Int8ul,
    "exception_payload" / Int64ul,
)

# KVM API 4.33 KVM_GET_DEBUGREGS
DebugRegs = Struct(
    "db" / Array(4, Int64ul), "dr6" / Int64ul, "dr7" / Int64ul, "flags" / Int64ul, "reserved" / Array(9, Int64ul)
)

# KVM API 4.38 KVM_GET_MP_STATE
MpState = Struct("mp_state" / Int32ul)

# KVM API 4.26 KVM_GET_IRQCHIP
PicState = Struct(
    *(
        name / Int8ul
        for name in [
            "last_irr",
            "irr",
            "imr",
            "isr",
            "priority_add",
            "irq_base",
            "read_reg_select",
            "poll",
            "special_mask",
            "init_state",
            "auto_eoi",
            "rotate_on_auto_eoi",
            "special_fully_nested_mode",
            "init4",
            "elcr",
            "elcr_mask",
        ]
    )
)
IoapicState = Struct(
    "base_address" / Int64ul,
    "ioregsel" / Int32ul,
    "id" / Int32ul,
    "irr" / Int32ul,
    "pad" / Int32ul,
    "redirtbl" / Array(24, Int64ul),
)
PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2
Irqchip = Struct(
    "chip_id" / Int32ul,
    "pad" / Int32ul,
    "chip"
    / Switch(
        this.chip_id,
        {
            PIC_MASTER: Struct("pic" / PicState, Padding(496)),
            PIC_SLAVE: Struct("pic" / PicState, Padding(496)),
            IOAPIC: Struct("ioapic" / IoapicState, Padding(296)),
        },
    ),
)
IRQCHIP_SIZE = 520

# KVM API 4.71 KVM_GET_PIT2
PitChannel = Struct(
    "count" / Int32ul,
    "latched_count" / Int16ul,
    *(
        name / Int8ul
        for name in [
            "count_latched",
            "status_latched",
            "status",
            "read_state",
            "write_state",
            "write_latch",
            "rw_mode",
            "mode",
            "bcd",
            "gate",
        ]
    ),
    "count_load_time" / Int64sl,
)
PitState2 = Struct("channels" / Array(3, PitChannel), "flags" / Int32ul, "reserved" / Array(9, Int32ul))

# KVM API 4.29 KVM_GET_CLOCK
ClockData = Struct(
    "clock" / Int64ul,
    "flags" / Int32ul,
    "pad0" / Int32ul,
    "realtime" / Int64ul,
    "host_tsc" / Int64ul,
    "pad" / Array(4, Int32ul),
)

# cpu/native/loop.h: struct lv_exit
NativeExit = Struct(
    "kind" / Int32ul,
    "size" / Int32ul,
    "address" / Int64ul,
    "value" / Int64ul,
    "rip" / Int64ul,
    "code" / Int64ul,
    "extra" / Int32ul,
    "ndata" / Int32ul,
    "data" / Array(16, Int64ul),
    "insn_size" / Int8ul,
    "insn" / Bytes(15),
)

__all__ = [
    "ClockData",
    "CpuidEntry2",
    "DTable",
    "DebugRegs",
    "IRQCHIP_SIZE",
    "Irqchip",
    "Lapic",
    "MpState",
    "MsrEntry",
    "Msrs",
    "MsrsHead",
    "NativeExit",
    "PitState2",
    "Regs",
    "Segment",
    "Sregs",
    "SregsControl",
    "VcpuEvents",
    "Xcrs",
    "Xsave",
    "view",
]


def _format(declaration: Any) -> str:
    """The struct format of a declaration, without the byte order."""
    if hasattr(declaration, "subcons"):
        return "".join(_format(part) for part in declaration.subcons)
    if isinstance(declaration, FormatField):
        return str(declaration.fmtstr)[1:]
    if isinstance(declaration, Bytes):
        return f"{declaration.length}s"
    if isinstance(declaration, Array):
        return _format(declaration.subcon) * int(declaration.count)
    if hasattr(declaration, "subcon"):
        return _format(declaration.subcon)
    raise TypeError(f"no struct format for {declaration!r}")


def view(declaration: Any) -> struct.Struct:
    """The struct.Struct equal to a declaration of fixed-size fields; TypeError if there is none."""
    return struct.Struct("<" + _format(declaration))
