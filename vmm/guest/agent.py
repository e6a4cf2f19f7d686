"""The host's side of the guest agent: run programs in the guest, feed and read them, copy files.

A connection comes from a function that the caller gives, so that this module knows neither vsock nor sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from virtio.backends.vsock import Streams
from vmm.errors import GuestError
from vmm.guest.frames import (
    EXIT,
    HEAD,
    KEPT_PORT,
    RESIZE,
    VERSION,
    Environment,
    RunLimits,
    Text,
    frame,
    start,
)
from vmm.guest.identity import IDENTITY
from vmm.guest.process import ExecResult, GuestProcess

COPY_LIMIT = 4 << 30
"""Bytes that copy_out takes from a guest unless it is told otherwise."""
DIALS = 32
"""Connections that are begun at once; the guest's queue of those that it has not taken yet holds 64 or more."""
BUSY_SECONDS = 60.0
"""How long a program waits for a place among the connections of a machine's socket device."""
SILENT_SECONDS = 2.0
"""How long an agent that listened may refuse connections: a service manager starts it again."""
REJOIN_SECONDS = 5.0
"""How long a kept program may take to wait for another connection."""
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.2

Connect = Callable[[], Awaitable[Streams]]
"""A connection to the agent. ConnectionRefusedError: no place for it now. Another OSError: nobody answers."""


