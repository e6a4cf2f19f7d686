"""`vmm run`: one machine in the foreground, from a configuration to an exit status."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cli import errors
from cli.errors import EXIT_GUEST, say
from cli.lean import import_uvloop
from cli.options import RunArguments
from vmm.config import Config
from vmm.console.descriptors import Output
from vmm.cores import is_stock_kernel
from vmm.errors import GuestError, HostError, VmmError, os_reason
from vmm.events import EventStream, Warned
from vmm.lifecycle import Outcome, Reason
from vmm.machine.hardware import HeadStart
from vmm.machine.origin import Saved
from vmm.timeline import Timeline
from vmm.vm import VirtualMachine

CONSOLE_LINES = 15
"""How much of its console is shown of a machine that ended before the command did."""
TELLING = (Reason.CRASH, Reason.TRIPLE_FAULT, Reason.HALTED, Reason.GUEST_ERROR, Reason.HOST_ERROR, Reason.TIMEOUT)
"""Ends of which the console's last lines are shown; of other ends only if the command had not started."""
ENDING_SECONDS = 5.0


def run(
    config: Config,
    arguments: RunArguments,
    head_start: HeadStart,
    *,
    begin: tuple[int, int],
    configured: tuple[int, int],
    saved: Saved | None = None,
) -> int:
    """Run it; the exit status. `saved`: what it goes on from. `begin` and `configured`: when its first two moments
    were (timeline.now()). Raises VmmError."""
    timeline = Timeline()
    timeline.mark("begin", begin)
    timeline.mark("configured", configured)
    # What our parent had us ignore, as nohup does, stays ignored.
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signals = [number for number in endings if signal.getsignal(number) is not signal.SIG_IGN]
    if signal.SIGINT in signals:
        # So that the runner sets no handler of its own: replacing that one would describe it at length (lean.py).
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
        outcome, status = runner.run(_run(config, arguments, head_start, timeline, saved, signals))
    if outcome is not None:
        _report(config, outcome, arguments)
    if arguments.timing or arguments.timing_svg is not None:
        _show_timing(timeline, config.name, arguments)
    return status


def _loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop, but not where loading it takes longer than its speed can save (tests.bench start): a bare machine has one
    serial port to serve. None: asyncio's own."""
    if config.platform == "bare":
        return None
    import_uvloop()
    import uvloop

    return uvloop.new_event_loop


async def _run(
    config: Config,
    arguments: RunArguments,
    head_start: HeadStart,
    timeline: Timeline,
    saved: Saved | None,
    signals: list[signal.Signals],
) -> tuple[Outcome | None, int]:
    """(how the machine ended, None if it was ended after a command; exit status). `signals` end it."""
    command = arguments.command
    vm = VirtualMachine(config, head_start=head_start, saved=saved)
    vm.timeline = timeline
    loop = asyncio.get_running_loop()
    if os.isatty(2) and config.kernel is not None and is_stock_kernel(config):
        from cli.progress import boot_progress

        timeline.on_mark, errors.before_message = boot_progress()
    debug = vm.on_debug = _DebugOutput()
    helpers = [asyncio.create_task(_tell_warnings(vm.events(), config.name), name="warnings")]
    try:
        for number in signals:
            loop.add_signal_handler(number, vm.end, Outcome(Reason.SIGNAL, number.name, code=number))
        async with vm:
            gc.freeze()  # imports and the machine are there to stay (main.py)
            gc.enable()
            if not command:
                if config.console.kind == "stdio" and os.isatty(0) and os.isatty(2):
                    say(f"{config.name}: Ctrl-] ends the machine\r")
                if config.console.kind == "stdio" and os.isatty(1) and (config.agent or config.hvc):
                    from cli.consolesize import follow_size

                    helpers.append(asyncio.create_task(follow_size(vm), name="size"))
                if arguments.warm:
                    helpers.append(asyncio.create_task(_keep_warm(vm), name="warm"))
                outcome = await (vm.wait() if arguments.paused else vm.run())
                return outcome, outcome.status
            vm.resume()
            from cli.guestcommand import run_command  # while the guest runs already

            if arguments.warm:
                await _keep_warm(vm)
            try:
                status = await run_command(vm, command)
                vm.end(Outcome(Reason.KILLED, f"its program has ended with status {status}"))  # for who waits for it
                return None, status
            except VmmError as error:
                if not (vm.ending or (isinstance(error, GuestError) and await _ends_soon(vm))):
                    raise
                outcome = await vm.wait()
                if outcome.reason in TELLING or "command" not in dict(timeline.moments):
                    sys.stderr.write(_last_words(vm.console.text))
                return outcome, outcome.status or EXIT_GUEST
    finally:
        for helper in helpers:
            helper.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
        debug.close()
        for number in signals:
            loop.remove_signal_handler(number)


async def _keep_warm(vm: VirtualMachine) -> None:
    from vmm.launch import keep_warm

    with suppress(VmmError):  # it ended before it was up
        await keep_warm(vm)


async def _ends_soon(vm: VirtualMachine) -> bool:
    """A guest that powers off kills its programs and its agent first."""
    try:
        async with asyncio.timeout(ENDING_SECONDS):
            await vm.ended()
    except TimeoutError:
        return False
    return True


def _last_words(text: str) -> str:
    """The end of a console, without what would steer our terminal."""
    lines = re.sub(r"\x1b\[[0-9;?]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\r\n", "\n")).splitlines()
    return "".join(f"  | {line}\n" for line in lines[-CONSOLE_LINES:])


class _DebugOutput:
    """The guest's debug port on stderr. What a stuck reader does not take is dropped: it must not stop the loop."""

    def __init__(self) -> None:
        self._output = Output(2)

    def __call__(self, data: bytes) -> None:
        try:
            while data and (count := self._output.write(data)) > 0:
                data = data[count:]
        except OSError:
            pass  # nobody reads it

    def close(self) -> None:
        self._output.close()


async def _tell_warnings(events: EventStream, name: str) -> None:
    async for event in events:
        if isinstance(event, Warned):
            say(f"{name}: {event.text}\r")


def _show_timing(timeline: Timeline, name: str, arguments: RunArguments) -> None:
    """Raises HostError if the picture cannot be written."""
    from vmm.timeline import process_start
    from vmm.timelineview import as_svg, as_text

    timeline.mark("exec", process_start())
    if arguments.timing:
        sys.stderr.write(as_text(timeline, name))
    if arguments.timing_svg is not None:
        try:
            Path(arguments.timing_svg).write_text(as_svg(timeline, name))
        except OSError as error:
            raise HostError(f"timing-svg: {arguments.timing_svg}: {os_reason(error)}") from error


def _report(config: Config, outcome: Outcome, arguments: RunArguments) -> None:
    detail = str(outcome)
    if outcome.instruction:
        from vmm.disassemble import describe_instruction

        detail += ": " + describe_instruction(outcome.instruction, outcome.rip)
    if arguments.json:
        import json

        sys.stderr.write(
            json.dumps(
                {
                    "name": config.name,
                    "reason": outcome.reason.value,
                    "detail": detail,
                    "status": outcome.status,
                }
            )
            + "\n"
        )
    elif arguments.command:
        say(f"{config.name}: the machine ended before the command: {detail}")
    elif outcome.reason not in (Reason.SHUTDOWN, Reason.RESET, Reason.EXIT):
        say(f"{config.name}: {detail}")
