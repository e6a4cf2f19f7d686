"""The struct.Struct views of the start-up path are their construct declarations."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from construct import Bytes, Const, FormatField, Renamed, Struct

from vmm.boot import elf, layouts, pvh


def form(declaration: Any) -> str:
    """The struct format of a declaration, one letter a field."""
    if isinstance(declaration, Renamed):
        return form(declaration.subcon)
    if isinstance(declaration, Struct):
        return "".join(form(part) for part in declaration.subcons)
    if isinstance(declaration, Const | Bytes):
        return f"{declaration.sizeof()}s"
    assert isinstance(declaration, FormatField)
    return str(declaration.fmtstr).replace("L", "I").lstrip("<")


@pytest.mark.parametrize(("view", "declaration"), [
    (elf.IDENT, layouts.IDENT), (elf.PROGRAMS[32], layouts.PROGRAM32), (elf.PROGRAMS[64], layouts.PROGRAM64),
    (elf.NOTE, layouts.NOTE), (pvh.START_INFO, layouts.START_INFO), (pvh.MODULE, layouts.MODULE),
    (pvh.MEMORY_MAP, layouts.MEMORY_MAP),
])
def test_views_are_the_declarations(view: struct.Struct, declaration: Any) -> None:
    assert view.format == "<" + form(declaration)


@pytest.mark.parametrize(("bits", "declaration"), [(32, layouts.HEADER32), (64, layouts.HEADER64)])
def test_the_elf_header_after_its_identification(bits: int, declaration: Any) -> None:
    ident, *rest = declaration.subcons
    assert elf.HEADERS[bits].format == "<16s" + "".join(form(part) for part in rest)
    assert ident.sizeof() == 16
