"""Services of the Connect protocol, by the library of the Connect project: who calls, how errors are told, and streams
that end at once when their client goes. Loop thread.

The library hears that a client went only when the next message is sent; here a stream's source waits for both.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from connectrpc.code import Code
from connectrpc.compat import google_protobuf_codecs
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo
from connectrpc.server import ConnectASGIApplication, Endpoint

from cpu.values import dataclass
from vmm.errors import ConfigError, GuestError, HostError, StateError, VmmError
from vmm.guest.tools import GuestFileError

if TYPE_CHECKING:
    from vmm.sandboxes.serve.hosted import Hosted

logger = logging.getLogger(__name__)
MAX_MESSAGE = 8 << 20
"""Bytes of a message of a client."""
KEEPALIVE_SECONDS = 50.0
T = TypeVar("T")
_BY_ERRNO = {
    errno.EPERM: Code.PERMISSION_DENIED, errno.ENOENT: Code.NOT_FOUND, errno.EACCES: Code.PERMISSION_DENIED,
    errno.EEXIST: Code.ALREADY_EXISTS, errno.ENOTDIR: Code.INVALID_ARGUMENT, errno.EISDIR: Code.INVALID_ARGUMENT,
    errno.EINVAL: Code.INVALID_ARGUMENT, errno.ENOSPC: Code.RESOURCE_EXHAUSTED,
    errno.ENAMETOOLONG: Code.INVALID_ARGUMENT, errno.ENOTEMPTY: Code.FAILED_PRECONDITION,
    errno.ELOOP: Code.INVALID_ARGUMENT, errno.EOPNOTSUPP: Code.UNIMPLEMENTED,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class InnerCall:
    """Who calls."""

    hosted: Hosted
    gone: asyncio.Event
    """The client has closed its connection."""


CALL: ContextVar[InnerCall] = ContextVar("CALL")


def hosted() -> Hosted:
    """The sandbox that is called."""
    return CALL.get().hosted


def user_of(headers: Mapping[str, str]) -> str:
    """The user of HTTP's basic authorization; "" if none is given. Raises ConnectError."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[0]
    except (binascii.Error, ValueError) as error:
        raise ConnectError(Code.UNAUTHENTICATED, "the authorization header is not base64") from error


def keepalive_of(headers: Mapping[str, str]) -> float:
    """Seconds after which a quiet stream says that it lives."""
    text = headers.get("keepalive-ping-interval", "")
    return min(KEEPALIVE_SECONDS, max(1.0, float(text))) if text.isdigit() and len(text) < 9 else KEEPALIVE_SECONDS


def seconds_of(context: Any) -> float | None:
    """How long a caller waits for a call to end; None: without end."""
    return context.timeout_ms / 1000 if context.timeout_ms else None


def told(error: VmmError) -> ConnectError:
    """As a client hears it."""
    text = str(error)
    if isinstance(error, GuestFileError):
        return ConnectError(_BY_ERRNO.get(error.number, Code.INTERNAL), text)
    if isinstance(error, ConfigError):
        return ConnectError(Code.INVALID_ARGUMENT, text)
    if isinstance(error, StateError | GuestError):
        return ConnectError(Code.UNAVAILABLE, text)
    return ConnectError(Code.INTERNAL, text if isinstance(error, HostError) else "the server failed")


async def until_gone(source: AsyncIterator[T]) -> AsyncIterator[T]:
    """The source's items until its end, or until the client is gone."""
    gone = asyncio.create_task(CALL.get().gone.wait(), name="client gone")
    try:
        while True:
            item: asyncio.Task[T] = asyncio.create_task(anext(source), name="next message")  # type: ignore[arg-type]
            try:
                await asyncio.wait({item, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not item.done():
                    item.cancel()
                    await asyncio.gather(item, return_exceptions=True)
            if item.cancelled():
                return
            if gone.done():
                item.exception()  # it is looked at, though nobody hears of it
                return
            try:
                yield item.result()
            except StopAsyncIteration:
                return
    finally:
        gone.cancel()
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


Unary = Callable[[Any, Any], Awaitable[Any]]
Streamed = Callable[[Any, Any], AsyncIterator[Any]]


def _failed(error: Exception) -> ConnectError:
    """A fault of ours is logged, and not told."""
    if isinstance(error, ConnectError):
        return error
    logger.error("a call failed", exc_info=error)
    return ConnectError(Code.INTERNAL, "the server failed")


def _unary(function: Unary) -> Unary:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await function(request, context)
        except VmmError as error:
            raise told(error) from error
        except Exception as error:
            raise _failed(error) from error

    return call


def _streamed(function: Streamed) -> Streamed:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for message in until_gone(function(request, context)):
                yield message
        except VmmError as error:
            raise told(error) from error
        except Exception as error:
            raise _failed(error) from error

    return call


class Service(ConnectASGIApplication[None]):
    """A service: `unary`, `streamed` (the answer) and `fed` (the request) functions by method name."""

    def __init__(
        self,
        name: str,
        messages: Mapping[str, Any],
        *,
        unary: Mapping[str, Unary],
        streamed: Mapping[str, Streamed],
        fed: Mapping[str, Unary],
    ) -> None:
        self._name = name

        def method(word: str) -> MethodInfo[Any, Any]:
            return MethodInfo(
                name=word,
                service_name=name,
                input=messages[f"{word}Request"],
                output=messages[f"{word}Response"],
                idempotency_level=IdempotencyLevel.UNKNOWN,
            )

        endpoints: dict[str, Any] = {}
        for word, call in unary.items():
            endpoints[f"/{name}/{word}"] = Endpoint.unary(method(word), _unary(call))
        for word, stream in streamed.items():
            endpoints[f"/{name}/{word}"] = Endpoint.server_stream(method(word), _streamed(stream))
        for word, call in fed.items():
            endpoints[f"/{name}/{word}"] = Endpoint.client_stream(method(word), _unary(call))
        super().__init__(
            service=None,
            endpoints=lambda _: endpoints,
            read_max_bytes=MAX_MESSAGE,
            codecs=google_protobuf_codecs(),
        )

    @property
    def path(self) -> str:
        return f"/{self._name}"
