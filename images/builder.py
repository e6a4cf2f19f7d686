"""Build an image from its recipe, without root and without booting anything.

An image is a directory of the cache, named by what went into it: the recipe, the packages' hashes, our init. The same
inputs give the same bytes. A pointer (images/built.py) names the current build; it changes when the build is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from images import busybox, cache, debian, packages
from images import kernel as kernels
from images import recipe as recipes
from images.built import Built, built_names, current, is_name, outdated, pointer_name, recipe_names
from images.errors import ImageError
from images.kernel import guest_init
from images.packages import Package

FORMAT = 6
"""Counts up when the builder itself changes what it makes."""
BUILDING = "builds"
"""The lock that builds share, so that nothing is pruned under them."""

BuildProgress = Callable[[str, int, int], None]
"""progress(what, done, total): steps of STEPS, or bytes of a download."""
STEPS = 4


@cache.host_errors()
def build(name: str, progress: BuildProgress | None = None) -> Built:
    """Build a recipe, or find that its build is up to date. A name that is no recipe of ours is that of an image built
    before, whose recipe is kept with it. Safe when several run at once or one is killed. Raises ImageError."""
    cache.sweep()
    tell = progress or (lambda what, done, total: None)
    recipe = _recipe(name)
    name = Path(name).stem if name.endswith(".toml") else name
    if not is_name(name):
        raise ImageError(f"{name!r} is no name for an image; name the file with letters, digits, - and _", "config")
    with cache.lock(BUILDING, shared=True), cache.lock(f"image-{name}"):
        tell("looking up packages", 0, STEPS)
        wanted, system = _wanted(recipe)
        key = _key(recipe, [*wanted, *system])
        place = cache.directory("images") / f"{name}-{key[:16]}"
        if not (place / "manifest.json").exists():
            files = packages.download_all([*wanted, *system], tell)
            with cache.workspace() as work:
                made = work / "image"
                made.mkdir()
                tell("unpacking the kernel", 1, STEPS)
                kernel = kernels.take(files[0], recipe, made)
                shell = busybox.binary(files[1:]) if recipe["kind"] == "busybox" else None
                (made / "initrd").write_bytes(kernels.initramfs(kernel, shell))
                tell("making the root file system", 2, STEPS)
                if recipe["kind"] == "debian":
                    debs = dict(zip(system, files[len(wanted) :], strict=True))
                    debian.make(recipe, kernel, debs, made / "root.img", work, lambda what: tell(what, 2, STEPS))
                elif recipe["kind"] == "busybox":
                    busybox.make(recipe, kernel, files[1:], made / "root.img", work)
                tell("writing", 3, STEPS)
                hashes = {path.name: cache.file_hash(path) for path in sorted(made.iterdir())}
                manifest = {"format": FORMAT, "key": key, "recipe": recipe, "files": hashes}
                manifest["packages"] = {package.file_name: package.sha256 for package in (*wanted, *system)}
                (made / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
                cache.publish(made, place)
        with cache.workspace() as work:
            pointer = work / "pointer"
            pointer.write_text(json.dumps({"directory": place.name}))
            cache.publish(pointer, place.parent / pointer_name(name))
        tell("done", STEPS, STEPS)
    return Built(name, key, place, recipe)


def _recipe(name: str) -> dict[str, Any]:
    if not name.endswith(".toml") and name not in recipe_names() and (before := current(name) or outdated(name)):
        recipes.check(before.recipe)
        return before.recipe
    return recipes.load(name)


def _wanted(recipe: dict[str, Any]) -> tuple[list[Package], list[Package]]:
    """(the kernel's package and the recipe's own, the packages of a whole system or none)"""
    kernel = packages.dependency(recipe["kernel"]["package"], recipe["kernel"]["file"])
    wanted = packages.resolve_all([kernel, *recipe["root"].get("packages", ())])
    if recipe["kind"] != "debian":
        return wanted, []
    return wanted, packages.installation(recipe["root"]["include"], recipe["root"]["suite"])


@cache.host_errors()
def prune() -> int:
    """Remove builds that are not current, packages that no current build needs and what is left of interrupted
    downloads; bytes freed. Raises ImageError while something is built."""
    try:
        with cache.lock(BUILDING, wait=False):
            return _prune()
    except BlockingIOError as error:
        raise ImageError("an image is being built just now; prune when it is done") from error


def _prune() -> int:
    cache.sweep()
    kept, packages_kept = set(), set()
    for name in built_names():
        _unlink_pointers(name, keep=pointer_name(name) if current(name) else "")
        built = current(name)
        if built:
            kept.add(built.directory.name)
            packages_kept |= set(json.loads((built.directory / "manifest.json").read_text())["packages"].values())
    freed = 0
    for path in cache.directory("images").iterdir():
        if path.is_dir() and path.name not in kept:
            freed += size_on_disk(path)
            shutil.rmtree(path)
    partial = cache.directory("packages", "partial")
    for path in [*cache.directory("packages").glob("*.deb"), *partial.iterdir()]:
        if path.stem not in packages_kept or path.parent == partial:
            freed += path.stat().st_size
            path.unlink()
    return freed


def size_on_disk(directory: Path) -> int:
    """Bytes that the files below a directory take."""
    return sum(item.stat().st_blocks * 512 for item in directory.rglob("*"))


@cache.host_errors()
def remove(name: str) -> bool:
    """Forget a build; False if there was none. Raises ImageError."""
    with cache.lock(f"image-{name}"):
        found = [built for built in (current(name), outdated(name)) if built is not None]
        _unlink_pointers(name)
        for built in found:
            shutil.rmtree(built.directory, ignore_errors=True)
        return bool(found)


def _unlink_pointers(name: str, keep: str = "") -> None:
    folder = cache.directory("images")
    for path in [folder / f"{name}.json", *folder.glob(f"{name}@*.json")]:
        if path.name != keep:
            path.unlink(missing_ok=True)


def _key(recipe: dict[str, Any], wanted: list[Package]) -> str:
    inputs = [FORMAT, recipe, [package.sha256 for package in wanted], hashlib.sha256(guest_init()).hexdigest()]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
