"""Files and ports of a guest by the agent's own tools (images/init/tools.c), which need no program of the image. Each
runs as a user of the guest, from that user's home. What the guest answers is hostile: read in bounded memory, and
GuestError if it is not of the form. Loop thread."""

from __future__ import annotations

import errno
import os
import posixpath
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cpu.values import dataclass
from vmm.errors import ConfigError, GuestError
from vmm.guest.agent import Agent
from vmm.guest.frames import TOOL, Text
from vmm.guest.process import GuestProcess, GuestStream

MAX_ANSWER = 32 << 20
"""Bytes of a listing."""
MAX_PATH = 4096
EVENTS = ("ready", "created", "written", "removed", "renamed", "changed")
_ENTRY = struct.Struct("<IIIIQq")
NO_USER, NO_PROGRAM = 126, 127
"""Statuses by which the agent itself says that it could not become this user, or found no such directory."""


class GuestFileError(GuestError):
    """The guest refuses: `number` is its errno."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


@dataclass(frozen=True, slots=True)
class GuestEntry:
    """A file, directory or whatever else has a name."""

    path: str
    """Absolute, without "." and ".."."""
    mode: int
    """As stat(2) has it, of the name itself; 0: it is gone."""
    target_mode: int
    """Of what a symbolic link leads to; 0: nowhere, or it is none."""
    size: int
    mtime_ns: int
    link: str
    """Where a symbolic link leads to."""
    owner: str
    """The user's name, or number if it has none."""
    group: str


@dataclass(frozen=True, slots=True)
class GuestMeasure:
    """What a guest says of itself."""

    disk_total: int
    disk_free: int
    cpu_ticks: tuple[int, ...]
    """The first line of /proc/stat: user, nice, system, idle, … of all processors."""
    memory: dict[str, int]
    """Bytes by the names of /proc/meminfo."""


def _take_entry(data: bytes, at: int) -> tuple[GuestEntry, int] | None:
    """The entry that begins at `at` and where it ends; None: it is not whole yet."""
    begin = position = at + _ENTRY.size
    for _ in range(4):
        end = data.find(b"\0", position, position + 2 * MAX_PATH)
        if end < 0:
            if len(data) - position > 2 * MAX_PATH:
                raise GuestError("the guest sent a name without an end")
            return None
        position = end + 1
    mode, target, _uid, _gid, size, mtime = _ENTRY.unpack_from(data, at)
    path, link, owner, group = (os.fsdecode(part) for part in data[begin : position - 1].split(b"\0"))
    path = posixpath.normpath("/" + path.lstrip("/"))
    return GuestEntry(path, mode, target, min(size, 1 << 62), mtime, link, owner, group), position


def _entries(data: bytes) -> list[GuestEntry]:
    found, at = [], 0
    while at < len(data):
        taken = _take_entry(data, at)
        if taken is None:
            raise GuestError("the guest sent half an entry")
        found.append(taken[0])
        at = taken[1]
    return found


def _only_entry(data: bytes) -> GuestEntry:
    found = _entries(data)
    if len(found) != 1:
        raise GuestError("the guest sent something else than an entry")
    return found[0]


async def _bounded(stream: GuestStream, limit: int) -> bytes:
    data = bytearray()
    async for part in stream:
        data += part
        if len(data) > limit:
            raise GuestError(f"the guest sent more than {limit} bytes")
    return bytes(data)


