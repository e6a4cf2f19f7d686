"""What source and target of a migration say to each other: frames, and typed messages in them. Pure: no sockets.

A frame is a header of 16 bytes, little-endian, and a payload:

    u8 kind, u8 flags, u16 0, u32 length of the payload, u32 CRC-32C of the payload, u32 CRC-32C of the 12 bytes before

The payload of PAGES and DISK is binary (below), of the other kinds a message: a declared dataclass as JSON, parsed
whole by vmm/state/payload.py. The first frame of each side of a connection is HELLO; the highest version that both have
is spoken. A peer is hostile: what is malformed, too long or out of turn raises StateError, and no frame makes its
reader keep more than its kind's limit.

Version 1: one connection, no compression, no disks' contents. Version 2 has them; version 3 has post-copy: MISSING
says which pages will come later, and one more connection, the page link (FETCH; RECOVER after it broke), brings
them. After that frame it carries PAGES and PINGs one way, WANT and DONE the other; vmm/native/frame.h speaks it.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from cpu.contract import CpuidEntry
from cpu.state import MAX_CPUID
from cpu.values import I64, U32, U64
from vmm._native import crc32c
from vmm.errors import StateError
from vmm.state.payload import encode, parse

VERSION, OLDEST = 3, 1
HEADER = struct.Struct("<BBHIII")
_CHECKED = struct.Struct("<BBHII")
PAGE = 4096
PAGES = struct.Struct("<III")
"""Of PAGES: the region's number, the page of it that the table counts from, runs in the table. The table (8 bytes a
run) and the pages themselves follow."""
DISK = struct.Struct("<IIQQ")
"""Of DISK: the disk's place in the offer, 0 for data and 1 for zeroes, where, how many bytes. Data follows."""
TABLE_BYTES = 8 << 10
DATA_BYTES = 1 << 20
"""Of pages in one frame at most."""
DISK_BYTES = 1 << 20
MISSING = struct.Struct("<II")
"""Of MISSING: the region's number, the page that bit 0 of the bitmap which follows (64-bit words) stands for."""
MISSING_BYTES = 1 << 20
"""Of a bitmap in one frame at most."""
COMPRESSED = 1
"""A flag: the payload is a zstd frame."""
MAX_CONNECTIONS = 16
MAX_STOOD_NS = 86_400 * 10**9
TOKEN = 16


class Kind(enum.IntEnum):
    """Kinds of frames."""

    HELLO = 1
    OFFER = 2
    ACCEPT = 3
    REFUSE = 4
    JOIN = 5
    PAGES = 6
    ROUND = 7
    ROUND_DONE = 8
    STATE = 9
    READY = 10
    HANDOVER = 11
    TAKEN = 12
    COMMIT = 13
    RUNNING = 14
    DONE = 15
    PING = 16
    ASK = 17
    ANSWER = 18
    DISK = 19
    FETCH = 20
    RECOVER = 21
    MISSING = 22
    WANT = 23
    RECOVERED = 24


_BULK = DATA_BYTES + TABLE_BYTES + 64
_SMALL = 64 << 10
LIMITS = {kind: _SMALL for kind in Kind} | {
    Kind.OFFER: 4 << 20,
    Kind.STATE: 64 << 20,
    Kind.PAGES: _BULK,
    Kind.DISK: DISK_BYTES + 64,
    Kind.MISSING: MISSING_BYTES + 64,
}
"""Bytes of a payload at most, by kind; also after decompression."""


def header(kind: Kind, length: int, crc: int, flags: int = 0) -> bytes:
    """A frame's header for a payload of `length` bytes with this CRC-32C."""
    head = _CHECKED.pack(kind, flags, 0, length, crc)
    return head + crc32c(head).to_bytes(4, "little")


