"""A power cut at any moment leaves a qcow2 image that is consistent and holds every flushed byte.

LOOPVISOR_CRASH_POINTS is the number of crash points for each kind of image (2,000: `make soak-images`).
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.support.powercut import WORKLOAD, allowed, crash, library, operations, record
from tests.support.qcow2 import our_check, qemu
from virtio.images.chain import open_chain
from virtio.images.create import create_qcow2

POINTS = int(os.environ.get("LOOPVISOR_CRASH_POINTS", "8"))
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
        calls = record(preload, image, WORKLOAD, str(seed), "120")
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


CHANGES = {
    "create": 'disks.snapshot(path, "create", "new")',
    "delete": 'disks.snapshot(path, "delete", "old")',
    "apply": 'disks.snapshot(path, "apply", "old")',
    "grow": "disks.resize(path, 900 << 20)",
    "repair": "disks.check(path, repair=True)",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_a_change_that_is_cut_short(change: str, cluster_size: int, preload: Path, tmp_path: Path) -> None:
    """Snapshots, growth and repair: whoever opens the image next finds, or makes, a consistent one, and the disk is
    what it was, or what it was to become."""
    from vmm import disks

    image, cut = tmp_path / "image", tmp_path / "cut"
    source = random.Random(change)
    create_qcow2(str(image), SIZE, cluster_size=cluster_size)
    contents: list[bytes] = []
    for name in ("old", "now"):
        with open_chain(image, format="qcow2") as chain:
            for _ in range(20):
                chain.image.write(source.randrange(SIZE // 512 - 200) * 512, source.randbytes(70_144))
            data = bytearray(SIZE)
            chain.image.read(0, data)
        contents.append(bytes(data))
        if name == "old":
            disks.snapshot(str(image), "create", "old")
    if change == "repair":
        with open(image, "r+b") as file:  # a dirty image, as programs leave that keep refcounts lazily
            file.seek(72)
            file.write(struct.pack(">Q", 1))
    before = image.read_bytes()
    program = f"import sys; from vmm import disks; path = sys.argv[1]; {CHANGES[change]}"
    calls = record(preload, image, program)
    assert sum(call.kind == 2 for call in calls) > 3
    for _ in range(max(POINTS, 12) // 2):
        disk, _, _ = crash(before, calls, source.randrange(len(calls) + 1), source)
        cut.write_bytes(disk)
        with open_chain(cut, format="qcow2") as chain:
            data = bytearray(SIZE)
            chain.image.read(0, data)
            assert data == contents[1] or (change == "apply" and data == contents[0])
        report = our_check(cut)
        assert report.clean and not report.dirty, report.problems
