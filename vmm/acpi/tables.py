"""The static ACPI tables, declared; checksums; and where they stand in memory.

Specification: ACPI 6.4: 5.2.5 RSDP, 5.2.6 header, 5.2.7 RSDT, 5.2.8 XSDT, 5.2.9 FADT, 5.2.10 FACS, 5.2.12 MADT; PCI
Firmware Specification 3.2, 4.1.2 MCFG. The machine has the legacy (not hardware-reduced) interrupt and timer hardware
and the PM1, PM timer and GPE0 registers of vmm/devices/pm.py, and is always in ACPI mode.
"""

from __future__ import annotations

from collections.abc import Container

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from vmm.errors import ConfigError
from vmm.machine import layout

OEM_ID, CREATOR_ID = b"LOOPVM", b"LVSR"
REVISION = 1

HEADER = Struct(
    "signature" / Bytes(4), "length" / Int32ul, "revision" / Int8ul, "checksum" / Int8ul, "oem_id" / Bytes(6),
    "oem_table_id" / Bytes(8), "oem_revision" / Int32ul, "creator_id" / Bytes(4), "creator_revision" / Int32ul,
)
RSDP = Struct(
    "signature" / Const(b"RSD PTR "), "checksum" / Int8ul, "oem_id" / Bytes(6), "revision" / Int8ul,
    "rsdt_address" / Int32ul, "length" / Int32ul, "xsdt_address" / Int64ul, "extended_checksum" / Int8ul,
    "reserved" / Bytes(3),
)
RSDP_V1_LENGTH = 20
GAS = Struct("space" / Int8ul, "width" / Int8ul, "offset" / Int8ul, "access" / Int8ul, "address" / Int64ul)
SYSTEM_IO = 1

FADT = Struct(
    "firmware_ctrl" / Int32ul, "dsdt" / Int32ul, "reserved1" / Int8ul, "preferred_pm_profile" / Int8ul,
    "sci_int" / Int16ul, "smi_cmd" / Int32ul, "acpi_enable" / Int8ul, "acpi_disable" / Int8ul, "s4bios_req" / Int8ul,
    "pstate_cnt" / Int8ul, "pm1a_evt_blk" / Int32ul, "pm1b_evt_blk" / Int32ul, "pm1a_cnt_blk" / Int32ul,
    "pm1b_cnt_blk" / Int32ul, "pm2_cnt_blk" / Int32ul, "pm_tmr_blk" / Int32ul, "gpe0_blk" / Int32ul,
    "gpe1_blk" / Int32ul, "pm1_evt_len" / Int8ul, "pm1_cnt_len" / Int8ul, "pm2_cnt_len" / Int8ul, "pm_tmr_len" / Int8ul,
    "gpe0_blk_len" / Int8ul, "gpe1_blk_len" / Int8ul, "gpe1_base" / Int8ul, "cst_cnt" / Int8ul, "p_lvl2_lat" / Int16ul,
    "p_lvl3_lat" / Int16ul, "flush_size" / Int16ul, "flush_stride" / Int16ul, "duty_offset" / Int8ul,
    "duty_width" / Int8ul, "day_alrm" / Int8ul, "mon_alrm" / Int8ul, "century" / Int8ul, "iapc_boot_arch" / Int16ul,
    "reserved2" / Int8ul, "flags" / Int32ul, "reset_reg" / GAS, "reset_value" / Int8ul, "arm_boot_arch" / Int16ul,
    "minor_version" / Int8ul, "x_firmware_ctrl" / Int64ul, "x_dsdt" / Int64ul, "x_pm1a_evt_blk" / GAS,
    "x_pm1b_evt_blk" / GAS, "x_pm1a_cnt_blk" / GAS, "x_pm1b_cnt_blk" / GAS, "x_pm2_cnt_blk" / GAS, "x_pm_tmr_blk" / GAS,
    "x_gpe0_blk" / GAS, "x_gpe1_blk" / GAS, "sleep_control_reg" / GAS, "sleep_status_reg" / GAS,
    "hypervisor_vendor" / Int64ul,
)
# 5.2.9, table 5.10 (flags) and table 5.11 (IA-PC boot architecture flags)
WBINVD, PROC_C1, SLP_BUTTON, FIX_RTC, TMR_VAL_EXT, RESET_REG_SUP = 1 << 0, 1 << 2, 1 << 5, 1 << 6, 1 << 8, 1 << 10
LEGACY_DEVICES, VGA_NOT_PRESENT = 1 << 0, 1 << 2
NO_C2, NO_C3 = 101, 1001
"""Latencies in us above which the state is not supported."""

