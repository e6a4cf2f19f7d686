"""The console of one machine: a hub between the guest's port and any number of watchers.

Output goes into one bounded ring; each watcher is a cursor in it. A watcher that falls behind skips (sockets) or, if
it must not lose anything (standard output, a lossless reader), holds the whole machine until it has caught up, as a
full pipe holds a program. Input is queued up to a limit; beyond it the sources are asked to wait.
Loop thread. Knows no device, no core; the terminal is vmm/console/terminal.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

from cpu.values import U64, dataclass
from vmm.errors import ConfigError, HostError, StateError, VmmError, os_reason

REPLAY = 64 << 10
"""Bytes of recent output that a late watcher gets."""
RING = 1 << 20
"""Bytes of output that are kept for watchers that are behind."""
PRESSURE_HIGH, PRESSURE_LOW = 256 << 10, 32 << 10
"""A lossless watcher this many bytes behind holds the machine; at the lower mark it goes on."""
INPUT_HIGH, INPUT_LOW = 64 << 10, 16 << 10
"""Queued input at which sources must wait, and below which they may go on."""


class ConsoleClosed(VmmError, EOFError):
    """The machine ended and its output has been read to the end."""


class ConsoleTimeout(VmmError, TimeoutError):
    """The expected text did not come in time; the message ends with the last lines that came."""


class Watcher(Protocol):
    """Somebody who follows the output from `position` (bytes since the start) on."""

    position: int
    lossless: bool

    def wake(self) -> None:
        """There is output after `position`, or the hub was closed."""


class ConsolePort:
    """One device's end of the hub (vmm.machine.interfaces.CharacterPort)."""

    def __init__(self, hub: ConsoleHub) -> None:
        self._hub = hub
        self.ready: Callable[[], None] | None = None

    def write(self, data: bytes) -> None:
        """vmm.machine.interfaces.CharacterPort"""
        self._hub.wrote(self, data)

    async def relieved(self) -> None:
        """vmm.machine.interfaces.CharacterPort"""
        await self._hub.relieved()

    def read(self, limit: int) -> bytes:
        """vmm.machine.interfaces.CharacterPort: nothing while another port is the active one."""
        return self._hub.read(limit) if self._hub.active is self else b""

    def set_receiver(self, ready: Callable[[], None]) -> None:
        """vmm.machine.interfaces.CharacterPort"""
        self.ready = ready
        self._hub.announce()

    def event(self, kind: str) -> None:
        """vmm.machine.interfaces.CharacterPort"""
        if self._hub.on_event is not None:
            self._hub.on_event(kind)


@dataclass(frozen=True, slots=True)
class ConsoleRingState:
    """The end of the console's output, and how many bytes there were in all."""

    kind: ClassVar = "console-ring"
    version: ClassVar = 1
    total: U64
    text: Annotated[bytes, range((1 << 16) + 1)]


