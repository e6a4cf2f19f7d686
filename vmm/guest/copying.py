"""Copies with the rules of `cp -r` and docker cp: what a destination means depends on what is there already.

    a file or link    to a directory: into it, under its own name; to a file: in its place; to nothing: made, if the
                      directory that holds it is there and the destination does not end in "/"
    a directory       to a directory: into it, under its own name, or with "/." at the source's end only what is in it;
                      to nothing: made, with what is in the source; to a file: an error

Paths of the guest that are not absolute begin at its root. A link that is the source itself is copied as a link unless
`follow` is set. Loop thread.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Literal

from vmm.errors import ConfigError, GuestError, os_reason
from vmm.guest.agent import Agent
from vmm.guest.files import copy_in, copy_out, script

Place = Literal["directory", "file", "free", "nowhere"]
WHERE = (
    'if [ -d "$1" ]; then echo directory; elif [ -e "$1" ] || [ -L "$1" ]; then echo file; '
    'elif [ -d "$2" ]; then echo free; else echo nowhere; fi'
)
TAR_OUT = 'cd "$1" && tar -c -f - -- "$2"'
TAR_IN = '[ -d "$1" ] || { echo "$1: no such directory" >&2; exit 1; }; tar -x -p -C "$1" -f -'
ROOT = "/"
NO_LIMIT = 1 << 62


def destination(is_directory: bool, source: bytes, target: bytes, place: Place, side: str) -> bytes:
    """Where what is called `source` goes. Raises ConfigError. `side` says in messages whose path `target` is."""
    name = posixpath.basename(posixpath.normpath(source))
    shown = target.decode("utf-8", "backslashreplace")
    if place == "nowhere" or (place == "free" and not is_directory and target.endswith(b"/")):
        raise ConfigError(f"{shown}: no such directory {side}")
    if place == "directory" and name not in (b"", b".", b"..", b"/") and not (is_directory and _is_contents(source)):
        return posixpath.join(target, name)
    if is_directory and place == "file":
        raise ConfigError(f"{shown}: is a file {side}; a directory cannot take its place")
    return target


def _is_contents(source: bytes) -> bool:
    return source.endswith(b"/.") or source == b"."


def _parent(path: bytes) -> bytes:
    return posixpath.dirname(path.rstrip(b"/")) or (b"/" if path.startswith(b"/") else b".")


async def to_guest(agent: Agent, source: str, target: bytes, *, follow: bool = False) -> None:
    """Copy from the host. ConfigError for what is not there or cannot be read, GuestError if the guest fails."""
    try:
        mode = (os.stat if follow else os.lstat)(source).st_mode
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {os_reason(error)}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise ConfigError(f"{source}: neither file, directory nor link; write it to the guest with vmm exec -i")
    answer = await agent.exec("sh", "-c", WHERE, "where", target, _parent(target), cwd=ROOT)
    place = answer.check().text
    if place not in ("directory", "file", "free", "nowhere"):
        raise GuestError(f"the guest does not say what {target!r} is")
    given = os.fsencode(source if _is_contents(os.fsencode(source)) else os.path.abspath(source))
    end = destination(stat.S_ISDIR(mode), given, target, place, "in the guest")  # type: ignore[arg-type]
    await copy_in(agent, Path(source), end, cwd=ROOT, follow=follow)


async def to_host(agent: Agent, source: bytes, target: str, *, follow: bool = False) -> None:
    """Copy from the guest. ConfigError for what cannot be written, GuestError if the guest fails."""

    def where(is_directory: bool) -> Path:
        path = Path(target)
        there = path.is_symlink() or path.exists()
        place: Place = "directory" if path.is_dir() else "file" if there else "free"
        if place == "free" and not Path(os.path.dirname(target.rstrip("/")) or ".").is_dir():
            place = "nowhere"
        return Path(os.fsdecode(destination(is_directory, source, os.fsencode(target), place, "on this host")))

    await copy_out(agent, source, where, NO_LIMIT, cwd=ROOT, follow=follow)


async def to_archive(agent: Agent, source: bytes, write: Callable[[bytes], Awaitable[None]]) -> None:
    """A tar stream of a file or directory of the guest, as the guest's tar makes it: nobody has looked at it."""
    name = posixpath.basename(source.rstrip(b"/"))
    whole = (source, b".") if _is_contents(source) or not name else (_parent(source), name)
    async with script(agent, (TAR_OUT, "copy", *whole), _shown(source), cwd=ROOT) as process:
        await process.close_stdin()
        async for data in process.stdout:
            await write(data)


async def from_archive(agent: Agent, archive: AsyncIterator[bytes], target: bytes) -> None:
    """Unpack a tar stream in a directory of the guest, by the guest's tar."""
    async with script(agent, (TAR_IN, "copy", target), _shown(target), cwd=ROOT) as process:
        async for data in archive:
            if process.ended:
                break
            await process.write(data)
        await process.close_stdin()


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
