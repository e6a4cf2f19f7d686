"""What a snapshot directory says of itself: the manifest, its reading and writing.

    DIR/manifest.json   this, with a SHA-256 of itself; written last
    DIR/state.json      the machine's state (vmm/machine/saving.py) and what its console showed last
    DIR/memory          RAM, region after region; pages of zeroes are holes
    DIR/memory.zst      RAM in place of `memory`, if compressed: a zstd frame for each chunk that is not all zeroes
    DIR/memory.index    with memory.zst: where each chunk's frame begins and how long it is
    DIR/memory.sums     CRC-32C of each chunk of RAM
    DIR/memory.pages    with a base: a bitmap of the pages that `memory` holds; the others are the base's
    DIR/touched         a bitmap of the pages that the first restore touched, read ahead by later ones
    DIR/disks/ID.…      overlays, the bitmaps of their sectors, and copies of disks

A directory is hostile until it is parsed: no file name in it may lead out of it, and every size is checked. This
module knows neither machines nor loops.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from cpu.values import I64, U64, dataclass
from vmm.errors import HostError, StateError, os_reason
from vmm.state.payload import encode, parse

MANIFEST = "manifest.json"
MAX_MANIFEST = 1 << 20
MAX_STATE = 64 << 20
CHUNK = 1 << 20
"""Bytes of RAM for each checksum, and each frame of compressed memory."""
Hash = Annotated[str, range(64, 65)]


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file of the host that a snapshot refers to. Size and time tell whether it is still the same."""

    path: Annotated[str, range(1, 4097)]
    size: U64
    mtime_ns: I64

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """The identity that this file has now. Raises HostError."""
        try:
            status = path.stat()
        except OSError as error:
            raise HostError(f"{path}: {os_reason(error)}") from error
        return cls(str(path.absolute()), status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raises StateError if the file is missing, or is not the same any more."""
        try:
            now = FileIdentity.of(Path(self.path))
        except HostError as error:
            raise StateError(f"the snapshot needs a file that cannot be had: {error}") from error
        if now != self:
            raise StateError(f"{self.path} has changed since the snapshot was taken; restore needs it as it was")


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """One disk. `overlay`: the snapshot has what was written to a disk with `snapshot`, and a bitmap of those sectors.
    `copy`: the snapshot has the whole disk. `reference`: the disk is a file that stays where it is."""

    how: Literal["overlay", "copy", "reference"]
    capacity: U64
    files: Annotated[tuple[FileIdentity, ...], range(65)]
    """The image that lies below an overlay or is referred to, and its backing files."""


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """RAM. `regions` are pairs of guest-physical address and bytes, in the order in which the file has them."""

    size: U64
    regions: Annotated[tuple[tuple[U64, U64], ...], range(1, 17)]
    compressed: bool
    stored: U64
    """Bytes of the file that hold data. They are only shown to people."""


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """The snapshot that an incremental one stands on."""

    path: Annotated[str, range(1, 4097)]
    identity: Annotated[str, range(1, 65)]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a whole snapshot."""

    kind: ClassVar = "snapshot"
    version: ClassVar = 1
    identity: Annotated[str, range(1, 65)]
    created_ns: I64
    program: Annotated[str, range(65)]
    name: Annotated[str, range(256)]
    """The machine's name."""
    core: Annotated[str, range(65)]
    """The execution core that it ran on. This is only shown to people: a restore may use another core."""
    config: Annotated[str, range(MAX_MANIFEST)]
    """The machine's configuration, JSON."""
    memory: MemoryEntry
    base: BaseEntry | None
    disks: dict[str, DiskEntry]
    files: dict[str, Hash]
    """The SHA-256 of each small file, by name."""


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the directory and make it durable. Raises HostError."""
    text = json.dumps(encode(manifest), indent=1, sort_keys=True)
    whole = f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"
    write_file(folder / MANIFEST, whole.encode())


def read(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a directory, and its SHA-256. Raises StateError."""
    data = read_small(folder, MANIFEST, MAX_MANIFEST)
    text, _, tail = data.rstrip(b"\n").rpartition(b"\n")
    digest = hashlib.sha256(text).hexdigest()
    if tail.decode(errors="replace") != digest:
        raise StateError(f"{folder}: the manifest is damaged (its checksum does not match)")
    values = load_json(folder / MANIFEST, text)
    manifest = parse(Manifest, f"{folder}: manifest", values)
    assert isinstance(manifest, Manifest)
    total = sum(length for _, length in manifest.memory.regions)
    if total != manifest.memory.size or any(value % 4096 for pair in manifest.memory.regions for value in pair):
        raise StateError(f"{folder}: manifest: the memory's regions do not add up")
    for name in [*manifest.disks, *manifest.files]:
        if not is_plain(name):
            raise StateError(f"{folder}: manifest: {name[:60]!r} is no name of a file in a snapshot")
    return manifest, digest


def is_plain(name: str) -> bool:
    """Whether the name cannot lead out of its directory."""
    parts = name.split("/")
    return len(parts) <= 2 and all(
        part and part not in (".", "..") and all(char.isalnum() or char in "-_." for char in part) for part in parts
    )


def load_json(path: Path, data: bytes) -> Any:
    """Parsed JSON. Raises StateError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path}: not JSON: {str(error)[:100]}") from error


def read_small(folder: Path, name: str, limit: int) -> bytes:
    """The content of a regular file in the directory. Links are not followed. Raises StateError, also if the file is
    larger than `limit` bytes."""
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if name == MANIFEST and isinstance(error, FileNotFoundError):
            raise StateError(f"{folder}: no snapshot: there is no {MANIFEST}") from error
        raise StateError(f"{path}: {os_reason(error)}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StateError(f"{path}: no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise StateError(f"{path}: {os_reason(error)}") from error
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise StateError(f"{path}: larger than {limit} bytes")
    return data


def read_checked(folder: Path, manifest: Manifest, name: str, limit: int) -> bytes:
    """The content of a small file, checked against its hash in the manifest. Raises StateError."""
    if name not in manifest.files:
        raise StateError(f"{folder}: manifest: {name} is missing")
    data = read_small(folder, name, limit)
    if hashlib.sha256(data).hexdigest() != manifest.files[name]:
        raise StateError(f"{folder / name}: damaged (its checksum does not match)")
    return data


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, which is durable when this returns. Raises HostError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise HostError(f"{path}: {os_reason(error)}") from error
