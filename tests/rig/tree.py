"""The files of a rig that has no access to the host's: checkout, interpreter, dependencies, GDB, GCC, an image.

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

from images import packages
from images.built import current
from images.errors import ImageError

PROGRAMS = ("gdb", "gcc", "as", "ld")
"""Tests debug with GDB, and make small guests with the others."""
COMPILER = ("cc1", "collect2")
"""What GCC starts."""
HEADER = Path("/usr/include/stdc-predef.h")
DATA = ("/usr/share/gdb", "/usr/lib/python3.11")
"""GDB's own, which has an interpreter inside it, Debian's."""
BUSYBOX = ("sh", "ls", "cat", "mkdir", "env", "kill", "sleep", "mount", "uname")
STANDARD_NOT_NEEDED = ("test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "dist-packages", "*.a")
PACKAGES_NOT_NEEDED = ("mypy", "mypyc", "*__mypyc*", "pip", "ruff*", "setuptools", "pdoc")
CHECKOUT_NOT_NEEDED = (".git", ".venv", "build", "dist", "fuzz", "soak")


def libraries(programs: Iterable[Path]) -> set[Path]:
    """The shared libraries that the programs and modules load, and the loader."""
    found: set[Path] = set()
    for program in programs:
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False, timeout=60).stdout
        found |= {Path(path) for path in re.findall(r"(?:=> )?(/\S+) \(0x", listed)}
    return found


def stage(root: Path, checkout: Path) -> None:
    """Copy everything below `root`, which is made. ImageError if there is no linux image."""
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "etc", "usr/bin", "usr/lib", "usr/sbin", "usr/lib64"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "sbin", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    loading = [*_programs(root), *_python(root, checkout)]
    for library in libraries(loading):
        _copy(root, library)
    _image(root)
    _busybox(root)


def _copy(root: Path, source: Path, *without: str) -> None:
    target = root / source.relative_to("/")
    if source.is_dir():
        ignore = shutil.ignore_patterns(*without) if without else None
        shutil.copytree(source, target, ignore=ignore, symlinks=True, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _copy_link(root: Path, link: Path) -> Path:
    """A file, which is returned, and every symbolic link on the way to it."""
    while link.is_symlink():
        target = root / link.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(link.readlink())
        link = link.parent / link.readlink()
    _copy(root, link)
    return link


def _programs(root: Path) -> list[Path]:
    found = [_copy_link(root, Path(path)) for name in PROGRAMS if (path := shutil.which(name))]
    for name in COMPILER:
        asked = ["gcc", f"-print-prog-name={name}"]
        path = Path(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.strip())
        found.append(_copy_link(root, path))
    # GCC wants a linker plugin, and a header that it includes by itself; there may be more names for one folder.
    for path in found[-1].parent.glob("liblto_plugin.so"):
        _copy(root, path)
    if HEADER.is_file():
        _copy(root, HEADER)
    for folder in DATA:
        if Path(folder).is_dir():
            _copy(root, Path(folder), *STANDARD_NOT_NEEDED)
    return found


def _python(root: Path, checkout: Path) -> list[Path]:
    """Interpreter, checkout and its environment; what of them loads libraries."""
    standard = Path(sysconfig.get_paths()["stdlib"])
    _copy(root, standard, *STANDARD_NOT_NEEDED, "site-packages")
    _copy(root, checkout, *CHECKOUT_NOT_NEEDED)
    _copy(root, checkout / ".venv", *PACKAGES_NOT_NEEDED)
    interpreter = _copy_link(root, Path(sys.executable))
    modules = (*standard.glob("lib-dynload/*.so"), *(checkout / ".venv").rglob("*.so"), *checkout.glob("*/*.so"))
    return [interpreter, *modules]


def _image(root: Path) -> None:
    """The image `linux`, and what names it in the cache."""
    built = current("linux")
    if built is None:
        raise ImageError("there is no linux image: vmm images build linux")
    _copy(root, built.directory)
    for pointer in built.directory.parent.glob("linux*.json"):
        _copy(root, pointer)


def _busybox(root: Path) -> None:
    package = packages.download(packages.resolve("busybox-static"))
    for member, data in packages.contents(package):
        if member.isreg() and member.name.removeprefix("./").removeprefix("usr/") == "bin/busybox":
            (root / "bin/busybox").write_bytes(data)
            (root / "bin/busybox").chmod(0o755)
    for name in BUSYBOX:
        (root / "bin" / name).symlink_to("busybox")
