"""From an image's name to a running machine: `async with vmm.run("linux") as vm: …`.

Images are another package's business: whoever provides them registers an entry point in the group `loopvisor.images`,
a function from a name to something of ImageLike's shape (None or an error if there is no such image). This module only
turns that into a Config.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm.config import Config
from vmm.errors import ConfigError, HostError, VmmError, os_reason
from vmm.image import ImageLike, config_for
from vmm.machine.hardware import HeadStart
from vmm.timeline import now
from vmm.vm import VirtualMachine

if TYPE_CHECKING:
    pass

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
    image: str | ImageLike | None = None,
    *,
    devices: Mapping[str, Callable[[], Any]] | None = None,
    warm: bool = False,
    **options: Any,
) -> AsyncIterator[VirtualMachine]:
    """A running machine: an image by name or by value, or none and Config's fields. Ends with the block. `devices` are
    VirtualMachine's. `warm`: a machine of this kind that was booted before goes on from where its agent listened; the
    first one boots, and is kept for that."""
    asked = now()
    if isinstance(image, str):
        image = await asyncio.to_thread(find_image, image)
    config = Config.from_dict(options) if image is None else config_for(image, **options)
    async with _machine(config, devices, warm) as machine:
        machine.timeline.mark("begin", asked)
        machine.timeline.mark("configured")
        async with machine as vm:
            vm.resume()
            if warm:
                await keep_warm(vm)
            yield vm


@asynccontextmanager
async def _machine(
    config: Config, devices: Mapping[str, Callable[[], Any]] | None, warm: bool
) -> AsyncIterator[VirtualMachine]:
    """A machine to be entered: a new one, or one that goes on from a kept snapshot."""
    if not warm:
        yield VirtualMachine(config, devices=devices)
        return
    from vmm.state import warm as kept

    if devices:
        raise ConfigError("warm: devices of one's own cannot be kept; leave warm out")
    kept.check(config)
    snapshot, text = await asyncio.to_thread(kept.find, config)
    if snapshot is None:
        machine = VirtualMachine(config)
        if text:
            machine.tell(text)
        yield machine
        return
    try:
        changed, saved = await asyncio.to_thread(snapshot.prepare, kept.changes(config))
        yield VirtualMachine(changed, saved=saved)
    finally:
        snapshot.close()


async def keep_warm(vm: VirtualMachine) -> None:
    """Once the agent listens, keep a machine that booted for later warm starts. What goes wrong is a warning."""
    from vmm.state import warm as kept

    if vm.restored:
        return
    path = kept.folder(vm.config)
    if kept.is_there(path):
        return
    await vm.exec("true")  # a first program starts when the system is set up, and its network with it
    try:
        with kept.making(path) as ours:
            if ours:
                await vm.snapshot(path)
    except (VmmError, OSError) as error:
        reason = f"{path.parent}: {os_reason(error)}" if isinstance(error, OSError) else str(error)
        vm.tell(f"the machine is not kept for warm starts: {reason}")


@asynccontextmanager
async def restore(
    directory: Path | str,
    *,
    trust: bool = False,
    paused: bool = False,
    as_copy: bool = False,
    devices: Mapping[str, Callable[[], Any]] | None = None,
    **options: Any,
) -> AsyncIterator[VirtualMachine]:
    """A machine that goes on from a snapshot, as often as wanted, each time as a copy of its own. `options`: fields of
    Config that shall differ (its name above all: copies cannot share one). `trust`: open files of this host that a
    snapshot from elsewhere names. `as_copy`: it gets addresses, a host name and a machine id of its own, to run beside
    the original. `devices`: the embedder's own, as the saved machine had them. Ends with the block. Raises StateError
    for one that is damaged or does not fit."""
    from vmm.state.snapshot import open_prepared

    changes = {"name": "", "console": "none", **options}
    snapshot, config, saved = await asyncio.to_thread(open_prepared, directory, changes, trust, as_copy)
    try:
        head_start = HeadStart(config, saved.origin)  # its thread maps memory and makes the VM meanwhile
        try:
            async with VirtualMachine(config, saved=saved, devices=devices, head_start=head_start) as vm:
                snapshot.close()
                if not paused:
                    vm.resume()
                yield vm
        finally:
            head_start.close()
    finally:
        snapshot.close()
