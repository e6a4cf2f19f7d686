"""A `vmm serve` of a test's own, as a process, and what its clients need to find it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from images import builder

SECONDS = 120.0
"""For whatever is waited for: the hosts of tests are busy."""


class Server:
    """The process. Use served()."""

    def __init__(self, folder: Path, *options: str, cache: Path | None = None) -> None:
        self.folder = folder
        self.cache = cache or folder / "cache"
        """Where warm machines are."""
        self._options = options
        self._environment = {
            **os.environ,
            "LOOPVISOR_CACHE": str(builder.cache.cache_directory()),
            "XDG_CACHE_HOME": str(self.cache),
            "XDG_STATE_HOME": str(folder / "state"),
        }
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> None:
        """Until it says where it listens."""
        command = [sys.executable, "-c", "from cli.main import main; main()", "serve", "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [*command, "--core", "soft", *self._options], env=self._environment, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "E2B_API_URL=" in line:
                self.url = line.partition("E2B_API_URL=")[2].split()[0]
                return
        raise AssertionError(f"the server ended: {self.process.wait()}")

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit status, and what it said behind the first line."""
        assert self.process is not None and self.process.stderr is not None
        self.process.send_signal(number)
        said = self.process.stderr.read()
        status = self.process.wait(SECONDS)
        self.process.stderr.close()
        return status, said

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """A request to the control API: status, and the answer's JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {"X-API-Key": "local", "Content-Type": "application/json", **given})
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content) if content else None

    def descriptors(self) -> int:
        """Files that the process has open."""
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def served(folder: Path, *options: str, cache: Path | None = None) -> Iterator[Server]:
    """A running server, ended with the block."""
    server = Server(folder, *options, cache=cache)
    server.start()
    try:
        yield server
    finally:
        assert server.process is not None
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        if server.process.stderr is not None and not server.process.stderr.closed:
            sys.stderr.write(server.process.stderr.read())
            server.process.stderr.close()


def eventually(condition: Any, what: str) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
