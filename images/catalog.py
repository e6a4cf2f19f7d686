"""What `vmm run NAME` finds: tiny guests, built images, and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from images import guests
from images.errors import ImageError

if TYPE_CHECKING:
    from images.builder import BuildProgress
    from images.built import Built


@dataclass(frozen=True, slots=True)
class Image:
    """One guest, ready to run. `kind` is how the kernel file boots: "auto" (by its content: ELF with a PVH note or
    multiboot header, bzImage), or "real" (a flat binary at 0000:7C00 in real mode)."""

    name: str
    kernel: Path
    kind: Literal["auto", "real"] = "auto"
    initrd: Path | None = None
    disk: Path | None = None
    """The root disk. Shared by all machines that run this image: attach it as a snapshot."""
    cmdline: str = ""
    memory: str = "64M"
    platform: Literal["pc", "bare"] = "pc"
    """bare: the guest uses nothing but memory, interrupt controllers, the serial port and the reset and debug ports."""
    agent: bool = False
    """The guest runs our agent, over vsock, and wants network and entropy."""
    description: str = ""


def names() -> list[tuple[str, str, bool]]:
    """(name, description, built) of every recipe, the user's own builds and the tiny guests."""
    from images import built, recipe

    found = []
    for name in sorted({*built.recipe_names(), *built.built_names()}):
        made = built.current(name)
        kept = made or built.outdated(name)
        described = recipe.load(name) if name in built.recipe_names() else kept.recipe if kept is not None else None
        if described is not None:
            found.append((name, str(described.get("description", "")), made is not None))
    return found + [(name, guests.description(name), True) for name in guests.names()]


def resolve(name: str, *, build: bool = False, progress: BuildProgress | None = None) -> Image:
    """The image of that name, or a kernel file by its path (anything with a slash, or an existing file).

    A recipe that was never built, or only with another version of our init, is built when `build` is set; otherwise
    ImageError says how.
    """
    try:
        path = guests.path(name)
    except KeyError:
        pass
    else:
        platform: Literal["pc", "bare"] = "pc" if name in guests.WITH_PIT else "bare"
        return Image(name, path, "real" if name == "real" else "auto", memory="16M", platform=platform)
    from images import built  # a tiny guest starts without it

    found = built.current(name)
    before = built.outdated(name) if found is None else None
    if found is None and (before is not None or name in built.recipe_names()):
        if not build:
            what = "was built by another version of vmm" if before is not None else "is not built yet"
            raise ImageError(f"image {name} {what}; run: vmm images build {name}", "config")
        from images import builder

        found = builder.build(name, progress)
    if found is not None:
        return _from_build(found)
    path = Path(name)
    if path.is_file():
        return Image(path.name, path, memory="256M", description=str(path))
    if "/" in name:
        raise ImageError(f"no file {name}", "config")
    known = ", ".join(item for item, _, _ in names())
    raise ImageError(f"no image {name}; there are: {known}, or give a file's path", "config")


def provide(name: str) -> Image:
    """The entry point for `vmm.run`: the image of that name, built if it never was."""
    return resolve(name, build=True)


def _from_build(built: Built) -> Image:
    defaults = built.recipe.get("defaults", {})
    disk = built.directory / "root.img"
    return Image(
        built.name,
        built.directory / "vmlinuz",
        initrd=built.directory / "initrd",
        disk=disk if disk.exists() else None,
        cmdline=str(defaults.get("cmdline", "")),
        memory=str(defaults.get("memory", "256M")),
        agent=True,
        description=str(built.recipe.get("description", "")),
    )
