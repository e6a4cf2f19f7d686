"""Files of a sandbox by plain HTTP: GET and POST /files, also by signed URLs. Loop thread.

A signature is "v1_" and the SHA-256, in base64, of path:operation:user:token, with :expiration behind if the URL has
one. Bodies are never held whole: what comes goes on to the guest as fast as that takes it.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import posixpath
import stat
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from vmm.errors import ConfigError, GuestError, StateError, VmmError
from vmm.guest.tools import GuestEntry, GuestFileError, GuestTools
from vmm.sandboxes.serve.hosted import Hosted

MAX_FILES = 1000
"""Of one upload."""
PIECE = 256 << 10
METADATA = "x-metadata-"
_STATUS = {
    errno.EPERM: 403, errno.ENOENT: 404, errno.EACCES: 403, errno.EEXIST: 409, errno.ENOTDIR: 400, errno.EISDIR: 400,
    errno.EINVAL: 400, errno.ENOSPC: 507, errno.ENAMETOOLONG: 400, errno.EOPNOTSUPP: 400,
}  # fmt: skip


def failure(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as clients read it."""
    return JSONResponse({"code": status, "message": message}, status, headers)


def failed(error: VmmError) -> JSONResponse:
    """What a request is answered for an error of ours or the guest's."""
    if isinstance(error, GuestFileError):
        return failure(_STATUS.get(error.number, 500), str(error))
    if isinstance(error, ConfigError):
        return failure(400, str(error))
    return failure(502 if isinstance(error, StateError | GuestError) else 500, str(error))


def is_signed(request: Request, box: Hosted, operation: str) -> bool:
    """The request's URL has a signature that is right, and of which the time is not over."""
    query = request.query_params
    given = query.get("signature", "")
    text = f"{query.get('path', '')}:{operation}:{query.get('username', '')}:{box.sheet.access_token}"
    expiration = query.get("signature_expiration")
    if expiration is not None:
        if not expiration.isdigit() or len(expiration) > 12 or int(expiration) < time.time():
            return False
        text += f":{expiration}"
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()).rstrip(b"=").decode()
    return hmac.compare_digest(f"v1_{digest}".encode(), given.encode("utf-8", "surrogatepass"))


async def download(request: Request, box: Hosted) -> Response:
    """GET /files?path=…"""
    path = request.query_params.get("path", "")
    tools = GuestTools(box.vm.agent, request.query_params.get("username", ""))
    source = tools.read(path)
    try:
        first = await anext(source, b"")
    except VmmError as error:
        return failed(error)

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(source):  # type: ignore[type-var]
            yield first
            async for part in source:
                yield part

    name = posixpath.basename(path).encode("ascii", "replace").decode().replace('"', "_").replace("\\", "_")
    printable = "".join(char if char.isprintable() else "_" for char in name)
    headers = {"content-disposition": f'inline; filename="{printable}"'}
    return StreamingResponse(body(), media_type="application/octet-stream", headers=headers)


async def upload(request: Request, box: Hosted) -> Response:
    """POST /files: one file as the body, or several as the parts of a form."""
    tools = GuestTools(box.vm.agent, request.query_params.get("username", ""))
    attributes = {
        name.removeprefix(METADATA): value for name, value in request.headers.items() if name.startswith(METADATA)
    }
    path = request.query_params.get("path", "")
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    try:
        content = _plain(request)
        if kind == b"multipart/form-data":
            written = await _form(content, options.get(b"boundary", b""), tools, path, attributes)
        elif not path:
            return failure(400, "no path was given")
        else:
            written = [await tools.write(path, content, attributes)]
    except VmmError as error:
        return failed(error)
    except (MultipartParseError, zlib.error) as error:
        return failure(400, f"the body is not what its headers say: {error}")
    except ClientDisconnect:
        return failure(400, "the client went away")
    return JSONResponse([_written(entry) for entry in written])