def parse_header(data: bytes | bytearray | memoryview) -> tuple[Kind, int, int, int]:
    """(kind, flags, length, crc). Raises StateError."""
    kind, flags, zero, length, crc, own = HEADER.unpack(data)
    if crc32c(memoryview(data)[:12]) != own:
        raise StateError("the stream is damaged: a frame's header does not fit its checksum")
    try:
        kind = Kind(kind)
    except ValueError:
        raise StateError(f"a frame of kind {kind}, which this program does not know") from None
    if zero or flags & ~COMPRESSED:
        raise StateError(f"a frame with flags {flags:#x}, which this program does not know")
    if length > LIMITS[kind]:
        raise StateError(f"a frame of {length} bytes; {kind.name} has at most {LIMITS[kind]}")
    return kind, flags, length, crc


def check_payload(crc: int, payload: memoryview) -> None:
    """Raises StateError."""
    if crc32c(payload) != crc:
        raise StateError("the stream is damaged: a payload does not fit its checksum")


# ---- messages ----

Text = Annotated[str, range(1025)]
Token = Annotated[bytes, range(TOKEN, TOKEN + 1)]


@dataclass(frozen=True, slots=True)
class Hello:
    """The first of each side."""

    kind: ClassVar = "loopvisor-migration"
    version: ClassVar = 1
    oldest: U32
    """Version of the protocol that is still spoken."""
    newest: U32


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of guest memory."""

    start: U64
    size: U64


@dataclass(frozen=True, slots=True)
class DiskOffer:
    """A disk and how it comes."""

    name: Text
    how: Literal["shared", "reference", "overlay", "copy"]
    """shared: the same file, whose lock is handed over; reference: the same file, only read; overlay: likewise, and
    what was written above it is sent; copy: all of it is sent."""
    path: Annotated[str, range(4097)]
    capacity: U64
    format: Literal["raw", "qcow2"]
    fingerprint: Annotated[bytes, range(33)]
    """SHA-256 of a part of a file that is only read; empty for others."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What the source would send."""

    kind: ClassVar = "offer"
    version: ClassVar = 1
    protocol: U32
    token: Token
    """Of this migration; whoever knows it belongs to it."""
    program: Text
    name: Text
    config: Annotated[str, range(1 << 20)]
    """The machine's configuration, JSON."""
    regions: Annotated[tuple[Region, ...], range(1, 65)]
    core: Text
    cpuid: Annotated[tuple[CpuidEntry, ...], range(MAX_CPUID + 1)]
    """What the guest was told."""
    tsc_khz: U64
    epoch_ns: I64
    payloads: Annotated[dict[str, U32], range(513)]
    """Component -> version of its state."""
    disks: Annotated[tuple[DiskOffer, ...], range(65)]
    connections: Annotated[int, range(1, MAX_CONNECTIONS + 1)]
    compress: bool
    postcopy: bool
    paused: bool
    """It stands still, and is to do so there."""


@dataclass(frozen=True, slots=True)
class Accept:
    """The target is built and waits."""

    kind: ClassVar = "accept"
    version: ClassVar = 1
    core: Text
    name: Text
    """What the machine is called there."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """It will not do."""

    kind: ClassVar = "refuse"
    version: ClassVar = 1
    fault: Literal["ConfigError", "StateError", "HostError", "GuestError"]
    error: Annotated[str, range(4097)]


@dataclass(frozen=True, slots=True)
class Join:
    """One more connection of a migration."""

    kind: ClassVar = "join"
    version: ClassVar = 1
    token: Token
    index: Annotated[int, range(1, MAX_CONNECTIONS)]


@dataclass(frozen=True, slots=True)
class Round:
    """Everything of a round was sent on this connection, or has arrived on all."""

    kind: ClassVar = "round"
    version: ClassVar = 1
    number: U32


@dataclass(frozen=True, slots=True)
class Handover:
    """The disks are given up. Without a payload before version 3."""

    kind: ClassVar = "handover"
    version: ClassVar = 1
    stood_ns: Annotated[int, range(MAX_STOOD_NS + 1)]
    """How long ago the state was taken when this arrives, as far as is known."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The source will not run again: the target's turn."""

    kind: ClassVar = "commit"
    version: ClassVar = 1
    paused: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """A source that lost its connection asks what became of its machine; `drop`: a machine that was not told to run is
    to be given up."""

    kind: ClassVar = "ask"
    version: ClassVar = 1
    token: Token
    drop: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """running: it has taken over. dropped: it never will. unknown: no such migration here."""

    kind: ClassVar = "answer"
    version: ClassVar = 1
    state: Literal["running", "waiting", "dropped", "unknown"]


