"""The arrows between packages (ARCHITECTURE.md), held by reading imports."""

import ast
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
