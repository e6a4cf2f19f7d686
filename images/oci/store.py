"""OciImage images in the cache: oci/built/KEY/root.erofs with image.json, and oci/names/, what names meant last.

KEY is made of the configuration's digest, which has the digests of all layers' contents: the same image from a registry
and from an archive is built once. What was built is read-only and shared by all machines. *any thread*
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from images import cache
from images.errors import ImageError
from images.oci.erofs import Writer
from images.oci.layers import LayerStream, decompressed
from images.oci.model import ImageManifest, ImageSettings
from images.oci.rootfs import Rootfs
from images.oci.source import Source, Tell
from images.oci.unpack import apply

FORMAT = 1
"""Counts up when what is built of the same image changes."""
LIMIT_GIB = 64
MOUNTPOINTS = (b"dev", b"proc", b"sys", b"run", b"tmp", b"etc", b"root")
"""Directories that every image gets, for what is mounted or written there."""
USING = "oci"
"""The lock that builds and starts share, so that nothing is pruned under them."""


@dataclass(frozen=True, slots=True)
class OciImage:
    """A finished image. `name` is what the user called it when it was built."""

    name: str
    key: str
    disk: Path
    settings: ImageSettings
    size: int
    """Bytes on the host's disk."""


def key_of(manifest: ImageManifest) -> str:
    """Names a build by its content."""
    return hashlib.sha256(f"{FORMAT} {manifest.config.digest}".encode()).hexdigest()[:32]


def find(key: str) -> OciImage | None:
    """What was built under that key."""
    place = _built() / key
    try:
        value = json.loads((place / "image.json").read_text())
        settings: dict[str, Any] = {
            name: tuple(item) if isinstance(item, list) else item for name, item in value["settings"].items()
        }
        disk = place / "root.erofs"
        return OciImage(value["name"], key, disk, ImageSettings(**settings), disk.stat().st_blocks * 512)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remembered(name: str) -> OciImage | None:
    """What a name meant last, if that is still there."""
    try:
        value = json.loads(_name_file(name).read_text())
        return find(value["key"]) if value["name"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(name: str, built: OciImage) -> None:
    """From now on the name means this."""
    with cache.workspace() as work:
        (work / "name").write_text(json.dumps({"name": name, "key": built.key, "time": time.time()}))
        cache.publish(work / "name", _name_file(name))


@cache.host_errors()
def build(source: Source, tell: Tell) -> OciImage:
    """The image of a source, made unless it is there. Raises ImageError."""
    tell(f"looking up {source.name}", 0, 4)
    manifest = source.find()
    key = key_of(manifest)
    with cache.lock(USING, shared=True), cache.lock(f"oci-{key}"):
        found = find(key)
        if found is None:
            with cache.workspace() as work:
                made = work / "image"
                made.mkdir()
                _make(source, manifest, made, key, tell)
                value = {"name": source.name, "made": time.time(), "settings": asdict(manifest.settings)}
                (made / "image.json").write_text(json.dumps(value))
                cache.publish(made, _built() / key)
            found = find(key)
            assert found is not None
        remember(source.name, found)
    return found


def _make(source: Source, manifest: ImageManifest, made: Path, key: str, tell: Tell) -> None:
    limit = _limit()
    tree = Rootfs()
    descriptor = os.open(made / "root.erofs", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        writer = Writer(descriptor, limit)
        blobs = source.open_layers(manifest, tell)
        try:
            with closing(_contents(blobs, manifest.diff_ids, limit)) as contents:
                for number, (stream, diff_id) in enumerate(zip(contents, manifest.diff_ids, strict=True)):
                    tell(f"unpacking layer {number + 1} of {len(blobs)}", number, len(blobs) + 1)
                    try:
                        apply(stream, tree, writer)
                        if stream.finish() != diff_id:
                            raise ImageError("its content has another digest than the configuration says")
                    except ImageError as error:
                        raise ImageError(f"{source.name}: layer {number + 1} of {len(blobs)}: {error}") from error
        finally:
            for blob in blobs:
                if blob.done() and not blob.cancelled() and blob.exception() is None:
                    blob.result().close()
        for name in MOUNTPOINTS:
            tree.directory(name)
        workdir = os.path.normpath("/" + manifest.settings.workdir).strip("/")
        if workdir:
            tree.directory(os.fsencode(workdir))
        writer.finish(tree, bytes.fromhex(key))
    finally:
        os.close(descriptor)
    tell("done", 1, 1)


def _contents(blobs: list[Future[BinaryIO]], diff_ids: tuple[str, ...], limit: int) -> Generator[LayerStream]:
    """The layers' contents, lowest first, each to be read before the next is asked for. While one is read the next is
    decompressed, as far as it is there and its stream keeps ahead."""
    begun: dict[int, LayerStream] = {}
    with contextlib.ExitStack() as stack:
        for number in range(len(blobs)):
            for at in range(number, min(number + 2, len(blobs))):
                if at not in begun and (at == number or blobs[at].done()):
                    file = stack.enter_context(blobs[at].result())
                    begun[at] = stack.enter_context(LayerStream(decompressed(file), limit, diff_ids[at]))
            yield begun.pop(number)


def _limit() -> int:
    """Bytes that an image may unpack to."""
    text = os.environ.get("LOOPVISOR_OCI_LIMIT", str(LIMIT_GIB)).removesuffix("G")
    if not text.isdecimal() or not 0 < int(text) < 1 << 20:
        raise ImageError(f"LOOPVISOR_OCI_LIMIT: {text!r} is no number of GiB", "config")
    return int(text) << 30


def _built() -> Path:
    return cache.directory("oci", "built")


def _name_file(name: str) -> Path:
    return cache.directory("oci", "names") / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _names() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(cache.directory("oci", "names").iterdir()):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            value = json.loads(path.read_text())
            yield path, {"name": str(value["name"]), "key": str(value["key"]), "time": float(value["time"])}


def listed() -> list[tuple[str, OciImage, float]]:
    """(name, build, when it was looked up last) of everything that is there."""
    found = []
    for _, value in _names():
        built = find(value["key"])
        if built is not None:
            found.append((value["name"], built, value["time"]))
    return sorted(found, key=lambda item: item[0])


def remove(name: str) -> bool:
    """Forget a name; its build goes with the last name. False: there is no such name."""
    with cache.lock(USING):
        file = _name_file(name)
        if not file.exists():
            return False
        file.unlink()
        _sweep()
        return True


def prune() -> int:
    """Remove downloaded layers and builds without a name; bytes freed. Machines that run keep theirs open."""
    with cache.lock(USING):
        freed = _sweep()
        blobs = cache.directory("oci", "blobs")
        for path in list(blobs.rglob("*")):
            if path.is_file():
                freed += path.stat().st_blocks * 512
                path.unlink()
        return freed


def _sweep() -> int:
    kept = {value["key"] for _, value in _names()}
    freed = 0
    for path in _built().iterdir():
        if path.name not in kept:
            freed += sum(item.stat().st_blocks * 512 for item in path.iterdir())
            shutil.rmtree(path, ignore_errors=True)
    return freed
