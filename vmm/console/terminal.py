"""The user's terminal: a machine's console on standard input and output, and `vmm console`'s attached session.

A terminal is put into raw mode and given back in every case short of SIGKILL. Standard output is written without
ever blocking the loop; what it does not take yet stays in the console's ring, which holds the machine back.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import select
import signal
import socket
import termios
import time
import tty
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vmm.console.descriptors import Input, Output
from vmm.console.hub import ConsoleHub
from vmm.errors import HostError, os_reason
from vmm.lifecycle import Outcome, Reason

ESCAPE = b"\x1d"
"""Ctrl-]"""
CHUNK = 16 << 10
TYPE_AHEAD = 16 << 20
"""Bytes of typed input that are taken while the guest reads none: the Ctrl-] that leaves may stand behind them."""
LEAVE_SECONDS = 0.5
"""How long a client that leaves waits for its input to be taken, from each time that some of it is."""
QUIET_SECONDS = 2.0
"""A client whose input came from a pipe or file, and has ended, leaves once the machine was silent for this long."""


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
        self._input: Input | None = None
        self._input_descriptor = input_descriptor
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
        self._is_terminal = os.isatty(self._input_descriptor)
        if self._is_terminal:
            if not in_foreground(self._input_descriptor):
                return
            self._raw.enter()
            if signal.getsignal(signal.SIGCONT) is signal.SIG_DFL:
                with suppress(ValueError, RuntimeError):  # not the main thread
                    asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, self._raw.enter_again)
                    self._continuing = True
        try:
            self._input = Input(self._input_descriptor)
        except OSError as error:
            raise HostError(f"standard input: {os_reason(error)}") from error
        self._resume_reading()

    def close(self) -> None:
        """At once. Idempotent."""
        self._stop_reading()
        if self._input is not None:
            self._input.close()
            self._input = None
        self._hub.unwatch(self)
        if self._output is not None:
            if self._waiting:
                asyncio.get_running_loop().remove_reader(self._output.watched)
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
                asyncio.get_running_loop().add_reader(self._output.watched, self._writable)
                return
            self.position += count
            self._hub.advanced(self)
        self._drained.set()

    def _writable(self) -> None:
        assert self._output is not None
        asyncio.get_running_loop().remove_reader(self._output.watched)
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
        if self._reading or self._input is None:
            return
        if self._input.watched < 0:
            self._read_file(self._input)
        else:
            asyncio.get_running_loop().add_reader(self._input.watched, self._readable)
            self._reading = True

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            assert self._input is not None
            asyncio.get_running_loop().remove_reader(self._input.watched)

    def _readable(self) -> None:
        assert self._input is not None
        try:
            data = self._input.read(CHUNK)
        except OSError:
            data = b""
        if data is None:
            return
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

    def _read_file(self, file: Input) -> None:
        """A file is read as fast as the guest takes it."""
        try:
            while not self._hub.closed and (data := file.read(CHUNK)):
                if not self._hub.feed(data, self._resume_reading):
                    return
        except OSError:
            pass


def attach(path: Path, name: str, *, follow: bool = False, quiet: float = QUIET_SECONDS) -> str:
    """Connect this terminal to a console socket until Ctrl-], the end of the machine, or a signal; input from a pipe or
    file ends it too, once that has been taken and the machine has said nothing for `quiet` seconds. Input that ends
    without a byte (/dev/null), and `follow`, mean to watch until the machine ends.

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

    with connection, Input(0) as source, Output(1) as target:
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    handlers[number] = signal.signal(number, leave)
            terminal = os.isatty(0)
            if terminal and in_foreground(0):
                raw.enter()
                handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, lambda _number, _frame: raw.enter_again())
            return _Relay(connection, source, target, name, terminal=terminal, quiet=None if follow else quiet).run()
        finally:
            raw.restore()
            for number, handler in handlers.items():
                signal.signal(number, handler)


class _Relay:
    """`vmm console`: bytes both ways between a console socket and our standard streams."""

    def __init__(
        self,
        connection: socket.socket,
        source: Input,
        target: Output,
        name: str,
        *,
        terminal: bool,
        quiet: float | None,
    ) -> None:
        connection.setblocking(False)
        self._connection, self._source, self._target = connection, source, target
        self._name, self._terminal, self._quiet = name, terminal, quiet
        self._poll = select.poll()
        self._typed = bytearray()
        """Read from our input, not taken by the machine yet."""
        self._said = b""
        """Read from the machine, not taken by our output yet."""
        self._reading, self._leaving = True, False
        self._ended: str | None = None
        self._any = False
        """Our input had a byte."""
        self._deadline = float("inf")
        """When it ends, time.monotonic(), unless something moves."""

    def run(self) -> str:
        """To the end; one line that says why."""
        connection, source, target = self._connection, self._source, self._target
        while self._ended is None and time.monotonic() < self._deadline and (not self._leaving or self._typed):
            if self._reading and source.watched < 0 and not self._typed:
                self._read_input()  # a regular file, which is always ready
            self._want(source.watched, self._reading and len(self._typed) < (TYPE_AHEAD if self._terminal else 1))
            self._want(target.watched, bool(self._said))
            events = (select.POLLOUT if self._typed else 0) | (0 if self._said else select.POLLIN)
            self._poll.register(connection, events)
            left = self._deadline - time.monotonic()
            limit = None if left == float("inf") else max(left, 0.0) * 1000
            ready = {descriptor for descriptor, _ in self._poll.poll(limit)}
            if source.watched in ready:
                self._read_input()
            if connection.fileno() in ready and not self._said:
                self._receive()
            if self._said:
                self._write_output()
            if self._typed:
                self._send()
        return self._ended or f"{self._name}: detached"

    def _want(self, descriptor: int, wanted: bool) -> None:
        if descriptor >= 0 and wanted:
            self._poll.register(descriptor, select.POLLIN)
        elif descriptor >= 0:
            with suppress(KeyError):
                self._poll.unregister(descriptor)

    def _moved(self) -> None:
        """Something was taken or came: a client that wants to leave waits from now on."""
        if self._leaving:
            self._deadline = time.monotonic() + LEAVE_SECONDS
        elif self._any and self._quiet is not None and not (self._reading or self._typed):
            self._deadline = time.monotonic() + self._quiet

    def _read_input(self) -> None:
        try:
            data = self._source.read(CHUNK)
        except OSError:  # a terminal that is gone
            data = b""
        if data is None:
            return
        if not data:
            self._reading = False
            if self._terminal:  # in raw mode nothing that is typed is an end of file
                self._ended = f"{self._name}: the terminal is gone"
        elif self._terminal and ESCAPE in data:
            self._typed += data[: data.index(ESCAPE)]
            self._reading, self._leaving = False, True
        else:
            self._any = True
            self._typed += data
        self._moved()

    def _receive(self) -> None:
        try:
            self._said = self._connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            self._said = b""
        if not self._said:
            self._ended = f"{self._name}: the machine closed its console"
        self._moved()

    def _write_output(self) -> None:
        count = self._target.write(self._said)
        if count > 0:
            self._said = self._said[count:]
            self._moved()

    def _send(self) -> None:
        try:
            del self._typed[: self._connection.send(self._typed)]
        except BlockingIOError:
            return
        except OSError:
            self._ended = f"{self._name}: the machine closed its console"
        self._moved()
