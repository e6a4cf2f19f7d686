"""The driver's side of a virtio-fs device: FUSE requests over its queues, as Linux' driver sends them."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.virtio import Driver, MmioDriver
from virtio.devices.fs import FsDevice
from virtio.fs import messages as m
from virtio.fs.messages import ROOT_ID, Opcode

HIPRIO, REQUESTS = 0, 1
ALL_FLAGS = 0xFFFFFFFF
_HEADER = m.OutHeader.sizeof()


class FuseError(OSError):
    """What a request was answered with."""


@dataclass
class FuseDriver:
    """One session with a share."""

    driver: Driver
    uid: int = 0
    gid: int = 0
    unique: int = 0
    nodes: dict[str, int] = field(default_factory=dict)

    def message(self, opcode: int, node: int, body: bytes) -> bytes:
        self.unique += 2
        head = {"len": m.InHeader.sizeof() + len(body), "opcode": opcode, "unique": self.unique, "nodeid": node}
        head |= {"uid": self.uid, "gid": self.gid, "pid": 1, "total_extlen": 0, "padding": 0}
        result: bytes = m.InHeader.build(head) + body
        return result

    async def raw(self, data: bytes, room: int = 4096, index: int = REQUESTS) -> bytes:
        """Send these bytes; the reply with its header."""
        return await self.driver.request(index, [data], [room] if room else [])

    async def ask(self, opcode: int, node: int, body: bytes = b"", room: int = 4096) -> bytes:
        """The body of the reply. Raises FuseError."""
        reply = await self.raw(self.message(opcode, node, body), _HEADER + room)
        head = m.OutHeader.parse(reply[:_HEADER])
        assert head.unique == self.unique and head.len == len(reply)
        if head.error:
            assert len(reply) == _HEADER and -4096 < head.error < 0
            raise FuseError(-head.error, os.strerror(-head.error), Opcode(opcode).name)
        return reply[_HEADER:]

    async def init(self, minor: int = m.MINOR, flags: int = ALL_FLAGS) -> Any:
        asked = m.InitIn.build({"major": m.MAJOR, "minor": minor, "max_readahead": 1 << 17, "flags": flags})
        return m.InitOut.parse(await self.ask(Opcode.INIT, 0, asked))

    async def lookup(self, name: str | bytes, parent: int = ROOT_ID) -> Any:
        text = name.encode() if isinstance(name, str) else name
        return m.EntryOut.parse(await self.ask(Opcode.LOOKUP, parent, text + b"\0"))

    async def walk(self, path: str) -> int:
        """The node of a path below the root."""
        node = ROOT_ID
        for part in path.split("/"):
            node = (await self.lookup(part, node)).nodeid
        return node

    async def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        body = m.OpenIn.build({"flags": flags, "open_flags": 0})
        return int(m.OpenOut.parse(await self.ask(Opcode.OPEN, node, body)).fh)

    async def opendir(self, node: int = ROOT_ID) -> int:
        body = m.OpenIn.build({"flags": 0, "open_flags": 0})
        return int(m.OpenOut.parse(await self.ask(Opcode.OPENDIR, node, body)).fh)

    async def create(
        self, name: str, parent: int = ROOT_ID, flags: int = os.O_RDWR, mode: int = 0o644
    ) -> tuple[Any, int]:
        body = m.CreateIn.build({"flags": flags, "mode": 0o100000 | mode, "umask": 0, "open_flags": 0})
        reply = await self.ask(Opcode.CREATE, parent, body + name.encode() + b"\0")
        size = m.EntryOut.sizeof()
        return m.EntryOut.parse(reply[:size]), int(m.OpenOut.parse(reply[size:]).fh)

    async def read(self, node: int, handle: int, size: int, offset: int = 0) -> bytes:
        return await self.ask(Opcode.READ, node, self.read_body(handle, size, offset), size)

    @staticmethod
    def read_body(handle: int, size: int, offset: int) -> bytes:
        fields = {
            "fh": handle,
            "offset": offset,
            "size": size,
            "read_flags": 0,
            "lock_owner": 0,
            "flags": 0,
            "padding": 0,
        }
        result: bytes = m.ReadIn.build(fields)
        return result

    async def write(self, node: int, handle: int, data: bytes, offset: int = 0, flags: int = 0) -> int:
        fields = {"fh": handle, "offset": offset, "size": len(data), "write_flags": flags}
        fields |= {"lock_owner": 0, "flags": 0, "padding": 0}
        return int(m.WriteOut.parse(await self.ask(Opcode.WRITE, node, m.WriteIn.build(fields) + data)).size)

    async def release(self, node: int, handle: int, *, directory: bool = False) -> None:
        fields = {"fh": handle, "flags": 0, "release_flags": 0, "lock_owner": 0}
        await self.ask(Opcode.RELEASEDIR if directory else Opcode.RELEASE, node, m.ReleaseIn.build(fields))

    async def getattr(self, node: int) -> Any:
        body = m.GetattrIn.build({"flags": 0, "dummy": 0, "fh": 0})
        return m.AttrOut.parse(await self.ask(Opcode.GETATTR, node, body)).attr

    async def setattr(self, node: int, valid: int, **values: int) -> Any:
        names = [one.name for one in m.SetattrIn.subcons]
        body = m.SetattrIn.build(dict.fromkeys(names, 0) | {"valid": valid} | values)
        return m.AttrOut.parse(await self.ask(Opcode.SETATTR, node, body)).attr

    async def mkdir(self, name: str, parent: int = ROOT_ID, mode: int = 0o755) -> Any:
        body = m.MkdirIn.build({"mode": mode, "umask": 0}) + name.encode() + b"\0"
        return m.EntryOut.parse(await self.ask(Opcode.MKDIR, parent, body))

    async def mknod(self, name: str, mode: int, rdev: int = 0) -> Any:
        body = m.MknodIn.build({"mode": mode, "rdev": rdev, "umask": 0, "padding": 0}) + name.encode() + b"\0"
        return m.EntryOut.parse(await self.ask(Opcode.MKNOD, ROOT_ID, body))

    async def remove(self, name: str, parent: int = ROOT_ID, *, directory: bool = False) -> None:
        await self.ask(Opcode.RMDIR if directory else Opcode.UNLINK, parent, name.encode() + b"\0")

    async def rename(
        self, old: str, new: str, parent: int = ROOT_ID, target: int = ROOT_ID, flags: int | None = None
    ) -> None:
        names = old.encode() + b"\0" + new.encode() + b"\0"
        if flags is None:
            await self.ask(Opcode.RENAME, parent, m.RenameIn.build({"newdir": target}) + names)
        else:
            body = m.Rename2In.build({"newdir": target, "flags": flags, "padding": 0})
            await self.ask(Opcode.RENAME2, parent, body + names)

    async def link(self, node: int, name: str, parent: int = ROOT_ID) -> Any:
        body = m.LinkIn.build({"oldnodeid": node}) + name.encode() + b"\0"
        return m.EntryOut.parse(await self.ask(Opcode.LINK, parent, body))

    async def symlink(self, name: str, target: str, parent: int = ROOT_ID) -> Any:
        body = name.encode() + b"\0" + target.encode() + b"\0"
        return m.EntryOut.parse(await self.ask(Opcode.SYMLINK, parent, body))

    async def readlink(self, node: int) -> bytes:
        return await self.ask(Opcode.READLINK, node)

    async def forget(self, node: int, lookups: int = 1) -> None:
        body = m.ForgetIn.build({"nlookup": lookups})
        assert await self.raw(self.message(Opcode.FORGET, node, body), 0, HIPRIO) == b""

    async def readdir(
        self, handle: int, node: int = ROOT_ID, *, plus: bool = False, size: int = 4096
    ) -> dict[str, Any]:
        """Every entry: name -> node it was looked up as (`plus`), else its type."""
        found: dict[str, Any] = {}
        offset = 0
        while True:
            opcode = Opcode.READDIRPLUS if plus else Opcode.READDIR
            part = await self.ask(opcode, node, self.read_body(handle, size, offset), size)
            if not part:
                return found
            while part:
                entry, front = None, m.EntryOut.sizeof() if plus else 0
                if plus:
                    entry = m.EntryOut.parse(part)
                head = m.Dirent.parse(part[front:])
                front += m.Dirent.sizeof()
                name = part[front : front + head.namelen].decode()
                assert name not in found
                found[name] = entry if plus else head.type
                offset = head.off
                part = part[front - m.Dirent.sizeof() + (m.Dirent.sizeof() + head.namelen + 7 & ~7) :]

    async def setxattr(self, node: int, name: str, value: bytes, flags: int = 0) -> None:
        body = m.SetxattrIn.build({"size": len(value), "flags": flags}) + name.encode() + b"\0" + value
        await self.ask(Opcode.SETXATTR, node, body)

    async def getxattr(self, node: int, name: str, size: int = 65536) -> bytes:
        body = m.GetxattrIn.build({"size": size, "padding": 0}) + name.encode() + b"\0"
        return await self.ask(Opcode.GETXATTR, node, body, 65536)

    async def listxattr(self, node: int) -> list[bytes]:
        body = m.GetxattrIn.build({"size": 65536, "padding": 0})
        return (await self.ask(Opcode.LISTXATTR, node, body, 65536)).split(b"\0")[:-1]

    async def refused(self, number: int, opcode: int, node: int, body: bytes = b"") -> None:
        """The request is answered with this error."""
        try:
            await self.ask(opcode, node, body)
        except FuseError as error:
            assert error.errno == number, f"{errno.errorcode[error.errno or 0]}, not {errno.errorcode[number]}"
        else:
            raise AssertionError(f"{Opcode(opcode).name} was not refused")


async def share(path: Path, *, begin: bool = True, kind: type[Driver] = MmioDriver, **options: Any) -> FuseDriver:
    """A device for a directory, with a driver of this kind that has begun a session."""
    driver = kind(FsDevice(path, "shared", **options))
    driver.initialize()
    fuse = FuseDriver(driver)
    if begin:
        await fuse.init()
    return fuse


def names(*parts: bytes | str) -> bytes:
    """Names as requests carry them."""
    return b"".join(
        struct.pack(f"{len(part) + 1}s", part.encode() if isinstance(part, str) else part) for part in parts
    )
