"""`vmm run IMAGE -- COMMAND…`: a program in the guest, with our standard streams, terminal, signals and its status."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from cli.consolesize import terminal_size
from vmm.console.descriptors import Input, Output
from vmm.console.terminal import CHUNK, RawMode, in_foreground
from vmm.errors import HostError, os_reason

if TYPE_CHECKING:
    from vmm.guest.process import GuestProcess, GuestStream
    from vmm.vm import VirtualMachine


async def run_command(vm: VirtualMachine, arguments: list[str]) -> int:
    """Run it in a machine that runs; its exit status, or 128 + signal. Raises VmmError if the guest went away."""
    on_terminal = os.isatty(0) and os.isatty(1) and in_foreground(0)
    words = map(os.fsencode, arguments)  # the bytes that the shell gave us, whatever the locale made of them
    process = await vm.start_process(*words, terminal=terminal_size() if on_terminal else None)
    vm.timeline.mark("command")
    try:
        seen = partial(vm.timeline.mark, "first output")
        return await attach(process, interactive=True, terminal=on_terminal, seen=seen)
    finally:
        vm.timeline.mark("status")


async def attach(
    process: GuestProcess, *, interactive: bool, terminal: bool, seen: Callable[[], None] = lambda: None
) -> int:
    """Our standard streams are the program's until it ends: its exit status, or 128 + signal. Leaving early kills it.

    `interactive`: it gets our input. `terminal`: it runs on a terminal whose size follows ours; with both, ours is raw.
    `seen` is called when output has come. Raises VmmError if the guest went away."""
    raw = RawMode(0)
    async with process, _signals(process, terminal):
        feeding = asyncio.create_task(_feed(process) if interactive else process.close_stdin(), name="stdin")
        try:
            if interactive and terminal:
                raw.enter()
            await asyncio.gather(_copy(process.stdout, 1, seen), _copy(process.stderr, 2, seen))
            return await process.wait()
        finally:
            raw.restore()
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


@asynccontextmanager
async def _signals(process: GuestProcess, on_terminal: bool) -> AsyncIterator[None]:
    """Ctrl-C goes to the program, the window's size follows ours. Signals that we were told to ignore stay ignored."""
    loop = asyncio.get_running_loop()
    sending: set[asyncio.Task[None]] = set()
    handled: list[signal.Signals] = []

    def send(work: Coroutine[Any, Any, None]) -> None:
        task = loop.create_task(work, name="signal")
        sending.add(task)
        task.add_done_callback(sending.discard)

    def on(number: signal.Signals, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if signal.getsignal(number) is not signal.SIG_IGN:
            handled.append(number)
            loop.add_signal_handler(number, lambda: send(work()))

    on(signal.SIGINT, lambda: process.send_signal(signal.SIGINT))
    if on_terminal:
        on(signal.SIGWINCH, lambda: process.resize(*terminal_size()))
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
        await asyncio.gather(*sending, return_exceptions=True)


async def _feed(process: GuestProcess) -> None:
    with Input(0) as source:
        while data := await read_input(source, CHUNK):
            await process.write(data)
    await process.close_stdin()


async def read_input(source: Input, limit: int) -> bytes:
    """The next bytes, b"" at the end; without blocking the loop."""
    try:
        while (data := source.read(limit)) is None:
            await _ready(source.watched)
        return data
    except OSError:
        return b""


async def _ready(watched: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(watched, ready.set_result, None)
    try:
        await ready
    finally:
        loop.remove_reader(watched)


async def _copy(stream: GuestStream, descriptor: int, seen: Callable[[], None]) -> None:
    """Everything that the program writes."""
    async with write_all(descriptor) as write:
        async for data in stream:
            seen()
            await write(data)


@asynccontextmanager
async def write_all(descriptor: int) -> AsyncIterator[Callable[[bytes], Coroutine[Any, Any, None]]]:
    """A function that writes all of its bytes to a standard stream. A reader that went away raises BrokenPipeError,
    another fault of the descriptor HostError."""
    output = Output(descriptor)

    async def write(data: bytes) -> None:
        at = 0
        while at < len(data):
            count = output.write(data[at : at + CHUNK])
            if count >= 0:
                at += count
            else:
                await _ready(output.watched)

    try:
        yield write
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "standard output" if descriptor == 1 else "standard error"
        raise HostError(f"{name}: {os_reason(error)}") from error
    finally:
        output.close()
