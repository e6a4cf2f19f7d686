"""A network between two ends of a migration, in threads of its own: a delay, a rate, an end at will. It goes on while
the loop of the test stands still, as a network does."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

PIECE = 16 << 10


class SlowLink:
    """Listens at a UNIX socket and connects on to another. `delay`: seconds each way; `rate`: bytes a second from who
    connects to the other; 0: as many as go."""

    def __init__(self, path: Path, target: Path, *, delay: float = 0.0, rate: float = 0.0) -> None:
        self.path, self.target = path, target
        self.delay, self.rate = delay, rate
        self.bytes = 0
        """That came from who connects."""
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._next = 0.0
        self._opened: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._begin(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10.0)
        for end in self._opened:
            end.close()

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="slow link", daemon=True)
        self._threads.append(thread)
        thread.start()

    def cut(self) -> None:
        """All connections end."""
        sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.socket(socket.AF_UNIX)
                try:
                    there.connect(str(self.target))
                except OSError:
                    here.close()
                    there.close()
                    continue
                self._sockets += [here, there]
                self._opened += [here, there]
                for source, sink, paced in ((here, there, True), (there, here, False)):
                    pipe: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=16)
                    self._begin(self._read, source, pipe, paced)
                    self._begin(self._write, sink, pipe, source)

    def _read(self, source: socket.socket, pipe: queue.Queue[tuple[float, bytes]], paced: bool) -> None:
        data = b"x"
        while data:
            try:
                data = source.recv(PIECE)
            except OSError:
                data = b""
            if paced and self.rate and data:
                with self._lock:
                    self._next = max(self._next, time.monotonic()) + len(data) / self.rate
                    wait = self._next - time.monotonic()
                time.sleep(max(wait, 0.0))
            if paced:
                self.bytes += len(data)
            with contextlib.suppress(queue.Full):  # nobody takes it any more
                pipe.put((time.monotonic() + self.delay, data), timeout=60)

    def _write(self, sink: socket.socket, pipe: queue.Queue[tuple[float, bytes]], source: socket.socket) -> None:
        while True:
            due, data = pipe.get()
            time.sleep(max(due - time.monotonic(), 0.0))
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                with contextlib.suppress(OSError):
                    source.shutdown(socket.SHUT_RDWR)
                return
