"""From what the user wrote to a built image: `oci:NAME`, `oci:PATH`, `docker-archive:FILE`. *any thread*"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from images.errors import ImageError
from images.oci import local, reference, store
from images.oci.source import Source, Tell


def is_oci(name: str) -> bool:
    """Whether a name is of this kind."""
    return name.startswith(reference.SCHEMES)


def resolve(name: str, tell: Tell, pull: str = "missing") -> store.OciImage:
    """The image, built if it is not there. Files are looked at each time; a registry is asked for a name that is not
    known, with `pull` "always" each time and with "never" not at all. Raises ImageError."""
    scheme, _, text = name.partition(":")
    if not text:
        raise ImageError(f"{name}: which image? write for instance oci:debian:12 or oci:./directory", "config")
    found = (reference.as_path(text) if scheme == "oci" else None) or _archive(scheme, text)
    if found is None:
        return _from_registry(reference.parse(text), tell, pull)
    path, tag = found
    if not path.exists():
        raise ImageError(f"{name}: {path}: no such file or directory", "config")
    shown = f"{scheme}:{path.resolve()}{':' + tag if tag else ''}"
    folder = local.open_folder(path)
    source = (local.OciLayout if scheme == "oci" else local.DockerArchive)(shown, folder, tag)
    with closing(source):
        return store.build(source, tell)


def _archive(scheme: str, text: str) -> tuple[Path, str] | None:
    if scheme == "oci":
        return None
    path = Path(text).expanduser()
    if not path.exists():
        # The path ends where the tag begins, and a tag may have a colon of its own (NAME:TAG).
        for at in (at for at, char in enumerate(text) if char == ":"):
            if Path(text[:at]).is_file():
                return Path(text[:at]).expanduser(), text[at + 1 :]
    return path, ""


def _from_registry(wanted: reference.Reference, tell: Tell, pull: str) -> store.OciImage:
    name = f"oci:{wanted}"
    built = store.remembered(name) if pull != "always" or wanted.digest else None
    if built is not None:
        return built
    if pull == "never":
        raise ImageError(f"{name} is not here, and pulling it was forbidden; run: vmm images pull {name}", "config")
    from images.oci.registry import Registry

    source: Source = Registry(wanted)
    with closing(source):
        return store.build(source, tell)


def remove(name: str) -> bool:
    """Forget an image by the name that `vmm images ls` shows, or as it was run. False: it is not there."""
    if store.remove(name):
        return True
    scheme, _, text = name.partition(":")
    try:
        found = (reference.as_path(text) if scheme == "oci" else None) or _archive(scheme, text)
        if found is None:
            return store.remove(f"oci:{reference.parse(text)}")
    except ImageError:
        return False
    path, tag = found
    return store.remove(f"{scheme}:{path.resolve()}{':' + tag if tag else ''}")
