"""File system device (virtio 1.2, 5.11): a directory of the host, shared with the guest.

`virtio._ring.FsEngine` answers the driver's FUSE messages on native threads; nothing of it holds the loop. What the
guest may do there is what this process may. Loop thread only.
"""

from __future__ import annotations

import asyncio
import os
import resource
import select
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from virtio import _ring
from virtio.constants import DeviceId
from virtio.device import Activation, Device
from virtio.errors import ConfigError, GuestError, HostError, StateError
from virtio.layouts import FsConfig
from virtio.queue import Queue
from virtio.state import U32, U64

TAG_BYTES = 36
NODES = 1 << 20
"""Files that a guest may know of at a time."""
CachePolicy = Literal["none", "auto", "always"]
VALID: dict[str, float] = {"none": 0.0, "auto": 1.0, "always": 86400.0}
"""For how many seconds the guest may believe what it was told of names and attributes."""
DESCRIPTORS = 32768
_MORE, _SIGNAL = 1, 2
HIPRIO = 0
"""The queue of requests that wait for no others (5.11.2)."""
I64 = Annotated[int, range(-(1 << 63), 1 << 63)]


@dataclass(frozen=True, slots=True)
class NodeState:
    """A file that the guest knows of. `name`: in its parent; empty if it has none any more."""

    id: U64
    parent: U64
    name: Annotated[bytes, range(256)]
    type: U32
    device: U64
    inode: U64
    born: I64
    born_ns: I64
    lookups: U64


@dataclass(frozen=True, slots=True)
class FileState:
    """What the guest has open: its number, its node, and how it was opened."""

    handle: U64
    node: U64
    flags: U32
    directory: bool


@dataclass(frozen=True, slots=True)
class FsState:
    """A share: the session that the driver began, and what it knows of. Files are found again by their names."""

    kind: ClassVar = "virtio-fs"
    version: ClassVar = 1
    minor: U32
    flags: U32
    device: U64
    inode: U64
    nodes: Annotated[tuple[NodeState, ...], range(NODES + 1)]
    files: Annotated[tuple[FileState, ...], range(NODES + 1)]


