"""Warm starts: a machine that was booted once is kept as a snapshot, and later ones of its kind go on from that.

The snapshot is taken when the guest's agent first listens. It is found by a hash of what went into it: the
configuration without the fields that concern one run alone, the kernel, initrd and disks, and the version and files of
this program. *any thread*
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm.cachedir import cache_directory
from vmm.config import Config
from vmm.errors import ConfigError, StateError
from vmm.state.manifest import MANIFEST

if TYPE_CHECKING:
    from vmm.state.snapshot import Snapshot

KEEP = 8
"""This many warm machines are kept. The one that was used longest ago is removed first."""
OF_ONE_RUN = ("name", "console", "timeout", "uuid", "entrypoint", "command", "env", "user", "workdir")
"""Fields of the configuration that concern one run alone. A kept machine takes them from each run."""


def check(config: Config) -> None:
    """Raises ConfigError for a machine that cannot be kept."""
    if not config.agent:
        raise ConfigError("warm: only a guest with the agent says when it is up; use an image that has it, as linux")
    if any(not (disk.snapshot or disk.readonly) for disk in config.disks):
        raise ConfigError("warm: a disk that is written to cannot be kept; attach it with snapshot, or read-only")


def folder(config: Config) -> Path:
    """Where the snapshot of a machine with this configuration is, or will be."""
    return cache_directory("warm") / _key(config)


def changes(config: Config) -> dict[str, Any]:
    """The fields that a restored machine takes from this configuration, by name."""
    values = config.to_dict()
    return {name: values.get(name) for name in OF_ONE_RUN}


def _key(config: Config) -> str:
    values = {name: value for name, value in config.to_dict().items() if name not in OF_ONE_RUN}
    return hashlib.sha256(json.dumps([values, _files(config), _program()], sort_keys=True).encode()).hexdigest()[:32]


def _files(config: Config) -> list[Any]:
    facts: list[Any] = []
    for path in (config.kernel, config.initrd, *(disk.path for disk in config.disks)):
        if path is not None:
            with suppress(OSError):
                status = path.stat()
                facts.append([str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino])
    return facts


def _program() -> list[Any]:
    """What tells this version of the program from others, which may have other devices or another core."""
    import cpu._core
    import virtio._ring
    from vmm import __version__, _native

    facts: list[Any] = [__version__]
    for module in (cpu._core, virtio._ring, _native):
        with suppress(FileNotFoundError):  # it is just being installed anew
            status = os.stat(str(module.__file__))
            facts.append([status.st_size, status.st_mtime_ns])
    top = Path(__file__).parents[2]
    facts.append(max(_newest(str(top / package)) for package in ("cpu", "virtio", "vmm")))
    return facts


def _newest(folder: str) -> int:
    """When a Python module in the folder, or below it, was changed last, ns since 1970. What goes while this looks, for
    an installation may be under way, is no part of it."""
    found = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                with suppress(FileNotFoundError):
                    found = max(found, entry.stat().st_mtime_ns)
            elif entry.is_dir() and entry.name != "__pycache__":
                found = max(found, _newest(entry.path))
    return found


def find(config: Config) -> tuple[Snapshot | None, str]:
    """The kept snapshot of a machine with this configuration; None if there is none. If one had to be removed because
    it could not be used, the second value says so. Blocks."""
    path = folder(config)
    if not is_there(path):
        return None, ""
    from vmm.state.snapshot import Snapshot

    snapshot: Snapshot | None = None
    try:
        snapshot = Snapshot.open(path)
        snapshot.check_files(trusted=False)
        snapshot.ensure_verified()
    except StateError as error:
        if snapshot is not None:
            snapshot.close()
        return None, forget(path, error)
    return snapshot, ""


def is_there(path: Path) -> bool:
    """Whether a snapshot stands there. If so, it is marked as used now."""
    if not (path / MANIFEST).exists():
        return False
    with suppress(OSError):
        os.utime(path)
    return True


@contextmanager
def making(path: Path) -> Iterator[bool]:
    """Yields whether the caller is to make the snapshot: it is not there, and no other process is making it. Snapshots
    beyond KEEP are removed afterwards. Raises OSError if nothing can be kept here."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(path.parent / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield not (path / MANIFEST).exists()
        _prune(path.parent)
    finally:
        os.close(lock)


def _prune(cache: Path) -> None:
    found = [entry for entry in cache.iterdir() if (entry / MANIFEST).exists()]
    import shutil

    for old in sorted(found, key=_used)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def _used(path: Path) -> int:
    """When the snapshot was used last, ns since 1970; 0: another process has just removed it."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def forget(path: Path, error: StateError) -> str:
    """Remove a snapshot that cannot be used. Returns a sentence that says so."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)
    return f"the machine kept for warm starts is no use and was removed ({error})"
