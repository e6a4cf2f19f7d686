"""What a client of the sandboxes' API hears of a fault that nobody has foreseen."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from vmm.sandboxes.serve.control import application


class Fleet:
    @property
    def draining(self) -> bool:
        raise OSError("a secret of the host")


async def test_a_fault_of_the_server_is_an_answer_in_json() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "query_string": b"", "headers": [],
        "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "http_version": "1.1",
    }  # fmt: skip
    app: Any = application(Fleet(), None, "example.test")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="secret"):  # for the log
        await app(scope, receive, send)
    assert sent[0]["status"] == 500
    body = b"".join(message.get("body", b"") for message in sent[1:])
    assert json.loads(body)["code"] == 500 and b"secret" not in body
