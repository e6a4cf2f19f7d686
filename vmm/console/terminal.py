"""The user's terminal: a machine's console on standard input and output, and `vmm console`'s attached session.

A terminal is put into raw mode and given back in every case short of SIGKILL. Standard output is written without
ever blocking the loop, and without changing the flags of the open file that a shell shares with us; what it does not
take yet stays in the console's ring, which holds the machine back.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import select
import signal
import socket
import stat
import sys
import termios
import time
import tty
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vmm.console.hub import ConsoleHub
from vmm.errors import HostError, os_reason
from vmm.lifecycle import Outcome, Reason

ESCAPE = b"\x1d"
"""Ctrl-]"""
CHUNK = 16 << 10
TYPE_AHEAD = 16 << 20
"""Bytes from a terminal that are taken while the guest does not: Ctrl-] comes behind them, and nothing else helps."""
LEAVE_SECONDS = 0.5
"""How long a client that leaves waits for its input to be taken, from each time that some of it is."""
PIPE_CHUNK = 512
"""Bytes that a descriptor which polled writable takes without blocking (POSIX: PIPE_BUF is at least this)."""


class RawMode:
    """Puts a terminal into raw mode; `restore()` is idempotent and also runs at exit."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._saved: list[Any] | None = None

    def enter(self) -> None:
        self._saved = termios.tcgetattr(self._descriptor)
        atexit.register(self.restore)
        tty.setraw(self._descriptor, termios.TCSANOW)

    def enter_again(self) -> None:
        """After SIGCONT: the shell made the terminal its own while we were stopped."""
        if self._saved is not None and in_foreground(self._descriptor):
            tty.setraw(self._descriptor, termios.TCSANOW)

    def restore(self) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            atexit.unregister(self.restore)
            try:
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, saved)
            except termios.error:
                pass  # the terminal is gone


def in_foreground(descriptor: int) -> bool:
    """Reading this terminal would not stop us with SIGTTIN."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False


class Output:
    """Writes to a descriptor what it takes now. `write` returns the number of bytes, -1: wait until writable."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._own = -1
        self._socket: socket.socket | None = None
        self._patient = False
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(descriptor))
            self.descriptor = self._socket.fileno()
        elif stat.S_ISFIFO(mode) or os.isatty(descriptor):
            try:
                # A second open file of the same pipe or terminal: O_NONBLOCK then concerns nobody else.
                self._own = os.open(
                    f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                )
                self.descriptor = self._own
            except OSError:
                self._patient = True

    def write(self, data: bytes) -> int:
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            if self._patient:
                poll = select.poll()
                poll.register(self.descriptor, select.POLLOUT)
                if not poll.poll(0):
                    return -1
                data = data[:PIPE_CHUNK]
            return os.write(self.descriptor, data)
        except BlockingIOError:
            return -1

    def close(self) -> None:
        if self._own >= 0:
            own, self._own = self._own, -1
            os.close(own)
        if self._socket is not None:
            self._socket.close()


