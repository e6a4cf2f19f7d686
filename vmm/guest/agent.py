"""The host's side of the guest agent: run programs in the guest, feed and read them, copy files.

One connection is one program (images/init/agent.c describes the frames). A connection comes from a function that the
caller gives, so that this module knows neither vsock nor sockets. The guest is hostile: a frame that breaks the
protocol raises GuestError, and what it sends is buffered only up to a limit; then the link waits for the reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal as signals
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vmm.errors import ConfigError, GuestError

AGENT_PORT = 1024
READY_PORT = 1025
EXEC, STDIN, SIGNAL, RESIZE, STDOUT, STDERR, EXIT, ERROR = 1, 2, 3, 4, 0x81, 0x82, 0x83, 0x84
MAX_FRAME = 65536
CHUNK = 32768
BUFFER = 1 << 20
COPY_LIMIT = 4 << 30
"""Bytes that copy_out takes from a guest unless it is told otherwise."""

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a program in the guest ended. `status` is its exit status, or 128 + the signal that killed it."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output, decoded, without trailing white space."""
        return self.stdout.decode(errors="replace").rstrip()

    def check(self) -> Self:
        """Itself, if the status is 0; else GuestError with the last line of standard error."""
        if self.status:
            last = self.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise GuestError(f"the program in the guest ended with status {self.status}: {last[0]}")
        return self


