"""The service `filesystem.Filesystem` of a sandbox: its files, by the agent's own tools. Loop thread."""

from __future__ import annotations

import asyncio
import posixpath
import secrets
import stat
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from connectrpc.code import Code
from connectrpc.errors import ConnectError

from vmm.errors import VmmError
from vmm.guest.tools import GuestEntry, GuestTools
from vmm.sandboxes.serve.hosted import Hosted
from vmm.sandboxes.serve.rpc import Service, hosted, keepalive_of, seconds_of, user_of
from vmm.sandboxes.serve.schema import FILESYSTEM_ENUMS
from vmm.sandboxes.serve.schema import filesystem as messages

READY_SECONDS = 60.0
MAX_WATCHERS = 64
"""Of one sandbox, that are asked for their events."""
MAX_EVENTS = 10_000
"""That wait for such an asker; older ones are dropped."""
_KINDS = {
    "created": "EVENT_TYPE_CREATE", "written": "EVENT_TYPE_WRITE", "removed": "EVENT_TYPE_REMOVE",
    "renamed": "EVENT_TYPE_RENAME", "changed": "EVENT_TYPE_CHMOD",
}  # fmt: skip


def _tools(context: Any) -> GuestTools:
    return GuestTools(hosted().vm.agent, user_of(context.request_headers))


def file_type(mode: int) -> str:
    """FileType by a mode of stat(2)."""
    if stat.S_ISDIR(mode):
        return "FILE_TYPE_DIRECTORY"
    if stat.S_ISLNK(mode):
        return "FILE_TYPE_SYMLINK"
    return "FILE_TYPE_FILE" if mode else "FILE_TYPE_UNSPECIFIED"


def _entry(entry: GuestEntry) -> Any:
    is_link = stat.S_ISLNK(entry.mode)
    found = messages["EntryInfo"](
        name=_plain(posixpath.basename(entry.path) or "/"),
        type=FILESYSTEM_ENUMS["FileType"][file_type(entry.target_mode if is_link else entry.mode)],
        path=_plain(entry.path),
        size=entry.size,
        mode=stat.S_IMODE(entry.mode),
        permissions=stat.filemode(entry.mode),
        owner=_plain(entry.owner),
        group=_plain(entry.group),
        is_symlink=is_link,
    )
    found.modified_time.FromNanoseconds(min(max(entry.mtime_ns, 0), 1 << 62))
    if is_link:
        found.symlink_target = _plain(entry.link)
    return found


def _plain(name: str) -> str:
    """Text that the wire can carry: bytes that are none become "?"."""
    return name.encode("utf-8", "replace").decode()


async def _stat(request: Any, context: Any) -> Any:
    return messages["StatResponse"](entry=_entry(await _tools(context).stat(request.path)))


async def _make_dir(request: Any, context: Any) -> Any:
    return messages["MakeDirResponse"](entry=_entry(await _tools(context).make_directory(request.path)))


async def _move(request: Any, context: Any) -> Any:
    return messages["MoveResponse"](entry=_entry(await _tools(context).rename(request.source, request.destination)))


async def _list_dir(request: Any, context: Any) -> Any:
    entries = await _tools(context).list(request.path, max(1, request.depth))
    return messages["ListDirResponse"](entries=[_entry(entry) for entry in entries])


async def _remove(request: Any, context: Any) -> Any:
    await _tools(context).remove(request.path)
    return messages["RemoveResponse"]()


def _event(root: str, kind: str, entry: GuestEntry, with_entry: bool) -> Any:
    name = posixpath.relpath(entry.path, root) if entry.path != root else posixpath.basename(root)
    event = messages["FilesystemEvent"](name=_plain(name), type=FILESYSTEM_ENUMS["EventType"][_KINDS[kind]])
    if with_entry and entry.mode:
        event.entry.CopyFrom(_entry(entry))
    return event


