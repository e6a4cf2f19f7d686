"""Ports of a sandbox by HTTP and WebSocket: a request goes to a program that listens on the guest's loopback interface,
by a connection that the agent makes there, so that neither the guest nor the host needs a network. Loop thread.

One connection to the guest is one request; the answer goes on as it comes. What the program answers is hostile.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from typing import Any

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, WebSocketException
from websockets.frames import Frame, Opcode
from websockets.http11 import Request as Handshake
from websockets.uri import parse_uri

from vmm.errors import GuestError, VmmError
from vmm.guest.process import GuestProcess
from vmm.guest.tools import GuestFileError, GuestTools
from vmm.sandboxes.serve.files import failed
from vmm.sandboxes.serve.hosted import Hosted

MAX_HEAD = 64 << 10
"""Bytes of the head of an answer."""
MAX_MESSAGE = 4 << 20
"""Bytes of a message of a WebSocket."""
HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"proxy-connection",
}  # fmt: skip
"""RFC 9110, 7.6.1."""
_WEBSOCKET = (b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions", b"sec-websocket-accept",
              b"sec-websocket-protocol")  # fmt: skip


def not_open(box: Hosted, port: int) -> Response:
    """Nobody listens there."""
    message = "The sandbox is running but port is not open"
    return JSONResponse({"sandboxId": box.sheet.id, "message": message, "port": port, "code": 502}, 502)


def _headers(raw: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    named = {word.strip().lower() for name, value in raw if name.lower() == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in raw if name.lower() not in HOP_BY_HOP | named]


async def forward(request: Request, box: Hosted, port: int) -> Response:
    """A request to a port of the sandbox, and its answer."""
    try:
        link = await GuestTools(box.vm.agent).connect(port)
    except GuestFileError as error:
        return not_open(box, port) if error.number == errno.ECONNREFUSED else failed(error)
    except VmmError as error:
        return failed(error)
    try:
        exchange = _Exchange(link, request)
        head = await exchange.begin()
    except (h11.ProtocolError, GuestError, ClientDisconnect) as error:
        await link.aclose()
        message = f"the answer is not HTTP: {error}"
        return JSONResponse({"sandboxId": box.sheet.id, "message": message, "code": 502}, 502)
    except BaseException:
        await link.aclose()
        raise
    response = StreamingResponse(exchange.body(), head.status_code)
    response.raw_headers = _headers(list(head.headers))
    return response


class _Exchange:
    """One request on its own connection."""

    def __init__(self, link: GuestProcess, request: Request) -> None:
        self._link, self._request = link, request
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._feeding: asyncio.Task[None] | None = None

    async def begin(self) -> h11.Response:
        """Send the request's head, begin with its body, and read the head of the answer."""
        request = self._request
        headers = _headers(list(request.scope["headers"]))
        if "transfer-encoding" in request.headers and "content-length" not in request.headers:
            headers.append((b"transfer-encoding", b"chunked"))
        headers.append((b"connection", b"close"))
        target = request.scope.get("raw_path") or request.url.path.encode()
        if request.scope["query_string"]:
            target += b"?" + request.scope["query_string"]
        await self._send(h11.Request(method=request.method, target=target, headers=headers))
        self._feeding = asyncio.create_task(self._feed(), name="proxied body")
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("it ended before its head")

    async def _send(self, event: Any) -> None:
        await self._link.write(self._http.send(event) or b"")

    async def _feed(self) -> None:
        try:
            async for part in self._request.stream():
                if part:
                    await self._send(h11.Data(data=part))
            await self._send(h11.EndOfMessage())
        except (ClientDisconnect, h11.LocalProtocolError):
            self._link.abandon()

    async def _next(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._link.stdout.read())
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's body, to its end; then the connection is closed."""
        try:
            while True:
                event = await self._next()
                if not isinstance(event, h11.Data):
                    return
                yield bytes(event.data)
        finally:
            if self._feeding is not None:
                self._feeding.cancel()
                await asyncio.gather(self._feeding, return_exceptions=True)
            await self._link.aclose()


