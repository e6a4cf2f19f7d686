"""Multiboot 1: 32-bit kernels with the 0x1BADB002 header, as ELF or by the header's own addresses.

Specification: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3 (information).
"""

from __future__ import annotations

from dataclasses import dataclass

from construct import Bytes, Int32ul, Int64ul, Struct

from cpu.contract import Registers
from vmm.boot import elf
from vmm.boot.request import Request, place_cmdline, place_initrd
from vmm.boot.state import BootState, LoadMemory, protected_mode
from vmm.errors import ConfigError, GuestError
from vmm.machine import layout
from vmm.machine.layout import Layout

MAGIC, BOOTLOADER_MAGIC = 0x1BAD_B002, 0x2BAD_B002
SEARCH = 8192
ADDRESSES = 1 << 16
UNDERSTOOD = 0x3 | ADDRESSES
"""Header flags 0 (modules on pages), 1 (memory information) and 16; of the flags 0 to 15 no other may be ignored."""

HEADER = Struct("magic" / Int32ul, "flags" / Int32ul, "checksum" / Int32ul)
HEADER_ADDRESSES = Struct(
    "header_addr" / Int32ul, "load_addr" / Int32ul, "load_end_addr" / Int32ul, "bss_end_addr" / Int32ul,
    "entry_addr" / Int32ul,
)
INFO = Struct(
    "flags" / Int32ul, "mem_lower" / Int32ul, "mem_upper" / Int32ul, "boot_device" / Int32ul, "cmdline" / Int32ul,
    "mods_count" / Int32ul, "mods_addr" / Int32ul, "syms" / Bytes(16), "mmap_length" / Int32ul, "mmap_addr" / Int32ul,
    "drives_length" / Int32ul, "drives_addr" / Int32ul, "config_table" / Int32ul, "boot_loader_name" / Int32ul,
    "apm_table" / Int32ul, "vbe" / Bytes(16), "framebuffer" / Bytes(22),
)
MODULE = Struct("start" / Int32ul, "end" / Int32ul, "string" / Int32ul, "reserved" / Int32ul)
MEMORY_MAP = Struct("size" / Int32ul, "address" / Int64ul, "length" / Int64ul, "type" / Int32ul)

MODULE_CMDLINE = " -- "
"""What follows it on the command line is the module's (the initrd's): Xen's dom0 kernel has one of its own."""

_MODULES = layout.BOOT_INFO + 0x100
_MEMORY_MAP = layout.BOOT_INFO + 0x200
_NAME = layout.BOOT_INFO + 0xE00


@dataclass(frozen=True, slots=True)
class Found:
    """A header: its place in the file, its flags, and the addresses if flag 16 is set."""

    offset: int
    flags: int


def find(data: memoryview) -> Found | None:
    """The header: within the first 8192 bytes, on a 4-byte boundary, with a right checksum (3.1.1)."""
    head = bytes(data[:SEARCH])
    at = head.find(MAGIC.to_bytes(4, "little"))
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(head):
            header = HEADER.parse(head[at : at + 12])
            if (header.magic + header.flags + header.checksum) & 0xFFFF_FFFF == 0:
                return Found(at, int(header.flags))
        at = head.find(MAGIC.to_bytes(4, "little"), at + 1)
    return None


def _by_addresses(memory: LoadMemory, data: memoryview, found: Found, name: str) -> tuple[int, int]:
    """Load by the header's addresses (3.1.3); returns (entry, end)."""
    raw = data[found.offset + 12 : found.offset + 32]
    if len(raw) < HEADER_ADDRESSES.sizeof():
        raise ConfigError(f"{name}: the multiboot header is cut short")
    header = HEADER_ADDRESSES.parse(raw)
    start = found.offset - (header.header_addr - header.load_addr)
    size = header.load_end_addr - header.load_addr if header.load_end_addr else len(data) - start
    if start >= 0 and start + size > len(data):
        raise ConfigError(
            f"{name}: the multiboot kernel is cut short: it has {len(data)} bytes, its header says {start + size}"
        )
    if start < 0 or size < 0 or start + size > len(data) or header.load_addr < layout.KERNEL_BASE:
        raise ConfigError(f"{name}: the addresses in the multiboot header do not fit the file")
    try:
        memory.write(header.load_addr, data[start : start + size])
    except GuestError as error:
        raise ConfigError(f"{name}: does not fit into memory at {header.load_addr:#x}") from error
    return int(header.entry_addr), max(header.load_addr + size, header.bss_end_addr)


def load_multiboot(memory: LoadMemory, data: memoryview, request: Request, name: str) -> BootState:
    """Load and enter by the multiboot protocol. Raises ConfigError."""
    found = find(data)
    if found is None:
        raise ConfigError(f"{name}: there is no multiboot header in its first {SEARCH} bytes")
    if found.flags & 0xFFFF & ~UNDERSTOOD:
        raise ConfigError(
            f"{name}: its multiboot header asks for {found.flags & 0xFFFF:#x}; only {UNDERSTOOD & 0xFFFF:#x} is there"
        )
    if found.flags & ADDRESSES:
        entry, end = _by_addresses(memory, data, found, name)
    else:
        image = elf.parse(data, name)  # of 64 bits too, as GRUB takes it: the entry is 32-bit code all the same
        if image.start < layout.KERNEL_BASE:
            raise ConfigError(f"{name}: a segment wants to stand at {image.start:#x}, below 1 MiB")
        image.place(memory)
        entry, end = image.physical_entry, image.end
    own, _, module_text = request.cmdline.partition(MODULE_CMDLINE)
    cmdline = place_cmdline(memory, own, layout.MODULE_CMDLINE - layout.CMDLINE.start - 1, name)
    if len(module_text.encode()) >= layout.CMDLINE.end - layout.MODULE_CMDLINE:
        raise ConfigError("cmdline: the part for the module is too long")
    memory.write(layout.MODULE_CMDLINE, module_text.encode() + b"\0")
    modules = 0
    if request.initrd is not None:
        address = place_initrd(memory, request, end, 0xFFFF_FFFF, name)
        end_address = address + len(request.initrd)
        module = {"start": address, "end": end_address, "string": layout.MODULE_CMDLINE, "reserved": 0}
        memory.write(_MODULES, MODULE.build(module))
        modules = 1
    table = b"".join(
        MEMORY_MAP.build(
            {
                "size": MEMORY_MAP.sizeof() - 4, "address": item.start, "length": item.size, "type": int(item.type),
            }
        )
        for item in request.e820
    )
    memory.write(_MEMORY_MAP, table)
    memory.write(_NAME, b"loopvisor\0")
    low_end = Layout(memory.size).low_end
    info = dict(INFO.parse(bytes(INFO.sizeof())))
    info.update(
        flags=1 | 1 << 2 | (1 << 3 if modules else 0) | 1 << 6 | 1 << 9,
        mem_lower=layout.EBDA.start >> 10, mem_upper=(low_end - layout.KERNEL_BASE) >> 10, cmdline=cmdline,
        mods_count=modules, mods_addr=_MODULES, mmap_length=len(table), mmap_addr=_MEMORY_MAP, boot_loader_name=_NAME,
    )
    memory.write(layout.BOOT_INFO, INFO.build(info))
    registers = Registers(rip=entry, rax=BOOTLOADER_MAGIC, rbx=layout.BOOT_INFO)
    return BootState(registers, protected_mode(memory), "multiboot", request.cmdline)
