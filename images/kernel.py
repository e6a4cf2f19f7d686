"""The guest's kernel out of a Debian package with the modules that a recipe names, and the initramfs that loads
them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images import modules, packages
from images.errors import ImageError
from images.tree import Tree

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Kernel:
    """Its release, as in `uname -r`, and its modules."""

    version: str
    modules: dict[str, bytes]
    """Path below lib/modules/VERSION -> module, in the order in which they load."""
    needed: dict[str, list[str]]
    """The same paths -> the hardware that needs the module, as modules.hardware() has it; empty: loaded always."""


def guest_init() -> bytes:
    """Our init and agent, a static binary that the package's build makes."""
    try:
        return (HERE / "init" / "guest-init.bin").read_bytes()
    except FileNotFoundError as error:
        raise ImageError("guest-init.bin was not built; install the package again") from error


def take(deb: Path, recipe: dict[str, Any], made: Path) -> Kernel:
    """Put vmlinuz in place; pick the modules."""
    files: dict[str, bytes] = {}
    built_in: set[str] = set()
    version = ""
    for member, data in packages.contents(deb):
        path = member.name.removeprefix("./").removeprefix("usr/")
        if path.startswith("boot/vmlinuz-"):
            version = path.removeprefix("boot/vmlinuz-")
            (made / "vmlinuz").write_bytes(data)
        elif path.startswith("lib/modules/") and ".ko" in path:
            inner = path.split("/", 3)[3]
            files[inner] = modules.unpack(path, data)
        elif path.endswith("/modules.builtin"):
            built_in |= {modules.module_name(line) for line in data.decode().splitlines()}
    if not version:
        raise ImageError(f"package {deb.name} has no kernel")
    order = modules.closure(
        recipe["kernel"].get("modules", []), files, built_in, recipe["kernel"].get("file_systems", [])
    )
    return Kernel(version, {path: files[path] for path in order}, order)


def initramfs(kernel: Kernel, busybox: bytes | None = None) -> bytes:
    """Our init and the modules: it only finds the root. With a busybox there is a shell for when it does not."""
    tree = Tree()
    for name in ("dev", "proc", "sys", "etc", "newroot", "root", "run", "tmp"):
        tree.directory(name)
    tree.character_device("dev/console", 5, 1)
    tree.file("init", guest_init(), 0o755)
    if busybox is not None:
        tree.file("bin/busybox", busybox, 0o755)
        tree.link("bin/sh", "busybox")
    listed = []
    for path, data in kernel.modules.items():
        short = f"lib/modules/{path.rsplit('/', 1)[-1].removesuffix('.xz').removesuffix('.zst')}"
        tree.file(short, data)
        listed.append("\n ".join([f"/{short}", *kernel.needed[path]]) + "\n")
    tree.file("etc/modules", "".join(listed).encode())
    return tree.cpio()
