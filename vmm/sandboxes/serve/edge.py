"""The outermost ASGI application: for whom a request is, the control API or a port of a sandbox, and whether its body
is one that is waited for. Loop thread.

A request is for a sandbox if it names one in the headers E2b-Sandbox-Id and E2b-Sandbox-Port, or if its host is
PORT-ID.anything. Port 49983 is the sandbox's own surface, which is served from here; others are the guest's.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vmm.errors import StateError, VmmError
from vmm.sandboxes.serve import filesystem_service, process_service
from vmm.sandboxes.serve.control import RESUME_SECONDS
from vmm.sandboxes.serve.files import download, failed, failure, is_signed, upload
from vmm.sandboxes.serve.fleet import Fleet, NotThere
from vmm.sandboxes.serve.hosted import Hosted
from vmm.sandboxes.serve.proxy import forward, forward_websocket
from vmm.sandboxes.serve.rpc import CALL, InnerCall
from vmm.sandboxes.serve.tokens import Tenant

INNER_PORT = 49983
MAX_CONTROL = 1 << 20
"""Bytes of a body for the control API."""
IDLE_SECONDS = 120.0
"""How long the next piece of a body is waited for; streams of input say every 50 s that they live."""
_HOST = re.compile(r"(\d{1,5})-([a-z0-9]{20})(?:\.|:|$)")

Application = Callable[[Any, Any, Any], Awaitable[None]]


class RequestBody:
    """`receive` of a request that does not wait for ever, nor takes more than `limit` bytes, and knows when its client
    is gone."""

    def __init__(self, receive: Any, limit: int | None) -> None:
        self._receive, self._left = receive, limit
        self._whole = False
        self.gone = asyncio.Event()
        self.too_large = False

    async def __call__(self) -> Any:
        if self.gone.is_set():
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout(None if self._whole else IDLE_SECONDS):
                message = await self._receive()
        except TimeoutError:
            message = {"type": "http.disconnect"}
        if message["type"] == "http.disconnect":
            self.gone.set()
            return message
        self._whole = not message.get("more_body", False)
        if self._left is not None:
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                self.too_large = True
                self._whole = True
                return {"type": "http.request", "body": b"", "more_body": False}
        return message


class Edge:
    """The ASGI application."""

    def __init__(self, fleet: Fleet, control: Application, tenants: Callable[[str], Tenant]) -> None:
        """`tenants`: by name, for sandboxes that a request takes up."""
        self._fleet, self._control, self._tenants = fleet, control, tenants
        self._services: dict[str, Application] = {}
        for service in (process_service.service(), filesystem_service.service()):
            self._services[service.path] = service
        self._busy = 0
        self.idle = asyncio.Event()
        """No request is under way."""
        self.idle.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        self._busy += 1
        self.idle.clear()
        try:
            await self._route(scope, receive, send)
        finally:
            self._busy -= 1
            if not self._busy:
                self.idle.set()

    async def _route(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        found = _sandbox_of(headers)
        if found is None:
            if scope["type"] == "websocket":
                await _close_websocket(receive, send, "no such WebSocket")
                return
            await self._answer_control(scope, receive, send)
            return
        port, name = found
        box: Hosted | None
        try:
            box = await self._up(self._fleet.find(name))
        except VmmError as error:
            box, text = None, str(error)
        if scope["type"] == "websocket":
            if box is None or port == INNER_PORT:
                await _close_websocket(receive, send, "no such WebSocket")
            else:
                await forward_websocket(scope, receive, send, box, port)
            return
        if box is None:
            answer: Response = JSONResponse({"sandboxId": name, "message": text, "code": 502}, 502)
            await answer(scope, receive, send)
            return
        body = RequestBody(receive, None)
        if port != INNER_PORT:
            answer = await forward(Request(scope, body), box, port)
            await answer(scope, body, send)
            return
        await self._answer_inner(scope, body, send, box, headers)

    async def _answer_control(self, scope: Any, receive: Any, send: Any) -> None:
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > MAX_CONTROL:
            await failure(413, f"the body is larger than {MAX_CONTROL} bytes")(scope, receive, send)
            return
        body, started = RequestBody(receive, MAX_CONTROL), False

        async def answered(message: Any) -> None:
            nonlocal started
            if body.too_large and not started:
                started = True
                await failure(413, f"the body is larger than {MAX_CONTROL} bytes")(scope, receive, send)
            if not body.too_large:
                started = True
                await send(message)

        await self._control(scope, body, answered)

    async def _up(self, box: Hosted) -> Hosted:
        """The sandbox, running; a paused one is taken up if that was asked for. Raises VmmError."""
        if box.phase == "paused" and box.sheet.resumes:
            await self._fleet.resume(box, RESUME_SECONDS, self._tenants(box.sheet.tenant))
        if box.phase != "running":
            raise NotThere(f"sandbox {box.sheet.id} was not found among those that run: it is {box.phase}")
        return box

    async def _answer_inner(
        self, scope: Any, receive: RequestBody, send: Any, box: Hosted, headers: dict[bytes, bytes]
    ) -> None:
        """The sandbox's own surface."""
        path, request = scope["path"], Request(scope, receive)
        token = headers.get(b"x-access-token", b"")
        may = hmac.compare_digest(token, box.sheet.access_token.encode())
        answer: Response
        if path == "/health":
            answer = Response(status_code=204)
        elif path == "/files" and request.method in ("GET", "POST"):
            operation = "read" if request.method == "GET" else "write"
            if not may and not is_signed(request, box, operation):
                answer = failure(401, "the access token or the signature is missing, wrong or too old")
            else:
                try:
                    answer = await (download if operation == "read" else upload)(request, box)
                except StateError as error:
                    answer = failed(error)
        elif not may:
            answer = failure(401, "the access token is missing or wrong")
        elif (service := self._services.get(path.rpartition("/")[0])) is not None and request.method == "POST":
            token_of_call = CALL.set(InnerCall(box, receive.gone))
            try:
                await service(scope, receive, send)
            finally:
                CALL.reset(token_of_call)
            return
        elif path == "/envs" and request.method == "GET":
            answer = JSONResponse(box.sheet.env)
        else:
            answer = failure(404, "no such thing here")
        await answer(scope, receive, send)


def _sandbox_of(headers: dict[bytes, bytes]) -> tuple[int, str] | None:
    """(port, id) of the sandbox that a request names."""
    name = headers.get(b"e2b-sandbox-id", b"").decode("latin-1")
    if name:
        port = headers.get(b"e2b-sandbox-port", str(INNER_PORT).encode())
        number = int(port) if port.isdigit() and len(port) < 6 else 0
        return number, name
    found = _HOST.match(headers.get(b"host", b"").decode("latin-1"))
    return (int(found[1]), found[2]) if found is not None else None


async def _close_websocket(receive: Any, send: Any, reason: str) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008, "reason": reason})
