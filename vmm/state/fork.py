"""Copies of a running machine that share its memory with it until one of them writes.

Memory is frozen: what it holds is copied into an unnamed file while the machine runs, and what was written meanwhile is
copied while the machine stands still. The machine and its copies then go on with private mappings of that file. The
devices' state and what was written to snapshot disks are copied while it stands still. Loop thread; worker threads copy
memory.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from virtio.backends.image import ImageBlock
from virtio.devices.net import NetDevice, random_mac
from vmm.config import Config, Net
from vmm.errors import ConfigError, HostError, core_errors, os_reason
from vmm.guest.identity import Identity
from vmm.machine.memory import CopyOnWrite, Extent, GuestMemory
from vmm.machine.origin import Restore, Saved, SavedDisk
from vmm.machine.saving import save
from vmm.state.diskcopy import copy_sparse
from vmm.state.worker import in_thread

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

MAX_COPIES = 1000


@dataclass(slots=True)
class Frozen:
    """A machine at one moment, from which any number of copies can be built. Close it when all are built."""

    name: str
    """The original's name."""
    state: dict[str, Any]
    console: dict[str, Any]
    size: int
    extents: tuple[Extent, ...]
    disks: dict[str, tuple[int, bytes]]
    """Overlays: a descriptor, and the bitmap of the sectors that it holds."""
    addresses: tuple[bytes, ...]
    """MAC addresses of the original's cards."""
    config: Config
    """The original's configuration, as it was at that moment."""
    stood_still_ns: int = 0
    _files: list[int] = field(default_factory=list)

    def saved(self, identity: Identity | None, seed: int | None = None) -> Saved:
        """What a copy goes on from. With a `seed` it draws other random numbers than the original. Its clock shows the
        host's time, unless time is virtual."""
        fields = self.state["fields"]
        epoch = int(fields["epoch_ns"])
        if fields["clock"] == "real":
            epoch = time.time_ns() - int(fields["now_ns"])
        disks = {name: SavedDisk(Path(f"/proc/self/fd/{fd}"), sectors) for name, (fd, sectors) in self.disks.items()}
        restore = Restore(self.state, self._memory, epoch, seed)
        return Saved(restore, disks, self.console, identity, f"copy of {self.name}" if self.name else "copy")

    def _memory(self) -> GuestMemory:
        return GuestMemory(self.size, source=CopyOnWrite(self.extents))

    def close(self) -> None:
        """Idempotent. Copies that were built have descriptors of their own."""
        files, self._files = self._files, []
        for descriptor in files:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def freeze(vm: VirtualMachine) -> Frozen:
    """Keep the machine as it is now. It runs on afterwards. Raises ConfigError, StateError, HostError."""
    for name, device in vm.block_devices().items():
        backend = device.backend
        if not isinstance(backend, ImageBlock) or (backend.overlay < 0 and not backend.read_only):
            raise ConfigError(f"{name}: a copy would write to the same disk; attach it with snapshot, or read-only")
    vm.check_no_jobs()
    memory = vm.machine.memory
    with core_errors():
        await in_thread(memory.prepare_freeze)
    frozen: Frozen | None = None
    try:
        async with vm.standstill("fork"):
            begun = time.monotonic_ns()
            machine = vm.machine
            with core_errors():
                extents = memory.freeze()
            frozen = Frozen(
                vm.config.name, save(machine), vm.save_console(), memory.size, (), {}, _addresses(vm), vm.present
            )
            frozen.extents = _own(extents, frozen._files)
            for name, device in vm.block_devices().items():
                if isinstance(device.backend, ImageBlock) and device.backend.overlay >= 0:
                    frozen.disks[name] = await asyncio.to_thread(_copy, device.backend, frozen._files)
            vm.check_standing(machine)
            frozen.stood_still_ns = time.monotonic_ns() - begun
        return frozen
    except BaseException:
        if frozen is not None:
            frozen.close()
        raise


def _addresses(vm: VirtualMachine) -> tuple[bytes, ...]:
    return tuple(device.mac for device in vm.virtio_devices().values() if isinstance(device, NetDevice))


def _own(extents: Sequence[Extent], files: list[int]) -> tuple[Extent, ...]:
    """The same extents with duplicated descriptors, which are added to `files`."""
    own: dict[int, int] = {}
    for extent in extents:
        if extent.fd not in own:
            own[extent.fd] = os.dup(extent.fd)
            files.append(own[extent.fd])
    return tuple(Extent(extent.gpa, extent.length, own[extent.fd], extent.offset) for extent in extents)


def _copy(backend: ImageBlock, files: list[int]) -> tuple[int, bytes]:
    folder = os.environ.get("TMPDIR", "/var/tmp")
    try:
        with tempfile.TemporaryFile(prefix="loopvisor-", dir=folder) as file:
            copy_sparse(backend.overlay, file.fileno(), backend.capacity)
            descriptor = os.dup(file.fileno())
    except OSError as error:
        raise HostError(f"fork: {folder}: {os_reason(error)}; set TMPDIR to another folder") from error
    files.append(descriptor)
    return descriptor, bytes(backend.written)


def nets_of_a_copy(config: Config) -> list[Net]:
    """The network cards of a copy that runs beside its original. They forward no ports, which the original keeps."""
    return [replace(net, forward="") for net in config.nets]


def new_identity(hostname: str, addresses: Sequence[bytes], fresh: Mapping[bytes, bytes]) -> Identity:
    """The identity of a copy: this host name, a new machine id, and for each old MAC address the one in `fresh`."""
    identity = Identity(hostname, uuid.uuid4().hex, {old: fresh[old] for old in addresses})
    identity.check()
    return identity


async def fork(
    vm: VirtualMachine, count: int = 1, *, names: Sequence[str] = (), seeds: Sequence[int] = (), paused: bool = False
) -> list[VirtualMachine]:
    """Make `count` copies of a machine, which run unless `paused`: vmm.vm.VirtualMachine.fork."""
    from vmm.vm import VirtualMachine

    if not 1 <= count <= MAX_COPIES:
        raise ConfigError(f"fork: {count} copies; 1 to {MAX_COPIES} are possible")
    for what, given in (("names", names), ("seeds", seeds)):
        if given and len(given) != count:
            raise ConfigError(f"fork: {len(given)} {what} for {count} copies")
    copies: list[VirtualMachine] = []
    with await freeze(vm) as frozen:
        try:
            for index in range(count):
                changes: dict[str, Any] = {"name": names[index] if names else "", "console": "none"}
                changes |= {"vsock": None, "gdb": None}
                changes |= {"nets": nets_of_a_copy(frozen.config)}
                if seeds:
                    changes["seed"] = seeds[index]
                config = Config.from_dict({**frozen.config.to_dict(), **changes})
                fresh = {old: random_mac(os.urandom) for old in frozen.addresses}
                identity = new_identity(names[index] if names else f"copy-{index + 1}", frozen.addresses, fresh)
                saved = frozen.saved(identity, seeds[index] if seeds else None)
                copies.append(VirtualMachine(config, saved=saved, devices=vm.own_devices))
            async with asyncio.TaskGroup() as group:
                for copy in copies:
                    group.create_task(copy.__aenter__(), name="fork")
        except BaseException as error:
            for copy in copies:
                copy.kill()
            await asyncio.gather(*(copy.aclose() for copy in copies), return_exceptions=True)
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
    for copy in copies if not paused else ():
        copy.resume()
    return copies
