"""An image as its provider describes it, and the Config that runs it. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vmm.config import Config, Disk, FlatImage, Net

VIRTIO_OPTIONS = ("disks", "nets", "shares", "root", "hvc", "ports", "vsock", "agent")
"""Options that need the whole platform."""


class ImageLike(Protocol):
    """What a provider of images gives back: files, and how they want to be run."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def kernel(self) -> Path:
        """The kernel file, or a flat binary."""

    @property
    def kind(self) -> str:
        """ "auto": by the file's content; "real": a flat binary at 0000:7C00 in real mode."""

    @property
    def initrd(self) -> Path | None:
        """Its initial RAM disk, if it has one."""

    @property
    def disk(self) -> Path | None:
        """Its root disk, if it has one; attached as a snapshot."""

    @property
    def cmdline(self) -> str:
        """Added to the kernel's command line."""

    @property
    def memory(self) -> str:
        """How much it wants, as text such as "256M"."""

    @property
    def platform(self) -> str:
        """"pc", or "bare" for guests that need no more than that."""

    @property
    def agent(self) -> bool:
        """Whether our agent runs in it."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Further fields of Config: the program that it is made for, its environment, user and working directory."""


def config_for(image: ImageLike, **options: Any) -> Config:
    """The Config that runs an image; `options` are Config's fields and win over the image's wishes (`append` is added
    to the image's). Its root disk is attached as a snapshot before the disks of `options`. With an agent the machine
    has vsock, and user networking where passt is installed and no networks are asked for."""
    values: dict[str, Any] = {"memory": image.memory}
    if image.kind == "real":
        values["flat"] = FlatImage(path=image.kernel)
    else:
        values["kernel"] = image.kernel
    if image.initrd is not None:
        values["initrd"] = image.initrd
    if image.agent:
        values["agent"] = True
        import shutil

        if shutil.which("passt"):
            values["nets"] = (Net(kind="user", required=False),)
    if image.platform == "bare" and not any(options.get(name) for name in VIRTIO_OPTIONS):
        values["platform"] = "bare"
    values |= image.options
    values |= options
    if "env" in options:
        values["env"] = [*image.options.get("env", ()), *options["env"]]
    if "entrypoint" in options and "command" not in options:
        values["command"] = ""  # it belongs to the image's own entrypoint
    if image.cmdline:
        # What the user appends stands last, where it wins.
        values["append"] = f"{image.cmdline} {options.get('append', '')}".rstrip()
    if image.disk is not None:
        values["disks"] = (Disk(path=image.disk, format="raw", snapshot=True), *values.get("disks", ()))
    return Config.from_dict(values)
