"""struct.Struct views of the KVM structures that warm paths pack and unpack. cpu/layouts.py declares them; a test
proves both equal. Kept apart so that running a VM imports no parser library. Little-endian, no implicit padding.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

REGS: Final = struct.Struct("<18Q")
"""struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags."""
SEGMENT: Final = struct.Struct("<QIHBBBBBBBBBB")
"""struct kvm_segment: base limit selector type present dpl db s l g avl unusable padding."""
DTABLE: Final = struct.Struct("<QHHHH")
"""struct kvm_dtable: base limit padding[3]."""
SREGS_CONTROL: Final = struct.Struct("<7Q4Q")
"""The end of struct kvm_sregs: cr0 cr2 cr3 cr4 cr8 efer apic_base interrupt_bitmap[4]."""
CPUID_ENTRY: Final = struct.Struct("<IIIIIIIIII")
"""struct kvm_cpuid_entry2: function index flags eax ebx ecx edx padding[3]."""
MSRS_HEAD: Final = struct.Struct("<II")
"""struct kvm_msrs: nmsrs pad."""
MSR_ENTRY: Final = struct.Struct("<IIQ")
"""struct kvm_msr_entry: index reserved data."""
EXIT: Final = struct.Struct("<IIQQQQII16QB15s")
"""struct lv_exit of cpu/native/loop.h."""


EXTRA: Final = struct.Struct("<QIHH4Q")
"""struct extra_state of cpu/soft/run/state.c: mwait_until flags fcs fds pdpte[4]."""
CORE_HEAD: Final = struct.Struct("<3Q2Iq")
"""LV_STATE_CORE of cpu/soft/run/backend.c up to its times: seeded seed position vcpus turn turn_left."""


class StateKind(enum.IntEnum):
    """enum lv_state_kind of cpu/native/loop.h."""

    REGS = 0
    SREGS = 1
    XSAVE = 2
    XCRS = 3
    MSRS = 4
    LAPIC = 5
    EVENTS = 6
    DEBUGREGS = 7
    MP = 8
    EXTRA = 9
    PIC_MASTER = 16
    PIC_SLAVE = 17
    IOAPIC = 18
    PIT = 19
    CLOCK = 20
    CORE = 21
    TSC = 22
