"""What a console port is connected to: a byte stream whose other end may come and go. Loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from pathlib import Path
from typing import Protocol

from virtio.errors import ConfigError, os_reason

CHUNK = 65536
INPUT_MAX = 1 << 20
BACKLOG = 1 << 20
"""Bytes a slow watcher may be behind before it is dropped."""
CLIENTS_MAX = 64
REPLAY = 65536
"""Bytes of recent output that a late watcher gets."""


class CharBackend(Protocol):
    """The other end of a console port. An exception of `write` loses that output, one of `read` ends the input until
    the driver sets the device up again; a warning names the class."""

    async def read(self) -> bytes:
        """The next input, at most INPUT_MAX bytes; waits while nobody is there. b"": no more will come."""

    async def write(self, data: bytes) -> None:
        """Take output; it is dropped if nobody is there. While this waits, further output of the guest waits too, and
        the machine cannot be saved."""

    async def aclose(self) -> None:
        """Give up descriptors."""
        return None


class MemoryChar(CharBackend):
    """The fake: `feed` is input, `output` collects."""

    def __init__(self) -> None:
        self.output = bytearray()
        self._input: deque[bytes] = deque()
        self._fed = asyncio.Event()
        self._wrote = asyncio.Event()

    def feed(self, data: bytes) -> None:
        """Input for the guest."""
        self._input.append(data)
        self._fed.set()

    async def read(self) -> bytes:
        while not self._input:
            self._fed.clear()
            await self._fed.wait()
        return self._input.popleft()

    async def write(self, data: bytes) -> None:
        self.output += data
        self._wrote.set()

    async def wait_output(self, wanted: bytes, timeout: float = 10) -> bytes:
        """Wait until `wanted` was written; everything written so far. TimeoutError."""
        async with asyncio.timeout(timeout):
            while wanted not in self.output:
                self._wrote.clear()
                await self._wrote.wait()
        return bytes(self.output)


class SocketChar(CharBackend):
    """A listening UNIX stream socket: every client sees the output, any client's input counts, late ones get
    a replay."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._recent = bytearray()
        self._input: asyncio.Queue[bytes] = asyncio.Queue(maxsize=16)
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> SocketChar:
        """Listen; ConfigError if the path cannot be bound."""
        with contextlib.suppress(FileNotFoundError):
            if Path(self.path).is_socket():
                Path(self.path).unlink()
        try:
            self._server = await asyncio.start_unix_server(self._serve, self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: {os_reason(error)}") from error
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= CLIENTS_MAX:
            writer.close()
            return
        writer.write(bytes(self._recent))
        self._clients.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            while data := await reader.read(CHUNK):
                await self._input.put(data)
        except OSError:
            pass
        finally:
            self._clients.discard(writer)
            writer.close()

    async def read(self) -> bytes:
        return await self._input.get()

    async def write(self, data: bytes) -> None:
        self._recent += data[-REPLAY:]
        del self._recent[:-REPLAY]
        for writer in tuple(self._clients):
            if writer.transport.get_write_buffer_size() > BACKLOG:
                self._clients.discard(writer)
                writer.transport.abort()
            else:
                writer.write(data)

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in tuple(self._clients):
                writer.close()
            for task in tuple(self._serving):
                task.cancel()  # it may wait for a guest that reads no more input
            await asyncio.gather(*self._serving, return_exceptions=True)
            self._server = None
            with contextlib.suppress(FileNotFoundError):
                Path(self.path).unlink()