class FsDevice(Device):
    """`path`: the directory; `tag`: how the guest names it, at most 36 bytes of UTF-8.

    `owner`: (uid, gid) as which the guest sees the files that this process's user owns; None: as they are, and, if this
    process is root's, new files get the guest's. Raises ConfigError, HostError.
    """

    device_id = DeviceId.FS
    state_type = FsState

    def __init__(
        self,
        path: str | Path,
        tag: str,
        *,
        read_only: bool = False,
        owner: tuple[int, int] | None = None,
        cache: CachePolicy = "auto",
    ) -> None:
        super().__init__()
        name = tag.encode()
        # 5.11.4: "The tag is encoded in UTF-8 and padded with NUL bytes if shorter than the available space."
        if not 1 <= len(name) <= TAG_BYTES or b"\0" in name:
            raise ConfigError(f"share: the tag {tag!r} is not 1 to {TAG_BYTES} bytes long")
        self.path = Path(path)
        self.tag = tag
        self.queue_sizes = (128, 1024)
        self._restored = False
        self._reader: asyncio.AbstractEventLoop | None = None
        try:
            root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise ConfigError(f"{path} is not a directory; share the directory that it is in") from None
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error
        try:
            self._engine = _ring.FsEngine(
                root,
                read_only=read_only,
                owner=owner,
                valid=VALID[cache],
                keep_cache=cache == "always",
                descriptors=_descriptors(),
            )
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error
        finally:
            os.close(root)

    @property
    def counters(self) -> dict[str, int]:
        """So far: requests answered, those that failed, bytes of files read and written."""
        names = ("requests", "failures", "bytes_read", "bytes_written")
        return dict(zip(names, self._engine.counters, strict=True))

    def config(self) -> bytes:
        result: bytes = FsConfig.build(
            {"tag": self.tag.encode().ljust(TAG_BYTES, b"\0"), "num_request_queues": len(self.queue_sizes) - 1}
        )
        return result

    # Life

    def started(self, active: Activation) -> None:
        if not self._restored:
            self._engine.reset()
        self._restored = False
        self._reader = asyncio.get_running_loop()
        for descriptor in self._engine.descriptors():
            self._reader.add_reader(descriptor, self.guarded, self._reap)
        self._lend()
        for queue in active.queues:
            if queue.enabled:
                self.guarded(self.queue_notified, queue.index)

    def _lend(self) -> None:
        """vCPUs' threads may answer what is in the queues, if they may be used now; else no longer."""
        queues = self.active.queues if self.is_active else ()
        rings = {queue.index: queue.ring for queue in queues if queue.enabled}
        for index in range(len(self.queue_sizes)):
            ring = None if self.paused or self.synchronous else rings.get(index)
            if self._engine.lend(index, ring if isinstance(ring, _ring.Ring) else None) and self.is_active:
                self.active.interrupts.signal_queue(index)

    def answerer(self, index: int) -> object:
        """Device.answerer"""
        return self._engine.answerer(index)

    def queue_message(self, index: int, message: tuple[int, int] | None) -> None:
        """Device.queue_message"""
        self._engine.message(index, message)

    def pause(self) -> None:
        """Device.pause"""
        super().pause()
        self._lend()

    def resume(self) -> None:
        """Device.resume"""
        if self.is_active:
            self._paused = False
            self._lend()
        super().resume()

    def needs_reset(self) -> None:
        """Device.needs_reset"""
        super().needs_reset()
        self._lend()

    def deactivate(self) -> bool:
        """Device.deactivate"""
        for index in range(len(self.queue_sizes)):
            self._engine.lend(index, None)
        return super().deactivate()

    def stopped(self) -> bool:
        if self._reader is not None:
            for descriptor in self._engine.descriptors():
                self._reader.remove_reader(descriptor)
            self._reader = None
        return self._engine.cancel()

    def idle(self) -> bool:
        """Device.idle"""
        return self._engine.cancel()

    async def settle(self) -> None:
        while True:
            if self.is_active or self.idle():
                return
            await asyncio.sleep(0.001)

    async def aclose(self) -> None:
        await super().aclose()
        if not self._engine.cancel():
            await asyncio.to_thread(self._engine.close)  # waits for the system calls that run
        self._engine.close()

    def save_device(self) -> FsState:
        minor, flags, (device, inode), nodes, files = self._engine.save()
        found = {node[0]: NodeState(*node) for node in nodes}
        ordered: dict[int, NodeState] = {}
        for node in found.values():
            above = []
            while node.id not in ordered:
                above.append(node)
                if node.parent not in found:
                    break
                node = found[node.parent]
            ordered.update((one.id, one) for one in reversed(above))
        return FsState(minor, flags, device, inode, tuple(ordered.values()), tuple(FileState(*file) for file in files))

    def restore_device(self, state: FsState) -> None:
        nodes = [(n.id, n.parent, n.name, n.type, n.device, n.inode, n.born, n.born_ns, n.lookups) for n in state.nodes]
        if any(b"\0" in node.name for node in state.nodes):
            raise StateError("virtio-fs: a saved name has a zero byte")
        files = [(file.handle, file.node, file.flags, file.directory) for file in state.files]
        self._engine.restore(state.minor, state.flags, (state.device, state.inode), nodes, files)
        self._restored = True

    # Requests

    def queue_notified(self, index: int) -> None:
        if self.paused or self.is_due(self.queue_notified, index):
            return
        queue = self.active.queues[index]
        if not queue.enabled:
            return
        ring = queue.ring
        if not isinstance(ring, _ring.Ring):
            raise GuestError("the file system device works on native rings only")
        flags = self._engine.drain(ring, index == HIPRIO)
        if self.synchronous:
            flags = self._finish(queue, ring, flags)
        if flags & _SIGNAL:
            self.active.interrupts.signal_queue(index)
        self.progressed()
        if flags & _MORE:
            self.next_turn(self.queue_notified, index)

    def _finish(self, queue: Queue, ring: _ring.Ring, flags: int) -> int:
        """Wait, here and now, until every available request is answered; what is left of `flags`."""
        waiting = select.poll()
        for descriptor in self._engine.descriptors():
            waiting.register(descriptor, select.POLLIN)
        while queue.in_flight or flags & _MORE:
            if queue.in_flight:
                waiting.poll()
                self._reap()
            if flags & _MORE:
                flags = self._engine.drain(ring, queue.index == HIPRIO) | flags & _SIGNAL
        return flags

    def _reap(self) -> None:
        rings = self._engine.reap()
        for queue in self.active.queues:
            if any(map(queue.uses, rings)):
                self.active.interrupts.signal_queue(queue.index)
        self.progressed()


def _descriptors() -> int:
    """How many descriptors a share may keep: half of what this process may open, the rest is left to others.

    The soft limit, often 1024, is first raised as far as the hard limit and a few shares need it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * DESCRIPTORS if hard == resource.RLIM_INFINITY else min(4 * DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return DESCRIPTORS if soft == resource.RLIM_INFINITY else max(min((soft - 64) // 2, DESCRIPTORS), 16)
