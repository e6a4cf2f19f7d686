"""A small AML encoder: named objects, packages, methods and resource descriptors as bytes.

Specification: ACPI 6.4, chapter 20 (AML grammar; section numbers below), 6.4 (resource data types). Each function
returns the encoding of one term; terms are joined by concatenation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vmm.errors import ConfigError

ZERO, ONE, ONES = b"\x00", b"\x01", b"\xff"
LOCAL0, LOCAL1, LOCAL2, LOCAL3 = b"\x60", b"\x61", b"\x62", b"\x63"
ARG0, ARG1, ARG2, ARG3 = b"\x68", b"\x69", b"\x6a", b"\x6b"
NOTHING = b"\x00"
"""A target that takes no result (20.2.2 NullName)."""


def package_length(body: int) -> bytes:
    """20.2.4 PkgLength of a package whose contents are `body` bytes: it counts itself."""
    if body + 1 <= 0x3F:
        return bytes([body + 1])
    for extra in (1, 2, 3):
        total = body + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 15]) + (total >> 4).to_bytes(extra, "little")
    raise ConfigError(f"AML: a package of {body} bytes is too long")


def _packaged(opcode: bytes, body: bytes) -> bytes:
    return opcode + package_length(len(body)) + body


def name_string(path: str) -> bytes:
    """20.2.2: `\\_SB.PCI0`, `^FOO`, `_HID`; segments are padded to four characters."""
    prefix = path[: len(path) - len(path.lstrip("\\^"))]
    segments = [part.ljust(4, "_") for part in path[len(prefix) :].split(".") if part]
    if any(len(part) != 4 or not part.isascii() or part[0].isdigit() for part in segments):
        raise ConfigError(f"AML: {path!r} is no name")
    raw = "".join(segments).encode()
    match len(segments):
        case 0:
            body = ZERO
        case 1:
            body = raw
        case 2:
            body = b"\x2e" + raw
        case count:
            body = b"\x2f" + bytes([count]) + raw
    return prefix.encode() + body


def integer(value: int) -> bytes:
    """20.2.3: the shortest encoding."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ConfigError(f"AML: {value} does not fit into 64 bits")


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """6.1.5: 'PNP0501' as a compressed identifier."""
    letters = [ord(char) - 0x40 for char in text[:3]]
    number = int(text[3:], 16)
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | number
    return b"\x0c" + value.to_bytes(4, "big")


def buffer(data: bytes) -> bytes:
    return _packaged(b"\x11", integer(len(data)) + data)


def uuid_buffer(text: str) -> bytes:
    """ToUUID: the first three fields are little-endian."""
    import uuid

    return buffer(uuid.UUID(text).bytes_le)


