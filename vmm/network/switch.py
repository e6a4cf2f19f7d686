"""Private switches between machines of one user: `--net switch=NAME`.

    RUNTIME-switches/NAME.sock   each connection is a port: frames, each behind its length (4 bytes, big-endian)
    RUNTIME-switches/NAME.pid    the number of its process, if it has one of its own
    RUNTIME-switches/NAME.lock   held while somebody connects, and while the switch ends

RUNTIME is the runtime directory of vmm/management/registry.py. A switch that nobody has is begun as a process
(`python -m vmm.network.switch NAME`), so that machines come and go in any order, and ends when its last port has been
unplugged for a while. A program has one in its own loop as `Switch`. Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from virtio.backends.impaired import ImpairedNet, Impairment
from virtio.backends.net import NetBackend
from virtio.backends.sockets import StreamNet
from virtio.backends.switch import SwitchCore, SwitchPort
from virtio.errors import HostError as LinkError
from vmm.errors import ConfigError, HostError, core_errors, os_reason
from vmm.management.registry import runtime_directory
from vmm.management.sockets import check_path, is_live, listen

IDLE_SECONDS = 10.0
"""How long a switch process stays without a port."""
LOCK_SECONDS = 30.0
_begun: list[subprocess.Popen[bytes]] = []
"""Switches that this process began; those that have ended are reaped when another begins."""
TURN = 64
"""Frames of one port before the others have their turn."""
SWITCH_MTU = 65520
"""What its cards are told: no wire is between them, so frames may be long."""


def check_name(name: str) -> str:
    """A switch's name; ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
        raise ConfigError(f"switch: {name!r} is no name; use letters, digits, _, . and -, at most 64")
    return name


def _folder() -> Path:
    runtime = runtime_directory()
    folder = runtime.with_name(f"{runtime.name}-switches")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise HostError(f"{folder}: {os_reason(error)}; set XDG_RUNTIME_DIR") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise HostError(f"{folder}: belongs to somebody else, or others may enter it; set XDG_RUNTIME_DIR")
    return folder


@contextlib.asynccontextmanager
async def _locked(name: str) -> AsyncIterator[Path]:
    """Nobody else connects to, begins or ends this switch: the path of its socket. Raises ConfigError, HostError."""
    path = _folder() / f"{name}.lock"
    check_path(path.with_suffix(".sock"), "switch")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"switch {name}: {path}: {os_reason(error)}") from error
    try:
        try:
            async with asyncio.timeout(LOCK_SECONDS):
                while True:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        await asyncio.sleep(0.02)
        except TimeoutError:
            raise HostError(f"switch {name}: somebody holds {path} and does not let go") from None
        yield path.with_suffix(".sock")
    finally:
        os.close(descriptor)


def _dial(path: Path) -> socket.socket | None:
    """A connection, or None if nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise HostError(f"switch: {path}: {os_reason(error)}") from error
    return sock


def _begin(name: str, command: list[str], descriptor: int) -> None:
    """A process that outlives this one, for the other machines' cards are on it. Raises HostError."""
    try:
        process = subprocess.Popen(
            command,
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join([path for path in sys.path if path])},
        )
    except OSError as error:
        raise HostError(f"switch {name}: {os_reason(error)}") from error
    _begun.append(process)
    for old in [old for old in _begun if old.poll() is not None]:
        _begun.remove(old)  # reaped


async def connect(name: str) -> NetBackend:
    """A port of this switch, which is begun if it is not there. Raises ConfigError, HostError."""
    check_name(name)
    async with _locked(name) as path:
        sock = _dial(path)
        if sock is None:
            with listen(path, "switch") as listener:
                command = [sys.executable, "-m", "vmm.network.switch", name, str(listener.fileno())]
                _begin(name, command, listener.fileno())
                sock = _dial(path)
        if sock is None:
            raise HostError(f"switch {name}: nobody listens at {path}")
        return StreamNet(sock, mtu=SWITCH_MTU)


