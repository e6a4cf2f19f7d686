"""Debian packages through apt, without root and without installing them: look up, download, check, read.

apt verifies its index by signature; the index names each file's SHA-256, and that is checked here too, before a file
enters the cache and again when it is read from there. A download that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from images import cache
from images.acquire import Transports, discard
from images.errors import ImageError
from images.programs import run

TRIES = 3
"""Downloads of one package that end early, or with something else, before it is given up."""


@dataclass(frozen=True, slots=True)
class Package:
    """A file of the archive: what apt would download for a name today. `file_name` is the one that apt gives it."""

    uri: str
    file_name: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.file_name.partition("_")[0]


@dataclass(frozen=True, slots=True)
class AptSource:
    """A part of an archive that the host's apt knows, as in sources.list(5)."""

    uri: str
    suite: str
    component: str

    def __str__(self) -> str:
        return f"deb {self.uri} {self.suite} {self.component}"


def _apt(*command: str) -> str:
    status, out, errors = run(list(command))
    if status == 127:
        raise ImageError(f"{command[0]} is not on this machine; images are built from Debian packages")
    if status:
        why = next((line for line in errors if line.startswith("E:")), (errors or [f"exit status {status}"])[0])
        raise ImageError(f"{' '.join(command[:2])} failed for {command[-1]}: {why}; try `apt-get update` as root")
    return out


def _listed(printed: str) -> list[Package]:
    """The lines of apt-get's --print-uris."""
    found = re.findall(r"^'(\S+)' (\S+) (\d+) SHA256:([0-9a-f]{64})", printed, re.M)
    return [Package(uri, file_name, int(size), sha256) for uri, file_name, size, sha256 in found]


def resolve(name: str) -> Package:
    """What apt would download for `name`; ImageError if it knows no such package."""
    found = _listed(_apt("apt-get", "download", "--print-uris", name))
    if not found:
        raise ImageError(f"apt knows no hash for package {name}; try `apt-get update` as root")
    return found[0]


def resolve_all(names: Sequence[str]) -> list[Package]:
    """`resolve` for several, in their order."""
    found = {package.name: package for package in _listed(_apt("apt-get", "download", "--print-uris", *names))}
    return [found.get(name) or resolve(name) for name in names]


def sources(suite: str) -> list[AptSource]:
    """The host's own sources for a release of Debian and its updates; empty if it has none."""
    form = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    known = {suite, f"{suite}-updates", f"{suite}-security"}
    found = []
    for line in _apt("apt-get", "indextargets", "--format", form, "Created-By: Packages").splitlines():
        source = AptSource(*line.split("|", 2))
        if source.suite in known and source.component == "main" and source not in found:
            found.append(source)
    return found


def index_files(suite: str) -> list[Path]:
    """The files in which apt keeps what it knows of those sources, with their signatures."""
    found: set[Path] = set()
    listed = _apt("apt-get", "indextargets", "--format", "$(FILENAME)|$(RELEASE)", "Created-By: Packages")
    for line in listed.splitlines():
        name, _, release = line.partition("|")
        if release in (suite, f"{suite}-updates", f"{suite}-security") and "_main_" in name:
            path = Path(name)
            found |= {path, *path.parent.glob(f"{path.name.partition('_main_')[0]}_*Release*")}
    return sorted(path for path in found if path.exists())


def installation(names: Sequence[str], suite: str) -> list[Package]:
    """What a new system of a release takes: its required packages, `names`, and what they depend on."""
    with cache.workspace() as work:
        (work / "sources").write_text("".join(f"{source}\n" for source in sources(suite)))
        (work / "status").write_text("")
        options = {"Dir::Etc::SourceList": work / "sources", "Dir::Etc::SourceParts": "/dev/null"}
        options |= {"Dir::State::status": work / "status", "Dir::State::extended_states": work / "extended"}
        options |= {"Dir::Cache::archives": f"{work}/", "Debug::NoLocking": "true"}
        options |= {"Acquire::ForceHash": "SHA256"}
        settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        (work / "partial").mkdir()
        wanted = ["?essential", "?priority(required)", "apt", *names]
        command = ["apt-get", *settings, "--print-uris", "--yes", "--no-install-recommends", "-qq", "install"]
        return sorted(_listed(_apt(*command, *wanted)), key=lambda package: package.file_name)


def dependency(name: str, pattern: str) -> str:
    """The first direct dependency of `name` that matches the regular expression."""
    for line in _apt("apt-cache", "depends", "--important", name).splitlines():
        match = re.match(r"\s*Depends: (\S+)", line)
        if match and re.fullmatch(pattern, match[1]):
            return match[1]
    raise ImageError(f"package {name} depends on nothing like {pattern}")


def download(package: Package) -> Path:
    """The package's file in the cache, downloaded if it is not there yet; its hash is checked either way."""
    with Transports() as transports:
        return _download(package, transports, lambda _: None)


def download_all(wanted: Sequence[Package], tell: Callable[[str, int, int], None]) -> list[Path]:
    """`download` for several. `tell(what, done, total)` gets bytes of all of them."""
    total, before, found = sum(package.size for package in wanted), 0, []
    with Transports() as transports:
        for number, package in enumerate(wanted, 1):
            came = partial(_tell_bytes, tell, f"downloading {package.name} ({number} of {len(wanted)})", before, total)
            came(0)
            found.append(_download(package, transports, came))
            before += package.size
    return found


def _tell_bytes(tell: Callable[[str, int, int], None], what: str, before: int, total: int, came: int) -> None:
    tell(what, before + came, total)


def _download(package: Package, transports: Transports, tell: Callable[[int], None]) -> Path:
    target = cache.directory("packages") / f"{package.sha256}.deb"
    part = cache.directory("packages", "partial") / f"{package.sha256}.part"
    with cache.lock(f"package-{package.sha256[:16]}"):
        if target.exists():
            if cache.file_hash(target) == package.sha256:
                return target
            target.unlink()
        for left in reversed(range(TRIES)):
            try:
                transports.fetch(package.uri, part, package.sha256, package.size, tell)
            except ImageError:
                if not left:
                    raise
                continue
            if cache.file_hash(part) == package.sha256:
                cache.publish(part, target)
                discard(part)
                return target
            discard(part)
    raise ImageError(f"the download of {package.name} does not have the hash that apt's index names")


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
