"""DNS messages as far as a resolver of names to addresses needs them: one question, answers of type A and AAAA.

Source: RFC 1035, 4.1; RFC 3596. Messages come from a guest: what is not as it should be is None. Pure.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass

HEAD = struct.Struct(">HHHHHH")
A, AAAA, IN = 1, 28, 1
NO_ERROR, SERVER_FAILURE, NAME_ERROR, NOT_IMPLEMENTED = 0, 2, 3, 4
SECONDS = 60
"""How long the guest may keep an answer."""
MAX_ANSWERS = 24
"""As many as fit in 512 bytes with the longest name (RFC 1035, 2.3.4)."""


@dataclass(frozen=True, slots=True)
class Question:
    """A query: `name` in lower case without the last dot, `raw` the question as it stood."""

    identity: int
    name: str
    kind: int
    raw: bytes
    recursion: bool


def parse(data: bytes) -> Question | None:
    """A standard query with one question of class IN."""
    if len(data) < HEAD.size:
        return None
    identity, flags, questions, answers, authorities, _ = HEAD.unpack_from(data)
    if flags & 0xF800 or questions != 1 or answers or authorities:
        return None
    labels, at = [], HEAD.size
    while True:
        if at >= len(data) or data[at] > 63:
            return None
        size = data[at]
        at += 1
        if not size:
            break
        labels.append(data[at : at + size])
        at += size
        if at - HEAD.size > 255:
            return None
    if at + 4 > len(data):
        return None
    kind, family = struct.unpack_from(">HH", data, at)
    name = b".".join(labels).decode("ascii", "replace").lower()
    if family != IN or not labels or not name.isprintable() or any(b"." in label for label in labels):
        return None
    return Question(identity, name, kind, data[HEAD.size : at + 4], bool(flags & 0x100))


def answer(
    question: Question, code: int, addresses: Sequence[ipaddress.IPv4Address | ipaddress.IPv6Address] = ()
) -> bytes:
    """The answer to a question; each address as a record of its own kind."""
    records = b"".join(
        struct.pack(">HHHIH", 0xC00C, A if item.version == 4 else AAAA, IN, SECONDS, len(item.packed)) + item.packed
        for item in addresses[:MAX_ANSWERS]
    )
    flags = 0x8080 | (0x100 if question.recursion else 0) | code
    return HEAD.pack(question.identity, flags, 1, min(len(addresses), MAX_ANSWERS), 0, 0) + question.raw + records
