"""What the guest's init tells from superblocks and partition tables, beside blkid, and from disks that are broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
UUID = "0123456f-89ab-cdef-0123-456789abcdef"


class Found(NamedTuple):
    type: str
    uuid: str
    label: str
    part_uuid: str
    part_label: str


Identify = Callable[[Path, int], Found]


@pytest.fixture(scope="module")
def identify(tmp_path_factory: pytest.TempPathFactory) -> Identify:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path_factory.mktemp("volumes") / "volumes"
    sources = [ROOT / "tests/unit/native/volumes_main.c", ROOT / "images/init/volumes.c"]
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-builtin"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    if subprocess.run([compiler, *flags, *sanitizers, "-o", program, *sources], capture_output=True).returncode:
        subprocess.run([compiler, *flags, "-o", program, *sources], check=True)

    def run(path: Path, number: int = 1) -> Found:
        done = subprocess.run([program, path, str(number)], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        return Found(*done.stdout.decode().removesuffix("\n").split("\t"))

    return run


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"needs {name}")
    return found


def empty(path: Path, mib: int) -> Path:
    with path.open("wb") as file:
        file.truncate(mib * MIB)
    return path


@pytest.mark.parametrize(("kind", "mib", "command", "uuid", "label"), [
    ("ext4", 8, ["mke2fs", "-q", "-t", "ext4", "-L", "a label", "-U", UUID], UUID, "a label"),
    ("ext4", 8, ["mke2fs", "-q", "-t", "ext2", "-L", "sixteen letters!", "-U", UUID], UUID, "sixteen letters!"),
    ("xfs", 320, ["mkfs.xfs", "-q", "-L", "twelve_chars", "-m", f"uuid={UUID}"], UUID, "twelve_chars"),
    ("btrfs", 128, ["mkfs.btrfs", "-q", "-L", "ż" * 100, "-U", UUID], UUID, "ż" * 100),
    ("erofs", 0, ["mkfs.erofs", "-U", UUID], UUID, ""),
    ("squashfs", 0, ["mksquashfs"], "", ""),
])
def test_file_systems(
    kind: str, mib: int, command: list[str], uuid: str, label: str, identify: Identify, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    words = [tool(command[0]), *command[1:]]
    if mib:
        words.append(str(empty(image, mib)))
    else:
        words[1:1] = [str(tmp_path / "tree"), str(image)] if kind == "squashfs" else []
        words += [str(image), str(tmp_path / "tree")] if kind == "erofs" else []
    subprocess.run(words, check=True, capture_output=True)
    assert identify(image, 1)[:3] == (kind, uuid, label)
    told = subprocess.run([tool("blkid"), "-p", "-o", "export", image], capture_output=True, text=True).stdout
    assert f"UUID={uuid}\n" in told or not uuid


def partitioned(path: Path, script: str) -> Path:
    """A disk with the partitions that sfdisk's script describes."""
    empty(path, 8)
    subprocess.run([tool("sfdisk"), "-q", path], input=script, text=True, check=True, capture_output=True)
    return path


GPT = f"label: gpt\nlabel-id: {UUID}\nsize=1M, uuid={UUID.upper()}, name=first\nsize=1M, name=\"żółty root\"\n"


def test_a_gpt(identify: Identify, tmp_path: Path) -> None:
    """Its entries, also by the backup header when the first is broken; not without any that is whole."""
    disk = partitioned(tmp_path / "disk", GPT)
    assert identify(disk, 1)[3:] == (UUID, "first")
    assert identify(disk, 2).part_label == "żółty root" and len(identify(disk, 2).part_uuid) == 36
    assert identify(disk, 3)[3:] == ("", "") and identify(disk, 129)[3:] == ("", "")
    data = bytearray(disk.read_bytes())
    data[512 + 60] ^= 1
    disk.write_bytes(data)
    assert identify(disk, 1)[3:] == (UUID, "first")
    data[1024 + 16] ^= 1  # also the table that the first one names: the backup has its own
    disk.write_bytes(data)
    assert identify(disk, 1)[3:] == (UUID, "first")
    data[-512] ^= 1
    disk.write_bytes(data)
    assert identify(disk, 1)[3:] == ("", "")


def test_an_mbr(identify: Identify, tmp_path: Path) -> None:
    """PARTUUID as the kernel makes it, also of a logical partition."""
    disk = partitioned(tmp_path / "disk", "label: dos\nlabel-id: 0xdeadbeef\nsize=1M\nsize=4M, type=5\nsize=1M\n")
    assert [identify(disk, number)[3:] for number in (1, 5, 26)] == [
        ("deadbeef-01", ""), ("deadbeef-05", ""), ("deadbeef-1a", "")
    ]
    disk.write_bytes(bytes(MIB))
    assert identify(disk, 1) == ("", "", "", "", "")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1023, 1100, 65600])
def test_disks_that_end_early(size: int, identify: Identify, tmp_path: Path) -> None:
    data = bytearray(size)
    for at, magic in ((1080, b"\x53\xef"), (0, b"XFSB"), (65600, b"_BHRfS_M"), (510, b"\x55\xaa"), (450, b"\xee")):
        data[at : at + len(magic)] = magic[: max(0, size - at)]
    (tmp_path / "disk").write_bytes(data[:size])
    identify(tmp_path / "disk", 1)


FIELDS = {"header size": (12, 4), "my block": (24, 8), "table": (72, 8), "count": (80, 4), "entry size": (84, 4)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FIELDS)), st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 5000), st.sampled_from(
    [2**k + d for k in (7, 12, 31, 32, 63) for d in (-1, 0, 1)])), st.integers(-1, 2**31 - 1))
def test_hostile_headers(identify: Identify, tmp_path: Path, field: str, value: int, number: int) -> None:
    """A header whose check sum is right and whose fields are anything: an answer, and nothing is read outside."""
    disk = tmp_path / "disk"
    if not disk.exists():
        partitioned(disk, GPT)
        (tmp_path / "header").write_bytes(disk.read_bytes()[512:1024])
    data = bytearray((tmp_path / "header").read_bytes())
    at, size = FIELDS[field]
    data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    data[16:20] = bytes(4)
    counted = min(max(int.from_bytes(data[12:16], "little"), 92), 512)
    data[16:20] = zlib.crc32(data[:counted]).to_bytes(4, "little")
    with disk.open("r+b") as file:
        file.seek(512)
        file.write(data)
    identify(disk, number)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2048), st.integers(0, 1500))
def test_noise(identify: Identify, tmp_path: Path, noise: bytes, at: int) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(at) + noise)
    identify(tmp_path / "noise", 1)
