"""virt-manager, unmodified, on an X server of the test's own: it is operated by AT-SPI and by the keyboard."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.command import ROOT, not_ignored
from tests.support.libvirtd import GUESTS, DaemonProcess, needs_virsh, tiny, wait_for
from vmm.libvirt import rpc
from vmm.libvirt.errors import Code
from vmm.libvirt.names import api_name
from vmm.libvirt.rpc import RpcKind, RpcStatus

SYSTEM_PYTHON = "/usr/bin/python3"
PROGRAMS = ("virt-manager", "Xvfb", "xdotool", "dbus-run-session")
MANAGER = "Virtual Machine Manager"


def missing() -> str:
    """What is not installed; empty: nothing."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return program
    bindings = "import gi; gi.require_version('Atspi', '2.0')"
    if subprocess.run([SYSTEM_PYTHON, "-c", bindings], capture_output=True).returncode:
        return "gir1.2-atspi-2.0"
    return "" if shutil.which("at-spi-bus-launcher", path="/usr/libexec") else "at-spi2-core"


MISSING = missing()
pytestmark = [
    needs_virsh,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} is not installed (virt-manager, xvfb, xdotool, dbus)"),
]


class Recorder:
    """Stands between clients and a daemon: what they called, and what was refused."""

    def __init__(self, upstream: Path, path: Path) -> None:
        self.path = path
        self.called: set[str] = set()
        self.refused: list[tuple[str, int]] = []
        """Calls, with libvirt's code of the error."""
        self._upstream = upstream
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._upstream))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            with source.makefile("rb") as stream:
                while len(size := stream.read(4)) == 4:
                    body = stream.read(struct.unpack(">I", size)[0] - 4)
                    self._note(rpc.unpack(body))
                    sink.sendall(size + body)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # one of them has gone
        finally:
            source.close()
            sink.close()

    def _note(self, message: rpc.RpcMessage) -> None:
        header = message.header
        if header.program != rpc.REMOTE:
            return
        if header.kind == RpcKind.CALL:
            self.called.add(api_name(header.procedure))
        elif header.kind == RpcKind.REPLY and header.status == RpcStatus.ERROR:
            self.refused.append((api_name(header.procedure), struct.unpack(">i", message.body[:4])[0]))

    def unsupported(self) -> list[str]:
        """Calls that were answered with "this function is not supported"."""
        return [call for call, code in self.refused if code == Code.NO_SUPPORT]

    def close(self) -> None:
        self._listener.close()


