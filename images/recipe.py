"""Recipes: TOML files that say what an image is made of. Checked, so that a mistake is one line that names the key."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from images.built import HERE, recipe_names
from images.errors import ImageError

MAX_MIB = 1 << 20

_TEXT, _TEXTS, _SIZE, _PATTERN = "text", "a list of texts", "a number of MiB", "a regular expression"
_ROOTS: dict[str, dict[str, str]] = {
    "busybox": {"packages": _TEXTS, "modules": _TEXTS, "size_mib": _SIZE, "hostname": _TEXT},
    "container": {},
    "debian": {"suite": _TEXT, "include": _TEXTS, "size_mib": _SIZE, "hostname": _TEXT},
}
"""What [root] holds, by `kind`."""
KINDS = tuple(_ROOTS)
_TABLES: dict[str, dict[str, str]] = {
    "kernel": {"package": _TEXT, "file": _PATTERN, "modules": _TEXTS, "file_systems": _TEXTS},
    "defaults": {"memory": _TEXT, "cmdline": _TEXT},
}
_REQUIRED = ("kernel.package", "kernel.file", "root.size_mib", "root.suite", "root.include")
_HOSTNAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")


def load(name: str) -> dict[str, Any]:
    """A recipe by name, or by the path of a .toml file. Raises ImageError."""
    path = Path(name) if name.endswith(".toml") else HERE / "recipes" / f"{name}.toml"
    try:
        recipe = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ImageError(f"no recipe {name}; there are: {', '.join(recipe_names())}", "config") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ImageError(f"{path}: {error}", "config") from error
    try:
        check(recipe)
    except ImageError as error:
        raise ImageError(f"{path}: {error}", "config") from error
    return recipe


def check(recipe: dict[str, Any]) -> None:
    """Raise ImageError for a key that is unknown, missing or of another kind."""
    _known(recipe, {"description", "kind", "root", *_TABLES}, "")
    kind = recipe.get("kind")
    if kind not in KINDS:
        raise ImageError(f"kind: {kind!r} is none of {', '.join(KINDS)}", "config")
    tables = {**_TABLES, "root": _ROOTS[kind]}
    if not isinstance(recipe.get("description", ""), str):
        raise ImageError(f"description: {recipe['description']!r} is not text", "config")
    for table, keys in tables.items():
        values = recipe.get(table, {})
        if not isinstance(values, dict):
            raise ImageError(f"{table}: {values!r} is not a table", "config")
        _known(values, set(keys), f"{table}.")
        for key, what in keys.items():
            where = f"{table}.{key}"
            if key not in values:
                if where in _REQUIRED:
                    raise ImageError(f"{where} is missing: {what}", "config")
            elif not _is(what, values[key]):
                raise ImageError(f"{where}: {values[key]!r} is not {what}", "config")
    hostname = recipe["root"].get("hostname", "x")
    if not _HOSTNAME.fullmatch(hostname):
        raise ImageError(f"root.hostname: {hostname!r} is no host name", "config")


def _known(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ImageError(f"unknown key {where}{key}; known are {', '.join(sorted(known))}", "config")


def _is(what: str, value: object) -> bool:
    if what == _SIZE:
        return isinstance(value, int) and not isinstance(value, bool) and 4 <= value <= MAX_MIB
    if what == _TEXTS:
        return isinstance(value, list) and all(_is(_TEXT, item) for item in value)
    if not isinstance(value, str) or not value.isprintable():
        return False
    if what == _PATTERN:
        try:
            re.compile(value)
        except re.error:
            return False
    return True
