"""virt-admin against the daemon: servers, clients, limits and what is logged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.libvirtd import DaemonProcess, needs_virsh, wait_for

pytestmark = [
    needs_virsh,
    pytest.mark.skipif(shutil.which("virt-admin") is None, reason="virt-admin is not installed (libvirt-clients)"),
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as running:
        yield running


def admin(daemon: DaemonProcess, *arguments: str, ok: bool = True) -> str:
    uri = f"libvirtd:///system?socket={daemon.socket.with_name('libvirt-admin-sock')}"
    command = ["virt-admin", "-q", "-c", uri, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == ok, f"{command}: {done.stdout} {done.stderr}"
    return done.stdout.strip() if ok else done.stderr.strip()


def test_servers_and_their_limits(daemon: DaemonProcess) -> None:
    assert re.findall(r"\d\s+(\w+)", admin(daemon, "srv-list")) == ["libvirtd", "admin"]
    assert re.search(r"nWorkers\s+: \d", admin(daemon, "srv-threadpool-info", "libvirtd"))
    assert re.search(r"nclients_max\s+: 5000", admin(daemon, "srv-clients-info", "libvirtd"))
    admin(daemon, "srv-clients-set", "libvirtd", "--max-clients", "200", "--max-unauth-clients", "20")
    told = admin(daemon, "srv-clients-info", "libvirtd")
    assert re.search(r"nclients_max\s+: 200", told)
    assert re.search(r"nclients_unauth_max\s+: 20\b", told)
    assert "1 to" in admin(daemon, "srv-clients-set", "libvirtd", "--max-clients", "5", ok=False)
    assert "tasks" in admin(daemon, "srv-threadpool-set", "libvirtd", "--max-workers", "9", ok=False)
    assert "No server named" in admin(daemon, "srv-clients-info", "nobody", ok=False)
    assert "TLS" in admin(daemon, "server-update-tls", "libvirtd", ok=False)


def test_a_client_is_told_of_and_sent_away(daemon: DaemonProcess) -> None:
    with subprocess.Popen(
        ["virsh", "-q", "-c", daemon.uri(read_only=True), "event", "--all", "--loop"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as client:  # fmt: skip
        wait_for(lambda: "unix" in admin(daemon, "srv-clients-list", "libvirtd"), "no client")
        number = admin(daemon, "srv-clients-list", "libvirtd").split()[0]
        told = admin(daemon, "client-info", "libvirtd", number)
        assert re.search(r"readonly\s+: yes", told)
        assert re.search(rf"unix_process_id\s*: {client.pid}\b", told)
        assert re.search(rf"unix_user_id\s+: {os.getuid()}\b", told)
        admin(daemon, "client-disconnect", "libvirtd", number)
        assert client.wait(60) is not None
    wait_for(lambda: admin(daemon, "srv-clients-list", "libvirtd") == "", "the client is left")
    assert "no client" in admin(daemon, "client-info", "libvirtd", "999999", ok=False)


def test_what_is_logged(daemon: DaemonProcess) -> None:
    assert "2:stderr" in admin(daemon, "daemon-log-outputs")
    admin(daemon, "daemon-log-filters", "--filters", "1:libvirt.client 3:libvirt.domains")
    assert "1:libvirt.client 3:libvirt.domains" in admin(daemon, "daemon-log-filters")
    assert "LEVEL:NAME" in admin(daemon, "daemon-log-filters", "--filters", "9:x", ok=False)
    admin(daemon, "daemon-log-filters", "--filters", "")
    admin(daemon, "daemon-log-outputs", "--outputs", "3:stderr")
    assert "3:stderr" in admin(daemon, "daemon-log-outputs")
    assert "stderr" in admin(daemon, "daemon-log-outputs", "--outputs", "1:file:/tmp/x", ok=False)


def test_the_programs_keep_to_their_sockets(daemon: DaemonProcess) -> None:
    """Who may only manage does not administer, and the other way round."""
    uri = f"libvirtd:///system?socket={daemon.socket}"
    done = subprocess.run(["virt-admin", "-c", uri, "srv-list"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Cannot find program" in done.stderr
    uri = f"loopvisor+unix:///system?socket={daemon.socket.with_name('libvirt-admin-sock')}"
    done = subprocess.run(["virsh", "-c", uri, "list"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
