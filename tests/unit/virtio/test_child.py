"""Helper processes: waited for and reaped once, on any loop, without a word."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from virtio.backends.child import Child

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_process_that_ends_while_it_is_terminated(
    new_loop: object, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """What passt does as its socket closes. asyncio's own reports "Unknown child process pid" now and then."""

    async def main() -> None:
        for _ in range(50):
            child = Child(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            assert child.returncode is None
            child._process.stdin.close()  # type: ignore[union-attr]
            child.terminate()
            assert await child.wait() in (0, -signal.SIGTERM)
            assert child.returncode is not None
            assert not Path(f"/proc/{child.pid}").exists()
            child.terminate()

    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
        runner.run(main())
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("new_loop", LOOPS)
def test_status(new_loop: object) -> None:
    async def main() -> None:
        assert await Child(["sh", "-c", "exit 7"]).wait() == 7
        with pytest.raises(FileNotFoundError):
            Child(["/nonexistent"])

    before = os.listdir("/proc/self/fd")
    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
        runner.run(main())
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_where_sigchld_is_ignored() -> None:
    """The kernel reaps then, and nobody learns a status."""
    script = (
        "import asyncio, signal; from virtio.backends.child import Child\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "async def main():\n"
        "    for _ in range(20):\n"
        "        await asyncio.wait_for(Child(['true']).wait(), 10)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
