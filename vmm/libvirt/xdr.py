"""XDR (RFC 4506) as declarations: a type reads values from bytes and writes them back, within the limits that it
states.

Everything that is read was written by a client that may be hostile. A type never takes more than the bytes in front of
it can fill: the length of an array is checked against what is left before any item is made. Whatever is malformed is an
XdrError, and nothing else. Pure: no loop, no sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vmm.errors import ConfigError


class XdrError(ConfigError):
    """Bytes that are not what the declaration says, or a value that does not fit it."""


class Cursor:
    """A position in bytes that are being read."""

    __slots__ = ("data", "position")

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = bytes(data)
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self.data) - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises XdrError."""
        if count > self.left:
            raise XdrError(f"{count} bytes are announced, {self.left} are there")
        start = self.position
        self.position += count
        return self.data[start : self.position]


class Type(Protocol):
    """A declared type. `smallest` is the fewest bytes that a value takes on the wire."""

    smallest: int

    def read(self, cursor: Cursor) -> Any:
        """The next value. Raises XdrError."""

    def write(self, out: bytearray, value: Any) -> None:
        """Append a value. Raises XdrError if it does not fit the type."""


class Number:
    """int, unsigned int, hyper, unsigned hyper or double (RFC 4506, 4.1, 4.2, 4.5, 4.7), big-endian."""

    def __init__(self, code: str) -> None:
        self._struct = struct.Struct(">" + code)
        self.smallest = self._struct.size

    def read(self, cursor: Cursor) -> Any:
        return self._struct.unpack(cursor.take(self.smallest))[0]

    def write(self, out: bytearray, value: Any) -> None:
        try:
            out += self._struct.pack(value)
        except struct.error as error:
            raise XdrError(f"{value!r}: {error}") from None


INT, UINT, HYPER, UHYPER, DOUBLE = Number("i"), Number("I"), Number("q"), Number("Q"), Number("d")


class Fixed:
    """Opaque data of a fixed length (RFC 4506, 4.9)."""

    def __init__(self, length: int) -> None:
        self._length, self._padding = length, -length % 4
        self.smallest = length + self._padding

    def read(self, cursor: Cursor) -> bytes:
        return cursor.take(self.smallest)[: self._length]

    def write(self, out: bytearray, value: bytes) -> None:
        if len(value) != self._length:
            raise XdrError(f"{len(value)} bytes where {self._length} belong")
        out += value + bytes(self._padding)


class Opaque:
    """Opaque data of a variable length up to `limit` bytes (RFC 4506, 4.10)."""

    smallest = 4

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def read(self, cursor: Cursor) -> bytes:
        length = UINT.read(cursor)
        if length > self._limit:
            raise XdrError(f"{length} bytes; at most {self._limit} are allowed")
        return cursor.take(length + -length % 4)[:length]

    def write(self, out: bytearray, value: bytes) -> None:
        if len(value) > self._limit:
            raise XdrError(f"{len(value)} bytes; at most {self._limit} are allowed")
        UINT.write(out, len(value))
        out += value + bytes(-len(value) % 4)


class String:
    """A string (RFC 4506, 4.11) up to `limit` bytes, in UTF-8 here and without zero bytes."""

    smallest = 4

    def __init__(self, limit: int) -> None:
        self._bytes = Opaque(limit)

    def read(self, cursor: Cursor) -> str:
        data = self._bytes.read(cursor)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise XdrError("a string that is not UTF-8") from None
        if "\0" in text:
            raise XdrError("a string with a zero byte in it")
        return text

    def write(self, out: bytearray, value: str) -> None:
        self._bytes.write(out, value.encode(errors="replace"))


class CharArray:
    """`char name[length]` as rpcgen's XDR has it: each character is an int of its own. The text ends at the first 0."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.smallest = 4 * length

    def read(self, cursor: Cursor) -> str:
        values = struct.unpack(f">{self._length}i", cursor.take(self.smallest))
        return bytes(value & 0xFF for value in values).partition(b"\0")[0].decode(errors="replace")

    def write(self, out: bytearray, value: str) -> None:
        data = value.encode()[: self._length - 1].ljust(self._length, b"\0")
        out += struct.pack(f">{self._length}i", *data)


class Array:
    """A variable number of items up to `limit` (RFC 4506, 4.13)."""

    smallest = 4

    def __init__(self, item: Type, limit: int) -> None:
        self._item, self._limit = item, limit

    def read(self, cursor: Cursor) -> list[Any]:
        count = UINT.read(cursor)
        if count > self._limit:
            raise XdrError(f"{count} items; at most {self._limit} are allowed")
        if count * self._item.smallest > cursor.left:
            raise XdrError(f"{count} items are announced, {cursor.left} bytes are there")
        return [self._item.read(cursor) for _ in range(count)]

    def write(self, out: bytearray, value: Sequence[Any]) -> None:
        if len(value) > self._limit:
            raise XdrError(f"{len(value)} items; at most {self._limit} are allowed")
        UINT.write(out, len(value))
        for item in value:
            self._item.write(out, item)


class Optional:
    """Optional data (RFC 4506, 4.19): None, or a value. Any number but 0 says that one follows, as libvirtd takes it:
    go-libvirt, and so Terraform's provider, sends 0x01000000."""

    smallest = 4

    def __init__(self, item: Type) -> None:
        self._item = item

    def read(self, cursor: Cursor) -> Any:
        return self._item.read(cursor) if UINT.read(cursor) else None

    def write(self, out: bytearray, value: Any) -> None:
        UINT.write(out, 0 if value is None else 1)
        if value is not None:
            self._item.write(out, value)


class Record:
    """A structure (RFC 4506, 4.14): `make` makes the value of the fields' values; a value gives them back when it is
    iterated, as a NamedTuple does."""

    def __init__(self, make: Callable[..., Any], fields: Sequence[Type]) -> None:
        self._make, self._fields = make, tuple(fields)
        self.smallest = sum(field.smallest for field in self._fields)

    def read(self, cursor: Cursor) -> Any:
        return self._make(*[field.read(cursor) for field in self._fields])

    def write(self, out: bytearray, value: Any) -> None:
        values = tuple(value)
        if len(values) != len(self._fields):
            raise XdrError(f"{len(values)} values for {len(self._fields)} fields")
        for field, content in zip(self._fields, values, strict=True):
            field.write(out, content)


class DiscriminatedUnion:
    """A discriminated union (RFC 4506, 4.15): a pair (discriminant, value)."""

    def __init__(self, arms: dict[int, Type]) -> None:
        self._arms = arms
        self.smallest = 4 + min(arm.smallest for arm in arms.values())

    def read(self, cursor: Cursor) -> tuple[int, Any]:
        which = INT.read(cursor)
        if which not in self._arms:
            raise XdrError(f"{which} is no case of this union")
        return which, self._arms[which].read(cursor)

    def write(self, out: bytearray, value: tuple[int, Any]) -> None:
        which, content = value
        INT.write(out, which)
        self._arms[which].write(out, content)


def decode(kind: Type, data: bytes | memoryview) -> Any:
    """The one value that the bytes hold, to their end. Raises XdrError."""
    cursor = Cursor(data)
    value = kind.read(cursor)
    if cursor.left:
        raise XdrError(f"{cursor.left} bytes too many")
    return value


def encode(kind: Type, value: Any) -> bytes:
    """A value as bytes. Raises XdrError."""
    out = bytearray()
    kind.write(out, value)
    return bytes(out)
