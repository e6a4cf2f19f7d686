"""CPUID tables: what a machine's vCPUs differ in, and what of the host's a guest must not see.

Leaves: AMD APM 3 appendix E, Intel SDM 2A "CPUID"; Linux Documentation/virt/kvm/x86/cpuid.rst for 0x4000_0000.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cpu.contract import CpuidEntry

INDEX_SIGNIFICANT = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

ECX1_VMX = 1 << 5
ECX1_PCID = 1 << 17
ECX1_X2APIC = 1 << 21
ECX1_TSC_DEADLINE = 1 << 24
ECX1_HYPERVISOR = 1 << 31
EDX1_HTT = 1 << 28
EBX7_SGX = 1 << 2
EBX7_TRACE = 1 << 25
ECX7_SHADOW_STACK = 1 << 7
ECX7_SGX_LC = 1 << 30
EDX7_AMX = 1 << 22 | 1 << 24 | 1 << 25
EDX7_LAST_BRANCH = 1 << 19
EDX7_BRANCH_TRACKING = 1 << 20
ECX8_1_CMP_LEGACY = 1 << 1
ECX8_1_SVM = 1 << 2
ECX8_1_PERFCTR_CORE = 1 << 23
ECX8_1_TOPOLOGY = 1 << 22
XCR0_AMX = 1 << 17 | 1 << 18
XSS_SHADOW_STACK = 1 << 11 | 1 << 12
AMD = {b"AuthenticAMD", b"HygonGenuine"}
"""Vendors whose leaves 8000_0001 and 8000_0008 tell the topology; Intel's bits there are reserved."""


def vendor(entries: Iterable[CpuidEntry]) -> bytes:
    """The vendor's name, of 12 bytes: leaf 0. Zeros if there is no such leaf."""
    for entry in entries:
        if entry.function == 0:
            return b"".join(word.to_bytes(4, "little") for word in (entry.ebx, entry.edx, entry.ecx))
    return bytes(12)


def without_unsaved(entries: Iterable[CpuidEntry]) -> list[CpuidEntry]:
    """Without features whose state a saved VM does not hold.

    Nested virtualization, performance counters, shadow stacks; Intel's AMX tiles, SGX enclaves, processor trace, last
    branch records and branch tracking.
    """
    kept = []
    for entry in entries:
        match entry.function:
            case 1:
                entry = replace(entry, ecx=entry.ecx & ~ECX1_VMX | ECX1_HYPERVISOR)
            case 7 if entry.index == 0:
                entry = replace(
                    entry, ebx=entry.ebx & ~(EBX7_SGX | EBX7_TRACE), ecx=entry.ecx & ~(ECX7_SHADOW_STACK | ECX7_SGX_LC),
                    edx=entry.edx & ~(EDX7_AMX | EDX7_LAST_BRANCH | EDX7_BRANCH_TRACKING),
                )  # fmt: skip
            case 0xA | 0x12 | 0x14 | 0x1C:
                entry = replace(entry, eax=0, ebx=0, ecx=0, edx=0)
            case 0xD if entry.index == 0:
                entry = replace(entry, eax=entry.eax & ~XCR0_AMX)
            case 0xD if entry.index == 1:
                entry = replace(entry, ecx=entry.ecx & ~XSS_SHADOW_STACK)
            case 0xD if entry.index in (11, 12, 17, 18):
                continue
            case 0x8000_0001:
                entry = replace(entry, ecx=entry.ecx & ~(ECX8_1_SVM | ECX8_1_PERFCTR_CORE))
            case 0x8000_000A | 0x8000_0022 | 0x1D | 0x1E:
                entry = replace(entry, eax=0, ebx=0, ecx=0, edx=0)
        kept.append(entry)
    return kept


def for_vcpu(entries: Sequence[CpuidEntry], index: int, count: int) -> list[CpuidEntry]:
    """The table of vCPU `index` of `count`: its APIC id, and a topology of one package of single-threaded cores."""
    width = max(count - 1, 0).bit_length()
    amd = vendor(entries) in AMD
    made = []
    for entry in entries:
        match entry.function:
            case 1:
                ebx = entry.ebx & 0x0000_FFFF | min(1 << width, 255) << 16 | index << 24
                edx = entry.edx | EDX1_HTT if count > 1 else entry.edx & ~EDX1_HTT
                entry = replace(entry, ebx=ebx, edx=edx)
            case 4:
                # EAX 31-26: cores a package - 1; 25-14: threads that share the cache - 1.
                if entry.eax & 0x1F:
                    shared = (1 << width) - 1 if entry.eax >> 5 & 7 >= 3 else 0
                    entry = replace(entry, eax=entry.eax & 0x3FFF | shared << 14 | (1 << width) - 1 << 26)
            case 0xB | 0x1F | 0x8000_0026:
                continue  # rebuilt below
            case 0x8000_0001 if amd:
                cmp_legacy = ECX8_1_CMP_LEGACY if count > 1 else 0
                entry = replace(entry, ecx=entry.ecx & ~(ECX8_1_CMP_LEGACY | ECX8_1_TOPOLOGY) | cmp_legacy)
            case 0x8000_0008 if amd:
                entry = replace(entry, ecx=entry.ecx & ~0xF0FF | width << 12 | count - 1)
            case 0x8000_001D:
                if entry.eax & 0x1F:
                    shared = (1 << width) - 1 if entry.eax >> 5 & 7 >= 3 else 0
                    entry = replace(entry, eax=entry.eax & 0x3FFF | shared << 14)
            case 0x8000_001E:
                entry = replace(entry, eax=index, ebx=index & 0xFF, ecx=0)
        made.append(entry)
    if any(entry.function == 0 and entry.eax >= 0xB for entry in made):
        # SDM 2A CPUID leaf 0BH: ECX 15-8 is the level's type (1 SMT, 2 core, 0 end); EAX the shift to the next level.
        made += [
            CpuidEntry(0xB, 0, INDEX_SIGNIFICANT, 0, 1, 1 << 8, index),
            CpuidEntry(0xB, 1, INDEX_SIGNIFICANT, width, count, 2 << 8 | 1, index),
            CpuidEntry(0xB, 2, INDEX_SIGNIFICANT, 0, 0, 2, index),
        ]
    return made
