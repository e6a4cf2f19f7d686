"""From an image's name to a running machine: `async with vmm.run("linux") as vm: …`.

Images are another package's business: whoever provides them registers an entry point in the group `loopvisor.images`,
a function from a name to something of ImageLike's shape (None or an error if there is no such image). This module only
turns that into a Config.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from vmm.config import Config, Disk, FlatImage, Net
from vmm.errors import ConfigError, HostError, VmmError
from vmm.vm import VirtualMachine

GROUP = "loopvisor.images"
VIRTIO_OPTIONS = ("disks", "nets", "hvc", "ports", "vsock", "agent")
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
    values |= options
    if image.cmdline:
        # What the user appends stands last, where it wins.
        values["append"] = f"{image.cmdline} {options.get('append', '')}".rstrip()
    if image.disk is not None:
        values["disks"] = (Disk(path=image.disk, snapshot=True), *values.get("disks", ()))
    return Config.from_dict(values)


def find_image(name: str) -> ImageLike:
    """The image of that name (built first, if it never was). Raises ConfigError, HostError."""
    from importlib.metadata import entry_points  # slow to load, and only needed here

    providers = entry_points(group=GROUP)
    if not providers:
        raise ConfigError(f"image {name}: no package here provides images; give kernel=… instead")
    failure: Exception | None = None
    for provider in providers:
        try:
            image: ImageLike | None = provider.load()(name)
        except VmmError:
            raise
        except Exception as error:  # the provider's own errors: `kind` says whose fault it is
            failure = error
            continue
        if image is not None:
            return image
    kind = ConfigError if getattr(failure, "kind", "config") == "config" else HostError
    raise kind(str(failure or f"no image {name}")) from failure


@asynccontextmanager
async def run(
    image: str | ImageLike | None = None, *, devices: Mapping[str, Callable[[], Any]] | None = None, **options: Any
) -> AsyncIterator[VirtualMachine]:
    """A running machine: an image by name or by value, or none and Config's fields. Ends with the block. `devices` are
    VirtualMachine's."""
    asked = time.monotonic_ns()
    if isinstance(image, str):
        image = await asyncio.to_thread(find_image, image)
    config = Config.from_dict(options) if image is None else config_for(image, **options)
    machine = VirtualMachine(config, devices=devices)
    machine.timeline.mark("begin", asked)
    machine.timeline.mark("configured")
    async with machine as vm:
        vm.resume()
        yield vm
