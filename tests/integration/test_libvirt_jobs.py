"""Migrations by virsh that take long enough to be watched, changed and ended: domjobinfo, event, domjobabort,
migrate-setmaxdowntime, migrate-setspeed, --timeout, --copy-storage-all."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.integration.test_libvirt_migration import place, talk
from tests.integration.test_libvirt_peers import HERE, THERE, Hosts, hosts  # noqa: F401
from tests.support.command import environment
from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny, wait_for
from vmm._native import can_page

pytestmark = needs_virsh
PROBE = "7b0c3a52-1f0e-4a6e-9c3c-2d1b5f60a1c7"
CONTENT = 96
"""MiB that have to be sent."""
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def large(folder: Path, devices: str = "") -> str:
    """A domain whose memory takes a while at a MiB a second."""
    with open(folder / "initrd", "wb") as initrd:
        for _ in range(CONTENT):
            initrd.write(os.urandom(1 << 20))
    xml = tiny("m").replace("</kernel>", f"</kernel><initrd>{folder / 'initrd'}</initrd>")
    xml = xml.replace("<devices>", f"<devices>{devices}")
    return xml.replace("<memory unit='MiB'>4<", "<memory unit='MiB'>256<")


def boot(daemon: DaemonProcess, xml: str) -> None:
    """Define and start m; it has answered."""
    daemon.define(xml)
    daemon.virsh("start", "m")
    talk(daemon, b"before")


@contextmanager
def watched(daemon: DaemonProcess) -> Iterator[Path]:
    """What `virsh event` says of all events of a daemon's domains, in a file."""
    told = daemon.path / "events"
    command = ["virsh", "-c", daemon.uri(), "event", "--all", "--loop"]
    with told.open("wb") as out, subprocess.Popen(
        ["stdbuf", "-oL", *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment(daemon.path)
    ) as process:
        try:
            numbers = itertools.count(1)

            def heard() -> bool:
                """It is registered once it hears of something."""
                title = f"<uuid>{PROBE}</uuid><title>{next(numbers)}</title>"
                daemon.define(tiny("probe").replace("<vcpu>", f"{title}<vcpu>"))
                return "probe" in told.read_text()

            wait_for(heard, "virsh hears of no event", 60)
            daemon.virsh("undefine", "probe")
            yield told
        finally:
            process.kill()


def job(daemon: DaemonProcess, *options: str) -> dict[str, str]:
    """virsh domjobinfo, by its names."""
    lines = daemon.virsh("domjobinfo", *options, "m").splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines) if value}


def size(text: str) -> float:
    """Bytes of "1.5 MiB" and "1.5 MiB/s"."""
    number, unit = text.removesuffix("/s").split()
    return float(number) * UNITS[unit]


