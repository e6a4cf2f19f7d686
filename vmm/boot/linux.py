"""The Linux/x86 boot protocol: bzImage files, the zero page, and 64-bit or 32-bit entry.

Specification: Documentation/arch/x86/boot.rst (protocol 2.15, "64-bit Boot Protocol" and "32-bit Boot Protocol") and
zero-page.rst. Normally the payload is unpacked on the host and its ELF image entered directly, so that the guest
spends nothing on decompression; an image whose payload is not known (memtest86+) is entered as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from construct import Array, Bytes, ConstructError, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

from cpu.contract import Registers
from vmm.boot import elf
from vmm.boot.request import HEADER_MAGIC, Request, place_cmdline, place_initrd
from vmm.boot.state import BootState, LoadMemory, long_mode, protected_mode
from vmm.boot.unpack import UnpackError, compression, unpack_cached
from vmm.errors import ConfigError, GuestError
from vmm.machine import layout
from vmm.machine.layout import Layout

BOOT_FLAG = 0xAA55
LOADED_HIGH = 1
CAN_USE_HEAP = 0x80
XLF_KERNEL_64 = 1
LOADER_UNDEFINED = 0xFF
OLD_INITRD_MAX = 0x37FF_FFFF
"""initrd_addr_max before protocol 2.03."""
OLD_CMDLINE_SIZE = 255
MAX_E820 = 128

SETUP_HEADER = Struct(
    "setup_sects" / Int8ul, "root_flags" / Int16ul, "syssize" / Int32ul, "ram_size" / Int16ul, "vid_mode" / Int16ul,
    "root_dev" / Int16ul, "boot_flag" / Int16ul, "jump" / Int16ul, "header" / Bytes(4), "version" / Int16ul,
    "realmode_swtch" / Int32ul, "start_sys_seg" / Int16ul, "kernel_version" / Int16ul, "type_of_loader" / Int8ul,
    "loadflags" / Int8ul, "setup_move_size" / Int16ul, "code32_start" / Int32ul, "ramdisk_image" / Int32ul,
    "ramdisk_size" / Int32ul, "bootsect_kludge" / Int32ul, "heap_end_ptr" / Int16ul, "ext_loader_ver" / Int8ul,
    "ext_loader_type" / Int8ul, "cmd_line_ptr" / Int32ul, "initrd_addr_max" / Int32ul, "kernel_alignment" / Int32ul,
    "relocatable_kernel" / Int8ul, "min_alignment" / Int8ul, "xloadflags" / Int16ul, "cmdline_size" / Int32ul,
    "hardware_subarch" / Int32ul, "hardware_subarch_data" / Int64ul, "payload_offset" / Int32ul,
    "payload_length" / Int32ul, "setup_data" / Int64ul, "pref_address" / Int64ul, "init_size" / Int32ul,
    "handover_offset" / Int32ul, "kernel_info_offset" / Int32ul,
)
HEADER_OFFSET = 0x1F1

E820 = Struct("start" / Int64ul, "size" / Int64ul, "type" / Int32ul)

ZERO_PAGE = Struct(
    "screen_info" / Bytes(0x40), Padding(0x30),
    "acpi_rsdp_addr" / Int64ul,  # 0x070
    Padding(0x48),
    "ext_ramdisk_image" / Int32ul, "ext_ramdisk_size" / Int32ul, "ext_cmd_line_ptr" / Int32ul,  # 0x0c0
    Padding(0x1E8 - 0x0CC),
    "e820_entries" / Int8ul,  # 0x1e8
    Padding(HEADER_OFFSET - 0x1E9),
    "header" / SETUP_HEADER,  # 0x1f1
    Padding(0x2D0 - HEADER_OFFSET - SETUP_HEADER.sizeof()),
    "e820_table" / Array(MAX_E820, E820),  # 0x2d0
    Padding(0x1000 - 0x2D0 - MAX_E820 * E820.sizeof()),
)


@dataclass(frozen=True, slots=True)
class BzImage:
    """A parsed bzImage over its file's bytes."""

    data: memoryview
    name: str
    header: Any
    protected: memoryview
    """Everything after the real-mode setup code."""

    @property
    def payload(self) -> memoryview:
        """The compressed payload; empty if the header names none."""
        start, length = self.header.payload_offset, self.header.payload_length
        if self.header.version < 0x208 or not length or start + length > len(self.protected):
            return self.protected[:0]
        return self.protected[start : start + length]

    @property
    def entry64(self) -> bool:
        return self.header.version >= 0x20C and bool(self.header.xloadflags & XLF_KERNEL_64)


def parse(data: memoryview, name: str) -> BzImage:
    """Raises ConfigError."""
    try:
        header = SETUP_HEADER.parse(data[HEADER_OFFSET : HEADER_OFFSET + SETUP_HEADER.sizeof()])
    except ConstructError as error:
        raise ConfigError(f"{name}: the kernel image is cut short") from error
    if header.version < 0x206 or not header.loadflags & LOADED_HIGH:
        raise ConfigError(
            f"{name}: boot protocol {header.version >> 8}.{header.version & 0xFF:02}; 2.06 (Linux 2.6.21) or newer "
            f"and a bzImage are needed"
        )
    start = ((header.setup_sects or 4) + 1) * 512
    # syssize: "the size of the protected-mode code in units of 16-byte paragraphs"; a signature may follow it.
    end = start + max(16 * header.syssize - 15, 1)
    if header.version >= 0x208 and header.payload_length:
        end = max(end, start + header.payload_offset + header.payload_length)
    if end > len(data):
        raise ConfigError(f"{name}: the kernel image is cut short: it has {len(data)} bytes, its header says {end}")
    return BzImage(data, name, header, data[start:])


