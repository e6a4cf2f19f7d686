"""What `vmm run NAME` finds: tiny guests, built images, and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from images import guests
from images.errors import ImageError

if TYPE_CHECKING:
    from images.builder import BuildProgress
    from images.built import Built
    from images.oci.store import OciImage

BELOW_OCI = "container"
"""The recipe whose kernel and init run OCI images."""
OCI_SCHEMES = ("oci:", "docker-archive:")


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
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of a machine's configuration: what an OCI image says of its program."""
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


def resolve(name: str, *, build: bool = False, progress: BuildProgress | None = None, pull: str = "missing") -> Image:
    """The image of that name, an OCI image (oci:…, docker-archive:…), or a kernel file by its path (anything with a
    slash, or an existing file).

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
    if name.startswith(OCI_SCHEMES):
        return _from_oci(name, progress, pull)
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
        if found.recipe.get("kind") == "container":
            raise ImageError(f"{name}: this runs below OCI images; write for instance: vmm run oci:debian:12", "config")
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


def _from_oci(name: str, progress: BuildProgress | None, pull: str) -> Image:
    import shlex

    from images import builder, built
    from images.oci import find

    def silent(what: str, done: int, total: int) -> None:
        return None

    below = built.current(BELOW_OCI) or builder.build(BELOW_OCI, progress)
    found = find.resolve(name, progress or silent, pull)
    defaults = below.recipe.get("defaults", {})
    settings = found.settings
    cmdline = f"root=/dev/vda rootfstype=erofs ro container overlay=tmpfs hostname={_host_name(found)}"
    return Image(
        _host_name(found),
        below.directory / "vmlinuz",
        initrd=below.directory / "initrd",
        disk=found.disk,
        cmdline=f"{cmdline} stop_signal={settings.stop_signal} {defaults.get('cmdline', '')}".rstrip(),
        memory=str(defaults.get("memory", "512M")),
        agent=True,
        options={
            "env": list(settings.env),
            "user": settings.user,
            "workdir": settings.workdir or "/",
            "entrypoint": shlex.join(settings.entrypoint),
            "command": shlex.join(settings.command),
        },
        description=found.name,
    )


def _host_name(found: OciImage) -> str:
    """The last part of the name without its tag, as a host may be called."""
    import re

    last = found.name.partition("@")[0].rpartition("/")[2].partition(":")[0]
    return re.sub(r"[^a-zA-Z0-9-]+", "-", last).strip("-")[:40] or "container"
