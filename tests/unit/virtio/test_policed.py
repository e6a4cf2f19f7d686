"""A network card behind a policy: what gets out is what the rules say, whatever the guest sends."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.virtio import PciDriver
from virtio import _ring
from virtio.backends import dns, policed
from virtio.backends.learned import PolicyState, Resolved
from virtio.backends.net import MemoryNet
from virtio.backends.packets import checksum, packet
from virtio.backends.policed import MAX_QUESTIONS, REASONS, TOLD, PolicedNet, no_names
from virtio.backends.rules import Address, Egress, parse
from virtio.backends.sockets import StreamNet
from virtio.devices.net import NetDevice
from virtio.devices.netstate import NetState
from virtio.errors import ConfigError, StateError

MAC, ROUTER = bytes.fromhex("525400123456"), bytes.fromhex("020000000001")
GUEST, SERVER = "192.0.2.2", "198.51.100.7"
NAMES = {("files.example.org", dns.A): [SERVER], ("example.org", dns.A): ["203.0.113.1", "127.0.0.1", "169.254.1.1"],
         ("files.example.org", dns.AAAA): ["2001:db8::7"]}  # fmt: skip


def ip(
    data: bytes, target: str = SERVER, source: str = GUEST, protocol: int = 17, more: int = 0, length: int = 0
) -> bytes:
    """An Ethernet frame of the guest with an IP packet."""
    to, by = ipaddress.ip_address(target), ipaddress.ip_address(source)
    if to.version == 4:
        length = length or 20 + len(data)
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, length, 1, more, 64, protocol, 0, by.packed, to.packed)
        return ROUTER + MAC + b"\x08\0" + head + data
    head = struct.pack(">IHBB16s16s", 6 << 28, length or len(data), protocol, 64, by.packed, to.packed)
    return ROUTER + MAC + b"\x86\xdd" + head + data


def udp(port: int, data: bytes = b"data", source: int = 4000) -> bytes:
    return struct.pack(">HHHH", source, port, 8 + len(data), 0) + data


def tcp(port: int, flags: int = 2, source: int = 4000) -> bytes:
    return struct.pack(">HHIIBBHHH", source, port, 0, 0, 0x50, flags, 0, 0, 0)


def question(name: str, kind: int = dns.A, identity: int = 7, flags: int = 0x100) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", identity, flags, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


async def resolve(name: str, kind: int) -> list[Address]:
    """The host's resolver."""
    if (name, kind) not in NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")
    return [ipaddress.ip_address(text) for text in NAMES[name, kind]]


class Card:
    """A card behind a policy and what is at the other end of the wire."""

    def __init__(self, allow: str = "", deny: str = "") -> None:
        self.wire = MemoryNet()
        self.told: list[str] = []
        self.net = PolicedNet(self.wire, MAC, Egress(parse(allow), parse(deny)), self.told.append)
        self.net.resolve = resolve

    async def passes(self, frame: bytes) -> bool:
        """Whether a frame of the guest gets out, unchanged."""
        before = len(self.wire.sent)
        await self.net.send(frame)
        await asyncio.sleep(0)  # what is told is told in the loop's next turn
        assert self.wire.sent[before:] in ([], [frame])
        return len(self.wire.sent) > before

    async def ask(
        self, name: str, kind: int = dns.A, server: str = "198.18.0.53", source: str = GUEST
    ) -> tuple[int, list[str]]:
        """(code, addresses) of the answer to a question of the guest."""
        assert not await self.passes(ip(udp(53, question(name, kind)), server, source))
        frame = await asyncio.wait_for(self.net.receive(), 30)
        found = packet(frame)
        assert not isinstance(found, str), found
        assert (frame[:6], str(found.source), str(found.target)) == (MAC, server, source)
        assert (found.source_port, found.target_port) == (53, 4000)
        identity, flags, questions, answers, _, _ = struct.unpack_from(">HHHHHH", found.payload)
        assert identity == 7 and flags & 0x8180 == 0x8180 and questions == 1
        at, addresses = len(question(name, kind)), []
        for _ in range(answers):
            size = struct.unpack_from(">H", found.payload, at + 10)[0]
            addresses.append(str(ipaddress.ip_address(found.payload[at + 12 : at + 12 + size])))
            at += 12 + size
        body = frame[14 + (20 if found.target.version == 4 else 40) :]
        pseudo = found.source.packed + found.target.packed + struct.pack(">HH", 17, len(body))
        assert checksum(pseudo + body) == 0
        return flags & 15, addresses


