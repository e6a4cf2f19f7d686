"""CPU models: what a guest is told of its processor, so that a saved state runs on on any core that has as much.

A guest sees what its model and the core have in common. The bits are Intel SDM 2A "CPUID" and AMD APM 3 appendix E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from cpu.contract import CpuidEntry
from cpu.cpuid import INDEX_SIGNIFICANT
from cpu.errors import ConfigError, HostError

VENDOR: Final = (0x6874_7541, 0x444D_4163, 0x6974_6E65)
"""AuthenticAMD, in EBX, ECX, EDX."""
SIGNATURE: Final = 0x00A1_0F11
"""Family 19h, model 11h, as the software core."""
PHYSICAL_BITS: Final = 40
"""Bits of a physical address that every server has: 1 TiB is more than most machines use."""
BRAND: Final = b"loopvisor x86-64-v2".ljust(48, b"\0")
XSAVE_LEGACY: Final = 576

FEATURES: Final[dict[tuple[int, int, str], dict[int, str]]] = {
    (1, 0, "ecx"): {
        0: "sse3", 1: "pclmulqdq", 3: "monitor", 9: "ssse3", 12: "fma", 13: "cx16", 17: "pcid", 19: "sse4.1",
        20: "sse4.2", 21: "x2apic", 22: "movbe", 23: "popcnt", 24: "tsc-deadline", 25: "aes", 26: "xsave", 28: "avx",
        29: "f16c", 30: "rdrand", 31: "hypervisor",
    },
    (1, 0, "edx"): {
        0: "fpu", 1: "vme", 2: "de", 3: "pse", 4: "tsc", 5: "msr", 6: "pae", 7: "mce", 8: "cx8", 11: "sysenter",
        12: "mtrr", 13: "pge", 14: "mca", 15: "cmov", 16: "pat", 17: "pse36", 19: "clflush", 23: "mmx", 24: "fxsr",
        25: "sse", 26: "sse2", 27: "ss",
    },
    (6, 0, "eax"): {2: "arat"},
    (7, 0, "ebx"): {
        0: "fsgsbase", 1: "tsc-adjust", 3: "bmi1", 4: "hle", 5: "avx2", 7: "smep", 8: "bmi2", 9: "erms", 10: "invpcid",
        11: "rtm", 14: "mpx", 16: "avx512f", 17: "avx512dq", 18: "rdseed", 19: "adx", 20: "smap", 21: "avx512ifma",
        23: "clflushopt", 24: "clwb", 28: "avx512cd", 29: "sha", 30: "avx512bw", 31: "avx512vl",
    },
    (7, 0, "ecx"): {
        1: "avx512vbmi", 2: "umip", 3: "pku", 4: "ospke", 5: "waitpkg", 7: "shstk", 8: "gfni", 9: "vaes",
        10: "vpclmulqdq", 16: "la57", 22: "rdpid", 24: "bus-lock-detect", 25: "cldemote", 27: "movdiri",
        28: "movdir64b",
    },
    (7, 0, "edx"): {4: "fsrm", 10: "md-clear", 14: "serialize", 20: "ibt", 26: "spec-ctrl", 27: "stibp", 31: "ssbd"},
    (7, 1, "eax"): {},
    (0xD, 0, "eax"): {
        0: "xsave-x87", 1: "xsave-sse", 2: "xsave-avx", 5: "xsave-opmask", 6: "xsave-zmm-high", 7: "xsave-zmm",
        9: "xsave-pkru",
    },
    (0xD, 1, "eax"): {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1", 3: "xsaves"},
    (0x4000_0001, 0, "eax"): {
        0: "kvm-clocksource", 1: "kvm-nop-io-delay", 3: "kvm-clocksource2", 4: "kvm-async-pf", 5: "kvm-steal-time",
        6: "kvm-pv-eoi", 7: "kvm-pv-unhalt", 9: "kvm-pv-tlb-flush", 11: "kvm-pv-send-ipi", 12: "kvm-poll-control",
        14: "kvm-async-pf-int", 24: "kvm-clocksource-stable",
    },
    (0x8000_0001, 0, "ecx"): {
        0: "lahf", 4: "cr8-legacy", 5: "lzcnt", 6: "sse4a", 7: "misaligned-sse", 8: "prefetchw", 11: "xop", 16: "fma4",
    },
    (0x8000_0001, 0, "edx"): {
        1: "vme-amd", 11: "syscall", 14: "mca-amd", 20: "nx", 22: "mmxext", 23: "mmx-amd", 24: "fxsr-amd",
        25: "fxsr-opt", 26: "1g-pages", 27: "rdtscp", 29: "long-mode",
    },
    (0x8000_0007, 0, "edx"): {8: "invariant-tsc"},
    (0x8000_0008, 0, "ebx"): {0: "clzero", 2: "xsaveerptr", 9: "wbnoinvd", 12: "ibpb", 26: "ssb-no", 29: "btc-no"},
    (0x8000_0021, 0, "eax"): {
        0: "no-nested-data-breakpoints", 2: "lfence-serializing", 6: "null-selector-clears-base", 8: "auto-ibrs",
        29: "srso-no",
    },
    (0x8000_0021, 0, "ecx"): {1: "tsa-sq-no", 2: "tsa-l1-no"},
}  # fmt: skip
"""Registers that are sets of features, and their bits. Others are left to the core and cpu.cpuid.for_vcpu()."""

_PER_VCPU: Final = {(1, 0, "ecx"): 1 << 27, (1, 0, "edx"): 1 << 9 | 1 << 28, (0x8000_0001, 0, "ecx"): 1 << 1 | 1 << 22}
"""OSXSAVE, APIC, HTT, CmpLegacy, TopologyExtensions: of what the vCPU does, or of the VM's topology."""


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