class GuestStream:
    """Bytes from the program: read() or iterate. Holds at most BUFFER bytes before the link waits."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ended = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def read(self, limit: int = BUFFER) -> bytes:
        """The next bytes, at most `limit`; b"" at the end."""
        while not self._data and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        data = bytes(self._data[:limit])
        del self._data[:limit]
        if len(self._data) < BUFFER:
            self._room.set()
        return data

    async def read_all(self) -> bytes:
        """Everything until the end."""
        return b"".join([part async for part in self])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def _feed(self, data: bytes) -> None:
        await self._room.wait()
        self._data += data
        if len(self._data) >= BUFFER:
            self._room.clear()
        self._changed.set()

    def _end(self) -> None:
        self._ended = True
        self._changed.set()


class GuestProcess:
    """A program that runs in the guest. Use in `async with`: leaving it early kills the program."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.stdout = GuestStream()
        self.stderr = GuestStream()
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._pump(), name="guest-process")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def write(self, data: bytes) -> None:
        """Standard input. Waits while the program does not read; ignored when it has ended."""
        for at in range(0, len(data), CHUNK):
            await self._send(STDIN, data[at : at + CHUNK])

    async def close_stdin(self) -> None:
        """End of standard input (on a terminal: Ctrl-D)."""
        await self._send(STDIN, b"")

    async def send_signal(self, number: int) -> None:
        """Send a signal to the program's process group."""
        await self._send(SIGNAL, bytes([signals.Signals(number)]))

    async def resize(self, rows: int, columns: int) -> None:
        """The terminal's new size."""
        await self._send(RESIZE, struct.pack("<HH", rows, columns))

    async def wait(self) -> int:
        """The exit status, or 128 + signal. GuestError if the guest went away before."""
        return await asyncio.shield(self._status)

    async def communicate(self, data: bytes | None = None) -> ExecResult:
        """Feed `data` (None: nothing) and read until the end."""
        async with asyncio.TaskGroup() as group:
            stdout = group.create_task(self.stdout.read_all(), name="guest-stdout")
            stderr = group.create_task(self.stderr.read_all(), name="guest-stderr")
            group.create_task(self._feed(data), name="guest-stdin")
        return ExecResult(await self.wait(), stdout.result(), stderr.result())

    @property
    def ended(self) -> bool:
        """The program, or the way to it, has ended."""
        return self._status.done()

    def abandon(self) -> None:
        """End the connection at once: who waits for the program's output or for room for its input waits no longer."""
        self._task.cancel()
        self._writer.transport.abort()
        self._status.cancel()
        self.stdout._end()
        self.stderr._end()

    async def aclose(self) -> None:
        """End the connection; the agent kills what still runs. Idempotent."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        if self._status.done() and not self._status.cancelled():
            self._status.exception()
        else:
            self._status.cancel()

    async def _feed(self, data: bytes | None) -> None:
        if data:
            await self.write(data)
        await self.close_stdin()

    async def _send(self, kind: int, payload: bytes) -> None:
        if self._status.done():
            return
        self._writer.write(struct.pack("<BI", kind, len(payload)) + payload)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def _pump(self) -> None:
        try:
            while not self._status.done():
                await self._frame()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            failure = GuestError("the guest ended the connection before the program did")
            failure.__cause__ = error
            self._status.set_exception(failure)
        except GuestError as error:
            self._status.set_exception(error)
        finally:
            self.stdout._end()
            self.stderr._end()

    async def _frame(self) -> None:
        kind, length = struct.unpack("<BI", await self._reader.readexactly(5))
        if length > MAX_FRAME:
            raise GuestError(f"the guest agent sent a frame of {length} bytes; at most {MAX_FRAME} are allowed")
        payload = await self._reader.readexactly(length)
        if kind == STDOUT:
            await self.stdout._feed(payload)
        elif kind == STDERR:
            await self.stderr._feed(payload)
        elif kind == EXIT and length == 2:
            self._status.set_result(128 + payload[1] if payload[0] else payload[1])
        elif kind == ERROR:
            raise GuestError(f"the guest agent: {payload.decode(errors='replace')[:200]}")
        else:
            raise GuestError(f"the guest agent sent an unknown frame {kind:#x} of {length} bytes")


class Agent:
    """The guest's agent. With `waits`, programs wait until set_ready() says that it listens."""

    def __init__(self, connect: Connect, *, waits: bool = False) -> None:
        self._connect = connect
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_ready: Callable[[], None] | None = None
        """Called when the guest says that its agent listens."""
        if not waits:
            self._ready.set_result(None)

    def set_ready(self) -> None:
        """The guest said that its agent listens."""
        if not self._ready.done():
            self._ready.set_result(None)
            if self.on_ready is not None:
                self.on_ready()

    @property
    def ready(self) -> bool:
        """The guest has said that its agent listens."""
        return self._ready.done() and self._ready.exception() is None

    def restarted(self) -> None:
        """The guest boots again: whoever wants the agent waits until it listens again."""
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()

    async def wait_ready(self) -> None:
        """Until the agent listens. GuestError if the machine ends before."""
        await asyncio.shield(self._ready)

    async def start_process(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        terminal: tuple[int, int] | None = None,
    ) -> GuestProcess:
        """Start a program; with `terminal` (rows, columns) on a terminal of its own. ConfigError for what no EXEC can
        carry, GuestError if the guest does not answer."""
        request = _exec_request(arguments, env or {}, cwd, terminal)
        await self.wait_ready()
        reader, writer = await self._dial()
        writer.write(struct.pack("<BI", EXEC, len(request)) + request)
        return GuestProcess(reader, writer)

    async def resize_console(self, rows: int, columns: int) -> None:
        """Tell the guest how large the terminal is on which its console is shown; a shell there hears of the change.
        GuestError if the guest does not answer."""
        await self.wait_ready()
        _, writer = await self._dial()
        with contextlib.suppress(OSError):
            writer.write(struct.pack("<BIHH", RESIZE, 4, rows, columns))
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await self._connect()
        except OSError as error:
            raise GuestError("the guest agent does not answer") from error

    async def exec(
        self,
        *arguments: str,
        input: bytes | None = None,  # noqa: A002 - subprocess's name
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout: float | None = None,
        check: bool = False,
    ) -> ExecResult:
        """Run a program to its end. TimeoutError after `timeout` seconds (it is killed); with `check`, GuestError if
        its status is not 0."""
        async with asyncio.timeout(timeout):
            async with await self.start_process(*arguments, env=env, cwd=cwd) as process:
                result = await process.communicate(input)
        return result.check() if check else result

    async def copy_in(self, source: Path | str, target: str) -> None:
        """Copy a file of the host to `target`, a path in the guest, or what is in a directory into the directory
        `target`; modes go along, owner is root. ConfigError if it cannot be read, GuestError if the guest fails."""
        from vmm.guest.files import copy_in

        await copy_in(self, Path(source), target)

    async def copy_out(self, source: str, target: Path | str, *, limit: int = COPY_LIMIT) -> None:
        """Copy a file of the guest to a path of the host, or what is in a directory into the directory `target`; modes
        go along, links come as they are, other kinds of files not at all. `limit`: bytes that the guest may send.
        ConfigError if the host cannot write, GuestError if the guest fails or sends what was not asked for."""
        from vmm.guest.files import copy_out

        await copy_out(self, source, Path(target), limit)

    def close(self) -> None:
        """The machine is gone: whoever waits for the agent learns it."""
        if not self._ready.done():
            self._ready.set_exception(GuestError("the machine ended before its agent was ready"))
            self._ready.exception()


def _exec_request(
    arguments: Sequence[str], env: Mapping[str, str], cwd: str, terminal: tuple[int, int] | None
) -> bytes:
    if not arguments:
        raise ConfigError("no program to run in the guest: give its name")
    strings = [cwd, *arguments, *(f"{name}={value}" for name, value in env.items())]
    if any("\0" in item for item in strings):
        raise ConfigError("arguments and environment of a program must not contain zero bytes")
    rows, columns = terminal or (0, 0)
    head = struct.pack("<BHHHH", terminal is not None, rows, columns, len(arguments), len(env))
    request = head + b"".join(item.encode() + b"\0" for item in strings)
    if len(request) > MAX_FRAME or max(len(arguments), len(env)) > 1024:
        raise ConfigError(f"arguments and environment take {len(request)} bytes; at most {MAX_FRAME} can be sent")
    return request


__all__ = ["AGENT_PORT", "READY_PORT", "Agent", "ExecResult", "GuestProcess", "GuestStream"]
