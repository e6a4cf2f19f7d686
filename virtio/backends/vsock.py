"""The host's side of vsock: who answers the guest's connections, and how the host reaches the guest. Loop thread only.

UNIX sockets as Firecracker maps them: the host connects to PATH and writes "CONNECT port\\n", is answered "OK port\\n"
and is then through; a guest's connection to host port P arrives at PATH_P.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from virtio.errors import ConfigError, os_reason

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Open = Callable[[int], Awaitable[Streams]]
"""open(port) -> a connection to the guest's port; OSError if it is refused."""
ConnectionHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LINE_MAX = 32
PORT_MAX = 0xFFFFFFFF
HANDSHAKE_SECONDS = 10
HANDLERS_MAX = 256
"""Of MemoryVsock, that run at a time: one that goes on after its connection ended keeps its place."""
CLIENTS_MAX = 256
"""Of a UNIX socket that are served at a time; more wait in the socket's backlog."""
BACKLOG = 256
RETRY_SECONDS = 0.01


async def stream_pair() -> tuple[Streams, Streams]:
    """Two ends of one connection."""
    one, two = socket.socketpair()
    try:
        first = await asyncio.open_connection(sock=one)
        try:
            return first, await asyncio.open_connection(sock=two)
        except BaseException:
            first[1].close()
            raise
    except BaseException:  # a reset may cancel this at any moment
        one.close()
        two.close()
        raise


class VsockBackend(Protocol):
    """Who answers the guest's connections."""

    async def start(self, open: Open) -> None:
        """The device is there: `open` reaches the guest."""

    async def dial(self, port: int) -> Streams:
        """The guest connects to this port of the host; OSError refuses it."""

    async def aclose(self) -> None:
        """Give up descriptors."""
        return None


class MemoryVsock(VsockBackend):
    """Within this process: `listen` for the guest's connections, `open` one to the guest."""

    def __init__(self) -> None:
        self._handlers: dict[int, ConnectionHandler] = {}
        self._tasks: set[asyncio.Future[None]] = set()
        self._open: Open | None = None

    def listen(self, port: int, handler: ConnectionHandler) -> None:
        """`handler(reader, writer)` serves each connection of the guest to this port."""
        self._handlers[port] = handler

    async def open(self, port: int) -> Streams:
        """A connection to the guest's port; OSError."""
        if self._open is None:
            raise ConnectionRefusedError("the device is not there yet")
        return await self._open(port)

    async def start(self, open: Open) -> None:
        self._open = open

    async def dial(self, port: int) -> Streams:
        handler = self._handlers.get(port)
        if handler is None:
            raise ConnectionRefusedError(f"nobody listens on port {port}")
        if len(self._tasks) >= HANDLERS_MAX:
            raise ConnectionRefusedError(f"{HANDLERS_MAX} handlers run already")
        ours, theirs = await stream_pair()
        task = asyncio.ensure_future(handler(*theirs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: theirs[1].close())  # also of one that is cancelled before it began
        return ours

    async def aclose(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class UnixVsock(VsockBackend):
    """UNIX sockets at `path` and `path`_PORT."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._listener: socket.socket | None = None
        self._open: Open | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._clients: dict[asyncio.Task[None], socket.socket | None] = {}
        """Who serves a client, with its socket until the task has begun."""
        self._places = asyncio.Semaphore(CLIENTS_MAX)

    async def start(self, open: Open) -> None:
        self._open = open
        with contextlib.suppress(FileNotFoundError):
            if Path(self.path).is_socket():
                Path(self.path).unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.bind(self.path)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise ConfigError(f"vsock {self.path}: {os_reason(error)}") from error
        self._listener = listener
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listener), name="vsock-accept")

    async def dial(self, port: int) -> Streams:
        sock = await _connect(f"{self.path}_{port}")
        try:
            return await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._places.acquire()
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:  # it has gone already, or this process has no descriptor left for it
                self._places.release()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            task = loop.create_task(self._client(sock), name="vsock-client")
            self._clients[task] = sock
            task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        unserved = self._clients.pop(task)
        if unserved is not None:
            unserved.close()
        self._places.release()

    async def _client(self, sock: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = None
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                port = self._parse(await reader.readuntil(b"\n"))
                if port is None or self._open is None:
                    return
                back, guest = await self._open(port)
            writer.write(b"OK %d\n" % port)
            await asyncio.gather(_copy(reader, guest), _copy(back, writer))
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            return  # refused, or not a client of ours: it sees the end of its connection
        finally:
            writer.close()
            if guest is not None:
                guest.close()

    @staticmethod
    def _parse(line: bytes) -> int | None:
        word, _, port = line.strip().partition(b" ")
        if word != b"CONNECT" or not port.isdigit() or len(line) > LINE_MAX or int(port) > PORT_MAX:
            return None
        return int(port)

    async def aclose(self) -> None:
        tasks = list(self._clients)
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with contextlib.suppress(FileNotFoundError):
                Path(self.path).unlink()


async def _connect(path: str) -> socket.socket:
    """A connection to a listening UNIX socket. While its backlog is full this waits: that is a listener with much to
    do, not a dead one."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            while True:
                try:
                    sock.connect(path)  # a UNIX socket's never goes on later: done, refused, or EAGAIN
                    return sock
                except BlockingIOError:
                    await asyncio.sleep(RETRY_SECONDS)
    except BaseException:
        sock.close()
        raise


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    if writer.can_write_eof() and not writer.is_closing():
        writer.write_eof()
