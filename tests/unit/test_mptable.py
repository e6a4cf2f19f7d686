"""The MP table by Intel's MultiProcessor Specification 1.4, and that it says what the ACPI tables say."""

from __future__ import annotations

import pytest

from vmm.config import MAX_CPUS
from vmm.firmware import mptable
from vmm.machine import layout


def parsed(cpus: int) -> tuple[int, list[bytes]]:
    """(number of entries by the header, entries)"""
    raw = mptable.table(cpus)
    pointer = mptable.POINTER.parse(raw)
    assert layout.MP_TABLE.start % 16 == 0 and sum(raw[:16]) % 256 == 0
    assert (pointer.address, pointer.length, pointer.revision) == (layout.MP_TABLE.start + 16, 1, 4)
    assert pointer.features[0] == 0, "4.1: a configuration table is there"
    assert not pointer.features[1] & 0x80, "4.1: virtual wire mode"
    body = raw[16:]
    header = mptable.HEADER.parse(body)
    assert header.length == len(body) and sum(body) % 256 == 0 and header.lapic == 0xFEE0_0000
    entries, at = [], mptable.HEADER.sizeof()
    while at < len(body):
        size = 20 if body[at] == 0 else 8
        entries.append(body[at : at + size])
        at += size
    return header.entries, entries


@pytest.mark.parametrize("cpus", [1, 4, MAX_CPUS])
def test_4_2_table_is_whole_and_fits(cpus: int) -> None:
    count, entries = parsed(cpus)
    assert count == len(entries) and [entry[0] for entry in entries] == sorted(entry[0] for entry in entries)
    assert layout.MP_TABLE.start + len(mptable.table(cpus)) <= layout.MP_TABLE.end
    processors = [mptable.PROCESSOR.parse(entry) for entry in entries if entry[0] == 0]
    assert [item.apic_id for item in processors] == list(range(cpus))
    assert [item.flags & 2 for item in processors] == [2] + [0] * (cpus - 1), "one bootstrap processor"
    (io_apic,) = [mptable.IO_APIC.parse(entry) for entry in entries if entry[0] == 2]
    assert io_apic.address == 0xFEC0_0000 and io_apic.id not in range(cpus)


def test_4_3_4_interrupts_are_routed_as_in_madt_and_prt() -> None:
    _, entries = parsed(2)
    routes = [mptable.INTERRUPT.parse(entry) for entry in entries if entry[0] == 3]
    pci = {(item.source >> 2, item.source & 3): (item.pin, item.flags) for item in routes if item.bus == 0}
    assert pci == {
        (device, pin): (layout.intx_gsi(device, pin), 0b1101) for device in range(1, 32) for pin in range(4)
    }
    isa = {item.source: item.pin for item in routes if item.bus == 1 and item.kind == 0}
    assert isa == {irq: irq or 2 for irq in (0, 1, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15)}
    pins = [item.pin for item in routes if item.kind == 0 and item.bus == 1]
    assert len(pins) == len(set(pins))


def test_the_view_is_the_declaration() -> None:
    names = [field.name for field in mptable.INTERRUPT.subcons]
    raw = bytes(range(1, 9))
    parsed = mptable.INTERRUPT.parse(raw)
    assert mptable.INTERRUPT_VIEW.unpack(raw) == tuple(parsed[name] for name in names)
    assert mptable.INTERRUPT_VIEW.size == mptable.INTERRUPT.sizeof() == 8
