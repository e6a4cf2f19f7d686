"""qcow2 images beside a model of bytes and beside qemu-img: random operations, compared as they go."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from virtio.images.chain import ImageChain, open_chain
from virtio.images.check import Report, check, reread
from virtio.images.create import create_qcow2
from virtio.images.unpack import pack

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img (qemu-utils)")


@dataclass(frozen=True)
class Parameters:
    """What kind of image a run is about."""

    options: dict[str, Any] = field(default_factory=dict)
    depth: int = 0
    """Images below the one that is written."""
    base: str = "raw"
    """Format of the lowest."""
    packed: bool = False
    """Some clusters of the lowest, and of the top, are compressed."""

    def __str__(self) -> str:
        shown = [f"{key}={value}" for key, value in self.options.items()]
        shown += [f"depth={self.depth}", self.base] if self.depth else []
        return ",".join(shown + ["packed"] * self.packed) or "default"


SETS = (
    Parameters(),
    Parameters({"cluster_size": 512}),
    Parameters({"cluster_size": 512, "refcount_bits": 64}, depth=1),
    Parameters({"cluster_size": 512, "refcount_bits": 1}, depth=2, base="qcow2"),
    Parameters({"cluster_size": 1024, "version": 2}),
    Parameters({"cluster_size": 4096, "refcount_bits": 2}, depth=3, base="qcow2"),
    Parameters({"cluster_size": 4096, "compression": "zstd"}, packed=True),
    Parameters({"cluster_size": 8192, "refcount_bits": 8}, depth=1, packed=True),
    Parameters({"cluster_size": 16384, "extended_l2": True}),
    Parameters({"cluster_size": 16384, "extended_l2": True, "refcount_bits": 32}, depth=2),
    Parameters({"cluster_size": 32768, "refcount_bits": 4}, depth=4, base="qcow2"),
    Parameters({"version": 2}, depth=1),
    Parameters({"version": 2}, depth=2, base="qcow2", packed=True),
    Parameters({"lazy_refcounts": True}, depth=1),
    Parameters({"extended_l2": True}, depth=1, packed=True, base="qcow2"),
    Parameters({"compression": "zstd"}, depth=1, packed=True, base="qcow2"),
    Parameters({"cluster_size": 262144}, depth=1, base="qcow2"),
    Parameters({"cluster_size": 1 << 20, "extended_l2": True}, depth=1, packed=True),
    Parameters({"cluster_size": 2 << 20}),
    Parameters({"cluster_size": 2 << 20, "refcount_bits": 64}, depth=1, packed=True, base="qcow2"),
)
"""The sets that campaigns go through."""


def qemu(*arguments: str | Path) -> tuple[int, str]:
    """(status, output) of a program of qemu-utils."""
    # Its coroutines change stacks, which a preloaded sanitizer of ours does not survive.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [str(item) for item in arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    return done.returncode, done.stdout + done.stderr


def our_check(path: Path) -> Report:
    """Our own check of an image."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return check(str(path), fd, reread(str(path), fd))
    finally:
        os.close(fd)


