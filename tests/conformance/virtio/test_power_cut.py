"""A power cut at any moment leaves a qcow2 image that is consistent and holds every flushed byte.

LOOPVISOR_CRASH_POINTS is the number of crash points for each kind of image (2,000: `make powercut`).
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.support.powercut import allowed, crash, library, operations, record
from tests.support.qcow2 import our_check, qemu
from virtio.images.chain import open_chain
from virtio.images.create import create_qcow2

POINTS = int(os.environ.get("LOOPVISOR_CRASH_POINTS", "12"))
SIZE = 3 << 20
KINDS: list[dict[str, Any]] = [
    {"cluster_size": 65536},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "version": 2},
]


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the recording library and that of ASan exclude each other")
    return library(tmp_path_factory.mktemp("writelog"))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "snapshot"])
def test_every_crash_is_consistent(options: dict[str, Any], shared: bool, preload: Path, tmp_path: Path) -> None:
    image, cut = tmp_path / "image", tmp_path / "cut"
    source = random.Random(repr(options) + str(shared))
    create_qcow2(str(image), SIZE, **options)
    if shared:
        if options.get("refcount_bits") == 1:
            pytest.skip("one bit cannot count two references")
        from vmm import disks

        with open_chain(image) as chain:
            chain.image.write(0, bytes(SIZE // 2))  # zeroes, so that the model need not know them
        disks.snapshot(str(image), "create", "before")
    before = image.read_bytes()
    per_run = 500
    for seed in range(-(-POINTS // per_run)):
        image.write_bytes(before)
        calls = record(preload, image, seed, 120)
        done = operations(image)
        for _ in range(min(POINTS, per_run)):
            disk, ended, begun = crash(before, calls, source.randrange(len(calls) + 1), source)
            cut.write_bytes(disk)
            report = our_check(cut)
            assert not report.corruptions and not report.dirty, report.problems
            if source.random() < 0.1 and shutil.which("qemu-img"):
                status, output = qemu("qemu-img", "check", "-f", "qcow2", cut)
                assert status in (0, 3), output
            held = allowed(done, ended // 2 if ended & 1 else ended // 2 - 1, begun // 2, SIZE // 512)
            with open_chain(cut, format="qcow2", read_only=True) as chain:
                data = bytearray(SIZE)
                chain.image.read(0, data)
            for sector, may in enumerate(held):
                numbers = set(struct.unpack("<64Q", data[sector * 512 : sector * 512 + 512]))
                assert len(numbers) == 1 and numbers <= may, (sector, numbers, may)
