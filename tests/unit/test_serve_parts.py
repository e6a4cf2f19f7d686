"""Parts of `vmm serve` without a machine: what a hostile guest answers its tools, WebSockets to ports, messages."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import GuestError
from vmm.guest import tools

pytest.importorskip("uvicorn", reason="the extra serve is not installed: pip install '.[test]'")
websockets = pytest.importorskip("websockets", reason="the extra serve is not installed: pip install '.[test]'")
SECONDS = 60.0


def entry(path: bytes, mode: int = 0o100644) -> bytes:
    return struct.pack("<IIIIQq", mode, 0, 0, 0, 5, 7) + path + b"\0\0root\0wheel\0"


@given(st.binary(max_size=300) | st.lists(st.binary(max_size=30)).map(lambda names: b"".join(map(entry, names))))
def test_listings_of_a_guest_are_entries_or_its_fault(data: bytes) -> None:
    try:
        found = tools._entries(data)
    except GuestError:
        return
    assert all(one.path.startswith("/") and ".." not in one.path.split("/") for one in found)


def test_an_entry_is_read() -> None:
    (found,) = tools._entries(entry(b"/a/../b"))
    assert (found.path, found.size, found.mtime_ns, found.owner, found.group) == ("/b", 5, 7, "root", "wheel")
    with pytest.raises(GuestError, match="without an end"):
        tools._entries(struct.pack("<IIIIQq", 0, 0, 0, 0, 0, 0) + b"a" * 100_000)


def test_messages_are_those_of_the_client() -> None:
    """Every field of the client's own classes has the same number, name and kind here."""
    pb = pytest.importorskip("e2b.envd.process.process_pb", reason="the package e2b is not installed")
    files = pytest.importorskip("e2b.envd.filesystem.filesystem_pb", reason="the package e2b is not installed")
    from google.protobuf import descriptor_pb2

    from vmm.sandboxes.serve import schema

    for module, ours in ((pb, schema.process), (files, schema.filesystem)):
        theirs = descriptor_pb2.FileDescriptorProto.FromString(module.desc().proto.to_binary())
        known = {}

        def walk(prefix: str, messages: Any, known: dict[str, Any] = known) -> None:
            for message in messages:
                known[prefix + message.name] = message
                walk(f"{prefix}{message.name}.", [one for one in message.nested_type if not one.options.map_entry])

        walk("", theirs.message_type)
        assert set(known) == set(ours)
        for name, message in known.items():
            mine = descriptor_pb2.DescriptorProto()
            ours[name].DESCRIPTOR.CopyToProto(mine)
            facts = [
                sorted(
                    (one.number, one.name, one.type, one.label, one.type_name.lstrip("."), one.proto3_optional)
                    for one in each.field
                )
                for each in (mine, message)
            ]
            assert facts[0] == facts[1], name


class Link:
    """What stands for the connection that the agent makes: one to a port of this host."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.stdout = self

    async def read(self, limit: int = 65536) -> bytes:
        return await self._reader.read(limit)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def close_stdin(self) -> None:
        self._writer.write_eof()

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> Link:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Box:
    """A sandbox that runs, as far as ports are concerned."""

    phase = "running"
    vm = type("vm", (), {"agent": None})()
    sheet = type("sheet", (), {"id": "a" * 20, "resumes": False, "access_token": "t", "tenant": "local"})()


@pytest.fixture
async def port_of_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[int, Any]]:
    """The server's port; ports of its sandbox are those of this host."""
    from vmm.sandboxes.serve import proxy
    from vmm.sandboxes.serve.fleet import FleetSettings
    from vmm.sandboxes.serve.server import SandboxServer, ServerSettings

    class Tools:
        def __init__(self, _agent: object) -> None:
            pass

        async def connect(self, port: int) -> Link:
            return Link(*await asyncio.open_connection("127.0.0.1", port))

    monkeypatch.setattr(proxy, "GuestTools", Tools)
    async with SandboxServer(ServerSettings(FleetSettings(tmp_path, {}), port=0)) as server:
        server.fleet._hosted["a" * 20] = Box()  # type: ignore[assignment]
        task = asyncio.create_task(server.serve())
        yield server.port, server
        del server.fleet._hosted["a" * 20]
        server.stop()
        await asyncio.wait_for(task, SECONDS)


async def test_websockets_reach_a_port(port_of_a_sandbox: tuple[int, Any]) -> None:
    port, _ = port_of_a_sandbox
    seen = []

    async def answer(link: Any) -> None:
        seen.append((link.request.path, link.request.headers["X-Own"], link.subprotocol))
        async for message in link:
            await link.send(message[::-1])
            if message == "end":
                await link.close(4001, "done")

    async with websockets.serve(answer, "127.0.0.1", 0, subprotocols=["chat"]) as inner:
        inner_port = inner.sockets[0].getsockname()[1]
        headers = {"E2b-Sandbox-Id": "a" * 20, "E2b-Sandbox-Port": str(inner_port), "X-Own": "kept"}
        async with asyncio.timeout(SECONDS):
            async with websockets.connect(
                f"ws://127.0.0.1:{port}/way?q=1", additional_headers=headers, subprotocols=["chat"], proxy=None
            ) as link:
                assert link.subprotocol == "chat"
                for message in ("hello", b"\x00\x01", "x" * 300_000):
                    await link.send(message)
                    assert await link.recv() == message[::-1]
                await link.send("end")
                assert await link.recv() == "dne"
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await link.recv()
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 4001
    assert seen == [("/way?q=1", "kept", "chat")]


async def test_a_program_that_speaks_no_http_is_told_of(port_of_a_sandbox: tuple[int, Any]) -> None:
    port, _ = port_of_a_sandbox

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"\x00\x01\x02 no http\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(garbage, "127.0.0.1", 0) as inner:
        inner_port = inner.sockets[0].getsockname()[1]
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"GET / HTTP/1.1\r\nHost: {inner_port}-{'a' * 20}.localhost\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            answer = await reader.read()
            writer.close()
    assert answer.startswith(b"HTTP/1.1 502") and b"the answer is not HTTP" in answer