class Desktop:
    """An X server, a session bus, and virt-manager on them."""

    def __init__(self, uri: str, folder: Path) -> None:
        home = folder / "home"
        home.mkdir()
        ready, told = os.pipe()
        self._server = subprocess.Popen(
            ["Xvfb", "-displayfd", str(told), "-screen", "0", "1280x900x24", "-nolisten", "tcp"],
            pass_fds=[told], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=not_ignored,
        )  # fmt: skip
        os.close(told)
        with os.fdopen(ready) as lines:
            display = lines.readline().strip()
        assert display, "Xvfb does not start"
        self.log = folder / "virt-manager.log"
        self._environment = {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "DISPLAY": f":{display}", "HOME": str(home), "LC_ALL": "C.UTF-8",
            "XDG_RUNTIME_DIR": str(home), "GSETTINGS_BACKEND": "memory", "GDK_BACKEND": "x11",
        }  # fmt: skip
        self._driver = subprocess.Popen(
            ["dbus-run-session", "--", SYSTEM_PYTHON, "-W", "ignore", str(ROOT / "tests" / "support" / "atspi.py"),
             str(self.log), "virt-manager", "--no-fork", "--debug", "--connect", uri],
            env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True, cwd=folder,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def do(self, what: str, window: str, role: str = "", name: str = "", text: str = "") -> Any:
        """See tests/support/atspi.py."""
        assert self._driver.stdin is not None and self._driver.stdout is not None
        print(json.dumps([what, window, role, name, text]), file=self._driver.stdin, flush=True)
        line = "began"
        while line and not line.startswith("{"):  # what the bus starts speaks there too
            line = self._driver.stdout.readline()
        answer = json.loads(line or '{"error": "the driver ended"}')
        assert "error" not in answer, f"{answer['error']}\n{self.log.read_text()[-3000:]}"
        return answer["value"]

    def type(self, window: str, text: str) -> None:
        """At the keyboard, into a window."""
        find = ["xdotool", "search", "--onlyvisible", "--name", f"^{window}", "windowraise", "windowfocus", "--sync"]
        into = ["mousemove", "--window", "%1", "200", "300", "click", "1", "type", "--delay", "30", text]
        subprocess.run([*find, *into], env=self._environment, check=True, timeout=60)

    def lines(self, window: str) -> list[str]:
        """On the terminal of a console's window."""
        return [line.strip() for line in str(self.do("wait", window, "terminal")).splitlines() if line.strip()]

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self._driver.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
        self._driver.communicate(timeout=30)
        self._server.terminate()
        self._server.wait(30)


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as running:
        yield running


@pytest.fixture
def recorder(daemon: DaemonProcess) -> Iterator[Recorder]:
    running = Recorder(daemon.socket, daemon.path / "rec")
    yield running
    running.close()


@pytest.fixture
def desktop(recorder: Recorder, tmp_path: Path) -> Iterator[Desktop]:
    with Desktop(f"qemu+unix:///system?socket={recorder.path}", tmp_path) as running:
        yield running


def test_a_machine_is_listed_started_and_typed_at(daemon: DaemonProcess, recorder: Recorder, desktop: Desktop) -> None:
    daemon.define(tiny("here"))
    assert desktop.do("wait", MANAGER, "table cell", "here") == "here\nShutoff"
    desktop.do("select", MANAGER, "table cell", "here")
    desktop.do("press", MANAGER, "push button", "Run")
    wait_for(lambda: daemon.virsh("domstate", "here") == "running", "not started", 60)
    wait_for(lambda: desktop.do("wait", MANAGER, "table cell", "here") == "here\nRunning", "not shown", 60)
    desktop.do("press", MANAGER, "push button", "Open")
    window = "here on QEMU/KVM"
    wait_for(lambda: "echo: type, Ctrl-D ends" in desktop.lines(window), "no greeting on the console", 60)
    desktop.type(window, "by the keyboard")
    wait_for(lambda: "by the keyboard" in desktop.lines(window), "no echo on the console", 60)
    desktop.do("press", window, "toggle button", "Pause")
    wait_for(lambda: daemon.virsh("domstate", "here") == "paused", "not paused", 60)
    desktop.do("press", window, "toggle button", "Pause")
    wait_for(lambda: daemon.virsh("domstate", "here") == "running", "not resumed", 60)
    desktop.do("press", window, "push button", "Shut Down")  # a bare machine has no button, and says so
    desktop.do("wait", "", "alert", "vmm dialog")
    assert "no\\npower button" in desktop.do("tree", "") or "no power button" in desktop.do("tree", "")
    desktop.do("press", "", "push button", "Close")
    daemon.virsh("destroy", "here")
    wait_for(lambda: desktop.do("wait", MANAGER, "table cell", "here") == "here\nShutoff", "end not shown", 60)
    daemon.virsh("undefine", "here")
    desktop.do("gone", MANAGER, "table cell", "here")
    assert {"virDomainOpenConsole", "virDomainCreate", "virDomainSuspend"} <= recorder.called
    assert recorder.unsupported() == []


def test_a_machine_is_made_by_the_wizard(daemon: DaemonProcess, recorder: Recorder, desktop: Desktop) -> None:
    """With the devices that it adds by itself, and a kernel, for there is no firmware that would boot the disk."""
    disk = daemon.path / "wizard.img"
    disk.write_bytes(bytes(1 << 20))
    new, made = "New VM", "made on QEMU/KVM"
    desktop.do("press", MANAGER, "push button", "New")
    desktop.do("press", new, "radio button", "Import existing disk image")
    desktop.do("press", new, "push button", "Forward")
    desktop.do("write", new, "text", "import-entry", str(disk))
    desktop.do("write", new, "text", "oslist-entry", "linux2022")
    desktop.do("press", new, "table cell", "Generic Linux 2022 (linux2022)")
    desktop.do("press", new, "push button", "Forward")
    desktop.do("wait", new, "label", "Step 3 of 4")
    desktop.do("press", new, "push button", "Forward")
    desktop.do("wait", new, "label", "Step 4 of 4")
    desktop.do("press", new, "check box", "Customize configuration before install")
    desktop.do("write", new, "text", "linux2022", "made")
    desktop.do("press", new, "push button", "Finish")
    desktop.do("wait", made, "table cell", "Display Spice")
    desktop.do("select", made, "table cell", "Boot Options")
    desktop.do("press", made, "toggle button", "Direct kernel boot")
    desktop.do("press", made, "check box", "Enable direct kernel boot")
    desktop.do("write", made, "text", "Kernel path:", str(GUESTS / "echo.bin"))
    desktop.do("press", made, "push button", "config-apply")
    desktop.do("press", made, "push button", "Begin Installation")
    wait_for(lambda: "made" in daemon.virsh("list", "--name"), "not made", 60)
    wait_for(lambda: "echo: type, Ctrl-D ends" in desktop.lines(made), "no greeting on the console", 60)
    xml = daemon.virsh("dumpxml", "made")
    assert f"<source file='{disk}'/>" in xml and "<target dev='vda' bus='virtio'/>" in xml
    told = daemon.virsh("dominfo", "made")
    assert "graphics spice: this machine has no display" in told
    daemon.virsh("destroy", "made")
    assert recorder.unsupported() == []
