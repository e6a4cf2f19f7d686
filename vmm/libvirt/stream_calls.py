"""Procedures that open a stream to a machine: its console, and the named ports of its virtio console."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from vmm.errors import HostError, os_reason
from vmm.libvirt.client import Call
from vmm.libvirt.domain_calls import check_flags
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.stream import Stream
from vmm.libvirt.wire import DomainRef

calls = Procedures()

FORCE, SAFE = 1, 2
"""virDomainConsoleFlags, and virDomainChannelFlags' only one."""
BUFFER = 64 << 10


class SocketEndpoint:
    """A machine's socket as the daemon's side of a stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.closed = False
        writer.transport.set_write_buffer_limits(high=BUFFER)

    @classmethod
    async def connect(cls, path: Path) -> SocketEndpoint:
        """Raises HostError."""
        try:
            return cls(*await asyncio.open_unix_connection(str(path), limit=BUFFER))
        except OSError as error:
            raise HostError(f"{path}: {os_reason(error)}") from error

    async def read(self, limit: int) -> bytes:
        return await self._reader.read(min(limit, BUFFER))

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def finish(self) -> None:
        return None

    async def aclose(self) -> None:
        self.closed = True
        self._writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()
        self._writer.transport.abort()


class Holder:
    """Who has a console: one client at a time, unless the next insists."""

    def __init__(self, stream: Stream, endpoint: SocketEndpoint) -> None:
        self.stream, self.endpoint = stream, endpoint


async def _open(call: Call, dom: DomainRef, what: str, path: Path, flags: int) -> None:
    domain = call.daemon.domains.of(dom)
    held: Holder | None = domain.extra.get(what)
    if held is not None and not held.endpoint.closed:
        if not flags & FORCE:
            raise LibvirtError(Code.OPERATION_FAILED, "Active console session exists for this domain")
        await held.stream.disconnect()
    endpoint = await SocketEndpoint.connect(path)
    stream = Stream(call.client, call.header, endpoint)
    try:
        call.client.open_stream(call.header, stream)
    except LibvirtError:
        await endpoint.aclose()
        raise
    domain.extra[what] = Holder(stream, endpoint)
    call.afterwards.append(stream.start)


@calls.change(201, "domain_open_console", "dom:domain device:string? flags:uint")
async def domain_open_console(call: Call, dom: DomainRef, device: str | None, flags: int) -> None:
    check_flags(flags, FORCE | SAFE)
    entry = call.daemon.domains.of(dom).running_entry()
    if device not in (None, "", "serial0", "console0"):
        raise LibvirtError(Code.INVALID_ARG, f"there is no console {device!r}; here is serial0")
    await _open(call, dom, "console", entry.console, flags)


@calls.change(296, "domain_open_channel", "dom:domain name:string? flags:uint")
async def domain_open_channel(call: Call, dom: DomainRef, name: str | None, flags: int) -> None:
    check_flags(flags, FORCE)
    domain = call.daemon.domains.of(dom)
    domain.running_entry()
    ports = {port.name: port.path for port in domain.spec.config.ports}
    wanted = name or next(iter(ports), None)
    if wanted not in ports:
        raise LibvirtError(Code.INVALID_ARG, f"there is no channel {name!r}; here is {', '.join(ports) or 'none'}")
    await _open(call, dom, f"channel {wanted}", ports[wanted], flags)
