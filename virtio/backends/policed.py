"""Another backend behind a policy: every frame of the guest is looked at, and only what the policy allows goes on.

Names are resolved here, by the host's own resolver, whichever server the guest asks: so no message of the guest gets
to a name server, and only addresses that it was told are its to reach. What is not plainly understood is refused: VLAN
tags, fragments, IP options and extension headers, other protocols, addresses and hardware addresses that are not the
guest's. Loop thread only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from virtio.backends import dns
from virtio.backends.net import NetBackend
from virtio.backends.rules import Address, Egress

ETHERNET = 14
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
NEIGHBOURS = range(133, 137)
"""ICMPv6 types of neighbour discovery (RFC 4861, 4) that a host sends; redirects are a router's."""
DNS, DHCP_SERVER, DHCP_CLIENT = 53, 67, 68
MAX_QUESTIONS = 64
"""Names that are looked up at once."""
MAX_WAITING = 256
"""Answers that wait for the guest."""
MAX_FLOWS = 4096
"""Connections from outside to published ports that are remembered."""
TOLD = 20
"""Destinations whose refusal is told, each once."""
NOBODY = ipaddress.IPv4Address(0)
Resolve = Callable[[str, int], "asyncio.Future[list[Address]]"]


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


async def host_addresses(name: str, kind: int) -> list[Address]:
    """What the host's resolver says of a name. OSError if it says nothing."""
    family = socket.AF_INET if kind == dns.A else socket.AF_INET6
    found = await asyncio.get_running_loop().getaddrinfo(name, None, family=family, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(item[4][0]).partition("%")[0]) for item in found]


