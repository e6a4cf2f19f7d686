"""Images in files: OCI layouts (directories, or tar files of one) and what `docker save` writes.

Source: OCI image specification 1.1, "Image Layout"; the Docker Image Specification v1.2 for manifest.json. *any thread*
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, Protocol

from images.errors import ImageError
from images.oci import layers, model, tar
from images.oci.model import Descriptor, ImageManifest
from images.oci.source import Tell, checked, read_manifest

MAX_FILES = 100_000
"""Members of an archive that is looked through."""


class Folder(Protocol):
    """Files by their relative names."""

    def open(self, name: str) -> BinaryIO:
        """Raises FileNotFoundError or ImageError."""

    def close(self) -> None:
        """Give back what is open."""


class Directory:
    """A directory of the host."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> BinaryIO:
        """The file of that name; names are ours, or made of digests."""
        return (self._path / name).open("rb")

    def close(self) -> None:
        """Nothing is open."""


class Archive:
    """A tar file; a compressed one is unpacked into a file without a name first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("rb")
        self._at: dict[str, tuple[int, int] | str] = {}
        try:
            self._unpack()
            for member, _ in tar.members(self._file.read):
                name = posixpath.normpath("/" + member.name.decode("utf-8", "surrogateescape"))[1:]
                if member.kind in "12":
                    base = posixpath.dirname(name) if member.kind == "2" else ""
                    target = member.target.decode("utf-8", "surrogateescape")
                    self._at[name] = posixpath.normpath(posixpath.join("/", base, target))[1:]
                elif member.kind == "0":
                    self._at[name] = self._file.tell(), member.size
                if len(self._at) > MAX_FILES:
                    raise ImageError(f"{path}: more than {MAX_FILES} files; this is no saved image")
        except BaseException:
            self._file.close()
            raise

    def _unpack(self) -> None:
        import tempfile

        start = self._file.read(2)
        self._file.seek(0)
        if start not in (layers.GZIP, layers.ZSTD[:2]):
            return
        plain = tempfile.TemporaryFile()  # noqa: SIM115 - it becomes the archive
        with self._file:
            for chunk in layers.decompressed(self._file):
                plain.write(chunk)
        plain.seek(0)
        self._file = plain

    def open(self, name: str) -> BinaryIO:
        """A member, through links."""
        for _ in range(8):
            found = self._at.get(name)
            if found is None:
                raise FileNotFoundError(name)
            if not isinstance(found, str):
                return io.BufferedReader(_Window(self._file.fileno(), *found))
            name = found
        raise ImageError(f"{self._path}: {name}: links to links")

    def close(self) -> None:
        """Close the archive; open members fail then."""
        self._file.close()


class _Window(io.RawIOBase):
    """A part of a file, with a position of its own."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size, self._at = os.dup(descriptor), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._at))
        count = os.preadv(self._descriptor, [buffer[:count]], self._start + self._at) if count else 0
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class _Local:
    """What both kinds have in common."""

    def __init__(self, name: str, folder: Folder) -> None:
        self.name = name
        self._folder = folder

    def open_layers(self, manifest: ImageManifest, tell: Tell) -> list[Future[BinaryIO]]:
        """They are there."""
        found: list[Future[BinaryIO]] = []
        for layer in manifest.layers:
            opened: Future[BinaryIO] = Future()
            opened.set_result(self._open(self._path(layer)))
            found.append(opened)
        return found

    def close(self) -> None:
        """Close the directory or archive."""
        self._folder.close()

    def _path(self, wanted: Descriptor) -> str:
        algorithm, _, value = wanted.digest.partition(":")
        return f"blobs/{algorithm}/{value}"

    def _open(self, name: str) -> BinaryIO:
        try:
            return self._folder.open(name)
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
            raise ImageError(f"{self.name}: {name} {what}", "config") from error

    def _read(self, name: str) -> bytes:
        with contextlib.closing(self._open(name)) as file:
            data = file.read(model.MAX_DOCUMENT + 1)
        if len(data) > model.MAX_DOCUMENT:
            raise ImageError(f"{self.name}: {name} is longer than {model.MAX_DOCUMENT} bytes")
        return data

    def _document(self, wanted: Descriptor) -> bytes:
        return checked(self._read(self._path(wanted)), wanted, self.name)


class OciLayout(_Local):
    """An OCI layout; `tag` chooses where its index names several images."""

    def __init__(self, name: str, folder: Folder, tag: str = "") -> None:
        super().__init__(name, folder)
        self._tag = tag

    def find(self) -> ImageManifest:
        """The image that the tag means, or the only one."""
        index = self._read("index.json")
        return read_manifest(self._document, index, self.name, "", self._pick)

    def _pick(self, found: list[Descriptor]) -> Descriptor:
        named = [item for item in found if item.name]
        for item in found:
            if self._tag and (self._tag in (item.name, item.digest) or item.name.endswith(f":{self._tag}")):
                return item
        if not self._tag:
            if len(found) == 1:
                return found[0]
            if not named:
                return model.choose(found, self.name)
        tags = ", ".join(sorted({item.name for item in named})[:20]) or "none"
        what = f"no image {self._tag}" if self._tag else "several images; add :TAG"
        raise ImageError(f"{self.name}: {what}; there are: {tags}", "config")


class DockerArchive(_Local):
    """What `docker save` writes; `tag` chooses among several images."""

    def __init__(self, name: str, folder: Folder, tag: str = "") -> None:
        super().__init__(name, folder)
        self._tag = tag
        self._files: dict[str, str] = {}

    def find(self) -> ImageManifest:
        """The image that the tag means, or the only one."""
        import json

        try:
            saved = json.loads(self._read("manifest.json"))
            entries = [
                (str(item["Config"]), [*map(str, item.get("RepoTags") or [])], [*map(str, item["Layers"])])
                for item in saved
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ImageError(f"{self.name}: manifest.json is not as docker save writes it") from error
        config, _, paths = self._pick(entries)
        if len(paths) > model.MAX_LAYERS:
            raise ImageError(f"{self.name}: {len(paths)} layers; at most {model.MAX_LAYERS} are taken")
        data = self._read(posixpath.normpath("/" + config)[1:])
        layers = []
        for number, path in enumerate(paths):
            # No digest of the file itself is written; what is in it is checked by the configuration's.
            key = f"sha256:{number:064x}"
            self._files[key] = posixpath.normpath("/" + path)[1:]
            layers.append(Descriptor(key, 0))
        found = ImageManifest(Descriptor(model.digest_of(data), len(data)), tuple(layers))
        return model.with_config(found, data, self.name)

    def _pick(self, entries: list[tuple[str, list[str], list[str]]]) -> tuple[str, list[str], list[str]]:
        for entry in entries:
            if self._tag and any(tag == self._tag or tag.endswith(f"/{self._tag}") for tag in entry[1]):
                return entry
        if not self._tag and len(entries) == 1:
            return entries[0]
        tags = ", ".join(sorted({tag for entry in entries for tag in entry[1]})[:20]) or "none"
        what = f"no image {self._tag}" if self._tag else "several images; add :TAG"
        raise ImageError(f"{self.name}: {what}; there are: {tags}", "config")

    def _path(self, wanted: Descriptor) -> str:
        return self._files[wanted.digest]


def open_folder(path: Path) -> Folder:
    """A directory or an archive. Raises ImageError."""
    try:
        return Directory(path) if path.is_dir() else Archive(path)
    except OSError as error:
        raise ImageError(f"{path}: {(error.strerror or str(error)).lower()}", "config") from error
    except ImageError as error:
        raise ImageError(str(error) if str(path) in str(error) else f"{path}: {error}", "config") from error
