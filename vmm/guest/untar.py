"""Unpacking a tar stream that nobody vouches for: nothing outside the target is touched, and memory stays bounded.

Format: POSIX.1-2017, pax, "ustar Interchange Format" and its extended headers; GNU's long names. Names must stay below
the target and are never followed through a link; links are made last; of a mode the nine permission bits count; what is
neither file, directory nor link is left out. Blocking.
"""

from __future__ import annotations

import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

BLOCK = tarfile.BLOCKSIZE
CHUNK = 256 << 10
MAX_EXTENDED = 64 << 10
"""Bytes of an extended header or a long name."""
MAX_MEMBERS = 1_000_000
ENCODING = sys.getfilesystemencoding(), "surrogateescape"
"""Of names: the bytes of an archive become the same bytes in the file system."""


class UntarError(Exception):
    """The stream is no archive, or one that would reach outside. One sentence."""


class ArchiveStream(Protocol):
    """What is read: like a file, but each read may give less than asked for."""

    def read(self, size: int, /) -> bytes:
        """At least one byte; b"" at the end."""


class _Exactly:
    """The body of one member."""

    def __init__(self, source: ArchiveStream, size: int) -> None:
        self._source, self.left, self._padding = source, size, -size % BLOCK

    def read(self, size: int = CHUNK) -> bytes:
        if not self.left:
            return b""
        data = self._source.read(min(size, self.left))
        if not data:
            raise UntarError("the archive ends early")
        self.left -= len(data)
        return data

    def read_all(self, most: int) -> bytes:
        if self.left > most:
            raise UntarError(f"a header of {self.left} bytes")
        return b"".join(iter(self.read, b""))

    def finish(self) -> None:
        """Skip what was not read, and the padding."""
        while self.read():
            pass
        self.left, self._padding = self._padding, 0
        while self.read():
            pass


def members(source: ArchiveStream) -> Iterator[tuple[tarfile.TarInfo, _Exactly]]:
    """Every member with its body. Raises UntarError."""
    override: dict[str, str] = {}
    for _ in range(MAX_MEMBERS):
        block = _Exactly(source, BLOCK).read_all(BLOCK)
        if not block.strip(b"\0"):
            while source.read(CHUNK):
                pass  # what follows the end is padding
            return
        try:
            info = tarfile.TarInfo.frombuf(block, *ENCODING)
        except tarfile.HeaderError as error:
            raise UntarError(f"no tar header: {error}") from error
        if info.size < 0:
            raise UntarError(f"a size of {info.size}")
        body = _Exactly(source, info.size)
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            key = "path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
            override[key] = body.read_all(MAX_EXTENDED).rstrip(b"\0").decode(*ENCODING)
        elif info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            override |= _records(body.read_all(MAX_EXTENDED)) if info.type != tarfile.XGLTYPE else {}
        else:
            info.name = override.get("path", info.name)
            info.linkname = override.get("linkpath", info.linkname)
            if "size" in override:
                if not override["size"].isdecimal() or len(override["size"]) > 18:
                    raise UntarError("a size that is no number")
                body = _Exactly(source, int(override["size"]))
            override = {}
            yield info, body
        body.finish()
    raise UntarError(f"more than {MAX_MEMBERS} members")


def _records(data: bytes) -> dict[str, str]:
    """pax: "LENGTH KEY=VALUE\\n", where the length counts itself."""
    found = {}
    while data.strip(b"\0"):
        head = data[:12].partition(b" ")[0]
        length = int(head) if head.isdigit() else 0
        record, data = data[:length], data[length:]
        if length < len(head) + 3 or not record.endswith(b"\n"):
            raise UntarError("a broken extended header")
        key, _, value = record[len(head) + 1 : -1].decode(*ENCODING).partition("=")
        found[key] = value
    return found


def unpack(source: ArchiveStream, target: Path) -> None:
    """Make what the stream holds below `target`, which may be there already. Raises UntarError, OSError."""
    links: list[tuple[Path, str]] = []
    modes: list[tuple[Path, int]] = []
    target.mkdir(exist_ok=True)
    for info, body in members(source):
        path = _below(target, info.name)
        if info.isdir():
            _directory(path, target)
            modes.append((path, info.mode))
        elif info.isreg() or info.type in (tarfile.AREGTYPE, tarfile.CONTTYPE):
            _file(path, body, info.mode, target)
        elif info.issym():
            links.append((path, info.linkname))
        elif info.islnk():
            original = _below(target, info.linkname)
            if path != original:
                _place(path, target)
                os.link(original, path, follow_symlinks=False)
    for path, text in links:
        if "\0" in text or not text:
            raise UntarError("a link to nowhere")
        _place(path, target)
        path.symlink_to(text)
    for path, mode in reversed(modes):
        _check(path, target)
        if path.is_dir():
            path.chmod(mode & 0o777 | 0o700)


def _below(target: Path, name: str) -> Path:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UntarError(f"the name {name[:100]!r}, which is not below")
    return target.joinpath(*parts)


def _check(path: Path, target: Path) -> None:
    """Raise if a link stands on the way from `target` to `path`, or there."""
    while path != target:
        if path.is_symlink():
            raise UntarError(f"a way through the link {path.name!r}")
        path = path.parent


def _directory(path: Path, target: Path) -> None:
    _check(path.parent if path != target else path, target)
    if path.is_symlink():
        path.unlink()
    path.mkdir(parents=True, exist_ok=True)


def _place(path: Path, target: Path) -> None:
    """Make room for something that is no directory."""
    if path == target:
        raise UntarError("a member that stands for the target itself")
    _directory(path.parent, target)
    with suppress(FileNotFoundError):
        path.unlink()


def _file(path: Path, body: _Exactly, mode: int, target: Path) -> None:
    _place(path, target)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        while data := body.read():
            file.write(data)
        os.fchmod(file.fileno(), mode & 0o777)
