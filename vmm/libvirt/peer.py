"""This daemon as a client of another: what a migration from peer to peer needs, one call after the other.

    async with await Peer.open("loopvisor+tls://host/system", directory) as peer:
        found = await peer.call(59, "", "hostname:string")

A peer is reached by TLS, with this daemon's certificate for other daemons, or by a UNIX socket of this host. Loop
thread.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote

from vmm.errors import ConfigError, HostError, VmmError, os_reason
from vmm.libvirt import rpc
from vmm.libvirt.rpc import Budget, RpcHeader, RpcKind, RpcStatus
from vmm.libvirt.tls import DEFAULT_PORT, VERIFIED
from vmm.libvirt.wire import Signature, decode_error
from vmm.libvirt.xdr import XdrError
from vmm.management.registry import runtime_directory

CONNECT_SECONDS = 20.0
CALL_SECONDS = 180.0
CONNECT_OPEN = 1
_URI = re.compile(
    r"(?:loopvisor|qemu)(?:\+(\w+))?://(?:[^/@]*@)?(\[[0-9a-fA-F:.]+\]|[^/:?]*)(?::(\d{1,5}))?(/\w*)?(?:\?(.*))?"
)


def own_certificates(directory: Path | None) -> Path:
    """Where this daemon's certificate for other daemons is, beside the authority's: the directory of its own, or the
    client `daemon` that `vmm tls client DIR daemon` makes. Raises ConfigError."""
    if directory is None:
        raise ConfigError("this daemon has no certificates; run it with --tls DIR")
    for place in (directory, directory / "clients" / "daemon"):
        if (place / "clientcert.pem").is_file():
            return place
    raise ConfigError(
        f"{directory}: no certificate with which this daemon goes to others; vmm tls client {directory} daemon makes it"
    )


class Peer:
    """A connection to another daemon."""

    def __init__(self, uri: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._uri, self._reader, self._writer = uri, reader, writer
        self._serial = 0
        self._budget = Budget(rpc.MAX_MESSAGE)

    @classmethod
    async def open(cls, uri: str, directory: Path | None) -> Peer:
        """Raises ConfigError for a name that leads nowhere, HostError."""
        found = _URI.fullmatch(uri)
        if found is None:
            raise ConfigError(f"{uri}: no daemon's name; write loopvisor+tls://HOST/system")
        transport, host, port, path, query = found.groups()
        options = {name: values[0] for name, values in parse_qs(query or "").items()}
        transport = transport or ("tls" if host else "unix")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if transport == "unix":
                    place = options.get("socket") or str(runtime_directory() / "libvirt-sock")
                    reader, writer = await asyncio.open_unix_connection(unquote(place))
                elif transport == "tls":
                    where = Path(options["pkipath"]) if "pkipath" in options else own_certificates(directory)
                    reader, writer = await _secure(host.strip("[]"), int(port or DEFAULT_PORT), where)
                else:
                    raise ConfigError(
                        f"{uri}: a daemon goes to another by tls or unix; leave --p2p out, and the client goes by "
                        f"{transport}"
                    )
        except TimeoutError:
            raise HostError(f"{uri}: nobody answers within {CONNECT_SECONDS:g} s") from None
        except OSError as error:
            raise HostError(f"{uri}: {os_reason(error)}") from error
        peer = cls(uri, reader, writer)
        try:
            await peer.call(CONNECT_OPEN, "name:string? flags:uint", "", f"loopvisor://{path or '/system'}", 0)
        except BaseException:
            await peer.aclose()
            raise
        return peer

    async def call(self, number: int, arguments: str, result: str, *values: Any) -> dict[str, Any]:
        """What a procedure gives back, by name. Raises HostError with what the peer says."""
        self._serial += 1
        header = RpcHeader(rpc.REMOTE, rpc.VERSION, number, RpcKind.CALL, self._serial, RpcStatus.OK)
        body = Signature(arguments).write(values[0] if len(values) == 1 else values)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                self._writer.write(rpc.pack(header, body))
                await self._writer.drain()
                while True:
                    message = await rpc.read_message(self._reader, rpc.MAX_MESSAGE, self._budget, CALL_SECONDS)
                    if message.header.kind == RpcKind.REPLY and message.header.serial == self._serial:
                        break
            if message.header.status != RpcStatus.OK:
                raise HostError(f"{self._uri}: {decode_error(message.body)}")
            return Signature(result).read(message.body)
        except TimeoutError:
            raise HostError(f"{self._uri}: no answer within {CALL_SECONDS:g} s") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else "the connection ended"
            raise HostError(f"{self._uri}: {reason}") from error
        except XdrError as error:
            raise HostError(f"{self._uri}: {error}") from error

    async def aclose(self) -> None:
        """Idempotent."""
        self._writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()
        self._writer.transport.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _secure(host: str, port: int, directory: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    from vmm.migration.link import client_context

    context: ssl.SSLContext = client_context(directory)
    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
    try:
        if await reader.readexactly(1) != VERIFIED:
            raise HostError(f"{host}: this daemon's certificate is not allowed there")
    except asyncio.IncompleteReadError:
        writer.transport.abort()
        raise HostError(
            f"{host}: the connection ended in its greeting; is this daemon's certificate allowed?"
        ) from None
    except VmmError:
        writer.transport.abort()
        raise
    return reader, writer
