"""qcow2 images against a model of bytes and against QEMU's own tools."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import ENGINES
from tests.support.qcow2 import SETS, Parameters, Twin, needs_qemu_img, our_check, qemu
from tests.support.virtio import PciDriver
from virtio.backends.file import Io
from virtio.backends.image import ImageBlock
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.errors import ConfigError
from virtio.images.chain import open_chain
from virtio.images.changes import apply_snapshot, create_snapshot
from virtio.images.create import create_qcow2
from virtio.images.header import BITMAPS

ROOT = Path(__file__).parents[3]
SIZE = 6 << 20


@pytest.mark.parametrize("parameters", SETS, ids=str)
def test_random_operations(parameters: Parameters, tmp_path: Path) -> None:
    """A short run of the campaign tests/fuzz/image_model.py, without QEMU."""
    twin = Twin(tmp_path, parameters, seed=1)
    for _ in range(300):
        twin.step()
    twin.compare(oracle=False)
    twin.chain.close()


@needs_qemu_img
@pytest.mark.parametrize("parameters", SETS[2::4], ids=str)
def test_what_we_write_qemu_reads(parameters: Parameters, tmp_path: Path) -> None:
    twin = Twin(tmp_path, parameters, seed=2)
    for _ in range(60):
        twin.step()
    twin.compare()
    twin.chain.close()


QEMU_KINDS = [
    "cluster_size=65536",
    "cluster_size=512,refcount_bits=1",
    "extended_l2=on,cluster_size=16384",
    "compat=0.10",
    "refcount_bits=64,lazy_refcounts=on",
]


@needs_qemu_img
@pytest.mark.parametrize("options", QEMU_KINDS)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "unrecorded"])
def test_what_qemu_writes_we_read_and_change(options: str, recorded: bool, tmp_path: Path) -> None:
    """An overlay of QEMU's over a raw file, and a snapshot of QEMU's that our writes must not change."""
    source = random.Random(5)
    model = bytearray(source.randbytes(1 << 20) + bytes(SIZE - (1 << 20)))
    (tmp_path / "base").write_bytes(model)
    top = tmp_path / "top.qcow2"
    assert qemu("qemu-img", "create", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", top)[0] == 0
    if not recorded:
        assert qemu("qemu-img", "rebase", "-u", "-b", "base", top)[0] in (0, 1)
    assert qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 100k 300k", "-c", "write -z 1M 64k", top)[0] == 0
    model[100 << 10 : 400 << 10] = b"\7" * (300 << 10)
    model[1 << 20 : (1 << 20) + (64 << 10)] = bytes(64 << 10)
    snapshots = "refcount_bits=1" not in options  # one bit cannot count two references
    assert not snapshots or qemu("qemu-img", "snapshot", "-c", "before", top)[0] == 0
    kept = bytes(model)
    with open_chain(top, format="qcow2") as chain:
        data = bytearray(SIZE)
        chain.image.read(0, data)
        assert data == model
        for _ in range(40):
            offset, length = source.randrange(SIZE // 512) * 512, source.choice((512, 4096, 131072))
            length = min(length, SIZE - offset)
            written = source.randbytes(length)
            chain.image.write(offset, written)
            model[offset : offset + length] = written
    assert our_check(top).clean
    assert qemu("qemu-img", "check", top)[0] == 0
    for content, apply in ((bytes(model), False), (kept, True)):
        if apply and not snapshots:
            continue
        if apply:
            assert qemu("qemu-img", "snapshot", "-a", "before", top)[0] == 0
        (tmp_path / "model").write_bytes(content)
        status, output = qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", top, tmp_path / "model")
        assert status == 0, output


@needs_qemu_img
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [4096, 65536, 2 << 20])
def test_compressed_by_qemu(kind: str, cluster: int, tmp_path: Path) -> None:
    source = random.Random(6)
    model = bytearray(b"".join(b"line %d of a text\n" % number for number in range(150000))[: 2 << 20])
    model[1 << 19 : 1 << 20] = source.randbytes(1 << 19)
    (tmp_path / "raw").write_bytes(model)
    image = tmp_path / "image"
    options = f"compression_type={kind},cluster_size={cluster}"
    status, output = qemu(
        "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, tmp_path / "raw", image
    )
    assert status == 0, output
    with open_chain(image, format="qcow2") as chain:
        for _ in range(30):
            offset = source.randrange(len(model) // 512) * 512
            data = bytearray(min(source.choice((512, 8192, 100 * 1024)), len(model) - offset))
            chain.image.read(offset, data)
            assert data == model[offset : offset + len(data)]
            written = source.randbytes(512)
            chain.image.write(offset, written)
            model[offset : offset + 512] = written
    assert qemu("qemu-img", "check", image)[0] == 0
    (tmp_path / "raw").write_bytes(model)
    assert qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, tmp_path / "raw")[0] == 0


@needs_qemu_img
@pytest.mark.parametrize("raw", ["on", "off"])
def test_an_external_data_file(raw: str, tmp_path: Path) -> None:
    """Opened only if the user names it; with data_file_raw the file alone is the disk."""
    source = random.Random(7)
    image, data_file = tmp_path / "image", tmp_path / "data"
    options = f"data_file={data_file},data_file_raw={raw}"
    assert qemu("qemu-img", "create", "-f", "qcow2", "-o", options, image, "4M")[0] == 0
    with pytest.raises(ConfigError, match="data=FILE"):
        open_chain(image, format="qcow2")
    model = bytearray(4 << 20)
    with open_chain(image, format="qcow2", data=data_file) as chain:
        for _ in range(40):
            offset = source.randrange(len(model) // 512) * 512
            length = min(source.choice((512, 8192, 100 * 1024)), len(model) - offset)
            if source.random() < 0.3:
                chain.image.zero(offset, length, source.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            else:
                written = source.randbytes(length)
                chain.image.write(offset, written)
                model[offset : offset + length] = written
    assert qemu("qemu-img", "check", image)[0] == 0
    (tmp_path / "model").write_bytes(model)
    assert qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, tmp_path / "model")[0] == 0
    if raw == "on":
        assert data_file.read_bytes().ljust(len(model), b"\0") == model


@needs_qemu_img
@pytest.mark.parametrize("options", ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512,refcount_bits=2"])
def test_a_dirty_image_is_repaired_before_it_is_written(options: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    assert qemu("qemu-img", "create", "-f", "qcow2", "-o", options, image, "64M")[0] == 0
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 3M", "-c", "flush", "-c", "abort", image)
    assert our_check(image).dirty and our_check(image).corruptions
    with open_chain(image, format="qcow2") as chain:
        data = bytearray(3 << 20)
        chain.image.read(1 << 20, data)
        assert data == b"\5" * len(data)
        chain.image.write(0, b"x" * 70000)
    assert our_check(image).clean and not our_check(image).dirty
    assert qemu("qemu-img", "check", image)[0] == 0


@needs_qemu_img
@pytest.mark.parametrize("change", ["write", "snapshot", "apply"])
def test_bitmaps_of_another_program_are_declared_inconsistent_by_any_change(change: str, tmp_path: Path) -> None:
    """They do not say what changed. Their clusters are free after a repair, and may be used for anything."""
    image = tmp_path / "image"
    assert qemu("qemu-img", "create", "-f", "qcow2", image, "4M")[0] == 0
    if change == "apply":
        assert qemu("qemu-img", "snapshot", "-c", "one", image)[0] == 0
    assert qemu("qemu-img", "bitmap", "--add", image, "seen")[0] == 0
    assert qemu("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 1M", image)[0] == 0
    assert qemu("qemu-img", "check", image)[0] == 0 and autoclear(image) & BITMAPS
    if change == "write":
        with open_chain(image, format="qcow2") as chain:
            chain.image.write(1 << 20, b"x" * 70000)
    else:
        with image.open("r+b") as file:
            operation = create_snapshot if change == "snapshot" else apply_snapshot
            operation(str(image), file.fileno(), "two" if change == "snapshot" else "one")
    assert not autoclear(image)
    assert qemu("qemu-img", "check", "-r", "leaks", image)[0] == 0
    with open_chain(image, format="qcow2") as chain:
        chain.image.write(0, b"y" * (4 << 20))
    assert our_check(image).clean and qemu("qemu-img", "check", image)[0] == 0


def autoclear(image: Path) -> int:
    with image.open("rb") as file:
        return int.from_bytes(os.pread(file.fileno(), 8, 88), "big")


WRITER = """
import sys
from virtio.images.chain import open_chain
from virtio.images.changes import apply_snapshot, create_snapshot
chain = open_chain(sys.argv[1], format="qcow2")
number = 0
while True:
    for _ in range(8):
        number += 1
        chain.image.write(4096 * (number * 37 % 1500), b"%08d" % number * 512)
    if number % 5 == 0:
        chain.image.discard(4096 * 1500, 36 * 4096)
        chain.image.write(4096 * (1500 + number % 36), b"x" * 4096)
    chain.image.flush()
    print(number, flush=True)
