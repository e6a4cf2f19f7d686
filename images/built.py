"""What has been built, and where the cache is: all that running an image needs of the builder, and quick to load."""

import json
import os
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


def built_names() -> list[str]:
    """What was built, from our recipes or the user's."""
    try:
        names = os.listdir(cache_directory() / "images")
    except OSError:
        return []
    return sorted(name[:-5] for name in names if name.endswith(".json") and is_name(name[:-5]))


def current(name: str) -> Built | None:
    """The last whole build of a recipe, or None; does not ask apt."""
    if not is_name(name):
        return None
    images = cache_directory() / "images"
    try:
        pointer = json.loads((images / f"{name}.json").read_text())
        place = images / pointer["directory"]
        manifest = json.loads((place / "manifest.json").read_text())
    except (OSError, ValueError, KeyError):
        return None
    return Built(name, manifest["key"], place, manifest["recipe"])
