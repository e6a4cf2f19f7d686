"""The resolver that asks given name servers: servers of the test's own on loopback, honest and hostile ones."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio.backends import dns
from virtio.backends.resolver import MAX_MESSAGE, Resolver, parse_servers
from virtio.errors import ConfigError

Says = Callable[[bytes], list[bytes]]
"""What a server answers a message with."""
LOOPBACK = ipaddress.IPv4Address("127.0.0.1")


def name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\0"


def record(owner: bytes, kind: int, data: bytes) -> bytes:
    return owner + struct.pack(">HHIH", kind, 1, 60, len(data)) + data


def address(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def answer(message: bytes, *records: bytes, code: int = 0, flags: int = 0x8180) -> bytes:
    return message[:2] + struct.pack(">HHHHH", flags | code, 1, len(records), 0, 0) + message[12:] + b"".join(records)


class Server(asyncio.DatagramProtocol):
    def __init__(self, says: Says) -> None:
        self.says, self.asked = says, 0
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.asked += 1
        for one in self.says(data):
            self.transport.sendto(one, addr)


@asynccontextmanager
async def server(says: Says, by_tcp: Says | None = None) -> AsyncIterator[tuple[Server, int]]:
    """A name server on loopback, and its port."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert by_tcp is not None
        message = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        for one in by_tcp(message):
            writer.write(one)
        await writer.drain()
        writer.close()

    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(lambda: Server(says), local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    tcp = await asyncio.start_server(connected, "127.0.0.1", port) if by_tcp is not None else None
    try:
        yield protocol, port
    finally:
        transport.close()
        if tcp is not None:
            tcp.close()


def resolver(*ports: int, seconds: float = 60) -> Resolver:
    return Resolver(tuple((LOOPBACK, port) for port in ports), seconds)


async def test_addresses_and_other_names() -> None:
    def says(message: bytes) -> list[bytes]:
        pointer = b"\xc0\x0c"
        kind = struct.unpack_from(">H", message, len(message) - 4)[0]
        if kind == dns.AAAA:
            return [answer(message, record(pointer, dns.AAAA, address("2001:db8::1")))]
        alias = record(pointer, 5, name("Real.Example.NET"))
        more = record(name("real.example.net"), 5, name("deep.example.net"))
        true, strange = (record(name(of), dns.A, address(to)) for of, to in (
            ("deep.example.net", "192.0.2.7"), ("evil.example.net", "192.0.2.66")))  # fmt: skip
        return [answer(message, strange, true, more, alias)]

    async with server(says) as (_, port):
        assert await resolver(port)("www.example.org", dns.A) == [ipaddress.ip_address("192.0.2.7")]
        assert await resolver(port)("www.example.org", dns.AAAA) == [ipaddress.ip_address("2001:db8::1")]


@pytest.mark.parametrize(("code", "errno"), [(3, socket.EAI_NONAME), (0, socket.EAI_NODATA)])
async def test_a_name_that_has_none(code: int, errno: int) -> None:
    async with server(lambda message: [answer(message, code=code)]) as (_, port):
        with pytest.raises(socket.gaierror) as found:
            await resolver(port)("none.example.org", dns.A)
    assert found.value.errno == errno


async def test_the_next_server_is_asked() -> None:
    """Of one that is silent, one that fails and one that answers, and of a port where nobody is."""
    good = lambda message: [answer(message, record(b"\xc0\x0c", dns.A, address("192.0.2.9")))]  # noqa: E731
    async with server(lambda message: []) as (silent, one), server(good) as (_, three):
        async with server(lambda message: [answer(message, code=2)]) as (failing, two):
            asked = resolver(one, two, three, seconds=0.5)
            async with asyncio.timeout(60):
                while True:  # on a busy host half a second may be too short for the one that answers
                    try:
                        found = await asked("example.org", dns.A)
                        break
                    except OSError:
                        continue
            assert found == [ipaddress.ip_address("192.0.2.9")] and silent.asked and failing.asked
        with pytest.raises(OSError, match="no name server answers"):
            await resolver(two, two)("example.org", dns.A)


async def test_what_answers_another_question_is_no_answer() -> None:
    def says(message: bytes) -> list[bytes]:
        lie = record(b"\xc0\x0c", dns.A, address("192.0.2.66"))
        other = answer(message[:12] + name("other.example") + message[-4:], lie)
        stranger, no_answer = bytes([message[0] ^ 1]) + answer(message, lie)[1:], answer(message, lie, flags=0x100)
        good = answer(message, record(b"\xc0\x0c", dns.A, address("192.0.2.9")))
        return [stranger, other, no_answer, b"", b"x" * 600, good]

    async with server(says) as (_, port):
        assert await resolver(port)("example.org", dns.A) == [ipaddress.ip_address("192.0.2.9")]


async def test_what_is_too_long_comes_by_tcp() -> None:
    def whole(message: bytes) -> list[bytes]:
        found = answer(message, *[record(b"\xc0\x0c", dns.A, address(f"192.0.2.{number}")) for number in range(60)])
        return [struct.pack(">H", len(found)), found[:100], found[100:]]

    cut = lambda message: [answer(message, flags=0x8380)]  # noqa: E731
    async with server(cut, whole) as (_, port):
        assert len(await resolver(port)("example.org", dns.A)) == 60
    for wrong in (struct.pack(">H", MAX_MESSAGE + 1) + bytes(100), b"\0\2ab", b""):
        async with server(cut, lambda message, wrong=wrong: [wrong]) as (_, port):  # type: ignore[misc]
            with pytest.raises(OSError, match="no name server answers"):
                await resolver(port)("example.org", dns.A)


QUESTION = dns.query(7, "example.org", dns.A)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 65535))
def test_any_answer_is_one_or_none(data: bytes, records: int) -> None:
    message = QUESTION[:2] + struct.pack(">HHHHH", 0x8180, 1, records, 0, 0) + QUESTION[12:] + data
    found = dns.parse_answer(message, 7, QUESTION[12:])
    assert found is None or all(item.version == 4 for item in found.addresses)
    assert dns.parse_answer(data, 7, QUESTION[12:]) is None or data[:2] == b"\0\7"


@pytest.mark.parametrize("text", ["10.0.0.53", "10.0.0.53:5353+::1", "[2001:db8::1]:53+1.1.1.1", "2001:db8::1"])
def test_servers(text: str) -> None:
    assert len(parse_servers(text)) == text.count("+") + 1


@pytest.mark.parametrize("text", ["", "+", "example.org", "10.0.0.53:0", "10.0.0.53:99999", "1.2.3", "[::1", "none+::1",
                                  "+".join(["::1"] * 9)])  # fmt: skip
def test_servers_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_servers(text)