async def forward_websocket(scope: Any, receive: Any, send: Any, box: Hosted, port: int) -> None:
    """A WebSocket to a port of the sandbox."""
    await receive()  # that a client wants to connect
    try:
        link = await GuestTools(box.vm.agent).connect(port)
    except VmmError:
        await send({"type": "websocket.close", "code": 1014, "reason": "port is not open"})
        return
    async with link:
        await _Socket(scope, receive, send, link).run()


class _Socket:
    """One WebSocket: what the server has taken apart is put together again for the guest, and the other way round."""

    def __init__(self, scope: Any, receive: Any, send: Any, link: GuestProcess) -> None:
        self._receive, self._send, self._link = receive, send, link
        target = (scope.get("raw_path") or scope["path"].encode()).decode("ascii", "replace")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("ascii", "replace")
        words: list[Any] = list(scope.get("subprotocols") or ())
        uri = parse_uri(f"ws://localhost{target}")
        self._protocol = ClientProtocol(uri, subprotocols=words or None, max_size=MAX_MESSAGE)
        self._headers = [pair for pair in _headers(list(scope["headers"])) if pair[0].lower() not in _WEBSOCKET]

    async def run(self) -> None:
        try:
            handshake: Handshake = self._protocol.connect()
            pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self._headers]
            for name in {name.lower() for name, _ in pairs}:
                if name in handshake.headers:
                    del handshake.headers[name]  # the client's own takes its place
            for name, text in pairs:
                handshake.headers[name] = text
            self._protocol.send_request(handshake)
            await self._flush()
            while self._protocol.state.name == "CONNECTING":
                await self._pull()
                if self._protocol.handshake_exc is not None:
                    raise self._protocol.handshake_exc
        except (InvalidHandshake, WebSocketException, GuestError, ValueError):
            await self._send({"type": "websocket.close", "code": 1014, "reason": "the program takes no WebSocket"})
            return
        answer = next((event for event in self._protocol.events_received() if hasattr(event, "headers")), None)
        chosen = answer.headers.get("Sec-WebSocket-Protocol") if answer is not None else None
        await self._send({"type": "websocket.accept", "subprotocol": chosen})
        inward = asyncio.create_task(self._inward(), name="websocket in")
        outward = asyncio.create_task(self._outward(), name="websocket out")
        try:
            await asyncio.wait({inward, outward}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (inward, outward):
                task.cancel()
            await asyncio.gather(inward, outward, return_exceptions=True)

    async def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                await self._link.write(data)
            else:
                await self._link.close_stdin()

    async def _pull(self) -> bool:
        data = await self._link.stdout.read()
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        await self._flush()
        return bool(data)

    async def _inward(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] != "websocket.receive":
                self._protocol.send_close(message.get("code") or 1000)
                await self._flush()
                return
            if message.get("text") is not None:
                self._protocol.send_text(message["text"].encode())
            else:
                self._protocol.send_binary(message.get("bytes") or b"")
            await self._flush()

    async def _outward(self) -> None:
        whole, is_text = bytearray(), True
        going = True
        while going:
            going = await self._pull()
            for frame in self._protocol.events_received():
                if not isinstance(frame, Frame):
                    continue
                opcode = frame.opcode
                if opcode in (Opcode.TEXT, Opcode.BINARY):
                    whole, is_text = bytearray(), opcode is Opcode.TEXT
                if opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                    whole += frame.data
                    if len(whole) > MAX_MESSAGE:
                        await self._send({"type": "websocket.close", "code": 1009})
                        return
                    if frame.fin:
                        content = {"text": whole.decode(errors="replace")} if is_text else {"bytes": bytes(whole)}
                        await self._send({"type": "websocket.send", **content})
                elif opcode is Opcode.CLOSE:
                    going = False
        close = self._protocol.close_rcvd
        code = close.code if close is not None else 1011
        # Codes that say how a connection ended are not sent (RFC 6455, 7.4.1).
        sent = {1005: 1000, 1006: 1011, 1015: 1011}.get(code, int(code))
        await self._send({"type": "websocket.close", "code": sent, "reason": close.reason if close is not None else ""})
