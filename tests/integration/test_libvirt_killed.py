"""kill -9 of the daemon at random moments while clients define, start, save and end domains.

LOOPVISOR_KILLS says how often (3). No machine is harmed, every definition is whole, and the state is right after the
restart.
"""

import os
import random
import subprocess
import threading
import time

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


@pytest.mark.slow
def test_a_daemon_that_is_killed_harms_nothing() -> None:
    source = random.Random(time.time_ns())
    with DaemonProcess() as daemon:
        daemon.define(tiny("steady"))
        daemon.virsh("start", "steady")
        steady = daemon.pid("steady")
        stop = threading.Event()
        clients = [threading.Thread(target=busy, args=(daemon, stop, random.Random(number))) for number in range(2)]
        for client in clients:
            client.start()
        try:
            for _ in range(KILLS):
                time.sleep(source.uniform(0.05, 1.5))  # the moment of the kill is what is tried, not waited for
                daemon.kill()
                daemon.start()
                assert daemon.pid("steady") == steady
                assert daemon.virsh("domstate", "steady") == "running"
        finally:
            stop.set()
            for client in clients:
                client.join()
        log = daemon.log.read_text()
        assert "domains/" not in log, log  # no definition that could not be read
        for name in daemon.virsh("list", "--all", "--name").split():
            assert f"<name>{name}</name>" in daemon.virsh("dumpxml", name)
            known = daemon.virsh("list", "--name").split()
            held = (daemon.path / "loopvisor" / name / "control.sock").exists()
            assert (name in known) == held, f"{name}: listed {known}, a process {held}"
        for name in daemon.virsh("list", "--name").split():
            daemon.virsh("destroy", name)
        wait_for(lambda: not list((daemon.path / "loopvisor").glob("*/control.sock")), "a machine is left")
