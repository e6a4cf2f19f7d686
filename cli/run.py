"""`vmm run`: from arguments to a configuration, to a machine, to an exit status."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cli.errors import say
from cli.options import RunArguments
from vmm.config import Config
from vmm.errors import ConfigError, HostError
from vmm.lifecycle import Outcome, Reason
from vmm.vm import VirtualMachine


def execute(arguments: RunArguments) -> int:
    """Run it; the exit status. Raises VmmError."""
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
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(_run(config))
    _report(config, outcome, arguments)
    return outcome.status


def configure(arguments: RunArguments) -> Config:
    """The image's wishes, then the file's values, then the options; a name if none is given. Raises ConfigError."""
    values: dict[str, Any] = {}
    if arguments.config_file is not None:
        values |= Config.read(Path(arguments.config_file))
    values |= arguments.config
    if arguments.command:
        raise ConfigError("a command after -- needs an image with an agent")
    stem = "vm"
    if arguments.image is not None:
        stem, wishes = _image(arguments.image)
        disks = [*wishes.pop("disks", ()), *values.pop("disks", ())]
        values = wishes | values
        if disks:
            values["disks"] = disks
    values.setdefault("console", "stdio")
    if not values.get("name"):
        values["name"] = f"{stem}-{os.getpid()}"
    config = Config.from_dict(values)
    if config.kernel is None and config.flat is None:
        raise ConfigError("nothing to run: name an image or give --kernel; vmm images ls shows what there is")
    return config


def _image(name: str) -> tuple[str, dict[str, Any]]:
    """(stem for the machine's name, Config fields) of an image or a kernel file."""
    from images import catalog
    from images.errors import ImageError

    try:
        image = catalog.resolve(name, build=True)
    except ImageError as error:
        raise (ConfigError if error.kind == "config" else HostError)(str(error)) from error
    wishes: dict[str, Any] = {"memory": image.memory}
    if image.kind == "real":
        wishes["flat"] = {"path": image.kernel}
    else:
        wishes["kernel"] = image.kernel
    if image.initrd is not None:
        wishes["initrd"] = image.initrd
    if image.disk is not None:
        wishes["disks"] = [{"path": image.disk, "snapshot": True}]
    if image.cmdline:
        wishes["append"] = image.cmdline
    if image.agent:
        wishes["agent"] = True
    stem = "".join(char for char in image.name.partition(".")[0] if char.isalnum() or char in "-_")
    return (stem.lstrip("-_") or "vm")[:40], wishes


async def _run(config: Config) -> Outcome:
    vm = VirtualMachine(config)
    loop = asyncio.get_running_loop()
    vm.on_debug = _debug
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        for number in signals:
            loop.add_signal_handler(number, vm.end, Outcome(Reason.SIGNAL, number.name, code=number))
        async with vm:
            return await vm.run()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _debug(data: bytes) -> None:
    try:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
    except OSError:
        pass  # nobody reads it


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
    elif outcome.reason not in (Reason.SHUTDOWN, Reason.RESET, Reason.EXIT):
        say(f"{config.name}: {detail}")
