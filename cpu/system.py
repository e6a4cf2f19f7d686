"""A System for cores that need nothing of the host: the software core, and the scripted core's base."""

from __future__ import annotations

import struct

from cpu import _core
from cpu.contract import Capability, CpuidEntry, VmConfig
from cpu.errors import StateError
from cpu.vm import CoreVm, unpack_cpuid

SOFT_CAPABILITIES = frozenset(
    {
        Capability.REAL_MODE,
        Capability.PAE_PAGING,
        Capability.STOCK_KERNELS,
        Capability.VIRTUAL_CLOCK,
        Capability.DIRTY_LOG,
        Capability.IRQFD,
        Capability.NMI,
        Capability.INSTRUCTION_COUNT,
        Capability.DETECTS_HALT,
        Capability.DEBUG,
        Capability.BREAKPOINTS,
        Capability.TRACE,
    }
)

SOFT_MAX_VCPUS = 16
"""cpu/soft/soft.h"""


class NativeSystem:
    """An execution core in user space (cpu.contract.System)."""

    def __init__(self, name: str, capabilities: frozenset[Capability]) -> None:
        self._name = name
        self._capabilities = capabilities
        self._closed = False
        packed = _core.msr_list(name)
        self._msrs = struct.unpack(f"<{len(packed) // 4}I", packed)

    @property
    def name(self) -> str:
        return self._name

    def capabilities(self) -> frozenset[Capability]:
        return self._capabilities

    def supported_cpuid(self) -> list[CpuidEntry]:
        return unpack_cpuid(_core.supported_cpuid(self._name))

    def create_vm(self, config: VmConfig) -> CoreVm:
        if self._closed:
            raise StateError("the core is closed")
        return CoreVm(self._name, config, supported_cpuid=self.supported_cpuid, msr_indices=self._msrs)

    def close(self) -> None:
        self._closed = True


def soft_system() -> NativeSystem:
    """The software core; ConfigError from create_vm() if this build has none."""
    return NativeSystem("soft", SOFT_CAPABILITIES)
