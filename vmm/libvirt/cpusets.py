"""Sets of the host's processors, as libvirt writes them in XML and in its protocol. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from vmm.libvirt.errors import Code, LibvirtError

MAX_CPU = 1 << 14
MAX_TEXT = 1 << 17
"""Characters of a set; every processor by itself takes fewer."""


def cpu_set(text: str) -> frozenset[int]:
    """libvirt's notation, as 0-3,^2,8. Raises LibvirtError."""
    if len(text) > MAX_TEXT:
        raise LibvirtError(Code.XML_ERROR, f"cpuset {text[:80]!r}…: more than {MAX_TEXT} characters")
    found = 0  # a bit for each, so that a range takes as long as a single one
    for word in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\^?)([0-9]{1,5})(?:-([0-9]{1,5}))?", word)
        if match is None or int(match[3] or match[2]) >= MAX_CPU or int(match[3] or match[2]) < int(match[2]):
            raise LibvirtError(Code.XML_ERROR, f"cpuset {text[:80]!r}: no set of processors, as 0-3,^2")
        first, last = int(match[2]), int(match[3] or match[2])
        numbers = (1 << last + 1) - (1 << first)
        found = found & ~numbers if match[1] else found | numbers
    if not found:
        raise LibvirtError(Code.XML_ERROR, f"cpuset {text[:80]!r}: there is no processor in it")
    return frozenset(number for number in range(found.bit_length()) if found >> number & 1)


def cpu_text(cpus: Iterable[int]) -> str:
    """The same notation."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def cpu_map(cpus: Collection[int]) -> bytes:
    """The protocol's bitmap, as long as its greatest number needs."""
    data = bytearray(max(cpus, default=0) // 8 + 1)
    for cpu in cpus:
        data[cpu // 8] |= 1 << cpu % 8
    return bytes(data)


def from_map(data: bytes) -> frozenset[int]:
    """A bitmap of the protocol's. Raises LibvirtError if nothing is in it."""
    found = frozenset(8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1)
    if not found:
        raise LibvirtError(Code.INVALID_ARG, "the map has no processor")
    return found
