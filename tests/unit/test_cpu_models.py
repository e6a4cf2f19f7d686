"""CPU models: which features a guest is told of, and what a host without them is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpu.contract import CpuidEntry
from cpu.errors import HostError
from cpu.model import FEATURES, MODELS, NAMES, V2, V3, common, has_avx, lacking, table, unavailable

V3_NAMES = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe"}


def names(entries: list[CpuidEntry] | tuple[CpuidEntry, ...]) -> set[str]:
    """The names of the features that the table has."""
    have = {(entry.function, entry.index): entry for entry in entries}
    return {
        text
        for (function, index, register), bits in FEATURES.items()
        if (function, index) in have
        for bit, text in bits.items()
        if getattr(have[function, index], register) >> bit & 1
    }


def without_avx2(entries: tuple[CpuidEntry, ...]) -> list[CpuidEntry]:
    return [replace(entry, ebx=entry.ebx & ~(1 << 5)) if entry.function == 7 else entry for entry in entries]


def test_v3_is_what_the_abi_says_and_all_of_v2() -> None:
    """x86-64 psABI, table 3.1: x86-64-v3 is v2 with these."""
    assert names(V3) >= V3_NAMES | names(V2)
    assert names(V3) - names(V2) == (V3_NAMES - {"movbe"}) | {"aes", "pclmulqdq", "xsave-avx"}
    assert (has_avx(V3), has_avx(V2)) == (True, False)
    named = [entry for entry in V3 if 0x8000_0002 <= entry.function <= 0x8000_0004]
    words = [word for entry in named for word in (entry.eax, entry.ebx, entry.ecx, entry.edx)]
    brand = b"".join(word.to_bytes(4, "little") for word in words)
    assert brand.rstrip(b"\0") == b"loopvisor x86-64-v3"


def test_the_area_of_xsave_has_room_for_the_upper_halves() -> None:
    """SDM 2A CPUID, leaf 0DH: offset and size of component 2; the size of all that can be enabled."""
    leaf = {entry.index: entry for entry in V3 if entry.function == 0xD}
    assert (leaf[0].eax, leaf[0].ecx, leaf[2].eax, leaf[2].ebx) == (7, 832, 256, 576)


def test_a_core_that_lacks_a_part_of_v3_does_not_have_the_model() -> None:
    with pytest.raises(HostError, match=r"cpu_model v3: this host's core has no avx2; --cpu-model v2"):
        table("v3", without_avx2(V3))
    assert unavailable("v3", V2) != []
    assert unavailable("v3", V3) == unavailable("v2", V2) == []
    assert names(table("v3", V3)) == names(V3)


def test_aes_is_left_out_where_the_host_has_none() -> None:
    supported = [replace(entry, ecx=entry.ecx & ~(1 << 25)) if entry.function == 1 else entry for entry in V3]
    assert names(table("v3", supported)) == names(V3) - {"aes"}


def test_a_guest_of_v2_runs_on_a_core_of_v3_and_not_the_other_way_round() -> None:
    assert lacking(table("v2", V3), V3) == []
    assert set(lacking(table("v3", V3), V2)) >= V3_NAMES - {"movbe"}


def test_what_a_core_without_avx_and_one_with_it_have_in_common_has_the_smaller_area() -> None:
    shared = common(table("v3", V3), V2)
    assert not has_avx(shared)
    assert next((entry.eax, entry.ecx) for entry in shared if (entry.function, entry.index) == (0xD, 0)) == (3, 576)


def test_max_is_host() -> None:
    assert table("max", V3) == table("host", V3) == list(V3)
    assert set(NAMES) == {*MODELS, "max", "host"}
