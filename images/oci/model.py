"""What manifests and configurations say, checked: descriptors, platforms, and how a program wants to be run.

Source: OCI image specification 1.1 (image index, manifest, configuration) and Docker's Image Manifest V 2, Schema 2,
whose documents have the same shape. *any thread*
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
from dataclasses import dataclass, field
from typing import Any

from images.errors import ImageError

MAX_DOCUMENT = 8 << 20
"""Bytes of a manifest, an index or a configuration; registries take 4 MiB."""
MAX_LAYERS = 1000
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
ARCHITECTURE, SYSTEM = "amd64", "linux"
VARIANTS = ("", "v1", "v2")
"""Variants of amd64 whose instructions a guest has by default (x86-64-v2)."""
REF_NAME = "org.opencontainers.image.ref.name"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def is_digest(text: object) -> bool:
    """Of an algorithm that we can check."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def hasher(digest: str) -> Any:
    """A fresh hash object of a digest's algorithm."""
    return hashlib.new(digest.partition(":")[0])


def digest_of(data: bytes, like: str = "sha256:") -> str:
    """The digest of a document, by the algorithm of another digest."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob by its content."""

    digest: str
    size: int
    media_type: str = ""
    platform: tuple[str, str, str] = ("", "", "")
    """(os, architecture, variant)"""
    name: str = ""
    """The tag that a layout's index gives it."""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How an image wants its program to be run."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""
    stop_signal: int = int(signal.SIGTERM)
    ports: tuple[str, ...] = ()
    """Exposed ones, as "80/tcp"."""


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """One image of one platform."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    digest: str = ""
    diff_ids: tuple[str, ...] = ()
    """Of the layers, from the configuration; empty as long as that was not read."""
    settings: ImageSettings = field(default_factory=ImageSettings)


def document(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises ImageError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{where}: no JSON: {str(error)[:100]}") from error
    if not isinstance(value, dict):
        raise ImageError(f"{where}: no JSON object")
    return value


def descriptor(value: object, where: str) -> Descriptor:
    """Raises ImageError for one that cannot be used."""
    if not isinstance(value, dict):
        raise ImageError(f"{where}: a descriptor is no object")
    digest, size = value.get("digest"), value.get("size")
    if not is_digest(digest):
        raise ImageError(f"{where}: {str(digest)[:100]!r} is no digest; sha256 and sha512 are known")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
        raise ImageError(f"{where}: {str(size)[:40]} is no size")
    platform = value.get("platform")
    platform = platform if isinstance(platform, dict) else {}
    annotations = value.get("annotations")
    name = annotations.get(REF_NAME) if isinstance(annotations, dict) else ""
    what = tuple(str(platform.get(key, "")) for key in ("os", "architecture", "variant"))
    return Descriptor(str(digest), size, str(value.get("mediaType", "")), (what[0], what[1], what[2]), str(name or ""))


def index(value: dict[str, Any], where: str) -> list[Descriptor]:
    """The manifests of an index."""
    found = value.get("manifests")
    if not isinstance(found, list) or len(found) > MAX_LAYERS:
        raise ImageError(f"{where}: an index without a list of manifests, or with too long a one")
    return [descriptor(item, where) for item in found]


def is_index(value: dict[str, Any]) -> bool:
    """By its media type, or where none is written by what it has."""
    return value.get("mediaType") in INDEXES or (value.get("mediaType") not in MANIFESTS and "manifests" in value)


def choose(found: list[Descriptor], where: str) -> Descriptor:
    """The manifest for our platform. Raises ImageError that names those that are there."""
    for variant in VARIANTS:
        for item in found:
            if item.platform == (SYSTEM, ARCHITECTURE, variant):
                return item
    unnamed = [item for item in found if item.platform[:2] == ("", "")]
    if len(unnamed) == 1:
        return unnamed[0]
    there = sorted({"/".join(filter(None, item.platform)) for item in found} - {"", "unknown/unknown"})
    listed = ", ".join(there) or "none"
    raise ImageError(f"{where}: no image for {SYSTEM}/{ARCHITECTURE}; there are: {listed}", "config")


def manifest(value: dict[str, Any], where: str, digest: str = "") -> ImageManifest:
    """An image's manifest, its configuration not read yet. Raises ImageError."""
    if value.get("schemaVersion") == 1:
        raise ImageError(f"{where}: a manifest of schema 1, which is not read; push the image again", "config")
    layers = value.get("layers")
    if not isinstance(layers, list) or "config" not in value:
        raise ImageError(f"{where}: no manifest of an image")
    if len(layers) > MAX_LAYERS:
        raise ImageError(f"{where}: {len(layers)} layers; at most {MAX_LAYERS} are taken")
    found = tuple([descriptor(item, where) for item in layers])
    return ImageManifest(descriptor(value["config"], where), found, digest)


def with_config(found: ImageManifest, data: bytes, where: str) -> ImageManifest:
    """The manifest with what its configuration says. Raises ImageError."""
    value = document(data, f"{where}: configuration")
    rootfs = value.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or not all(is_digest(item) for item in diff_ids):
        raise ImageError(f"{where}: the configuration has no list of layers; it is no container image")
    if len(diff_ids) != len(found.layers):
        raise ImageError(f"{where}: {len(found.layers)} layers, but the configuration has {len(diff_ids)}")
    system, architecture = value.get("os", SYSTEM), value.get("architecture", ARCHITECTURE)
    if (system, architecture) != (SYSTEM, ARCHITECTURE):
        raise ImageError(f"{where}: an image for {system}/{architecture}; this is {SYSTEM}/{ARCHITECTURE}", "config")
    wishes = value.get("config")
    return ImageManifest(found.config, found.layers, found.digest, tuple(diff_ids), settings(wishes or {}, where))


def settings(value: object, where: str) -> ImageSettings:
    """The `config` of an image's configuration. Raises ImageError."""
    if not isinstance(value, dict):
        raise ImageError(f"{where}: the configuration's config is no object")
    ports = value.get("ExposedPorts") or {}
    return ImageSettings(
        _texts(value, "Entrypoint", where), _texts(value, "Cmd", where), _texts(value, "Env", where),
        _text(value, "User", where), _text(value, "WorkingDir", where), _signal(_text(value, "StopSignal", where)),
        tuple(sorted(map(str, ports))) if isinstance(ports, dict) else (),
    )  # fmt: skip


def _texts(value: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = value.get(key) or []
    if isinstance(found, str):
        found = ["/bin/sh", "-c", found]
    if not isinstance(found, list) or not all(isinstance(item, str) and "\0" not in item for item in found):
        raise ImageError(f"{where}: {key} of the configuration is no list of texts")
    return tuple(found)


def _text(value: dict[str, Any], key: str, where: str) -> str:
    found = value.get(key) or ""
    if not isinstance(found, str) or "\0" in found:
        raise ImageError(f"{where}: {key} of the configuration is no text")
    return found


def _signal(text: str) -> int:
    """SIGTERM, TERM or 15; what is none of these is SIGTERM."""
    if text.isdecimal() and 0 < int(text) < 65:
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
    return int(getattr(signal, name, signal.SIGTERM)) if re.fullmatch(r"SIG[A-Z0-9]+", name) else int(signal.SIGTERM)
