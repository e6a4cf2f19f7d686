"""vmm/native/pages.c beside models in Python: pages to files and back, bitmaps, checksums; wrong arguments."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm import _native

PAGE = 4096
MANY = 600
"""Pages: more than two of the runs that are moved at a time."""

pages = st.lists(st.sampled_from((b"\0", b"a", b"\0" * 4095 + b"z")), min_size=1, max_size=20).map(
    lambda each: b"".join(content.ljust(PAGE, content[:1]) for content in each)
)


def bits(bitmap: bytes) -> list[int]:
    return [n for n in range(len(bitmap) * 8) if bitmap[n // 8] >> n % 8 & 1]


def page(data: bytes | bytearray, n: int) -> bytes:
    return bytes(data[n * PAGE : (n + 1) * PAGE])


@pytest.fixture(scope="module")
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


@settings(deadline=None)
@given(memory=pages, chosen=st.binary(min_size=3, max_size=3), before=st.booleans(), offset=st.sampled_from((0, 8192)))
def test_saved_pages(fd: int, memory: bytes, chosen: bytes, before: bool, offset: int) -> None:
    os.ftruncate(fd, 0)
    size = offset + len(memory)
    old = (b"o" if before else b"\0") * size
    os.pwrite(fd, old, 0) if before else os.ftruncate(fd, size)
    written = _native.save_pages(fd, offset, memory, chosen, not before)
    wanted = [n for n in bits(chosen) if n < len(memory) // PAGE]
    for n in range(len(memory) // PAGE):
        there = os.pread(fd, PAGE, offset + n * PAGE)
        assert there == (page(memory, n) if n in wanted else old[:PAGE])
    assert written == PAGE * sum(any(page(memory, n)) for n in wanted)
    back = bytearray(len(memory))
    inside = _native.gather(memory, bytes(3), bytearray())
    assert inside == 0
    mask = bytearray(3)
    for n in wanted:
        mask[n // 8] |= 1 << n % 8
    assert _native.read_pages(fd, offset, back, mask, False) == PAGE * len(wanted)
    packed = bytearray(PAGE * len(wanted))
    assert _native.read_pages(fd, offset, packed, mask, True) == PAGE * len(wanted)
    gathered = bytearray(PAGE * len(wanted))
    assert _native.gather(memory, mask, gathered) == len(wanted)
    for place, n in enumerate(wanted):
        assert page(back, n) == page(packed, place) == page(gathered, place) == page(memory, n)


def test_long_runs(fd: int) -> None:
    memory = b"".join(n.to_bytes(2, "little") * (PAGE // 2) for n in range(1, MANY + 1))
    os.ftruncate(fd, 0)
    everything = b"\xff" * (MANY // 8)
    assert _native.write_pages(fd, 0, memory, everything, False) == len(memory)
    assert os.pread(fd, len(memory), 0) == memory
    back = bytearray(len(memory))
    assert _native.read_pages(fd, 0, back, everything, True) == len(memory) and back == memory
    holes = bytes(len(memory))
    assert _native.save_pages(fd, 0, holes, None, False) in (0, len(holes))
    assert os.pread(fd, len(memory), 0) == holes


@settings(deadline=None)
@given(memory=pages, change=st.lists(st.integers(0, 19), max_size=5))
def test_pages_that_differ(memory: bytes, change: list[int]) -> None:
    other = bytearray(memory)
    changed = {n for n in change if n < len(memory) // PAGE}
    for n in changed:
        other[n * PAGE + 17 * n] ^= 1
    found = _native.differing(memory, other)
    assert set(bits(found)) == changed and _native.count(found) == len(changed)
    assert len(found) % 8 == 0
    joined = bytearray(len(found))
    _native.merge(joined, found)
    _native.merge(joined, found)
    assert joined == found


@settings(deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 300), shift=st.integers(0, 7))
def test_checksum(data: bytes, cut: int, shift: int) -> None:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    wanted = crc ^ 0xFFFFFFFF
    assert _native.crc32c(data) == wanted
    assert _native.crc32c(data[cut:], _native.crc32c(data[:cut])) == wanted
    assert _native.crc32c(memoryview(bytes(shift) + data)[shift:]) == wanted


def test_checksum_of_the_standard() -> None:
    """RFC 3720, B.4."""
    assert _native.crc32c(bytes(32)) == 0x8A9136AA
    assert _native.crc32c(bytes(range(32))) == 0x46DD794E


@settings(deadline=None)
@given(parts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=4), tail=st.integers(0, PAGE - 1))
def test_checksums_of_files(fd: int, parts: list[tuple[int, int]], tail: int) -> None:
    os.ftruncate(fd, 0)
    size = 40 * PAGE + tail
    os.ftruncate(fd, size)
    for at, length in parts:
        os.pwrite(fd, os.urandom(length * PAGE)[: max(0, size - at * PAGE)], at * PAGE)
    chunk = 8 * PAGE
    found = _native.checksums(fd, size, chunk)
    data = os.pread(fd, size, 0)
    wanted = [_native.crc32c(data[at : at + chunk]) for at in range(0, size, chunk)]
    assert [int.from_bytes(found[at : at + 4], "little") for at in range(0, len(found), 4)] == wanted
    with pytest.raises(OSError):
        _native.checksums(fd, size + 1, chunk)


def test_buffers_at_odd_addresses(fd: int) -> None:
    memory = memoryview(b"x" + bytes(PAGE) + b"y" * PAGE)[1:]
    os.ftruncate(fd, 2 * PAGE)
    assert _native.save_pages(fd, 0, memory, None, True) == PAGE
    assert bits(_native.nonzero_pages(memory)) == [1]


WRONG = (
    lambda fd: _native.save_pages(fd, 0, bytes(100), None, True),
    lambda fd: _native.save_pages(fd, 0, bytes(9 * PAGE), b"\xff", True),
    lambda fd: _native.save_pages(fd, (1 << 63) - 1, b"x" * PAGE * 2, None, True),
    lambda fd: _native.save_pages(fd, -1, b"x" * PAGE, None, True),
    lambda fd: _native.write_pages(fd, (1 << 63) - PAGE, b"x" * PAGE * 8, b"\xff", True),
    lambda fd: _native.write_pages(fd, 0, bytes(7 * PAGE), b"\xff", True),
    lambda fd: _native.read_pages(fd, 0, bytearray(7 * PAGE), b"\xff", False),
    lambda fd: _native.read_pages(fd, 1 << 40, bytearray(8 * PAGE), b"\xff", False),
    lambda fd: _native.gather(bytes(8 * PAGE), b"\xff", bytearray(7 * PAGE)),
    lambda fd: _native.gather(bytes(9 * PAGE), b"\xff", bytearray(9 * PAGE)),
    lambda fd: _native.differing(bytes(PAGE), bytes(2 * PAGE)),
    lambda fd: _native.differing(bytes(PAGE), bytes(2)),
    lambda fd: _native.merge(bytearray(1), bytes(2)),
    lambda fd: _native.checksums(fd, -1, PAGE),
    lambda fd: _native.checksums(fd, PAGE, PAGE + 1),
    lambda fd: _native.checksums(fd, 1 << 60, PAGE),
)


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_does_not_fit_is_refused(fd: int, number: int) -> None:
    os.ftruncate(fd, 0)
    with pytest.raises((ValueError, OSError)):
        WRONG[number](fd)
