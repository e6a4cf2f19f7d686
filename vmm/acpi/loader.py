"""The ACPI tables for firmware that places them itself: one relocatable file of tables, the root pointer, and the
script that says what to patch (fw_cfg's `etc/acpi/tables`, `etc/acpi/rsdp`, `etc/table-loader`).

Specification: the linker/loader commands of QEMU's firmware interface, 128 bytes each: allocate a file, add a file's
address to a pointer in another, fill in a checksum. Pointers hold offsets into the tables' file until then.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmm.acpi import tables

TABLES, RSDP, LOADER = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"
ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3
ANYWHERE, BELOW_1_MIB = 1, 2
"""Zones of an allocation."""
COMMAND = 128
_ALIGNMENT = 64
CHECKSUM_AT = 9
"""In every table's header."""
_HEADER = tables.HEADER.sizeof()


def _name(text: str) -> bytes:
    return text.encode().ljust(56, b"\0")


def allocate(file: str, alignment: int, zone: int) -> bytes:
    """Load `file` into memory."""
    return struct.pack("<I56sIB", ALLOCATE, _name(file), alignment, zone).ljust(COMMAND, b"\0")


def add_pointer(file: str, offset: int, size: int, to: str = TABLES) -> bytes:
    """Add the address of `to` to the pointer of `size` bytes at `offset` of `file`."""
    return struct.pack("<I56s56sIB", ADD_POINTER, _name(file), _name(to), offset, size).ljust(COMMAND, b"\0")


def add_checksum(file: str, at: int, start: int, length: int) -> bytes:
    """Make the sum of [start, start + length) of `file` 0 by its byte `at`."""
    return struct.pack("<I56sIII", ADD_CHECKSUM, _name(file), at, start, length).ljust(COMMAND, b"\0")


def _pointers(signature: str, data: bytes) -> list[tuple[int, int]]:
    """(offset, size in bytes) of the pointers to tables that a table holds."""
    if signature == "FACP":  # ACPI 6.4, table 5.9: FIRMWARE_CTRL, DSDT, X_FIRMWARE_CTRL, X_DSDT
        return [(36, 4), (40, 4), (132, 8), (140, 8)]
    if signature in ("RSDT", "XSDT"):
        size = 4 if signature == "RSDT" else 8
        return [(offset, size) for offset in range(_HEADER, len(data), size)]
    return [(16, 4), (24, 8)] if signature == "RSDP" else []


def relocatable(placed: Sequence[tuple[str, int, bytes]]) -> tuple[bytes, bytes, bytes]:
    """From (signature, guest-physical address, bytes) of every table, the root pointer among them: the files `TABLES`,
    `RSDP` and `LOADER`."""
    base = min(address for signature, address, _ in placed if signature != "RSDP")
    script = [allocate(RSDP, 16, BELOW_1_MIB), allocate(TABLES, _ALIGNMENT, ANYWHERE)]
    checksums: list[bytes] = []
    joined, root = bytearray(), b""
    for signature, address, data in placed:
        file, start = (RSDP, 0) if signature == "RSDP" else (TABLES, address - base)
        body = bytearray(data)
        for offset, size in _pointers(signature, data):
            value = int.from_bytes(body[offset : offset + size], "little")
            if value:
                body[offset : offset + size] = (value - base).to_bytes(size, "little")
                script.append(add_pointer(file, start + offset, size))
        if signature == "RSDP":
            body[8] = body[32] = 0
            checksums.append(add_checksum(file, 8, 0, tables.RSDP_V1_LENGTH))
            checksums.append(add_checksum(file, 32, 0, len(body)))
            root = bytes(body)
            continue
        if signature != "FACS":  # it has no checksum
            body[CHECKSUM_AT] = 0
            checksums.append(add_checksum(file, start + CHECKSUM_AT, start, len(body)))
        joined[len(joined) :] = bytes(max(start + len(body) - len(joined), 0))
        joined[start : start + len(body)] = body
    return bytes(joined), root, b"".join(script + checksums)
