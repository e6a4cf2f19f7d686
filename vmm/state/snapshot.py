"""A snapshot directory, opened to be restored: checked whole before anything starts. *any thread*

Memory is mapped copy-on-write from the file, so that a machine runs at once and clones share the host's page cache.
When this user has made or verified a snapshot here, a record in the user's cache says so: its checksums are not
computed again while its files stay unchanged. A snapshot from elsewhere may name files of this host only if the user
allows it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from vmm import _native
from vmm.cachedir import cache_directory
from vmm.config import Config
from vmm.errors import ConfigError, HostError, StateError, os_reason
from vmm.guest.identity import Identity, hostname_of
from vmm.machine.memory import CopyOnWrite, Extent, GuestMemory
from vmm.machine.origin import Restore, Saved, SavedDisk, Touched
from vmm.state import manifest as manifests
from vmm.state.manifest import CHUNK, Manifest
from vmm.state.payload import parse

PAGE = 4096
MAX_RECORDS = 1000
"""When there are more records of snapshots than this, the older half is removed."""
MAX_BASES = 32
"""A snapshot may have at most this many bases, one below the other."""


class Snapshot:
    """An opened snapshot. Close it when the machine runs."""

    def __init__(self, path: Path, manifest: Manifest, digest: str, base: Snapshot | None) -> None:
        self.path, self.manifest, self.digest, self.base = path, manifest, digest, base
        self._fd = -1

    @classmethod
    def open(cls, path: Path | str, *, depth: int = 0) -> Self:
        """Open a snapshot and its bases. Their manifests and the sizes of their memory are checked; other content is
        checked later. `depth`: how many snapshots stand above this one. Raises StateError, HostError."""
        folder = Path(path).absolute()
        if not folder.is_dir():
            raise StateError(f"{folder}: no snapshot: it is no directory")
        manifest, digest = manifests.read(folder)
        base = None
        if manifest.base is not None:
            if depth >= MAX_BASES:
                raise StateError(f"{folder}: more than {MAX_BASES} snapshots stand on each other")
            base = cls.open(manifest.base.path, depth=depth + 1)
            if base.manifest.identity != manifest.base.identity:
                raise StateError(f"{folder}: its base {base.path} is another snapshot by now")
            if base.manifest.memory.regions != manifest.memory.regions:
                raise StateError(f"{folder}: its base {base.path} has other memory")
        snapshot = cls(folder, manifest, digest, base)
        try:
            snapshot._open_memory()
        except BaseException:
            snapshot.close()
            raise
        return snapshot

    def _open_memory(self) -> None:
        name = "memory.zst" if self.manifest.memory.compressed else "memory"
        path = self.path / name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except OSError as error:
            raise StateError(f"{path}: {os_reason(error)}") from error
        size = status.st_size if stat.S_ISREG(status.st_mode) else -1
        if self.manifest.memory.compressed:
            self._decompress()
        elif size != self.manifest.memory.size:
            raise StateError(f"{path}: {size} bytes instead of {self.manifest.memory.size}")

    def _decompress(self) -> None:
        """Decompress memory.zst into a memfd, which takes its place. Raises StateError, HostError."""
        import zstandard

        total = self.manifest.memory.size
        chunks = -(-total // CHUNK)
        index = manifests.read_small(self.path, "memory.index", 16 * chunks)
        if len(index) != 16 * chunks:
            raise StateError(f"{self.path / 'memory.index'}: of the wrong length")
        compressed = os.fstat(self._fd).st_size
        memory = os.memfd_create("snapshot-memory", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, total)
            decompressor = zstandard.ZstdDecompressor()
            for number in range(chunks):
                at = int.from_bytes(index[16 * number : 16 * number + 8], "little")
                length = int.from_bytes(index[16 * number + 8 : 16 * number + 16], "little")
                wanted = min(CHUNK, total - number * CHUNK)
                if not length:
                    continue
                if length > 2 * CHUNK or at + length > compressed:
                    raise StateError(f"{self.path / 'memory.index'}: chunk {number} is out of bounds")
                data = decompressor.decompress(os.pread(self._fd, length, at), max_output_size=wanted)
                if len(data) != wanted:
                    raise StateError(f"{self.path / 'memory.zst'}: chunk {number} is damaged")
                os.pwrite(memory, data, number * CHUNK)
        except BaseException as error:
            os.close(memory)
            if isinstance(error, zstandard.ZstdError):
                raise StateError(f"{self.path / 'memory.zst'}: damaged: {error}") from error
            if isinstance(error, OSError):
                raise HostError(f"{self.path / 'memory.zst'}: {os_reason(error)}") from error
            raise
        os.close(self._fd)
        self._fd = memory

    def verify(self) -> None:
        """Check memory and the small files against their checksums, and those of the bases too. Raises StateError."""
        if self.base is not None:
            self.base.verify()
        sums = manifests.read_checked(self.path, self.manifest, "memory.sums", 1 << 24)
        try:
            found = _native.checksums(self._fd, self.manifest.memory.size, CHUNK)
        except OSError as error:
            raise StateError(f"{self.path / 'memory'}: {os_reason(error)}") from error
        if found != sums:
            chunk = next((n for n in range(len(found) // 4) if found[4 * n : 4 * n + 4] != sums[4 * n : 4 * n + 4]), 0)
            raise StateError(f"{self.path / 'memory'}: damaged (the checksum of MiB {chunk} does not match)")
        for name in self.manifest.files:
            manifests.read_checked(self.path, self.manifest, name, 1 << 30)

    def ensure_verified(self) -> None:
        """verify(), unless a record says that these files were verified and they have not changed. Raises
        StateError."""
        if self._known():
            return
        self.verify()
        self._record()

    # Trust: what this user made or verified here.

    @property
    def made_here(self) -> bool:
        """Whether this user took the snapshot on this host."""
        return (_records() / f"{self.digest}.made").exists()

    def _stamp(self) -> str:
        facts: list[Any] = []
        for name in sorted([manifests.MANIFEST, "memory", "memory.zst", *self.manifest.files]):
            try:
                status = os.stat(self.path / name, follow_symlinks=False)
            except OSError:
                continue
            facts.append((name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _known(self) -> bool:
        try:
            same = (_records() / f"{self.digest}.verified").read_text() == self._stamp()
        except (OSError, ValueError):
            return False
        return same and (self.base is None or self.base._known())

    def _record(self) -> None:
        _write_record(f"{self.digest}.verified", self._stamp())

    # What a machine is made of.

    def prepare(
        self, changes: Mapping[str, Any], *, trusted: bool = False, as_copy: bool = False
    ) -> tuple[Config, Saved]:
        """Check everything that can be checked before a machine is built. Returns its configuration with `changes`, and
        what the machine goes on from. `as_copy`: it runs beside the original, and so gets MAC addresses, a host name
        and a machine id of its own. Raises StateError, ConfigError, HostError."""
        self.check_files(trusted=trusted)
        self.ensure_verified()
        config = self.config(changes)
        if as_copy:
            from vmm.state.fork import nets_of_a_copy  # loads asyncio

            config = replace(config, nets=tuple(nets_of_a_copy(config)))
        if config.all_shares and not (trusted or self.made_here):
            path = config.all_shares[0].path
            raise StateError(f"{self.path}: comes from elsewhere and shares {path}; add --trust if it may be used")
        return config, self.saved(config, as_copy=as_copy)

    def config(self, changes: Mapping[str, Any]) -> Config:
        """The machine's configuration with `changes` (fields of Config). Raises StateError, ConfigError."""
        values = manifests.load_json(self.path / manifests.MANIFEST, self.manifest.config.encode())
        if not isinstance(values, dict):
            raise StateError(f"{self.path}: manifest: the configuration is no table")
        try:
            saved = Config.from_dict(values)
        except ConfigError as error:
            raise StateError(f"{self.path}: manifest: configuration: {error}") from error
        disks = [
            replace(disk, **self._disk_changes(disk.id or f"disk{index}")) for index, disk in enumerate(saved.disks)
        ]
        return Config.from_dict({**saved.to_dict(), "disks": disks, "gdb": None, **changes})

    def _disk_changes(self, name: str) -> dict[str, Any]:
        """What changes in the configuration of this disk. If the snapshot has a copy of the disk, the machine writes to
        a private overlay above the copy, which other restores need as it is."""
        entry = self.manifest.disks.get(name)
        if entry is None:
            raise StateError(f"{self.path}: manifest: the disk {name} is missing")
        if entry.how == "copy":
            return {"path": self.path / "disks" / f"{name}.raw", "snapshot": True, "readonly": False, "format": "raw"}
        return {"path": Path(entry.files[0].path)} if entry.files else {}

    def check_files(self, *, trusted: bool) -> None:
        """Check that the files of this host that it needs are as they were. A snapshot that was not made here may name
        such files only with `trusted`. Raises StateError."""
        outside = [identity for entry in self.manifest.disks.values() for identity in entry.files]
        if outside and not (trusted or self.made_here):
            raise StateError(
                f"{self.path}: comes from elsewhere and names {outside[0].path}; add --trust if that file may be opened"
            )
        for identity in outside:
            identity.check()

    def state(self) -> dict[str, Any]:
        """The content of state.json, checked against its hash. Raises StateError."""
        data = manifests.read_checked(self.path, self.manifest, "state.json", manifests.MAX_STATE)
        values = manifests.load_json(self.path / "state.json", data)
        if not isinstance(values, dict) or set(values) != {"machine", "console"}:
            raise StateError(f"{self.path / 'state.json'}: not the state of a machine and its console")
        return values

    def disks(self) -> dict[str, SavedDisk]:
        """The overlays that disks start from, by name. Raises StateError."""
        found = {}
        for name, entry in self.manifest.disks.items():
            if entry.how == "overlay":
                sectors = manifests.read_checked(self.path, self.manifest, f"disks/{name}.sectors", 1 << 30)
                if len(sectors) != -(-entry.capacity // 4096):
                    raise StateError(f"{self.path}: {name}: the overlay's bitmap is of another disk")
                found[name] = SavedDisk(self.path / "disks" / f"{name}.overlay", sectors)
        for name, entry in self.manifest.disks.items():
            if entry.how == "reference":
                continue
            path = self.path / "disks" / f"{name}.{'overlay' if entry.how == 'overlay' else 'raw'}"
            if not path.is_file() or path.is_symlink():
                raise StateError(f"{path}: missing, or no file")
            if path.stat().st_size != entry.capacity:
                raise StateError(f"{path}: of the wrong size")
        return found

    def make_memory(self) -> GuestMemory:
        """Guest memory with the snapshot's content, private to its machine. Raises HostError, StateError."""
        chain: list[Snapshot] = [self]
        while chain[-1].base is not None:
            chain.append(chain[-1].base)
        root = chain[-1]
        memory = GuestMemory(self.manifest.memory.size, source=CopyOnWrite(root._extents()))
        try:
            for delta in reversed(chain[:-1]):
                delta._apply(memory)
        except BaseException:
            memory.close()
            raise
        return memory

    def _extents(self) -> tuple[Extent, ...]:
        found, at = [], 0
        for start, length in self.manifest.memory.regions:
            found.append(Extent(start, length, self._fd, at))
            at += length
        return tuple(found)

    def _apply(self, memory: GuestMemory) -> None:
        """Read the pages of an incremental snapshot into memory that has those of its base."""
        pages = manifests.read_checked(self.path, self.manifest, "memory.pages", 1 << 30)
        at = first = 0
        for (_, view), (_, length) in zip(memory.regions(), self.manifest.memory.regions, strict=True):
            words = (length // PAGE + 63) // 64 * 8
            try:
                _native.read_pages(self._fd, at, view, pages[first : first + words], False)
            except (OSError, ValueError) as error:
                raise StateError(f"{self.path}: the pages of the snapshot cannot be read: {error}") from error
            at += length
            first += words

    def touched(self) -> bytes | None:
        """The pages that the first restore touched, if it was recorded: a bitmap over all of RAM."""
        try:
            return manifests.read_small(self.path, "touched", self.manifest.memory.size // PAGE // 8 + 64)
        except StateError:
            return None

    def record_touched(self, pages: bytes) -> None:
        """Keep this bitmap for later restores. Does nothing if there is one already, or the directory cannot be
        written."""
        beside = self.path / f".touched-{os.getpid()}"
        try:
            if not (self.path / "touched").exists():
                beside.write_bytes(pages)
                os.link(beside, self.path / "touched")
        except OSError:
            pass
        finally:
            beside.unlink(missing_ok=True)

    def saved(self, config: Config, *, as_copy: bool = False) -> Saved:
        """What a machine of this configuration goes on from; `as_copy` is as in prepare(). With the real clock the
        machine's wall clock goes on from the host's time. With the virtual clock, or a configured epoch, it goes on
        from where it stood. Raises StateError."""
        state = self.state()
        try:
            fields = state["machine"]["fields"]
            epoch = int(fields["epoch_ns"])
            if config.clock == "real" and config.epoch is None:
                epoch = time.time_ns() - int(fields["now_ns"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"{self.path / 'state.json'}: machine: not a state") from error
        # With the virtual clock a restored machine goes on as the saved one would have, to the last bit.
        identity = Identity("", "", {}) if config.clock == "real" else None
        if as_copy:
            import uuid  # loads platform, which nothing else needs

            identity = Identity(hostname_of(config.name), uuid.uuid4().hex, self._fresh_addresses(state["machine"]))
            identity.check()
        touched = Touched(self.touched(), self.record_touched)
        restore = Restore(state["machine"], self.make_memory, epoch)
        return Saved(restore, self.disks(), state["console"], identity, str(self.path), touched)

    def _fresh_addresses(self, machine: dict[str, Any]) -> dict[bytes, bytes]:
        """A new MAC address for each network card, by its old one. Raises StateError."""
        from virtio.devices.net import random_mac  # loads asyncio
        from virtio.devices.netstate import NetState

        found: dict[bytes, bytes] = {}

        def search(value: Any, depth: int) -> None:
            if not isinstance(value, dict) or depth <= 0:
                return
            if value.get("kind") == "virtio-net" and "fields" in value:
                mac = parse(NetState, "virtio-net", value).mac
                found[mac] = random_mac(os.urandom)
            for item in value.values():
                search(item, depth - 1)

        search(machine, 12)
        return found

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self.base is not None:
            self.base.close()


def open_prepared(
    path: Path | str, changes: Mapping[str, Any], trusted: bool, as_copy: bool
) -> tuple[Snapshot, Config, Saved]:
    """Snapshot.open() and then prepare(), in one call for a worker thread. Raises StateError, ConfigError,
    HostError."""
    snapshot = Snapshot.open(path)
    try:
        return snapshot, *snapshot.prepare(changes, trusted=trusted, as_copy=as_copy)
    except BaseException:
        snapshot.close()
        raise


def trust(digest: str, path: Path) -> None:
    """Record that this user made the snapshot `path`, whose manifest has this SHA-256, and that it is whole."""
    _write_record(f"{digest}.made", str(path))
    snapshot = Snapshot.open(path)
    try:
        snapshot._record()
    finally:
        snapshot.close()


def _records() -> Path:
    return cache_directory("snapshots")


def _write_record(name: str, text: str) -> None:
    """Write a record if that is possible. Without it a restore only takes longer, or needs --trust."""
    folder = _records()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = folder / f".{name}-{os.getpid()}"
        beside.write_text(text)
        os.replace(beside, folder / name)
        records = list(folder.iterdir())
        if len(records) > MAX_RECORDS:
            for old in sorted(records, key=lambda path: path.stat().st_mtime_ns)[: len(records) // 2]:
                old.unlink(missing_ok=True)
    except OSError:
        pass