@pytest.fixture
async def card() -> AsyncIterator[Card]:
    card = Card("*.example.org:443+example.org+10.0.0.0/8+203.0.113.9:22+[2001:db8:1::/48]:80", "10.9.0.0/16")
    yield card
    await card.net.aclose()


async def test_addresses_and_networks(card: Card) -> None:
    for target, data, protocol, passes in (
        ("10.1.2.3", udp(9), 17, True), ("10.1.2.3", tcp(1), 6, True), ("10.1.2.3", b"\x08\0\0\0", 1, True),
        ("10.9.1.1", tcp(1), 6, False), ("11.0.0.1", tcp(1), 6, False), (SERVER, tcp(443), 6, False),
        ("203.0.113.9", tcp(22), 6, True), ("203.0.113.9", tcp(23), 6, False), ("203.0.113.9", b"\x08\0\0\0", 1, False),
        ("2001:db8:1::5", tcp(80), 6, True), ("2001:db8:2::5", tcp(80), 6, False), ("2001:db8:1::5", tcp(81), 6, False),
        ("10.1.2.3", b"\0" * 8, 47, False), ("10.1.2.3", b"\0" * 8, 6, False),
    ):  # fmt: skip
        source = GUEST if ":" not in target else "fe80::1"
        assert await card.passes(ip(data, target, source, protocol)) is passes, (target, protocol)
    assert "refused by the network's policy: TCP to 10.9.1.1:1" in card.told
    assert "refused by the network's policy: TCP to [2001:db8:1::5]:81" in card.told


async def test_names_open_only_what_they_were_resolved_to(card: Card) -> None:
    frame = ip(tcp(443), SERVER, protocol=6)
    assert not await card.passes(frame)
    assert await card.ask("files.example.org") == (0, [SERVER])
    assert await card.passes(frame)
    assert not await card.passes(ip(tcp(80), SERVER, protocol=6))
    assert await card.ask("FILES.example.org", dns.AAAA) == (0, ["2001:db8::7"])
    assert await card.passes(ip(tcp(443), "2001:db8::7", "fe80::1", 6))
    assert await card.ask("example.org") == (0, ["203.0.113.1"])  # neither this host nor the link
    assert await card.passes(ip(udp(7), "203.0.113.1"))
    assert await card.ask("example.org", dns.AAAA, "2001:db8:1::53", "fe80::1") == (0, [])
    assert await card.ask("none.example.org") == (3, [])
    assert await card.ask("example.com") == (3, [])
    assert await card.ask("badexample.org") == (3, [])
    assert await card.ask("files.example.org", 16) == (0, [])  # TXT
    assert "refused by the network's policy: the name example.com" in card.told


@pytest.mark.parametrize("frame", [
    b"", ip(tcp(1), "10.0.0.1", protocol=6)[:6] + ROUTER + ip(tcp(1), "10.0.0.1", protocol=6)[12:],
    ip(tcp(1), "10.0.0.1", protocol=6)[:12] + b"\x81\0\0\5" + ip(tcp(1), "10.0.0.1", protocol=6)[12:],
    ip(tcp(1), "10.0.0.1", protocol=6, more=0x2000), ip(tcp(1), "10.0.0.1", protocol=6, more=100),
    ip(tcp(1), "10.0.0.1", "192.0.2.3", 6), ip(tcp(1), "10.0.0.1", protocol=6, length=2000),
    ip(tcp(1), "10.0.0.1", protocol=6).replace(b"\x45", b"\x46", 1), ip(tcp(1), "10.0.0.1", protocol=6)[:20],
    ip(tcp(53), "198.18.0.53", protocol=6), ip(udp(853), "198.18.0.53"), ip(udp(5353), "224.0.0.251"),
    ip(b"\0" * 40, "2001:db8:1::5", "fe80::1", 44), ip(b"\0" * 40, "2001:db8:1::5", "fe80::1", 43),
    ip(b"\0" * 8 + tcp(80), "2001:db8:1::5", "fe80::1", 0), ip(b"\x85\0\0\0", "2001:db8:9::5", "fe80::1", 58),
    ip(b"\x80\0\0\0", "2001:db8:9::5", "fe80::1", 58), ip(udp(53, b"tunnel" * 50), "198.18.0.53"),
    ip(udp(53, question("example.org", flags=0x2900)), "198.18.0.53"),
    ip(udp(53, question("x" * 60 + ".y")[:-9]), "198.18.0.53"),
    ROUTER + MAC + b"\x08\6" + b"\0\1\x08\0\6\4\0\2" + ROUTER + bytes(16),
    ROUTER + MAC + b"\x08\6" + b"\0\1\x08\0\6\4\0\2" + MAC + ipaddress.ip_address("192.0.2.1").packed + bytes(12),
    ROUTER + MAC + b"\x88\xcc" + bytes(60),
])  # fmt: skip
async def test_what_is_not_plainly_allowed_stays(card: Card, frame: bytes) -> None:
    assert await card.passes(ip(tcp(1), "10.0.0.1", protocol=6))  # the guest's address is known
    assert not await card.passes(frame)


