"""MSI and MSI-X of one function: registers, masking, pending bits. Messages leave through `send(address, data)`.

Specification: PCI Local Bus 3.0, 6.8.1 (MSI), 6.8.2 (MSI-X), 6.8.3 (operation).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Annotated

from cpu.values import dataclass
from virtio.pci_function import MsixSpec
from vmm.errors import ConfigError, StateError
from vmm.pci.config import CAP_MSI, CAP_MSIX, ConfigSpace

Send = Callable[[int, int], None]

MAX_VECTORS = 2048
ENTRY = struct.Struct("<QII")
"""Message address, message data, vector control (6.8.2.6 to 6.8.2.9)."""
VECTOR_MASKED = 1
MSIX_ENABLE, MSIX_FUNCTION_MASK = 1 << 15, 1 << 14
MSI_ENABLE, MSI_64BIT, MSI_PER_VECTOR_MASK = 1 << 0, 1 << 7, 1 << 8


@dataclass(frozen=True, slots=True)
class MsixState:
    """The table and the pending bits, as the guest reads them; whether it is enabled stands in configuration space."""

    table: Annotated[bytes, range(MAX_VECTORS * ENTRY.size + 1)]
    pending: Annotated[bytes, range(MAX_VECTORS // 8 + 1)]


class Msix:
    """The MSI-X capability with its table and pending bit array."""

    def __init__(self, spec: MsixSpec, send: Send) -> None:
        if not 1 <= spec.vectors <= MAX_VECTORS or spec.table_offset % 8 or spec.pba_offset % 8:
            raise ConfigError("PCI: MSI-X needs 1 to 2048 vectors, table and PBA on 8-byte boundaries")
        self.spec = spec
        self._send = send
        self._offset = 0
        self.enabled = False
        self.function_masked = False
        self.reset()

    @property
    def table_size(self) -> int:
        return self.spec.vectors * ENTRY.size

    @property
    def pba_size(self) -> int:
        return (self.spec.vectors + 63) // 64 * 8

    def reset(self) -> None:
        """After reset every vector is masked (6.8.2.9) and nothing is pending."""
        self._table = bytearray(ENTRY.pack(0, 0, VECTOR_MASKED) * self.spec.vectors)
        self._pending = 0
        self.enabled = self.function_masked = False

    def place(self, config: ConfigSpace) -> None:
        """Add the capability: message control (table size - 1), table and PBA locations."""
        spec = self.spec
        body = struct.pack(
            "<BBHII", CAP_MSIX, 0, spec.vectors - 1, spec.table_offset | spec.table_bar, spec.pba_offset | spec.pba_bar
        )
        self._offset = config.add_capability(body, struct.pack("<HH", 0, MSIX_ENABLE | MSIX_FUNCTION_MASK))

    def config_written(self, config: ConfigSpace) -> None:
        """Message control may have changed: deliver what is no longer masked."""
        control = config.get(self._offset + 2, 2)
        self.enabled = bool(control & MSIX_ENABLE)
        self.function_masked = bool(control & MSIX_FUNCTION_MASK)
        if not self.enabled:
            return
        self._deliver_pending()

    def signal(self, vector: int) -> None:
        """6.8.3.4: a masked vector's message is held back in the pending bit array. Nothing while MSI-X is off."""
        if not self.enabled or not 0 <= vector < self.spec.vectors:
            return
        address, data, control = ENTRY.unpack_from(self._table, vector * ENTRY.size)
        if self.function_masked or control & VECTOR_MASKED:
            self._pending |= 1 << vector
        else:
            self._send(address, data)

    def message(self, vector: int) -> tuple[int, int] | None:
        """(address, data) that `signal` would send now; None if it would send nothing."""
        if not self.enabled or self.function_masked or not 0 <= vector < self.spec.vectors:
            return None
        address, data, control = ENTRY.unpack_from(self._table, vector * ENTRY.size)
        return None if control & VECTOR_MASKED else (address, data)

    def _deliver_pending(self) -> None:
        if self.function_masked:
            return
        pending = self._pending
        while pending:
            vector = (pending & -pending).bit_length() - 1
            pending &= pending - 1
            self._deliver(vector)

    def _deliver(self, vector: int) -> None:
        address, data, control = ENTRY.unpack_from(self._table, vector * ENTRY.size)
        if self._pending >> vector & 1 and self.enabled and not self.function_masked and not control & VECTOR_MASKED:
            self._pending &= ~(1 << vector)
            self._send(address, data)

    def table_read(self, offset: int, size: int) -> int:
        """6.8.2: only aligned 4- and 8-byte accesses are defined; others read as all ones."""
        if size not in (4, 8) or offset % size:
            return (1 << 8 * size) - 1
        return int.from_bytes(self._table[offset : offset + size], "little")

    def table_write(self, offset: int, size: int, value: int) -> None:
        if size not in (4, 8) or offset % size:
            return
        self._table[offset : offset + size] = value.to_bytes(size, "little")
        vector = offset // ENTRY.size
        at = vector * ENTRY.size + 12
        control = int.from_bytes(self._table[at : at + 4], "little") & VECTOR_MASKED
        self._table[at : at + 4] = control.to_bytes(4, "little")
        self._deliver(vector)

    def pba_read(self, offset: int, size: int) -> int:
        if size not in (4, 8) or offset % size:
            return (1 << 8 * size) - 1
        return self._pending >> 8 * offset & (1 << 8 * size) - 1

    def save(self) -> MsixState:
        return MsixState(bytes(self._table), self._pending.to_bytes(self.pba_size, "little"))

    def check(self, state: MsixState) -> None:
        """StateError unless restore() can take it."""
        if len(state.table) != len(self._table) or len(state.pending) != self.pba_size:
            raise StateError("MSI-X: the saved state has another number of vectors")

    def restore(self, state: MsixState, config: ConfigSpace) -> None:
        """After check(), with the restored configuration space."""
        self._table = bytearray(state.table)
        for at in range(12, len(self._table), ENTRY.size):
            self._table[at : at + 4] = bytes((self._table[at] & VECTOR_MASKED, 0, 0, 0))
        self._pending = int.from_bytes(state.pending, "little") & (1 << self.spec.vectors) - 1
        control = config.get(self._offset + 2, 2)
        self.enabled, self.function_masked = bool(control & MSIX_ENABLE), bool(control & MSIX_FUNCTION_MASK)