async def _watch_dir(request: Any, context: Any) -> AsyncIterator[Any]:
    answer, keepalive = messages["WatchDirResponse"], keepalive_of(context.request_headers)
    seconds = seconds_of(context)
    source = _tools(context).watch(request.path, request.recursive)
    root = ""
    pending: asyncio.Task[Any] | None = None
    try:
        async with asyncio.timeout(READY_SECONDS):
            _, first = await anext(source)
        root = first.path
        yield answer(start=messages["WatchDirResponse.StartEvent"]())
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        while True:
            pending = pending or asyncio.create_task(anext(source), name="watch")  # type: ignore[arg-type]
            left = None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
            wait = keepalive if left is None else min(left, keepalive)
            await asyncio.wait({pending}, timeout=wait)
            if not pending.done():
                if left is not None and left <= keepalive:
                    raise ConnectError(Code.DEADLINE_EXCEEDED, f"watched for {seconds:g} s")
                yield answer(keepalive=messages["WatchDirResponse.KeepAlive"]())
                continue
            done, pending = pending, None
            try:
                kind, entry = done.result()
            except StopAsyncIteration:
                return
            yield answer(filesystem=_event(root, kind, entry, request.include_entry))
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await source.aclose()  # type: ignore[attr-defined]


class AskedWatcher:
    """A directory that is watched for a client that asks for the events now and then."""

    def __init__(self, tools: GuestTools, request: Any) -> None:
        self.events: deque[Any] = deque(maxlen=MAX_EVENTS)
        self.failure: VmmError | None = None
        self.ready = asyncio.Event()
        self._request = request
        self._task = asyncio.create_task(self._run(tools), name="watcher")

    async def _run(self, tools: GuestTools) -> None:
        root = ""
        try:
            async for kind, entry in tools.watch(self._request.path, self._request.recursive):
                if kind == "ready":
                    root = entry.path
                    self.ready.set()
                else:
                    self.events.append(_event(root, kind, entry, self._request.include_entry))
        except VmmError as error:
            self.failure = error
        finally:
            self.ready.set()

    async def aclose(self) -> None:
        """End it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _watcher(request: Any) -> tuple[Hosted, AskedWatcher]:
    box = hosted()
    found = box.watchers.get(request.watcher_id)
    if found is None:
        raise ConnectError(Code.NOT_FOUND, f"watcher {request.watcher_id[:40]!r} not found")
    return box, found


async def _create_watcher(request: Any, context: Any) -> Any:
    box = hosted()
    if len(box.watchers) >= MAX_WATCHERS:
        raise ConnectError(Code.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watchers are there; remove one")
    watcher = AskedWatcher(_tools(context), request)
    await watcher.ready.wait()
    if watcher.failure is not None:
        raise watcher.failure
    name = secrets.token_hex(8)
    box.watchers[name] = watcher
    return messages["CreateWatcherResponse"](watcher_id=name)


async def _get_watcher_events(request: Any, _context: Any) -> Any:
    _, watcher = _watcher(request)
    found = []
    while watcher.events:
        found.append(watcher.events.popleft())
    if not found and watcher.failure is not None:
        raise watcher.failure
    return messages["GetWatcherEventsResponse"](events=found)


async def _remove_watcher(request: Any, _context: Any) -> Any:
    box, watcher = _watcher(request)
    del box.watchers[request.watcher_id]
    await watcher.aclose()
    return messages["RemoveWatcherResponse"]()


def service() -> Service:
    """The service as an ASGI application; rpc.CALL says for which sandbox."""
    return Service(
        "filesystem.Filesystem",
        messages,
        unary={
            "Stat": _stat,
            "MakeDir": _make_dir,
            "Move": _move,
            "ListDir": _list_dir,
            "Remove": _remove,
            "CreateWatcher": _create_watcher,
            "GetWatcherEvents": _get_watcher_events,
            "RemoveWatcher": _remove_watcher,
        },
        streamed={"WatchDir": _watch_dir},
        fed={},
    )
