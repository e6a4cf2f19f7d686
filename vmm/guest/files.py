"""Files and directories into the guest and out of it, as the input or output of programs that the agent runs there: cat
and tar. What the guest sends is unpacked by vmm/guest/untar.py, for it is hostile.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, cast

from vmm.errors import ConfigError, GuestError, os_reason
from vmm.guest.agent import Agent
from vmm.guest.frames import Text, encode
from vmm.guest.process import GuestProcess, GuestStream
from vmm.guest.untar import UntarError, unpack

CHUNK = 256 << 10
FILE_IN = 'cat >"$1" && chmod -- "$2" "$1"'
DIRECTORY_IN = 'mkdir -p -- "$1" && tar -x -p -C "$1" -f -'
LINK_IN = 'ln -s -f -n -- "$2" "$1"'
OUT = (
    'if [ -z "$2" ] && [ -L "$1" ]; then echo l && readlink -n -- "$1"; elif [ -d "$1" ]; then echo d && '
    'tar -c -C "$1" -f - .; else stat -L -c "f%a" -- "$1" && cat <"$1"; fi'
)
"""The first line tells which it is, and a file's mode. The second argument is not empty if a link is to be followed."""
COMPLAINT = 4096
"""Bytes of standard error that are kept."""
MAX_LINK = 4096


async def copy_in(agent: Agent, source: Path, target: Text, *, cwd: Text = "", follow: bool = True) -> None:
    """A file, or what is in a directory, or a link that is not to be followed. Paths of the guest begin at `cwd`.
    ConfigError if the host cannot read, GuestError if the guest cannot write."""
    try:
        mode = (await asyncio.to_thread(source.stat if follow else source.lstat)).st_mode
        send: Callable[[Path, Callable[[bytes], None]], None] | None
        if stat.S_ISDIR(mode):
            words: tuple[Text, ...] = (DIRECTORY_IN, "copy", target)
            send = _send_directory
        elif stat.S_ISLNK(mode):
            words, send = (LINK_IN, "copy", target, os.fsencode(source.readlink())), None
        else:
            words, send = (FILE_IN, "copy", target, f"{mode & 0o777:o}"), _send_file
        async with script(agent, words, f"{source} to {_shown(target)}", cwd=cwd) as process:
            loop = asyncio.get_running_loop()

            def write(data: bytes) -> None:
                asyncio.run_coroutine_threadsafe(process.write(data), loop).result()
                if process.ended:
                    raise BrokenPipeError  # it says why

            if send is not None:
                with suppress(BrokenPipeError):
                    await _in_thread(process, partial(send, source, write))
            await process.close_stdin()
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename or source}: {os_reason(error)}") from error


async def copy_out(
    agent: Agent,
    source: Text,
    target: Path | Callable[[bool], Path],
    limit: int,
    *,
    cwd: Text = "",
    follow: bool = True,
) -> None:
    """A file, or what is in a directory, or a link that is not to be followed. `target`: where it goes, or a function
    that says so once it is known whether it is a directory. GuestError if the guest cannot read it, sends no archive or
    more than `limit` bytes; ConfigError if the host cannot write."""
    part: Path | None = None
    end = target if isinstance(target, Path) else Path()
    try:
        what = f"{_shown(source)}" if callable(target) else f"{_shown(source)} to {target}"
        async with script(agent, (OUT, "copy", source, "follow" if follow else ""), what, cwd=cwd) as process:
            await process.close_stdin()
            kind = await _line(process.stdout)
            if not kind:
                return  # the program says why
            end = target(kind == b"d") if callable(target) else target
            stream = _Limited(process.stdout, asyncio.get_running_loop(), limit)
            if kind == b"d":
                await _in_thread(process, lambda: unpack(stream, end))
                return
            part = end.with_name(f".{end.name[:200]}.{os.getpid()}-{id(end):x}.part")
            if kind == b"l" and not follow:
                part.symlink_to(os.fsdecode(await _link_text(process.stdout)))
            elif kind[:1] == b"f" and kind[1:].isdigit():
                mode = int(kind[1:5], 8) & 0o777
                await _in_thread(process, partial(_receive_file, stream, part, mode))
            else:
                raise UntarError("something else than was asked for")
        part.replace(end)  # a file appears when it is whole
    except UntarError as error:
        raise GuestError(f"copying {_shown(source)}: the guest sent {error}") from error
    except ValueError as error:
        raise GuestError(f"copying {_shown(source)}: the guest sent no mode") from error
    except OSError as error:
        where = end if error.filename in (None, str(part)) else error.filename
        raise ConfigError(f"cannot write {where}: {os_reason(error)}") from error
    finally:
        if part is not None:
            with suppress(OSError):
                part.unlink(missing_ok=True)


