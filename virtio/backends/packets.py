"""IP packets in Ethernet frames, as far as a policy has to understand them. Frames come from a guest. Pure."""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

from virtio.backends.rules import Address

ETHERNET = 14
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58


class IpPacket(NamedTuple):
    """What the policy needs of an IP packet; ports 0 for protocols without."""

    source: Address
    target: Address
    protocol: int
    source_port: int
    target_port: int
    payload: bytes
    """Behind the header of UDP; else behind that of IP."""

    def __str__(self) -> str:
        name = {TCP: "TCP", UDP: "UDP", ICMP: "ICMP", ICMPV6: "ICMP"}.get(self.protocol, f"protocol {self.protocol}")
        if self.protocol not in (TCP, UDP):
            return f"{name} to {self.target}"
        where = f"[{self.target}]" if self.target.version == 6 else str(self.target)
        return f"{name} to {where}:{self.target_port}"


def packet(frame: bytes) -> IpPacket | str:
    """The packet in an Ethernet frame, or why it is refused."""
    kind = int.from_bytes(frame[12:14], "big")
    data = frame[ETHERNET:]
    source: Address
    target: Address
    if kind == IPV4:
        if len(data) < 20 or data[0] != 0x45:
            return "an IPv4 packet with options, or none"
        if int.from_bytes(data[6:8], "big") & 0x3FFF:
            return "a fragment of a packet"
        end, protocol, start = int.from_bytes(data[2:4], "big"), data[9], 20
        source, target = ipaddress.IPv4Address(data[12:16]), ipaddress.IPv4Address(data[16:20])
    elif kind == IPV6:
        if len(data) < 40 or data[0] >> 4 != 6:
            return "no IPv6 packet"
        end, protocol, start = 40 + int.from_bytes(data[4:6], "big"), data[6], 40
        source, target = ipaddress.IPv6Address(data[8:24]), ipaddress.IPv6Address(data[24:40])
    else:
        return f"a frame of type {kind:#06x}"
    if not start <= end <= len(data):
        return "a packet longer than its frame"
    body = data[start:end]
    if protocol == TCP and len(body) >= 20 or protocol == UDP and len(body) >= 8:
        ports = struct.unpack_from(">HH", body)
        return IpPacket(source, target, protocol, ports[0], ports[1], body[8:] if protocol == UDP else body)
    if protocol in (ICMP, ICMPV6) and len(body) >= 4:
        return IpPacket(source, target, protocol, 0, 0, body)
    return f"a packet of protocol {protocol} to {target}"


def datagram(frame: bytes, found: IpPacket, message: bytes) -> bytes:
    """A UDP message back to who sent this one, as a frame."""
    udp = struct.pack(">HHHH", found.target_port, found.source_port, 8 + len(message), 0) + message
    source, target = found.target.packed, found.source.packed
    total = checksum(source + target + struct.pack(">HH", UDP, len(udp)) + udp) or 0xFFFF
    udp = udp[:6] + total.to_bytes(2, "big") + udp[8:]
    if found.target.version == 4:
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, UDP, 0, source, target)
        head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    else:
        head = struct.pack(">IHBB16s16s", 6 << 28, len(udp), UDP, 64, source, target)
    return frame[6:12] + frame[:6] + frame[12:14] + head + udp


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
