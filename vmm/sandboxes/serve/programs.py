"""The programs that run in a sandbox: their numbers, who listens to them, what they are fed. Loop thread.

A program goes on when nobody listens, and when its sandbox is paused and taken up again. Who listens hears what is
written from then on; one that does not read holds the program up, as a pipe would, and nobody else.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from cpu.values import dataclass
from vmm.errors import GuestError, StateError
from vmm.guest.frames import KEPT, NUMBERED

if TYPE_CHECKING:
    from vmm.guest.process import GuestProcess, GuestStream
    from vmm.vm import VirtualMachine

Channel = Literal["stdout", "stderr", "pty"]
ROOM = 256 << 10
"""Bytes that wait for a listener before the program does."""
MAX_PROGRAMS = 1000
MAX_LISTENERS = 64


@dataclass(frozen=True, slots=True)
class ProgramLine:
    """What was asked to be started."""

    command: str
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str | None
    tag: str | None
    terminal: bool


@dataclass(frozen=True, slots=True)
class ProgramOutput:
    """Bytes of one of its outputs."""

    channel: Channel
    data: bytes


@dataclass(frozen=True, slots=True)
class ProgramEnd:
    """How it ended: its exit status, or 128 + the signal; `lost` says why that is not known."""

    status: int
    lost: str = ""


class ProgramListener:
    """One who hears a program: iterate until its end."""

    def __init__(self) -> None:
        self._events: deque[ProgramOutput | ProgramEnd] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.closed = False

    async def give(self, event: ProgramOutput | ProgramEnd) -> None:
        """Waits for room."""
        await self._room.wait()
        if self.closed:
            return
        self._events.append(event)
        self._size += len(event.data) + 64 if isinstance(event, ProgramOutput) else 0
        if self._size >= ROOM:
            self._room.clear()
        self._changed.set()

    def tell_end(self, end: ProgramEnd) -> None:
        """As give(), without waiting."""
        self._events.append(end)
        self._changed.set()

    async def next(self) -> ProgramOutput | ProgramEnd:
        """The next event."""
        while not self._events:
            self._changed.clear()
            await self._changed.wait()
        event = self._events.popleft()
        self._size -= len(event.data) + 64 if isinstance(event, ProgramOutput) else 0
        if self._size < ROOM:
            self._room.set()
        return event

    def close(self) -> None:
        """It hears no more, and holds nobody up."""
        self.closed = True
        self._events.clear()
        self._room.set()


class Program:
    """A program that runs."""

    def __init__(self, number: int, line: ProgramLine, process: GuestProcess) -> None:
        self.number = number
        self.line = line
        self.process = process
        self.input = asyncio.Lock()
        """Held while something is fed to it, for the order."""
        self.listeners: set[ProgramListener] = set()
        self.end: ProgramEnd | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._killing: asyncio.Task[None] | None = None

    def listen(self) -> ProgramListener:
        """A new listener; close it by unlisten(). StateError if there are too many."""
        if len(self.listeners) >= MAX_LISTENERS:
            raise StateError(f"program {self.number} has {MAX_LISTENERS} listeners; more are not possible")
        listener = ProgramListener()
        self.listeners.add(listener)
        return listener

    def unlisten(self, listener: ProgramListener) -> None:
        """Undo listen()."""
        listener.close()
        self.listeners.discard(listener)

    async def give(self, event: ProgramOutput | ProgramEnd) -> None:
        """Tell every listener."""
        for listener in tuple(self.listeners):
            await listener.give(event)

    def limit(self, seconds: float) -> None:
        """Kill it after so long, whoever listens then."""

        def kill() -> None:
            self._killing = asyncio.create_task(self.process.send_signal(signal.SIGKILL), name="program-limit")

        self._timer = asyncio.get_running_loop().call_later(seconds, kill)

    async def pump(self) -> ProgramEnd:
        """Its outputs to the listeners, until its end, which they hear too."""
        first: Channel = "pty" if self.line.terminal else "stdout"
        out = asyncio.create_task(self._copy(self.process.stdout, first), name="program-stdout")
        error = asyncio.create_task(self._copy(self.process.stderr, "stderr"), name="program-stderr")
        try:
            await asyncio.gather(out, error)
            end = ProgramEnd(await self.process.wait())
        except GuestError as failure:
            end = ProgramEnd(-1, str(failure))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            out.cancel()
            error.cancel()
        self.end = end
        return end

    async def _copy(self, stream: GuestStream, channel: Channel) -> None:
        async for data in stream:
            await self.give(ProgramOutput(channel, data))


class Programs:
    """Those of one sandbox, by number."""

    def __init__(self) -> None:
        self._vm: VirtualMachine | None = None
        self._running: dict[int, Program] = {}
        self._pumps: dict[int, asyncio.Task[None]] = {}

    def attach(self, vm: VirtualMachine) -> None:
        """The sandbox runs, on this machine."""
        self._vm = vm

    async def start(self, line: ProgramLine, *, user: str, terminal: tuple[int, int] | None) -> Program:
        """Raises ConfigError, StateError, GuestError."""
        vm = self._vm
        if vm is None:
            raise StateError("the sandbox was not found: it does not run")
        if len(self._running) >= MAX_PROGRAMS:
            raise StateError(f"{MAX_PROGRAMS} programs run in this sandbox; more are not possible")
        process = await vm.start_process(
            line.command,
            *line.arguments,
            env=dict(line.env),
            cwd=line.cwd or "",
            user=user,
            terminal=terminal,
            flags=NUMBERED | KEPT,
        )
        try:
            number = await process.number()
        except BaseException:
            await process.aclose()
            raise
        return self._add(Program(number, line, process))

    def _add(self, program: Program) -> Program:
        self._running[program.number] = program
        self._pumps[program.number] = asyncio.create_task(self._follow(program), name=f"program {program.number}")
        return program

    async def _follow(self, program: Program) -> None:
        try:
            end = await program.pump()
        finally:
            # Another program may have its number by now.
            if self._running.get(program.number) is program:
                del self._running[program.number]
                del self._pumps[program.number]
            await program.process.aclose()
        await program.give(end)

    def find(self, number: int | None = None, tag: str | None = None) -> Program | None:
        """By number, or by tag."""
        if number is not None:
            return self._running.get(number)
        return next((program for program in self._running.values() if program.line.tag == tag), None)

    def running(self) -> list[Program]:
        """Those that run."""
        return list(self._running.values())

    def describe(self) -> list[dict[str, Any]]:
        """For rejoin()."""
        return [{"number": program.number, **asdict(program.line)} for program in self._running.values()]

    async def rejoin(self, described: list[dict[str, Any]]) -> None:
        """Go on with the programs of a sandbox that was paused; one that is gone is left out."""
        await asyncio.gather(*(self._rejoin(one) for one in described))

    async def _rejoin(self, described: dict[str, Any]) -> None:
        assert self._vm is not None
        values = dict(described)
        number = int(values.pop("number"))
        values["arguments"] = tuple(values["arguments"])
        try:
            process = await self._vm.agent.rejoin(number)
        except GuestError:
            return
        self._add(Program(number, ProgramLine(**values), process))

    async def aclose(self) -> None:
        """The machine is gone, or goes: listeners hear that."""
        self._vm = None
        pumps = list(self._pumps.values())
        lost = [program for program in self._running.values() if program.end is None]
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for program in lost:
            for listener in tuple(program.listeners):
                listener.tell_end(ProgramEnd(-1, "the sandbox does not run any more"))


async def events(listener: ProgramListener, seconds: float) -> AsyncIterator[ProgramOutput | ProgramEnd | None]:
    """What a listener hears, to the program's end; None after each `seconds` without anything."""
    while True:
        try:
            async with asyncio.timeout(seconds):
                event = await listener.next()
        except TimeoutError:
            yield None
            continue
        yield event
        if isinstance(event, ProgramEnd):
            return
