"""Machines that go from daemon to daemon by TLS, between two hosts in two network namespaces."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.test_libvirt_migration import talk
from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny
from tests.support.netns import Namespace, cable, namespaces, need

pytest.importorskip("cryptography")
from vmm.libvirt import pki  # noqa: E402

pytestmark = [needs_virsh, pytest.mark.root]
HERE, THERE = "10.73.8.1", "10.73.8.2"


class Hosts(NamedTuple):
    """Two daemons, each with a certificate of its own."""

    here: DaemonProcess
    there: DaemonProcess
    near: Namespace
    directories: tuple[Path, Path]

    @property
    def far(self) -> str:
        """The other daemon's name."""
        return f"qemu+tls://{THERE}/system?pkipath={self.directories[0] / 'clients' / 'alice'}"

    def migrate(self, *options: str, ok: bool = True, target: str | None = None) -> str:
        """virsh migrate from one to the other."""
        command = ["virsh", "-q", "-c", self.here.uri("qemu"), "migrate", "--live", *options, "m", target or self.far]
        done = subprocess.run(self.near.command(*command), capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) == ok, f"{command}: {done.stdout} {done.stderr}"
        return done.stderr


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    need()
    directories = (tmp_path / "here", tmp_path / "there")
    # One authority for both hosts, so that each trusts the other's.
    pki.init(directories[0], [HERE, THERE], ["alice", "daemon"])
    pki.init(directories[1], [HERE, THERE], ["alice", "daemon"])
    for name in ("cacert.pem", "cakey.pem", "servercert.pem", "serverkey.pem", "cacrl.pem"):
        if (directories[0] / name).exists():
            (directories[1] / name).write_bytes((directories[0] / name).read_bytes())
    with namespaces("h", "t") as (near, far):
        cable(near, far)
        near.ip("addr", "add", f"{HERE}/24", "dev", "eth0")
        far.ip("addr", "add", f"{THERE}/24", "dev", "eth0")
        with (
            DaemonProcess("--listen-tls", HERE, "--tls", str(directories[0]), prefix=near.command()) as here,
            DaemonProcess("--listen-tls", THERE, "--tls", str(directories[1]), prefix=far.command()) as there,
        ):
            here.define(tiny("m"))
            here.virsh("desc", "m", "--title", "moves", "--config")
            here.virsh("start", "m")
            yield Hosts(here, there, near, directories)


def arrived(hosts: Hosts) -> None:
    assert hosts.there.virsh("domstate", "m", "--reason") == "running (migrated)"
    assert hosts.there.virsh("desc", "m", "--title") == "moves"
    assert hosts.here.virsh("list", "--name") == ""
    assert talk(hosts.there, b"there").count(b"Ctrl-D ends") <= 1


def test_the_client_moves_it(hosts: Hosts) -> None:
    """By a client that is connected to both by TLS, with the machine's own connection encrypted."""
    talk(hosts.here, b"here")
    hosts.migrate("--tls", "--migrateuri", f"tcp://{THERE}")
    arrived(hosts)


def test_the_daemons_move_it(hosts: Hosts) -> None:
    """From peer to peer: the client talks to one daemon only."""
    talk(hosts.here, b"here")
    target = f"loopvisor+tls://{THERE}/system"
    hosts.migrate("--p2p", "--tls", "--persistent", "--undefinesource", "--migrateuri", f"tcp://{THERE}", target=target)
    arrived(hosts)
    assert hosts.here.virsh("list", "--all", "--name") == ""
    assert hosts.there.virsh("list", "--persistent", "--name") == "m"


def test_who_is_not_trusted_moves_nothing(hosts: Hosts, tmp_path: Path) -> None:
    talk(hosts.here, b"here")
    target = f"loopvisor+tls://{THERE}/system"
    place = ("--migrateuri", f"tcp://{THERE}")
    # The other host's list of allowed subjects does not have this daemon.
    (hosts.directories[1] / "allowed").write_text("O=loopvisor,CN=alice\n")
    hosts.there.stop()
    hosts.there.start()
    assert "certificate" in hosts.migrate("--p2p", "--tls", *place, target=target, ok=False)
    # Nor does a stranger's authority help, on the way to the daemon or on the machine's own.
    pki.init(tmp_path / "other", [HERE, THERE], ["daemon"])
    mine = hosts.directories[0] / "clients" / "daemon"
    for name in ("cacert.pem", "clientcert.pem", "clientkey.pem"):
        (mine / name).write_bytes((tmp_path / "other" / "clients" / "daemon" / name).read_bytes())
    (hosts.directories[1] / "allowed").unlink()
    hosts.there.stop()
    hosts.there.start()
    assert "certificate" in hosts.migrate("--p2p", *place, target=target, ok=False)
    hosts.migrate("--tls", *place, ok=False)
    assert "--tls" in hosts.migrate("--p2p", "--tunnelled", target=target, ok=False)
    assert "by tls or unix" in hosts.migrate("--p2p", target=f"qemu+ssh://{THERE}/system", ok=False)
    assert hosts.here.virsh("domstate", "m") == "running"
    assert hosts.there.virsh("list", "--all", "--name") == ""
    talk(hosts.here, b"still here")
