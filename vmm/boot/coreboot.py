"""Coreboot payloads: 32-bit ELF files that stand below 1 MiB or have no multiboot header, GRUB's i386-coreboot images.

A payload is entered at its ELF entry in 32-bit protected mode, flat, without paging, and finds the memory map, the
first serial port and the ACPI root pointer in the coreboot table, which it looks for below 4 KiB.
It takes neither command line nor initrd: what it needs is in the image itself.

Specification: coreboot, "The coreboot table" (records, checksums).
"""

from __future__ import annotations

import struct

from construct import Const, Int32ul, Int64ul, Struct

from cpu.contract import Registers
from vmm.boot import elf
from vmm.boot.request import Request
from vmm.boot.state import BootState, LoadMemory, protected_mode
from vmm.errors import ConfigError
from vmm.machine import layout
from vmm.machine.layout import Layout

HEADER = Struct(
    "signature" / Const(b"LBIO"), "header_bytes" / Int32ul, "header_checksum" / Int32ul, "table_bytes" / Int32ul,
    "table_checksum" / Int32ul, "table_entries" / Int32ul,
)
RECORD = Struct("tag" / Int32ul, "size" / Int32ul)
MEMORY, SERIAL, ACPI_RSDP = 0x0001, 0x000F, 0x0043
MEMORY_RANGE = Struct("start" / Int64ul, "size" / Int64ul, "type" / Int32ul)
SERIAL_PORT = Struct(
    "type" / Int32ul, "base" / Int32ul, "baud" / Int32ul, "register_bytes" / Int32ul, "input_hertz" / Int32ul,
    "pci_address" / Int32ul,
)
IO_MAPPED, BAUD, UART_HERTZ = 1, 115_200, 1_843_200
LOWEST = 0x1000
"""Below stands what we put there ourselves: BIOS data area and descriptor table."""


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of little-endian 16-bit words, which header and table carry."""
    total: int = sum(struct.unpack(f"<{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def table(request: Request) -> bytes:
    """Header and records."""
    def record(tag: int, body: bytes) -> bytes:
        return bytes(RECORD.build({"tag": tag, "size": RECORD.sizeof() + len(body)})) + body

    ranges = b"".join(
        MEMORY_RANGE.build({"start": item.start, "size": item.size, "type": int(item.type)}) for item in request.e820
    )
    serial = SERIAL_PORT.build(
        {"type": IO_MAPPED, "base": layout.COM1, "baud": BAUD, "register_bytes": 1, "input_hertz": UART_HERTZ,
         "pci_address": 0}
    )  # fmt: skip
    records = [record(MEMORY, ranges), record(SERIAL, serial)]
    if request.rsdp is not None:
        records.append(record(ACPI_RSDP, request.rsdp.to_bytes(8, "little")))
    body = b"".join(records)
    values = {
        "header_bytes": HEADER.sizeof(), "header_checksum": 0, "table_bytes": len(body),
        "table_checksum": checksum(body), "table_entries": len(records),
    }
    values["header_checksum"] = checksum(HEADER.build(values))
    return bytes(HEADER.build(values)) + body


def load_payload(memory: LoadMemory, image: elf.Elf, request: Request) -> BootState:
    """Load every segment and enter at the ELF entry. Raises ConfigError."""
    if request.initrd is not None:
        raise ConfigError(f"initrd: {image.name} is a coreboot payload, which takes none; put it into the image")
    low_end = Layout(memory.size).low_end
    for item in image.loads:
        end = item.paddr + item.memsz
        if item.paddr < LOWEST or (item.paddr < layout.KERNEL_BASE and end > layout.EBDA.start):
            raise ConfigError(f"{image.name}: a segment wants to stand at {item.paddr:#x}, where the tables are")
    if image.end > low_end:
        raise ConfigError(f"{image.name}: needs memory up to {image.end:#x}; give it {-(-image.end >> 20)}M or more")
    image.place(memory)
    found = table(request)
    assert len(found) <= layout.COREBOOT_TABLE.size
    memory.write(layout.COREBOOT_TABLE.start, found)
    return BootState(Registers(rip=image.physical_entry), protected_mode(memory), "coreboot")