"""


@pytest.mark.parametrize("options", [{}, {"cluster_size": 512, "refcount_bits": 64}, {"extended_l2": True}], ids=str)
def test_what_was_flushed_survives_kill_9(options: dict[str, int], tmp_path: Path) -> None:
    image = tmp_path / "image"
    create_qcow2(str(image), SIZE + (1 << 20), **options)  # type: ignore[arg-type]
    source = random.Random(8)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, image], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ}
        )
        assert process.stdout is not None
        for _ in range(source.randrange(1, 40)):
            flushed = int(process.stdout.readline())
        process.kill()
        for line in process.stdout.read().splitlines(keepends=True):
            flushed = int(line) if line.endswith(b"\n") else flushed
        process.stdout.close()
        process.wait()
        report = our_check(image)
        assert not report.corruptions and not report.dirty, report.problems
        with open_chain(image, format="qcow2", read_only=True) as chain:
            for number in range(max(1, flushed - 1400), flushed + 1):
                data = bytearray(4096)
                chain.image.read(4096 * (number * 37 % 1500), data)
                assert data == b"%08d" % number * 512 or int(data[:8]) > flushed, number


@pytest.mark.parametrize(
    "options", [{"cluster_size": 4096}, {"cluster_size": 16384, "extended_l2": True}, {"cluster_size": 512}], ids=str
)
def test_many_threads(options: dict[str, Any], tmp_path: Path) -> None:
    """Eight threads, each with sectors of its own between those of the others, so that they meet in every cluster; one
    flushes, one discards what nobody owns."""
    create_qcow2(str(tmp_path / "base"), SIZE)
    image = tmp_path / "image"
    create_qcow2(str(image), SIZE, backing="base", backing_format="qcow2", **options)
    workers, rounds = 8, 60
    with open_chain(image, format="qcow2", cache_bytes=1 << 14) as chain:

        def work(mine: int) -> dict[int, bytes]:
            source, held = random.Random(mine), dict[int, bytes]()
            for _ in range(rounds):
                sector = source.randrange(SIZE // 2 // 512 // workers) * workers + mine
                if source.random() < 0.2:
                    chain.image.zero(sector * 512, 512, source.random() < 0.5)
                    held[sector] = bytes(512)
                elif source.random() < 0.2 and held:
                    sector = source.choice(list(held))
                    data = bytearray(512)
                    chain.image.read(sector * 512, data)
                    assert data == held[sector]
                else:
                    held[sector] = source.randbytes(512)
                    chain.image.write(sector * 512, held[sector])
            return held

        def disturb(kind: int) -> dict[int, bytes]:
            source = random.Random(kind)
            for _ in range(rounds):
                if kind:
                    offset = SIZE // 2 + source.randrange(SIZE // 1024 - 300) * 512
                    chain.image.write(offset, source.randbytes(70_144))
                    chain.image.discard(offset, 150 * 512)
                else:
                    chain.image.flush()
            return {}

        with ThreadPoolExecutor(workers + 2) as pool:
            futures = [pool.submit(work, number) for number in range(workers)]
            futures += [pool.submit(disturb, kind) for kind in range(2)]
            held = {sector: data for future in futures for sector, data in future.result().items()}
        data = bytearray(SIZE // 2)
        chain.image.read(0, data)
    for sector in range(SIZE // 2 // 512):
        assert data[sector * 512 : sector * 512 + 512] == held.get(sector, bytes(512)), sector
    report = our_check(image)
    assert report.clean, report.problems


@pytest.mark.parametrize("io", ENGINES)
async def test_a_guest_cannot_make_its_raw_disk_another_format(io: Io, tmp_path: Path) -> None:
    """Where the format was found by content: an I/O error for what begins like qcow2, in one piece or in two."""
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    device = BlockDevice(await ImageBlock.open_image(tmp_path / "disk", io=io))
    driver = PciDriver(device)
    driver.initialize()
    header = b"QFI\xfb\0\0\0\3".ljust(8192, b"x")

    async def write(sector: int, *pieces: bytes) -> bytes:
        return await driver.request(0, [struct.pack("<IIQ", blk.OUT, 0, sector), *pieces], [1])

    assert await write(0, header) == bytes([blk.IOERR])
    assert await write(0, header[:3], header[3:512]) == bytes([blk.IOERR])
    assert await write(0, header[8:520]) == await write(1, header) == bytes([blk.OK])
    driver.transport.reset()
    await device.aclose()
    assert (tmp_path / "disk").read_bytes()[: 512 + len(header)] == header[8:520] + header
