"""`vmm run`: from arguments to a configuration, to a machine, to an exit status."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import errors
from cli.errors import EXIT_GUEST, say
from cli.options import RunArguments
from vmm.config import Config
from vmm.cores import is_stock_kernel
from vmm.errors import ConfigError, GuestError, HostError, VmmError, os_reason
from vmm.events import EventStream, Warned
from vmm.launch import config_for
from vmm.lifecycle import Outcome, Reason
from vmm.terminal import Output
from vmm.timeline import Timeline
from vmm.vm import VirtualMachine

if TYPE_CHECKING:
    from cli.progress import Progress
    from images.catalog import Image

CONSOLE_LINES = 15
"""How much of its console is shown of a machine that ended before the command did."""
TELLING = (Reason.CRASH, Reason.TRIPLE_FAULT, Reason.HALTED, Reason.GUEST_ERROR, Reason.HOST_ERROR, Reason.TIMEOUT)
"""Ends on which the console may throw light; others only if the command had not started."""
ENDING_SECONDS = 5.0


def execute(arguments: RunArguments) -> int:
    """Run it; the exit status. Raises VmmError."""
    begin = time.monotonic_ns()
    if arguments.print_schema:
        import json

        from vmm.schema import schema

        sys.stdout.write(json.dumps(schema(), indent=2) + "\n")
        return 0
    config = configure(arguments)
    if arguments.print_config:
        sys.stdout.write(config.to_toml())
        return 0
    if arguments.print_cmdline:
        from vmm.builder import effective_cmdline
        from vmm.cores import choice

        config.check_host()
        sys.stdout.write(effective_cmdline(config, choice(config).probe.capabilities) + "\n")
        return 0
    timeline = Timeline()
    timeline.mark("begin", begin)
    timeline.mark("configured")
    with asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
        outcome, status = runner.run(_run(config, arguments.command, timeline))
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
    import uvloop

    return uvloop.new_event_loop


def configure(arguments: RunArguments) -> Config:
    """The image's wishes, then the file's values, then the options; a name if none is given. Raises ConfigError."""
    values: dict[str, Any] = {}
    if arguments.config_file is not None:
        values |= Config.read(Path(arguments.config_file))
    values |= arguments.config
    # A command's output is what stdout is for; the console then shows itself only where it is asked for.
    values.setdefault("console", "none" if arguments.command else "stdio")
    if arguments.image is None:
        values["name"] = values.get("name") or f"vm-{os.getpid()}"
        config = Config.from_dict(values)
    else:
        image = _image(arguments.image)
        stem = "".join(char for char in image.name.partition(".")[0] if char.isalnum() or char in "-_").lstrip("-_")
        values["name"] = values.get("name") or f"{(stem or 'vm')[:40]}-{os.getpid()}"
        config = config_for(image, **values)
    if config.kernel is None and config.flat is None:
        raise ConfigError("nothing to run: name an image or give --kernel; vmm images ls shows what there is")
    if arguments.command and not config.agent:
        raise ConfigError(f"{arguments.command[0]}: a command needs an image with the guest agent, such as linux")
    return config


def _image(name: str) -> Image:
    """The image of that name, or the kernel file; built first, if it never was."""
    from images import catalog
    from images.errors import ImageError

    progress = _Progress()
    try:
        return catalog.resolve(name, build=True, progress=progress)
    except ImageError as error:
        progress.clear()
        raise (ConfigError if error.kind == "config" else HostError)(str(error)) from error


class _Progress:
    """The image builder's progress on a terminal; loaded when something is built, which is seldom."""

    def __init__(self) -> None:
        self._line: Progress | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._line is None:
            from cli.progress import Progress

            self._line = Progress()
        self._line(what, done, total)

    def clear(self) -> None:
        if self._line is not None:
            self._line.clear()


async def _run(config: Config, command: list[str], timeline: Timeline) -> tuple[Outcome | None, int]:
    """(how the machine ended, None if it was ended after a command; exit status)"""
    vm = VirtualMachine(config)
    vm.timeline = timeline
    loop = asyncio.get_running_loop()
    if os.isatty(2) and config.kernel is not None and is_stock_kernel(config):
        from cli.progress import boot_progress

        timeline.on_mark, errors.before_message = boot_progress()
    debug = vm.on_debug = _DebugOutput()
    helpers = [asyncio.create_task(_tell_warnings(vm.events(), config.name), name="warnings")]
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        for number in signals:
            loop.add_signal_handler(number, vm.end, Outcome(Reason.SIGNAL, number.name, code=number))
        async with vm:
            if not command:
                if config.console.kind == "stdio" and os.isatty(0) and os.isatty(2):
                    say(f"{config.name}: Ctrl-] ends the machine\r")
                if config.console.kind == "stdio" and os.isatty(1) and (config.agent or config.hvc):
                    from cli.consolesize import follow_size

                    helpers.append(asyncio.create_task(follow_size(vm), name="size"))
                outcome = await vm.run()
                return outcome, outcome.status
            from cli.guestcommand import run_command

            vm.resume()
            try:
                return None, await run_command(vm, command)
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
    from vmm.timeline import process_start_ns
    from vmm.timelineview import as_svg, as_text

    timeline.mark("exec", process_start_ns())
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
