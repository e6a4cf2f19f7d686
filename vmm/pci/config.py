"""Configuration space of one function: a type 0 header, declared; write masks; the capability chain.

Specification: PCI Local Bus 3.0, 6.1 (organisation), 6.2 (registers), 6.7 (capabilities list). Bytes with masks, so
that an access of any size and alignment behaves as its bytes do. It must not know buses, BAR mapping or interrupts.
"""

from __future__ import annotations

from collections.abc import Sequence

from construct import Bytes, Int8ul, Int16ul, Int24ul, Int32ul, Padding, Struct

from cpu.values import dataclass
from virtio.pci_function import BarSpec
from vmm.errors import ConfigError

SIZE = 256
EXTENDED_SIZE = 4096

COMMAND, STATUS, BARS, CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x04, 0x06, 0x10, 0x34, 0x3C, 0x3D
FIRST_CAPABILITY = 0x40

COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_DISABLE = 1 << 0, 1 << 1, 1 << 2, 1 << 10
COMMAND_WRITABLE = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE
STATUS_INTERRUPT, STATUS_CAPABILITIES = 1 << 3, 1 << 4

CAP_MSI, CAP_VENDOR, CAP_MSIX = 0x05, 0x09, 0x11

HEADER = Struct(
    "vendor_id" / Int16ul, "device_id" / Int16ul, "command" / Int16ul, "status" / Int16ul, "revision" / Int8ul,
    "class_code" / Int24ul, "cache_line_size" / Int8ul, "latency_timer" / Int8ul, "header_type" / Int8ul,
    "bist" / Int8ul,
    "bars" / Bytes(24), "cardbus_cis" / Int32ul, "subsystem_vendor_id" / Int16ul, "subsystem_id" / Int16ul,
    "expansion_rom" / Int32ul, "capabilities" / Int8ul, Padding(7), "interrupt_line" / Int8ul, "interrupt_pin" / Int8ul,
    "min_gnt" / Int8ul, "max_lat" / Int8ul,
)


@dataclass(frozen=True, slots=True)
class FunctionIdentity:
    """The read-only registers of a function's header."""

    vendor_id: int
    device_id: int
    revision: int
    class_code: int
    subsystem_vendor_id: int
    subsystem_id: int
    interrupt_pin: int
    """0: none, 1: INTA#, up to 4."""


class ConfigSpace:
    """256 bytes with a write mask for each bit."""

    def __init__(self, identity: FunctionIdentity, bars: Sequence[BarSpec]) -> None:
        self.data = bytearray(SIZE)
        self.mask = bytearray(SIZE)
        self._next = FIRST_CAPABILITY
        self._last_pointer = CAPABILITIES
        header = {
            "vendor_id": identity.vendor_id, "device_id": identity.device_id, "command": 0, "status": 0,
            "revision": identity.revision, "class_code": identity.class_code, "cache_line_size": 0,
            "latency_timer": 0, "header_type": 0, "bist": 0, "bars": bytes(24), "cardbus_cis": 0,
            "subsystem_vendor_id": identity.subsystem_vendor_id, "subsystem_id": identity.subsystem_id,
            "expansion_rom": 0, "capabilities": 0, "interrupt_line": 0xFF if identity.interrupt_pin else 0,
            "interrupt_pin": identity.interrupt_pin, "min_gnt": 0, "max_lat": 0,
        }
        self.data[: HEADER.sizeof()] = HEADER.build(header)
        self.set_mask(COMMAND, 2, COMMAND_WRITABLE)
        self.set_mask(0x0C, 1, 0xFF)  # cache line size: written by firmware, no effect (6.2.4)
        self.set_mask(INTERRUPT_LINE, 1, 0xFF)
        self._bars(bars)
        self.initial = bytes(self.data)

    def _bars(self, bars: Sequence[BarSpec]) -> None:
        """6.2.5.1: type bits read-only, address bits above the size writable."""
        used: set[int] = set()
        for bar in bars:
            slots = {bar.index, bar.index + 1} if bar.kind == "mem64" else {bar.index}
            least = 4 if bar.kind == "io" else 16
            if not slots <= set(range(6)) or slots & used:
                raise ConfigError(f"PCI: BAR {bar.index} does not exist or is used twice")
            if bar.size < least or bar.size & (bar.size - 1):
                raise ConfigError(f"PCI: BAR {bar.index} of {bar.size} bytes is no power of two of {least} or more")
            if bar.kind != "mem64" and bar.size > 1 << 31:
                raise ConfigError(f"PCI: BAR {bar.index} is too large for 32 bits")
            used |= slots
            type_bits = {"io": 1, "mem32": 0, "mem64": 4}[bar.kind] | (8 if bar.prefetchable else 0)
            at = BARS + 4 * bar.index
            width = 8 if bar.kind == "mem64" else 4
            self.put(at, 4, type_bits)
            self.set_mask(at, width, -bar.size & (1 << 8 * width) - 1)

    def add_capability(self, body: bytes, mask: bytes = b"") -> int:
        """Chain a capability (its second byte, the next pointer, is filled in here); returns its offset."""
        if len(body) < 2 or self._next + len(body) > SIZE:
            raise ConfigError("PCI: the capabilities do not fit into configuration space")
        at = self._next
        self.data[at : at + len(body)] = body
        self.data[at + 1] = 0
        self.data[self._last_pointer] = at
        self.mask[at : at + len(mask)] = mask
        self._last_pointer = at + 1
        self._next = at + len(body) + 3 & ~3
        self.put(STATUS, 2, self.get(STATUS, 2) | STATUS_CAPABILITIES)
        self.initial = bytes(self.data)
        return at

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Set a register as the device does: no masks."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")

    def set_mask(self, offset: int, size: int, mask: int) -> None:
        self.mask[offset : offset + size] = mask.to_bytes(size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write: only writable bits change."""
        for index in range(size):
            at = offset + index
            mask = self.mask[at]
            self.data[at] = self.data[at] & ~mask | value >> 8 * index & mask

    def bar(self, spec: BarSpec) -> int:
        """The address in a BAR, without its type bits."""
        at = BARS + 4 * spec.index
        match spec.kind:
            case "io":
                return self.get(at, 4) & ~3
            case "mem32":
                return self.get(at, 4) & ~15
            case _:
                return self.get(at, 8) & ~15

    def set_bar(self, spec: BarSpec, address: int) -> None:
        """As firmware would: the address, type bits kept."""
        at = BARS + 4 * spec.index
        self.write(at, 8 if spec.kind == "mem64" else 4, address)

    def reset(self) -> None:
        self.data[:] = self.initial
