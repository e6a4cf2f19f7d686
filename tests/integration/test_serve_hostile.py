"""Clients of `vmm serve` that are no clients: what they send harms them alone. And tokens, with their limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.serve import SECONDS, Server, eventually, served

pytest.importorskip("uvicorn", reason="the extra serve is not installed: pip install '.[test]'")
pytestmark = pytest.mark.debian
ALICE, BOB = "alice-has-a-long-token", "bob-has-another-long-token"


@pytest.fixture(scope="module")
def server(linux: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    tokens = folder / "tokens"
    tokens.write_text(f"{ALICE} alice sandboxes=1 lifetime=600\n{BOB} bob  # another\n")
    tokens.chmod(0o600)
    with served(folder, "--token-file", str(tokens)) as server:
        yield server


@pytest.fixture(scope="module")
def box(server: Server) -> dict[str, Any]:
    status, box = server.ask("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 600}, X_API_Key=ALICE)
    assert status == 201
    return dict(box)


def talk(server: Server, *parts: bytes, read: bool = True) -> bytes:
    """What comes back for these bytes, to the connection's end or the answer's."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as link:
        got = b""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                link.sendall(part)
            if read:
                link.shutdown(socket.SHUT_WR)
                while data := link.recv(65536):
                    got += data
        return got


