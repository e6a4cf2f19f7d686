"""Kernel modules out of a package: which ones are needed for a list of names, in the order in which they load."""

from __future__ import annotations

import lzma
import re
from collections.abc import Sequence

from images.errors import ImageError


def module_name(path: str) -> str:
    """kernel/drivers/char/hw_random/virtio-rng.ko -> virtio_rng"""
    return re.sub(r"\.ko(\.\w+)?$", "", path.rsplit("/", 1)[-1]).replace("-", "_")


def unpack(path: str, data: bytes) -> bytes:
    """The module itself, whatever it was compressed with."""
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".zst"):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def depends(module: bytes) -> list[str]:
    """The names in a module's "depends=" (its .modinfo section holds zero-terminated NAME=value strings)."""
    match = re.search(rb"\0depends=([\w,-]*)\0", module)
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []


def hardware(module: bytes) -> list[str]:
    """What a module's driver is for, as "BUS PREFIX": a device of that bus whose modalias begins with the prefix. Only
    buses on which nothing appears later; empty for a module that is no driver of theirs."""
    found = [f"virtio {alias.decode()}" for alias in re.findall(rb"\0alias=(virtio:d[0-9A-Fa-f]{8}v)\*", module)]
    found += [f"acpi acpi:{name.decode()}:" for name in re.findall(rb"\0alias=acpi\*:(\w+):\*", module)]
    return found


def file_systems(module: bytes) -> list[str]:
    """The types of file system that a module brings, as "fs TYPE"."""
    return [f"fs {name.decode()}" for name in re.findall(rb"\0alias=fs-(\w+)\0", module)]


def closure(
    wanted: list[str], files: dict[str, bytes], built_in: set[str], for_root: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Path -> what needs it (empty: always loaded) of the modules for `wanted` and `for_root`, dependencies first. What
    needs a module is hardware, or for those of `for_root` alone a root file system. A name that is built in needs
    none."""
    by_name = {module_name(path): path for path in files}
    order: dict[str, list[str]] = {}

    def add(name: str, reason: str, above: tuple[str, ...], needed: list[str]) -> None:
        if name in built_in:
            return
        path = by_name.get(name)
        if path is None:
            raise ImageError(f"the kernel has no module {name}, which {reason} needs", "config")
        if path in order:
            order[path] = list(dict.fromkeys([*order[path], *needed])) if order[path] and needed else []
            return
        if name in above:
            raise ImageError(f"module {name} depends on itself")
        for other in depends(files[path]):
            add(other, f"module {name}", (*above, name), needed)
        order[path] = needed

    for name in (name.replace("-", "_") for name in wanted):
        add(name, "the recipe", (), hardware(files[by_name[name]]) if name in by_name else [])
    for name in (name.replace("-", "_") for name in for_root):
        add(name, "the recipe", (), (file_systems(files[by_name[name]]) if name in by_name else []) or [f"fs {name}"])
    return order
