"""Network over UNIX sockets: a stream with length-prefixed frames, or datagrams; and `user`, rootless networking by
passt over such a stream. Loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from virtio.backends.child import Child
from virtio.backends.net import FdNet, Framing
from virtio.errors import ConfigError, HostError, os_reason

log = logging.getLogger(__name__)

BUFFER = 1 << 20
PASST_MTU = 65520


def _buffers(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)


START_SECONDS = 0.05
"""passt says nothing when it is ready; what is wrong with it shows within this time."""
LATER_SECONDS = 0.05
"""Starting a process holds the loop for a millisecond; a machine that goes on from a snapshot runs first, and a
short command in it has ended by then."""


class StreamNet(FdNet):
    """A connected stream socket: each frame after its length, 4 bytes big-endian (as passt and QEMU do)."""

    def __init__(self, sock: socket.socket, *, mtu: int | None = None) -> None:
        _buffers(sock)
        super().__init__([sock.detach()], Framing.STREAM)
        self.mtu = mtu

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], *, mtu: int | None = None) -> StreamNet:
        """Connect to a listening socket; ConfigError if nobody listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, os.fspath(path))
        except OSError as error:
            sock.close()
            raise ConfigError(f"{path}: {os_reason(error)}") from error
        return cls(sock, mtu=mtu)


class DatagramNet(FdNet):
    """A datagram socket, one frame each. A local address is bound in a private folder, so that the peer can answer."""

    def __init__(self, sock: socket.socket, folder: str | None = None) -> None:
        _buffers(sock)
        super().__init__([sock.detach()], Framing.DATAGRAM)
        self._folder = folder

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, local: str | os.PathLike[str] | None = None) -> DatagramNet:
        """Talk to the socket at `path`; ConfigError if there is none."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        folder = None
        try:
            if local is None:
                import tempfile

                folder = tempfile.mkdtemp(prefix="loopvisor-net-")
                local = Path(folder, "frames")
            sock.bind(os.fspath(local))
            sock.connect(os.fspath(path))
        except OSError as error:
            sock.close()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(f"{path}: {os_reason(error)}") from error
        return cls(sock, folder)

    async def aclose(self) -> None:
        await super().aclose()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


async def connect(path: str | os.PathLike[str]) -> FdNet:
    """A peer's UNIX socket, stream or datagram, whichever it is; ConfigError."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"{path}: not a socket")
    except OSError as error:
        raise ConfigError(f"{path}: {os_reason(error)}") from error
    try:
        return await StreamNet.connect(path)
    except ConfigError as refused:
        try:
            return DatagramNet.connect(path)
        except ConfigError:
            raise refused from None


class UserNet(StreamNet):
    """User-mode networking by a passt process of our own: no privileges, the guest gets the host's addresses by
    DHCP."""

    keeps_connections = True

    def __init__(self, sock: socket.socket, theirs: socket.socket, command: Sequence[str]) -> None:
        """`command` is passt's, for `theirs`, which this owns until the process has it."""
        super().__init__(sock, mtu=PASST_MTU)
        self._theirs: socket.socket | None = theirs
        self._command = command
        self._process: Child | None = None
        self._complaints = -1
        """The pipe that passt's messages end in; it stays open, for a message into a closed one would end passt."""
        self._later: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, options: Sequence[str] = (), *, wait: bool = True) -> UserNet:
        """`options` go to passt, for instance ("-t", "8080:80"). ConfigError if passt is missing, HostError with its
        last message if it fails. Without `wait` it starts a little later and a failure is not waited for:
        a restored guest knows its network already and is to run on at once. What it sends until then is kept."""
        program = shutil.which("passt")
        if program is None:
            raise ConfigError("net user: passt is not installed; apt-get install passt")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [program, "--foreground", "--quiet", "--fd", str(theirs.fileno()), *options]
        net = cls(ours, theirs, command)
        if not wait:
            net._later = asyncio.get_running_loop().call_later(LATER_SECONDS, net._begin_later)
            return net
        try:
            process = net._begin()
            code = await asyncio.wait_for(process.wait(), START_SECONDS)
        except TimeoutError:
            return net
        except BaseException:
            await net.aclose()
            raise
        reason = net._last_complaint() or f"it ended with status {code}"
        await net.aclose()
        raise HostError(f"net user: passt does not start here: {reason}")

    def _begin(self) -> Child:
        """Start the process. Raises OSError; the link is gone then."""
        theirs, self._theirs = self._theirs, None
        assert theirs is not None
        # Non-blocking: what nobody reads must not stop passt.
        self._complaints, stderr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with theirs, open(stderr, "wb"):
            self._process = Child(
                self._command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        return self._process

    def _begin_later(self) -> None:
        try:
            self._begin()
        except OSError as error:
            log.warning("net user: passt does not start: %s", os_reason(error))

    def _last_complaint(self) -> str:
        try:
            lines = os.read(self._complaints, 1 << 16).decode(errors="replace").split("\n")
        except BlockingIOError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    async def aclose(self) -> None:
        await super().aclose()
        if self._later is not None:
            self._later.cancel()
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None
        if self._process is not None:
            self._process.terminate()
            await self._process.wait()
        if self._complaints >= 0:
            os.close(self._complaints)
            self._complaints = -1
