"""The address map of the machine: where RAM, PCI windows, interrupt controllers, tables and ports stand.

One place for every guest-physical address, I/O port and GSI that two parts must agree on (a device and the ACPI
table that describes it). Addresses and sizes are bytes. It must not know devices, cores or files.

RAM starts at 0 and is cut by the PCI hole: what does not fit below 3 GiB continues at 4 GiB.
"""

from __future__ import annotations

import enum

from cpu.values import dataclass
from vmm.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class AddressRange:
    """[start, start + size), guest-physical."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


# The hole below 4 GiB.
PCI_HOLE = 0xC000_0000
HIGH_MEMORY = 1 << 32
MMIO32 = AddressRange(0xC000_0000, 512 * MIB)
"""Window of 32-bit BARs."""
ECAM = AddressRange(0xE000_0000, 1 * MIB)
"""PCI Express enhanced configuration access (PCI Firmware Specification 4.1). Only bus 0 is declared. With more buses
Linux would look for peer bridges on each, by 8192 port reads that exit synchronously."""
LAST_BUS = ECAM.size // MIB - 1
VIRTIO_MMIO = AddressRange(0xFEB0_0000, 32 * 4096)
VIRTIO_MMIO_STRIDE = 4096
IOAPIC = AddressRange(0xFEC0_0000, 4096)
LAPIC = AddressRange(0xFEE0_0000, 4096)
MMIO64_ALIGN = 1 << 35

# Ports.
COM1, COM2 = 0x3F8, 0x2F8
PCI_IO = AddressRange(0x1000, 0xF000)
"""Window of I/O BARs."""
PM_BASE = 0x600
PM1_EVENT, PM1_CONTROL, PM_TIMER, GPE0 = PM_BASE, PM_BASE + 4, PM_BASE + 8, PM_BASE + 0x20
PM_SIZE = 0x40
PCI_HOTPLUG, PCI_HOTPLUG_SIZE = 0x640, 0x20
"""Registers of vmm/pci/hotplug.py."""
CPU_HOTPLUG, CPU_HOTPLUG_SIZE = 0x660, 0x20
"""Registers of vmm/devices/cpus.py."""
RESET_PORT, RESET_VALUE = 0xCF9, 0x06
PVPANIC = 0x505
FW_CFG, FW_CFG_SIZE = 0x510, 12

# General purpose events. The DSDT has a method for each (vmm.acpi.Acpi.add_event).
PCI_EVENT, CPU_EVENT = 1, 2
"""Something happened to a PCI slot, or to a processor; the registers above say what."""
GENERATION_EVENT = 5
"""The VM generation ID changed."""

# GSIs. 0-15 reach both the PIC and the IOAPIC.
COM1_GSI, COM2_GSI, RTC_GSI, SCI_GSI, KEYBOARD_GSI, MOUSE_GSI = 4, 3, 8, 9, 1, 12
PCI_INTX_GSIS = (10, 11, 10, 11)
"""The GSIs of INTA# to INTD# of device 0. From each device to the next they rotate by one. They are below 16, so that
they work in PIC mode too."""
VIRTIO_MMIO_GSIS = tuple(range(16, 24))
VIRTIO_MMIO_MAX = VIRTIO_MMIO.size // VIRTIO_MMIO_STRIDE

# RAM below 1 MiB that the loaders and tables use.
BDA = 0x400
WARM_BOOT_FLAG = 0x472
"""In the BIOS data area. A guest that writes 0x1234 here before a reset asks for a warm boot."""
COREBOOT_TABLE = AddressRange(0x500, 256)
BOOT_GDT, BOOT_IDT = 0x600, 0x6A0
BOOT_INFO = 0x7000
"""Linux zero page, hvm_start_info or multiboot information: 4 KiB."""
BOOT_PAGE_TABLES = 0x9000
"""PML4, one PDPT, four page directories: 24 KiB."""
BOOT_STACK = 0x8FF0
"""Where the stack begins, which grows down towards BOOT_INFO's page."""
CMDLINE = AddressRange(0x2_0000, 64 * KIB)
MODULE_CMDLINE = 0x2_8000
"""The second half of CMDLINE, for a boot module that has a command line of its own."""
EBDA = AddressRange(0x9_FC00, 1 * KIB)
ROM = AddressRange(0xE_0000, 128 * KIB)
"""Where a PC has its BIOS. The memory map says reserved; here it is RAM, which the loaders fill."""
ACPI = AddressRange(0xE_0000, 64 * KIB)
"""The RSDP stands at the start, on a 16-byte boundary; all tables follow."""
SMBIOS = AddressRange(0xF_0000, 4 * KIB)
"""The entry point, which guests find by its anchor from 0xF0000 on, and the structures."""
MP_TABLE = AddressRange(0xF_1000, 4 * KIB)
VM_GENERATION_ID = 0xF_F000
DUMMY_HANDLER, RESET_VECTOR = 0xF_FF53, 0xF_FFF0
"""F000:FF53 and F000:FFF0: where a PC's BIOS has its IRET for unused interrupts, and where a processor begins."""
KERNEL_BASE = 1 * MIB