async def _link_text(stream: GuestStream) -> bytes:
    text = b""
    while data := await stream.read(MAX_LINK):
        text += data
        if len(text) > MAX_LINK:
            break
    if not 0 < len(text) <= MAX_LINK or b"\0" in text:
        raise UntarError("a link to nowhere")
    return text


def _shown(path: Text) -> str:
    return encode(path).decode(errors="backslashreplace")


@asynccontextmanager
async def script(
    agent: Agent, words: tuple[Text, ...], what: str, *, cwd: Text = ""
) -> AsyncIterator[GuestProcess]:
    """A shell script in the guest. GuestError with its last complaint if it has failed when the block ends."""
    async with await agent.start_process("sh", "-c", *words, cwd=cwd) as process:
        complaint = asyncio.create_task(_last(process.stderr), name="complaint")
        try:
            yield process
            text = await complaint
            if await process.wait():
                raise GuestError(f"copying {what}: {text or 'the program there failed without a word'}")
        finally:
            complaint.cancel()
            await asyncio.gather(complaint, return_exceptions=True)


async def _last(stream: GuestStream) -> str:
    """The last line of a stream, printable."""
    kept = b""
    async for data in stream:
        kept = (kept + data)[-COMPLAINT:]
    line = (kept.decode(errors="replace").strip().splitlines() or [""])[-1][:200]
    return "".join(char if char.isprintable() else "?" for char in line)


async def _line(stream: GuestStream) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < 8:
        data = await stream.read(1)
        if not data:
            break
        line += data
    return line.rstrip(b"\n")


async def _in_thread(process: GuestProcess, work: Callable[[], None]) -> None:
    """Blocking work that feeds or reads the process; it has ended when this has, however this ends."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(running)
    finally:
        if not running.done():
            process.abandon()
            await asyncio.gather(running, return_exceptions=True)


def _send_file(source: Path, write: Callable[[bytes], None]) -> None:
    with source.open("rb") as file:
        while data := file.read(CHUNK):
            write(data)


def _send_directory(source: Path, write: Callable[[bytes], None]) -> None:
    class Sink:
        def write(self, data: bytes) -> int:
            write(bytes(data))
            return len(data)

    def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(fileobj=cast(IO[bytes], Sink()), mode="w|", bufsize=CHUNK, format=tarfile.GNU_FORMAT) as archive:
        archive.add(source.resolve(), ".", filter=as_root)  # a link to a directory stands for that


class _Limited:
    """The program's output, for a thread."""

    def __init__(self, stream: GuestStream, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._stream, self._loop, self._limit, self._left = stream, loop, limit, limit

    def read(self, size: int, /) -> bytes:
        data = asyncio.run_coroutine_threadsafe(self._stream.read(min(size, CHUNK)), self._loop).result()
        self._left -= len(data)
        if self._left < 0:
            raise UntarError(f"more than {self._limit} bytes; allow more with limit=…")
        return data


def _receive_file(stream: _Limited, part: Path, mode: int) -> None:
    with part.open("xb") as file:
        while data := stream.read(CHUNK):
            file.write(data)
        os.fchmod(file.fileno(), mode)
