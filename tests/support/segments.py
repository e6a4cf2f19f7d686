"""TCP segments in Ethernet frames, made and read in Python: what a test puts on a wire and finds there."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

FIN, SYN, RST, ACK = 1, 2, 4, 16


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Segment:
    """One segment and where it goes; addresses as text, of both versions."""

    source_mac: bytes
    target_mac: bytes
    source: str
    target: str
    source_port: int
    target_port: int
    flags: int
    seq: int = 0
    ack: int = 0
    data: bytes = b""

    def frame(self) -> bytes:
        """As a card sends it, with its checksums."""
        source, target = (ipaddress.ip_address(text).packed for text in (self.source, self.target))
        ports = struct.pack(">HHII", self.source_port, self.target_port, self.seq, self.ack)
        tcp = ports + struct.pack(">BBHHH", 0x50, self.flags, 1000, 0, 0) + self.data
        pseudo = source + target + struct.pack(">HH", 6, len(tcp))
        tcp = tcp[:16] + checksum(pseudo + tcp).to_bytes(2, "big") + tcp[18:]
        if len(source) == 4:
            head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 7, 0x4000, 64, 6, 0, source, target)
            head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
            kind = b"\x08\0"
        else:
            head = struct.pack(">IHBB16s16s", 6 << 28, len(tcp), 6, 64, source, target)
            kind = b"\x86\xdd"
        return self.target_mac + self.source_mac + kind + head + tcp

    @classmethod
    def read(cls, frame: bytes) -> Segment:
        """The segment in a frame; AssertionError if a length or a checksum is wrong."""
        ip = frame[14:]
        if frame[12:14] == b"\x08\0":
            assert ip[0] == 0x45 and checksum(ip[:20]) == 0 and ip[9] == 6
            total, size, source, target = int.from_bytes(ip[2:4], "big"), 20, ip[12:16], ip[16:20]
        else:
            assert frame[12:14] == b"\x86\xdd" and ip[0] >> 4 == 6 and ip[6] == 6
            total, size, source, target = 40 + int.from_bytes(ip[4:6], "big"), 40, ip[8:24], ip[24:40]
        assert total == len(ip)
        tcp = ip[size:]
        assert checksum(source + target + struct.pack(">HH", 6, len(tcp)) + tcp) == 0
        ports = struct.unpack_from(">HHIIBB", tcp)
        header = (ports[4] >> 4) * 4
        return cls(
            frame[6:12], frame[:6], str(ipaddress.ip_address(source)), str(ipaddress.ip_address(target)),
            ports[0], ports[1], ports[5], ports[2], ports[3], tcp[header:],
        )  # fmt: skip
