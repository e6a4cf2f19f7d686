"""vmm.disks and `vmm disk`: what they do to images, beside qemu-img; what they refuse."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from zstandard import ZstdError

from tests.support.qcow2 import needs_qemu_img, our_check, qemu
from virtio.images.chain import open_chain
from virtio.images.unpack import pack, unpack
from vmm import disks
from vmm.errors import ConfigError

SIZE = 4 << 20


def read(path: Path, **options: Any) -> bytes:
    with open_chain(path, read_only=True, **options) as chain:
        data = bytearray(chain.size)
        chain.image.read(0, data)
        return bytes(data)


def write(path: Path, offset: int, data: bytes) -> None:
    with open_chain(path) as chain:
        chain.image.write(offset, data)


def is_good(path: Path) -> None:
    report = our_check(path)
    assert report.clean, report.problems
    status, output = qemu("qemu-img", "check", path)
    assert status == 0, output


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Of tmp_path/raw: data, a hole, zeroes that are there, text."""
    source = random.Random(1)
    data = source.randbytes(1 << 20) + bytes(1 << 20) + b"some text\n" * 50000
    (tmp_path / "raw").write_bytes(data)
    os.truncate(tmp_path / "raw", SIZE)
    return data.ljust(SIZE, b"\0")


KINDS: list[dict[str, Any]] = [
    {},
    {"compress": True},
    {"compress": True, "options": {"compression": "zstd", "cluster_size": 4096}},
    {"compress": True, "options": {"refcount_bits": 1, "cluster_size": 16384}},
    {"options": {"extended_l2": True, "cluster_size": 32768}},
    {"options": {"version": 2, "cluster_size": 512}},
    {"options": {"preallocation": "metadata"}},
    {"format": "raw"},
]


@needs_qemu_img
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_convert_there_and_back(kind: dict[str, Any], content: bytes, tmp_path: Path) -> None:
    made = tmp_path / "made"
    steps: list[tuple[int, int]] = []
    disks.convert(str(tmp_path / "raw"), str(made), progress=lambda *step: steps.append(step), **kind)
    assert steps[-1] == (SIZE, SIZE)
    if kind.get("format") != "raw":
        is_good(made)
        assert qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", made, tmp_path / "raw")[0] == 0
        if kind.get("compress"):
            assert our_check(made).packed
    assert read(made) == content
    disks.convert(str(made), str(tmp_path / "back"), format="raw")
    assert (tmp_path / "back").read_bytes() == content
    assert (tmp_path / "back").stat().st_blocks * 512 < SIZE  # what was zero takes no space


@needs_qemu_img
def test_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "image"
    disks.create_disk(str(path), SIZE, cluster_size=4096)
    states: dict[str, bytes] = {}
    for number, name in enumerate(("one", "two", "three")):
        write(path, number * 300_032, name.encode() * 40_000)
        states[name] = read(path)
        disks.snapshot(str(path), "create", name)
        is_good(path)
    assert [item["name"] for item in disks.info(str(path))["snapshots"]] == list(states)
    write(path, 0, b"later" * 4096)
    later = read(path)
    assert all(read(path, snapshot=name) == state for name, state in states.items())
    status, output = qemu("qemu-img", "snapshot", "-l", path)
    assert status == 0 and all(name in output for name in states)
    disks.snapshot(str(path), "apply", "two")
    assert read(path) == states["two"]
    is_good(path)
    write(path, 100_352, later[:50_176])
    is_good(path)
    disks.snapshot(str(path), "delete", "one")
    is_good(path)
    assert read(path, snapshot="three") == states["three"]
    with pytest.raises(ConfigError, match="one"):
        disks.snapshot(str(path), "apply", "one")
    for name in ("two", "three"):
        disks.snapshot(str(path), "delete", name)
    is_good(path)


def test_a_refcount_that_is_too_narrow_for_a_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "image"
    disks.create_disk(str(path), SIZE, refcount_bits=1)
    write(path, 0, b"x" * 4096)
    with pytest.raises(ConfigError, match="references"):
        disks.snapshot(str(path), "create", "one")
    report = our_check(path)
    assert report.clean and not report.dirty
    assert disks.info(str(path))["snapshots"] == []


