"""Saved states and snapshots by virsh: what a guest has in memory goes on, its disks with it."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny, wait_for

pytestmark = needs_virsh


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as running:
        running.define(tiny("d"))
        running.virsh("start", "d")
        yield running


def talk(daemon: DaemonProcess, text: bytes) -> bytes:
    """What an echoing guest has said when it has answered; its console keeps what was said before."""
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(20)
        console.connect(str(daemon.path / "loopvisor" / "d" / "console.sock"))
        console.sendall(text)
        said = b""
        while not said.endswith(text):
            said += console.recv(4096)
        return said


def test_save_and_restore(daemon: DaemonProcess) -> None:
    talk(daemon, b"before")
    file = daemon.path / "saved"
    daemon.virsh("save", "d", str(file))
    assert daemon.virsh("domstate", "d", "--reason") == "shut off (saved)"
    daemon.virsh("restore", str(file))
    assert daemon.virsh("domstate", "d", "--reason") == "running (restored)"
    said = talk(daemon, b"after")
    assert said.count(b"Ctrl-D ends") == 1 and b"before" in said  # it did not start anew
    assert "already" in daemon.virsh("restore", str(file), ok=False)
    daemon.virsh("suspend", "d")
    daemon.virsh("save", "d", str(file))
    daemon.virsh("restore", str(file))
    assert daemon.virsh("domstate", "d") == "paused"
    assert "no snapshot" in daemon.virsh("restore", str(daemon.path / "absent"), ok=False)


def test_a_managed_save_is_used_up_by_the_next_start(daemon: DaemonProcess) -> None:
    talk(daemon, b"kept")
    daemon.virsh("managedsave", "d")
    assert daemon.virsh("list", "--all", "--name", "--with-managed-save") == "d"
    assert "managed save" in daemon.virsh("undefine", "d", ok=False)
    daemon.kill()
    daemon.start()
    daemon.virsh("start", "d")
    assert b"kept" in talk(daemon, b"x")
    assert daemon.virsh("list", "--all", "--name", "--with-managed-save") == ""
    daemon.virsh("managedsave", "d")
    daemon.virsh("managedsave-remove", "d")
    daemon.virsh("start", "d")
    assert b"kept" not in talk(daemon, b"y")


def test_a_save_that_fails_leaves_the_machine_running(daemon: DaemonProcess) -> None:
    assert daemon.virsh("save", "d", "/proc/nowhere/x", ok=False)
    assert daemon.virsh("domstate", "d") == "running"
    talk(daemon, b"still here")
    daemon.virsh("destroy", "d")
    assert daemon.virsh("domstate", "d", "--reason") == "shut off (destroyed)"


def test_snapshots_are_a_tree(daemon: DaemonProcess) -> None:
    talk(daemon, b"one")
    daemon.virsh("snapshot-create-as", "d", "first", "what it is for")
    talk(daemon, b"two")
    daemon.virsh("snapshot-create-as", "d", "second")
    assert daemon.virsh("domstate", "d") == "running"
    assert daemon.virsh("snapshot-list", "d", "--name").split() == ["first", "second"]
    assert daemon.virsh("snapshot-list", "d", "--name", "--roots") == "first"
    assert daemon.virsh("snapshot-list", "d", "--name", "--leaves") == "second"
    assert daemon.virsh("snapshot-parent", "d", "second") == "first"
    assert daemon.virsh("snapshot-current", "d", "--name") == "second"
    xml = daemon.virsh("snapshot-dumpxml", "d", "first")
    assert "<description>what it is for</description>" in xml and "<state>running</state>" in xml
    assert "already exists" in daemon.virsh("snapshot-create-as", "d", "first", ok=False)
    daemon.virsh("snapshot-revert", "d", "first")
    assert daemon.virsh("domstate", "d", "--reason") == "running (from snapshot)"
    said = talk(daemon, b"three")
    assert b"one" in said and b"two" not in said
    assert daemon.virsh("snapshot-current", "d", "--name") == "first"
    daemon.virsh("snapshot-revert", "d", "second", "--paused")
    assert daemon.virsh("domstate", "d") == "paused"
    daemon.virsh("snapshot-delete", "d", "first")
    assert daemon.virsh("snapshot-list", "d", "--name", "--roots") == "second"
    daemon.virsh("destroy", "d")
    assert "1 snapshots" in daemon.virsh("undefine", "d", ok=False)
    daemon.virsh("undefine", "d", "--snapshots-metadata")
    assert not list((daemon.path / "state" / "snapshots").iterdir())


def test_a_stopped_domains_snapshot_has_its_disks(daemon: DaemonProcess) -> None:
    disk = daemon.path / "disk.img"
    disk.write_bytes(b"old" + bytes(4093))
    device = f"<disk type='file'><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>"
    xml = tiny("off").replace("machine='bare'", "machine='pc'").replace("<devices>", "<devices>" + device)
    daemon.define(xml)
    daemon.virsh("snapshot-create-as", "off", "s")
    disk.write_bytes(b"new and longer" + bytes(8192))
    daemon.virsh("snapshot-revert", "off", "s")
    assert disk.read_bytes() == b"old" + bytes(4093)
    assert daemon.virsh("domstate", "off") == "shut off"


@pytest.mark.debian
@pytest.mark.slow
def test_a_linux_guests_disk_and_memory_go_back_together() -> None:
    from images.catalog import resolve
    from images.errors import ImageError

    try:
        image = resolve("linux", build=True)
    except ImageError as error:
        pytest.skip(str(error))
    with DaemonProcess() as daemon:
        disk = daemon.path / "root.img"
        disk.write_bytes(Path(image.disk or "").read_bytes())
        daemon.define(
            f"""<domain type='qemu'><name>d</name><memory unit='MiB'>256</memory><os><type>hvm</type>
            <kernel>{image.kernel}</kernel><initrd>{image.initrd}</initrd></os><devices>
            <disk type='file'><source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices>
            <loopvisor:machine xmlns:loopvisor='urn:loopvisor:domain:1' agent='on' append='root=/dev/vda rw quiet'/>
            </domain>"""
        )
        daemon.virsh("start", "d")
        console = Console(daemon)
        console.until(rb":~# ")
        assert abs(int(daemon.virsh("domtime", "d").split()[-1]) - time.time()) < 60
        info = daemon.virsh("guestinfo", "d")
        assert "os.kernel-release" in info and "hostname" in info
        assert "lo" in daemon.virsh("domifaddr", "d", "--source", "agent", "--full")
        agent = ["qemu-agent-command", "d"]
        assert daemon.virsh(*agent, '{"execute": "guest-ping"}') == '{"return": {}}'
        program = '{"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg": ["-c", "echo out; exit 3"]}}'
        number = json.loads(daemon.virsh(*agent, program))["return"]["pid"]
        status = f'{{"execute": "guest-exec-status", "arguments": {{"pid": {number}}}}}'
        answer: dict[str, object] = {}
        deadline = time.monotonic() + 30
        while not answer.get("exited") and time.monotonic() < deadline:
            answer = json.loads(daemon.virsh(*agent, status))["return"]
        assert answer == {"exited": True, "exitcode": 3, "out-data": "b3V0Cg=="}
        assert "guest-exec-status" in daemon.virsh(*agent, '{"execute": "guest-get-disks"}', ok=False)
        console.run(b"echo first >/file; sync; a=in-memory")
        daemon.virsh("snapshot-create-as", "d", "s")
        console.run(b"echo second >/file; sync; a=lost")
        console.close()
        counters = daemon.virsh("domblkstat", "d", "vda")
        assert int(re.findall(r"wr_bytes (\d+)", counters)[0]) > 0
        daemon.virsh("snapshot-revert", "d", "s")
        console = Console(daemon)
        assert console.run(b"echo $a $(cat /file)") == b"in-memory first"
        console.close()
        assert os.path.getsize(disk) == Path(image.disk or "").stat().st_size


class Console:
    """A shell on a domain's console."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        wait_for(lambda: (daemon.path / "loopvisor" / "d" / "console.sock").exists(), "no console")
        self._socket.connect(str(daemon.path / "loopvisor" / "d" / "console.sock"))
        self._socket.settimeout(60)
        self._count = time.monotonic_ns()

    def close(self) -> None:
        self._socket.close()

    def until(self, pattern: bytes) -> bytes:
        said = b""
        while not re.search(pattern, said):
            said += self._socket.recv(4096)
        return said

    def run(self, command: bytes) -> bytes:
        """Its output."""
        self._count += 1
        mark = b"%d" % self._count
        self._socket.sendall(b"echo b''egin-%b; %b; echo e''nd-%b\n" % (mark, command, mark))
        said = self.until(rb"end-%b" % mark)
        return re.sub(rb"\s+", b" ", said.partition(b"begin-" + mark)[2].partition(b"end-")[0]).strip()