class ConsoleHub:
    """Devices' ports on one side, watchers and input sources on the other.

    Output of all ports joins. Input goes to the active port: of those that take any, the one that wrote last; before
    that, the first.
    """

    def __init__(self) -> None:
        self._ring = bytearray()
        self.total = 0
        """Bytes written since the start."""
        self.closed = False
        self._watchers: list[Watcher] = []
        self._input = bytearray()
        self.active: ConsolePort | None = None
        self._blocked: list[Callable[[], None]] = []
        self.on_pressure: Callable[[bool], None] | None = None
        """Called with True when the machine should be held, with False when it may go on."""
        self.on_event: Callable[[str], None] | None = None
        self._pressed = False
        self._relieved = asyncio.Event()

    # State.

    def save(self) -> ConsoleRingState:
        """What a late watcher would see."""
        return ConsoleRingState(self.total, bytes(self._ring[-REPLAY:]))

    def restore(self, state: ConsoleRingState) -> None:
        """Before anything was written."""
        if state.total < len(state.text):
            raise StateError("console: fewer bytes were written than are kept")
        self._ring[:] = state.text
        self.total = state.total

    # The guest's side.

    def port(self) -> ConsolePort:
        """A new port, for one device of the machine as it last booted."""
        port = ConsolePort(self)
        if self.active is None:
            self.active = port
        return port

    def disconnect(self) -> None:
        """The devices are gone; the next port is the first again."""
        self.active = None

    def wrote(self, port: ConsolePort, data: bytes) -> None:
        """Output of the guest through this port, which becomes the active one."""
        if self.active is not port and port.ready is not None:
            self.active = port
            self.announce()
        self.write(data)

    def announce(self) -> None:
        """Tell the active port of waiting input."""
        if self._input and self.active is not None and self.active.ready is not None:
            self.active.ready()

    def write(self, data: bytes) -> None:
        """Output of the guest."""
        self._ring += data
        self.total += len(data)
        if len(self._ring) > 2 * RING:
            self._trim()
        for watcher in tuple(self._watchers):
            watcher.wake()
        self._check_pressure()

    async def relieved(self) -> None:
        """Wait while a lossless watcher is behind; not once the hub is closed."""
        while self._pressed and not self.closed:
            self._relieved.clear()
            await self._relieved.wait()

    def read(self, limit: int) -> bytes:
        """Input for the guest."""
        data = bytes(self._input[:limit])
        del self._input[:limit]
        if self._blocked and len(self._input) <= INPUT_LOW:
            blocked, self._blocked = self._blocked, []
            for resume in blocked:
                resume()
        return data

    # The watchers' side.

    @property
    def pressed(self) -> bool:
        """A lossless watcher is behind: the machine should be held."""
        return self._pressed

    @property
    def start(self) -> int:
        """Position of the oldest byte that is still there."""
        return self.total - len(self._ring)

    @property
    def replay_position(self) -> int:
        """Where a late watcher begins."""
        return max(self.start, self.total - REPLAY)

    def output(self, position: int, limit: int) -> bytes:
        """Up to `limit` bytes from `position` (not before `start`) on."""
        at = position - self.start
        return bytes(memoryview(self._ring)[at : at + limit])

    def watch(self, watcher: Watcher, *, first: bool = False) -> None:
        """Wake this watcher from now on; `first`: before those that are there already."""
        self._watchers.insert(0 if first else len(self._watchers), watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Forget it. Idempotent."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            self._check_pressure()

    def advanced(self, watcher: Watcher) -> None:
        """A watcher moved its position on."""
        if self._pressed and watcher.lossless:
            self._check_pressure()

    def feed(self, data: bytes, resume: Callable[[], None] | None = None) -> bool:
        """Input from a source. False: the queue is full; wait until `resume` is called (the data is taken). Once the
        machine ended it goes nowhere."""
        if self.closed:
            return True
        self._input += data
        self.announce()
        if len(self._input) < INPUT_HIGH:
            return True
        if resume is not None and resume not in self._blocked:
            self._blocked.append(resume)
        return False

    def close(self) -> None:
        """No more output will come."""
        if not self.closed:
            self.closed = True
            self._relieved.set()
            for watcher in tuple(self._watchers):
                watcher.wake()
            blocked, self._blocked = self._blocked, []
            for resume in blocked:
                resume()

    def _trim(self) -> None:
        keep = RING
        for watcher in self._watchers:
            if watcher.lossless:
                keep = max(keep, self.total - watcher.position)
        del self._ring[: max(0, len(self._ring) - keep)]

    def _check_pressure(self) -> None:
        behind = max((self.total - each.position for each in self._watchers if each.lossless), default=0)
        pressed = behind > (PRESSURE_LOW if self._pressed else PRESSURE_HIGH)
        if pressed != self._pressed:
            self._pressed = pressed
            self._relieved.set()
            if self.on_pressure is not None:
                self.on_pressure(pressed)


class ConsoleReader:
    """Reads and searches the output. `lossless`: the machine is held rather than let output pass unread."""

    def __init__(self, hub: ConsoleHub, *, lossless: bool = False, from_start: bool = True) -> None:
        self._hub = hub
        self.lossless = lossless
        self.position = hub.start if from_start else hub.total
        self.skipped = 0
        """Bytes of output that were gone before they were read."""
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self._pending = b""
        """Read from the hub, not yet handed out: what follows a match."""
        hub.watch(self)

    def wake(self) -> None:
        """Watcher"""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self, limit: int = 1 << 16) -> bytes:
        """The next output, at least one byte; b"" once the machine ended and all was read, or this was closed."""
        while not self._closed:
            if data := self._next(limit):
                return data
            if self._hub.closed:
                break
            await self._wait()
        return b""

    def __aiter__(self) -> ConsoleReader:
        return self

    async def __anext__(self) -> bytes:
        if data := await self.read():
            return data
        raise StopAsyncIteration

    async def expect(self, pattern: str | bytes | re.Pattern[bytes], timeout: float | None = 30.0) -> re.Match[bytes]:
        """Read until the pattern (a regular expression) matches; what follows the match stays unread.

        Raises ConsoleTimeout after `timeout` seconds, ConsoleClosed when the machine ended before it matched.
        """
        wanted = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        seen = bytearray()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    data = await self.read()
                    seen += data
                    if match := wanted.search(bytes(seen)):
                        self._pending = bytes(seen[match.end() :]) + self._pending
                        return match
                    if not data:
                        raise ConsoleClosed(f"the console ended without {_quote(wanted)}; it showed {_tail(seen)}")
                    del seen[: max(0, len(seen) - RING)]
        except TimeoutError as error:
            self._pending = bytes(seen) + self._pending
            raise ConsoleTimeout(
                f"{_quote(wanted)} did not come within {timeout:g} s; the console showed {_tail(seen)}"
            ) from error
        except BaseException:
            self._pending = bytes(seen) + self._pending
            raise

    def close(self) -> None:
        """Follow the output no longer: a lossless reader then holds the machine no more, and who waits in `read` has
        come to the end. Idempotent."""
        self._closed = True
        self._hub.unwatch(self)
        self.wake()

    def _next(self, limit: int) -> bytes:
        if self._pending:
            data, self._pending = self._pending[:limit], self._pending[limit:]
            return data
        if self.position < self._hub.start:
            self.skipped += self._hub.start - self.position
            self.position = self._hub.start
        data = self._hub.output(self.position, limit)
        self.position += len(data)
        if data:
            self._hub.advanced(self)
        return data

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise VmmError("two tasks read one ConsoleReader; open one for each with console.reader()")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


