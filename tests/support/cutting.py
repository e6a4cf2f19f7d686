"""A proxy between source and target of a migration that cuts the connection, or lets it hang, at a chosen byte."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Self


class CuttingProxy:
    """Listens at a UNIX socket, connects on to another. `forward_limit`: bytes from source to target before it cuts;
    `backward_limit`: the other way; None: never. Once it has cut, `again` says whether new connections pass."""

    def __init__(
        self,
        path: Path,
        target: Path,
        *,
        forward_limit: int | None = None,
        backward_limit: int | None = None,
        again: bool = True,
    ) -> None:
        self.path, self.target = path, target
        self.limits = [forward_limit, backward_limit]
        self.counts = [0, 0]
        self.cut = False
        self._again = again
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._client, path=str(self.path))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut and not self._again:
            writer.transport.abort()
            return
        try:
            onward, back = await asyncio.open_unix_connection(str(self.target))
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, back]
        for number, (source, sink) in enumerate(((reader, back), (onward, writer))):
            task = asyncio.create_task(self._pass(number, source, sink), name="proxy")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while data := await source.read(1 << 16):
                limit = None if self.cut else self.limits[number]
                if limit is not None and self.counts[number] + len(data) >= limit:
                    sink.write(data[: limit - self.counts[number]])
                    await sink.drain()
                    self.counts[number] = limit
                    self.cut = True
                    # What was let through arrives: then both ends see the connection end.
                    for writer in self._writers:
                        writer.close()
                    return
                self.counts[number] += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
