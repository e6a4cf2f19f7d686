"""What `oci:` and `docker-archive:` are followed by: a reference to a registry, or a path with a tag.

Source: the Distribution specification 1.1, "Pulling manifests" (names, tags, digests), and Docker's habits for what is
left out: docker.io/library/NAME:latest. *any thread*
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from images.errors import ImageError
from images.oci.model import is_digest

SCHEMES = ("oci:", "docker-archive:")
DEFAULT_REGISTRY, DEFAULT_TAG = "docker.io", "latest"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry; `tag` or `digest` says which."""

    registry: str
    repository: str
    tag: str
    digest: str = ""

    @property
    def version(self) -> str:
        """What a registry is asked for."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}{'@' + self.digest if self.digest else ':' + self.tag}"


def parse(text: str) -> Reference:
    """python, python:3.12, user/name, host:5000/name@sha256:… Raises ImageError."""
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise ImageError(f"oci:{text}: {digest!r} is no digest; write @sha256: and 64 hexadecimal digits", "config")
    head, slash, tail = rest.partition("/")
    registry = DEFAULT_REGISTRY
    if slash and ("." in head or ":" in head or head == "localhost" or head.startswith("[")):
        registry, rest = head, tail
    name, colon, tag = rest.rpartition(":")
    if colon and not tag:
        raise ImageError(f"oci:{text}: which tag? write it behind the colon", "config")
    if not colon:
        name, tag = rest, "" if digest else DEFAULT_TAG
    if registry in ("index.docker.io", "registry-1.docker.io"):
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in name:
        name = f"library/{name}"
    if len(name) > 255 or not _REPOSITORY.fullmatch(name) or not _HOST.fullmatch(registry):
        raise ImageError(f"oci:{text}: no reference to an image; write NAME:TAG, HOST/NAME:TAG or a path", "config")
    if tag and not _TAG.fullmatch(tag):
        raise ImageError(f"oci:{text}: {tag!r} is no tag", "config")
    return Reference(registry, name, tag, digest)


def as_path(text: str) -> tuple[Path, str] | None:
    """(path, tag) if the text means files: it begins as a path, or a layout or tar file of that name is there."""
    path, tag = Path(text), ""
    if not path.exists():
        before, colon, after = text.rpartition(":")
        if colon and "/" not in after and (Path(before).exists() or _is_path(text)):
            path, tag = Path(before), after
    is_archive = path.name.endswith((".tar", ".tgz", ".tar.gz")) and path.is_file()
    if _is_path(text) or is_archive or (path / "index.json").is_file():
        return path.expanduser(), tag
    return None


def _is_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~/"))
