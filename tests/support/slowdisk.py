"""A file whose reads, writes and flushes wait until told: a FUSE file system of one file. Root only.

It is served by a process of its own (`python -m tests.support.slowdisk FOLDER SIZE`), so that a test that hangs can be
killed: with its server the file system fails. Commands come on standard input: "hold:READ,WRITE,FSYNC", "release",
"waiting"; each is answered with a line. The protocol is that of fuse(4) and linux/fuse.h, version 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import random
import select
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.Struct("<IIQQIIII")
_NODE = 2
_DETACH = 2
_MOST = 1 << 20
SEED = 8


class Op(enum.IntEnum):
    """enum fuse_opcode"""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    BATCH_FORGET = 42


def content(size: int) -> bytes:
    """What the file holds at first."""
    return random.Random(SEED).randbytes(size)


class Server:
    """The file system's side."""

    def __init__(self, folder: str, size: int) -> None:
        self.data = bytearray(content(size))
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._held: set[str] = set()
        self._waiting: list[tuple[int, int, bytes]] = []
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0"
        if libc.mount(b"slowdisk", os.fsencode(folder), b"fuse", 0, options.encode()):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        try:
            self._serve()
        finally:
            libc.umount2(os.fsencode(folder), _DETACH)

    def _serve(self) -> None:
        print("ready", flush=True)  # noqa: T201
        while True:
            ready, _, _ = select.select([self._fd, 0], [], [])
            if self._fd in ready:
                self._request()
            if 0 in ready:
                for word in os.read(0, 4096).split() or [b"end"]:
                    if word == b"end":
                        return
                    self._command(word)

    def _command(self, word: bytes) -> None:
        if word.startswith(b"hold:"):
            self._held = set(word.decode()[5:].split(","))
        elif word == b"release":
            self._held = set()
            waiting, self._waiting = self._waiting, []
            for request in waiting:
                self._answer(*request)
        print(len(self._waiting), flush=True)  # noqa: T201

    def _request(self) -> None:
        try:
            message = os.read(self._fd, _MOST + 4096)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                return  # the request was withdrawn
            raise
        _, code, unique, node, *_ = _HEADER.unpack_from(message)
        if any(code == Op[name] for name in self._held):
            self._waiting.append((unique, code, message))
        else:
            self._answer(unique, code, message, node)

    def _attributes(self, node: int) -> bytes:
        directory = node != _NODE
        mode = 0o40755 if directory else 0o100644
        size = 0 if directory else len(self.data)
        return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _answer(self, unique: int, code: int, message: bytes, node: int = _NODE) -> None:
        body = message[_HEADER.size :]
        result, error = b"", 0
        match code:
            case Op.INIT:
                result = struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 64, 48, _MOST, 1, 256, *[0] * 9)
            case Op.LOOKUP if body.rstrip(b"\0") == b"disk":
                result = struct.pack("<4Q2I", _NODE, 0, 60, 60, 0, 0) + self._attributes(_NODE)
            case Op.GETATTR:
                result = struct.pack("<QII", 60, 0, 0) + self._attributes(node)
            case Op.OPEN:
                result = struct.pack("<QII", 1, 0, 0)
            case Op.READ:
                _, offset, size = struct.unpack_from("<QQI", body)
                result = bytes(self.data[offset : offset + size])
            case Op.WRITE:
                _, offset, size = struct.unpack_from("<QQI", body)
                self.data[offset : offset + size] = body[40 : 40 + size]
                result = struct.pack("<II", size, 0)
            case Op.RELEASE | Op.FSYNC | Op.FLUSH:
                pass
            case Op.FORGET | Op.INTERRUPT | Op.BATCH_FORGET:
                return  # they have no answer
            case Op.LOOKUP:
                error = errno.ENOENT
            case _:
                error = errno.ENOSYS
        with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
            os.write(self._fd, struct.pack("<IiQ", 16 + len(result), -error, unique) + result)


class SlowDisk:
    """The test's side. `path` is the file, `data` what it holds at first."""

    def __init__(self, folder: Path, size: int) -> None:
        self.path = folder / "disk"
        self.data = content(size)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.slowdisk", folder, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._server.stdout is not None
        if self._server.stdout.readline() != "ready\n":
            _, said = self._server.communicate(timeout=30)
            raise OSError(said.strip().rpartition("\n")[2])

    def _ask(self, word: str) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(f"{word}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    @property
    def waiting(self) -> int:
        """Requests of the kernel that are held."""
        return self._ask("waiting")

    def hold(self, *operations: str) -> None:
        """Answer none of these any more; default: READ, WRITE and FSYNC."""
        self._ask(f"hold:{','.join(operations or ('READ', 'WRITE', 'FSYNC'))}")

    def release(self) -> None:
        """Answer what waits, and everything from now on at once."""
        self._ask("release")

    def close(self) -> None:
        self._server.communicate(timeout=30)


@contextlib.contextmanager
def slow_disk(folder: Path, size: int) -> Iterator[SlowDisk]:
    """A mounted SlowDisk; OSError without root or FUSE."""
    folder.mkdir(exist_ok=True)
    disk = SlowDisk(folder, size)
    try:
        yield disk
    finally:
        disk.close()


if __name__ == "__main__":
    Server(sys.argv[1], int(sys.argv[2]))