FACS = Struct(
    "signature" / Const(b"FACS"), "length" / Int32ul, "hardware_signature" / Int32ul, "waking_vector" / Int32ul,
    "global_lock" / Int32ul, "flags" / Int32ul, "x_waking_vector" / Int64ul, "version" / Int8ul, "reserved1" / Bytes(3),
    "ospm_flags" / Int32ul, "reserved2" / Bytes(24),
)

MADT = Struct("lapic_address" / Int32ul, "flags" / Int32ul)
PCAT_COMPAT = 1
MADT_LAPIC = Struct("type" / Const(b"\0\x08"), "uid" / Int8ul, "apic_id" / Int8ul, "flags" / Int32ul)
MADT_IOAPIC = Struct(
    "type" / Const(b"\x01\x0c"), "id" / Int8ul, "reserved" / Int8ul, "address" / Int32ul, "gsi_base" / Int32ul
)
MADT_OVERRIDE = Struct(
    "type" / Const(b"\x02\x0a"), "bus" / Int8ul, "source" / Int8ul, "gsi" / Int32ul, "flags" / Int16ul
)
MADT_LAPIC_NMI = Struct("type" / Const(b"\x04\x06"), "uid" / Int8ul, "flags" / Int16ul, "lint" / Int8ul)
ENABLED, ONLINE_CAPABLE = 1 << 0, 1 << 1
"""5.2.12.2, table 5.47"""
LEVEL_HIGH = 0b1101
"""MPS INTI flags: active high, level."""

MCFG = Struct("reserved" / Int64ul)
MCFG_ENTRY = Struct(
    "base" / Int64ul, "segment" / Int16ul, "first_bus" / Int8ul, "last_bus" / Int8ul, "reserved" / Int32ul
)


def checksum(data: bytes | bytearray) -> int:
    """The value that makes the sum of all bytes 0 modulo 256."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header and checksum."""
    header = {
        "signature": signature, "length": HEADER.sizeof() + len(body), "revision": revision, "checksum": 0,
        "oem_id": OEM_ID, "oem_table_id": b"LOOP" + signature, "oem_revision": REVISION, "creator_id": CREATOR_ID,
        "creator_revision": REVISION,
    }
    raw = bytearray(HEADER.build(header) + body)
    raw[9] = checksum(raw)
    return bytes(raw)


def _gas(address: int, size: int, *, access: int = 0) -> dict[str, int]:
    """A port range of `size` bytes; access size 1 byte, 2 word, 3 dword, 0 undefined; nothing if the address is 0."""
    if not address:
        return {"space": 0, "width": 0, "offset": 0, "access": 0, "address": 0}
    return {"space": SYSTEM_IO, "width": size * 8, "offset": 0, "access": access, "address": address}


def fadt(facs: int, dsdt: int) -> bytes:
    values: dict[str, object] = {field.name: 0 for field in FADT.subcons}
    none = _gas(0, 0)
    values.update({field: none for field in ("x_pm1b_evt_blk", "x_pm1b_cnt_blk", "x_pm2_cnt_blk", "x_gpe1_blk")})
    values.update({field: none for field in ("sleep_control_reg", "sleep_status_reg")})
    values.update(
        firmware_ctrl=facs, dsdt=dsdt, sci_int=layout.SCI_GSI, pm1a_evt_blk=layout.PM1_EVENT,
        pm1a_cnt_blk=layout.PM1_CONTROL, pm_tmr_blk=layout.PM_TIMER, gpe0_blk=layout.GPE0, pm1_evt_len=4, pm1_cnt_len=2,
        pm_tmr_len=4, gpe0_blk_len=4, p_lvl2_lat=NO_C2, p_lvl3_lat=NO_C3, century=0x32,
        iapc_boot_arch=LEGACY_DEVICES | VGA_NOT_PRESENT,
        flags=WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP,
        reset_reg=_gas(layout.RESET_PORT, 1, access=1), reset_value=layout.RESET_VALUE, minor_version=4,
        x_dsdt=dsdt, x_pm1a_evt_blk=_gas(layout.PM1_EVENT, 4, access=2),
        x_pm1a_cnt_blk=_gas(layout.PM1_CONTROL, 2, access=2), x_pm_tmr_blk=_gas(layout.PM_TIMER, 4, access=3),
        x_gpe0_blk=_gas(layout.GPE0, 4, access=1), hypervisor_vendor=int.from_bytes(b"LOOPVISR", "little"),
    )
    return table(b"FACP", 6, FADT.build(values))


