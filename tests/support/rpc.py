"""The client's side of libvirt's RPC, byte by byte: for what no real client would send."""

from __future__ import annotations

import asyncio
import random
import struct
from typing import Any

from vmm.libvirt import rpc, xdr
from vmm.libvirt.procedures import Procedure
from vmm.libvirt.rpc import RpcHeader, RpcKind, RpcMessage, RpcStatus
from vmm.libvirt.wire import Signature


class RpcClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.serial = 0

    @classmethod
    async def connect(cls, path: str) -> RpcClient:
        return cls(*await asyncio.open_unix_connection(path, limit=1 << 22))

    async def message(self) -> RpcMessage:
        """The next one of any kind."""
        (length,) = struct.unpack(">I", await self.reader.readexactly(4))
        return rpc.unpack(await self.reader.readexactly(length - 4))

    def send(self, procedure: int, body: bytes = b"", *, program: int = rpc.REMOTE, kind: int = RpcKind.CALL) -> int:
        """A call; its serial."""
        self.serial += 1
        self.writer.write(rpc.pack(RpcHeader(program, rpc.VERSION, procedure, kind, self.serial, RpcStatus.OK), body))
        return self.serial

    async def call(self, procedure: int, body: bytes = b"", **how: Any) -> RpcMessage:
        """A call's reply; what else comes meanwhile is left out."""
        serial = self.send(procedure, body, **how)
        while True:
            found = await self.message()
            if found.header.kind == RpcKind.REPLY and found.header.serial == serial:
                return found

    async def open(self, flags: int = 0) -> RpcClient:
        """Greet as libvirt's clients do."""
        assert (await self.call(66)).header.status == RpcStatus.OK
        body = Signature("name:string? flags:uint").write(("loopvisor:///system", flags))
        assert (await self.call(1, body)).header.status == RpcStatus.OK
        return self

    def close(self) -> None:
        self.writer.transport.abort()


class Generator:
    """Values of declared types, mostly such as make sense."""

    def __init__(self, source: random.Random, texts: list[str], blobs: list[bytes]) -> None:
        self.source, self.texts, self.blobs = source, texts, blobs

    def value(self, kind: Any) -> Any:
        """Of any type of vmm.libvirt.xdr."""
        source = self.source
        if isinstance(kind, xdr.Number):
            if kind is xdr.DOUBLE:
                return source.random()
            low, high = {xdr.INT: (-(2**31), 2**31 - 1), xdr.UINT: (0, 2**32 - 1), xdr.HYPER: (-(2**63), 2**63 - 1),
                         xdr.UHYPER: (0, 2**64 - 1)}[kind]  # fmt: skip
            near = source.choice((0, 1, 2, 3, 16, 4096, 1 << 16, 1 << 31))
            return max(low, min(high, source.choice((0, 0, near, near, -near, low, high, source.randrange(1 << 64)))))
        if isinstance(kind, xdr.String):
            return source.choice(self.texts)
        if isinstance(kind, xdr.Fixed):
            return source.choice([blob for blob in self.blobs if len(blob) == kind._length])
        if isinstance(kind, xdr.Opaque):
            return source.randbytes(source.choice((0, 1, 4, 100)))[: kind._limit]
        if isinstance(kind, xdr.CharArray):
            return "x"
        if isinstance(kind, xdr.Array):
            return [self.value(kind._item) for _ in range(min(source.choice((0, 1, 1, 3)), kind._limit))]
        if isinstance(kind, xdr.Optional):
            return self.value(kind._item) if source.random() < 0.6 else None
        if isinstance(kind, xdr.DiscriminatedUnion):
            which = source.choice(list(kind._arms))
            return which, self.value(kind._arms[which])
        assert isinstance(kind, xdr.Record), kind
        return kind._make(*[self.value(field) for field in kind._fields])

    def body(self, procedure: Procedure) -> bytes:
        """Arguments of a call."""
        return xdr.encode(procedure.arguments._record, self.value(procedure.arguments._record))

    def broken(self, data: bytes) -> bytes:
        """The same with something wrong."""
        source, changed = self.source, bytearray(data)
        for _ in range(source.choice((1, 1, 2, 8))):
            match source.randrange(5) if changed else 4:
                case 0:
                    changed[source.randrange(len(changed))] = source.randrange(256)
                case 1:
                    del changed[source.randrange(len(changed)) :]
                case 2:
                    at = source.randrange(len(changed)) & ~3
                    changed[at : at + 4] = struct.pack(">I", source.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 20)))
                case 3:
                    at = source.randrange(len(changed))
                    changed[at:at] = changed[at : at + source.randrange(64)]
                case _:
                    changed += source.randbytes(source.randrange(64))
        return bytes(changed)
