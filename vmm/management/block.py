"""The control-socket operation `block`: changes of a running machine's disks.

    {"command": "block", "action": "list"}                                          -> {"ok": true, "disks": […]}
    {"command": "block", "action": "look", "disk": "vda"}                           -> {"ok": true, "chain": […], …}
    {"command": "block", "action": "snapshot", "disk": "vda", "path": "/new.qcow2"} -> {"ok": true} when it is done
    …, "action": "snapshot-internal" | "delete-internal", "name": "NAME"            -> likewise
    …, "action": "resize", "size": 1073741824                                       -> likewise
    …, "action": "commit", "keep": false | "stream"                                 -> {"ok": true, "job": {…}} at once
    …, "action": "mirror", "path": "/new.raw", "format": "raw", "follow": true      -> likewise
    …, "action": "job" | "cancel" | "finish"                                        -> {"ok": true, "job": {…}}
    …, "action": "speed", "speed": 1048576                                          -> likewise: bytes a second, 0: any

A mirror may be "shallow", and into an image that is "there"; every job may begin with a "speed". A job goes on when its
client leaves: "job" tells how far it is, "cancel" waits for its end, "finish" has a mirror that follows go over to its
target, or with "apart" leave a copy there. Events of the machine tell the same. Loop thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm.errors import ConfigError, StateError

if TYPE_CHECKING:
    from vmm.live import MachineDisk
    from vmm.vm import VirtualMachine


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 4096:
        raise ConfigError(f"block: {key}: a text is needed")
    return value


def _path(request: dict[str, Any]) -> Path:
    path = Path(_text(request, "path"))
    if not path.is_absolute():
        raise ConfigError(f"block: path: {path}: give it from the root on")
    return path


def _flag(request: dict[str, Any], key: str) -> bool:
    value = request.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"block: {key}: true or false is needed")
    return value


def _speed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ConfigError("block: speed: a number of bytes a second is needed")
    return value


async def block(vm: VirtualMachine, request: dict[str, Any]) -> dict[str, Any]:
    """Raises VmmError."""
    action = request.get("action")
    if action == "list":
        return {"disks": [_described(disk) for disk in vm.disks.values()]}
    disk = vm.disks.find(_text(request, "disk"))
    job = None
    speed = _speed(request.get("speed", 0))
    match action:
        case "look":
            pass
        case "snapshot":
            await disk.snapshot(_path(request))
        case "snapshot-internal":
            await disk.snapshot_internal(_text(request, "name"))
        case "delete-internal":
            await disk.delete_internal(_text(request, "name"))
        case "resize":
            size = request.get("size")
            if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 62:
                raise ConfigError("block: size: a number of bytes is needed")
            await disk.resize(size)
        case "commit":
            job = disk.start_commit(keep=_flag(request, "keep"))
        case "stream":
            job = disk.start_stream()
        case "mirror":
            format = request.get("format", "qcow2")
            if format not in ("raw", "qcow2"):
                raise ConfigError("block: format: raw or qcow2")
            job = disk.start_mirror(
                _path(request), format=format, follow=_flag(request, "follow"),
                shallow=_flag(request, "shallow"), there=_flag(request, "there"),
            )  # fmt: skip
        case "job" | "cancel" | "finish" | "speed":
            job = disk.job
            if job is None:
                raise StateError(f"{disk.name}: there is no job")
            if action == "cancel":
                await job.cancel()
            elif action == "finish":
                job.finish(apart=_flag(request, "apart"))
        case _:
            raise ConfigError(f"block: unknown action {str(action)[:40]!r}")
    if job is not None and "speed" in request:
        job.pace.speed = speed
    return _described(disk) if job is None else {"job": job.describe()}


def _described(disk: MachineDisk) -> dict[str, Any]:
    job = disk.job
    return {
        "id": disk.name,
        "size": disk.device.capacity,
        "chain": disk.chain,
        "job": job.describe() if job is not None and job.active else None,
    }
