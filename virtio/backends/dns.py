"""DNS messages as far as a resolver of names to addresses needs them: one question, answers of type A and AAAA.

Source: RFC 1035, 4.1; RFC 3596. Messages come from a guest: what is not as it should be is None. Pure.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass

HEAD = struct.Struct(">HHHHHH")
A, CNAME, AAAA, IN = 1, 5, 28, 1
NO_ERROR, SERVER_FAILURE, NAME_ERROR, NOT_IMPLEMENTED, REFUSED = 0, 2, 3, 4, 5
MAX_RECORDS = 64
"""Records of an answer that are looked at."""
SIZES = {A: 4, AAAA: 16}
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


def is_name(name: str) -> bool:
    """Whether `parse` can have given it: at most 255 bytes with the lengths of its labels (RFC 1035, 2.3.4)."""
    return 0 < len(name) <= 253 and name.isprintable() and name == name.lower()


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
    if family != IN or any(b"." in label for label in labels) or not is_name(name):
        return None
    return Question(identity, name, kind, data[HEAD.size : at + 4], bool(flags & 0x100))


@dataclass(frozen=True, slots=True)
class NameAnswer:
    """What a name server says: addresses of the name that was asked for, or of what it is another name of."""

    code: int
    addresses: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...]
    truncated: bool


def query(identity: int, name: str, kind: int) -> bytes:
    """A question to a name server. `name` is one that `parse` gave."""
    labels = b"".join(bytes([len(label)]) + label for label in name.encode("ascii", "replace").split(b"."))
    return HEAD.pack(identity, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, IN)


def parse_answer(data: bytes, identity: int, question: bytes) -> NameAnswer | None:
    """The answer to a question that `query` made (without its head), or None for all else."""
    if len(data) < HEAD.size + len(question):
        return None
    said, flags, questions, answers, _, _ = HEAD.unpack_from(data)
    at = HEAD.size + len(question)
    if said != identity or flags & 0xF800 != 0x8000 or questions != 1:
        return None
    if data[HEAD.size : at].lower() != question.lower():
        return None
    if flags & 0x200:
        return NameAnswer(flags & 15, (), True)
    asked, after = _name(data, HEAD.size)
    kind = struct.unpack_from(">H", question, len(question) - 4)[0]
    if asked is None or after + 4 != at:
        return None
    aliases: dict[bytes, bytes] = {}
    found: list[tuple[bytes, ipaddress.IPv4Address | ipaddress.IPv6Address]] = []
    for _ in range(min(answers, MAX_RECORDS)):
        owner, at = _name(data, at)
        if owner is None or at + 10 > len(data):
            return None
        what, family, _, size = struct.unpack_from(">HHIH", data, at)
        at += 10
        if at + size > len(data):
            return None
        if family == IN and what == kind and size == SIZES.get(kind):
            found.append((owner, ipaddress.ip_address(data[at : at + size])))
        elif family == IN and what == CNAME:
            target, _ = _name(data, at)
            if target is None:
                return None
            aliases.setdefault(owner, target)
        at += size
    names = {asked}
    while asked in aliases and aliases[asked] not in names:
        asked = aliases[asked]
        names.add(asked)
    return NameAnswer(flags & 15, tuple([address for owner, address in found if owner in names]), False)


def _name(data: bytes, at: int) -> tuple[bytes | None, int]:
    """A name in lower case, as labels with their lengths, and where it ends. RFC 1035, 4.1.4: pointers go backwards."""
    labels, end, least = b"", 0, at
    while True:
        if at >= len(data) or len(labels) > 255:
            return None, 0
        size = data[at]
        if size & 0xC0 == 0xC0:
            if at + 2 > len(data):
                return None, 0
            end = end or at + 2
            at = int.from_bytes(data[at : at + 2], "big") & 0x3FFF
            if at >= least:
                return None, 0
            least = at
        elif size > 63 or at + 1 + size > len(data):
            return None, 0
        elif not size:
            return labels.lower(), end or at + 1
        else:
            labels += data[at : at + 1 + size]
            at += 1 + size


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