def package(items: Iterable[bytes]) -> bytes:
    listed = list(items)
    if len(listed) > 255:
        raise ConfigError(f"AML: a package of {len(listed)} elements; 255 is the most")
    return _packaged(b"\x12", bytes([len(listed)]) + b"".join(listed))


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return _packaged(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    return _packaged(b"\x5b\x82", name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    flags = arguments | (8 if serialized else 0)
    return _packaged(b"\x14", name_string(path) + bytes([flags]) + b"".join(terms))


def if_(condition: bytes, *terms: bytes) -> bytes:
    return _packaged(b"\xa0", condition + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    return _packaged(b"\xa1", b"".join(terms))


def equal(left: bytes, right: bytes) -> bytes:
    return b"\x93" + left + right


def not_equal(left: bytes, right: bytes) -> bytes:
    return b"\x92\x93" + left + right


def bit_or(left: bytes, right: bytes, target: bytes) -> bytes:
    return b"\x7d" + left + right + target


def bit_and(left: bytes, right: bytes, target: bytes) -> bytes:
    return b"\x7b" + left + right + target


def return_(value: bytes) -> bytes:
    return b"\xa4" + value


def notify(path: str, value: int) -> bytes:
    return b"\x86" + name_string(path) + integer(value)


def notify_object(target: bytes, value: int) -> bytes:
    """Notify an object that is not named here: a local, an argument."""
    return b"\x86" + target + integer(value)


def store(value: bytes, target: bytes) -> bytes:
    return b"\x70" + value + target


def add(left: bytes, right: bytes, target: bytes = NOTHING) -> bytes:
    return b"\x72" + left + right + target


def shift_left(value: bytes, count: bytes, target: bytes = NOTHING) -> bytes:
    return b"\x79" + value + count + target


def shift_right(value: bytes, count: bytes, target: bytes = NOTHING) -> bytes:
    return b"\x7a" + value + count + target


def less(left: bytes, right: bytes) -> bytes:
    return b"\x95" + left + right


def while_(condition: bytes, *terms: bytes) -> bytes:
    return _packaged(b"\xa2", condition + b"".join(terms))


def call(path: str, *arguments: bytes) -> bytes:
    """20.2.5: a method's invocation; a name is looked up in the scopes outwards."""
    return name_string(path) + b"".join(arguments)


def mutex(path: str) -> bytes:
    return b"\x5b\x01" + name_string(path) + ZERO


def acquire(path: str) -> bytes:
    """20.2.5.4: take a mutex; wait for it without a time limit."""
    return b"\x5b\x23" + name_string(path) + b"\xff\xff"


def release(path: str) -> bytes:
    return b"\x5b\x27" + name_string(path)


def port_region(path: str, start: int, size: int) -> bytes:
    """20.2.5.2: an operation region of `size` ports (SystemIO)."""
    return b"\x5b\x80" + name_string(path) + b"\x01" + integer(start) + integer(size)


def fields(region: str, width: int, *named: tuple[str, int]) -> bytes:
    """Registers of an operation region in their order, as (name, bits); "" leaves bits out. They are accessed `width`
    bytes at a time, and what is not written is written as zeroes."""
    access = {1: 1, 2: 2, 4: 3}[width]
    listed = b"".join((ZERO if not path else name_string(path)) + _bits(bits) for path, bits in named)
    return _packaged(b"\x5b\x81", name_string(region) + bytes([2 << 5 | access]) + listed)


def _bits(count: int) -> bytes:
    """20.2.5.2: the PkgLength of a field element is its width alone."""
    if count <= 0x3F:
        return bytes([count])
    return bytes([1 << 6 | count & 15, count >> 4])


def create_dword_field(source: bytes, index: int, path: str) -> bytes:
    return b"\x8a" + source + integer(index) + name_string(path)


# Resource descriptors (6.4). resource_template() joins them, with the end tag.


def resource_template(*descriptors: bytes) -> bytes:
    """The buffer of a _CRS; checksum 0 means that there is none (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(port: int, length: int, *, alignment: int = 1) -> bytes:
    """6.4.2.5: a fixed range of ports, 16-bit decoding."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, alignment, length)


def irq(line: int) -> bytes:
    """6.4.2.1 without flags: edge, active high, exclusive (an ISA interrupt)."""
    return struct.pack("<BH", 0x22, 1 << line)


def memory32_fixed(start: int, size: int, *, writable: bool = True) -> bytes:
    """6.4.3.4"""
    return struct.pack("<BHBII", 0x86, 9, int(writable), start, size)


def interrupt(gsi: int) -> bytes:
    """6.4.3.6: consumer, level, active high, shared."""
    return struct.pack("<BHBBI", 0x89, 6, 0b1001, 1, gsi)


def _address(tag: int, size: int, kind: int, flags: int, start: int, end: int) -> bytes:
    """6.4.3.5: minimum and maximum fixed, positive decode, producer; granularity and translation 0."""
    layout = {2: "<5H", 4: "<5I", 8: "<5Q"}[size]
    body = struct.pack("<BBB", kind, 0x0C, flags) + struct.pack(layout, 0, start, end, 0, end - start + 1)
    return struct.pack("<BH", tag, len(body)) + body


def bus_range(first: int, last: int) -> bytes:
    return _address(0x88, 2, 2, 0, first, last)


def io_window(first: int, last: int) -> bytes:
    """Entire range (ISA and non-ISA)."""
    return _address(0x88, 2, 1, 3, first, last)


def memory_window(start: int, end: int, *, wide: bool = False) -> bytes:
    """Non-cacheable, read/write memory from `start` to `end` inclusive; `wide`: above 4 GiB."""
    if wide:
        return _address(0x8A, 8, 0, 1, start, end)
    return _address(0x87, 4, 0, 1, start, end)
