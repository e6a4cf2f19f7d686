"""One program in the guest: its streams, its input, its end. One connection to the agent is one program.

The guest is hostile: a frame that breaks the protocol raises GuestError, and what it sends is buffered only up to a
limit; then the link waits for the reader. Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal as signals
import struct
from collections import deque
from collections.abc import AsyncIterator
from typing import Self

from cpu.values import dataclass
from vmm.errors import GuestError
from vmm.guest.frames import (
    CREDIT,
    ERROR,
    EXIT,
    HEAD,
    MAX_FRAME,
    RESIZE,
    SIGNAL,
    STARTED,
    STDERR,
    STDIN,
    STDOUT,
    USAGE,
    USED,
    WINDOW,
    frame,
)

BUFFER = 1 << 20
"""Bytes of a stream that wait for their reader before the link does."""
OVERHEAD = 64
"""What a frame takes of that besides its bytes, so that a guest that sends them one at a time takes no more memory."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a program in the guest ended. `status` is its exit status, or 128 + the signal that killed it."""

    status: int
    stdout: bytes
    stderr: bytes
    cpu_seconds: float = 0.0
    """User and system time, with that of children that the program waited for."""
    memory_peak: int = 0
    """Bytes of memory that it, or such a child, had at most."""

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


@dataclass(frozen=True, slots=True)
class RunUse:
    """What a run with limits used, with all that it started."""

    cpu_us: int
    disk_read: int
    """Bytes that came from disks for it."""
    disk_written: int
    """Bytes that went to disks for it so far; what a file system keeps in memory is not among them."""
    disk_used: int
    """Bytes that the root file system holds more."""
    hit: int
    """The limit that ended it: 0 none, 1 memory, 2 processes, 3 disk."""


