"""The files of a rig that has no access to the host's: checkout, interpreter, dependencies, GDB, an image, busybox.

Everything stands at the path that it has on the host, so that virtual environments and shebangs hold there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from images import cache, packages
from images.built import current

PROGRAMS = ("gdb",)
DATA = ("/usr/share/gdb", "/usr/lib/python3.11")
"""GDB's own, which has an interpreter inside it, Debian's."""
NOT_NEEDED = ("test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "turtledemo", "dist-packages", "*.a")
PACKAGES_NOT_NEEDED = ("mypy", "mypyc", "*__mypyc*", "pip", "ruff*", "setuptools", "pdoc", "jinja2", "pygments.*")
CHECKOUT_NOT_NEEDED = (".git", ".venv", "build", "dist", "fuzz", "soak")


def libraries(programs: Iterable[Path]) -> set[Path]:
    """The shared libraries that the programs and modules load, and the loader."""
    found: set[Path] = set()
    for program in programs:
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False, timeout=60).stdout
        found |= {Path(path) for path in re.findall(r"(?:=> )?(/\S+) \(0x", listed)}
    return found


def _copy(root: Path, source: Path, *without: str) -> None:
    target = root / source.relative_to("/")
    if source.is_dir():
        ignore = shutil.ignore_patterns(*without) if without else None
        shutil.copytree(source, target, ignore=ignore, symlinks=True, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _copy_link(root: Path, link: Path) -> None:
    """A file, and every symbolic link on the way to it."""
    while link.is_symlink():
        target = root / link.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(link.readlink())
        link = link.parent / link.readlink()
    _copy(root, link)


def stage(root: Path, checkout: Path) -> None:
    """Copy everything below `root`, which is made."""
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "usr/bin", "usr/lib", "usr/sbin", "usr/lib64"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "sbin", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    base = Path(sys.base_prefix)
    standard = Path(sysconfig.get_paths()["stdlib"])
    interpreter = Path(sys.executable).resolve()
    _copy(root, standard, *NOT_NEEDED, "site-packages")
    _copy(root, checkout, *CHECKOUT_NOT_NEEDED)
    _copy(root, checkout / ".venv", *PACKAGES_NOT_NEEDED)
    _copy_link(root, Path(sys.executable))
    for name in DATA:
        if Path(name).is_dir():
            _copy(root, Path(name), *NOT_NEEDED)
    programs = [Path(path) for name in PROGRAMS if (path := shutil.which(name))]
    for program in programs:
        _copy(root, program)
    built = current("linux")
    assert built is not None
    _copy(root, built.directory)
    for pointer in built.directory.parent.glob("linux*"):
        if pointer.is_file():
            _copy(root, pointer)
    modules = [*programs, interpreter, *standard.glob("lib-dynload/*.so"), *(checkout / ".venv").rglob("*.so")]
    for library in libraries([*modules, *checkout.glob("*/*.so")]):
        if not library.is_relative_to(base) or not (root / library.relative_to("/")).exists():
            _copy(root, library)
    busybox = packages.download(packages.resolve("busybox-static"))
    for member, data in packages.contents(busybox):
        if member.isreg() and member.name.removeprefix("./").removeprefix("usr/") == "bin/busybox":
            (root / "bin/busybox").write_bytes(data)
            (root / "bin/busybox").chmod(0o755)
    for name in ("sh", "ls", "cat", "mkdir", "env", "kill", "sleep", "mount", "uname"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    assert cache.directory("images")