async def test_an_address_is_got_and_defended(card: Card) -> None:
    ours = ROUTER + MAC + b"\x08\6" + b"\0\1\x08\0\6\4\0\1" + MAC + ipaddress.ip_address(GUEST).packed + bytes(10)
    assert await card.passes(ip(udp(67, bytes(300), 68), "255.255.255.255", "0.0.0.0"))
    offer = bytes(16) + ipaddress.ip_address(GUEST).packed + bytes(220)
    card.wire.deliver(ip(udp(68, offer, 67), GUEST, "192.0.2.1"))
    await asyncio.wait_for(card.net.receive(), 30)
    assert await card.passes(ours)
    assert not await card.passes(ours.replace(ipaddress.ip_address(GUEST).packed, b"\xc0\0\2\1"))
    assert not await card.passes(ip(tcp(1), "10.0.0.1", "10.0.0.2", 6))
    for kind in (133, 135, 136):
        assert await card.passes(ip(bytes([kind]) + bytes(20), "ff02::2", "fe80::1", 58))
    report = ip(b"\x3a\0\5\2\0\0\1\0" + b"\x8f" + bytes(20), "ff02::16", "fe80::1", 0)
    assert not await card.passes(b"\x33\x33\0\0\0\x16" + report[6:]) and not card.told[2:]


async def test_connections_from_outside_are_answered(card: Card) -> None:
    answer = ip(tcp(5000, 0x12, 80), "203.0.113.200", protocol=6)
    assert not await card.passes(answer)
    card.wire.deliver(ip(tcp(80, 0x02, 5000), GUEST, "203.0.113.200", 6))
    await asyncio.wait_for(card.net.receive(), 30)
    assert await card.passes(answer)
    assert not await card.passes(ip(tcp(5001, 0x12, 80), "203.0.113.200", protocol=6))


async def test_without_allow_all_but_what_is_denied() -> None:
    card = Card(deny="10.0.0.0/8+files.example.org")
    assert await card.passes(ip(tcp(80), SERVER, protocol=6))
    assert not await card.passes(ip(tcp(80), "10.1.1.1", protocol=6))
    assert await card.ask("files.example.org") == (3, [])
    assert await card.ask("example.org") == (0, ["203.0.113.1"])
    await card.net.aclose()


async def test_everything_and_nothing() -> None:
    card = Card("*:443+example.org:80")
    assert await card.passes(ip(tcp(443), SERVER, protocol=6)) and await card.passes(
        ip(tcp(443), "2001:db8::9", "fe80::1", 6)
    )
    assert not await card.passes(ip(tcp(80), "203.0.113.1", protocol=6))
    assert await card.ask("example.org") == (0, ["203.0.113.1"]) and await card.ask("files.example.org") == (
        0,
        [SERVER],
    )
    assert await card.passes(ip(tcp(80), "203.0.113.1", protocol=6))
    card.net.change(Egress(parse("none"), ()), resolve)
    assert not await card.passes(ip(tcp(443), SERVER, protocol=6))
    assert await card.ask("example.org") == (3, [])
    card.net.change(Egress(parse("*"), parse("*:25")))
    assert await card.passes(ip(tcp(443), SERVER, protocol=6)) and not await card.passes(
        ip(tcp(25), SERVER, protocol=6)
    )
    await card.net.aclose()


