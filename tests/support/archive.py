"""A web server that stands for a Debian mirror: files in memory, ranges as RFC 9110 has them, as slow as wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

CHANGED = "Tue, 01 Jan 2019 00:00:00 GMT"
PIECE = 64 << 10


class Archive:
    """Serves what stands at the end of a path, so that it can be a proxy as well. `seen` lists (name, first byte)."""

    def __init__(self, files: dict[str, bytes | Path], *, ranges: bool = True, pause: float = 0.0) -> None:
        self.files = files
        self.ranges = ranges
        self.pause = pause
        """Seconds after each PIECE."""
        self.moved: dict[str, str] = {}
        """Name -> where it is now."""
        self.seen: list[tuple[str, int]] = []
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = unquote(request.path.rpartition("/")[2])
        if name in self.moved:
            request.send_response(302)
            request.send_header("Location", self.moved[name])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        found = self.files.get(name)
        if found is None:
            request.send_error(404)
            return
        data = found if isinstance(found, bytes) else found.read_bytes()
        wanted = request.headers.get("Range", "")
        start = 0
        if self.ranges and wanted and request.headers.get("If-Range") == CHANGED:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.seen.append((name, start))
        if start >= len(data) > 0:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(data)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("Last-Modified", CHANGED)
        request.end_headers()
        for at in range(start, len(data), PIECE):
            request.wfile.write(data[at : at + PIECE])
            if self.pause:
                time.sleep(self.pause)


@contextmanager
def serve(files: dict[str, bytes | Path], **options: Any) -> Iterator[Archive]:
    """The archive at `archive.url`, until the block ends."""
    archive = Archive(files, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                archive.answer(self)
            except OSError:
                self.close_connection = True  # the client is gone, which is what some tests are about

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    archive.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield archive
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
