"""/dev/kvm: what it offers, and VMs on it (Linux Documentation/virt/kvm/api.rst; section numbers below are its).

VMs and vCPUs are in cpu/kvm/kvm.c. This module must not know what the guest is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from cpu._core import MAX_VCPUS
from cpu.contract import Capability, CpuidEntry, VmConfig
from cpu.cpuid import ECX1_TSC_DEADLINE, ECX1_X2APIC, without_unsaved
from cpu.errors import HostError, StateError
from cpu.views import CPUID_ENTRY
from cpu.vm import CoreVm, unpack_cpuid

DEVICE: Final = "/dev/kvm"
API_VERSION: Final = 12  # 4.1

# _IO(0xAE, nr), _IOWR(0xAE, nr, size)
GET_API_VERSION: Final = 0xAE00
CHECK_EXTENSION: Final = 0xAE03
GET_MSR_INDEX_LIST: Final = 0xC004AE02
GET_SUPPORTED_CPUID: Final = 0xC008AE05

CAP_IRQFD: Final = 32
CAP_READONLY_MEM: Final = 81
CAP_TSC_DEADLINE_TIMER: Final = 72
CAP_IMMEDIATE_EXIT: Final = 136
CAP_NR_VCPUS: Final = 9
CAP_MAX_VCPUS: Final = 66
REQUIRED: Final = {
    0: "irqchip",
    3: "user memory",
    7: "extended CPUID",
    14: "MP state",
    25: "interrupt routing",
    CAP_IRQFD: "irqfd",
    33: "PIT2",
    36: "ioeventfd",
    37: "identity map address",
    41: "vCPU events",
    50: "debug registers",
    55: "XSAVE",
    56: "XCRS",
    77: "MSI signalling",
    CAP_IMMEDIATE_EXIT: "immediate exit",
}

_MTRRS: Final = (0x2FF, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270))
"""The MTRRs are state, but KVM's list (4.3) lacks them."""
_NO_STATE: Final = {0x11, 0x12, 0x8B, 0xCE, 0x10A, 0x345, *range(0x480, 0x492), *range(0x4000_0000, 0x4000_0200)}
"""MSRs in KVM's list (4.3) that are no state of a VM: old numbers of kvmclock's registers, the microcode's revision,
what the processor can do, and Hyper-V's registers, of which no guest is told."""

_ENTRIES_MAX = 256
_MSRS_MAX = 1024


class KvmSystem:
    """The host's KVM (cpu.contract.System). Raises HostError if it cannot be used; `cpu.select` says why and what
    helps."""

    def __init__(self, capabilities: frozenset[Capability] | None = None) -> None:
        """`capabilities`: what cpu.select found out. Without them they are found out when they are needed."""
        self._fd = -1
        self._known = capabilities
        self._msrs: tuple[int, ...] | None = None
        try:
            self._fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"cannot open {DEVICE}: {os.strerror(error.errno or 0)}") from error
        try:
            version = fcntl.ioctl(self._fd, GET_API_VERSION)
            if version != API_VERSION:
                raise HostError(f"{DEVICE} has API version {version}, not {API_VERSION}")
            missing = [name for number, name in REQUIRED.items() if not self._extension(number)]
            if missing:
                raise HostError(f"{DEVICE} lacks {', '.join(missing)}")
        except OSError as error:
            self.close()
            raise HostError(f"{DEVICE} is not usable: {os.strerror(error.errno or 0)}") from error
        except BaseException:
            self.close()
            raise

    def _extension(self, number: int) -> int:
        return fcntl.ioctl(self._fd, CHECK_EXTENSION, number)

    @property
    def name(self) -> str:
        return "kvm"

    def max_vcpus(self) -> int:
        """The most vCPUs that one VM may have (4.7)."""
        return min(self._extension(CAP_MAX_VCPUS) or self._extension(CAP_NR_VCPUS) or 4, MAX_VCPUS)

    def capabilities(self) -> frozenset[Capability]:
        if self._known is None:
            from cpu.kvm.probe import examine

            self._known = examine(self)
        return self._known

    def supported_cpuid(self) -> list[CpuidEntry]:
        """What KVM supports (4.46), without what a saved state could not hold, and with what the in-kernel LAPIC
        adds."""
        size = CPUID_ENTRY.size
        buffer = bytearray(8 + _ENTRIES_MAX * size)
        struct.pack_into("<I", buffer, 0, _ENTRIES_MAX)
        self._fill(GET_SUPPORTED_CPUID, buffer)
        (count,) = struct.unpack_from("<I", buffer)
        added = ECX1_X2APIC | (ECX1_TSC_DEADLINE if self._extension(CAP_TSC_DEADLINE_TIMER) else 0)
        entries = without_unsaved(unpack_cpuid(bytes(buffer[8 : 8 + count * size])))
        return [
            CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx | added, e.edx) if e.function == 1 else e
            for e in entries
        ]

    def msr_indices(self) -> tuple[int, ...]:
        """The MSRs that hold a VM's state (4.3)."""
        if self._msrs is None:
            buffer = bytearray(4 + 4 * _MSRS_MAX)
            struct.pack_into("<I", buffer, 0, _MSRS_MAX)
            self._fill(GET_MSR_INDEX_LIST, buffer)
            (count,) = struct.unpack_from("<I", buffer)
            found = dict.fromkeys((*struct.unpack_from(f"<{count}I", buffer, 4), *_MTRRS))
            self._msrs = tuple(index for index in found if index not in _NO_STATE)
        return self._msrs

    def _fill(self, request: int, buffer: bytearray) -> None:
        if self._fd < 0:
            raise StateError("the core is closed")
        try:
            fcntl.ioctl(self._fd, request, buffer)  # the kernel writes into it, since it is a bytearray
        except OSError as error:
            raise HostError(f"{DEVICE}: {os.strerror(error.errno or errno.EIO)}") from error

    def create_vm(self, config: VmConfig) -> CoreVm:
        """Make a VM. Raises ConfigError for a virtual clock, which KVM lacks."""
        if self._fd < 0:
            raise StateError("the core is closed")
        return CoreVm(
            "kvm",
            config,
            supported_cpuid=self.supported_cpuid,
            system_fd=self._fd,
            msr_indices=self.msr_indices(),
        )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
