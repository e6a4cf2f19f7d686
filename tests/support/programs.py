"""Programs of this host in a guest: with the libraries they need in a directory tree, and that as an ext4 image."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.support.debian import PATIENCE

_SECONDS = 240 * PATIENCE


def missing(names: Iterable[str]) -> list[str]:
    """Those that are not on this host, for the reason of a skip."""
    return [name for name in names if shutil.which(name) is None]


def add(tree: Path, names: Iterable[str]) -> None:
    """Copy programs to usr/bin of `tree`, and the libraries that the host would load to the same places below it."""
    (tree / "usr/bin").mkdir(parents=True, exist_ok=True)
    for name in names:
        program = shutil.which(name)
        if program is None:
            raise FileNotFoundError(name)
        shutil.copy(program, tree / "usr/bin" / name)
        add_libraries(tree, program)


def add_libraries(tree: Path, program: str | Path) -> None:
    """Copy the libraries that the host would load for a program to the same places below `tree`."""
    loaded = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=_SECONDS)
    for word in loaded.stdout.split():  # nothing for a static one
        target = tree / word.lstrip("/")
        if word.startswith("/") and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, target)


def image(tree: Path, path: Path, size: str) -> Path:
    """An ext4 file system with the contents of `tree`, `size` as mke2fs takes it."""
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", tree, path, size], check=True, capture_output=True, timeout=_SECONDS
    )
    return path


def tools(folder: Path, names: Iterable[str]) -> Path:
    """An image with programs, for MOUNT in the guest."""
    tree = folder / "tools"
    for name in ("dev", "proc", "sys", "tmp", "root"):
        (tree / name).mkdir(parents=True)
    add(tree, names)
    return image(tree, folder / "tools.img", "256M")


MOUNT = """
mkdir -p /tools && mount -t ext4 -o ro /dev/{device} /tools
for i in dev proc sys; do mount -o bind /$i /tools/$i; done
mount -t tmpfs tmp /tools/tmp; mount -o bind / /tools/root
"""
"""In the guest, formatted with the disk's name. Then `chroot /tools /usr/bin/PROGRAM` runs one; the guest's own root
is /root there."""
