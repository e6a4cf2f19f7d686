"""CPUID as one vCPU of several sees it: APIC ids and the number of processors (Intel SDM volume 2, CPUID).

One package, one thread per core, APIC id = index: what MADT says as well. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cpu.contract import CpuidEntry

_HTT = 1 << 28
_HYPERVISOR = 1 << 31
_SIGNIFICANT_INDEX = 1


def vcpu_cpuid(entries: Sequence[CpuidEntry], index: int, count: int) -> list[CpuidEntry]:
    """`entries` (what the core supports) for vCPU `index` of `count`."""
    bits = max(count - 1, 0).bit_length()
    patched = []
    for entry in entries:
        match entry.function:
            case 0x1:
                ebx = entry.ebx & 0xFFFF | min(1 << bits, 255) << 16 | index << 24
                edx = entry.edx | _HTT if count > 1 else entry.edx & ~_HTT
                entry = replace(entry, ebx=ebx, ecx=entry.ecx | _HYPERVISOR, edx=edx)
            case 0x4 if entry.eax & 0x1F:
                # EAX 31:26 cores in the package - 1, 25:14 threads that share this cache - 1: only level 3 is shared.
                shared = (1 << bits) - 1 if entry.eax >> 5 & 7 >= 3 else 0
                eax = entry.eax & 0x3FFF | shared << 14 | min((1 << bits) - 1, 63) << 26
                entry = replace(entry, eax=eax)
            case 0xB | 0x1F:
                continue
            case 0x8000_0001 if count == 1:
                entry = replace(entry, ecx=entry.ecx & ~2)  # CmpLegacy
            case 0x8000_0008:
                entry = replace(entry, ecx=entry.ecx & ~0xF0FF | bits << 12 | count - 1)
            case 0x8000_001E:
                entry = replace(entry, eax=index, ebx=index & 0xFF, ecx=0)
        patched.append(entry)
    if any(entry.function == 0 and entry.eax >= 0xB for entry in entries):
        patched += [
            CpuidEntry(0xB, 0, _SIGNIFICANT_INDEX, 0, 1, 0x100, index),
            CpuidEntry(0xB, 1, _SIGNIFICANT_INDEX, bits, count, 0x201, index),
            CpuidEntry(0xB, 2, _SIGNIFICANT_INDEX, 0, 0, 2, index),
        ]
    return patched
