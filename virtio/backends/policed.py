"""Another backend behind a policy: every frame of the guest is looked at, and only what the policy allows goes on.

Names are resolved here, whichever server the guest asks: so no message of the guest gets to a name server, and only
addresses that it was told are its to reach. What is not plainly understood is refused: VLAN tags, fragments, IP options
and extension headers, other protocols, IPv4 and hardware addresses that are not the guest's. A guest's IPv6 addresses
are its own choice (RFC 8981 has it change them) and are not looked at: passt opens sockets of the host's, so none of
them leaves it, and whoever answers is known by its own address.

This module decides; virtio/native/fence.c keeps what it decided of each connection and looks at every frame. Loop
thread only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable

from virtio import _ring
from virtio.backends import dns
from virtio.backends.learned import PolicyState, Resolved
from virtio.backends.net import NetBackend
from virtio.backends.ownaddresses import Watch
from virtio.backends.packets import ARP, ETHERNET, ICMP, ICMPV6, IPV6, TCP, UDP, IpPacket, datagram, packet
from virtio.backends.rules import Address, Egress, may_be_told, stays_here
from virtio.errors import StateError

NEIGHBOURS = range(133, 137)
"""ICMPv6 types of neighbour discovery (RFC 4861, 4) that a host sends; redirects are a router's."""
ECHO_REPLIES = {ICMP: 0, ICMPV6: 129}
DNS, DHCP_SERVER, DHCP_CLIENT = 53, 67, 68
MAX_QUESTIONS = 64
"""Names that are looked up at once."""
MAX_FLOWS = 4096
"""Connections from outside to published ports that are remembered; beyond, the quarter not used for longest goes."""
FORMER = 8
"""Policies of before, whose connections are reset when this one forbids them."""
REASONS = 64
"""Reasons that refused frames are counted by; frames for further ones are "other", for a guest may send every type."""
TOLD = 20
"""Destinations whose refusal is told, each once."""
NOBODY = ipaddress.IPv4Address(0)
REFUSE, PASS, CUT, TAKEN, KEEP = 0, 1, 2, 3, 4
"""Verdicts (virtio/native/fence.h); KEEP with one of the first three: it stands for all of this connection."""
SYN, RST, ACK = 2, 4, 16
Resolve = Callable[[str, int], Awaitable[list[Address]]]


async def host_addresses(name: str, kind: int) -> list[Address]:
    """What the host's resolver says of a name. OSError if it says nothing."""
    family = socket.AF_INET if kind == dns.A else socket.AF_INET6
    found = await asyncio.get_running_loop().getaddrinfo(name, None, family=family, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(item[4][0]).partition("%")[0]) for item in found]


async def no_names(name: str, kind: int) -> list[Address]:
    """For a guest that has no names at all."""
    raise OSError("no names")


