"""Malformed qcow2 images: good ones with bytes changed where it matters, and all that may be done to them."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

from virtio.backends.file import open_locked
from virtio.errors import ConfigError, HostError
from virtio.images import changes
from virtio.images.chain import open_chain
from virtio.images.check import check, repair, reread
from virtio.images.create import create_qcow2
from virtio.images.unpack import pack

SIZE = 2 << 20
GROWTH = 256 << 20
"""Bytes of disk by which an image may be larger afterwards. Its length may be more: refcounts may say that all up to a
place far behind is taken."""
INTERESTING = (0, 1, 2, 7, 511, 512, 513, 0x7F, 0x80, 0xFF, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40)
INTERESTING += (1 << 55, (1 << 56) - 512, 1 << 62, 1 << 63, (1 << 63) | 512, (1 << 64) - 1, (1 << 63) | (1 << 16) | 1)


def seeds(folder: Path) -> list[bytes]:
    """Good images of several kinds."""
    made = []
    source = random.Random(9)
    for number, options in enumerate(
        (
            {},
            {"cluster_size": 512},
            {"cluster_size": 4096, "refcount_bits": 1},
            {"cluster_size": 16384, "extended_l2": True},
            {"cluster_size": 4096, "compression": "zstd"},
            {"cluster_size": 1024, "version": 2, "backing": "base", "backing_format": "raw"},
            {"cluster_size": 2048, "backing": "base"},
        )
    ):
        path = folder / f"seed{number}"
        create_qcow2(str(path), SIZE, **options)  # type: ignore[arg-type]
        cluster = int(options.get("cluster_size", 65536))  # type: ignore[call-overload]
        with open_chain(path, format="qcow2", alone=True) as chain:
            for _ in range(6):
                chain.image.write(source.randrange(SIZE // 1024) * 512, source.randbytes(70_144))
            for at in range(4):
                packed = pack(int(options.get("compression") == "zstd"), b"abc" * (cluster // 3) + b"a" * (cluster % 3))
                if len(packed) < cluster:
                    chain.image.write_packed((at + 3) * cluster, packed)
        if options.get("refcount_bits") != 1 and number % 2:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            changes.create_snapshot(str(path), fd, "kept", now=1.5)
            os.close(fd)
        made.append(path.read_bytes())
    return made


def mutate(good: bytes, source: random.Random) -> bytes:
    """One to eight changes: in the header, in tables that it names, anywhere, the end cut off."""
    data = bytearray(good)
    bits = struct.unpack_from(">I", data, 20)[0]
    cluster = 1 << bits if 9 <= bits <= 21 else 512
    l1, reftable, snapshots = (struct.unpack_from(">Q", data, at)[0] for at in (40, 48, 64))
    places = [0, 0, 16, l1, l1, reftable, snapshots]
    for table in (l1, reftable):
        if table + 8 <= len(data):
            places += [struct.unpack_from(">Q", data, table)[0] & 0x00FFFFFFFFFFFE00] * 3
    for _ in range(source.randrange(1, 9)):
        place = source.choice(places)
        span = source.choice((16, 112, 512, cluster))
        at = (place if source.random() < 0.9 else source.randrange(len(data))) + source.randrange(span) // 8 * 8
        if at + 8 > len(data):
            continue
        old = struct.unpack_from(">Q", data, at)[0]
        value = source.choice(
            (
                source.choice(INTERESTING),
                old ^ 1 << source.randrange(64),
                source.choice((l1, reftable, snapshots, old)) | source.choice((0, 1 << 63, 1 << 62)),
                source.randrange(len(data) // cluster + 2) * cluster | source.choice((0, 1 << 63, 1)),
                source.getrandbits(64),
            )
        )
        if source.random() < 0.3:
            struct.pack_into(">I", data, at + source.choice((0, 4)), value & 0xFFFFFFFF)
        else:
            struct.pack_into(">Q", data, at, value & ((1 << 64) - 1))
    if source.random() < 0.1:
        del data[source.randrange(len(data)) :]
    return bytes(data)


def use(path: Path, source: random.Random) -> str:
    """Do to an image what can be done to one. Any error but the declared ones is the caller's to see."""
    try:
        _use(path, source)
    except (ConfigError, HostError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 4096, text
        return text
    return ""


def _use(path: Path, source: random.Random) -> None:
    try:
        with open_chain(path, format="qcow2", read_only=source.random() < 0.3, cache_bytes=1 << 16) as chain:
            _operate(chain.image, source)
    finally:
        kind = source.randrange(6)
        fd = open_locked(str(path), read_only=False)
        try:
            if kind == 0:
                check(str(path), fd, reread(str(path), fd))
            elif kind == 1:
                repair(str(path), fd, reread(str(path), fd))
                assert check(str(path), fd, reread(str(path), fd)).clean
            elif kind == 2:
                changes.create_snapshot(str(path), fd, "new")
            elif kind == 3:
                changes.apply_snapshot(str(path), fd, "kept")
            elif kind == 4:
                changes.delete_snapshot(str(path), fd, "kept")
            else:
                changes.set_size(str(path), fd, source.choice((SIZE // 2, SIZE * 3)))
        finally:
            os.close(fd)


def _operate(image: object, source: random.Random) -> None:
    from virtio import _ring

    assert isinstance(image, _ring.Image)
    length = image.length
    if not length:
        return
    limit = min(length, 1 << 40)
    for _ in range(16):
        offset = source.randrange(-(-limit // 512)) * 512
        if source.random() < 0.7:
            offset %= SIZE
        part = max(0, min(source.choice((512, 512, 4096, 65536, 200_192)), length - offset))
        if not part:
            continue
        try:
            match source.randrange(7):
                case 0 | 1:
                    image.read(offset, bytearray(part))
                case 2 | 3:
                    image.write(offset, b"w" * part)
                case 4:
                    image.zero(offset, part, source.random() < 0.5)
                case 5:
                    image.discard(offset, part)
                case 6:
                    image.flush()
                    image.map(offset, min(length - offset, 1 << 24), 64)
        except OSError:
            continue  # an I/O error for the guest
