"""ACPI tables: lengths, checksums, pointers, and that Intel's compiler takes all of them apart without a word."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.ram import Ram
from vmm.acpi import GENERATION_EVENT, Acpi, aml, tables
from vmm.errors import ConfigError
from vmm.machine import layout
from vmm.machine.layout import Layout

MIB, GIB = 1 << 20, 1 << 30


def build(size: int = 256 * MIB, cpus: int = 2, virtio: int = 2) -> dict[str, tuple[int, bytes]]:
    acpi = Acpi(Layout(size), cpus, Ram(2 * MIB).write)
    for index in range(virtio):
        acpi.add_virtio_mmio(index)
    return {name: (address, data) for name, address, data in acpi.tables()}


@pytest.mark.parametrize("cpus", [1, 4, 64])
def test_tables_are_whole_apart_and_in_reserved_memory(cpus: int) -> None:
    built = build(6 * GIB, cpus, 32)
    ranges = sorted((address, address + len(data)) for address, data in built.values())
    assert all(one[1] <= two[0] for one, two in zip(ranges, ranges[1:], strict=False))
    assert ranges[0][0] == layout.ACPI.start and ranges[-1][1] <= layout.ACPI.end
    for name, (_, data) in built.items():
        if name not in ("RSDP", "FACS"):
            header = tables.HEADER.parse(data)
            assert (header.signature.decode(), header.length, sum(data) % 256) == (name, len(data), 0)
    reserved = [item for item in Layout(6 * GIB).e820() if item.type is not layout.E820Type.RAM]
    assert any(item.start <= layout.ROM.start and item.end > layout.VM_GENERATION_ID for item in reserved)


def test_5_2_5_3_root_pointer() -> None:
    built = build()
    address, raw = built["RSDP"]
    assert address % 16 == 0 and sum(raw[:20]) % 256 == 0 and sum(raw) % 256 == 0
    pointer = tables.RSDP.parse(raw)
    assert (pointer.revision, pointer.length, pointer.xsdt_address) == (2, 36, built["XSDT"][0])
    assert pointer.rsdt_address == built["RSDT"][0]


@pytest.mark.parametrize(("name", "size"), [("RSDT", 4), ("XSDT", 8)])
def test_5_2_7_and_5_2_8_rsdt_and_xsdt_list_fadt_madt_mcfg(name: str, size: int) -> None:
    built = build()
    entries = built[name][1][36:]
    listed = [int.from_bytes(entries[at : at + size], "little") for at in range(0, len(entries), size)]
    assert listed == [built[name][0] for name in ("FACP", "APIC", "MCFG")]


def test_5_2_9_fadt_points_to_dsdt_facs_and_registers() -> None:
    built = build()
    raw = built["FACP"][1]
    assert len(raw) == 276
    fadt = tables.FADT.parse(raw[36:])
    assert fadt.dsdt == fadt.x_dsdt == built["DSDT"][0] and fadt.firmware_ctrl == built["FACS"][0]
    assert fadt.firmware_ctrl % 64 == 0
    assert fadt.x_pm1a_evt_blk.address == layout.PM1_EVENT and fadt.smi_cmd == 0
    assert (fadt.reset_reg.address, fadt.reset_value) == (0xCF9, 6)


def test_5_2_12_madt_lists_every_processor() -> None:
    raw = build(cpus=3)["APIC"][1]
    at, kinds = 44, []
    while at < len(raw):
        kinds.append(raw[at])
        at += raw[at + 1]
    assert at == len(raw)
    assert (kinds.count(0), kinds.count(1), kinds.count(4)) == (3, 1, 1)


def test_20_2_4_package_length_counts_itself() -> None:
    for size in (0, 1, 62, 63, 64, 4092, 4093, 4094, 1 << 20, (1 << 20) + 10):
        encoded = aml.package_length(size)
        length = encoded[0] & 0x3F if len(encoded) == 1 else encoded[0] & 15
        for index, byte in enumerate(encoded[1:]):
            length |= byte << 4 + 8 * index
        assert length == size + len(encoded) and encoded[0] >> 6 == len(encoded) - 1


def test_20_2_2_names() -> None:
    assert aml.name_string("_HID") == b"_HID"
    assert aml.name_string("\\_SB.PCI0") == b"\\\x2e_SB_PCI0"
    assert aml.name_string("\\_SB.PCI0.ISA") == b"\\\x2f\x03_SB_PCI0ISA_"
    assert aml.name_string("^A") == b"^A___"
    with pytest.raises(ConfigError):
        aml.name_string("TOOLONG")
    assert aml.eisa_id("PNP0A03") == bytes([0x0C, 0x41, 0xD0, 0x0A, 0x03])


def test_parts_describe_events_of_their_own() -> None:
    acpi = Acpi(Layout(256 * MIB), 1, Ram(2 * MIB).write)
    acpi.add_terms(aml.name("\\CNT", aml.ZERO))
    acpi.add_event(layout.PCI_EVENT, aml.store(aml.add(aml.name_string("CNT"), aml.ONE), aml.name_string("CNT")))
    data = {name: data for name, _, data in acpi.tables()}["DSDT"]
    assert data.count(b"_E01") == 1 and data.count(b"_E05") == 1
    for number in (layout.PCI_EVENT, GENERATION_EVENT):
        with pytest.raises(ConfigError, match=f"event {number} is taken"):
            acpi.add_event(number)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="needs iasl (Debian: acpica-tools)")
@pytest.mark.parametrize(("size", "cpus"), [(128 * MIB, 1), (6 * GIB, 4)])
def test_iasl_disassembles_every_table_without_a_word_and_takes_the_result_back(
    tmp_path: Path, size: int, cpus: int
) -> None:
    for name, (_, data) in build(size, cpus).items():
        path = tmp_path / f"{name.lower()}.dat"
        path.write_bytes(data)
        if name == "RSDP":
            continue  # iasl takes a root pointer only inside a whole dump
        result = subprocess.run(
            ["iasl", "-p", str(tmp_path / name), "-d", str(path)], capture_output=True, text=True, timeout=60
        )
        text = (result.stdout + result.stderr).lower()
        assert result.returncode == 0, text
        source = (tmp_path / f"{name}.dsl").read_text()
        for word in ("error", "warning", "invalid", "unknown", "incorrect"):
            assert word not in text, (name, text)
            if name not in ("FACP", "DSDT"):
                assert word not in source.lower(), (name, source)
        result = subprocess.run(
            ["iasl", "-p", str(tmp_path / f"{name}-again"), str(tmp_path / f"{name}.dsl")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        again = (tmp_path / f"{name}-again.aml").read_bytes()
        if name == "DSDT":
            assert "0 Errors, 0 Warnings" in result.stdout, result.stdout
        else:
            assert len(again) == len(data)