def synthesized_header() -> Any:
    """The setup header for a vmlinux, which has none: the newest protocol, everything loaded high."""
    values = dict(SETUP_HEADER.parse(bytes(SETUP_HEADER.sizeof())))
    values.update(
        boot_flag=BOOT_FLAG, header=HEADER_MAGIC, version=0x20F, loadflags=LOADED_HIGH, initrd_addr_max=0x7FFF_FFFF,
        cmdline_size=2047, kernel_alignment=0x20_0000, xloadflags=XLF_KERNEL_64,
    )
    return values


def _zero_page(memory: LoadMemory, header: Any, request: Request, kernel_end: int, name: str) -> None:
    values = dict(header)
    limit = values["cmdline_size"] or OLD_CMDLINE_SIZE
    values["type_of_loader"] = LOADER_UNDEFINED
    values["loadflags"] |= CAN_USE_HEAP
    values["heap_end_ptr"] = 0xFE00
    values["cmd_line_ptr"] = place_cmdline(memory, request.cmdline, limit, name)
    if request.initrd is not None:
        maximum = values["initrd_addr_max"] or OLD_INITRD_MAX
        values["ramdisk_image"] = place_initrd(memory, request, kernel_end, maximum, name)
        values["ramdisk_size"] = len(request.initrd)
    map_ = list(request.e820)[:MAX_E820]
    table = [{"start": item.start, "size": item.size, "type": int(item.type)} for item in map_]
    table += [{"start": 0, "size": 0, "type": 0}] * (MAX_E820 - len(map_))
    page = ZERO_PAGE.build(
        {
            "screen_info": bytes(0x40), "acpi_rsdp_addr": request.rsdp or 0, "ext_ramdisk_image": 0,
            "ext_ramdisk_size": 0, "ext_cmd_line_ptr": 0, "e820_entries": len(map_), "header": values,
            "e820_table": table,
        }
    )
    memory.write(layout.BOOT_INFO, page)


def _check_room(memory: LoadMemory, start: int, end: int, name: str) -> None:
    low_end = Layout(memory.size).low_end
    if start < layout.KERNEL_BASE:
        raise ConfigError(f"{name}: wants to stand at {start:#x}, below 1 MiB, where the loader's tables are")
    if end > low_end:
        raise ConfigError(
            f"{name}: needs memory up to {end:#x}, the machine has {low_end >> 20}M; give it {-(-end >> 20)}M or more"
        )


def _enter64(memory: LoadMemory, entry: int, request: Request) -> BootState:
    """64-bit boot protocol: RSI points to the zero page, interrupts off, paging on, everything mapped one to one."""
    registers = Registers(rip=entry, rsi=layout.BOOT_INFO, rsp=layout.BOOT_STACK)
    return BootState(registers, long_mode(memory), "linux64", request.cmdline)


def load_vmlinux(memory: LoadMemory, image: elf.Elf, header: Any, request: Request) -> BootState:
    """Enter an unpacked kernel at its 64-bit entry point. Raises ConfigError."""
    if image.bits != 64:
        raise ConfigError(f"{image.name}: a 32-bit kernel; only its bzImage can be booted")
    end = image.end
    if header["init_size"] and header["pref_address"]:
        end = max(end, header["pref_address"] + header["init_size"])
    _check_room(memory, image.start, end, image.name)
    image.place(memory)
    _zero_page(memory, header, request, end, image.name)
    return _enter64(memory, image.physical_entry, request)


def load_as_it_is(memory: LoadMemory, image: BzImage, request: Request) -> BootState:
    """Enter the bzImage's own protected-mode code: 64-bit entry at +0x200 if it has one, else 32-bit at +0."""
    header = image.header
    start = header.pref_address if header.version >= 0x20A and header.pref_address else header.code32_start
    size = max(len(image.protected), header.init_size if header.version >= 0x20A else 0)
    _check_room(memory, start, start + size, image.name)
    try:
        memory.write(start, image.protected)
    except GuestError as error:
        raise ConfigError(f"{image.name}: does not fit into memory at {start:#x}") from error
    _zero_page(memory, {**header, "code32_start": start}, request, start + size, image.name)
    if image.entry64:
        return _enter64(memory, start + 0x200, request)
    registers = Registers(rip=start, rsi=layout.BOOT_INFO, rsp=layout.BOOT_STACK)
    return BootState(registers, protected_mode(memory), "linux32", request.cmdline)


def load_bzimage(
    memory: LoadMemory, image: BzImage, request: Request, *, unpacked: bool = True, cache: Path | None = None
) -> BootState:
    """Unpack the payload and enter its ELF image; where there is none that we know (or `unpacked` is false), enter the
    image itself. Raises ConfigError."""
    payload = image.payload
    if not unpacked or not payload or compression(payload) is None:
        return load_as_it_is(memory, image, request)
    try:
        kernel = unpack_cached(payload, cache=cache, file=request.kernel_file)
    except UnpackError as error:
        raise ConfigError(f"{image.name}: {error}") from error
    if not elf.is_elf(kernel):
        return load_as_it_is(memory, image, request)
    inner = elf.parse(kernel, image.name)
    if inner.bits != 64:
        return load_as_it_is(memory, image, request)
    return load_vmlinux(memory, inner, image.header, request)