_COMMON_EDX = _bits(0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 23, 24)
_words = [int.from_bytes(BRAND[at : at + 4], "little") for at in range(0, 48, 4)]
_words_v3 = [int.from_bytes(BRAND.replace(b"v2", b"v3")[at : at + 4], "little") for at in range(0, 48, 4)]

V2: Final = (
    CpuidEntry(0, 0, 0, 0xD, *VENDOR),
    CpuidEntry(
        1, 0, 0, SIGNATURE, 8 << 8 | 1 << 16,
        _bits(0, 9, 13, 17, 19, 20, 21, 22, 23, 24, 26, 30, 31), _COMMON_EDX | _bits(11, 19, 25, 26),
    ),
    CpuidEntry(6, 0, 0, _bits(2), 0, 0, 0),
    CpuidEntry(7, 0, INDEX_SIGNIFICANT, 0, _bits(0, 1, 7, 9, 10, 18, 20), _bits(2), 0),
    CpuidEntry(0xB, 0, INDEX_SIGNIFICANT, 0, 1, 1 << 8, 0),
    CpuidEntry(0xD, 0, INDEX_SIGNIFICANT, 3, 576, 576, 0),
    CpuidEntry(0xD, 1, INDEX_SIGNIFICANT, _bits(0, 1, 2, 3), 576, 0, 0),
    CpuidEntry(0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D),
    CpuidEntry(0x4000_0001, 0, 0, _bits(0, 1, 3, 24), 0, 0, 0),
    CpuidEntry(0x8000_0000, 0, 0, 0x8000_0021, *VENDOR),
    CpuidEntry(0x8000_0001, 0, 0, SIGNATURE, 0, _bits(0, 8), _COMMON_EDX | _bits(11, 20, 22, 26, 27, 29)),
    *(CpuidEntry(0x8000_0002 + at, 0, 0, *_words[4 * at : 4 * at + 4]) for at in range(3)),
    CpuidEntry(0x8000_0005, 0, 0, 0xFF48_FF40, 0xFF48_FF40, 0x2008_0140, 0x2008_0140),
    CpuidEntry(0x8000_0006, 0, 0, 0x4800_2200, 0x6800_4200, 0x0400_6140, 0x0100_9140),
    CpuidEntry(0x8000_0007, 0, 0, 0, 0, 0, _bits(8)),
    CpuidEntry(0x8000_0008, 0, 0, PHYSICAL_BITS | 48 << 8, _bits(26, 29), 0, 0),
    CpuidEntry(0x8000_0021, 0, 0, _bits(0, 2, 6, 8, 29), 0, _bits(1, 2), 0),
)  # fmt: skip
"""x86-64-v2 and what the software core has beside it: AMD family 19h without AVX."""

