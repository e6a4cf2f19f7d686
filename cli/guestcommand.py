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
    raw = RawMode(0)
    words = map(os.fsencode, arguments)  # the bytes that the shell gave us, whatever the locale made of them
    async with await vm.start_process(*words, terminal=terminal_size() if on_terminal else None) as process:
        vm.timeline.mark("command")
        async with _signals(process, on_terminal):
            feeding = asyncio.create_task(_feed(process), name="stdin")
            try:
                if on_terminal:
                    raw.enter()
                seen = partial(vm.timeline.mark, "first output")
                await asyncio.gather(_copy(process.stdout, 1, seen), _copy(process.stderr, 2, seen))
                return await process.wait()
            finally:
                vm.timeline.mark("status")
                raw.restore()
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)


@asynccontextmanager
async def _signals(process: GuestProcess, on_terminal: bool) -> AsyncIterator[None]:
    """Ctrl-C goes to the program, the window's size follows ours."""
    loop = asyncio.get_running_loop()
    sending: set[asyncio.Task[None]] = set()

    def send(work: Coroutine[Any, Any, None]) -> None:
        task = loop.create_task(work, name="signal")
        sending.add(task)
        task.add_done_callback(sending.discard)

    interrupts = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # what our parent had us ignore stays ignored
    if interrupts:
        loop.add_signal_handler(signal.SIGINT, lambda: send(process.send_signal(signal.SIGINT)))
    if on_terminal:
        loop.add_signal_handler(signal.SIGWINCH, lambda: send(process.resize(*terminal_size())))
    try:
        yield
    finally:
        if interrupts:
            loop.remove_signal_handler(signal.SIGINT)
        if on_terminal:
            loop.remove_signal_handler(signal.SIGWINCH)
        await asyncio.gather(*sending, return_exceptions=True)


async def _feed(process: GuestProcess) -> None:
    with Input(0) as source:
        while data := await _read(source):
            await process.write(data)
    await process.close_stdin()


async def _read(source: Input) -> bytes:
    """The next bytes, b"" at the end; without blocking the loop."""
    try:
        while (data := source.read(CHUNK)) is None:
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
    """Everything that the program writes. A reader that went away raises BrokenPipeError, another fault of the
    descriptor HostError; either ends the command."""
    output = Output(descriptor)
    try:
        async for data in stream:
            seen()
            while data:
                count = output.write(data[:CHUNK])
                if count >= 0:
                    data = data[count:]
                else:
                    await _ready(output.watched)
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "standard output" if descriptor == 1 else "standard error"
        raise HostError(f"{name}: {os_reason(error)}") from error
    finally:
        output.close()
