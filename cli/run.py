"""`vmm run`: from arguments to a configuration, and what is told of one without running it.

The slow part of a machine's start begins here, before asyncio is loaded, so that both go on at once.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.lean import import_asyncio
from cli.options import RunArguments
from vmm.config import Config
from vmm.errors import ConfigError, HostError
from vmm.image import config_for
from vmm.machine.hardware import HeadStart

if TYPE_CHECKING:
    from cli.progress import ProgressLine
    from images.catalog import Image


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
        from vmm.cores import choice
        from vmm.machine.builder import effective_cmdline

        config.check_host()
        sys.stdout.write(effective_cmdline(config, choice(config).probe.capabilities) + "\n")
        return 0
    if arguments.warm:
        from cli.warm import run_warm

        return run_warm(config, arguments, begin)
    configured = time.monotonic_ns()
    head_start = HeadStart(config)
    try:
        import_asyncio()
        from cli.foreground import run

        gc.freeze()
        gc.enable()
        return run(config, arguments, head_start, begin=begin, configured=configured)
    finally:
        head_start.close()


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
    if arguments.command and arguments.paused:
        raise ConfigError("--paused: a command runs at once; leave one of them out")
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
        self._line: ProgressLine | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._line is None:
            from cli.progress import ProgressLine

            self._line = ProgressLine()
        self._line(what, done, total)

    def clear(self) -> None:
        if self._line is not None:
            self._line.clear()
