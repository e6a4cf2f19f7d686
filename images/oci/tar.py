"""Read a tar stream of unknown origin: members and their contents, in bounded memory and without touching any file.

Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Interchange Format"; GNU tar manual, "Basic Tar Format"
and "Storing Sparse Files" (long names, base-256 numbers, sparse files 0.0, 0.1, 1.0 and of the old form); star(5) for
SCHILY.xattr. Names and targets are bytes. What is not as those say raises ImageError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from images.errors import ImageError

BLOCK = 512
MAX_HEADER = 8 << 20
"""Bytes of one extended header: extended attributes of 64 KiB each stand there."""
MAX_NAME = 4096
"""PATH_MAX of Linux, with its zero byte."""
MAX_PIECES = 100_000
"""Pieces of one sparse file."""
CHUNK = 1 << 20
ZERO_BLOCK = bytes(BLOCK)

Read = Callable[[int], bytes]
"""read(n): the next n bytes, fewer only at the end."""


class SparsePiece(NamedTuple):
    """Where `size` bytes of the archive stand in the file."""

    offset: int
    size: int


@dataclass(slots=True)
class Member:
    """One member. `kind` is its type flag: "0" file, "1" hard link, "2" symbolic link, "3" character and "4" block
    device, "5" directory, "6" FIFO. `size` is the file's own, whatever of it stands in the archive."""

    name: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[SparsePiece] | None = None
    """Of a sparse file."""


def members(read: Read) -> Iterator[tuple[Member, Iterator[tuple[int, bytes]]]]:
    """Each member with its content as (offset in the file, bytes), which is skipped as far as it was not read when the
    next member is asked for. Raises ImageError."""
    everywhere: dict[str, bytes] = {}
    own: dict[str, bytes] = {}
    sparse: list[tuple[int, int]] = []
    long_name, long_target = b"", b""
    while True:
        block = read(BLOCK)
        if not block or block == ZERO_BLOCK:
            return
        if len(block) < BLOCK:
            raise ImageError("the archive is cut short within a header")
        _check(block)
        kind, stored = chr(block[156]), number(block[124:136])
        if kind in "xgLK":
            if stored > MAX_HEADER:
                raise ImageError(f"a header of {stored} bytes in the archive; at most {MAX_HEADER} are taken")
            data = _exactly(read, stored)
            _exactly(read, -stored % BLOCK)
            if kind == "x":
                own, sparse = records(data)
            elif kind == "g":
                everywhere |= records(data)[0]
            elif kind == "L":
                long_name = data.split(b"\0", 1)[0]
            else:
                long_target = data.split(b"\0", 1)[0]
            continue
        values = {**everywhere, **own} if everywhere else own
        member = _member(block, kind, values, long_name, long_target)
        if "size" in values:
            stored = decimal(values["size"])
        if kind not in "017S\0":
            stored = 0 if kind in "23456" else stored
        elif kind == "1":
            # A hard link of the pax format may repeat the content (POSIX.1-2017, pax, "linkname"), others have none.
            stored = stored if "size" in values else 0
        body = _Body(read, stored)
        if kind == "S":
            member.pieces = _old_sparse(read, block)
            member.size = number(block[483:495])
            member.kind = "0"
        elif values:
            _pax_sparse(member, values, sparse, body)
        own, sparse, long_name, long_target = {}, [], b"", b""
        if member.kind in "\x007":
            member.kind = "0"
        if member.kind in "0123456":
            if member.pieces is not None:
                _check_pieces(member, body.left)
            yield member, body.content(member.pieces)
        body.skip()


