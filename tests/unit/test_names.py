"""One vocabulary: a public class name means one thing in all packages."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cpu", "virtio", "vmm", "cli", "images")
IN_EACH_PACKAGE = {"GuestError", "HostError", "ConfigError", "StateError"}
"""Whose fault something is. Each package has its own four, since cpu and virtio import neither vmm nor each other."""


def test_no_public_class_name_is_defined_twice() -> None:
    """In the sources: stubs describe native types, which have the names of the Protocols that they implement."""
    places = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text(), str(path)).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 300
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert set(twice) == IN_EACH_PACKAGE, twice
    assert all(len({place.split("/")[0] for place in where}) == len(where) for where in twice.values()), twice
