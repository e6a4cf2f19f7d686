"""The arrows between packages (ARCHITECTURE.md), held by reading imports; and one meaning for each class name."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "cpu": {"cpu"},
    "virtio": {"virtio"},
    "images": {"images"},
    "vmm": {"vmm", "cpu", "virtio"},
    "cli": {"cli", "vmm", "images"},
}
OWN = set(ALLOWED)
IN_EACH_PACKAGE = {"GuestError", "HostError", "ConfigError", "StateError"}
"""Whose fault something is. Each package has its own four, since cpu and virtio import neither vmm nor each other."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def modules() -> list[Path]:
    return [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[0] for name in imports(path)} & OWN
    assert used <= ALLOWED[package], f"{path} imports {sorted(used - ALLOWED[package])}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_relative_imports(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def test_each_import_name_has_one_owner() -> None:
    """No other installed distribution provides a top-level name of ours."""
    from importlib.metadata import packages_distributions

    for name, owners in packages_distributions().items():
        if name in OWN:
            assert set(owners) == {"loopvisor"}, f"{name} is also provided by {owners}"


SOFT = ROOT / "cpu" / "soft"
SOFT_ARROWS: dict[str, set[str]] = {
    "fpu": set(),
    "irqchip": set(),
    "": {"fpu", "irqchip"},
    "ops": {""},
    "decode": {"ops"},
    "system": {"ops", ""},
    "mmu": {"ops", "system"},
    "interp": {"ops", "mmu"},
    "jit": {"ops", "mmu"},
    "direct": {"system", ""},
    "run": {"ops", "mmu", "system", "jit", "direct", ""},
}
"""Folders of the software core -> those whose headers they may include, besides their own. "" is cpu.h, the state of a
vCPU and what the folders offer each other, and soft.h; the decoder, the interpreter and the translator know operations
(ops/) and not one another."""


def soft_includes(path: Path) -> set[str]:
    """The folders that a C file of the software core includes headers of."""
    found = re.findall(r'^#include "soft/(?:(\w+)/)?\w+\.h"', path.read_text(), re.MULTILINE)
    return set(found)


@pytest.mark.parametrize("path", sorted(SOFT.rglob("*.[ch]")), ids=lambda path: str(path.relative_to(SOFT)))
def test_software_core_follows_its_arrows(path: Path) -> None:
    folder = path.parent.name if path.parent != SOFT else ""
    hidden = re.findall(r'^#include "(?!soft/|native/).*', path.read_text(), re.MULTILINE)
    assert not hidden, f"{path} hides the folder in {hidden}"
    used = soft_includes(path) - {folder}
    assert used <= SOFT_ARROWS[folder], f"{path} includes headers of {sorted(used - SOFT_ARROWS[folder])}"


def test_software_core_has_no_circle() -> None:
    """The arrows have an order, so each folder can be read after those it knows."""
    left = dict(SOFT_ARROWS)
    while left:
        free = [folder for folder, to in left.items() if not to & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for folder in free:
            del left[folder]


def test_no_public_class_name_is_defined_twice() -> None:
    """One vocabulary: a name means one thing. Only sources count: stubs describe native types, which have
    the names of the Protocols that they implement."""
    places = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text(), str(path)).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 300
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert set(twice) == IN_EACH_PACKAGE, twice
    assert all(len({place.split("/")[0] for place in where}) == len(where) for where in twice.values()), twice
