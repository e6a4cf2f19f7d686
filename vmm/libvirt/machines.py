"""How the daemon handles machines: it starts each as a process of its own, asks it, and hears its events.

The daemon runs no guest. Each machine is a `vmm run` in a session of its own that neither the daemon's end nor its
terminal reaches; it is found by its name in the registry, and spoken to by its control socket. Loop thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiofiles

from vmm.errors import HostError, error_from, os_reason
from vmm.management.registry import RegistryEntry

LINE_LIMIT = 1 << 20
ANSWER_SECONDS = 15.0
START_SECONDS = 120.0
"""How long a machine may take to be built."""
LAST_BYTES = 4096
"""Of a log, in which its last line is looked for."""


class ControlClient:
    """One connection to a machine's control socket."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._name, self._reader, self._writer = name, reader, writer

    @classmethod
    async def connect(cls, entry: RegistryEntry) -> ControlClient:
        """Raises OSError."""
        reader, writer = await asyncio.open_unix_connection(str(entry.control), limit=LINE_LIMIT)
        return cls(entry.name, reader, writer)

    async def ask(self, command: str, patience: float = ANSWER_SECONDS, **values: Any) -> dict[str, Any]:
        """Its answer. Raises what the machine raised; HostError if it does not answer."""
        try:
            async with asyncio.timeout(patience):
                self._writer.write(json.dumps({"command": command, **values}).encode() + b"\n")
                await self._writer.drain()
                line = await self._reader.readline()
        except TimeoutError:
            raise HostError(f"{self._name}: the machine does not answer") from None
        except (OSError, ValueError) as error:
            raise HostError(f"{self._name}: {error}") from error
        if not line:
            raise HostError(f"{self._name}: the machine ended before it answered")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok", False):
            raise error_from(answer.get("kind"), str(answer.get("error")))
        return answer

    async def next_event(self) -> dict[str, Any] | None:
        """After `ask("events")`: what happens next; None when the machine has gone."""
        try:
            line = await self._reader.readline()
            event = json.loads(line) if line else None
        except (OSError, ValueError):
            return None
        return event if isinstance(event, dict) else None

    def close(self) -> None:
        """Idempotent."""
        self._writer.close()


async def ask(entry: RegistryEntry, command: str, patience: float = ANSWER_SECONDS, **values: Any) -> dict[str, Any]:
    """One question on a connection of its own. Raises VmmError."""
    try:
        control = await ControlClient.connect(entry)
    except OSError as error:
        raise HostError(f"{entry.name}: {os_reason(error)}") from error
    try:
        return await control.ask(command, patience, **values)
    finally:
        control.close()


class Process:
    """A machine's process that this daemon started. `ended` is set when it has gone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = asyncio.Event()
        self._descriptor = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._descriptor, self._reap)

    @classmethod
    def start(cls, command: Sequence[str], log: Path) -> Process:
        """Run it in a session of its own, with its messages in a log. Raises OSError."""
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, descriptor, 2),
            ]
            defaults = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE}
            pid = os.posix_spawn(
                command[0], list(command), os.environ, file_actions=actions, setsid=True, setsigdef=defaults
            )
        finally:
            os.close(descriptor)
        return cls(pid)

    def kill(self) -> None:
        """At once."""
        if not self.ended.is_set():
            with suppress(OSError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def forget(self) -> None:
        """The process goes on; this daemon does not look any more. Idempotent."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _reap(self) -> None:
        with suppress(OSError):
            os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
        self.forget()
        self.ended.set()


def waiting(logs: Path) -> list[tuple[int, str]]:
    """Processes `vmm receive` that were started with messages in this directory, with the names of their machines.
    Those to which a machine has come are among them."""
    found = []
    directory = os.path.realpath(logs)
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            log = Path(os.readlink(place / "fd" / "2"))
            if str(log.parent) == directory and b"receive" in (place / "cmdline").read_bytes().split(b"\0"):
                found.append((int(place.name), log.name.removesuffix(".log")))
    return found


def end_waiting(pid: int, name: str) -> None:
    """End a process that waits for a machine of that name, if the number still is such a process's."""
    with suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"receive" in words and name.encode() in words:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


async def last_words(log: Path) -> str:
    """The last line that a machine's process wrote, without who says it."""
    try:
        async with aiofiles.open(log, "rb") as file:
            size = await file.seek(0, os.SEEK_END)
            await file.seek(max(size - LAST_BYTES, 0))
            said = await file.read(LAST_BYTES)
    except OSError:
        return ""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("vmm: ").strip() if lines else ""