class GuestStream:
    """Bytes from the program: read() or iterate. Holds at most BUFFER bytes, and a frame, before the link waits."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def read(self, limit: int = BUFFER) -> bytes:
        """The next bytes, at most `limit`; b"" at the end."""
        while not self._parts and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if not self._parts:
            return b""
        # A frame at a time: joining them costs more than the calls (tests.bench agent).
        part = self._parts.popleft()
        if len(part) > limit:
            self._parts.appendleft(part[limit:])
            part = part[:limit]
            self._size -= limit
        else:
            self._size -= len(part) + OVERHEAD
        if self._size < BUFFER:
            self._room.set()
        return part

    async def read_all(self, limit: int | None = None) -> bytes:
        """Everything until the end; if that is more than `limit` bytes, the first of them, and the rest is thrown
        away."""
        if limit is None:
            return b"".join([part async for part in self])
        kept = bytearray()
        async for part in self:
            kept += part[: limit - len(kept)]
        return bytes(kept)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def _feed(self, data: bytes) -> None:
        if not data:
            return
        await self._room.wait()
        self._parts.append(data)
        self._size += len(data) + OVERHEAD
        if self._size >= BUFFER:
            self._room.clear()
        self._changed.set()

    def _end(self) -> None:
        self._ended = True
        self._changed.set()


class GuestProcess:
    """A program that runs in the guest. Use in `async with`: leaving it early kills the program.

    Its end is known as soon as it has ended itself, with everything that it wrote; what it left running in the guest
    runs on, and what that writes afterwards is thrown away (as with docker exec).
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, window: int = WINDOW) -> None:
        """`window`: bytes of input that the agent has room for."""
        self._reader = reader
        self._writer = writer
        self.stdout = GuestStream()
        self.stderr = GuestStream()
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.cpu_seconds = 0.0
        """Known when the program has ended: its user and system time."""
        self.memory_peak = 0
        """Known when the program has ended: bytes of memory that it had at most."""
        self.use: RunUse | None = None
        """Known when a program with limits has ended."""
        self._number: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._window = window
        self._credit = asyncio.Event()
        self._task = asyncio.create_task(self._pump(), name="guest-process")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def write(self, data: bytes) -> None:
        """Standard input. Waits while the program does not read; ignored when it has ended."""
        view = memoryview(data)
        while view and not self._status.done():
            while not self._window and not self._status.done():
                self._credit.clear()
                await self._credit.wait()
            part = view[: min(self._window, MAX_FRAME)]
            self._window -= len(part)
            view = view[len(part) :]
            await self._send(STDIN, bytes(part))

    async def close_stdin(self) -> None:
        """End of standard input (on a terminal: Ctrl-D)."""
        await self._send(STDIN, b"")

    async def send_signal(self, number: int) -> None:
        """Send a signal to the program's process group; also while the program does not read its input."""
        await self._send(SIGNAL, bytes([signals.Signals(number)]))

    async def resize(self, rows: int, columns: int) -> None:
        """The terminal's new size."""
        await self._send(RESIZE, struct.pack("<HH", rows, columns))

    async def number(self) -> int:
        """The program's process in the guest, if it was started with NUMBERED. GuestError if the guest is gone."""
        return await asyncio.shield(self._number)

    async def wait(self) -> int:
        """The exit status, or 128 + signal. GuestError if the guest went away before."""
        return await asyncio.shield(self._status)

    async def communicate(self, data: bytes | None = None, *, limit: int | None = None) -> ExecResult:
        """Feed `data` (None: nothing) and read until the end. `limit`: bytes of each output that are kept."""
        async with asyncio.TaskGroup() as group:
            stdout = group.create_task(self.stdout.read_all(limit), name="guest-stdout")
            stderr = group.create_task(self.stderr.read_all(limit), name="guest-stderr")
            group.create_task(self._feed(data), name="guest-stdin")
        return ExecResult(await self.wait(), stdout.result(), stderr.result(), self.cpu_seconds, self.memory_peak)

    @property
    def ended(self) -> bool:
        """The program, or the way to it, has ended."""
        return self._status.done()

    def abandon(self) -> None:
        """End the connection at once: who waits for the program's output or for room for its input waits no longer."""
        self._task.cancel()
        self._writer.transport.abort()
        self._status.cancel()
        self._end()

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
        self._writer.write(frame(kind, payload))
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def _end(self) -> None:
        self.stdout._end()
        self.stderr._end()
        self._credit.set()

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
            if not self._number.done():
                self._number.set_exception(GuestError("the program did not start"))
                self._number.exception()
            self._end()

    async def _frame(self) -> None:
        kind, length = HEAD.unpack(await self._reader.readexactly(HEAD.size))
        if length > MAX_FRAME:
            raise GuestError(f"the guest agent sent a frame of {length} bytes; at most {MAX_FRAME} are allowed")
        payload = await self._reader.readexactly(length)
        if kind == STDOUT:
            await self.stdout._feed(payload)
        elif kind == STDERR:
            await self.stderr._feed(payload)
        elif kind == CREDIT and length == 4:
            # No more than was taken away: a guest cannot make us send without bound.
            self._window = min(WINDOW, self._window + int.from_bytes(payload, "little"))
            self._credit.set()
        elif kind == USAGE and length == 16:
            microseconds, kib = struct.unpack("<QQ", payload)
            self.cpu_seconds, self.memory_peak = microseconds / 1e6, kib << 10
        elif kind == STARTED and length == 4 and not self._number.done():
            self._number.set_result(int.from_bytes(payload, "little"))
        elif kind == USED and length == 40:
            self.use = RunUse(*struct.unpack("<5Q", payload))
        elif kind == EXIT and length == 2:
            self._status.set_result(128 + payload[1] if payload[0] else payload[1])
        elif kind == ERROR:
            raise GuestError(f"the guest agent: {payload.decode(errors='replace')[:200]}")
        else:
            raise GuestError(f"the guest agent sent an unknown frame {kind:#x} of {length} bytes")
