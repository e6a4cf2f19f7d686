"""A resolver of names that asks given name servers, for guests whose names are looked up for them.

Source: RFC 1035, 4.2; RFC 7766 for TCP. What a server sends is hostile: an answer counts only from the server that was
asked, with the identity and the question that went out, and what is malformed is no answer. Loop thread only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket

from virtio.backends import dns
from virtio.backends.rules import Address
from virtio.errors import ConfigError

PORT = 53
SECONDS = 2.0
"""How long a server may take before the next one is asked."""
ROUNDS = 2
"""How often each server is asked."""
MAX_SERVERS = 8
MAX_MESSAGE = 16384
"""Bytes of an answer over TCP."""
NONE = "none"
"""No names at all."""
Server = tuple[Address, int]


def parse_servers(text: str) -> tuple[Server, ...]:
    """ "10.0.0.53+[2001:db8::53]:5353" as addresses and ports; ConfigError."""
    found: list[Server] = []
    for item in map(str.strip, text.split("+")):
        match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:]*))(?::([0-9]{1,5}))?", item)
        where, port = (match[1] or match[2] or "", int(match[3] or PORT)) if match else (item, PORT)
        try:
            found.append((ipaddress.ip_address(where), port))
        except ValueError:
            raise ConfigError(f"{item!r} is no name server; write ADDRESS, ADDRESS:PORT or none") from None
        if not 0 < port < 1 << 16:
            raise ConfigError(f"{item!r}: there is no port {port}")
    if len(found) > MAX_SERVERS:
        raise ConfigError(f"{len(found)} name servers; at most {MAX_SERVERS} are possible")
    return tuple(found)


class _Answers(asyncio.DatagramProtocol):
    """What comes back from one server that was asked one thing."""

    def __init__(self, identity: int, question: bytes) -> None:
        self.answer: asyncio.Future[dns.NameAnswer] = asyncio.get_running_loop().create_future()
        self._asked = identity, question

    def datagram_received(self, data: bytes, addr: object) -> None:
        found = dns.parse_answer(data, *self._asked)
        if found is not None and not self.answer.done():
            self.answer.set_result(found)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


class Resolver:
    """Asks `servers` in their order, each again if none answers."""

    def __init__(self, servers: tuple[Server, ...], seconds: float = SECONDS) -> None:
        self._servers, self._seconds = servers, seconds

    async def __call__(self, name: str, kind: int) -> list[Address]:
        """The addresses of a name; `kind` dns.A or dns.AAAA. socket.gaierror: it has none; OSError: nobody answers."""
        for _ in range(ROUNDS):
            for server in self._servers:
                try:
                    async with asyncio.timeout(self._seconds):
                        found = await self._ask(server, name, kind)
                except (TimeoutError, OSError, EOFError):
                    continue
                if found.code == dns.NAME_ERROR:
                    raise socket.gaierror(socket.EAI_NONAME, "no such name")
                if found.code != dns.NO_ERROR:
                    continue
                if not found.addresses:
                    raise socket.gaierror(getattr(socket, "EAI_NODATA", socket.EAI_NONAME), "no such address")
                return list(found.addresses)
        raise OSError("no name server answers")

    async def _ask(self, server: Server, name: str, kind: int) -> dns.NameAnswer:
        identity = int.from_bytes(os.urandom(2), "big")
        message = dns.query(identity, name, kind)
        question = message[dns.HEAD.size :]
        address = str(server[0]), server[1]
        loop = asyncio.get_running_loop()
        # a socket for each question has a source port that nobody can guess
        transport, answers = await loop.create_datagram_endpoint(
            lambda: _Answers(identity, question), remote_addr=address
        )
        try:
            transport.sendto(message)
            found = await answers.answer
        finally:
            transport.close()
        return await self._ask_by_tcp(address, message, identity, question) if found.truncated else found

    async def _ask_by_tcp(
        self, address: tuple[str, int], message: bytes, identity: int, question: bytes
    ) -> dns.NameAnswer:
        reader, writer = await asyncio.open_connection(*address, limit=MAX_MESSAGE)
        try:
            writer.write(len(message).to_bytes(2, "big") + message)
            size = int.from_bytes(await reader.readexactly(2), "big")
            if size > MAX_MESSAGE:
                raise OSError("an answer that is too long")
            found = dns.parse_answer(await reader.readexactly(size), identity, question)
        finally:
            writer.close()
        if found is None:
            raise OSError("no answer to the question")
        return found