class Msi:
    """The MSI capability, 64-bit with per-vector masking, `vectors` a power of two up to 32."""

    def __init__(self, vectors: int, send: Send) -> None:
        if vectors not in (1, 2, 4, 8, 16, 32):
            raise ConfigError("PCI: MSI has 1, 2, 4, 8, 16 or 32 vectors")
        self.vectors = vectors
        self._send = send
        self._offset = 0
        self._config: ConfigSpace | None = None

    @staticmethod
    def body(vectors: int) -> bytes:
        """The capability as a function lists it in `capabilities`."""
        control = MSI_64BIT | MSI_PER_VECTOR_MASK | (vectors.bit_length() - 1) << 1
        return struct.pack("<BBHQHHII", CAP_MSI, 0, control, 0, 0, 0, 0, 0)

    @classmethod
    def from_body(cls, body: bytes, send: Send) -> Msi:
        control = int.from_bytes(body[2:4], "little")
        if len(body) != 24 or not control & MSI_64BIT or not control & MSI_PER_VECTOR_MASK:
            raise ConfigError("PCI: an MSI capability must be the 64-bit one with per-vector masking")
        return cls(1 << (control >> 1 & 7), send)

    def place(self, config: ConfigSpace) -> int:
        writable = struct.pack(
            "<BBHQHHII", 0, 0, MSI_ENABLE | 0x70, 0xFFFF_FFFF_FFFF_FFFC, 0xFFFF, 0, (1 << self.vectors) - 1, 0
        )
        self._offset = config.add_capability(self.body(self.vectors), writable)
        self._config = config
        return self._offset

    @property
    def pending_bytes(self) -> range:
        """Where its pending bits stand in configuration space."""
        return range(self._offset + 0x14, self._offset + 0x18)

    def _get(self, offset: int, size: int) -> int:
        assert self._config is not None
        return self._config.get(self._offset + offset, size)

    @property
    def enabled(self) -> bool:
        return bool(self._get(2, 2) & MSI_ENABLE)

    def config_written(self) -> None:
        """Mask or enable may have changed."""
        pending = self._get(0x14, 4) & ~self._get(0x10, 4)
        for vector in range(self.vectors):
            if pending >> vector & 1 and self.enabled:
                self._pend(vector, False)
                self._message(vector)

    def signal(self, vector: int) -> None:
        """Send vector `vector`, or hold it back while it is masked (6.8.1.9). Nothing while MSI is off."""
        if not self.enabled or not 0 <= vector < self.vectors:
            return
        if self._get(0x10, 4) >> vector & 1:
            self._pend(vector, True)
        else:
            self._message(vector)

    def _pend(self, vector: int, pending: bool) -> None:
        assert self._config is not None
        held = self._get(0x14, 4) & ~(1 << vector) | pending << vector
        self._config.put(self._offset + 0x14, 4, held)

    def _message(self, vector: int) -> None:
        # 6.8.1.6: the function may modify the low bits of the data, as many as software enabled messages.
        enabled = min(1 << (self._get(2, 2) >> 4 & 7), self.vectors)
        data = self._get(0x0C, 2)
        self._send(self._get(4, 8), data & ~(enabled - 1) | vector & (enabled - 1))
