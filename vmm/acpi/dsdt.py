"""The DSDT: what of the machine a guest cannot find by itself.

Specification: ACPI 6.4: 6.1 (identification), 6.2.11 (_OSC), 6.2.13 (_PRT), 7.4 (sleep states); Virtual Machine
Generation ID (Microsoft, 2012); LNRO0005 is virtio-mmio's identifier on ACPI systems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmm.acpi import aml
from vmm.devices.pm import SLEEP_TYPE_S5
from vmm.machine import layout
from vmm.machine.layout import GENERATION_EVENT, Layout

PRESENT = 0x0F
"""_STA: present, enabled, shown, functioning."""
PCI_OSC = "33db4d5b-1ff7-401c-9657-7441c03dd766"
OSC_UNKNOWN_UUID, OSC_UNKNOWN_REVISION = 1 << 2, 1 << 3
OSC_GRANTED = 0x1F
"""Native hot plug (PCIe, SHPC), PME, AER, capability structure: the machine's firmware part uses none of them."""


def _osc() -> bytes:
    """6.2.11.3: every control that the system asks for is granted."""
    return aml.method(
        "_OSC", 4,
        aml.create_dword_field(aml.ARG3, 0, "CDW1"),
        aml.create_dword_field(aml.ARG3, 8, "CDW3"),
        aml.if_(
            aml.equal(aml.ARG0, aml.uuid_buffer(PCI_OSC)),
            aml.bit_and(aml.name_string("CDW3"), aml.integer(OSC_GRANTED), aml.name_string("CDW3")),
            aml.if_(
                aml.not_equal(aml.ARG1, aml.ONE),
                aml.bit_or(aml.name_string("CDW1"), aml.integer(OSC_UNKNOWN_REVISION), aml.name_string("CDW1")),
            ),
        ),
        aml.else_(aml.bit_or(aml.name_string("CDW1"), aml.integer(OSC_UNKNOWN_UUID), aml.name_string("CDW1"))),
        aml.return_(aml.ARG3),
        serialized=True,
    )  # fmt: skip


def _pci(memory: Layout) -> bytes:
    """The root bridge. _PRT: device, pin, no link device, GSI."""
    routes = [
        aml.package(
            [aml.integer(device << 16 | 0xFFFF), aml.integer(pin), aml.ZERO, aml.integer(layout.intx_gsi(device, pin))]
        )
        for device in range(1, 32)
        for pin in range(4)
    ]
    wide = memory.mmio64
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.ZERO),
        aml.name("_SEG", aml.ZERO),
        aml.name("_BBN", aml.ZERO),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.bus_range(0, layout.LAST_BUS),
                aml.io(0xCF8, 8),
                aml.io_window(0, 0xCF7),
                aml.io_window(0xD00, 0xFFFF),
                aml.memory_window(layout.MMIO32.start, layout.MMIO32.end - 1),
                aml.memory_window(wide.start, wide.end - 1, wide=True),
            ),
        ),
        aml.name("_PRT", aml.package(routes)),
        _osc(),
    )


def _motherboard() -> bytes:
    """Ranges that are taken: ECAM (PCI Firmware 4.1.2 wants it here), fixed ACPI registers, control ports."""
    return aml.device(
        "MB00",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.ZERO),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.memory32_fixed(layout.ECAM.start, layout.ECAM.size),
                aml.io(layout.PM_BASE, layout.PM_SIZE),
                aml.io(layout.PCI_HOTPLUG, layout.PCI_HOTPLUG_SIZE + layout.CPU_HOTPLUG_SIZE),
                aml.io(0x92, 1),
            ),
        ),
    )


def _legacy(path: str, hid: str, uid: int, *resources: bytes) -> bytes:
    return aml.device(
        path, aml.name("_HID", aml.eisa_id(hid)), aml.name("_UID", aml.integer(uid)),
        aml.name("_STA", aml.integer(PRESENT)), aml.name("_CRS", aml.resource_template(*resources)),
    )  # fmt: skip


def _virtio_mmio(index: int) -> bytes:
    registers, gsi = layout.virtio_mmio(index)
    return aml.device(
        f"VM{index:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.ONE),
        aml.name(
            "_CRS",
            aml.resource_template(aml.memory32_fixed(registers.start, registers.size), aml.interrupt(gsi)),
        ),
    )


def _generation() -> bytes:
    address = layout.VM_GENERATION_ID
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("LOOP0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package([aml.integer(address & 0xFFFF_FFFF), aml.integer(address >> 32)])),
    )


def _pvpanic() -> bytes:
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_STA", aml.integer(PRESENT)),
        aml.name("_CRS", aml.resource_template(aml.io(layout.PVPANIC, 1))),
    )


def _fw_cfg() -> bytes:
    """Present, enabled and functioning, but nothing for a user interface to show."""
    return aml.device(
        "FWCF",
        aml.name("_HID", aml.string("QEMU0002")),
        aml.name("_STA", aml.integer(0x0B)),
        aml.name("_CRS", aml.resource_template(aml.io(layout.FW_CFG, layout.FW_CFG_SIZE))),
    )


def _processor(index: int) -> bytes:
    return aml.device(f"C{index:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(index)))


def dsdt(
    memory: Layout,
    cpus: int,
    virtio_mmio: Sequence[int] = (),
    terms: Sequence[bytes] = (),
    events: Mapping[int, bytes] | None = None,
) -> bytes:
    """The definition block's terms. `virtio_mmio`: indices of the windows in use. `terms`: what other parts describe.
    `events`: the body of the method of each general purpose event."""
    listed = {GENERATION_EVENT: aml.notify("\\_SB.VGEN", 0x80), **(events or {})}
    return b"".join(
        (
            aml.scope(
                "\\_SB",
                *(_processor(index) for index in range(cpus)),
                _pci(memory),
                _motherboard(),
                _legacy("COM1", "PNP0501", 1, aml.io(layout.COM1, 8), aml.irq(layout.COM1_GSI)),
                _legacy("COM2", "PNP0501", 2, aml.io(layout.COM2, 8), aml.irq(layout.COM2_GSI)),
                _legacy("RTC0", "PNP0B00", 0, aml.io(0x70, 2), aml.irq(layout.RTC_GSI)),
                _generation(),
                _pvpanic(),
                _fw_cfg(),
                *(_virtio_mmio(index) for index in virtio_mmio),
            ),
            *terms,
            aml.scope("\\_GPE", *(aml.method(f"_E{number:02X}", 0, body) for number, body in sorted(listed.items()))),
            aml.name("\\_S0", aml.package([aml.ZERO] * 4)),
            aml.name("\\_S5", aml.package([aml.integer(SLEEP_TYPE_S5), aml.ZERO, aml.ZERO, aml.ZERO])),
        )
    )
