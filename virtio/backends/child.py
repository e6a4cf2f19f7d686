"""A helper process of ours, waited for and reaped in one place.

asyncio's own watcher and subprocess.Popen both reap: Popen.terminate() looks first whether the process has ended, and
if it just has, asyncio reports "Unknown child process". So here the loop only watches a pidfd, signals go through that,
and Popen alone reaps. Works on any loop, in any thread, and where SIGCHLD is ignored. Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any


class Child:
    """A running process."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        """`options`: subprocess.Popen's. Raises OSError if it cannot be started."""
        self._process = subprocess.Popen(command, **options)
        self.pid = self._process.pid
        self._pidfd = -1
        self._ended = asyncio.Event()
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has ended and, SIGCHLD being ignored, is gone
            self._reap()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def returncode(self) -> int | None:
        """Its status, minus the signal's number if one ended it; None while it runs."""
        return self._process.returncode if self._ended.is_set() else None

    def _reap(self) -> None:
        self.close()
        self._process.wait()
        self._ended.set()

    async def wait(self) -> int:
        """Until it has ended; its status."""
        await self._ended.wait()
        return self._process.returncode

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Watch it no longer. Idempotent."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            pidfd, self._pidfd = self._pidfd, -1
            os.close(pidfd)