class GuestTools:
    """The tools of a machine's agent, as `user` (empty: root)."""

    def __init__(self, agent: Agent, user: Text = "") -> None:
        self._agent = agent
        self._user = user

    @asynccontextmanager
    async def _run(self, *words: Text, shown: str) -> AsyncIterator[GuestProcess]:
        """Until the block ends, then its status must be 0. Raises GuestFileError."""
        async with await self._agent.start_process(*words, user=self._user, flags=TOOL) as process:
            yield process
            complaint = await _bounded(process.stderr, 4096)
            status = await process.wait()
        if status in (NO_USER, NO_PROGRAM):
            text = complaint.decode(errors="replace").strip().removeprefix("agent: ") or "the agent refused"
            raise ConfigError(text)
        if status:
            reason = os.strerror(status) if status in errno.errorcode else f"status {status}"
            raise GuestFileError(status, f"{shown}: {reason}")

    async def _answer(self, *words: Text, shown: str) -> bytes:
        async with self._run(*words, shown=shown) as process:
            await process.close_stdin()
            data = await _bounded(process.stdout, MAX_ANSWER)
        return data

    async def _entry(self, *words: Text, shown: str) -> GuestEntry:
        return _only_entry(await self._answer(*words, shown=shown))

    async def stat(self, path: str) -> GuestEntry:
        """What is there, links not followed. Raises GuestFileError, as all of these."""
        return await self._entry("stat", path, shown=path)

    async def list(self, path: str, depth: int = 1) -> list[GuestEntry]:
        """Everything below a directory, sorted by path."""
        found = _entries(await self._answer("list", path, str(depth), shown=path))
        return sorted(found, key=lambda entry: entry.path)

    async def make_directory(self, path: str) -> GuestEntry:
        """And those above it. EEXIST if it is there."""
        return await self._entry("mkdir", path, shown=path)

    async def remove(self, path: str) -> None:
        """With all that is in it."""
        await self._answer("remove", path, shown=path)

    async def rename(self, path: str, target: str) -> GuestEntry:
        """Directories above the target are made."""
        return await self._entry("rename", path, target, shown=path)

    async def read(self, path: str) -> AsyncIterator[bytes]:
        """The content, in pieces; an error comes before the first one, which may be empty."""
        async with self._run("read", path, shown=path) as process:
            await process.close_stdin()
            data, taken = b"", None
            async for part in process.stdout:
                data += part
                taken = _take_entry(data, 0)
                if taken is not None:
                    break
            if taken is not None:
                yield data[taken[1] :]
                async for part in process.stdout:
                    yield part

    async def write(self, path: str, content: AsyncIterator[bytes], attributes: dict[str, str]) -> GuestEntry:
        """The content takes the place of what is there; directories above are made. `attributes`: extended ones, in the
        name space "user"."""
        words = [f"{name}={value}" for name, value in attributes.items()]
        async with self._run("write", path, *words, shown=path) as process:
            async for part in content:
                if process.ended:
                    break
                await process.write(part)
            await process.close_stdin()
            data = await _bounded(process.stdout, MAX_ANSWER)
        return _only_entry(data)

    async def watch(self, path: str, recursive: bool) -> AsyncIterator[tuple[str, GuestEntry]]:
        """What happens in a directory: a word of EVENTS, the first of which is "ready", and what it happened to."""
        async with self._run("watch", path, "1" if recursive else "0", shown=path) as process:
            await process.close_stdin()
            data = b""
            async for part in process.stdout:
                data, at = data + part, 0
                while at < len(data) and (taken := _take_entry(data, at + 1)) is not None:
                    kind = data[at]
                    if kind >= len(EVENTS):
                        raise GuestError("the guest sent an unknown event")
                    at = taken[1]
                    yield EVENTS[kind], taken[0]
                data = data[at:]

    async def connect(self, port: int) -> GuestProcess:
        """A TCP connection to a port of the guest's loopback interface: its standard streams are that. The caller
        closes it. GuestFileError with ECONNREFUSED if nobody listens."""
        process = await self._agent.start_process("connect", str(port), flags=TOOL)
        try:
            if await process.stdout.read(1) == b"\1":
                return process
            status = await process.wait()
            raise GuestFileError(status, f"port {port}: {os.strerror(status)}")
        except BaseException:
            await process.aclose()
            raise

    async def measure(self) -> GuestMeasure:
        """Its memory, processors and root file system."""
        data = await self._answer("measure", shown="measure")
        parts = data[16:].split(b"\0")
        if len(data) < 16 or len(parts) < 2:
            raise GuestError("the guest sent no measures")
        total, free = struct.unpack("<QQ", data[:16])
        try:
            ticks = tuple(int(word) for word in parts[0].split()[1:])
            lines = [line.split() for line in parts[1].decode("ascii").splitlines()]
            memory = {line[0].rstrip(":"): int(line[1]) << 10 for line in lines if len(line) >= 2}
        except ValueError as error:
            raise GuestError("the guest sent measures that are none") from error
        return GuestMeasure(total, free, ticks, memory)


