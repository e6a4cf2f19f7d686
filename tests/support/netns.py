"""Network namespaces of the host for tests: made, joined by a cable, and removed again. They need root and ip."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_count = itertools.count()


def listening(port: int) -> re.Pattern[str]:
    """What /proc/net/tcp says of a port that somebody listens on."""
    return re.compile(rf":{port:04X} [0-9A-F:]+ 0A ")


class Namespace:
    """A network namespace; its loopback is up."""

    def __init__(self, label: str) -> None:
        self.name = f"lv{os.getpid()}{label}{next(_count)}"
        made = subprocess.run(["ip", "netns", "add", self.name], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        self.ip("link", "set", "lo", "up")
        self._processes: list[subprocess.Popen[bytes]] = []

    def command(self, *arguments: str | os.PathLike[str]) -> list[str]:
        """What to run to run this in the namespace."""
        return ["ip", "netns", "exec", self.name, *map(os.fspath, arguments)]

    def run(self, *arguments: str | os.PathLike[str], timeout: float = 60) -> str:
        """Run a program in the namespace to its end; its output. AssertionError if it fails."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    async def arun(self, *arguments: str | os.PathLike[str], timeout: float = 60) -> str:
        """`run` while the loop goes on."""
        return await asyncio.to_thread(self.run, *arguments, timeout=timeout)

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True, capture_output=True)

    def start(self, *arguments: str | os.PathLike[str]) -> None:
        """Run a program until the namespace ends."""
        self._processes.append(
            subprocess.Popen(self.command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    async def listen(self, port: int, *arguments: str | os.PathLike[str]) -> None:
        """`start` a server, and wait until it listens on a TCP port."""
        self.start(*arguments)
        async with asyncio.timeout(60):
            while not listening(port).search(await self.arun("cat", "/proc/net/tcp", "/proc/net/tcp6")):
                await asyncio.sleep(0.05)

    async def serve(self, folder: Path, address: str, port: int) -> None:
        """Offer the files of `folder` by HTTP."""
        await self.listen(port, sys.executable, "-m", "http.server", "-d", folder, "-b", address, str(port))

    async def download(self, url: str, target: Path) -> bytes:
        """What is there, asked from within the namespace."""
        script = "import sys, urllib.request; urllib.request.urlretrieve(sys.argv[1], sys.argv[2])"
        await self.arun(sys.executable, "-c", script, url, target, timeout=120)
        return target.read_bytes()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", self.name], check=True, capture_output=True)


def need(*programs: str) -> None:
    """Skip the test, with the reason, unless this is root and the programs are there."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    for program in ("ip", *programs):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@contextlib.contextmanager
def namespaces(*labels: str) -> Iterator[list[Namespace]]:
    """Namespaces that are removed at the end, whatever happens."""
    with contextlib.ExitStack() as stack:
        made = []
        for label in labels:
            made.append(Namespace(label))
            stack.callback(made[-1].close)
        yield made


def cable(one: Namespace, two: Namespace) -> None:
    """A pair of interfaces called eth0 between two namespaces, both up."""
    near, far = f"{one.name[-9:]}a", f"{two.name[-9:]}b"
    subprocess.run(["ip", "link", "add", near, "type", "veth", "peer", "name", far], check=True, capture_output=True)
    for name, space in ((near, one), (far, two)):
        subprocess.run(["ip", "link", "set", name, "netns", space.name], check=True, capture_output=True)
        space.ip("link", "set", name, "name", "eth0")
        space.ip("link", "set", "eth0", "up")


