"""The command `vmm`: finds out which command is meant and imports only that."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> NoReturn:
    """Entry point; ends the process with the command's exit status (0, 2, 3, 4, 124, or the guest's)."""
    from cli.errors import reported

    _open_standard_streams()
    arguments = sys.argv[1:]
    with reported():
        if arguments[:1] == ["run"]:
            from cli.options import parse_run

            parsed = parse_run(arguments[1:])
            if parsed is not None:
                gc.disable()  # what imports make is there to stay, and is looked through again and again
                from cli.lean import prepare

                prepare()
                from cli.run import execute

                status = execute(parsed)
                # Everything is closed. Taking the interpreter apart costs about as much as building the machine did
                # (tests.bench start), and there is nothing in it that anybody would miss.
                sys.stdout.flush()
                with suppress(OSError):  # a terminal that went away; say() has seen it already
                    sys.stderr.flush()
                os._exit(status)
        if arguments[:1] == ["exec"]:
            from cli.guestaccess import exec_command, parse_exec

            wanted = parse_exec(arguments[1:])
            if wanted is not None:
                sys.exit(exec_command(wanted))
        from cli.app import build

        build()(prog_name="vmm")
    sys.exit(0)


def _open_standard_streams() -> None:
    """Descriptors 0 to 2 that our parent closed lead nowhere: the next file that is opened would take their place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
