"""Changes of the disks of a running machine: VirtualMachine.disks, and the jobs that take their time.

A disk has one job at a time. A job is a task of the machine's: it ends with the machine, is told of as events
(DiskJobChanged), and can be watched, cancelled and, for a mirror that follows, finished from anywhere. What a job does
to images is virtio's (virtio/backends/live.py, mirror.py). Loop thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from virtio.backends import live, mirror
from virtio.backends.image import ImageBlock
from virtio.backends.mirror import Changeover, CopyTarget
from virtio.backends.pace import JobPace
from virtio.devices.blk import BlockDevice
from vmm.changes import find_disk
from vmm.convert import format_size
from vmm.errors import ConfigError, StateError, VmmError, core_errors
from vmm.events import DiskJobChanged

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine

Kind = Literal["commit", "stream", "mirror"]
JobState = Literal["running", "ready", "done", "cancelled", "failed"]
EVENT_SECONDS = 0.2
"""Between two events that tell how far a job is."""


class DiskJob:
    """A commit, stream or mirror, from its start on. Its last state can be read after its end."""

    def __init__(self, vm: VirtualMachine, disk: str, kind: Kind, switch: Changeover | None) -> None:
        self._vm = vm
        self.disk, self.kind = disk, kind
        self.state: JobState = "running"
        self.done = self.total = 0
        """Bytes."""
        self.detail = ""
        """Why it failed."""
        self._failure: VmmError | None = None
        self._switch = switch
        self.pace = JobPace()
        """How fast it may go."""
        self._told = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Begin."""
        self._tell()
        self._task = asyncio.get_running_loop().create_task(self._run(work), name=f"{self.kind} {self.disk}")

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            with core_errors():
                await work()
        except asyncio.CancelledError:
            self.state = "cancelled"
        except VmmError as error:
            self.state, self.detail, self._failure = "failed", str(error), error
        else:
            self.state, self.done = "done", self.total
        self._tell()

    def tell(self, done: int, total: int) -> None:
        """So many bytes are done, of so many."""
        self.done, self.total = done, total
        ready = self._switch is not None and self._switch.ready.is_set()
        if ready and self.state == "running":
            self.state = "ready"
        elif time.monotonic() - self._told < EVENT_SECONDS:
            return
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._vm.report(DiskJobChanged(self.disk, self.kind, self.state, self.done, self.total, self.detail))

    @property
    def active(self) -> bool:
        """It has not ended."""
        return self.state in ("running", "ready")

    async def wait(self) -> None:
        """Until it has ended. Raises what it failed by; StateError if it was cancelled."""
        assert self._task is not None
        await asyncio.wait((self._task,))
        if self._failure is not None:
            raise self._failure
        if self.state == "cancelled":
            raise StateError(f"{self.disk}: the {self.kind} was cancelled")

    async def cancel(self) -> None:
        """End it; the disk is what it was, with what was done by now. Until it has ended. Idempotent."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait((self._task,))

    def finish(self, *, apart: bool = False) -> None:
        """Have a mirror that follows go over to its target, or with `apart` end with a copy of this moment there.
        StateError if this job is none, or has ended."""
        if self._switch is None or not self.active:
            raise StateError(f"{self.disk}: {self.kind} {self.state}; only a mirror that follows can be finished")
        self._switch.apart = apart
        self._switch.wanted.set()

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "disk": self.disk,
            "kind": self.kind,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "speed": self.pace.speed,
            "detail": self.detail,
            "error": type(self._failure).__name__ if self._failure is not None else "",
        }


class DiskJobs:
    """The jobs of one machine, the last of each disk."""

    def __init__(self) -> None:
        self._jobs: dict[str, DiskJob] = {}

    def on(self, disk: str) -> DiskJob | None:
        """The job that is at work on this disk."""
        job = self._jobs.get(disk)
        return job if job is not None and job.active else None

    def last(self, disk: str) -> DiskJob | None:
        """The job that is, or was last, at work on this disk."""
        return self._jobs.get(disk)

    def add(self, job: DiskJob) -> None:
        """It is the last one from now on."""
        self._jobs[job.disk] = job

    def active(self) -> list[DiskJob]:
        """Those that have not ended."""
        return [job for job in self._jobs.values() if job.active]

    async def aclose(self) -> None:
        """Cancel all. Idempotent."""
        for job in self.active():
            await job.cancel()


class MachineDisk:
    """A disk of a running machine. Calls that take their time go on beside the guest, and end as a whole when they are
    cancelled: what was done by then is done, and the disk is right. Raises ConfigError, HostError, StateError."""

    def __init__(self, vm: VirtualMachine, name: str) -> None:
        self._vm, self.name = vm, name

    @property
    def device(self) -> BlockDevice:
        """The device. StateError if it is gone."""
        device = self._vm.block_devices().get(self.name)
        if device is None:
            raise StateError(f"{self.name}: is not there any more")
        return device

    @property
    def chain(self) -> list[str]:
        """The images that the disk consists of, the one that is written first."""
        backend = self.device.backend
        return [layer.path for layer in backend.chain.layers] if isinstance(backend, ImageBlock) else []

    @property
    def job(self) -> DiskJob | None:
        """The job that is, or was last, at work on it."""
        return self._vm.disk_jobs.last(self.name)

    def _free(self) -> BlockDevice:
        self._vm.check_alive()
        self._vm.check_settled()
        device = self.device
        job = self._vm.disk_jobs.on(self.name)
        if job is not None:
            raise StateError(f"{self.name}: a {job.kind} is under way; cancel it or wait for its end")
        return device

    # At once.

    async def snapshot(self, path: Path | str) -> None:
        """From now on the guest writes into a new qcow2 image at `path`, over the present one, which stays as it is at
        this moment. Start the machine again with the new one."""
        target = Path(path).absolute()
        async with self._vm.change_lock:
            try:
                with core_errors():
                    await live.cover(self._free(), str(target))
            finally:
                self._moved()

    async def snapshot_internal(self, name: str) -> None:
        """Keep the disk's present content in the qcow2 image itself; the guest waits meanwhile."""
        _check_name(name)
        async with self._vm.change_lock:
            with core_errors():
                await live.snapshot(self._free(), name)

    async def delete_internal(self, name: str) -> None:
        """Forget such a snapshot; the guest waits meanwhile."""
        async with self._vm.change_lock:
            with core_errors():
                await live.delete_snapshot(self._free(), name)

    async def resize(self, size: int) -> None:
        """Make it larger, to a multiple of 512 bytes; the guest is told."""
        async with self._vm.change_lock:
            device = self._free()
            if size % 512 or size < device.capacity:
                raise ConfigError(
                    f"{self.name}: has {format_size(device.capacity)}; a running disk only grows, by whole sectors"
                )
            with core_errors():
                await live.resize(device, size)

    # Jobs.

    def start_commit(self, *, keep: bool = False) -> DiskJob:
        """Move what the top image holds into its backing file, and go on with that alone; with `keep` the top image
        stays, and holds what the guest has written since."""
        return self._start("commit", lambda device, job: live.commit(device, job.tell, drop=not keep, pace=job.pace))

    def start_stream(self) -> DiskJob:
        """Copy what the top image reads from its backing files into it, so that it needs none any more."""
        return self._start("stream", lambda device, job: live.stream(device, job.tell, job.pace))

    def start_mirror(
        self,
        path: Path | str,
        *,
        format: Literal["raw", "qcow2"] = "qcow2",
        follow: bool = False,
        shallow: bool = False,
        there: bool = False,
    ) -> DiskJob:
        """Copy the disk into a new image at `path`, which gets every later write too, and go over to it as soon as it
        has everything; with `follow` when DiskJob.finish says so. It has no backing file, or with `shallow` that of the
        present image. Until then the present image is whole; the new one is removed if this ends early. An image that
        is `there` already, as large as the disk, is written over and never removed."""
        target, switch = CopyTarget(str(Path(path).absolute()), format, shallow, there), Changeover(now=not follow)
        with core_errors():
            mirror.check(self._free(), target)
        return self._start(
            "mirror", lambda device, job: mirror.mirror(device, target, job.tell, switch, job.pace), switch
        )

    async def commit(self, *, keep: bool = False) -> None:
        """start_commit, to its end."""
        await self._finished(self.start_commit(keep=keep))

    async def stream(self) -> None:
        """start_stream, to its end."""
        await self._finished(self.start_stream())

    async def mirror(self, path: Path | str, *, format: Literal["raw", "qcow2"] = "qcow2") -> None:
        """start_mirror, to its end: the machine's disk is the new image then."""
        await self._finished(self.start_mirror(path, format=format))

    def _start(
        self, kind: Kind, work: Callable[[BlockDevice, DiskJob], Awaitable[None]], switch: Changeover | None = None
    ) -> DiskJob:
        device = self._free()

        async def whole() -> None:
            # A machine that is being saved has no job yet; one that is saved from now on has.
            async with self._vm.change_lock:
                pass
            try:
                await work(device, job)
            finally:
                self._moved()

        job = DiskJob(self._vm, self.name, kind, switch)
        self._vm.disk_jobs.add(job)
        job.start(whole)
        return job

    @staticmethod
    async def _finished(job: DiskJob) -> None:
        try:
            await job.wait()
        except asyncio.CancelledError:
            await job.cancel()
            raise

    def _moved(self) -> None:
        """The present configuration names the image that is written now."""
        device = self._vm.block_devices().get(self.name)
        part = self._vm.disk_part(self.name)
        if device is None or part is None or not isinstance(device.backend, ImageBlock):
            return
        top = device.backend.chain.top
        if Path(top.path).absolute() == part.path.absolute():
            return
        backing: str = part.backing
        folders = {Path(layer.path).resolve().parent for layer in device.backend.chain.layers}
        if len(folders) > 1:
            backing = "any"
        elif backing == "none":
            backing = "dir"
        self._vm.disk_moved(self.name, path=Path(top.path).absolute(), format=top.format, backing=backing, data=None)


def _check_name(name: str) -> None:
    if not name or len(name.encode(errors="replace")) > 255 or not name.isprintable():
        raise ConfigError(f"snapshot: {name!r} is no name; use 1 to 255 printable characters")


class MachineDisks(Mapping[str, MachineDisk]):
    """The disks of a running machine by id; `vda`, `vdb` … are understood too, in the order in which they came."""

    def __init__(self, vm: VirtualMachine) -> None:
        self._vm = vm

    def __getitem__(self, name: str) -> MachineDisk:
        devices = self._vm.block_devices()
        try:
            device = find_disk(self._vm, name)
        except ConfigError as error:
            raise KeyError(name) from error
        return MachineDisk(self._vm, next(key for key, value in devices.items() if value is device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._vm.block_devices())

    def __len__(self) -> int:
        return len(self._vm.block_devices())

    def find(self, name: str) -> MachineDisk:
        """`self[name]`, or a ConfigError that says which there are."""
        find_disk(self._vm, name)
        return self[name]