class StandardStreams:
    """A machine's console on this process's standard input and output. On a terminal Ctrl-] ends the machine."""

    lossless = True

    def __init__(
        self,
        hub: ConsoleHub,
        finish: Callable[[Outcome], None],
        *,
        input_descriptor: int = 0,
        output_descriptor: int = 1,
    ) -> None:
        self._hub = hub
        self._finish = finish
        self._input = input_descriptor
        self._is_terminal = False
        self._reading = False
        self._ahead = 0
        self._continuing = False
        self._raw = RawMode(input_descriptor)
        self._output: Output | None = None
        self._output_descriptor = output_descriptor
        self._waiting = False
        self._drained = asyncio.Event()
        self.position = hub.total

    async def start(self) -> None:
        try:
            self._output = Output(self._output_descriptor)
        except OSError as error:
            raise HostError(f"standard output: {os_reason(error)}") from error
        self._hub.watch(self)
        self._is_terminal = os.isatty(self._input)
        if self._is_terminal:
            if not in_foreground(self._input):
                return
            self._raw.enter()
            if signal.getsignal(signal.SIGCONT) is signal.SIG_DFL:
                with suppress(ValueError, RuntimeError):  # not the main thread
                    asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, self._raw.enter_again)
                    self._continuing = True
        self._resume_reading()

    def close(self) -> None:
        """At once. Idempotent."""
        self._stop_reading()
        self._hub.unwatch(self)
        if self._output is not None:
            if self._waiting:
                asyncio.get_running_loop().remove_writer(self._output.descriptor)
                self._waiting = False
            self._output.close()
            self._output = None
        if self._continuing:
            self._continuing = False
            asyncio.get_running_loop().remove_signal_handler(signal.SIGCONT)
        self._raw.restore()

    async def aclose(self) -> None:
        """Write out what the guest said last, however long the reader takes."""
        try:
            self._stop_reading()
            self.wake()
            if self._output is not None and self.position < self._hub.total:
                await self._drained.wait()
        finally:
            self.close()

    def wake(self) -> None:
        """Write while the descriptor takes it."""
        if self._waiting or self._output is None:
            return
        while self.position < self._hub.total:
            try:
                count = self._output.write(self._hub.output(self.position, CHUNK))
            except OSError as error:
                self._lost(error)
                return
            if count < 0:
                self._waiting = True
                asyncio.get_running_loop().add_writer(self._output.descriptor, self._writable)
                return
            self.position += count
            self._hub.advanced(self)
        self._drained.set()

    def _writable(self) -> None:
        assert self._output is not None
        asyncio.get_running_loop().remove_writer(self._output.descriptor)
        self._waiting = False
        self.wake()

    def _lost(self, error: OSError) -> None:
        self.position = self._hub.total
        self._drained.set()
        self._hub.unwatch(self)
        what = "closed by its reader" if isinstance(error, BrokenPipeError) else os_reason(error)
        self._finish(Outcome(Reason.HOST_ERROR, f"standard output: {what}"))

    def _resume_reading(self) -> None:
        self._ahead = 0
        if self._reading:
            return
        try:
            asyncio.get_running_loop().add_reader(self._input, self._readable)
            self._reading = True
        except (OSError, ValueError, RuntimeError):
            self._read_file()  # a regular file, which epoll refuses

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            asyncio.get_running_loop().remove_reader(self._input)

    def _readable(self) -> None:
        try:
            data = os.read(self._input, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._stop_reading()
            if self._is_terminal:  # in raw mode nothing that is typed is an end of file
                self._finish(Outcome(Reason.SIGNAL, "the terminal is gone", code=signal.SIGHUP))
            return
        if self._is_terminal and ESCAPE in data:
            data = data[: data.index(ESCAPE)]
            self._finish(Outcome(Reason.KILLED, "Ctrl-] was typed"))
        if not self._hub.feed(data, self._resume_reading):
            self._ahead += len(data)
            if not self._is_terminal or self._ahead >= TYPE_AHEAD:
                self._stop_reading()

    def _read_file(self) -> None:
        """A file is read as fast as the guest takes it."""
        try:
            while not self._hub.closed and (data := os.read(self._input, CHUNK)):
                if not self._hub.feed(data, self._read_file):
                    return
        except OSError:
            pass


def attach(path: Path, name: str) -> str:
    """Connect this terminal to a console socket until Ctrl-], the end of the machine, or a signal.

    Returns one line that says why it ended. Raises HostError if nobody listens. Blocking; main thread.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise HostError(f"{name}: console socket {path}: {os_reason(error)}; see vmm ps") from error
    raw = RawMode(0)
    handlers: dict[signal.Signals, Any] = {}

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with connection:
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    handlers[number] = signal.signal(number, leave)
            terminal = os.isatty(0)
            if terminal and in_foreground(0):
                raw.enter()
                handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda _number, _frame: raw.enter_again())
            return _relay(connection, name, terminal)
        finally:
            raw.restore()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _relay(connection: socket.socket, name: str, terminal: bool) -> str:
    connection.setblocking(False)
    closed = f"{name}: the machine closed its console"
    poll = select.poll()
    pending = bytearray()
    reading, leaving = True, False
    deadline = 0.0
    while not leaving or (pending and time.monotonic() < deadline):
        poll.register(connection, select.POLLIN | (select.POLLOUT if pending else 0))
        if reading and len(pending) < (TYPE_AHEAD if terminal else 1):
            poll.register(0, select.POLLIN)
        else:
            with suppress(KeyError):
                poll.unregister(0)
        for descriptor, events in poll.poll(LEAVE_SECONDS * 1000 if leaving else None):
            if descriptor == 0:
                data = _read_input()
                if not data:
                    reading = False
                    if terminal:  # in raw mode nothing that is typed is an end of file
                        return f"{name}: the terminal is gone"
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_WR)
                elif terminal and ESCAPE in data:
                    pending += data[: data.index(ESCAPE)]
                    reading, leaving = False, True
                    deadline = time.monotonic() + LEAVE_SECONDS
                else:
                    pending += data
                continue
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                try:
                    data = connection.recv(1 << 16)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    return closed
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        if pending:
            try:
                del pending[: connection.send(pending)]
                deadline = time.monotonic() + LEAVE_SECONDS
            except BlockingIOError:
                pass
            except OSError:
                return closed
    return f"{name}: detached"


def _read_input() -> bytes:
    """b"" at the end, and of a terminal that is gone."""
    try:
        return os.read(0, CHUNK)
    except OSError:
        return b""
