"""Whether an initrd is whole, as far as its own headers tell without unpacking it.

Specification: Linux' Documentation/driver-api/early-userspace/buffer-format.rst (newc archives, compressed or not, one
after the other, with zero bytes between), RFC 8878 (Zstandard). What the other compressions hold is known only after
unpacking; there the kernel reports what is wrong.
"""

from __future__ import annotations

from vmm.errors import ConfigError

CPIO_MAGICS = (b"070701", b"070702")
CPIO_HEADER = 110
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_STEPS = 200_000
"""Members and blocks that are looked at; what follows is taken as it is."""


def check_whole(data: memoryview, name: str) -> None:
    """Raises ConfigError if a member or a block reaches beyond the file."""
    at, steps = 0, 0
    while at < len(data) and steps < MAX_STEPS:
        steps += 1
        magic = bytes(data[at : at + 6])
        if magic in CPIO_MAGICS:
            at = _member_end(data, at, name)
        elif magic[:4] == ZSTD_MAGIC:
            at, blocks = _frame_end(data, at, name)
            steps += blocks
        elif magic[0] == 0:
            at += 1
            rest = bytes(data[at : at + 4096])
            at += len(rest) - len(rest.lstrip(b"\0"))
        else:
            return


def _cut(name: str, what: str, end: int, size: int) -> ConfigError:
    return ConfigError(f"{name}: the initrd is cut short: {what} ends at {end} of {size} bytes")


def _member_end(data: memoryview, at: int, name: str) -> int:
    try:
        header = bytes(data[at : at + CPIO_HEADER])
        file_size, name_size = int(header[54:62], 16), int(header[94:102], 16)
    except ValueError as error:
        if at + CPIO_HEADER > len(data):
            raise _cut(name, "a header", at + CPIO_HEADER, len(data)) from error
        return len(data)  # not an archive after all
    content = (at + CPIO_HEADER + name_size + 3) & ~3
    if content + file_size > len(data):
        raise _cut(name, "a member", content + file_size, len(data))
    return (content + file_size + 3) & ~3


def _frame_end(data: memoryview, at: int, name: str) -> tuple[int, int]:
    """(end, blocks) of the Zstandard frame at `at` (RFC 8878, 3.1.1)."""
    descriptor = data[at + 4] if at + 4 < len(data) else 0
    single, checksum = bool(descriptor & 0x20), bool(descriptor & 4)
    size_bytes = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    at += 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + size_bytes
    last, blocks = False, 0
    while not last:
        if blocks >= MAX_STEPS:
            return len(data), blocks
        if at + 3 > len(data):
            raise _cut(name, "a Zstandard frame", at + 3, len(data))
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)
        blocks += 1
    at += 4 if checksum else 0
    if at > len(data):
        raise _cut(name, "a Zstandard frame", at, len(data))
    return at, blocks