class PolicedNet(NetBackend):
    """`inner` behind a policy, for a card with this hardware address."""

    def __init__(
        self,
        inner: NetBackend,
        mac: bytes,
        policy: Egress,
        tell: Callable[[str], None] = lambda text: None,
        resolve: Resolve | None = None,
    ) -> None:
        """`resolve` gives the addresses of a name, by default the host's; no_names: it has none. `tell` hears
        of each refused destination once, up to TOLD of them."""
        self.inner, self.policy = inner, policy
        self.mtu, self.keeps_connections, self.channels = inner.mtu, inner.keeps_connections, inner.channels
        self._fence = self.fence = _ring.Fence(mac, self._verdict)
        self.resolve: Resolve = resolve or host_addresses
        self._refused: Counter[str] = Counter()
        self._mac, self._old_mac, self._tell = mac, mac, tell
        self._told: set[str] = set()
        self._address: Address | None = None
        self._flows: OrderedDict[tuple[Address, int, int], None] = OrderedDict()
        self._former: deque[Egress] = deque(maxlen=FORMER)
        self._arrived = asyncio.Event()
        self._replied: Callable[[], None] = lambda: None
        self._answers: deque[bytes] = deque()
        self._receiving: asyncio.Task[bytes] | None = None
        self._watch = Watch(self._fence.forget)  # an address that this host gets is closed from then on
        self._questions: set[asyncio.Task[None]] = set()

    @property
    def refused(self) -> Counter[str]:
        """Frames that were refused, by why; destinations are one entry."""
        found = Counter(self._refused)
        if self._fence.refused:
            found["destination"] += self._fence.refused
        return found

    def change(self, policy: Egress, resolve: Resolve | None = None) -> None:
        """Another policy from now on, and who resolves names. Addresses that the guest was told stay open as far as the
        new rules of their names say; a connection that it forbids is reset at its next frame, in either direction."""
        for address, names in self.policy.learned():
            policy.adopt(address, names)
        self._former.append(self.policy)
        self.policy, self.resolve = policy, resolve or host_addresses
        self._told.clear()
        self._fence.forget()

    def save(self) -> PolicyState:
        """The guest's address, and what it was told by names: that stays open, wherever the machine goes on."""
        guest = b"" if self._address is None else self._address.packed
        return PolicyState(guest, tuple([Resolved(item.packed, names) for item, names in self.policy.learned()]))

    def restorer(self, state: PolicyState) -> Callable[[], None]:
        """NetBackend.restorer. Names that this policy does not allow are left out."""
        if len(state.guest) not in (0, 4):
            raise StateError(f"policy: an IPv4 address has 4 bytes, not {len(state.guest)}")
        found: list[tuple[Address, tuple[str, ...]]] = []
        for item in state.resolved:
            if len(item.address) not in (4, 16):
                raise StateError(f"policy: an address has 4 or 16 bytes, not {len(item.address)}")
            address = ipaddress.ip_address(item.address)
            if not may_be_told(address):
                raise StateError(f"policy: no guest is told {address}")
            if not all(dns.is_name(name) for name in item.names):
                raise StateError(f"policy: {address} has what is no name")
            found.append((address, item.names))

        def take_over() -> None:
            if state.guest:
                self._know(ipaddress.IPv4Address(state.guest))
            for address, names in found:
                self.policy.adopt(address, names)
            self._fence.forget()

        return take_over

    def set_mac(self, mac: bytes) -> None:
        self._old_mac, self._mac = self._mac, mac
        self._fence.mac(mac)

    def on_replies(self, call: Callable[[], None]) -> None:
        self._replied = call

    async def send(self, frame: bytes) -> None:
        judged = self._fence.outgoing(frame)
        if judged is not None:
            await self.inner.send(judged)
        self._arrived.set()

    async def receive(self) -> bytes:
        while True:
            self._answers += self._fence.replies()
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
                passes, back = self._fence.incoming(frame)
                if back:
                    await self.inner.send(back)
                if passes:
                    return frame

    async def aclose(self) -> None:
        self._fence.close()
        self._watch.close()
        self.channels = ()
        tasks = [*self._questions, *([self._receiving] if self._receiving is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._receiving = None
        await self.inner.aclose()

    def _verdict(self, frame: bytes, outgoing: bool) -> int:
        """On a frame of which none stands."""
        if not outgoing:
            return self._judge_incoming(frame)
        verdict, why = self._judge(frame)
        if why:
            self._refuse(why)
        return verdict

    def _judge(self, frame: bytes) -> tuple[int, str]:
        """The verdict on a frame of the guest, and why it is refused if that is to be told."""
        if len(frame) < ETHERNET or frame[6:12] != self._mac:
            # a card whose address is just being changed says the old one for a moment
            return REFUSE, "" if frame[6:12] == self._old_mac else "a frame with another hardware address"
        kind = int.from_bytes(frame[12:14], "big")
        if kind == ARP:
            return (PASS, "") if self._is_our_arp(frame[ETHERNET:]) else (REFUSE, "an ARP packet with another address")
        if kind == IPV6 and frame[:2] == b"\x33\x33" and frame[20:21] == b"\0":
            return TAKEN, ""  # multicast listener reports (RFC 3810, 5), which every system sends and nobody needs
        found = packet(frame)
        if isinstance(found, str):
            return REFUSE, found
        if found.protocol == UDP and found.target_port == DNS and not self._is_server(found.target):
            why = self._ask(frame, found)
            return (REFUSE, why) if why else (TAKEN, "")
        if found.target.version == 6:
            if found.protocol == ICMPV6 and found.payload[0] in NEIGHBOURS:
                return self._judge_neighbour(found)
            return self._judge_target(found)
        if found.protocol == UDP and (found.source_port, found.target_port) == (DHCP_CLIENT, DHCP_SERVER):
            return PASS, ""
        if self._address is None and found.source != NOBODY:
            self._know(found.source)  # a machine that goes on from a snapshot has its lease already
        if found.source != self._address:
            return REFUSE, "a packet from another address"
        return self._judge_target(found)

    def _judge_neighbour(self, found: IpPacket) -> tuple[int, str]:
        """Neighbour discovery: on the link, and of nobody's hardware address but the card's."""
        kind, data = found.payload[0], found.payload
        near = found.target.is_link_local or found.target.is_multicast
        if not near and kind < 135:
            return REFUSE, str(found)
        at = {133: 8, 135: 24, 136: 24}.get(kind, len(data))
        while at + 8 <= len(data) and data[at + 1]:
            # RFC 4861, 4.6.1: source and target link-layer address, each of whom the message is about
            if data[at] in (1, 2) and data[at + 2 : at + 8] != self._mac:
                return REFUSE, "a neighbour message with another hardware address"
            at += 8 * data[at + 1]
        return PASS, ""

    def _judge_target(self, found: IpPacket) -> tuple[int, str]:
        begins = found.protocol == TCP and found.payload[13] & (SYN | ACK) == SYN
        if self._is_open(found.protocol, found.target, found.target_port, found.source_port, begins=begins):
            return PASS | KEEP, ""
        if found.protocol == TCP and not begins and self._was_open(found.target, found.target_port):
            return CUT | KEEP, str(found)
        # the kernel is asked only while somebody may hear the answer: a guest can try any number of destinations
        own = len(self._told) < TOLD and self.policy.is_own(found.target)
        return REFUSE | KEEP, f"{found}, an address of this host's own" if own else str(found)

    def _is_open(self, protocol: int, peer: Address, peer_port: int, port: int, *, begins: bool = False) -> bool:
        """`begins`: the guest's first segment of a connection, which is none that began outside."""
        if self.policy.may_reach(peer, peer_port):
            return True
        if protocol == UDP and peer_port == DNS and self._is_server(peer):
            return True
        flow = peer, peer_port, port
        if protocol != TCP or begins or flow not in self._flows:
            return False
        self._flows.move_to_end(flow)
        return True

    def _trim_flows(self) -> None:
        """Forget a quarter of them: those that no frame passed of for longest."""
        ages = {flow: self._fence.used(flow[0].packed, flow[1], flow[2]) for flow in self._flows}
        for flow in sorted(ages, key=ages.__getitem__)[: MAX_FLOWS // 4]:
            del self._flows[flow]

    def _was_open(self, peer: Address, port: int) -> bool:
        return any(policy.may_reach(peer, port) for policy in self._former)

    def _is_our_arp(self, data: bytes) -> bool:
        """RFC 826: hardware and protocol of Ethernet and IPv4, and the sender is who the guest is."""
        if len(data) < 28 or data[:6] != b"\0\1\x08\0\6\4" or data[8:14] != self._mac:
            return False
        sender = ipaddress.IPv4Address(data[14:18])
        return sender == NOBODY or self._address is None or sender == self._address

    def _is_server(self, address: Address) -> bool:
        """A name server that a rule names by its address is spoken to directly."""
        return not stays_here(address) and any(
            rule.network is not None and rule.port == DNS and address in rule.network for rule in self.policy.allow
        )

    def _judge_incoming(self, frame: bytes) -> int:
        """The verdict on a frame from outside: the guest's address in an answer of DHCP, connections to published
        ports, and what belongs to a connection of the guest."""
        found = packet(frame)
        if isinstance(found, str):
            return PASS
        if found.protocol == UDP and (found.source_port, found.target_port) == (DHCP_SERVER, DHCP_CLIENT):
            if len(found.payload) >= 240 and found.payload[16:20] != bytes(4):
                self._know(ipaddress.IPv4Address(found.payload[16:20]))
            return PASS
        if found.protocol == TCP and found.payload[13] & (SYN | ACK) == SYN:  # somebody connects
            self._flows[found.source, found.source_port, found.target_port] = None
            self._flows.move_to_end((found.source, found.source_port, found.target_port))
            if len(self._flows) > MAX_FLOWS:
                self._trim_flows()
            return PASS | KEEP
        if found.protocol not in (TCP, UDP) and found.payload[0] != ECHO_REPLIES.get(found.protocol):
            return PASS
        if self._is_open(found.protocol, found.source, found.source_port, found.target_port):
            return PASS | KEEP
        if found.protocol == TCP and self._was_open(found.source, found.source_port):
            return CUT | KEEP
        return REFUSE | KEEP

    def _know(self, address: Address) -> None:
        self._address = address
        self._fence.address(address.packed)

    def _refuse(self, why: str) -> None:
        reason = "destination" if " to " in why else "name" if why.startswith("the name ") else why
        self._refused[reason if reason in self._refused or len(self._refused) < REASONS else "other"] += 1
        if len(self._told) < TOLD and why not in self._told:
            self._told.add(why)
            more = "; more is only counted" if len(self._told) == TOLD else ""
            # later: whoever hears of it may do anything with the card, whose queues are being worked on now
            asyncio.get_running_loop().call_soon(self._tell, f"refused by the network's policy: {why}{more}")

    def _ask(self, frame: bytes, found: IpPacket) -> str:
        question = dns.parse(found.payload)
        if question is None:
            return "a message for a name server that is no plain question"
        if self.resolve is no_names or not self.policy.may_ask(question.name):
            code = dns.REFUSED if self.resolve is no_names else dns.NAME_ERROR
            self._reply(frame, found, dns.answer(question, code))
            return f"the name {question.name}"
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
        if self.resolve is no_names or not self.policy.may_ask(question.name):  # the policy changed meanwhile
            self._reply(frame, found, dns.answer(question, dns.NAME_ERROR))
            return
        allowed = [item for item in addresses[: dns.MAX_ANSWERS] if self.policy.learn(question.name, item)]
        self._fence.forget()  # what was refused before may be open now
        self._reply(frame, found, dns.answer(question, dns.NO_ERROR, allowed))

    def _reply(self, frame: bytes, found: IpPacket, message: bytes) -> None:
        self._fence.reply(datagram(frame, found, message))
        self._arrived.set()  # a device that has `channels` may still work this driver's queues with `receive`
        self._replied()