async def test_this_host_is_out_of_reach_whatever_is_allowed() -> None:
    """A socket takes a mapped address for the one of IPv4 in it, which rules of networks do not see."""
    here = ("127.0.0.1", "127.9.9.9", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1")
    for allow in ("*", "0.0.0.0/0:53+[::/0]:53", ""):
        card = Card(allow, "10.0.0.0/8")
        for target in here:
            source = GUEST if ":" not in target else "fe80::1"
            assert not await card.passes(ip(tcp(53), target, source, 6)), (allow, target)
            assert not await card.passes(ip(udp(53), target, source)), (allow, target)
        assert not card.net.policy.learn("example.org", ipaddress.ip_address("::ffff:192.0.2.1"))
        await card.net.aclose()


async def test_own_addresses_of_this_host_are_open_only_where_they_are_listed() -> None:
    """Not by a network, by all, or by a name that leads there, whoever answers for it; deny=host is the opposite."""
    own, other = "10.1.2.3", "10.1.2.4"

    def is_own(address: Address) -> bool:
        return str(address) in (own, SERVER)

    for allow, deny, here, there in (
        ("*", "", (False, False), True), ("10.0.0.0/8", "", (False, False), True), (own, "", (True, True), False),
        (f"{own}:80", "", (True, False), False), ("host", "", (True, True), False),
        ("host:80", "", (True, False), False), ("*+host:80", "", (True, False), True),
        ("*+host", "host:81", (True, False), True), ("", "", (True, True), True), ("", "host", (False, False), True),
        ("", "host:81", (True, False), True), ("*+host", own, (False, False), True),
    ):  # fmt: skip
        policy = Egress(parse(allow), parse(deny), is_own)
        for port, passes in zip((80, 81), here, strict=True):
            assert policy.may_reach(ipaddress.ip_address(own), port) is passes, (allow, deny, port)
        assert policy.may_reach(ipaddress.ip_address(other), 80) is there, (allow, deny)
    card = Card("files.example.org")
    card.net.policy.is_own = is_own
    assert await card.ask("files.example.org") == (0, [SERVER])
    assert not await card.passes(ip(tcp(443), SERVER, protocol=6))
    assert f"refused by the network's policy: TCP to {SERVER}:443, an address of this host's own" in card.told
    card.net.change(Egress(parse("files.example.org+host:443"), (), is_own), resolve)
    assert await card.passes(ip(tcp(443), SERVER, protocol=6))
    await card.net.aclose()


async def test_what_began_outside_is_not_begun_by_the_guest(card: Card) -> None:
    peer = "203.0.113.200"
    card.wire.deliver(ip(tcp(80, 0x02, 5000), GUEST, peer, 6))
    await asyncio.wait_for(card.net.receive(), 30)
    assert await card.passes(ip(tcp(5000, 0x12, 80), peer, protocol=6))
    assert not await card.passes(ip(tcp(5000, 0x02, 80), peer, protocol=6))


async def test_a_connection_from_outside_that_is_used_stays_known(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else comes from outside."""
    monkeypatch.setattr(policed, "MAX_FLOWS", 16)
    peer, answer = "203.0.113.200", ip(tcp(5000, 0x10, 80), "203.0.113.200", protocol=6)
    for port in range(5000, 5100):
        card.wire.deliver(ip(tcp(80, 0x02, port), GUEST, peer, 6))
        await asyncio.wait_for(card.net.receive(), 30)
        assert await card.passes(answer), port
        assert len(card.net._flows) <= 16
    card.net._fence.forget()
    assert await card.passes(answer)
    assert not await card.passes(ip(tcp(5001, 0x10, 80), peer, protocol=6))


async def test_what_names_opened_is_part_of_the_state(card: Card) -> None:
    """It stays open where the machine goes on, as the policy there says; so does whose address is the guest's."""
    assert await card.ask("files.example.org") == (0, [SERVER])
    assert await card.passes(ip(tcp(443), SERVER, protocol=6))
    state = card.net.save()
    assert state.guest == ipaddress.ip_address(GUEST).packed
    other = Card("*.example.org:443")
    other.net.restorer(state)()
    assert await other.passes(ip(tcp(443), SERVER, protocol=6))
    assert not await other.passes(ip(tcp(80), SERVER, protocol=6))
    assert not await other.passes(ip(tcp(443), SERVER, "192.0.2.77", 6))
    assert other.net.save() == state
    stricter = Card("example.com")
    stricter.net.restorer(state)()
    assert not await stricter.passes(ip(tcp(443), SERVER, protocol=6)) and not stricter.net.save().resolved
    for one in (other, stricter):
        await one.net.aclose()


HERE = ipaddress.ip_address(SERVER).packed


@pytest.mark.parametrize(("guest", "address", "name"), [
    (b"\1\2\3", HERE, "a.b"), (b"", b"\1" * 5, "a.b"), (b"", b"\x7f\0\0\1", "a.b"), (b"", bytes(15) + b"\1", "a.b"),
    (b"", b"\xe0\0\0\1", "a.b"), (b"", HERE, "A.b"), (b"", HERE, "a\nb"), (b"", HERE, "a" * 254),
    (b"", bytes(10) + b"\xff\xff\x7f\0\0\1", "a.b"),
])  # fmt: skip
async def test_a_state_that_no_policy_gave_is_refused(card: Card, guest: bytes, address: bytes, name: str) -> None:
    device = NetDevice(card.net, MAC)
    policy = PolicyState(guest, (Resolved(HERE, ("files.example.org",)), Resolved(address, (name,))))
    with pytest.raises(StateError, match="policy"):
        device.restore_device(NetState(MAC, True, 1, None, None, False, (), policy))
    assert not card.net.save().resolved
    await device.aclose()


async def test_an_answer_that_took_long_is_received(card: Card) -> None:
    """Also by a device that has the path in C but receives in Python, as for a packed ring."""
    known = asyncio.Event()

    async def slow(name: str, kind: int) -> list[Address]:
        await known.wait()
        return await resolve(name, kind)

    card.net.on_replies(lambda: None)
    card.net.resolve = slow
    await card.net.send(ip(udp(53, question("files.example.org")), "198.18.0.53"))
    receiving = asyncio.create_task(card.net.receive(), name="receiving")
    await asyncio.sleep(0)  # it waits
    known.set()
    assert ipaddress.ip_address(SERVER).packed in await asyncio.wait_for(receiving, 30)


async def test_without_a_resolver_there_are_no_names() -> None:
    card = Card("*")
    card.net.change(Egress(parse("*"), ()), no_names)
    assert await card.ask("example.org") == (5, [])
    assert await card.passes(ip(tcp(443), SERVER, protocol=6))
    assert card.told == ["refused by the network's policy: the name example.org"]
    await card.net.aclose()


async def test_floods_are_bounded(card: Card) -> None:
    never = asyncio.Event()

    async def slow(name: str, kind: int) -> list[Address]:
        await never.wait()
        return []

    card.net.resolve = slow
    for number in range(MAX_QUESTIONS + 50):
        await card.net.send(ip(udp(53, question("example.org", identity=number)), "198.18.0.53"))
    assert card.net.refused["too many questions for a name server at once"] == 50
    for number in range(5000):
        await card.net.send(ip(tcp(number % 60000 + 1), "203.0.113.77", protocol=6))
        await card.net.send(ip(udp(53, question("no.invalid")), "198.18.0.53"))
    await asyncio.sleep(0)
    assert len(card.told) == TOLD and "more is only counted" in card.told[-1]
    for kind in range(2000):
        await card.net.send(ROUTER + MAC + struct.pack(">H", 0x9000 + kind) + bytes(46))
    assert 1900 < card.net.refused["other"] < 2000 and len(card.net.refused) <= REASONS + 2
    assert len(card.net._fence.replies()) <= 256 and len(card.net._told) == TOLD


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"\x08\0", b"\x08\6", b"\x86\xdd", b"\x81\0"]), st.booleans())
def test_any_frame_is_judged(data: bytes, kind: bytes, ours: bool) -> None:
    async def run() -> None:
        card = Card("10.0.0.0/8")
        frame = ROUTER + (MAC if ours else ROUTER) + kind + data
        if await card.passes(frame) and kind != b"\x08\6":
            found = packet(frame)
            assert not isinstance(found, str)
        card.net._fence.incoming(frame)
        await card.net.aclose()

    asyncio.run(run())


