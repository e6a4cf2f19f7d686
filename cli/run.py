"""`vmm run`: from arguments to a configuration, and what is told of one without running it.

The slow part of a machine's start begins here, before asyncio is loaded, so that both go on at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.lean import import_asyncio
from cli.options import RunArguments
from vmm.config import Config
from vmm.errors import ConfigError, HostError
from vmm.image import config_for
from vmm.machine.hardware import HeadStart
from vmm.timeline import now

if TYPE_CHECKING:
    from cli.progress import ProgressLine
    from images.catalog import Image


def execute(arguments: RunArguments) -> int:
    """Run it; the exit status. Raises VmmError."""
    begin = now()
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
        from vmm.cores import choice
        from vmm.machine.builder import effective_cmdline

        config.check_host()
        sys.stdout.write(effective_cmdline(config, choice(config).probe.capabilities) + "\n")
        return 0
    if arguments.warm:
        from cli.warm import run_warm

        return run_warm(config, arguments, begin)
    configured = now()
    head_start = HeadStart(config)
    try:
        import_asyncio()
        from cli.foreground import run

        return run(config, arguments, head_start, begin=begin, configured=configured)
    finally:
        head_start.close()


def configure(arguments: RunArguments) -> Config:
    """The image's wishes, then the file's values, then the options; a name if none is given. Raises ConfigError."""
    values: dict[str, Any] = {}
    if arguments.config_file is not None:
        values |= Config.read(Path(arguments.config_file))
    values |= arguments.config
    if "env" in values:
        values["env"] = _with_ours(values["env"])
    if arguments.image is None:
        _set_console(values, _program(values, arguments.command))
        values["name"] = values.get("name") or f"vm-{os.getpid()}"
        config = Config.from_dict(values)
    else:
        image = _image(arguments.image, arguments.pull)
        _set_console(values, image.options or _program(values, arguments.command))
        stem = "".join(char for char in image.name.partition(".")[0] if char.isalnum() or char in "-_").lstrip("-_")
        values["name"] = values.get("name") or f"{(stem or 'vm')[:40]}-{os.getpid()}"
        config = config_for(image, **values)
    if arguments.publish:
        config = _publish(config, arguments.publish)
    if config.entrypoint or config.command:
        program = {"entrypoint": config.entrypoint, "command": config.command}
        arguments.command = _program(program, arguments.command)
    elif config.workdir and not arguments.command and arguments.image is not None and image.options:
        raise ConfigError(f"{arguments.image}: the image names no program; give one behind --")
    if config.kernel is None and config.flat is None:
        raise ConfigError("nothing to run: name an image or give --kernel; vmm images ls shows what there is")
    if arguments.command and arguments.paused:
        raise ConfigError("--paused: a command runs at once; leave one of them out")
    if arguments.command and not config.agent:
        raise ConfigError(f"{arguments.command[0]}: a command needs an image with the guest agent, such as linux")
    return config


def _program(values: dict[str, Any], given: list[str]) -> list[str]:
    """The words of the program that is to run in the guest; empty for none."""
    if not (values.get("entrypoint") or values.get("command")):
        return given
    from vmm.guest.program import words

    return words(values, given)


def _set_console(values: dict[str, Any], program: object) -> None:
    """A program's output is what stdout is for; the console then shows itself only where it is asked for."""
    values.setdefault("console", "none" if program else "stdio")


def _with_ours(given: list[Any]) -> list[Any]:
    """NAME alone means our own value of it, and nothing if we have none."""
    found = []
    for item in given:
        if isinstance(item, str) and "=" not in item:
            if item not in os.environ:
                continue
            item = f"{item}={os.environ[item]}"
        found.append(item)
    return found


def _publish(config: Config, ports: list[str]) -> Config:
    """Ports of the host for the machine's user network."""
    values = config.to_dict()
    nets = values.get("nets") or []
    users = [net for net in nets if net["kind"] == "user"]
    if not users:
        raise ConfigError("publish: only user networking has ports of the host; install passt, or add --net user")
    net = users[0]
    pairs = [port.removesuffix("/tcp") for port in ports]
    net["forward"] = "+".join([*filter(None, [net.get("forward", "")]), *pairs])
    net["required"] = True
    return Config.from_dict(values)


def _image(name: str, pull: str) -> Image:
    """The image of that name, or the kernel file; built first, if it never was."""
    from images import catalog
    from images.errors import ImageError

    progress = _Progress()
    if pull not in ("missing", "always", "never"):
        raise ConfigError(f"pull: {pull!r} is none of missing, always, never")
    try:
        return catalog.resolve(name, build=True, progress=progress, pull=pull)
    except ImageError as error:
        progress.clear()
        raise (ConfigError if error.kind == "config" else HostError)(str(error)) from error


class _Progress:
    """The image builder's progress on a terminal; loaded when something is built, which is seldom."""

    def __init__(self) -> None:
        self._line: ProgressLine | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._line is None:
            from cli.progress import ProgressLine

            self._line = ProgressLine()
        self._line(what, done, total)

    def clear(self) -> None:
        if self._line is not None:
            self._line.clear()