class Twin:
    """An image, and what it should hold."""

    def __init__(self, folder: Path, parameters: Parameters, seed: int, size: int = 6 << 20) -> None:
        self.folder, self.parameters = folder, parameters
        self.source = random.Random(seed)
        self.model = bytearray(size)
        self.kind = "zstd" if parameters.options.get("compression") == "zstd" else "zlib"
        below: str | None = None
        for level in range(parameters.depth):
            below = self._below(level, below)
        self.path = folder / "top.qcow2"
        format = None if below is None else "raw" if below.endswith("raw") else "qcow2"
        create_qcow2(str(self.path), size, backing=below, backing_format=format, **parameters.options)
        self.chain = self.open()

    def open(self) -> ImageChain:
        """The image open for writing."""
        return open_chain(self.path, format="qcow2", cache_bytes=self.source.choice((1 << 16, 32 << 20)))

    def _below(self, level: int, below: str | None) -> str:
        raw = level == 0 and self.parameters.base == "raw"
        name = f"base{level}.{'raw' if raw else 'qcow2'}"
        # Shorter ones: what is above sees zeroes behind their end.
        size = len(self.model) - self.source.choice((0, 512, 70144, 1 << 20))
        if raw:
            data = self.source.randbytes(1 << 20)
            where = self.source.randrange(size - len(data)) // 512 * 512
            with open(self.folder / name, "wb") as file:
                file.truncate(size)
                file.seek(where)
                file.write(data)
            self.model[where : where + len(data)] = data
            return name
        format = None if below is None else "raw" if below.endswith("raw") else "qcow2"
        options = {"cluster_size": self.source.choice((4096, 65536)), "version": self.source.choice((2, 3))}
        create_qcow2(str(self.folder / name), size, backing=below, backing_format=format, **options)
        self.model[size:] = bytes(len(self.model) - size)
        kept, self.kind = self.kind, "zlib"
        with open_chain(self.folder / name, format="qcow2") as self.chain:
            self.cluster = options["cluster_size"]
            for _ in range(12):
                self.write(size)
            if self.parameters.packed:
                for _ in range(12):
                    self.write_packed(size, options["cluster_size"])
        self.kind = kept
        return name

    # Operations

    def _range(self, limit: int | None = None) -> tuple[int, int]:
        limit = len(self.model) if limit is None else limit
        offset = self.source.randrange(limit // 512) * 512
        length = self.source.choice((1, 1, 2, 8, 8, 64, 128, 300)) * 512
        return offset, min(length, limit - offset)

    def write(self, limit: int | None = None) -> None:
        offset, length = self._range(limit)
        data = self.source.randbytes(length)
        self.chain.image.write(offset, data, self.source.random() < 0.02)
        self.model[offset : offset + length] = data

    def write_packed(self, limit: int | None = None, cluster: int | None = None) -> None:
        """Compressed clusters are written by converting only; here they turn up anywhere."""
        cluster = cluster or self.parameters.options.get("cluster_size", 65536)
        count = (limit or len(self.model)) // cluster
        if not count:
            return
        offset = self.source.randrange(count) * cluster
        word = self.source.randbytes(11)
        data = (word * (cluster // 11 + 1))[:cluster]
        packed = pack(int(self.kind == "zstd"), data)
        if len(packed) < cluster:
            self.chain.image.write_packed(offset, packed)
            self.model[offset : offset + cluster] = data

    def zero(self) -> None:
        offset, length = self._range()
        self.chain.image.zero(offset, length, self.source.random() < 0.5)
        self.model[offset : offset + length] = bytes(length)

    def discard(self) -> None:
        offset, length = self._range()
        length = min(length * self.source.choice((1, 8)), len(self.model) - offset)
        before = bytes(self.model[offset : offset + length])
        self.chain.image.discard(offset, length)
        data = bytearray(length)
        self.chain.image.read(offset, data)
        # Each cluster is as it was, or reads as zeroes.
        assert all(data[at : at + 512] in (before[at : at + 512], bytes(512)) for at in range(0, length, 512)), (
            "a discard made other bytes up"
        )
        self.model[offset : offset + length] = data

    def read(self) -> None:
        offset, length = self._range()
        data = bytearray(length)
        self.chain.image.read(offset, data)
        assert data == self.model[offset : offset + length], (offset, length)

    def flush(self) -> None:
        self.chain.image.flush()

    def reopen(self) -> None:
        self.chain.close()
        self.chain = self.open()

    def step(self) -> None:
        """One operation."""
        calls: list[Callable[[], None]] = [self.write] * 10 + [self.read] * 6 + [self.zero] * 3 + [self.discard] * 3
        calls += [self.flush, self.reopen] + [self.write_packed] * (2 * self.parameters.packed)
        self.source.choice(calls)()

    def compare(self, *, oracle: bool = True) -> None:
        """The whole disk, and what both checks say of the file."""
        data = bytearray(len(self.model))
        self.chain.image.read(0, data)
        assert data == self.model
        self.chain.close()
        report = our_check(self.path)
        assert report.clean, report.problems
        if oracle:
            status, output = qemu("qemu-img", "check", "-f", "qcow2", self.path)
            assert status == 0, output
            raw = self.folder / "model.raw"
            raw.write_bytes(self.model)
            status, output = qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", self.path, raw)
            assert status == 0, output
        self.chain = self.open()