class E820Type(enum.IntEnum):
    """ACPI 6.4, table 15.1 (address range types)."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4


@dataclass(frozen=True, slots=True)
class E820Entry:
    start: int
    size: int
    type: E820Type

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Layout:
    """The map of one machine with `memory` bytes of RAM."""

    memory: int

    @property
    def low_end(self) -> int:
        """First address after the RAM below the PCI hole."""
        return min(self.memory, PCI_HOLE)

    @property
    def high_end(self) -> int:
        """First address after all RAM; HIGH_MEMORY if none stands above 4 GiB."""
        return HIGH_MEMORY + max(self.memory - PCI_HOLE, 0)

    @property
    def mmio64(self) -> AddressRange:
        """Window of 64-bit BARs: 32 GiB, above all RAM."""
        return AddressRange(-(-self.high_end // MMIO64_ALIGN) * MMIO64_ALIGN, MMIO64_ALIGN)

    @property
    def ram(self) -> tuple[AddressRange, ...]:
        low = AddressRange(0, self.low_end)
        return (low, AddressRange(HIGH_MEMORY, self.memory - PCI_HOLE)) if self.memory > PCI_HOLE else (low,)

    def e820(self) -> list[E820Entry]:
        """The memory map that firmware would report, by address. Raises ConfigError below 2 MiB of RAM."""
        if self.memory < 2 * MIB:
            raise ConfigError(f"memory: {self.memory} bytes is too little for a memory map; give 2M or more")
        entries = [
            E820Entry(0, EBDA.start, E820Type.RAM),
            E820Entry(EBDA.start, EBDA.size, E820Type.RESERVED),
            E820Entry(ROM.start, ROM.size, E820Type.RESERVED),
            E820Entry(MIB, self.low_end - MIB, E820Type.RAM),
            E820Entry(ECAM.start, ECAM.size, E820Type.RESERVED),
        ]
        if self.memory > PCI_HOLE:
            entries.append(E820Entry(HIGH_MEMORY, self.memory - PCI_HOLE, E820Type.RAM))
        return entries


def intx_gsi(device: int, pin: int) -> int:
    """The GSI of interrupt pin `pin` (0 for INTA#) of device number `device` on bus 0."""
    return PCI_INTX_GSIS[(device + pin) % len(PCI_INTX_GSIS)]


def virtio_mmio(index: int) -> tuple[AddressRange, int]:
    """Registers and GSI of the `index`-th virtio-mmio device. Raises ConfigError beyond the window."""
    if not 0 <= index < VIRTIO_MMIO_MAX:
        raise ConfigError(f"virtio-mmio: {VIRTIO_MMIO_MAX} devices fit; use the pci transport for the others")
    start = VIRTIO_MMIO.start + index * VIRTIO_MMIO_STRIDE
    return AddressRange(start, VIRTIO_MMIO_STRIDE), VIRTIO_MMIO_GSIS[index % len(VIRTIO_MMIO_GSIS)]
