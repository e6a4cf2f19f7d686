"""Where an image comes from, as the builder sees it, and the choice of a manifest, which sources share. *any thread*"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import BinaryIO, Protocol

from images.errors import ImageError
from images.oci import model
from images.oci.model import Descriptor, ImageManifest

Tell = Callable[[str, int, int], None]
"""tell(what, done, total): bytes."""
MAX_DEPTH = 3
"""Indexes within indexes."""


class Source(Protocol):
    """One image somewhere. Used in a `with` block."""

    @property
    def name(self) -> str:
        """What the user called it, for messages."""

    def find(self) -> ImageManifest:
        """The manifest for our platform with what the configuration says. Raises ImageError."""

    def open_layers(self, manifest: ImageManifest, tell: Tell) -> list[Future[BinaryIO]]:
        """The layers' blobs, lowest first, each when it is there. The caller closes them and checks their content by
        the configuration's digests."""

    def close(self) -> None:
        """Give back what is open; what was begun ends."""


def read_manifest(
    fetch: Callable[[Descriptor], bytes],
    first: bytes,
    where: str,
    digest: str,
    pick: Callable[[list[Descriptor]], Descriptor],
) -> ImageManifest:
    """From a manifest or an index to the manifest of an image with its configuration. `fetch` gives the document of a
    descriptor, checked; `pick` chooses from an index. Raises ImageError."""
    data = first
    for _ in range(MAX_DEPTH):
        value = model.document(data, where)
        if not model.is_index(value):
            found = model.manifest(value, where, digest)
            return model.with_config(found, fetch(found.config), where)
        chosen = pick(model.index(value, where))
        data, digest = fetch(chosen), chosen.digest
        pick = lambda found: model.choose(found, where)  # noqa: E731 - the inner indexes are of platforms
    raise ImageError(f"{where}: indexes within indexes")


def checked(data: bytes, wanted: Descriptor, where: str) -> bytes:
    """The document, if it is what its descriptor says. Raises ImageError."""
    if len(data) != wanted.size or model.digest_of(data, wanted.digest) != wanted.digest:
        raise ImageError(f"{where}: {wanted.digest[:19]}… is damaged: its content has another digest")
    return data