HEADS = [ip(tcp(443), "10.1.2.3", protocol=6), ip(udp(9), "10.1.2.3"), ip(b"\x08\0\0\0", "10.1.2.3", protocol=1),
         ip(tcp(80), "2001:db8:1::5", "fe80::1", 6), ip(tcp(444), "10.9.1.1", protocol=6)]  # fmt: skip


CHANGES = st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=4)


@settings(deadline=None)
@given(st.sampled_from(HEADS), CHANGES, st.integers(0, 90))
def test_a_verdict_that_stands_is_the_one_that_was_given(head: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    """The table in C passes a changed frame only if this module would, whatever stands there."""

    async def run() -> None:
        fresh, used = (Card("10.0.0.0/8+[2001:db8:1::/48]", "10.9.0.0/16") for _ in range(2))
        for known in HEADS:
            await used.passes(known)
        await fresh.passes(HEADS[0])  # the guest's address
        frame = bytearray(head)
        for at, value in changes:
            frame[at % len(frame)] = value
        sent = bytes(frame[:cut] if cut > 60 else frame)
        expected = await fresh.passes(sent)
        assert await used.passes(sent) is expected and await used.passes(sent) is expected
        for card in (fresh, used):
            await card.net.aclose()

    asyncio.run(run())


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_any_question_is_one_or_none(data: bytes) -> None:
    found = dns.parse(data)
    if found is not None:
        assert dns.parse(data[:2] + b"\1\0" + data[4:]) is not None and dns.answer(found, 0)[:2] == data[:2]


@pytest.mark.parametrize(
    "text", ["example.org:443", "*.a.b+10.0.0.0/8:22+[::1]:80+::/0", "localhost", "1.2.3.4", "*", "*:443", "none"]
)
def test_rules(text: str) -> None:
    assert len(parse(text)) == text.count("+") + 1


@pytest.mark.parametrize("text", ["+", "a:0", "a:70000", "1.2.3", "1.2.3.4.5", "10.0.0.0/33", "a b", "**", "*.", "-a",
                                  "a..b", "[::1", "http://a", "a:b", "x" * 64, "a+"])  # fmt: skip
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


async def test_a_change_resets_what_it_forbids(card: Card) -> None:
    """The next frame of either direction, with the sequence numbers that each end takes; what stays allowed stays."""
    assert await card.ask("files.example.org") == (0, [SERVER])
    kept, gone, idle = (ip(tcp(port, 0x10, source), to, protocol=6) for port, source, to in (
        (443, 4000, SERVER), (80, 4001, "10.1.2.3"), (80, 4002, "10.1.2.4")))  # fmt: skip
    for frame in (kept, gone, idle):
        assert await card.passes(frame)
    card.net.change(Egress(parse("files.example.org:443"), ()), resolve)
    assert await card.passes(kept)
    before = len(card.wire.sent)
    await card.net.send(gone[:38] + struct.pack(">II", 1000, 2000) + gone[46:])
    out = packet(card.wire.sent[before])
    assert not isinstance(out, str) and (str(out.source), str(out.target), out.target_port) == (GUEST, "10.1.2.3", 80)
    assert out.payload[13] & 4 and out.payload[4:8] == struct.pack(">I", 1000)
    back = packet(await asyncio.wait_for(card.net.receive(), 30))
    assert not isinstance(back, str) and str(back.source) == "10.1.2.3"
    assert (back.source_port, back.target_port) == (80, 4001)
    assert back.payload[13] & 4 and back.payload[4:8] == struct.pack(">I", 2000)
    inbound = bytearray(ip(tcp(4002, 0x10, 80), GUEST, "10.1.2.4", 6) + b"secret")
    inbound[16:18] = struct.pack(">H", len(inbound) - 14)
    inbound[38:46] = struct.pack(">II", 77, 88)
    before = len(card.wire.sent)
    card.wire.deliver(bytes(inbound))
    frame = await asyncio.wait_for(card.net.receive(), 30)
    assert b"secret" not in frame and frame[47] & 4 and frame[38:42] == struct.pack(">I", 77)
    assert len(card.wire.sent) == before + 1 and card.wire.sent[-1][38:42] == struct.pack(">I", 88)
    assert not await card.passes(ip(tcp(80, 2, 4003), "10.1.2.3", protocol=6)), "nothing new"
    card.wire.deliver(ip(udp(4000, b"data", 9), GUEST, "10.1.2.3"))
    card.wire.deliver(ip(tcp(4000, 0x10, 443), GUEST, SERVER, 6))
    assert await asyncio.wait_for(card.net.receive(), 30) == ip(tcp(4000, 0x10, 443), GUEST, SERVER, 6)
    card.net.change(Egress(parse("10.0.0.0/8"), ()))
    assert await card.passes(gone)


async def test_a_neighbour_message_names_the_card_alone(card: Card) -> None:
    for option, passes in ((b"\1\1" + MAC, True), (b"\1\1" + ROUTER, False), (b"\2\1" + ROUTER, False), (b"", True)):
        for kind, size in ((133, 8), (135, 24), (136, 24)):
            message = bytes([kind]) + bytes(size - 1) + option
            assert await card.passes(ip(message, "ff02::2", "fe80::1", 58)) is passes, (kind, option)


class Wire:
    """A device whose policed frames go through the path in C, and the driver's and the far end's view of it."""

    def __init__(self, allow: str) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.far = StreamNet(far)
        self.told: list[str] = []
        self.net = PolicedNet(StreamNet(near), MAC, Egress(parse(allow), ()), self.told.append)
        self.net.resolve = resolve
        self.device = NetDevice(self.net, MAC)
        self.driver = PciDriver(self.device)
        self.driver.initialize()

    def send(self, frame: bytes, *cuts: int) -> None:
        """In a buffer for each part between the cuts."""
        edges = [0, *cuts, len(frame)]
        parts = [frame[start:end] for start, end in itertools.pairwise(edges)]
        self.driver.submit(1, [self.driver.buffer(part) for part in (bytes(12), *parts)])

    async def arrived(self) -> bytes:
        """The next frame at the other end."""
        return await asyncio.wait_for(self.far.receive(), 30)

    async def received(self) -> bytes:
        """The next frame for the guest."""
        place = self.driver.buffer(2048)
        self.driver.submit(0, [], [place])
        (used,) = await self.driver.used(0, timeout=30)
        return self.driver.bytes_at(place)[12 : used.length]

    async def aclose(self) -> None:
        self.driver.transport.reset()
        await self.device.aclose()
        await self.far.aclose()


async def test_the_path_in_c_passes_what_may_pass_unchanged() -> None:
    wire = Wire("10.0.0.0/8+files.example.org:443")
    good = ip(tcp(80, 0x10), "10.0.0.1", protocol=6) + bytes(range(200))
    good = good[:16] + struct.pack(">H", len(good) - 14) + good[18:]
    for cuts in ((), (1,), (14,), (14, 34), (54,), (100,), (134,), (133, 135), (20, 40, 60, 80, 100, 120, 140, 160)):
        wire.send(ip(tcp(80), "11.0.0.1", protocol=6), *[cut for cut in cuts[:1] if cut < 54])
        wire.send(b"x" * 60)
        wire.send(good, *cuts)
        assert await wire.arrived() == good, cuts
    wire.send(ip(udp(53, question("files.example.org")), "198.18.0.53"))
    answer = await wire.received()
    assert ipaddress.ip_address(SERVER).packed in answer and answer[:6] == MAC
    wire.send(ip(tcp(443), SERVER, protocol=6))
    assert await wire.arrived() == ip(tcp(443), SERVER, protocol=6)
    wire.net.change(Egress(parse("files.example.org:443"), ()))
    wire.send(good)
    cut = await wire.arrived()
    assert len(cut) == 54 and cut[47] & 4
    assert (await wire.received())[47] & 4
    await wire.far.send(ip(tcp(4000, 0x10, 80), GUEST, "10.0.0.1", 6))
    assert (await wire.received())[47] & 4 and (await wire.arrived())[47] & 4
    await wire.far.send(ip(udp(4000, b"data", 80), GUEST, "10.0.0.1"))
    await wire.far.send(ip(udp(4000, b"data", 443), GUEST, SERVER))
    assert await wire.received() == ip(udp(4000, b"data", 443), GUEST, SERVER)
    assert wire.told.count("refused by the network's policy: TCP to 11.0.0.1:80") == 1
    await wire.aclose()


async def test_a_flood_of_what_is_new_does_not_keep_the_loop() -> None:
    """A call of the engine asks about some frames, and the loop has its turn."""
    wire = Wire("10.0.0.0/8")
    engine, queue, ring = wire.device._engines[0], wire.driver.queues[1], wire.device.active.queues[1].ring
    assert isinstance(ring, _ring.Ring)
    for number in range(110):  # without telling the device
        frame = wire.driver.buffer(bytes(12) + ip(tcp(number + 1), "11.0.0.1", protocol=6))
        queue.add([frame])
    assert engine.transmit(ring) & 1
    assert wire.net.refused["destination"] == 64
    wire.driver.notify(1)
    await wire.driver.wait(lambda: wire.net.refused["destination"] == 110, 30)
    await wire.aclose()