class Switch:
    """A switch in this loop, which machines of any process of this user reach as `--net switch=NAME`; for tests, its
    wires may be slow, lose, double and reorder frames, by a seed. `async with vmm.Switch("lan", loss=0.01) as lan:`"""

    def __init__(self, name: str, **impairment: float) -> None:
        """`impairment`: delay, jitter (seconds), loss, duplicate, reorder (parts of all frames), seed. ConfigError."""
        self.name = check_name(name)
        try:
            self._impairment = Impairment(**impairment)  # type: ignore[arg-type]
        except TypeError:
            raise ConfigError(f"switch: {', '.join(impairment)}: not all of these are known") from None
        with core_errors():
            self._impairment.check()
        self._core = SwitchCore()
        self._wires: list[ImpairedNet] = []
        self._plugged = 0
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = False
        self.idle = asyncio.Event()
        """No port is taken."""

    async def __aenter__(self) -> Self:
        async with _locked(self.name) as path:
            if is_live(path):
                raise ConfigError(f"switch: {self.name} is there already; choose another name")
            self.serve(listen(path, "switch"))
        return self

    def serve(self, listener: socket.socket) -> None:
        """Take ports from this socket."""
        self._listener = listener
        self._spawn(self._accept(listener))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def ports(self) -> int:
        """How many are taken."""
        return len(self._core.ports)

    def cut(self, down: bool = True) -> None:
        """Nothing passes any more; `False`: it passes again."""
        self._cut = down
        for wire in self._wires:
            wire.cut = down

    def port(self) -> NetBackend:
        """A port of this program's own, with `send` and `receive` of Ethernet frames."""
        return self._core.port()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"switch-{self.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            self.plug(sock)

    def plug(self, sock: socket.socket) -> None:
        """A connected socket becomes a port, which `ports` counts from now on."""
        try:
            port = self._core.port()
        except LinkError:
            sock.close()
            return
        self.idle.clear()

        def unplug(task: asyncio.Task[None]) -> None:  # also if it was cancelled before it began
            sock.close()
            port.unplug()
            if not self._core.ports:
                self.idle.set()

        self._spawn(self._serve(sock, port)).add_done_callback(unplug)

    async def _serve(self, sock: socket.socket, port: SwitchPort) -> None:
        stream: NetBackend = StreamNet(sock)
        wire: ImpairedNet | None = None
        if self._impairment.active:
            # Each wire has chances of its own, in the order in which they were plugged in. Way out and way in both have
            # them, so a frame from one card to another meets two wires, as it does between machines and a real switch.
            wire = ImpairedNet(stream, replace(self._impairment, seed=hash((self._impairment.seed, self._plugged))))
            self._plugged += 1
            wire.cut = self._cut
            self._wires.append(wire)
            stream = wire
        works = [self._from_wire(stream, port), self._to_wire(stream, port)]
        tasks = [asyncio.create_task(work, name=f"switch-{self.name}-port") for work in works]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if wire is not None:
                self._wires.remove(wire)
            await stream.aclose()

    async def _from_wire(self, stream: NetBackend, port: NetBackend) -> None:
        count = 0
        while True:
            frame = await stream.receive()
            if not self._cut:
                await port.send(frame)
            count += 1
            if not count % TURN:
                await asyncio.sleep(0)

    async def _to_wire(self, stream: NetBackend, port: NetBackend) -> None:
        while True:
            frame = await port.receive()
            if not self._cut:
                await stream.send(frame)

    async def aclose(self) -> None:
        """Every port is unplugged. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                Path(listener.getsockname()).unlink(missing_ok=True)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if listener is not None:
            listener.close()


async def _serve_until_idle(name: str, listener: socket.socket) -> None:
    switch = Switch(name)
    listener.setblocking(False)
    seconds = float(os.environ.get("LOOPVISOR_SWITCH_IDLE", IDLE_SECONDS))
    process = Path(listener.getsockname()).with_suffix(".pid")
    process.write_text(f"{os.getpid()}\n")
    switch.serve(listener)
    while True:
        await asyncio.sleep(seconds)
        if switch.ports:
            await switch.idle.wait()
            continue
        async with _locked(name):
            # Whoever connected meanwhile is in the backlog, and nobody can come while the lock is held.
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                if not switch.ports:
                    process.unlink(missing_ok=True)
                    await switch.aclose()
                    return
            else:
                sock.setblocking(False)
                switch.plug(sock)


def main() -> None:
    """`python -m vmm.network.switch NAME DESCRIPTOR`: the switch at a listening socket."""
    listener = socket.socket(fileno=int(sys.argv[2]))
    asyncio.run(_serve_until_idle(check_name(sys.argv[1]), listener))


if __name__ == "__main__":
    main()