def _written(entry: GuestEntry) -> dict[str, str]:
    kind = "dir" if stat.S_ISDIR(entry.mode) else "file"
    path = entry.path.encode("utf-8", "replace").decode()
    return {"name": posixpath.basename(path), "path": path, "type": kind}


async def _plain(request: Request) -> AsyncIterator[bytes]:
    """The body, uncompressed."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip", ""):
        raise ConfigError(f"content-encoding {encoding[:40]!r}: gzip or none is possible")
    inflate = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
    async for part in request.stream():
        if inflate is None:
            for at in range(0, len(part), PIECE):
                yield part[at : at + PIECE]
            continue
        while part:
            yield inflate.decompress(part, PIECE)
            part = inflate.unconsumed_tail
    if inflate is not None and not inflate.eof:
        raise zlib.error("the compressed body ends too early")


class _Part:
    """A part of a form while it comes."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.name: str | None = None
        self.pending: list[bytes] = []
        self.whole = False


_DONE = _Part()
"""Stands for parts that have been written."""
_DONE.whole = True


class _Form:
    """The parts of a form, one after another, from the parser's callbacks."""

    def __init__(self, boundary: bytes) -> None:
        self.parts: list[_Part] = []
        self._field, self._value = b"", b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_part_data": lambda data, start, end: self.parts[-1].pending.append(data[start:end]),
                "on_part_end": self._end,
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._headers,
            },
        )

    def feed(self, data: bytes) -> None:
        """Raises MultipartParseError."""
        self._parser.write(data)

    def finish(self) -> None:
        """Raises MultipartParseError if something is missing."""
        self._parser.finalize()
        if self.parts and not self.parts[-1].whole:
            raise MultipartParseError("the form ends too early")

    def _begin(self) -> None:
        if len(self.parts) > 2 * MAX_FILES:
            raise MultipartParseError(f"the form has more than {2 * MAX_FILES} parts")
        self.parts.append(_Part())

    def _end(self) -> None:
        self.parts[-1].whole = True

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field = (self._field + data[start:end])[:256]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value = (self._value + data[start:end])[:8192]

    def _on_header(self) -> None:
        if len(self.parts[-1].headers) < 16:
            self.parts[-1].headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _headers(self) -> None:
        _, options = parse_options_header(self.parts[-1].headers.get(b"content-disposition", b""))
        if b"filename" in options:
            self.parts[-1].name = options[b"filename"].decode("utf-8", "surrogateescape")


async def _form(
    content: AsyncIterator[bytes], boundary: bytes, tools: GuestTools, path: str, attributes: dict[str, str]
) -> list[GuestEntry]:
    """Write each file of a form as it comes. With `path` there is one, and it is written there."""
    if not 0 < len(boundary) <= 256:
        raise ConfigError("the form has no boundary")
    form, ended = _Form(boundary), False
    written: list[GuestEntry] = []

    async def more() -> None:
        nonlocal ended
        data = await anext(content, None)
        if data is None:
            ended = True
            form.finish()
        else:
            form.feed(data)

    async def body(part: _Part) -> AsyncIterator[bytes]:
        while True:
            pending, part.pending = part.pending, []
            for data in pending:
                yield data
            if part.whole or ended:
                return
            await more()

    at = 0
    while True:
        while at >= len(form.parts) and not ended:
            await more()
        if at >= len(form.parts):
            return written
        part = form.parts[at]
        while part.name is None and not part.whole and not ended and not part.pending:
            await more()
        if part.name is None:
            async for _ in body(part):
                pass  # a field that is no file
        elif len(written) >= MAX_FILES or (path and written):
            raise ConfigError("more files than one, but a path" if path else f"more than {MAX_FILES} files in one form")
        else:
            written.append(await tools.write(path or part.name, body(part), attributes))
            async for _ in body(part):
                pass  # what the guest did not take
        form.parts[at] = _DONE
        at += 1
