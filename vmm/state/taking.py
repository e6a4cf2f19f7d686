"""Take a snapshot of a machine: memory is copied while it runs, and it stands still for the rest only.

First all memory is copied, and then, in rounds, the pages that were written meanwhile. When few are left, or their
number does not shrink, the machine stands still: the rest is copied within the host's memory, together with the
devices' state, and the machine runs on. The files are written into a directory beside the target, which takes the
target's place when it is whole. Loop thread; worker threads write.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from virtio.backends.image import ImageBlock
from virtio.devices.blk import BlockDevice
from vmm import _native
from vmm.errors import ConfigError, HostError, core_errors, os_reason
from vmm.lifecycle import Outcome, Reason
from vmm.machine.saving import save
from vmm.state import manifest as manifests
from vmm.state.diskcopy import copy_sparse
from vmm.state.manifest import CHUNK, BaseEntry, DiskEntry, FileIdentity, Manifest, MemoryEntry
from vmm.state.snapshot import Snapshot, trust
from vmm.state.worker import in_thread

if TYPE_CHECKING:
    from vmm.machine.memory import GuestMemory
    from vmm.vm import VirtualMachine

PAGE = 4096
PIECE = 1 << 20
ROUNDS = 6
"""The machine stands still after at most this many rounds over dirty pages."""
SMALL = 2048
"""The machine stands still as soon as no more pages than this are dirty: 8 MiB are copied in about a millisecond."""
MOST_KEPT = 32768
"""Up to this many dirty pages are copied within memory while the machine stands still. If there are more, they are
written to the file while it stands still."""
RENAME_EXCHANGE = 2
AT_FDCWD = -100
SAVED = Outcome(Reason.SHUTDOWN, "saved")


@dataclass(slots=True)
class SnapshotProgress:
    """How far a snapshot has come, and what it took."""

    pages: int = 0
    """Pages of RAM."""
    written: int = 0
    """Bytes written to the memory file."""
    rounds: int = 0
    stood_still_ns: int = 0
    seconds: float = 0.0
    tell: Callable[[SnapshotProgress], None] = field(default=lambda progress: None, repr=False)


async def take(
    vm: VirtualMachine,
    target: Path,
    *,
    base: Path | None = None,
    compress: Literal["zstd"] | None = None,
    disks: Literal["copy", "reference"] = "copy",
    stop: bool = False,
    progress: SnapshotProgress | None = None,
) -> Manifest:
    """Save `vm` into the directory `target`, which is made, or replaced if it is a snapshot. `stop`: the machine stands
    still until the files are whole, and is ended then. Raises ConfigError, StateError, HostError; then the machine runs
    on, and `target` is what it was."""
    began = time.monotonic()
    progress = progress or SnapshotProgress()
    target = target.absolute()
    vm.check_no_jobs()
    _check_target(target)
    under = await asyncio.to_thread(Snapshot.open, base) if base is not None else None
    work = await asyncio.to_thread(_workspace, target)
    async with AsyncExitStack() as stack:
        stack.callback(work.discard)
        taken = await _Taking(vm, work.path, under, disks, progress).run(stack, stop)
        await asyncio.to_thread(taken.finish, compress, vm)
        await asyncio.to_thread(work.publish, target)
        if stop:
            vm.end(SAVED)
        trust(taken.digest, target)
        progress.seconds = time.monotonic() - began
        progress.tell(progress)
        return taken.manifest


class _Taking:
    """One snapshot that is being taken."""

    def __init__(
        self, vm: VirtualMachine, folder: Path, base: Snapshot | None, disks: str, progress: SnapshotProgress
    ) -> None:
        self._vm, self._folder, self._base, self._how = vm, folder, base, disks
        self._progress = progress
        self._machine = vm.machine
        """The machine that is saved; after a reboot there is another."""
        self._memory: GuestMemory = self._machine.memory
        self._regions = [(start, len(view)) for start, view in self._memory.regions()]
        self._offsets: list[int] = []
        at = 0
        for _, length in self._regions:
            self._offsets.append(at)
            at += length
        self._size = at
        self._held: list[bytearray] = []
        """With a base: for each region a bitmap of the pages that the file holds."""
        self._state: dict[str, Any] = {}
        self._config = vm.config
        self._disks: dict[str, DiskEntry] = {}
        self.manifest: Manifest
        self.digest = ""
        progress.pages = self._size // PAGE

    async def run(self, stack: AsyncExitStack, stop: bool) -> _Taking:
        """Copy memory, state and disks. The machine runs on afterwards; with `stop` it stands still until `stack`
        ends."""
        try:
            self._file = os.open(
                self._folder / "memory", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
            stack.callback(os.close, self._file)
            os.ftruncate(self._file, self._size)
        except OSError as error:
            raise HostError(f"{self._folder}: {os_reason(error)}") from error
        self._vm.check_standing(self._machine)
        with core_errors():
            self._memory.start_dirty_log()
        try:
            await in_thread(self._copy_all)
            dirty = await self._rounds()
            standing = AsyncExitStack()
            await standing.enter_async_context(self._vm.standstill("snapshot"))
            if stop:
                stack.push_async_exit(standing)
            try:
                begun = time.monotonic_ns()
                self._vm.check_no_jobs()
                with core_errors():
                    last = _merge(dirty, [bitmap for _, bitmap in self._memory.take_dirty()])
                kept = await self._keep(last)
                self._state = {"machine": save(self._vm.machine), "console": self._vm.save_console()}
                self._config = self._vm.present
                await in_thread(self._copy_disks)
                self._vm.check_standing(self._machine)
                self._progress.stood_still_ns = time.monotonic_ns() - begun
            finally:
                if not stop:
                    await standing.aclose()
        finally:
            with contextlib.suppress(Exception):  # the log went with the machine
                self._memory.stop_dirty_log()
        await in_thread(self._write_kept, last, kept)
        return self

    # Memory.

    def _views(self) -> Sequence[memoryview]:
        return [view for _, view in self._memory.regions()]

    def _copy_all(self) -> None:
        views = self._views()
        bases = self._base.make_memory() if self._base is not None else None
        try:
            for index, view in enumerate(views):
                pages = None
                if bases is not None:
                    pages = _native.differing(view, bases.regions()[index][1])
                    self._held.append(bytearray(pages))
                self._progress.written += _native.save_pages(self._file, self._offsets[index], view, pages, True)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            if bases is not None:
                bases.close()

    async def _rounds(self) -> list[bytes]:
        """Copy what was written meanwhile, round by round, until little is left. Returns bitmaps of what is left."""
        before = 1 << 62
        while True:
            self._vm.check_standing(self._machine)
            with core_errors():
                dirty = [bitmap for _, bitmap in self._memory.take_dirty()]
            count = sum(map(_native.count, dirty))
            self._progress.tell(self._progress)
            if count <= SMALL or self._progress.rounds >= ROUNDS or count > before * 3 // 4:
                return dirty
            before = count
            self._progress.rounds += 1
            await in_thread(self._write_dirty, dirty)

    def _write_dirty(self, dirty: Sequence[bytes]) -> None:
        try:
            for index, (view, bitmap) in enumerate(zip(self._views(), dirty, strict=True)):
                self._hold(index, bitmap)
                self._progress.written += _native.save_pages(self._file, self._offsets[index], view, bitmap, False)
        except OSError as error:
            raise self._failure(error) from error

    def _hold(self, index: int, bitmap: bytes) -> None:
        if self._held:
            _native.merge(self._held[index], bitmap)

    async def _keep(self, last: Sequence[bytes]) -> list[mmap.mmap] | None:
        """Copy the last dirty pages within memory. None: they were too many, and have been written to the file."""
        counts = [_native.count(bitmap) for bitmap in last]
        if sum(counts) > MOST_KEPT:
            await in_thread(self._write_dirty, last)
            return None
        kept: list[mmap.mmap] = await in_thread(self._gather, last, counts)
        return kept

    def _gather(self, last: Sequence[bytes], counts: Sequence[int]) -> list[mmap.mmap]:
        kept = []
        for view, bitmap, count in zip(self._views(), last, counts, strict=True):
            room = mmap.mmap(-1, max(count, 1) * PAGE)
            _native.gather(view, bitmap, memoryview(room))
            kept.append(room)
        return kept

    def _write_kept(self, last: Sequence[bytes], kept: Sequence[mmap.mmap] | None) -> None:
        if kept is None:
            return
        try:
            for index, (bitmap, room) in enumerate(zip(last, kept, strict=True)):
                self._hold(index, bitmap)
                with memoryview(room) as pages:
                    self._progress.written += _native.write_pages(
                        self._file, self._offsets[index], pages, bitmap, True
                    )
                room.close()
        except OSError as error:
            raise self._failure(error) from error

    # Disks.

    def _copy_disks(self) -> None:
        for name, device in self._vm.block_devices().items():
            self._disks[name] = self._copy_disk(name, device)

    def _copy_disk(self, name: str, device: BlockDevice) -> DiskEntry:
        backend = device.backend
        if not isinstance(backend, ImageBlock):
            raise ConfigError(f"{name}: a disk of {type(backend).__name__} cannot be saved; only files can")
        folder = self._folder / "disks"
        folder.mkdir(exist_ok=True)
        layers = [FileIdentity.of(Path(layer.path)) for layer in backend.chain.layers]
        try:
            if backend.overlay >= 0:
                self._copy_file(backend.overlay, folder / f"{name}.overlay", backend.capacity)
                manifests.write_file(folder / f"{name}.sectors", bytes(backend.written))
                return DiskEntry("overlay", backend.capacity, tuple(layers))
            backend.image().flush()
            if self._how == "reference" or backend.read_only:
                layers = [FileIdentity.of(Path(layer.path)) for layer in backend.chain.layers]
                return DiskEntry("reference", backend.capacity, tuple(layers))
            if backend.chain.top.format == "raw":
                self._copy_file(backend.chain.top.fd, folder / f"{name}.raw", backend.capacity)
            else:
                self._copy_image(backend, folder / f"{name}.raw")
            return DiskEntry("copy", backend.capacity, ())
        except OSError as error:
            raise self._failure(error) from error

    @staticmethod
    def _copy_image(backend: ImageBlock, target: Path) -> None:
        """Write what the guest sees on the disk into a raw file with holes."""
        image, buffer = backend.image(), bytearray(PIECE)
        with open(target, "xb") as out:
            os.truncate(out.fileno(), backend.capacity)
            for at in range(0, backend.capacity, PIECE):
                part = memoryview(buffer)[: min(PIECE, backend.capacity - at)]
                if all(kind in ("zero", "hole") for _, kind, _, _ in image.map(at, len(part))):
                    continue
                image.read(at, part)
                os.pwrite(out.fileno(), part, at)

    @staticmethod
    def _copy_file(source: int, target: Path, size: int) -> None:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copy_sparse(source, descriptor, size)
        finally:
            os.close(descriptor)

    # The end.

    def finish(self, compress: str | None, vm: VirtualMachine) -> None:
        """Write the other files, make all of them durable, and write the manifest last. *worker thread*"""
        files: dict[str, str] = {}

        def small(name: str, data: bytes) -> None:
            manifests.write_file(self._folder / name, data)
            files[name] = hashlib.sha256(data).hexdigest()

        try:
            small("memory.sums", _native.checksums(self._file, self._size, CHUNK))
            if self._held:
                small("memory.pages", b"".join(self._held))
            stored = os.fstat(self._file).st_blocks * 512
            if compress is not None:
                stored = self._compress()
            else:
                os.fsync(self._file)
            folder = self._folder / "disks"
            if folder.is_dir():
                for path in folder.iterdir():
                    _sync(path)
                    if path.suffix == ".sectors":
                        files[f"disks/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
                _sync(folder)
        except OSError as error:
            raise self._failure(error) from error
        small("state.json", json.dumps(self._state).encode())
        from vmm import __version__

        self.manifest = Manifest(
            identity=str(uuid.uuid4()),
            created_ns=time.time_ns(),
            program=f"loopvisor {__version__}",
            name=vm.config.name,
            core=vm.core,
            config=json.dumps(self._config.to_dict()),
            memory=MemoryEntry(self._size, tuple(self._regions), compress is not None, stored),
            base=None if self._base is None else BaseEntry(str(self._base.path), self._base.manifest.identity),
            disks=self._disks,
            files=files,
        )
        manifests.write(self._folder, self.manifest)
        _, self.digest = manifests.read(self._folder)

    def _compress(self) -> int:
        """Replace `memory` by memory.zst, with a frame for each chunk that is not all zeroes, and memory.index. Returns
        the bytes of memory.zst."""
        import zstandard

        compressor = zstandard.ZstdCompressor(level=3)
        index = bytearray()
        at = 0
        with open(self._folder / "memory.zst", "xb") as out:
            for start in range(0, self._size, CHUNK):
                data = os.pread(self._file, min(CHUNK, self._size - start), start)
                frame = compressor.compress(data) if data.count(0) != len(data) else b""
                out.write(frame)
                index += at.to_bytes(8, "little") + len(frame).to_bytes(8, "little")
                at += len(frame)
            out.flush()
            os.fsync(out.fileno())
        manifests.write_file(self._folder / "memory.index", bytes(index))
        (self._folder / "memory").unlink()
        return at

    def _failure(self, error: OSError) -> HostError:
        return HostError(f"{self._folder.parent}: cannot write the snapshot: {os_reason(error)}")


class _Workspace:
    """The directory beside the target in which a snapshot is made. Its process holds a lock on it; a directory without
    a lock is what a killed process left."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def publish(self, target: Path) -> None:
        """Put the directory in the target's place, in one step. Raises HostError."""
        _sync(self.path)
        try:
            if target.exists() and any(target.iterdir()):
                _exchange(self.path, target)
            else:
                os.rename(self.path, target)
            _sync(target.parent)
        except OSError as error:
            raise HostError(f"{target}: {os_reason(error)}") from error

    def discard(self) -> None:
        """Remove what is left: everything after a failure, the old snapshot after an exchange."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _check_target(target: Path) -> None:
    if target.exists():
        if not target.is_dir():
            raise ConfigError(f"{target}: is no directory; name one that is a snapshot, or does not exist")
        if not (target / manifests.MANIFEST).exists() and any(target.iterdir()):
            raise ConfigError(f"{target}: holds files that are no snapshot; name another directory")
    elif not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no directory {target.parent}")


def _workspace(target: Path) -> _Workspace:
    """Make the workspace for `target`, and remove what killed attempts left beside it. Raises HostError."""
    prefix = f".{target.name}.partial-"
    try:
        for left in target.parent.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                lock = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(lock)
        path = target.parent / f"{prefix}{uuid.uuid4().hex[:12]}"
        path.mkdir(mode=0o700)
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _Workspace(path, lock)
    except OSError as error:
        raise HostError(f"{target.parent}: {os_reason(error)}") from error


def _exchange(one: Path, two: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _merge(first: Sequence[bytes], second: Sequence[bytes]) -> list[bytes]:
    merged = []
    for one, two in zip(first, second, strict=True):
        both = bytearray(one)
        _native.merge(both, two)
        merged.append(bytes(both))
    return merged


def options_from(request: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The target and the options of take(), from a client's request. Raises ConfigError."""
    paths: dict[str, Path | None] = {}
    for name in ("directory", "base"):
        value = request.get(name)
        if value is not None and (not isinstance(value, str) or not value.startswith("/") or "\0" in value):
            raise ConfigError(f"{name}: {value!r:.80} is no absolute path")
        paths[name] = None if value is None else Path(value)
    if paths["directory"] is None:
        raise ConfigError("directory: say where the snapshot goes")
    compress, disks, stop = request.get("compress"), request.get("disks", "copy"), request.get("stop", False)
    if compress not in (None, "zstd"):
        raise ConfigError(f"compress: {compress!r:.80} is not known; zstd is")
    if disks not in ("copy", "reference"):
        raise ConfigError(f"disks: {disks!r:.80} is not known; copy and reference are")
    if not isinstance(stop, bool):
        raise ConfigError("stop: true or false")
    return paths["directory"], {"base": paths["base"], "compress": compress, "disks": disks, "stop": stop}