def test_tokens_are_asked_for_and_keep_tenants_apart(server: Server, box: dict[str, Any]) -> None:
    for token in ("", "wrong", ALICE[:-1]):
        status, answer = server.ask("GET", "/v2/sandboxes", X_API_Key=token)
        assert status == 401 and "token" in answer["message"]
    name = box["sandboxID"]
    assert server.ask("GET", "/v2/sandboxes", X_API_Key=BOB) == (200, [])
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/connect"), ("GET", "/metrics")):
        assert server.ask(method, f"/sandboxes/{name}{path}", X_API_Key=BOB)[0] == 404
    assert server.ask("GET", f"/sandboxes/{name}", X_API_Key=ALICE)[1]["state"] == "running"
    status, answer = server.ask("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 60}, X_API_Key=ALICE)
    assert status == 429 and "alice has 1 sandboxes" in answer["message"]
    status, answer = server.ask("POST", f"/sandboxes/{name}/timeout", {"timeout": 601}, X_API_Key=ALICE)
    assert status == 400 and "0 to 600" in answer["message"]


def test_bodies_that_are_none_are_refused_in_words(server: Server) -> None:
    for body, part in (
        (b"{", "JSON"),
        (b"[]", "body"),
        ({"templateID": 5}, "templateID"),
        ({"templateID": "base", "timeout": -1}, "timeout"),
        ({"templateID": "base", "metadata": {"a": "b" * 5000}}, "metadata"),
        ({"templateID": "base", "envVars": {"A=B": ""}}, "envVars"),
        ({"templateID": "base", "envVars": {str(n): "" for n in range(100)}}, "envVars"),
        ({"templateID": "base", "volumeMounts": [{"name": "v", "path": "/v"}]}, "volumeMounts"),
        ({"templateID": "oci:../secret"}, "template"),
    ):
        status, answer = server.ask("POST", "/v2/sandboxes", body, X_API_Key=BOB)
        assert status == 400 and part in answer["message"], (body, answer)
    for query in ("limit=0", "limit=x", "order=up", "state=gone", "nextToken=zz", "startedAfter=never"):
        assert server.ask("GET", f"/v2/sandboxes?{query}", X_API_Key=BOB)[0] == 400, query


def test_the_document_describes_the_api(server: Server) -> None:
    status, document = server.ask("GET", "/openapi.json")
    assert status == 200 and document["openapi"].startswith("3.")
    assert {"/v2/sandboxes", "/sandboxes/{sandbox_id}", "/sandboxes/{sandbox_id}/pause"} <= set(document["paths"])
    assert document["components"]["schemas"]["NewSandbox"]["required"] == ["templateID"]


def test_large_bodies_are_not_taken(server: Server, box: dict[str, Any]) -> None:
    head = f"POST /v2/sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: {BOB}\r\nContent-Type: application/json\r\n".encode()
    assert b"413" in talk(server, head + b"Content-Length: 10000000000\r\n\r\n").split(b"\r\n")[0]
    chunks = [b"100000\r\n" + bytes(1 << 20) + b"\r\n"] * 3
    assert b"413" in talk(server, head + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n").split(b"\r\n")[0]
    rpc = (
        f"POST /process.Process/Start HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: {box['sandboxID']}\r\n"
        f"X-Access-Token: {box['envdAccessToken']}\r\nContent-Type: application/connect+json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode()
    told = talk(server, rpc, b"5\r\n" + struct.pack(">BI", 0, 0xFFFFFFF0) + b"\r\n0\r\n\r\n")
    assert b"resource_exhausted" in told


def test_calls_that_are_none_are_refused(server: Server, box: dict[str, Any]) -> None:
    to_box = {"E2b_Sandbox_Id": box["sandboxID"], "X_Access_Token": box["envdAccessToken"]}
    ask = server.ask
    assert ask("POST", "/process.Process/List", {}, **to_box)[0] == 200
    assert ask("POST", "/process.Process/List", {}, **{**to_box, "X_Access_Token": "x"})[0] == 401
    assert ask("POST", "/process.Process/SendInput", {"process": {"pid": 5}}, **to_box)[1]["code"] == "not_found"
    assert ask("POST", "/process.Process/SendInput", {}, **to_box)[1]["code"] == "invalid_argument"
    for body in (b"\xff", b"[", b'{"process": 5}'):
        status, answer = ask("POST", "/process.Process/SendInput", body, **to_box)
        assert status >= 400 and "Traceback" not in json.dumps(answer)
    assert ask("POST", "/process.Process/None", {}, **to_box)[0] == 404
    assert ask("POST", "/none.None/None", {}, **to_box)[0] == 404
    assert ask("POST", "/filesystem.Filesystem/Stat", {"path": "/" + "a" * 5000}, **to_box)[1]["code"] == (
        "invalid_argument"
    )
    form = {**to_box, "Content_Type": "multipart/form-data; boundary=b"}
    for body in (b"", b"--b", b"--b\r\n" * 5000, b"--b\r\nContent-Disposition: form-data; filename=x\r\n\r\nendless"):
        assert ask("POST", "/files", body, **form)[0] in (200, 400), body[:20]
    zipped = {**to_box, "Content_Type": "application/octet-stream", "Content_Encoding": "gzip"}
    assert ask("POST", "/files?path=/tmp/z", b"no gzip", **zipped)[0] == 400
    for port in ("0", "99999", "x"):
        assert ask("GET", "/", **{**to_box, "E2b_Sandbox_Port": port})[0] >= 400
    assert ask("GET", "/", E2b_Sandbox_Id="no-such-sandbox")[1]["code"] == 502


def test_garbage_and_slow_clients_are_alone_with_it(server: Server) -> None:
    """Connections that say nothing, half of something, or anything, do not keep others from being answered."""
    with contextlib.ExitStack() as stack:
        for number in range(200):
            link = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS))
            link.sendall((b"", b"GET / HT", b"POST /v2/sandboxes HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")[number % 3])
        for garbage in (bytes(range(256)) * 40, b"\0" * 10000, b"GET " + b"a" * 200_000, b"X: y\r\n" * 30_000):
            talk(server, garbage)
        begin = time.monotonic()
        status, box = server.ask("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 60}, X_API_Key=BOB)
        assert status == 201 and time.monotonic() - begin < SECONDS
        assert server.ask("DELETE", f"/sandboxes/{box['sandboxID']}", X_API_Key=BOB)[0] == 204
    before = server.descriptors()
    eventually(lambda: server.descriptors() <= max(60, before - 150), "connections of clients that left are closed")


def test_without_tokens_only_this_host_is_served(tmp_path: Path) -> None:
    from vmm.errors import ConfigError
    from vmm.sandboxes.serve.fleet import FleetSettings
    from vmm.sandboxes.serve.server import SandboxServer, ServerSettings
    from vmm.sandboxes.serve.tokens import Tokens

    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="give --token-file"):
            SandboxServer(ServerSettings(FleetSettings(tmp_path, {}), host=host))
    file = tmp_path / "tokens"
    for text, mode, message in (
        ("", 0o600, "no token"),
        ("short", 0o600, "16 characters"),
        (ALICE, 0o644, "others can read it"),
        (f"{ALICE} a b", 0o600, "write TOKEN"),
        (f"{ALICE} a\n{BOB} a", 0o600, "the same name"),
    ):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(ConfigError, match=message):
            Tokens.read(file)
    with pytest.raises(ConfigError, match="none: no such file"):
        Tokens.read(tmp_path / "none")


async def test_a_head_that_does_not_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm.sandboxes.serve import server as serving
    from vmm.sandboxes.serve.fleet import FleetSettings

    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.2)
    settings = serving.ServerSettings(FleetSettings(tmp_path, {}), port=0)
    async with serving.SandboxServer(settings) as server:
        task = asyncio.create_task(server.serve())
        whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        for begin in (b"", b"GET / HT", whole + b"GET / HT"):
            async with asyncio.timeout(SECONDS):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(begin)
                got = await reader.read()  # to the connection's end
                assert (b"204" in got) == begin.startswith(whole)
                writer.close()
        server.stop()
        await task
