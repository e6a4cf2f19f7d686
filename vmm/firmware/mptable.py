"""The MP table: processors and interrupt routes for kernels without ACPI (Debian's generic kernel with `acpi=off`).

Specification: Intel MultiProcessor Specification 1.4: 4.1 floating pointer, 4.2 configuration table header, 4.3.1
processor, 4.3.2 bus, 4.3.3 I/O APIC, 4.3.4 I/O interrupt, 4.3.5 local interrupt entries. It says what the ACPI tables
say.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Struct

from vmm.machine import layout
from vmm.machine.interfaces import Assembly

POINTER = Struct(
    "signature" / Const(b"_MP_"), "address" / Int32ul, "length" / Int8ul, "revision" / Int8ul, "checksum" / Int8ul,
    "features" / Bytes(5),
)
HEADER = Struct(
    "signature" / Const(b"PCMP"), "length" / Int16ul, "revision" / Int8ul, "checksum" / Int8ul, "oem_id" / Bytes(8),
    "product_id" / Bytes(12), "oem_table" / Int32ul, "oem_size" / Int16ul, "entries" / Int16ul, "lapic" / Int32ul,
    "extended_length" / Int16ul, "extended_checksum" / Int8ul, "reserved" / Int8ul,
)
PROCESSOR = Struct(
    "type" / Const(b"\0"), "apic_id" / Int8ul, "apic_version" / Int8ul, "flags" / Int8ul, "signature" / Int32ul,
    "features" / Int32ul, "reserved" / Bytes(8),
)
ENABLED, BOOTSTRAP = 1 << 0, 1 << 1
FEATURES = 1 << 0 | 1 << 9
"""On-chip FPU and APIC; CPUID says the rest."""
BUS = Struct("type" / Const(b"\x01"), "id" / Int8ul, "name" / Bytes(6))
IO_APIC = Struct(
    "type" / Const(b"\x02"), "id" / Int8ul, "version" / Int8ul, "flags" / Int8ul, "address" / Int32ul
)
INTERRUPT = Struct(
    "type" / Int8ul, "kind" / Int8ul, "flags" / Int16ul, "bus" / Int8ul, "source" / Int8ul, "apic" / Int8ul,
    "pin" / Int8ul,
)
INTERRUPT_VIEW = struct.Struct("<2BH4B")
"""The same for the 140 of them, which construct takes 4 ms for."""
IO_INTERRUPT, LOCAL_INTERRUPT = 3, 4
INT, NMI, EXTERNAL = 0, 1, 3
CONFORMS, LEVEL_HIGH = 0, 0b1101
LAPIC_VERSION, IO_APIC_VERSION = 0x14, 0x11
PCI_BUS, ISA_BUS, ALL = 0, 1, 0xFF


def _checked(raw: bytes, at: int) -> bytes:
    """`raw` with the byte at `at` set so that the sum is 0 modulo 256."""
    data = bytearray(raw)
    data[at] = -sum(data) & 0xFF
    return bytes(data)


def _interrupt(what: int, kind: int, flags: int, bus: int, source: int, apic: int, pin: int) -> bytes:
    return INTERRUPT_VIEW.pack(what, kind, flags, bus, source, apic, pin)


def _entries(cpus: int) -> list[bytes]:
    """All entries by ascending type, as 4.3 wants it."""
    io_apic = cpus  # 3.6.6: not the id of a local APIC
    found = [
        bytes(
            PROCESSOR.build(
                {
                    "apic_id": index, "apic_version": LAPIC_VERSION, "signature": 0, "features": FEATURES,
                    "flags": ENABLED | (0 if index else BOOTSTRAP), "reserved": bytes(8),
                }
            )
        )
        for index in range(cpus)
    ]
    found += [bytes(BUS.build({"id": id, "name": name})) for id, name in ((PCI_BUS, b"PCI   "), (ISA_BUS, b"ISA   "))]
    found.append(
        IO_APIC.build({"id": io_apic, "version": IO_APIC_VERSION, "flags": ENABLED, "address": layout.IOAPIC.start})
    )
    for irq in range(16):
        if irq != 2 and irq not in layout.PCI_INTX_GSIS:  # 2 is the PICs' cascade; the timer comes in on its pin
            flags = LEVEL_HIGH if irq == layout.SCI_GSI else CONFORMS
            found.append(_interrupt(IO_INTERRUPT, INT, flags, ISA_BUS, irq, io_apic, irq or 2))
    for device in range(1, 32):
        for pin in range(4):
            gsi = layout.intx_gsi(device, pin)
            found.append(_interrupt(IO_INTERRUPT, INT, LEVEL_HIGH, PCI_BUS, device << 2 | pin, io_apic, gsi))
    found.append(_interrupt(LOCAL_INTERRUPT, EXTERNAL, CONFORMS, ISA_BUS, 0, 0, 0))
    found.append(_interrupt(LOCAL_INTERRUPT, NMI, CONFORMS, ISA_BUS, 0, ALL, 1))
    return found


def table(cpus: int) -> bytes:
    """Floating pointer and configuration table, for layout.MP_TABLE."""
    address = layout.MP_TABLE.start
    pointer = POINTER.build({"address": address + 16, "length": 1, "revision": 4, "checksum": 0, "features": bytes(5)})
    entries = _entries(cpus)
    body = b"".join(entries)
    header = HEADER.build(
        {
            "length": HEADER.sizeof() + len(body), "revision": 4, "checksum": 0, "oem_id": b"LOOPVM  ",
            "product_id": b"PC          ", "oem_table": 0, "oem_size": 0, "entries": len(entries),
            "lapic": layout.LAPIC.start, "extended_length": 0, "extended_checksum": 0, "reserved": 0,
        }
    )
    return _checked(pointer, 10) + _checked(header + body, 7)


class MpTable:
    """Written once, before the first instruction; a restored machine has it in its memory."""

    def __init__(self, write: Callable[[int, bytes], None], cpus: int) -> None:
        self._write, self._cpus = write, cpus

    def populate(self) -> None:
        """Write the table."""
        self._write(layout.MP_TABLE.start, table(self._cpus))


def attach(assembly: Assembly) -> None:
    assembly.add("mp-table", MpTable(assembly.memory.write, assembly.config.cpus))