class Agent:
    """The guest's agent. With `waits`, programs wait until set_ready() says that it listens."""

    def __init__(
        self,
        connect: Connect,
        *,
        waits: bool = False,
        patience: float | None = BUSY_SECONDS,
        reach: Callable[[int], Awaitable[Streams]] | None = None,
    ) -> None:
        """`patience`: seconds that a program waits for a connection once the agent listens; None: without end. `reach`:
        a connection to a port of the guest, which rejoin() needs."""
        self._connect = connect
        self._reach = reach
        self._patience = patience
        self._dials = asyncio.Semaphore(DIALS)
        self._closed = False
        self._identity: Callable[[], bytes] | None = None
        self._identifying = asyncio.Lock()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.spoken = 0
        """The version of the protocol with which the guest's agent said that it listens; 0: it has not yet."""
        self.on_ready: Callable[[], None] | None = None
        """Called when the guest says that its agent listens."""
        if not waits:
            self._ready.set_result(None)

    def set_ready(self, version: int = VERSION) -> None:
        """The guest said that its agent listens, and speaks this version of the protocol."""
        if self._ready.done():
            return
        self.spoken = version
        if version != VERSION:
            self._fail(
                f"the guest's agent speaks version {version} of its protocol, this vmm version {VERSION}; "
                "build the guest's image again with this version of vmm"
            )
            return
        self._ready.set_result(None)
        if self.on_ready is not None:
            self.on_ready()

    @property
    def ready(self) -> bool:
        """The guest has said that its agent listens."""
        return self._ready.done() and self._ready.exception() is None

    def restarted(self) -> None:
        """The guest boots again: whoever wants the agent waits until it listens again."""
        self.spoken = 0
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()

    async def wait_ready(self) -> None:
        """Until the agent listens. GuestError if the machine ends before."""
        await asyncio.shield(self._ready)

    async def start_process(
        self,
        *arguments: Text,
        env: Environment | None = None,
        cwd: Text = "",
        user: Text = "",
        terminal: tuple[int, int] | None = None,
        flags: int = 0,
        limits: RunLimits | None = None,
    ) -> GuestProcess:
        """Start a program; with `terminal` (rows, columns) on a terminal of its own. `flags`: NUMBERED, KEPT, TOOL of
        vmm.guest.frames. `limits`: what it may use, with all that it starts; its end is in `use` then. `env` is added
        to the agent's own environment and wins over it, PATH also for finding the program. `user`: USER[:GROUP], names
        or numbers of the guest; without it root. Text that is not UTF-8 is given as bytes, or as os.fsdecode makes it.

        ConfigError for what cannot be started, GuestError if the guest does not answer."""
        frames = start(arguments, env or {}, cwd, user, terminal, flags, limits)
        reader, writer = await self.dial()
        for data in frames:
            writer.write(data)
        return GuestProcess(reader, writer)

    async def rejoin(self, number: int) -> GuestProcess:
        """A program that was started with KEPT, and whose connection has ended: go on with it. `number`: its process.
        GuestError if it is gone."""
        if self._reach is None:
            raise GuestError("programs of this machine cannot be gone on with from here")
        await self.wait_ready()
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + REJOIN_SECONDS, FIRST_PAUSE
        while True:
            try:
                reader, writer = await self._reach(KEPT_PORT + number)
                return GuestProcess(reader, writer, window=0)
            except OSError as error:  # its agent has not heard yet that the old connection is gone
                if loop.time() > deadline:
                    raise GuestError(f"program {number} is gone") from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def resize_console(self, rows: int, columns: int) -> None:
        """Tell the guest how large the terminal is on which its console is shown; a shell there hears of the change.
        GuestError if the guest does not answer."""
        _, writer = await self.dial()
        with contextlib.suppress(OSError):
            writer.write(frame(RESIZE, rows.to_bytes(2, "little") + columns.to_bytes(2, "little")))
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    def becomes(self, payload: Callable[[], bytes]) -> None:
        """The machine is a copy: whatever is asked of the agent waits until the guest has taken an IDENTITY with this
        payload, which is made when it is sent."""
        self._identity = payload

    async def identify(self) -> None:
        """Have the guest take its identity, if it has one to take. Raises GuestError."""
        async with self._identifying:
            if self._identity is None:
                return
            reader, writer = await self._open()
            try:
                writer.write(frame(IDENTITY, self._identity()))
                kind, length = HEAD.unpack(await reader.readexactly(HEAD.size))
                if (kind, length) != (EXIT, 2):
                    raise GuestError("the guest's agent does not take an identity; build its image again")
                self._identity = None
            except (OSError, asyncio.IncompleteReadError) as error:
                raise GuestError("the guest's agent ended while it took its identity") from error
            finally:
                writer.close()

    async def dial(self) -> Streams:
        """A connection to the agent, once it listens. Waits for a place where there is none. Raises GuestError."""
        if self._identity is not None:
            await self.identify()
        return await self._open()

    async def _open(self) -> Streams:
        await self.wait_ready()
        loop = asyncio.get_running_loop()
        pause, silent_since = FIRST_PAUSE, 0.0
        try:
            async with asyncio.timeout(self._patience), self._dials:
                while True:
                    try:
                        return await self._connect()
                    except ConnectionRefusedError:
                        silent_since = 0.0  # no place: other programs run, and end
                    except OSError as error:
                        silent_since = silent_since or loop.time()
                        if loop.time() - silent_since > SILENT_SECONDS:
                            raise GuestError("the guest's agent has ended: nobody answers at its port") from error
                    if self._closed:
                        raise GuestError("the machine has ended")
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        except TimeoutError as error:
            raise GuestError(
                f"no place for another program in the guest within {self._patience:g} s: too many run there at once"
            ) from error

    async def exec(
        self,
        *arguments: Text,
        input: bytes | None = None,  # noqa: A002 - subprocess's name
        env: Environment | None = None,
        cwd: Text = "",
        user: Text = "",
        timeout: float | None = None,
        check: bool = False,
        limit: int | None = None,
    ) -> ExecResult:
        """Run a program to its end. TimeoutError after `timeout` seconds (it is killed); with `check`, GuestError if
        its status is not 0. `limit`: bytes of each output that are kept; None: all."""
        async with asyncio.timeout(timeout):
            async with await self.start_process(*arguments, env=env, cwd=cwd, user=user) as process:
                result = await process.communicate(input, limit=limit)
        return result.check() if check else result

    async def copy_in(self, source: Path | str, target: Text) -> None:
        """Copy a file of the host to `target`, a path in the guest, or what is in a directory into the directory
        `target`; modes go along, owner is root. ConfigError if it cannot be read, GuestError if the guest fails."""
        from vmm.guest.files import copy_in

        await copy_in(self, Path(source), target)

    async def copy_out(self, source: Text, target: Path | str, *, limit: int = COPY_LIMIT) -> None:
        """Copy a file of the guest to a path of the host, or what is in a directory into the directory `target`; modes
        go along, links come as they are, other kinds of files not at all. `limit`: bytes that the guest may send.
        ConfigError if the host cannot write, GuestError if the guest fails or sends what was not asked for."""
        from vmm.guest.files import copy_out

        await copy_out(self, source, Path(target), limit)

    def close(self) -> None:
        """The machine is gone: whoever waits for the agent learns it."""
        self._closed = True
        if not self._ready.done():
            self._fail("the machine ended before its agent was ready")

    def _fail(self, why: str) -> None:
        self._ready.set_exception(GuestError(why))
        self._ready.exception()
