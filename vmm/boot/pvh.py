"""PVH direct boot: an ELF file with a 32-bit entry note, and struct hvm_start_info.

Specification: the x86/HVM direct boot ABI (version 1 of the start info): 32-bit protected mode, paging off, flat
segments, EBX = physical address of the start info, EFLAGS clear, CR0 = PE (and ET).
"""

from __future__ import annotations

import struct

from cpu.contract import Registers
from vmm.boot import elf
from vmm.boot.request import Request, place_cmdline, place_initrd
from vmm.boot.state import BootState, LoadMemory, protected_mode
from vmm.errors import ConfigError
from vmm.machine import layout
from vmm.machine.layout import Layout

START_MAGIC = 0x336E_C578
# The fields of vmm/boot/layouts.py.
START_INFO = struct.Struct("<IIIIQQQQII")
MODULE = struct.Struct("<QQQQ")
MEMORY_MAP = struct.Struct("<QQII")

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
        memory.write(_MODULES, MODULE.pack(address, len(request.initrd), 0, 0))
    table = b"".join(MEMORY_MAP.pack(item.start, item.size, item.type, 0) for item in request.e820)
    memory.write(_MEMORY_MAP, table)
    modules = int(request.initrd is not None)
    info = START_INFO.pack(
        START_MAGIC, 1, 0, modules, _MODULES if modules else 0, cmdline, request.rsdp or 0, _MEMORY_MAP,
        len(request.e820), 0,
    )
    memory.write(layout.BOOT_INFO, info)
    registers = Registers(rip=entry, rbx=layout.BOOT_INFO)
    return BootState(registers, protected_mode(memory), "pvh", request.cmdline)