class PolicedNet(NetBackend):
    """`inner` behind a policy, for a card with this hardware address."""

    def __init__(
        self, inner: NetBackend, mac: bytes, policy: Egress, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """`tell` hears of each refused destination once, up to TOLD of them."""
        self.inner, self.policy = inner, policy
        self.mtu, self.keeps_connections = inner.mtu, inner.keeps_connections
        self.refused: Counter[str] = Counter()
        """Frames that were refused, by why; destinations are one entry."""
        self.resolve = host_addresses
        self._mac, self._tell = mac, tell
        self._told: set[str] = set()
        self._address: Address | None = None
        self._flows: OrderedDict[tuple[Address, int, int], None] = OrderedDict()
        self._answers: deque[bytes] = deque()
        self._arrived = asyncio.Event()
        self._receiving: asyncio.Task[bytes] | None = None
        self._questions: set[asyncio.Task[None]] = set()

    async def send(self, frame: bytes) -> None:
        why = self._judge(frame)
        if why is None:
            await self.inner.send(frame)
        elif why:
            self._refuse(why)

    async def receive(self) -> bytes:
        while True:
            if self._answers:
                return self._answers.popleft()
            if self._receiving is None:
                self._receiving = asyncio.create_task(self.inner.receive(), name="policed-net")
            self._arrived.clear()
            waiting = asyncio.create_task(self._arrived.wait(), name="policed-net-answers")
            try:
                await asyncio.wait({self._receiving, waiting}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if self._receiving.done():
                done, self._receiving = self._receiving, None
                frame = done.result()
                self._note(frame)
                return frame

    async def aclose(self) -> None:
        tasks = [*self._questions, *([self._receiving] if self._receiving is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._receiving = None
        await self.inner.aclose()

    def _judge(self, frame: bytes) -> str | None:
        """None: it goes on. Otherwise why not; "" if it was answered here."""
        if len(frame) < ETHERNET or frame[6:12] != self._mac:
            return "a frame with another hardware address"
        kind = int.from_bytes(frame[12:14], "big")
        if kind == ARP:
            return None if self._is_our_arp(frame[ETHERNET:]) else "an ARP packet with another address"
        if kind == IPV6 and frame[:2] == b"\x33\x33" and frame[20:21] == b"\0":
            return ""  # multicast listener reports (RFC 3810, 5), which every system sends and nobody needs
        found = packet(frame)
        if isinstance(found, str):
            return found
        if found.protocol == UDP and found.target_port == DNS and not self._is_listed(found):
            return self._ask(frame, found)
        if found.target.version == 6:
            return self._judge_6(found)
        if found.protocol == UDP and (found.source_port, found.target_port) == (DHCP_CLIENT, DHCP_SERVER):
            return None
        if self._address is None and found.source != NOBODY:
            self._address = found.source  # a machine that goes on from a snapshot has its lease already
        if found.source != self._address:
            return "a packet from another address"
        return self._judge_target(found)

    def _judge_6(self, found: IpPacket) -> str | None:
        if found.protocol == ICMPV6 and found.payload[0] in NEIGHBOURS:
            near = found.target.is_link_local or found.target.is_multicast
            return None if near or found.payload[0] >= 135 else str(found)
        return self._judge_target(found)

    def _judge_target(self, found: IpPacket) -> str | None:
        if self.policy.may_reach(found.target, found.target_port):
            return None
        if found.protocol == TCP and (found.target, found.target_port, found.source_port) in self._flows:
            return None
        return str(found)

    def _is_our_arp(self, data: bytes) -> bool:
        """RFC 826: hardware and protocol of Ethernet and IPv4, and the sender is who the guest is."""
        if len(data) < 28 or data[:6] != b"\0\1\x08\0\6\4" or data[8:14] != self._mac:
            return False
        sender = ipaddress.IPv4Address(data[14:18])
        return sender == NOBODY or self._address is None or sender == self._address

    def _is_listed(self, found: IpPacket) -> bool:
        """A name server that a rule names by its address is spoken to directly."""
        return any(
            rule.network is not None and rule.port == DNS and found.target in rule.network for rule in self.policy.allow
        )

    def _note(self, frame: bytes) -> None:
        """What comes from outside: the guest's address in an answer of DHCP, and connections to published ports."""
        if len(frame) < ETHERNET + 20 or frame[12:14] not in (b"\x08\0", b"\x86\xdd"):
            return
        found = packet(frame)
        if isinstance(found, str):
            return
        if found.protocol == UDP and (found.source_port, found.target_port) == (DHCP_SERVER, DHCP_CLIENT):
            if len(found.payload) >= 240 and found.payload[16:20] != bytes(4):
                self._address = ipaddress.IPv4Address(found.payload[16:20])
        elif found.protocol == TCP and found.payload[13] & 0x12 == 0x02:  # SYN without ACK: somebody connects
            self._flows[found.source, found.source_port, found.target_port] = None
            if len(self._flows) > MAX_FLOWS:
                self._flows.popitem(last=False)

    def _refuse(self, why: str) -> None:
        self.refused["destination" if " to " in why else "name" if why.startswith("the name ") else why] += 1
        if len(self._told) < TOLD and why not in self._told:
            self._told.add(why)
            more = "; more is only counted" if len(self._told) == TOLD else ""
            self._tell(f"refused by the network's policy: {why}{more}")

    def _ask(self, frame: bytes, found: IpPacket) -> str:
        question = dns.parse(found.payload)
        if question is None:
            return "a message for a name server that is no plain question"
        if not self.policy.may_ask(question.name):
            self._reply(frame, found, dns.answer(question, dns.NAME_ERROR))
            return f"the name {question.name[:253]}"
        if question.kind not in (dns.A, dns.AAAA):
            self._reply(frame, found, dns.answer(question, dns.NO_ERROR))
            return ""
        if len(self._questions) >= MAX_QUESTIONS:
            return "too many questions for a name server at once"
        task = asyncio.create_task(self._look_up(frame, found, question), name="policed-net-name")
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)
        return ""

    async def _look_up(self, frame: bytes, found: IpPacket, question: dns.Question) -> None:
        try:
            addresses = await self.resolve(question.name, question.kind)
        except socket.gaierror as error:
            # A name without addresses of this kind is no error; which of the two it is, the host does not say.
            missing = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
            code = dns.NAME_ERROR if question.kind == dns.A else dns.NO_ERROR
            code = code if missing else dns.SERVER_FAILURE
            self._reply(frame, found, dns.answer(question, code))
            return
        except (OSError, UnicodeError):
            self._reply(frame, found, dns.answer(question, dns.SERVER_FAILURE))
            return
        allowed = [item for item in addresses[: dns.MAX_ANSWERS] if self.policy.learn(question.name, item)]
        self._reply(frame, found, dns.answer(question, dns.NO_ERROR, allowed))

    def _reply(self, frame: bytes, found: IpPacket, message: bytes) -> None:
        """The message as a packet from whom the guest asked."""
        if len(self._answers) >= MAX_WAITING:
            return
        udp = struct.pack(">HHHH", DNS, found.source_port, 8 + len(message), 0) + message
        source, target = found.target.packed, found.source.packed
        total = checksum(source + target + struct.pack(">HH", UDP, len(udp)) + udp) or 0xFFFF
        udp = udp[:6] + total.to_bytes(2, "big") + udp[8:]
        if found.target.version == 4:
            head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, UDP, 0, source, target)
            head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
        else:
            head = struct.pack(">IHBB16s16s", 6 << 28, len(udp), UDP, 64, source, target)
        self._answers.append(frame[6:12] + frame[:6] + frame[12:14] + head + udp)
        self._arrived.set()


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
