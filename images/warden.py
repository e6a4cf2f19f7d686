"""Run a command that must not outlive the process that wants it: `python -I warden.py DESCRIPTOR COMMAND…`.

DESCRIPTOR is the read end of a pipe whose other end its owner alone holds. When the owner is gone, by whatever signal,
the pipe ends, and the command is killed with everything that it started. Exit status: the command's, or 128 + signal.
A program of its own, without other imports of ours, for it must start quickly. Linux.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
"""linux/prctl.h: what the command's own children leave behind becomes a child of this process."""


def children(pid: int) -> list[int]:
    """proc(5): /proc/PID/task/TID/children."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def kill_descendants(pid: int) -> None:
    """All of them, from the top, so that nobody is there to start others."""
    for child in children(pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGSTOP)
        kill_descendants(child)
        with suppress(ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)


def main() -> int:
    """Until the command has ended, or its owner has."""
    owner, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if not child:
        os.close(owner)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        os._exit(127)
    ended = os.pidfd_open(child)
    while not select.select([owner, ended], [], [])[0]:
        pass
    if not select.select([ended], [], [], 0)[0]:
        while children(os.getpid()):
            kill_descendants(os.getpid())
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        return 137
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status if status >= 0 else 128 - status)
