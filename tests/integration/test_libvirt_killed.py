"""kill -9 of a daemon at random moments while clients define, start, save, migrate and end domains.

LOOPVISOR_KILLS says how often (3). No machine is harmed, every definition is whole, and the state is right after the
restart; a machine that moves to and fro meanwhile is on one side.
"""

import logging
import os
import random
import subprocess
import threading
import time
from functools import partial

import pytest

from tests.support.command import environment
from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny, wait_for

pytestmark = needs_virsh
KILLS = int(os.environ.get("LOOPVISOR_KILLS", "3"))
NAMES = ("a", "b", "c")


def busy(daemon: DaemonProcess, stop: threading.Event, source: random.Random) -> None:
    """One client: whatever it does may fail, for its daemon is killed again and again."""
    for name in NAMES:
        (daemon.path / f"{name}.xml").write_text(tiny(name, extra=f"<description>{'x' * 3000}</description>"))
    while not stop.is_set():
        name = source.choice(NAMES)
        command = source.choice(
            (
                ["define", str(daemon.path / f"{name}.xml")],
                ["start", name],
                ["managedsave", name],
                ["destroy", name],
                ["undefine", name, "--managed-save", "--snapshots-metadata"],
                ["autostart", name],
                ["snapshot-create-as", name, f"s{source.randrange(3)}"],
                ["suspend", name],
            )
        )
        subprocess.run(
            ["virsh", "-q", "-c", daemon.uri(), *command], capture_output=True, stdin=subprocess.DEVNULL, timeout=120,
            env=environment(daemon.path),
        )  # fmt: skip


def running(daemon: DaemonProcess) -> list[str]:
    """What is listed as running; nothing while the daemon is dead."""
    command = ["virsh", "-q", "-c", daemon.uri(), "list", "--name"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.split()


def listed_if_held(daemon: DaemonProcess, name: str) -> bool:
    """A domain is listed as running if, and only if, a process runs it."""
    return (name in running(daemon)) == (daemon.path / "loopvisor" / name / "control.sock").exists()


def nomads(*daemons: DaemonProcess) -> list[str]:
    """Where a process runs the machine."""
    return [str(one.path) for one in daemons if (one.path / "loopvisor" / "nomad" / "control.sock").exists()]


def moving(here: DaemonProcess, there: DaemonProcess, stop: threading.Event, moves: list[bool]) -> None:
    """Another client: the domain `nomad` goes to and fro, managed by the client or from peer to peer."""
    source = random.Random(99)
    while not stop.is_set():
        for one, other in ((here, there), (there, here)):
            if "nomad" not in running(one):
                continue
            how = source.choice(((), ("--p2p",)))
            place = f"unix://{other.path}/arrival{len(moves)}.sock"
            where = ["nomad", other.uri(), "--migrateuri", place]
            done = subprocess.run(
                ["virsh", "-q", "-c", one.uri(), "migrate", "--live", *how, *where],
                capture_output=True, stdin=subprocess.DEVNULL, timeout=300, env=environment(one.path),
            )  # fmt: skip
            moves.append(done.returncode == 0)


@pytest.mark.slow
def test_a_daemon_that_is_killed_harms_nothing() -> None:
    source = random.Random(time.time_ns())
    moves: list[bool] = []
    with DaemonProcess() as daemon, DaemonProcess() as other:
        daemon.define(tiny("steady"))
        (daemon.path / "nomad.xml").write_text(tiny("nomad"))
        daemon.virsh("create", str(daemon.path / "nomad.xml"))
        daemon.virsh("start", "steady")
        steady = daemon.pid("steady")
        stop = threading.Event()
        clients = [threading.Thread(target=busy, args=(daemon, stop, random.Random(number))) for number in range(2)]
        clients.append(threading.Thread(target=moving, args=(daemon, other, stop, moves)))
        for client in clients:
            client.start()
        try:
            for _ in range(KILLS):
                time.sleep(source.uniform(0.05, 1.5))  # the moment of the kill is what is tried, not waited for
                victim = source.choice((daemon, daemon, other))
                victim.kill()
                victim.start()
                assert daemon.pid("steady") == steady
                assert daemon.virsh("domstate", "steady") == "running"
        finally:
            stop.set()
            for client in clients:
                client.join()

        def sides() -> list[DaemonProcess]:
            return [one for one in (daemon, other) if "nomad" in running(one)]

        # A daemon that was killed finds what arrived meanwhile a moment later.
        wait_for(
            lambda: len(nomads(daemon, other)) == len(sides()) == 1,
            f"nomad is not on one side, after {len(moves)} moves",
            60,
        )
        (side,) = sides()
        wait_for(lambda: side.virsh("domstate", "nomad") == "running", "nomad does not run")
        far = other if side is daemon else daemon
        side.virsh("migrate", "--live", "nomad", far.uri(), "--migrateuri", f"unix://{far.path}/last.sock")
        assert far.virsh("domstate", "nomad") == "running"
        logging.getLogger(__name__).info("%d kills, %d moves tried, %d told as done", KILLS, len(moves), sum(moves))
        log = daemon.log.read_text()
        assert "domains/" not in log, log  # no definition that could not be read
        for name in daemon.virsh("list", "--all", "--name").split():
            assert f"<name>{name}</name>" in daemon.virsh("dumpxml", name)
            wait_for(partial(listed_if_held, daemon, name), f"{name}: listed, or a process runs it, but not both")
        for name in daemon.virsh("list", "--name").split():
            daemon.virsh("destroy", name)
        wait_for(lambda: not list((daemon.path / "loopvisor").glob("*/control.sock")), "a machine is left")
