"""The service `process.Process` of a sandbox: programs and terminals. Loop thread."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

from connectrpc.code import Code
from connectrpc.errors import ConnectError

from vmm.sandboxes.serve.fleet import SHELL
from vmm.sandboxes.serve.programs import Program, ProgramEnd, ProgramLine, ProgramOutput, events
from vmm.sandboxes.serve.rpc import Service, hosted, keepalive_of, seconds_of, user_of
from vmm.sandboxes.serve.schema import process as messages

MAX_SIDE = 1 << 16


def _selected(selector: Any) -> Program:
    which = selector.WhichOneof("selector")
    if which is None:
        raise ConnectError(Code.INVALID_ARGUMENT, "no process was selected")
    programs = hosted().programs
    found = programs.find(number=selector.pid) if which == "pid" else programs.find(tag=selector.tag)
    if found is None:
        raise ConnectError(Code.NOT_FOUND, f"process {selector.pid if which == 'pid' else selector.tag!r} not found")
    return found


def _size(pty: Any) -> tuple[int, int]:
    if not (0 < pty.size.rows < MAX_SIDE and 0 < pty.size.cols < MAX_SIDE):
        raise ConnectError(Code.INVALID_ARGUMENT, f"a terminal has 1 to {MAX_SIDE - 1} rows and columns")
    return pty.size.rows, pty.size.cols


async def _start(request: Any, context: Any) -> AsyncIterator[Any]:
    config, box = request.process, hosted()
    terminal = _size(request.pty) if request.HasField("pty") else None
    command = box.sheet.shell if config.cmd == SHELL else config.cmd
    line = ProgramLine(
        command=command,
        arguments=tuple(config.args),
        env=dict(config.envs),
        cwd=config.cwd if config.HasField("cwd") else None,
        tag=request.tag if request.HasField("tag") else None,
        terminal=terminal is not None,
    )
    user = user_of(context.request_headers)
    program = await box.programs.start(line, user=user, terminal=terminal)
    if terminal is None and not request.stdin:
        await program.process.close_stdin()
    if (seconds := seconds_of(context)) is not None:
        program.limit(seconds)
    async for event in _follow(program, context):
        yield messages["StartResponse"](event=event)


async def _connect(request: Any, context: Any) -> AsyncIterator[Any]:
    async for event in _follow(_selected(request.process), context):
        yield messages["ConnectResponse"](event=event)


async def _follow(program: Program, context: Any) -> AsyncIterator[Any]:
    """The events of a process, from its number to its end. ConnectError when the caller's time is over."""
    event_of, seconds = messages["ProcessEvent"], seconds_of(context)
    deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
    keepalive = keepalive_of(context.request_headers)
    listener = program.listen()
    source = events(listener, keepalive)
    try:
        yield event_of(start=messages["ProcessEvent.StartEvent"](pid=program.number))
        while True:
            async with asyncio.timeout_at(deadline):
                event = await anext(source)
            if event is None:
                yield event_of(keepalive=messages["ProcessEvent.KeepAlive"]())
            elif isinstance(event, ProgramOutput):
                yield event_of(data=messages["ProcessEvent.DataEvent"](**{event.channel: event.data}))
            else:
                yield event_of(end=_end(event))
                return
    except TimeoutError:
        raise ConnectError(Code.DEADLINE_EXCEEDED, f"the process did not end within {seconds:g} s") from None
    finally:
        program.unlisten(listener)
        await source.aclose()  # type: ignore[attr-defined]


def _end(end: ProgramEnd) -> Any:
    if end.lost:
        raise ConnectError(Code.UNAVAILABLE, f"the connection to the process ended: {end.lost}")
    status, error = f"exit status {end.status}", None
    if end.status > 128 and end.status - 128 in set(signal.Signals):
        status = f"signal: {signal.Signals(end.status - 128).name}"
    if end.status:
        error = status
    return messages["ProcessEvent.EndEvent"](exit_code=end.status, exited=True, status=status, error=error)


async def _list(_request: Any, _context: Any) -> Any:
    found = []
    for program in hosted().programs.running():
        line = program.line
        command = SHELL if line.command == hosted().sheet.shell else line.command
        config = messages["ProcessConfig"](cmd=command, args=line.arguments, envs=line.env, cwd=line.cwd)
        found.append(messages["ProcessInfo"](config=config, pid=program.number, tag=line.tag))
    return messages["ListResponse"](processes=found)


async def _feed(program: Program, given: Any) -> None:
    which = given.WhichOneof("input")
    if which is None or (which == "pty") != program.line.terminal:
        kind = "a terminal: send pty" if program.line.terminal else "no terminal: send stdin"
        raise ConnectError(Code.INVALID_ARGUMENT, f"process {program.number} has {kind}")
    async with program.input:
        await program.process.write(given.pty if which == "pty" else given.stdin)


async def _send_input(request: Any, _context: Any) -> Any:
    await _feed(_selected(request.process), request.input)
    return messages["SendInputResponse"]()


async def _stream_input(requests: Any, _context: Any) -> Any:
    program: Program | None = None
    async for request in requests:
        which = request.WhichOneof("event")
        if which == "start":
            program = _selected(request.start.process)
        elif which == "data":
            if program is None:
                raise ConnectError(Code.INVALID_ARGUMENT, "input came before the process was selected")
            await _feed(program, request.data.input)
    return messages["StreamInputResponse"]()


async def _send_signal(request: Any, _context: Any) -> Any:
    if request.signal not in (signal.SIGTERM, signal.SIGKILL):
        raise ConnectError(Code.INVALID_ARGUMENT, f"signal {request.signal}: SIGTERM and SIGKILL are possible")
    await _selected(request.process).process.send_signal(request.signal)
    return messages["SendSignalResponse"]()


async def _close_stdin(request: Any, _context: Any) -> Any:
    program = _selected(request.process)
    if program.line.terminal:
        raise ConnectError(Code.FAILED_PRECONDITION, "a terminal has no end: send Ctrl-D")
    async with program.input:
        await program.process.close_stdin()
    return messages["CloseStdinResponse"]()


async def _update(request: Any, _context: Any) -> Any:
    program = _selected(request.process)
    if request.HasField("pty"):
        if not program.line.terminal:
            raise ConnectError(Code.FAILED_PRECONDITION, f"process {program.number} has no terminal")
        await program.process.resize(*_size(request.pty))
    return messages["UpdateResponse"]()


def service() -> Service:
    """The service as an ASGI application; rpc.CALL says for which sandbox."""
    return Service(
        "process.Process",
        messages,
        unary={
            "List": _list,
            "Update": _update,
            "SendInput": _send_input,
            "SendSignal": _send_signal,
            "CloseStdin": _close_stdin,
        },
        streamed={"Start": _start, "Connect": _connect},
        fed={"StreamInput": _stream_input},
    )