def facs() -> bytes:
    values = dict(
        length=FACS.sizeof(), hardware_signature=0, waking_vector=0, global_lock=0, flags=0, x_waking_vector=0,
        version=2, reserved1=bytes(3), ospm_flags=0, reserved2=bytes(24),
    )
    return bytes(FACS.build(values))


def madt(cpus: int, absent: Container[int] = ()) -> bytes:
    """Local APICs with id = index, one IOAPIC, the level-triggered ISA interrupts, NMI on LINT1. `absent`: those of
    processors that may come."""
    parts = [MADT.build({"lapic_address": layout.LAPIC.start, "flags": PCAT_COMPAT})]
    for index in range(cpus):
        flags = ONLINE_CAPABLE if index in absent else ENABLED
        parts.append(MADT_LAPIC.build({"uid": index, "apic_id": index, "flags": flags}))
    parts.append(MADT_IOAPIC.build({"id": 0, "reserved": 0, "address": layout.IOAPIC.start, "gsi_base": 0}))
    parts.append(MADT_OVERRIDE.build({"bus": 0, "source": 0, "gsi": 2, "flags": 0}))
    for gsi in sorted({layout.SCI_GSI, *layout.PCI_INTX_GSIS}):
        parts.append(MADT_OVERRIDE.build({"bus": 0, "source": gsi, "gsi": gsi, "flags": LEVEL_HIGH}))
    parts.append(MADT_LAPIC_NMI.build({"uid": 0xFF, "flags": 0, "lint": 1}))
    return table(b"APIC", 5, b"".join(parts))


def mcfg() -> bytes:
    entry = {"base": layout.ECAM.start, "segment": 0, "first_bus": 0, "last_bus": layout.LAST_BUS, "reserved": 0}
    return table(b"MCFG", 1, MCFG.build({"reserved": 0}) + MCFG_ENTRY.build(entry))


def xsdt(addresses: list[int]) -> bytes:
    return table(b"XSDT", 1, b"".join(address.to_bytes(8, "little") for address in addresses))


def rsdt(addresses: list[int]) -> bytes:
    """5.2.7: for systems of ACPI 1.0 (GRUB powers off by it)."""
    return table(b"RSDT", 1, b"".join(address.to_bytes(4, "little") for address in addresses))


def rsdp(rsdt_address: int, xsdt_address: int) -> bytes:
    values = dict(
        checksum=0, oem_id=OEM_ID, revision=2, rsdt_address=rsdt_address, length=RSDP.sizeof(),
        xsdt_address=xsdt_address, extended_checksum=0, reserved=bytes(3),
    )
    raw = bytearray(RSDP.build(values))
    raw[8] = checksum(raw[:RSDP_V1_LENGTH])
    raw[32] = checksum(raw)
    return bytes(raw)


def place(cpus: int, dsdt_body: bytes, absent: Container[int] = ()) -> list[tuple[str, int, bytes]]:
    """All tables as (signature, guest-physical address, bytes); the RSDP is the first, at layout.ACPI.start.
    Raises ConfigError if they do not fit."""
    at = layout.ACPI.start + 64
    placed: list[tuple[str, int, bytes]] = []

    def add(signature: str, data: bytes) -> int:
        nonlocal at
        address = at
        placed.append((signature, address, data))
        at = address + len(data) + 63 & ~63
        return address

    facs_address = add("FACS", facs())
    dsdt_address = add("DSDT", table(b"DSDT", 2, dsdt_body))
    listed = [add("FACP", fadt(facs_address, dsdt_address)), add("APIC", madt(cpus, absent)), add("MCFG", mcfg())]
    pointer = rsdp(add("RSDT", rsdt(listed)), add("XSDT", xsdt(listed)))
    placed.insert(0, ("RSDP", layout.ACPI.start, pointer))
    if at > layout.ACPI.end:
        raise ConfigError(f"ACPI: the tables need {at - layout.ACPI.start} bytes, more than there is room for")
    return placed
