"""PVH direct boot: an ELF file with a 32-bit entry note, and struct hvm_start_info.

Specification: the x86/HVM direct boot ABI (version 1 of the start info): 32-bit protected mode, paging off, flat
segments, EBX = physical address of the start info, EFLAGS clear, CR0 = PE (and ET).
"""

from __future__ import annotations

from construct import Int32ul, Int64ul, Struct

from cpu.contract import Registers
from vmm import layout
from vmm.boot import elf
from vmm.boot.linux import Request, place_cmdline, place_initrd
from vmm.boot.state import BootState, LoadMemory, protected_mode
from vmm.errors import ConfigError
from vmm.layout import Layout

START_MAGIC = 0x336E_C578
START_INFO = Struct(
    "magic" / Int32ul, "version" / Int32ul, "flags" / Int32ul, "nr_modules" / Int32ul, "modlist_paddr" / Int64ul,
    "cmdline_paddr" / Int64ul, "rsdp_paddr" / Int64ul, "memmap_paddr" / Int64ul, "memmap_entries" / Int32ul,
    "reserved" / Int32ul,
)
MODULE = Struct("paddr" / Int64ul, "size" / Int64ul, "cmdline_paddr" / Int64ul, "reserved" / Int64ul)
MEMORY_MAP = Struct("address" / Int64ul, "size" / Int64ul, "type" / Int32ul, "reserved" / Int32ul)

_MODULES = layout.BOOT_INFO + 0x100
_MEMORY_MAP = layout.BOOT_INFO + 0x200


def load_pvh(memory: LoadMemory, image: elf.Elf, request: Request) -> BootState:
    """Load every segment and enter through the note. Raises ConfigError."""
    entry = image.pvh_entry
    if entry is None:
        raise ConfigError(f"{image.name}: the ELF file has no PVH entry note; it cannot be booted by PVH")
    low_end = Layout(memory.size).low_end
    if image.start < layout.KERNEL_BASE:
        raise ConfigError(
            f"{image.name}: a segment wants to stand at {image.start:#x}, below 1 MiB, where the loader's tables are"
        )
    if image.end > low_end:
        raise ConfigError(
            f"{image.name}: needs memory up to {image.end:#x}, the machine has {low_end >> 20}M; "
            f"give it {-(-image.end >> 20)}M or more"
        )
    image.place(memory)
    cmdline = place_cmdline(memory, request.cmdline, layout.CMDLINE.size - 1, image.name)
    if request.initrd is not None:
        address = place_initrd(memory, request, image.end, 0xFFFF_FFFF, image.name)
        module = {"paddr": address, "size": len(request.initrd), "cmdline_paddr": 0, "reserved": 0}
        memory.write(_MODULES, MODULE.build(module))
    table = b"".join(
        MEMORY_MAP.build({"address": item.start, "size": item.size, "type": int(item.type), "reserved": 0})
        for item in request.e820
    )
    memory.write(_MEMORY_MAP, table)
    info = START_INFO.build(
        {
            "magic": START_MAGIC, "version": 1, "flags": 0, "nr_modules": int(request.initrd is not None),
            "modlist_paddr": _MODULES if request.initrd is not None else 0, "cmdline_paddr": cmdline,
            "rsdp_paddr": request.rsdp or 0, "memmap_paddr": _MEMORY_MAP, "memmap_entries": len(request.e820),
            "reserved": 0,
        }
    )
    memory.write(layout.BOOT_INFO, info)
    registers = Registers(rip=entry, rbx=layout.BOOT_INFO)
    return BootState(registers, protected_mode(memory), "pvh", request.cmdline)
