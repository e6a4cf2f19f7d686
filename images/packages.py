"""Debian packages through apt, without root and without installing them: look up, download, check, read.

apt verifies its index by signature; the index names each file's SHA-256, and that is checked here too, before a file
enters the cache and again when it is read from there.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from images import cache
from images.errors import ImageError


@dataclass(frozen=True, slots=True)
class Package:
    """A file of the archive: what apt would download for a name today."""

    name: str
    file_name: str
    size: int
    sha256: str


def _run(*command: str, directory: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ImageError(f"{command[0]} is not on this machine; images are built from Debian packages") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        why = lines[0] if lines else f"exit status {done.returncode}"
        raise ImageError(f"{' '.join(command[:2])} failed for {command[-1]}: {why}; try `apt-get update` as root")
    return done.stdout


def resolve(name: str) -> Package:
    """What apt would download for `name`; ImageError if it knows no such package."""
    printed = _run("apt-get", "download", "--print-uris", name)
    match = re.search(r"'(\S+)' (\S+) (\d+) SHA256:([0-9a-f]{64})", printed)
    if not match:
        raise ImageError(f"apt knows no hash for package {name}; try `apt-get update` as root")
    return Package(name, match[2], int(match[3]), match[4])


def dependency(name: str, pattern: str) -> str:
    """The first direct dependency of `name` that matches the regular expression."""
    for line in _run("apt-cache", "depends", "--important", name).splitlines():
        match = re.match(r"\s*Depends: (\S+)", line)
        if match and re.fullmatch(pattern, match[1]):
            return match[1]
    raise ImageError(f"package {name} depends on nothing like {pattern}")


def download(package: Package) -> Path:
    """The package's file in the cache, downloaded if it is not there yet; its hash is checked either way."""
    target = cache.directory("packages") / f"{package.sha256}.deb"
    with cache.lock(f"package-{package.sha256[:16]}"):
        if target.exists():
            if cache.file_hash(target) == package.sha256:
                return target
            target.unlink()
        with cache.workspace() as work:
            if os.geteuid() == 0:
                # apt drops root for the download; its user must be able to write here.
                work.chmod(0o755)
                option = ["-o", "APT::Sandbox::User=root"]
            else:
                option = []
            _run("apt-get", "download", "-q", *option, package.name, directory=work)
            files = list(work.glob("*.deb"))
            if len(files) != 1 or cache.file_hash(files[0]) != package.sha256:
                raise ImageError(f"the download of {package.name} does not have the hash that apt's index names")
            cache.publish(files[0], target)
    return target


def contents(deb: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every member of a package's file tree, with the bytes of regular files (deb(5): an ar archive with data.tar)."""
    with deb.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ImageError(f"{deb} is not a Debian package")
        while head := file.read(60):
            name, size = head[:16].decode("ascii").strip().rstrip("/"), int(head[48:58])
            if name.startswith("data.tar"):
                break
            file.seek(size + (size & 1), os.SEEK_CUR)
        else:
            raise ImageError(f"{deb} has no data.tar")
        data = file.read(size)
    if name.endswith(".xz"):
        data = lzma.decompress(data)
    elif name.endswith(".zst"):
        import zstandard

        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    elif name.endswith(".gz"):
        import gzip

        data = gzip.decompress(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            body = archive.extractfile(member) if member.isreg() else None
            yield member, body.read() if body else b""


def archive_state() -> str:
    """A hash of what apt knows of its archives now: it changes when any package there may have changed."""
    names = sorted(Path("/var/lib/apt/lists").glob("*InRelease"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in names)).hexdigest()


def tool(name: str, package: str) -> str:
    """The path of a host program, also from the sbin directories; ImageError names the package that brings it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if not found:
        raise ImageError(f"{name} is missing; as root: apt-get install {package}")
    return found
