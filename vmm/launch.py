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
from typing import Any

from vmm.config import Config
from vmm.errors import ConfigError, HostError, VmmError
from vmm.image import ImageLike, config_for
from vmm.vm import VirtualMachine

GROUP = "loopvisor.images"


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


@asynccontextmanager
async def restore(
    directory: Path | str,
    *,
    trust: bool = False,
    paused: bool = False,
    devices: Mapping[str, Callable[[], Any]] | None = None,
    **options: Any,
) -> AsyncIterator[VirtualMachine]:
    """A machine that goes on from a snapshot, as often as wanted, each time as a copy of its own. `options`: fields of
    Config that shall differ (its name above all: copies cannot share one). `trust`: open files of this host that a
    snapshot from elsewhere names. `devices`: the embedder's own, as the saved machine had them. Ends with the block.
    Raises StateError for one that is damaged or does not fit."""
    from vmm.state.snapshot import Snapshot

    snapshot = await asyncio.to_thread(Snapshot.open, directory)
    try:
        changes = {"name": "", "console": "none", **options}
        config, saved = await asyncio.to_thread(snapshot.prepare, changes, trusted=trust)
        async with VirtualMachine(config, saved=saved, devices=devices) as vm:
            snapshot.close()
            if not paused:
                vm.resume()
            yield vm
    finally:
        snapshot.close()