@needs_qemu_img
def test_resize(tmp_path: Path) -> None:
    path = tmp_path / "image"
    disks.create_disk(str(path), SIZE, cluster_size=512)
    write(path, SIZE - 70_144, b"y" * 70_144)
    before = read(path)
    disks.resize(str(path), SIZE * 20)
    is_good(path)
    assert read(path) == before.ljust(SIZE * 20, b"\0")
    with pytest.raises(ConfigError, match="--shrink"):
        disks.resize(str(path), SIZE)
    disks.resize(str(path), SIZE - 50_176, shrink=True)
    is_good(path)
    assert read(path) == before[: SIZE - 50_176]
    disks.resize(str(path), SIZE)
    assert read(path) == before[: SIZE - 50_176].ljust(SIZE, b"\0")


@needs_qemu_img
def test_commit_and_rebase(content: bytes, tmp_path: Path) -> None:
    top, other = tmp_path / "top", tmp_path / "other"
    disks.create_disk(str(top), SIZE + (1 << 20), backing="raw")
    (tmp_path / "raw2").write_bytes(content[: 2 << 20] + b"z" * (1 << 20))
    write(top, 5000 // 512 * 512, b"t" * 70_144)
    with open_chain(top) as chain:
        chain.image.zero(1 << 19, 1 << 17)
    wanted = read(top)
    disks.rebase(str(top), "raw2")
    assert read(top) == wanted
    assert disks.info(str(top))["backing"] == "raw2" and disks.info(str(top))["backing_format"] == "raw"
    is_good(top)
    disks.commit(str(top))
    assert read(tmp_path / "raw2") == wanted
    assert read(top) == wanted
    assert our_check(top).allocated == 0
    is_good(top)
    disks.create_disk(str(other), None, backing="top")
    write(other, 0, b"o" * 512)
    disks.rebase(str(other), None)
    assert "backing" not in disks.info(str(other))
    assert read(other) == b"o" * 512 + wanted[512:]
    is_good(other)


def test_repair(tmp_path: Path) -> None:
    path = tmp_path / "image"
    disks.create_disk(str(path), SIZE)
    write(path, 0, b"x" * 200_000)
    before = read(path)
    with open(path, "r+b") as file:
        file.seek(2 * 65536 + 8)
        file.write(b"\0\0\0\1\0\7")  # refcounts: one lost, one too high
    report, repaired = disks.check(str(path))
    assert (report.corruptions, report.leaks, repaired) == (2, 1, False) or report.corruptions
    _, repaired = disks.check(str(path), repair=True)
    assert repaired
    assert disks.check(str(path))[0].clean
    assert read(path) == before


@pytest.mark.parametrize("kind", [0, 1], ids=["zlib", "zstd"])
def test_decompression_without_the_libraries(kind: int) -> None:
    """What C asks Python for where the host has no libz.so.1 or libzstd.so.1; sectors end in somebody else's bytes."""
    data = random.Random(3).randbytes(5000) + bytes(60_536)
    packed = pack(kind, data)
    assert len(packed) < 10_000
    assert unpack(kind, packed + b"something else", len(data)) == data
    with pytest.raises((zlib.error, ZstdError)):
        unpack(kind, b"\xff" * 512, len(data))


# What is refused


def test_files_that_an_image_names(tmp_path: Path) -> None:
    """Only what the rule allows is opened, links followed."""
    (tmp_path / "secret").write_bytes(b"s" * SIZE)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "image"
    for name in ("../secret", str(tmp_path / "secret"), "link"):
        if name == "link":
            (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
        disks.create_disk(str(path), SIZE, backing=name, backing_format="raw")
        with pytest.raises(ConfigError, match="backing=any"):
            disks.convert(str(path), str(tmp_path / "out"))
        assert read(path, backing="any")[:1] == b"s"
    with pytest.raises(Exception, match="backing=none"):
        open_chain(path, backing="none")


def test_chains_that_end_nowhere(tmp_path: Path) -> None:
    for name, backing in (("a", "b"), ("b", "a"), ("c", "c")):
        disks.create_disk(str(tmp_path / name), SIZE)
        disks.rebase(str(tmp_path / name), backing, "qcow2", unsafe=True)
    for name in ("a", "c"):
        with pytest.raises(Exception, match="comes back"):
            open_chain(tmp_path / name)


def test_a_backing_file_by_content_names_no_other(tmp_path: Path) -> None:
    """A guest that wrote a header into its raw disk gets nobody else's file read through it."""
    (tmp_path / "secret").write_bytes(b"s" * SIZE)
    disks.create_disk(str(tmp_path / "was-raw"), SIZE, backing="secret")
    disks.create_disk(str(tmp_path / "top"), SIZE)
    disks.rebase(str(tmp_path / "top"), "was-raw", None, unsafe=True)
    fd = os.open(tmp_path / "top", os.O_RDWR)
    try:
        from virtio.images.changes import set_backing

        set_backing("top", fd, "was-raw", None)
    finally:
        os.close(fd)
    with pytest.raises(Exception, match="only by its content"):
        open_chain(tmp_path / "top")
    disks.rebase(str(tmp_path / "top"), "was-raw", "raw", unsafe=True)
    with open_chain(tmp_path / "top") as chain:
        data = bytearray(512)
        chain.image.read(0, data)
        assert data[:4] == b"QFI\xfb"  # a raw file that begins so is still raw


def test_a_raw_disk_stays_raw(tmp_path: Path) -> None:
    """A write that would make a disk found to be raw look like qcow2 is refused; with format=raw it is not."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    header = b"QFI\xfb\0\0\0\3".ljust(8192, b"\1")
    with open_chain(path) as chain:
        with pytest.raises(PermissionError):
            chain.image.write(0, header)
        chain.image.write(0, b"x" * 8192)
        chain.image.write(512, header)
    assert path.read_bytes()[:1024] == b"x" * 512 + header[:512]
    with open_chain(path, format="raw") as chain:
        chain.image.write(0, header)
    assert path.read_bytes()[:8192] == header


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["create", "a", "12Q"], 2, "size"),
        (["create", "a"], 2, "give a size"),
        (["create", "a", "1G", "--cluster-size", "100"], 2, "power of two"),
        (["create", "a", "1G", "--format", "raw", "--cluster-size", "4K"], 2, "raw"),
        (["create", "a", "1G", "--format", "raw", "--new-data", "b"], 2, "--new-data: a raw image"),
        (["convert", "raw", "a", "--to", "raw", "--qcow2-version", "2"], 2, "--qcow2-version: a raw image"),
        (["create", "a", "1G", "--preallocation", "some"], 2, "none of off"),
        (["create", "nowhere/a", "1G"], 2, "nowhere/a"),
        (["info", "missing"], 2, "missing"),
        (["check", "raw"], 2, "raw image"),
        (["check", "image"], 1, "errors"),
        (["check", "image", "--repair"], 0, "repaired"),
        (["convert", "raw", "raw"], 2, "raw"),
        (["resize", "raw", "-1G"], 2, "nothing would be left"),
        (["snapshot", "raw", "--create", "x"], 2, "convert"),
        (["commit", "image"], 2, "no backing file"),
        (["rebase", "image"], 2, "--alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_command(arguments: list[str], status: int, text: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1 << 20))
    disks.create_disk(str(tmp_path / "image"), SIZE)
    write(tmp_path / "image", 0, b"x" * 512)
    with open(tmp_path / "image", "r+b") as file:
        file.seek(2 * 65536)
        file.write(bytes(12))
    done = subprocess.run(
        [Path(sys.executable).parent / "vmm", "disk", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert text in done.stderr + done.stdout
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1


def test_info_of_an_image_in_use(tmp_path: Path) -> None:
    path = tmp_path / "image"
    disks.create_disk(str(path), SIZE)
    with open_chain(path):
        assert disks.info(str(path))["in_use"] and disks.info(str(path))["size"] == SIZE
        for call in (disks.check, disks.commit):
            with pytest.raises(ConfigError, match="in use"):
                call(str(path))
    assert not disks.info(str(path))["in_use"]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(ConfigError, match="neither a regular file nor a block device"):
            disks.info(str(tmp_path / name))


def test_info_as_json(tmp_path: Path) -> None:
    disks.create_disk(str(tmp_path / "image"), SIZE, compression="zstd")
    command = [Path(sys.executable).parent / "vmm", "disk", "info", "--json", tmp_path / "image"]
    facts = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert facts["size"] == SIZE and facts["format"] == "qcow2" and facts["compression"] == "zstd"
