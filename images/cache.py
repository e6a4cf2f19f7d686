"""The content-addressed cache: packages and built images under the user's cache directory.

An entry is made in a directory of its own under tmp/, whose lock file its maker holds, and is renamed into place
when it is whole; so a killed maker leaves only a tmp directory that the next command removes, and two makers of one
entry wait for each other. Nothing here knows what an entry holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from images.built import cache_directory
from images.errors import ImageError
from images.programs import run

OUTSIDE = ".outside"
"""In a workspace: the path of the directory that belongs to it elsewhere."""


_WAY_OUT = {
    errno.ENOSPC: "vmm images prune makes room, and LOOPVISOR_CACHE names another place",
    errno.EDQUOT: "vmm images prune makes room, and LOOPVISOR_CACHE names another place",
    errno.EROFS: "LOOPVISOR_CACHE names another place",
    errno.EACCES: "LOOPVISOR_CACHE names another place",
}


@contextlib.contextmanager
def host_errors() -> Iterator[None]:
    """What the host refuses to who builds or removes images becomes an ImageError."""
    try:
        yield
    except OSError as error:
        where = error.filename or cache_directory()
        text = f"{where}: {(error.strerror or str(error)).lower()}"
        if error.errno in _WAY_OUT:
            text += f"; {_WAY_OUT[error.errno]}"
        raise ImageError(text) from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory(*parts: str) -> Path:
    """A directory of the cache, made if it is not there."""
    path = cache_directory().joinpath(*parts)
    with host_errors():
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def lock(name: str, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the cache's lock of that name, alone or with others that share it. Waits for another process that holds it
    otherwise, or raises BlockingIOError."""
    with (directory("locks") / name).open("w") as file:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary directory on the cache's file system; removed at the end, or by sweep() if this process is killed."""
    path = Path(tempfile.mkdtemp(dir=directory("tmp")))
    descriptor = os.open(path / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        _remove(path)
        os.close(descriptor)


def outside(work: Path) -> Path:
    """A directory in the system's temporary one that goes with a workspace, for programs that run as other users and
    could not enter the cache."""
    path = Path(tempfile.gettempdir()) / f"loopvisor-build-{work.name}"
    (work / OUTSIDE).write_text(str(path))
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    return path


def _remove(work: Path) -> None:
    """A workspace and what belongs to it."""
    with contextlib.suppress(OSError):
        path = Path((work / OUTSIDE).read_text())
        if path.is_dir() and path.lstat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                # What is left belongs to the users of a namespace that mmdebstrap made.
                run(["mmdebstrap", "--unshare-helper", "rm", "-rf", *map(str, path.iterdir())])
                shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


@host_errors()
def sweep() -> None:
    """Remove the workspaces of processes that are gone. Raises ImageError."""
    for path in directory("tmp").iterdir():
        try:
            with (path / ".lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
        except BlockingIOError:
            continue
        except OSError:
            # Between mkdtemp and the lock, or removed by somebody else; an old one without a lock goes.
            with contextlib.suppress(OSError):
                path.rmdir()


def publish(made: Path, target: Path) -> None:
    """Move a finished file or directory to its place, whole or not at all; durable before it is visible."""
    for path in [made, *made.rglob("*")] if made.is_dir() else [made]:
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    if made.is_dir() and target.exists():
        shutil.rmtree(target)
    os.replace(made, target)