class _Body:
    """The content of a member and the padding behind it."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self.left = size
        self._padding = -size % BLOCK

    def take(self, size: int) -> bytes:
        data = _exactly(self._read, min(size, self.left))
        self.left -= len(data)
        return data

    def content(self, pieces: list[SparsePiece] | None) -> Iterator[tuple[int, bytes]]:
        for offset, size in pieces if pieces is not None else [SparsePiece(0, self.left)]:
            while size:
                data = self.take(min(size, CHUNK))
                if not data:
                    raise ImageError("a sparse file in the archive says that it has more than is there")
                yield offset, data
                offset += len(data)
                size -= len(data)

    def skip(self) -> None:
        while self.left:
            self.take(CHUNK)
        _exactly(self._read, self._padding)
        self._padding = 0


def _exactly(read: Read, size: int) -> bytes:
    data = read(size) if size else b""
    if len(data) < size:
        raise ImageError("the archive is cut short")
    return data


def _check(block: bytes) -> None:
    """The checksum counts its own field as spaces; some writers summed signed bytes."""
    wanted = number(block[148:156])
    if sum(block) - sum(block[148:156]) + 256 != wanted:
        signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 256
        if signed != wanted:
            raise ImageError("no tar archive: a header's checksum is wrong")


def number(text: bytes) -> int:
    """An octal number, or with the first bit set a base-256 one. Never negative. Raises ImageError."""
    if text[0] & 0x80:
        value = int.from_bytes(text, "big") & ((1 << (8 * len(text) - 1)) - 1)
        if text[0] & 0x40 or value >> 63:
            return 0
        return value
    digits = text.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    try:
        return int(digits, 8)
    except ValueError as error:
        raise ImageError("no tar archive: a number in a header is none") from error


def decimal(text: bytes) -> int:
    """A decimal number of an extended header. Raises ImageError."""
    if not text.isdigit() or len(text) > 19 or int(text) >> 63:
        raise ImageError(f"{text[:20]!r} in a header of the archive is no number")
    return int(text)


def records(data: bytes) -> tuple[dict[str, bytes], list[tuple[int, int]]]:
    """The records "LENGTH KEY=VALUE\\n" of an extended header, and the pieces that GNU.sparse.offset and numbytes name
    one after another. Raises ImageError."""
    found: dict[str, bytes] = {}
    pieces: list[tuple[int, int]] = []
    at, offset = 0, 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        if space < 0 or not data[at:space].isdigit():
            if data[at:].strip(b"\0"):
                raise ImageError("an extended header of the archive is damaged")
            break
        end = at + int(data[at:space])
        record = data[space + 1 : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or end <= space or not record.endswith(b"\n") or not equals:
            raise ImageError("an extended header of the archive is damaged")
        name = key.decode("utf-8", "surrogateescape")
        found[name] = value[:-1]
        if name == "GNU.sparse.offset":
            offset = decimal(value[:-1])
        elif name == "GNU.sparse.numbytes":
            if len(pieces) >= MAX_PIECES:
                raise ImageError(f"a sparse file of more than {MAX_PIECES} pieces")
            pieces.append((offset, decimal(value[:-1])))
        at = end
    return found, pieces


def _member(block: bytes, kind: str, values: dict[str, bytes], long_name: bytes, long_target: bytes) -> Member:
    name = values.get("GNU.sparse.name") or values.get("path") or long_name
    if not name:
        name = block[:100].split(b"\0", 1)[0]
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    target = values.get("linkpath") or long_target or block[157:257].split(b"\0", 1)[0]
    if len(name) >= MAX_NAME or len(target) >= MAX_NAME or b"\0" in name or b"\0" in target:
        raise ImageError(f"{name[:40]!r}…: a name longer than {MAX_NAME - 1} bytes, or with a zero byte")
    member = Member(
        name, kind, number(block[100:108]) & 0o7777, number(block[108:116]), number(block[116:124]),
        number(block[124:136]), number(block[136:148]) * 1_000_000_000, target,
    )  # fmt: skip
    if kind in "34":
        member.device = number(block[329:337]), number(block[337:345])
    if values:
        _take_values(member, values)
    return member


def _take_values(member: Member, values: dict[str, bytes]) -> None:
    for key, value in values.items():
        if key == "size":
            member.size = decimal(value)
        elif key == "uid":
            member.uid = decimal(value)
        elif key == "gid":
            member.gid = decimal(value)
        elif key == "mtime":
            member.mtime_ns = _time(value)
        elif key.startswith("SCHILY.xattr."):
            member.xattrs[key[13:].encode("utf-8", "surrogateescape")] = value


def _time(text: bytes) -> int:
    """Decimal seconds, perhaps with a fraction, as nanoseconds; a time before 1970 is 1970."""
    if text.startswith(b"-"):
        return 0
    seconds, _, fraction = text.partition(b".")
    return decimal(seconds) * 1_000_000_000 + (decimal((fraction + b"000000000")[:9]) if fraction else 0)


def _pax_sparse(member: Member, values: dict[str, bytes], sparse: list[tuple[int, int]], body: _Body) -> None:
    size = values.get("GNU.sparse.realsize") or values.get("GNU.sparse.size")
    if size is None:
        return
    member.size = decimal(size)
    if values.get("GNU.sparse.major") == b"1":
        member.pieces = _map_in_content(body)
    elif (text := values.get("GNU.sparse.map")) is not None:
        words = text.split(b",", 2 * MAX_PIECES + 1)
        if len(words) % 2 or len(words) > 2 * MAX_PIECES:
            raise ImageError("the map of a sparse file in the archive is damaged")
        numbers = [decimal(word) for word in words]
        member.pieces = [SparsePiece(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    else:
        member.pieces = [SparsePiece(*pair) for pair in sparse]


def _map_in_content(body: _Body) -> list[SparsePiece]:
    """Form 1.0: the number of pieces, then offset and size of each, a line each, filled up to whole blocks."""
    text, numbers, wanted = b"", list[int](), 1
    while len(numbers) < wanted:
        line, newline, rest = text.partition(b"\n")
        if not newline:
            more = body.take(BLOCK)
            if not more or len(text) > BLOCK:
                raise ImageError("the map of a sparse file in the archive is damaged")
            text += more
            continue
        text = rest
        numbers.append(decimal(line))
        if len(numbers) == 1:
            wanted += 2 * numbers[0]
            if numbers[0] > MAX_PIECES:
                raise ImageError(f"a sparse file of more than {MAX_PIECES} pieces")
    return [SparsePiece(*pair) for pair in zip(numbers[1::2], numbers[2::2], strict=True)]


def _old_sparse(read: Read, block: bytes) -> list[SparsePiece]:
    pieces: list[SparsePiece] = []
    start, count, more = 386, 4, 482
    while True:
        for at in range(start, start + 24 * count, 24):
            if block[at + 12 : at + 24].strip(b"\0 "):
                pieces.append(SparsePiece(number(block[at : at + 12]), number(block[at + 12 : at + 24])))
        if not block[more] or block[more] == 48:
            return pieces
        if len(pieces) > MAX_PIECES:
            raise ImageError(f"a sparse file of more than {MAX_PIECES} pieces")
        block = _exactly(read, BLOCK)
        start, count, more = 0, 21, 504


def _check_pieces(member: Member, stored: int) -> None:
    end = total = 0
    for piece in member.pieces or ():
        if piece.offset < end:
            raise ImageError("the pieces of a sparse file in the archive overlap")
        end = piece.offset + piece.size
        total += piece.size
    if end > member.size or total > stored:
        raise ImageError("the pieces of a sparse file in the archive are more than the file")
