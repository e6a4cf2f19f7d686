"""`virsh migrate --live` between two daemons: a domain goes on where it went, with what it was; failures leave it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import environment
from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny, wait_for
from vmm._native import can_page

pytestmark = needs_virsh


@pytest.fixture
def hosts() -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    with DaemonProcess() as here, DaemonProcess() as there:
        here.define(tiny("m"))
        here.virsh("desc", "m", "--title", "moves", "--config")
        here.virsh("start", "m")
        yield here, there


def talk(daemon: DaemonProcess, text: bytes) -> bytes:
    """What an echoing guest has said when it has answered."""
    path = daemon.path / "loopvisor" / "m" / "console.sock"
    wait_for(path.exists, "no console")
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(30)
        console.connect(str(path))
        console.sendall(text)
        said = b""
        while not said.endswith(text):
            said += console.recv(4096)
        return said


def place(daemon: DaemonProcess) -> str:
    return f"unix://{daemon.path}/arrival.sock"


def test_a_domain_moves_and_comes_back(hosts: tuple[DaemonProcess, DaemonProcess]) -> None:
    here, there = hosts
    talk(here, b"before")
    here.virsh("migrate", "--live", "--persistent", "--undefinesource", "m", there.uri(), "--migrateuri", place(there))
    assert here.virsh("list", "--all", "--name") == ""
    assert there.virsh("domstate", "m", "--reason") == "running (migrated)"
    assert there.virsh("desc", "m", "--title") == "moves" and there.virsh("list", "--persistent", "--name") == "m"
    said = talk(there, b"after")
    assert said.count(b"Ctrl-D ends") <= 1  # it did not start anew
    there.kill()
    there.start()
    assert there.virsh("domstate", "m") == "running"
    there.virsh("migrate", "--live", "m", here.uri(), "--migrateuri", "tcp://127.0.0.1")
    assert there.virsh("domstate", "m", "--reason") == "shut off (migrated)"
    assert here.virsh("list", "--transient", "--name") == "m"
    talk(here, b"again")
    here.virsh("destroy", "m")
    assert here.virsh("list", "--all", "--name") == ""


def test_what_is_not_there_is_refused_and_the_domain_runs_on(hosts: tuple[DaemonProcess, DaemonProcess]) -> None:
    here, there = hosts
    for options, what in (
        ([], "--live"),
        (["--live", "--copy-storage-inc"], "--copy-storage-all"),
        (["--live", "--tls"], "no certificates"),
    ):
        assert what in here.virsh("migrate", *options, "m", there.uri(), "--migrateuri", place(there), ok=False)
        assert here.virsh("domstate", "m") == "running"
    there.define(tiny("m").replace("<name>m</name>", "<name>m</name><uuid>11111111-2222-4333-8444-555555555555</uuid>"))
    there.virsh("start", "m")
    refused = here.virsh("migrate", "--live", "m", there.uri(), "--migrateuri", place(there), ok=False)
    assert "already active" in refused
    assert here.virsh("domstate", "m") == there.virsh("domstate", "m") == "running"
    assert "not being migrated" in here.virsh("migrate-setmaxdowntime", "m", "100", ok=False)
    assert "no job" in here.virsh("domjobabort", "m", ok=False)


@pytest.mark.skipif(not can_page(False), reason="the host has no userfaultfd for this process")
def test_post_copy_is_begun_by_command(tmp_path: Path) -> None:
    """It takes too long, so the machine goes before its memory."""
    with open(tmp_path / "initrd", "wb") as initrd:
        for _ in range(48):
            initrd.write(os.urandom(1 << 20))
    xml = tiny("m").replace("</kernel>", f"</kernel><initrd>{tmp_path / 'initrd'}</initrd>")
    xml = xml.replace("<memory unit='MiB'>4<", "<memory unit='MiB'>128<")
    with DaemonProcess() as here, DaemonProcess() as there:
        here.define(xml)
        here.virsh("start", "m")
        talk(here, b"before")
        assert "not being migrated" in here.virsh("migrate-postcopy", "m", ok=False)
        command = ["virsh", "-q", "-c", here.uri(), "migrate", "--live", "--postcopy", "--bandwidth", "1", "m"]
        command += [there.uri(), "--migrateuri", place(there)]
        moving = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(here.path))
        try:
            wait_for(lambda: "Unbounded" in here.virsh("domjobinfo", "m"), "no job")
            here.virsh("migrate-postcopy", "m")
            wait_for(lambda: here.virsh("domstate", "m") == "paused", "it does not go")
            talk(there, b"after")
            here.virsh("migrate-setspeed", "m", "1000")
            assert moving.wait(60) == 0, moving.stderr and moving.stderr.read()
        finally:
            moving.kill()
            moving.communicate()
        assert here.virsh("domstate", "m", "--reason") == "shut off (migrated)"
        assert there.virsh("domstate", "m") == "running"
        talk(there, b"again")


def test_a_target_that_cannot_listen_says_why(hosts: tuple[DaemonProcess, DaemonProcess]) -> None:
    here, there = hosts
    refused = here.virsh("migrate", "--live", "m", there.uri(), "--migrateuri", "unix:///no/such/place.sock", ok=False)
    assert "/no/such/place.sock" in refused
    assert here.virsh("domstate", "m") == "running"
    here.virsh("migrate", "--live", "m", there.uri(), "--migrateuri", place(there))
    assert there.virsh("domstate", "m") == "running" and Path(there.path).exists()
