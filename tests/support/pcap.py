"""What Wireshark reads of a pcap file: frames, and the bytes of TCP streams in them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Segment:
    """One TCP segment over IPv4."""

    source: tuple[bytes, int]
    target: tuple[bytes, int]
    sequence: int
    opens: bool
    """SYN"""
    data: bytes


def frames(path: Path) -> list[tuple[int, bytes]]:
    """(time in ns, Ethernet frame) each. AssertionError if it is no pcap file of nanoseconds, link type Ethernet."""
    data = path.read_bytes()
    magic, major, minor, zone, accuracy, _, link = struct.unpack_from("<IHHiIII", data)
    assert (magic, major, minor, zone, accuracy, link) == (0xA1B23C4D, 2, 4, 0, 0, 1)
    found, at = [], 24
    while at < len(data):
        seconds, nanoseconds, length, original = struct.unpack_from("<IIII", data, at)
        assert length == original and nanoseconds < 10**9
        found.append((seconds * 10**9 + nanoseconds, data[at + 16 : at + 16 + length]))
        at += 16 + length
    assert at == len(data), "the last record is whole"
    return found


def segments(path: Path) -> list[Segment]:
    found = []
    for _, frame in frames(path):
        if frame[12:14] != b"\x08\x00" or frame[23] != 6:
            continue
        ip = frame[14 : 14 + int.from_bytes(frame[16:18], "big")]
        tcp = ip[4 * (ip[0] & 15) :]
        source, target, sequence = struct.unpack_from("!HHI", tcp)
        data = tcp[4 * (tcp[12] >> 4) :]
        found.append(Segment((ip[12:16], source), (ip[16:20], target), sequence, bool(tcp[13] & 2), data))
    return found


def stream(path: Path, port: int) -> bytes:
    """What came from TCP port `port` of the only connection to it, in order and once, however often it was sent."""
    parts = [part for part in segments(path) if part.source[1] == port]
    first = next(part.sequence for part in parts if part.opens) + 1
    data = bytearray()
    for part in sorted(parts, key=lambda part: (part.sequence - first & 0xFFFFFFFF, len(part.data))):
        at = part.sequence - first & 0xFFFFFFFF
        if not part.data or at + len(part.data) <= len(data):
            continue
        assert at <= len(data), "a part is missing"
        data[at:] = part.data
    return bytes(data)
