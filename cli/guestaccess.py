"""`vmm exec` and `vmm cp`: programs and files in a machine that runs, in whichever process, by the guest's agent.

The command line of exec is docker's, whose users try it first: options, NAME, the command and its own options. Options
may also stand between NAME and `--`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from cli.errors import say
from vmm.convert import NAME
from vmm.errors import ConfigError, HostError, os_reason
from vmm.management.registry import RegistryEntry, find

SWITCHES = {"-i": "interactive", "--interactive": "interactive", "-t": "terminal", "--tty": "terminal"}
VALUES = {
    "-e": "env", "--env": "env", "-w": "directory", "--workdir": "directory", "-u": "user", "--user": "user",
}  # fmt: skip
CHUNK = 256 << 10


@dataclass(slots=True)
class ExecArguments:
    """What follows `vmm exec`."""

    name: str = ""
    command: list[str] = field(default_factory=list)
    interactive: bool = False
    terminal: bool = False
    env: list[str] = field(default_factory=list)
    directory: str = ""
    user: str = ""


def parse_exec(words: Sequence[str]) -> ExecArguments | None:
    """None: help is asked for. Raises ConfigError that says what is wrong."""
    parsed, rest = ExecArguments(), list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            if not parsed.name and rest:
                parsed.name = rest.pop(0)
            parsed.command = rest
            break
        if word in ("--help", "-h"):
            return None
        if word.startswith("-") and word != "-":
            _option(parsed, word, rest)
        elif not parsed.name:
            parsed.name = word
        else:
            parsed.command = [word, *rest]
            break
    if not parsed.name:
        raise ConfigError("exec: which machine? write: vmm exec NAME -- COMMAND…; vmm ps lists what runs")
    if not parsed.command:
        raise ConfigError(f"exec: which command? write: vmm exec {parsed.name} -- COMMAND…")
    return parsed


def _option(parsed: ExecArguments, word: str, rest: list[str]) -> None:
    """One word that begins with "-": -it, -e A=B, -eA=B, --env A=B, --env=A=B."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
    else:
        for index in range(1, len(word) - 1):  # switches, then perhaps an option that takes the rest
            if f"-{word[index]}" not in SWITCHES:
                name, equals, value = f"-{word[index]}", "=", word[index + 1 :].removeprefix("=")
                break
            setattr(parsed, SWITCHES[f"-{word[index]}"], True)
        else:
            name, equals, value = f"-{word[-1]}", "", ""
    if name in SWITCHES and not equals:
        setattr(parsed, SWITCHES[name], True)
    elif name in VALUES:
        if not equals:
            if not rest:
                raise ConfigError(f"exec: {name} needs a value")
            value = rest.pop(0)
        if VALUES[name] == "env":
            parsed.env.append(value)
        else:
            setattr(parsed, VALUES[name], value)
    else:
        raise ConfigError(f"exec: unknown option {name}; known are {', '.join([*SWITCHES, *VALUES])}")


def exec_command(arguments: ExecArguments) -> int:
    """Run a command in a machine that runs: its exit status, or 128 + signal. Raises VmmError."""
    if arguments.terminal and arguments.interactive and not os.isatty(0):
        raise ConfigError("-t: standard input is no terminal; leave -t out")
    status: int = _run(_exec(arguments))
    return status


async def _exec(arguments: ExecArguments) -> int:
    from cli.consolesize import terminal_size
    from cli.guestcommand import attach
    from vmm.guest.program import defaults
    from vmm.management.control import request

    rows, columns = terminal_size()
    agent = _agent(arguments.name)
    # What the machine's configuration says of programs, as docker exec has it of the container's.
    config = request(find(arguments.name), "config")["config"]
    options = defaults(
        config,
        {
            "env": _environment(arguments.env, arguments.terminal),
            "cwd": os.fsencode(arguments.directory),
            "user": os.fsencode(arguments.user),
        },
    )
    process = await agent.start_process(
        *map(os.fsencode, arguments.command),
        terminal=(rows or 24, columns or 80) if arguments.terminal else None,
        **options,
    )
    return await attach(process, interactive=arguments.interactive, terminal=arguments.terminal)


def _environment(given: list[str], terminal: bool) -> dict[bytes, bytes]:
    """NAME=value, or NAME for our own value of it, which is left out if we have none."""
    found: dict[bytes, bytes] = {}
    if terminal and (kind := os.environb.get(b"TERM")):
        found[b"TERM"] = kind
    for text in given:
        name, equals, value = os.fsencode(text).partition(b"=")
        if equals:
            found[name] = value
        elif name in os.environb:
            found[name] = os.environb[name]
    return found


def copy(source: str, target: str, *, follow: bool) -> None:
    """`vmm cp`. Raises VmmError."""
    there, here = _place(source), _place(target)
    if (there is None) == (here is None):
        what = "copying between machines is not possible; use: vmm cp A:PATH - | vmm cp - B:PATH"
        raise ConfigError(f"cp: {what if there else 'one of the two must be NAME:PATH, a path in a machine'}")
    if follow and "-" in (source, target):
        raise ConfigError("cp: -L is not possible with a stream")
    _run(_copy_to_host(there, target, follow) if there is not None else _copy_to_guest(source, here, follow))


def _place(text: str) -> tuple[str, bytes] | None:
    """(machine, path in it) of NAME:PATH; None for a path of the host, which "./" marks as one whatever follows."""
    name, colon, path = text.partition(":")
    if not colon or text.startswith(("/", ".")) or not NAME.fullmatch(name):
        return None
    if not path:
        raise ConfigError(f"cp: {text}: which path? write {name}:/path")
    return name, os.fsencode(path)


async def _copy_to_host(there: tuple[str, bytes] | None, target: str, follow: bool) -> None:
    from vmm.guest.copying import to_archive, to_host

    assert there is not None
    if target != "-":
        return await to_host(_agent(there[0]), there[1], target, follow=follow)
    if os.isatty(1):
        raise ConfigError("cp: an archive is not written to a terminal; redirect it")
    from cli.guestcommand import write_all

    async with write_all(1) as write:
        await to_archive(_agent(there[0]), there[1], write)


async def _copy_to_guest(source: str, there: tuple[str, bytes] | None, follow: bool) -> None:
    from vmm.guest.copying import from_archive, to_guest

    assert there is not None
    if source != "-":
        return await to_guest(_agent(there[0]), source, there[1], follow=follow)
    if os.isatty(0):
        raise ConfigError("cp: standard input is a terminal; give it a tar stream")
    await from_archive(_agent(there[0]), _input(), there[1])


async def _input() -> AsyncIterator[bytes]:
    from cli.guestcommand import read_input
    from vmm.console.descriptors import Input

    with Input(0) as source:
        while data := await read_input(source, CHUNK):
            yield data


def _agent(name: str) -> Any:
    from vmm.management.agentlink import agent_of

    entry: RegistryEntry = find(name)
    return agent_of(entry, lambda: say(f"{name}: waiting for the guest's agent"))


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it on a loop of its own; SIGTERM and SIGHUP end it as an error would, so that a terminal is given back."""
    import uvloop

    async def main() -> Any:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        ended_by: list[int] = []

        def end(number: int) -> Callable[[], None]:
            def cancel() -> None:
                ended_by.append(number)
                assert task is not None
                task.cancel()

            return cancel

        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, end(number))
        try:
            return await work
        except asyncio.CancelledError:
            if not ended_by:
                raise
            raise SystemExit(128 + ended_by[0]) from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise HostError(os_reason(error)) from error

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