@contextmanager
def migrating(here: DaemonProcess, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """`virsh migrate`, which has begun."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(here.path)
    ) as moving:
        try:
            wait_for(lambda: job(here).get("Job type") == "Unbounded", "no job", 60)
            yield moving
        finally:
            moving.kill()


def slow(here: DaemonProcess, there: DaemonProcess, *options: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """A migration at a MiB a second that has begun."""
    command = ["virsh", "-q", "-c", here.uri(), "migrate", "--live", "--bandwidth", "1", *options, "m", there.uri()]
    return migrating(here, [*command, "--migrateuri", place(there)])


def watch(here: DaemonProcess) -> None:
    """What domjobinfo says while memory is sent at a MiB a second, until it has said that more was sent three times."""
    seen: list[dict[str, str]] = []

    def more() -> bool:
        """Another sample that tells of memory that was sent meanwhile."""
        found = job(here)
        if not size(found.get("Memory remaining", "0 B")):
            return False
        if seen and found["Data processed"] == seen[-1]["Data processed"]:
            return False
        seen.append(found)
        return True

    while len(seen) < 4:
        wait_for(more, "nothing is sent", 60)
    sent, left = ([size(each[name]) for each in seen] for name in ("Memory processed", "Memory remaining"))
    assert sent == sorted(sent) and sent[0] < sent[-1], sent
    assert left == sorted(left, reverse=True) and 0 < left[-1] < left[0] < 258 << 20, left
    last = seen[-1]
    assert last["Operation"] == "Outgoing migration" and last["Iteration"] == "1"
    assert 0 < size(last["Memory bandwidth"]) < 8 << 20, last  # of a busy host any less
    assert size(last["Memory total"]) == pytest.approx(sent[-1] + left[-1], rel=0.01)
    assert float(last["Expected downtime"].split()[0]) > 0
    assert int(last["Time elapsed"].split()[0]) >= int(seen[0]["Time elapsed"].split()[0])


def events(text: str) -> list[str]:
    """Those of m, as "name detail"."""
    found = re.findall(r"event '([a-z-]+)' for domain '?m'?:?([^\n]*(?:\n\t[^\n]*)*)", text)
    return [f"{name} {' '.join(detail.split())}" for name, detail in found]


def check_events(source: Path, target: Path) -> None:
    wait_for(lambda: "Stopped Migrated" in source.read_text(), source.read_text())
    wait_for(lambda: "Resumed Migrated" in target.read_text(), target.read_text())
    told = events(source.read_text())
    names = [each.split()[0] for each in told]
    assert "migration-iteration" in names and "iteration: '1'" in source.read_text(), told
    done = names.index("job-completed")
    assert re.search(r"data_processed: \d{8}", told[done]) and "downtime: " in told[done], told[done]
    assert names.index("migration-iteration") < done < told.index(next(t for t in told if "Stopped Migrated" in t))
    assert any("Started Migrated" in each for each in events(target.read_text())), target.read_text()


@pytest.mark.root
@pytest.mark.parametrize("how", ["p2p", "managed"])
def test_a_migration_by_tls_is_watched(hosts: Hosts, tmp_path: Path, how: str) -> None:  # noqa: F811
    here, there = hosts.here, hosts.there
    here.virsh("destroy", "m")
    here.virsh("undefine", "m")
    boot(here, large(tmp_path))
    options = ["--p2p", f"loopvisor+tls://{THERE}/system"] if how == "p2p" else [hosts.far]
    command = ["virsh", "-q", "-c", here.uri(), "migrate", "--live", "--tls", "--bandwidth", "1", "m", *options]
    command += ["--migrateuri", f"tcp://{THERE}"]
    with watched(here) as source, watched(there) as target:
        with migrating(here, hosts.near.command(*command)) as moving:
            watch(here)
            here.virsh("migrate-setspeed", "m", "1000")
            assert moving.wait(120) == 0, moving.stderr and moving.stderr.read()
        check_events(source, target)
    took = job(here, "--completed", "--keep-completed")
    assert took["Job type"] == "Completed" and size(took["Data processed"]) > CONTENT << 20
    assert job(here, "--completed") == took and job(here, "--completed")["Job type"] == "None"
    assert there.virsh("domstate", "m", "--reason") == "running (migrated)"
    assert talk(there, b"there").count(b"Ctrl-D ends") <= 1


@pytest.mark.root
@pytest.mark.skipif(not can_page(False), reason="the host has no userfaultfd for this process")
def test_post_copy_by_tls_from_peer_to_peer(hosts: Hosts, tmp_path: Path) -> None:  # noqa: F811
    """Its page link is encrypted as well, and goes to where the other one went."""
    here, there = hosts.here, hosts.there
    here.virsh("destroy", "m")
    here.virsh("undefine", "m")
    boot(here, large(tmp_path))
    command = ["virsh", "-q", "-c", here.uri(), "migrate", "--live", "--p2p", "--tls", "--postcopy", "--bandwidth", "1"]
    command += ["m", f"loopvisor+tls://{THERE}/system", "--migrateuri", f"tcp://{THERE}"]
    with migrating(here, hosts.near.command(*command)) as moving:
        here.virsh("migrate-postcopy", "m")
        wait_for(lambda: here.virsh("domstate", "m") == "paused", "it does not go")
        talk(there, b"after")
        assert job(here)["Job type"] == "Unbounded" and size(job(here)["Memory remaining"]) > 0
        here.virsh("migrate-setspeed", "m", "1000")
        assert moving.wait(120) == 0, moving.stderr and moving.stderr.read()
    assert here.virsh("domstate", "m", "--reason") == "shut off (migrated)"
    assert there.virsh("domstate", "m", "--reason") == "running (migrated)"
    talk(there, b"again")


def test_a_migration_is_changed_and_ended(tmp_path: Path) -> None:
    with DaemonProcess() as here, DaemonProcess() as there:
        boot(here, large(tmp_path))
        with slow(here, there) as moving:
            assert "already running" in here.virsh("migrate", "--live", "m", there.uri(), ok=False)
            wait_for(lambda: size(job(here).get("Data processed", "0 B")) > 1 << 20, "nothing is sent")
            here.virsh("domjobabort", "m")
            assert moving.wait(60) != 0 and moving.stderr is not None and "cancelled" in moving.stderr.read()
        assert here.virsh("domstate", "m") == "running" and there.virsh("list", "--all", "--name") == ""
        assert job(here)["Job type"] == job(here, "--completed")["Job type"] == "None"
        talk(here, b"still here")
        # The whole of it may be sent while it stands still: the round that goes on is the last before that.
        with slow(here, there) as moving:
            assert "downtime" in here.virsh("migrate-setmaxdowntime", "m", "0", ok=False)
            here.virsh("migrate-setmaxdowntime", "m", "2000")
            here.virsh("migrate-setspeed", "m", "1000")
            assert moving.wait(60) == 0, moving.stderr and moving.stderr.read()
        talk(there, b"there")


def test_after_a_timeout_it_is_paused_and_goes(tmp_path: Path) -> None:
    """--timeout with --timeout-suspend, which virsh does by pausing it here: there it runs again."""
    with DaemonProcess() as here, DaemonProcess() as there:
        boot(here, large(tmp_path))
        with slow(here, there, "--timeout", "2", "--timeout-suspend") as moving:
            wait_for(lambda: here.virsh("domstate", "m") == "paused", "it is not paused")
            here.virsh("migrate-setspeed", "m", "1000")
            assert moving.wait(60) == 0, moving.stderr and moving.stderr.read()
        wait_for(lambda: there.virsh("domstate", "m") == "running", "it stays paused")
        talk(there, b"there")


def test_disks_go_along(tmp_path: Path) -> None:
    """--copy-storage-all: into files that are not there yet; here under a name that --xml gives."""
    disk, moved = tmp_path / "a.img", tmp_path / "target.xml"
    disk.write_bytes(os.urandom(8 << 20))
    devices = f"<disk type='file'><driver type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>"
    with DaemonProcess() as here, DaemonProcess() as there:
        boot(here, large(tmp_path, devices).replace("machine='bare'", "machine='q35'"))
        move = ("migrate", "--live", "--copy-storage-all", "--migrateuri", place(there), "m", there.uri())
        assert "is here already" in here.virsh(*move, ok=False)
        moved.write_text(here.virsh("dumpxml", "m", "--migratable").replace(str(disk), str(tmp_path / "b.img")))
        here.virsh(*move, "--xml", str(moved))
        talk(there, b"there")
        assert (tmp_path / "b.img").read_bytes() == disk.read_bytes()
        assert str(tmp_path / "b.img") in there.virsh("domblklist", "m")
