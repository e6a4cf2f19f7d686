"""`vmm daemon` as its users run it, and virsh against it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.support.command import ROOT, VMM, environment

GUESTS = ROOT / "images" / "guests"
needs_virsh = pytest.mark.skipif(shutil.which("virsh") is None, reason="virsh is not installed (libvirt-clients)")


def tiny(name: str, guest: str = "echo", extra: str = "") -> str:
    """The XML of a domain that runs a tiny guest: its kernel is a multiboot or PVH file of a few KiB."""
    return f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>4</memory><vcpu>1</vcpu>{extra}
    <os><type machine='bare'>hvm</type><kernel>{GUESTS / f"{guest}.bin"}</kernel></os>
    <on_reboot>destroy</on_reboot><devices><console type='pty'/></devices></domain>"""


class DaemonProcess:
    """One daemon with directories of its own; the machines that it left are ended with it."""

    def __init__(self, *options: str, prefix: Sequence[str] = ()) -> None:
        """`prefix`: a command that runs another, as `ip netns exec` does."""
        self.prefix = list(prefix)
        self.path = Path(tempfile.mkdtemp(prefix="lv"))  # short, for the sake of sockets' paths
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        self.log = self.path / "daemon.log"

    @property
    def socket(self) -> Path:
        return self.path / "loopvisor" / "libvirt-sock"

    def port(self) -> int:
        """Of TLS, which it was told to listen on."""
        return int(self.log.read_text().rpartition("for TLS on port ")[2].split()[0])

    def uri(self, scheme: str = "loopvisor", *, read_only: bool = False) -> str:
        return f"{scheme}+unix:///system?socket={self.socket}{'-ro' if read_only else ''}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *VMM, "daemon", "--state", str(self.path / "state"), *self.options],
                env=environment(self.path), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.path,
            )  # fmt: skip
        before = self.log.read_text().count("virsh -c")
        deadline = time.monotonic() + 60
        while self.log.read_text().count("virsh -c") == before or not self.socket.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """SIGTERM."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(10)

    def virsh(self, *arguments: str, ok: bool = True, read_only: bool = False, **options: Any) -> str:
        """Its output; `ok`: it must succeed, else it must fail and its message is given back."""
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri(read_only=read_only), *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment(self.path), **options,
        )  # fmt: skip
        assert (done.returncode == 0) == ok, f"{arguments}: {done.returncode} {done.stdout} {done.stderr}"
        return done.stdout.strip() if ok else done.stderr.strip()

    def define(self, xml: str) -> None:
        file = self.path / "domain.xml"
        file.write_text(xml)
        self.virsh("define", str(file))

    def pid(self, name: str) -> int:
        """Of the process that runs a domain."""
        import json

        return int(json.loads((self.path / "loopvisor" / name / "info.json").read_text())["pid"])

    def _started(self) -> list[int]:
        """Machines, and all processes that have this daemon's directory in their environment: so those too that wait
        for a machine since a daemon that was killed."""
        ours = f"XDG_RUNTIME_DIR={self.path}".encode()
        found = []
        for info in (self.path / "loopvisor").glob("*/info.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.append(self.pid(info.parent.name))
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if ours in place.read_bytes().split(b"\0"):
                    found.append(int(place.parent.name))
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)
        for pid in self._started():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        text = self.log.read_text()
        shutil.rmtree(self.path, ignore_errors=True)
        assert "Traceback" not in text, text


def wait_for(condition: Any, what: str, seconds: float = 30.0) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
