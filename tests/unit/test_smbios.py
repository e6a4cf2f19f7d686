"""SMBIOS by DSP0134: the entry point is found, and every structure can be walked."""

from __future__ import annotations

import sys
import uuid

import pytest

from vmm.firmware import smbios
from vmm.machine import layout


def test_5_2_2_entry_point() -> None:
    entry, structures = smbios.tables(uuid.UUID(int=1), "")
    parsed = smbios.ENTRY_POINT.parse(entry)
    assert len(entry) == parsed.length == 24 and sum(entry) % 256 == 0
    assert parsed.address == layout.SMBIOS.start + 32 and parsed.maximum_size == len(structures)
    assert parsed.address + len(structures) <= layout.SMBIOS.end


def test_6_1_structures_end_with_the_end_of_table() -> None:
    identity = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
    _, structures = smbios.tables(identity, "one")
    at, kinds = 0, []
    while at < len(structures):
        header = smbios.HEADER.parse(structures[at:])
        kinds.append(header.type)
        body = structures[at + 4 : at + header.length]
        end = structures.index(b"\0\0", at + header.length)
        strings = structures[at + header.length : end].split(b"\0")
        if header.type == 1:
            system = smbios.SYSTEM.parse(body)
            assert system.uuid[:4] == bytes.fromhex("33221100")
            assert strings[system.serial - 1] == b"one"
        at = end + 2
    assert kinds == [0, 1, 3, 127]


@pytest.mark.parametrize("quick", [True, False])
def test_a_machine_s_uuid_follows_from_its_name(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not quick:
        monkeypatch.setitem(sys.modules, "_sha1", None)
    assert smbios.name_uuid("höst 1") == uuid.uuid5(uuid.NAMESPACE_URL, f"{smbios.NAME}:höst 1")
    assert smbios.name_uuid("a") != smbios.name_uuid("b")
