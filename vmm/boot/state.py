"""What a loader hands to the first vCPU: general, segment and control registers for each mode of entry.

Specification: Intel SDM 3.4.5 (segment descriptors), 4.5 (4-level paging), 9.1.4 (first instruction).
"""

from __future__ import annotations

import struct
from dataclasses import field
from typing import Protocol

from cpu.contract import Registers, Segment, SystemRegisters
from cpu.values import dataclass
from vmm.machine import layout

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10

_PRESENT_WRITABLE = 0x3
_PAGE_SIZE_BIT = 0x80


class LoadMemory(Protocol):
    """Guest memory as the loaders use it. Raises GuestError outside RAM."""

    @property
    def size(self) -> int: ...
    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None: ...
    def read(self, gpa: int, length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class BootState:
    """How vCPU 0 starts. All other vCPUs wait for INIT and SIPI."""

    registers: Registers
    system_registers: SystemRegisters
    protocol: str
    """'linux64', 'linux32', 'pvh', 'multiboot', 'coreboot' or 'flat'."""
    cmdline: str = ""
    notes: tuple[str, ...] = field(default=())


def _code(*, long: bool, selector: int) -> Segment:
    return Segment(
        base=0, limit=0xFFFF_FFFF, selector=selector, type=11, present=1, s=1, db=0 if long else 1, l=int(long), g=1
    )


def _data(selector: int) -> Segment:
    return Segment(base=0, limit=0xFFFF_FFFF, selector=selector, type=3, present=1, s=1, db=1, g=1)


_TR = Segment(base=0, limit=0x67, selector=0, type=11, present=1, s=0)
_LDT = Segment(base=0, limit=0xFFFF, selector=0, type=2, present=1, s=0)


def _descriptor(segment: Segment) -> int:
    """The 8-byte descriptor of a flat segment (SDM 3.4.5)."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return (
        (limit & 0xFFFF)
        | (segment.base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )


def write_gdt(memory: LoadMemory, code: Segment, data: Segment) -> tuple[int, int]:
    """Null, null, code (0x10), data (0x18) at BOOT_GDT; returns (base, limit)."""
    table = struct.pack("<4Q", 0, 0, _descriptor(code), _descriptor(data))
    memory.write(layout.BOOT_GDT, table)
    return layout.BOOT_GDT, len(table) - 1


def write_page_tables(memory: LoadMemory) -> int:
    """Identity-map the first 4 GiB with 2 MiB pages at BOOT_PAGE_TABLES; returns CR3."""
    base = layout.BOOT_PAGE_TABLES
    pml4, pdpt, directories = base, base + 0x1000, base + 0x2000
    memory.write(pml4, struct.pack("<Q", pdpt | _PRESENT_WRITABLE).ljust(0x1000, b"\0"))
    entries = [directories + index * 0x1000 | _PRESENT_WRITABLE for index in range(4)]
    memory.write(pdpt, struct.pack("<4Q", *entries).ljust(0x1000, b"\0"))
    pages = [page << 21 | _PAGE_SIZE_BIT | _PRESENT_WRITABLE for page in range(4 * 512)]
    memory.write(directories, struct.pack(f"<{len(pages)}Q", *pages))
    return base


BDA = struct.Struct("<4H6xHHxH")
"""BIOS data area from 0x400: COM1 to COM4, (LPT), EBDA segment, equipment, conventional memory in KiB."""


# Real-mode code. F000:FF53, where a PC's BIOS has its IRET for interrupts that nobody uses; after it what every BIOS
# service leads to: stc; retf 2, which says "not supported". F000:FFF0: mov dx, 0xCF9; mov al, 6; out dx, al; hlt.
NO_SERVICE = bytes.fromhex("cf f9 ca0200")
RESET_CODE = struct.pack("<BHBB4s", 0xBA, layout.RESET_PORT, 0xB0, layout.RESET_VALUE, b"\xee\xf4\xeb\xfd")
SERVICES = range(0x10, 0x1B)
_IRET, _SERVICE = (0xF000 << 16 | layout.DUMMY_HANDLER - 0xF_0000 + offset for offset in (0, 1))
VECTORS = struct.pack("<256I", *(_SERVICE if vector in SERVICES else _IRET for vector in range(256)))


def write_bda(memory: LoadMemory) -> None:
    """What a BIOS leaves and Xen, boot sectors and others use: at 0x400 two serial ports, where the EBDA is, and how
    much memory is below it; interrupt vectors that lead to no service; a reset vector by which GRUB, Linux with
    `reboot=bios` and real-mode programs reset."""
    equipment = 2 << 9
    kib = layout.EBDA.start >> 10
    memory.write(0, VECTORS)
    memory.write(layout.BDA, BDA.pack(layout.COM1, layout.COM2, 0, 0, layout.EBDA.start >> 4, equipment, kib))
    memory.write(layout.EBDA.start, bytes([layout.EBDA.size >> 10]))
    memory.write(layout.DUMMY_HANDLER, NO_SERVICE)
    memory.write(layout.RESET_VECTOR, RESET_CODE)


def real_mode(registers: Registers, *, cs: int = 0) -> tuple[Registers, SystemRegisters]:
    """Real-address mode, all data segments 0, code segment value `cs`."""
    segment = Segment(base=0, limit=0xFFFF, selector=0, type=3)
    code = Segment(base=cs << 4, limit=0xFFFF, selector=cs, type=11)
    return registers, SystemRegisters(
        cs=code, ds=segment, es=segment, fs=segment, gs=segment, ss=segment, tr=_TR, ldt=_LDT,
        gdt=(0, 0xFFFF), idt=(0, 0x3FF), cr0=CR0_ET,
    )


def protected_mode(memory: LoadMemory) -> SystemRegisters:
    """32-bit flat protected mode without paging; CS 0x10, all others 0x18, interrupts impossible (empty IDT)."""
    code, data = _code(long=False, selector=0x10), _data(0x18)
    gdt = write_gdt(memory, code, data)
    return SystemRegisters(
        cs=code, ds=data, es=data, fs=data, gs=data, ss=data, tr=_TR, ldt=_LDT,
        gdt=gdt, idt=(layout.BOOT_IDT, 0), cr0=CR0_PE | CR0_ET,
    )


def long_mode(memory: LoadMemory) -> SystemRegisters:
    """64-bit mode, the first 4 GiB mapped one to one; CS 0x10, all others 0x18 (Linux's __BOOT_CS and __BOOT_DS)."""
    code, data = _code(long=True, selector=0x10), _data(0x18)
    gdt = write_gdt(memory, code, data)
    cr3 = write_page_tables(memory)
    return SystemRegisters(
        cs=code, ds=data, es=data, fs=data, gs=data, ss=data, tr=_TR, ldt=_LDT,
        gdt=gdt, idt=(layout.BOOT_IDT, 0), cr0=CR0_PE | CR0_ET | CR0_PG, cr3=cr3, cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
    )