def _quote(pattern: re.Pattern[bytes]) -> str:
    return repr(pattern.pattern.decode(errors="replace"))


def _tail(seen: bytearray) -> str:
    lines = bytes(seen[-400:]).decode(errors="replace").strip().splitlines()
    return repr("\n".join(lines[-4:])) if lines else "nothing"


class Console:
    """The public face of a machine's console: write, read, expect. Reads begin at the machine's first byte."""

    def __init__(self, hub: ConsoleHub) -> None:
        self._hub = hub
        self._reader = ConsoleReader(hub)
        self.read = self._reader.read
        self.expect = self._reader.expect

    def reader(self, *, lossless: bool = False, from_start: bool = True) -> ConsoleReader:
        """An independent reader. Close it when done."""
        return ConsoleReader(self._hub, lossless=lossless, from_start=from_start)

    def __aiter__(self) -> ConsoleReader:
        return self._reader

    @property
    def text(self) -> str:
        """The recent output (at least the last MiB), decoded, without moving the reader."""
        return self._hub.output(self._hub.start, self._hub.total).decode(errors="replace")

    async def write(self, data: str | bytes) -> None:
        """Type. Waits while the guest is slow to read."""
        loop = asyncio.get_running_loop()
        view = memoryview(data.encode() if isinstance(data, str) else data)
        for at in range(0, len(view), 4096):
            if self._hub.closed:
                raise ConsoleClosed("the machine has ended")
            room = loop.create_future()

            def resume(room: asyncio.Future[None] = room) -> None:
                if not room.done():
                    room.set_result(None)

            if not self._hub.feed(bytes(view[at : at + 4096]), resume):
                await room


class FirstOutput:
    """Calls `seen` once, at the next output, before others get it."""

    lossless = False

    def __init__(self, hub: ConsoleHub, seen: Callable[[], None]) -> None:
        self._hub = hub
        self._seen = seen
        self.position = hub.total
        hub.watch(self, first=True)

    def wake(self) -> None:
        """Watcher"""
        self._hub.unwatch(self)
        if self._hub.total > self.position:
            self._seen()


class ConsoleLog:
    """Writes the output to a file, which is rotated once (FILE.1) when it grows beyond `limit` bytes."""

    lossless = False

    def __init__(self, hub: ConsoleHub, path: Path, limit: int, warn: Callable[[str], None]) -> None:
        self._hub = hub
        self._path = path
        self._limit = limit
        self._warn = warn
        self.position = hub.total
        if path.is_fifo():  # opening it and writing to it wait for its reader, and the loop with them
            raise ConfigError(f"console log: {path}: is a pipe; give a file, or use --console socket=PATH")
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise HostError(f"console log: {path}: {os_reason(error)}") from error
        self._rotates = path.is_file()
        """Not a device, which would lose its name."""
        self._size = self._file.tell() if self._rotates else 0
        hub.watch(self)

    def wake(self) -> None:
        """Watcher"""
        data = self._hub.output(max(self.position, self._hub.start), RING * 2)
        self.position = self._hub.total
        try:
            while data:
                if self._size >= self._limit:
                    self._rotate()
                written = self._file.write(data[: self._limit - self._size]) or 0
                if not written:
                    break
                self._size += written
                data = data[written:]
        except OSError as error:
            self._warn(f"console log: {self._path}: {os_reason(error)}; logging stops")
            self.close()

    def _rotate(self) -> None:
        self._size = 0
        if not self._rotates:
            return
        self._file.close()
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._file = self._path.open("wb", buffering=0)

    def close(self) -> None:
        """Stop writing. Idempotent."""
        self._hub.unwatch(self)
        self._file.close()