@dataclass(frozen=True, slots=True)
class Fetch:
    """This connection is the page link of a migration."""

    kind: ClassVar = "fetch"
    version: ClassVar = 1
    token: Token


@dataclass(frozen=True, slots=True)
class Recover:
    """This connection is to be the page link of a machine that runs already, and whose link broke."""

    kind: ClassVar = "recover"
    version: ClassVar = 1
    token: Token


@dataclass(frozen=True, slots=True)
class Recovered:
    """waiting: it needs pages, which so many frames of MISSING name; then the pages are to come. whole: it needs none.
    unknown: no such machine here."""

    kind: ClassVar = "recovered"
    version: ClassVar = 1
    state: Literal["waiting", "whole", "unknown"]
    frames: U32


MESSAGES: dict[Kind, type] = {
    Kind.HELLO: Hello,
    Kind.OFFER: Offer,
    Kind.ACCEPT: Accept,
    Kind.REFUSE: Refuse,
    Kind.JOIN: Join,
    Kind.ROUND: Round,
    Kind.ROUND_DONE: Round,
    Kind.HANDOVER: Handover,
    Kind.COMMIT: Commit,
    Kind.ASK: Ask,
    Kind.ANSWER: Answer,
    Kind.FETCH: Fetch,
    Kind.RECOVER: Recover,
    Kind.RECOVERED: Recovered,
}
"""What the payload of each kind is; others have none, or are binary."""
EMPTY = (Kind.READY, Kind.TAKEN, Kind.RUNNING, Kind.DONE, Kind.PING)
"""Kinds without a payload."""


def parse_missing(payload: bytes | memoryview) -> tuple[int, int, bytes]:
    """Of MISSING: (region, the page that the first bit stands for, the bitmap's words). Raises StateError."""
    if len(payload) <= MISSING.size or len(payload) % 8:
        raise StateError("a MISSING frame that is malformed")
    region, first = MISSING.unpack_from(payload)
    if first % 64:
        raise StateError("a MISSING frame that is malformed")
    return region, first, bytes(payload[MISSING.size :])


def pack(message: Any) -> bytes:
    """A message as a payload."""
    return json.dumps(encode(message), separators=(",", ":")).encode()


def unpack(kind: Kind, payload: bytes | bytearray | memoryview) -> Any:
    """A payload as a message; bytes of a kind that has none declared. Raises StateError."""
    if kind in EMPTY:
        if len(payload):
            raise StateError(f"{kind.name} with a payload")
        return None
    if kind is Kind.HANDOVER and not len(payload):
        return None
    declared = MESSAGES.get(kind)
    if declared is None:
        return bytes(payload)
    return parse(declared, kind.name.lower(), load(kind.name.lower(), payload))


def load(what: str, payload: bytes | bytearray | memoryview) -> Any:
    """JSON from a peer. Raises StateError."""
    try:
        return json.loads(bytes(payload).decode())
    except (ValueError, RecursionError) as error:
        raise StateError(f"{what}: not JSON: {str(error)[:200]}") from None


def common_version(theirs: Hello, *, newest: int = VERSION) -> int:
    """The version that both sides speak. Raises StateError."""
    found = min(newest, theirs.newest)
    if found < max(OLDEST, theirs.oldest):
        raise StateError(
            f"the other side speaks versions {theirs.oldest} to {theirs.newest} of the migration's protocol, "
            f"this one {OLDEST} to {newest}; update the older"
        )
    return found