_V3: Final = {
    (1, 0, "ecx"): _bits(1, 12, 25, 28, 29),
    (7, 0, "ebx"): _bits(3, 5, 8),
    (0xD, 0, "eax"): _bits(2),
    (0x8000_0001, 0, "ecx"): _bits(5),
}
"""What x86-64-v3 has beside x86-64-v2 (x86-64 psABI, 3.1.1), and AES and PCLMULQDQ, which its processors have too."""
XSAVE_AVX: Final = XSAVE_LEGACY + 256
"""Bytes of an XSAVE area with the upper halves of YMM registers (SDM 1, 13.5.2)."""


def _v3() -> tuple[CpuidEntry, ...]:
    entries = []
    for entry in V2:
        for register in ("eax", "ebx", "ecx", "edx"):
            more = _V3.get((entry.function, entry.index, register), 0)
            entry = replace(entry, **{register: getattr(entry, register) | more})
        if entry.function == 0xD and entry.index == 0:
            entry = replace(entry, ebx=XSAVE_AVX, ecx=XSAVE_AVX)
        elif 0x8000_0002 <= entry.function <= 0x8000_0004:
            at = 4 * (entry.function - 0x8000_0002)
            eax, ebx, ecx, edx = _words_v3[at : at + 4]
            entry = replace(entry, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
        entries.append(entry)
        if entry.function == 0xD and entry.index == 1:
            entries.append(CpuidEntry(0xD, 2, INDEX_SIGNIFICANT, XSAVE_AVX - XSAVE_LEGACY, XSAVE_LEGACY, 0, 0))
    return tuple(entries)


V3: Final = _v3()
"""x86-64-v3: AVX, AVX2, FMA, F16C, BMI1, BMI2, LZCNT, MOVBE."""
REQUIRED: Final = {"v3": {**_V3, (1, 0, "ecx"): _bits(12, 22, 28, 29)}}
"""Features without which a core cannot have a model at all; of others it leaves out what it lacks."""
MODELS: Final = {"v2": V2, "v3": V3}
NAMES: Final = (*MODELS, "max", "host")


def table(name: str, supported: Sequence[CpuidEntry], *, address_limit: int = 0) -> list[CpuidEntry]:
    """What a guest of the model sees on a core that has `supported` (System.supported_cpuid()): features that both
    have, for cpu.cpuid.for_vcpu(). "host" and "max" are all that the core has. On a core of another vendor the vendor,
    the signature and the caches are the core's. Addresses have PHYSICAL_BITS, or as many as those below `address_limit`
    need, if the core has them. ConfigError for a name that no model has; HostError if the core lacks what the model
    cannot be without."""
    if name in ("host", "max"):
        return list(supported)
    if name not in MODELS:
        raise ConfigError(f"no CPU model is named {name!r}; there are {', '.join(NAMES)}")
    have = {(entry.function, entry.index): entry for entry in supported}
    if missing := unavailable(name, supported):
        lacks = ", ".join(missing)
        raise HostError(f"cpu_model {name}: this host's core has no {lacks}; --cpu-model v2 needs none of it")
    foreign = (0, 0) in have and (have[0, 0].ebx, have[0, 0].ecx, have[0, 0].edx) != VENDOR
    made = []
    for entry in MODELS[name]:
        core = have.get((entry.function, entry.index), CpuidEntry(entry.function, entry.index, 0, 0, 0, 0, 0))
        features = {
            register: getattr(entry, register) & getattr(core, register)
            for function, index, register in FEATURES
            if (function, index) == (entry.function, entry.index)
        }
        if entry.function == 0x8000_0008:
            features["eax"] = entry.eax & ~0xFF | max(entry.eax & 0xFF, (address_limit - 1).bit_length())
        made.append(replace(entry, **features))
    if foreign:
        made = [_of_core(entry, have) for entry in made]
        made += [entry for entry in supported if entry.function in (2, 4)]
    return [_sized(entry, have, made) for entry in made]


def unavailable(name: str, supported: Sequence[CpuidEntry]) -> list[str]:
    """Names of the features that the model cannot be without and a core that has `supported` lacks."""
    have = {(entry.function, entry.index): entry for entry in supported}
    names = []
    for (function, index, register), bits in REQUIRED.get(name, {}).items():
        core = have.get((function, index))
        missing = bits & ~(getattr(core, register) if core else 0)
        names += [text for bit, text in FEATURES[function, index, register].items() if missing >> bit & 1]
    return names


def has_avx(table: Sequence[CpuidEntry]) -> bool:
    """Whether a guest with that table has YMM registers."""
    return any(entry.function == 1 and entry.ecx >> 28 & 1 for entry in table)


def _of_core(entry: CpuidEntry, have: dict[tuple[int, int], CpuidEntry]) -> CpuidEntry:
    """Identity and caches as the core has them."""
    core = have.get((entry.function, entry.index), entry)
    match entry.function:
        case 0 | 0x8000_0000:
            return replace(entry, ebx=core.ebx, ecx=core.ecx, edx=core.edx)
        case 1 | 0x8000_0001:
            return replace(entry, eax=core.eax)
        case 0x8000_0005 | 0x8000_0006:
            return core
    return entry


def _sized(entry: CpuidEntry, have: dict[tuple[int, int], CpuidEntry], made: list[CpuidEntry]) -> CpuidEntry:
    """No address wider than the core's, and no XSAVE area without XSAVE."""
    if entry.function == 0x8000_0008 and (0x8000_0008, 0) in have:
        core = have[0x8000_0008, 0].eax
        return replace(entry, eax=min(entry.eax & 0xFF, core & 0xFF) | min(entry.eax & 0xFF00, core & 0xFF00))
    if entry.function == 0xD and not any(other.function == 1 and other.ecx >> 26 & 1 for other in made):
        return replace(entry, eax=0, ebx=0, ecx=0, edx=0)
    if entry.function == 0xD and entry.index == 0 and entry.eax in (3, 7):
        size = XSAVE_AVX if entry.eax & 4 else XSAVE_LEGACY
        return replace(entry, ebx=size, ecx=size)
    return entry


def lacking(wanted: Sequence[CpuidEntry], supported: Sequence[CpuidEntry]) -> list[str]:
    """Names of the features that a guest with the table `wanted` was told of and a core that has `supported` lacks."""
    have = {(entry.function, entry.index): entry for entry in supported}
    names = []
    for entry in wanted:
        core = have.get((entry.function, entry.index))
        for (function, index, register), bits in FEATURES.items():
            if (function, index) != (entry.function, entry.index):
                continue
            missing = getattr(entry, register) & ~(getattr(core, register) if core else 0)
            missing &= ~_PER_VCPU.get((function, index, register), 0)
            names += [
                bits.get(bit, f"CPUID {function:x}.{index}.{register} bit {bit}")
                for bit in range(32)
                if missing >> bit & 1
            ]
        if entry.function == 0x8000_0008 and core and entry.eax & 0xFF > core.eax & 0xFF:
            names.append(f"{entry.eax & 0xFF}-bit physical addresses")
    return names


def common(*tables: Sequence[CpuidEntry]) -> list[CpuidEntry]:
    """A table with the features that all have, else as the first: for a guest that is to run on several cores."""
    first, *others = tables
    made = list(first)
    for other in others:
        have = {(entry.function, entry.index): entry for entry in other}
        for at, entry in enumerate(made):
            core = have.get((entry.function, entry.index))
            features = {
                register: getattr(entry, register) & (getattr(core, register) if core else 0)
                for function, index, register in FEATURES
                if (function, index) == (entry.function, entry.index)
            }
            made[at] = replace(entry, **features)
        made = [_sized(entry, have, made) for entry in made]
    return made
