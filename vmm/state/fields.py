"""Integer fields of state declarations (vmm/state/payload.py), by their width in bits."""

from __future__ import annotations

from typing import Annotated

U8 = Annotated[int, range(1 << 8)]
U16 = Annotated[int, range(1 << 16)]
U32 = Annotated[int, range(1 << 32)]
U64 = Annotated[int, range(1 << 64)]
I64 = Annotated[int, range(-1 << 63, 1 << 63)]
