"""What has been built, and where the cache is: all that running an image needs of the builder, and quick to load.

images/NAME@VERSION.json names the current build of an image for one version of our init and, of an image that comes
with the package, of its recipe: several installations share a cache, and an image of another version is built again
before it is run.
"""

import json
import os
from binascii import crc32
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


class Built(NamedTuple):
    """A finished build: its directory holds vmlinuz, initrd, root.img (not for every recipe) and manifest.json."""

    name: str
    key: str
    directory: Path
    recipe: dict[str, Any]


def cache_directory() -> Path:
    """$LOOPVISOR_CACHE, else loopvisor/ under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("LOOPVISOR_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "loopvisor"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(name[:-5] for name in os.listdir(HERE / "recipes") if name.endswith(".toml"))


def is_name(name: str) -> bool:
    """What an image may be called: it becomes a file's name, and a machine's."""
    return name[:1].isalnum() and name.replace("-", "").replace("_", "").isalnum() and len(name) <= 40


def version(name: str) -> str:
    """Names our init, and our recipe of that name if there is one, by their content; "none" in a tree where nothing is
    built yet."""
    try:
        found = crc32((HERE / "init" / "guest-init.bin").read_bytes())
    except OSError:
        return "none"
    try:
        found = crc32((HERE / "recipes" / f"{name}.toml").read_bytes(), found)
    except OSError:
        pass  # a recipe of the user's
    return f"{found:08x}"


def pointer_name(name: str) -> str:
    """The file that names an image's current build for our version of it."""
    return f"{name}@{version(name)}.json"


def built_names() -> list[str]:
    """What was built, from our recipes or the user's, of whichever version."""
    return sorted({name.removesuffix(".json").partition("@")[0] for name in _pointers()})


def current(name: str) -> Built | None:
    """The last whole build of our version of an image, or None; does not ask apt."""
    return _read(name, pointer_name(name)) if is_name(name) else None


def outdated(name: str) -> Built | None:
    """The last whole build of another version of an image, or None."""
    if not is_name(name):
        return None
    mine = [item for item in _pointers() if item.removesuffix(".json").partition("@")[0] == name]
    found = [built for item in mine if item != pointer_name(name) and (built := _read(name, item)) is not None]
    return max(found, key=lambda built: (built.directory / "manifest.json").stat().st_mtime, default=None)


def _pointers() -> list[str]:
    try:
        names = os.listdir(cache_directory() / "images")
    except OSError:
        return []
    return [item for item in names if item.endswith(".json") and is_name(item.removesuffix(".json").partition("@")[0])]


def _read(name: str, file_name: str) -> Built | None:
    images = cache_directory() / "images"
    try:
        pointer = json.loads((images / file_name).read_text())
        place = images / pointer["directory"]
        manifest = json.loads((place / "manifest.json").read_text())
    except (OSError, ValueError, KeyError):
        return None
    return Built(name, manifest["key"], place, manifest["recipe"])
