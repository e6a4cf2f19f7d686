"""The life of domains, as virsh sees it, with tiny guests."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cpu import _core
from tests.support.command import VMM, environment
from tests.support.libvirtd import GUESTS, DaemonProcess, needs_virsh, tiny, wait_for

pytestmark = needs_virsh


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as running:
        yield running


def test_connection_names_and_versions(daemon: DaemonProcess) -> None:
    for scheme, kind in (("loopvisor", "loopvisor"), ("qemu", "QEMU")):
        shown = subprocess.run(["virsh", "-c", daemon.uri(scheme), "version"], capture_output=True, text=True).stdout
        assert f"Using API: {kind} " in shown and "Running hypervisor:" in shown
    other = subprocess.run(["virsh", "-c", daemon.uri("xen"), "list"], capture_output=True, text=True)
    assert other.returncode == 1 and "loopvisor:///system" in other.stderr


def test_a_life(daemon: DaemonProcess) -> None:
    daemon.define(tiny("life"))
    assert daemon.virsh("list", "--all", "--name").split() == ["life"]
    assert daemon.virsh("domstate", "life") == "shut off"
    daemon.virsh("start", "life")
    assert daemon.virsh("domstate", "life", "--reason") == "running (booted)"
    assert "already active" in daemon.virsh("start", "life", ok=False)
    daemon.virsh("suspend", "life")
    assert daemon.virsh("domstate", "life", "--reason") == "paused (user)"
    daemon.virsh("resume", "life")
    assert daemon.virsh("domstate", "life", "--reason") == "running (unpaused)"
    daemon.virsh("reset", "life")
    assert "no power button" in daemon.virsh("shutdown", "life", ok=False)
    daemon.virsh("destroy", "life")
    assert daemon.virsh("domstate", "life", "--reason") == "shut off (destroyed)"
    assert "not running" in daemon.virsh("destroy", "life", ok=False)
    daemon.virsh("undefine", "life")
    assert "life" in daemon.virsh("dominfo", "life", ok=False)


def test_a_guest_that_ends_itself(daemon: DaemonProcess) -> None:
    daemon.define(tiny("brief", "hello"))
    daemon.virsh("start", "brief")
    wait_for(lambda: daemon.virsh("domstate", "brief", "--reason") == "shut off (shutdown)", "no end")
    daemon.virsh("undefine", "brief")


def test_a_crash_is_told(daemon: DaemonProcess) -> None:
    daemon.define(tiny("crash", "triple"))
    daemon.virsh("start", "crash")
    wait_for(lambda: daemon.virsh("domstate", "crash", "--reason") == "shut off (crashed)", "no crash")
    daemon.virsh("undefine", "crash")


def test_transient_domains_vanish(daemon: DaemonProcess) -> None:
    file = daemon.path / "transient.xml"
    file.write_text(tiny("gone"))
    daemon.virsh("create", str(file), "--paused")
    assert daemon.virsh("domstate", "gone") == "paused"
    assert "Persistent:     no" in daemon.virsh("dominfo", "gone")
    assert "transient" in daemon.virsh("autostart", "gone", ok=False)
    daemon.virsh("resume", "gone")
    daemon.virsh("destroy", "gone")
    assert "gone" not in daemon.virsh("list", "--all", "--name")


def test_a_start_that_fails_says_why_and_leaves_nothing(daemon: DaemonProcess) -> None:
    file = daemon.path / "bad.xml"
    file.write_text(tiny("bad").replace("echo.bin", "absent.bin"))
    assert "absent.bin" in daemon.virsh("create", str(file), ok=False)
    empty = daemon.path / "empty.bin"
    empty.write_bytes(bytes(64))
    file.write_text(tiny("bad").replace(str(GUESTS / "echo.bin"), str(empty)))
    assert "empty.bin" in daemon.virsh("create", str(file), ok=False)
    assert "bad" not in daemon.virsh("list", "--all", "--name")


def test_machines_of_vmm_run_are_transient_domains(daemon: DaemonProcess) -> None:
    command = [*VMM, "run", "echo", "--name", "mine", "--console", "none"]
    with subprocess.Popen(command, env=environment(daemon.path)) as process:
        wait_for(lambda: daemon.virsh("list", "--name") == "mine", "not found")
        assert "Persistent:     no" in daemon.virsh("dominfo", "mine")
        assert "<name>mine</name>" in daemon.virsh("dumpxml", "mine")
        daemon.virsh("suspend", "mine")
        listed = subprocess.run([*VMM, "ps"], env=environment(daemon.path), capture_output=True, text=True)
        assert "mine" in listed.stdout and "paused" in listed.stdout
        daemon.virsh("destroy", "mine")
        assert process.wait(20) == 137
    assert daemon.virsh("list", "--all", "--name") == ""


def test_a_killed_machine_is_seen(daemon: DaemonProcess) -> None:
    import os
    import signal

    daemon.define(tiny("shot"))
    daemon.virsh("start", "shot")
    os.kill(daemon.pid("shot"), signal.SIGKILL)
    wait_for(lambda: daemon.virsh("domstate", "shot", "--reason") == "shut off (failed)", "not seen")
    daemon.virsh("start", "shot")
    daemon.virsh("destroy", "shot")
    daemon.virsh("undefine", "shot")


def test_definitions_are_changed_and_renamed(daemon: DaemonProcess) -> None:
    daemon.define(tiny("change"))
    daemon.virsh("set-lifecycle-action", "change", "reboot", "restart", "--config")
    assert "<on_reboot>restart</on_reboot>" in daemon.virsh("dumpxml", "change")
    daemon.virsh("set-lifecycle-action", "change", "reboot", "destroy", "--config")
    assert "<on_reboot>destroy</on_reboot>" in daemon.virsh("dumpxml", "change")
    daemon.virsh("set-lifecycle-action", "change", "crash", "destroy", "--config")
    assert "is gone" in daemon.virsh("set-lifecycle-action", "change", "crash", "restart", "--config", ok=False)
    daemon.virsh("setvcpus", "change", "2", "--config", "--maximum")
    daemon.virsh("setmaxmem", "change", "8M", "--config")
    daemon.virsh("desc", "change", "--title", "A title", "--config")
    daemon.virsh("desc", "change", "Two\nlines", "--config")
    daemon.virsh("metadata", "change", "--uri", "urn:x", "--key", "x", "--set", "<note a='1'/>", "--config")
    xml = daemon.virsh("dumpxml", "change")
    for part in (
        ">2</vcpu>",
        ">8192</memory>",
        "<title>A title</title>",
        "Two\nlines",
        "<x:note xmlns:x='urn:x' a='1'/>",
    ):
        assert part in xml
    daemon.virsh("autostart", "change")
    daemon.virsh("domrename", "change", "changed")
    assert "Autostart:      enable" in daemon.virsh("dominfo", "changed")
    assert daemon.virsh("desc", "changed", "--title") == "A title"
    assert daemon.virsh("list", "--all", "--name", "--autostart") == "changed"
    daemon.virsh("undefine", "changed")


def test_two_domains_do_not_share_a_uuid(daemon: DaemonProcess) -> None:
    uuid = "<uuid>0e7d2a52-0b3c-4a36-9f3c-6a5f1f0b8f60</uuid>"
    daemon.define(tiny("one", extra=uuid))
    file = daemon.path / "two.xml"
    file.write_text(tiny("two", extra=uuid))
    assert "already exists with uuid" in daemon.virsh("define", str(file), ok=False)
    file.write_text(tiny("one"))
    assert "already exists with uuid" in daemon.virsh("define", str(file), ok=False)
    daemon.virsh("undefine", "one")


READ_ONLY = ("start", "destroy", "suspend", "undefine", "autostart", "shutdown", "reset", "reboot")


def test_the_read_only_socket_changes_nothing(daemon: DaemonProcess) -> None:
    daemon.define(tiny("look"))
    file = daemon.path / "ro.xml"
    file.write_text(tiny("ro"))
    for command in (*([name, "look"] for name in READ_ONLY), ["define", str(file)], ["create", str(file)]):
        assert "read only" in daemon.virsh(*command, ok=False, read_only=True), command
        assert "read only" in daemon.virsh("-r", *command, ok=False), command
    assert daemon.virsh("domstate", "look", read_only=True) == "shut off"
    assert "<name>look</name>" in daemon.virsh("dumpxml", "look", read_only=True)
    assert "read only" in daemon.virsh("dumpxml", "look", "--security-info", read_only=True, ok=False)
    daemon.virsh("undefine", "look")


def test_what_is_asked_of_domains_that_have_none_of_it(daemon: DaemonProcess) -> None:
    """As libvirtd's QEMU driver answers."""
    daemon.define(tiny("plain"))
    assert daemon.virsh("numatune", "plain").split() == ["numa_mode", ":", "strict", "numa_nodeset", ":"]
    events = subprocess.run(["virsh", "-c", daemon.uri(), "perf", "plain"], capture_output=True, text=True).stdout
    assert events.count(": disabled\n") == 22
    assert "shm_pages_sharing" in daemon.virsh("node-memory-tune") or not Path("/sys/kernel/mm/ksm").exists()
    assert daemon.virsh("domlaunchsecinfo", "plain") == ""
    assert "<value>virtiofs</value>" in daemon.virsh("domcapabilities")
    assert "domain is not running" in daemon.virsh("domjobinfo", "plain", ok=False)
    assert "invalid path vdz not assigned" in daemon.virsh("domblkinfo", "plain", "vdz", ok=False)
    daemon.virsh("undefine", "plain")


@pytest.mark.skipif("soft" not in _core.CORES, reason="this build has no software core")
def test_a_domain_starts_with_each_model_that_is_usable_and_is_told_why_with_others(daemon: DaemonProcess) -> None:
    found = ElementTree.fromstring(daemon.virsh("domcapabilities", "--virttype", "qemu"))
    models = {model.text or "": model.attrib["usable"] for model in found.iterfind("cpu/mode[@name='custom']/model")}
    assert set(models) == {"x86-64-v2", "x86-64-v3"} == set(daemon.virsh("cpu-models", "x86_64").split())
    for model, usable in models.items():
        cpu = f"<cpu mode='custom' match='exact'><model fallback='forbid'>{model}</model></cpu>"
        daemon.define(tiny("model", extra=cpu))
        assert f">{model}</model>" in daemon.virsh("dumpxml", "model")
        if usable == "yes":
            daemon.virsh("start", "model")
            assert daemon.virsh("domstate", "model") == "running"
            assert f">{model}</model>" in daemon.virsh("dumpxml", "model")
            daemon.virsh("destroy", "model")
        else:
            assert "this host's core has no" in daemon.virsh("start", "model", ok=False)
        daemon.virsh("undefine", "model")


def test_events_come_in_order(daemon: DaemonProcess, tmp_path: Path) -> None:
    with subprocess.Popen(
        ["virsh", "-q", "-c", daemon.uri(), "event", "--event", "lifecycle", "--loop", "--timeout", "60"],
        stdout=subprocess.PIPE, text=True,
    ) as listener:  # fmt: skip
        assert listener.stdout is not None
        daemon.define(tiny("evented"))
        # The listener registers in its own time: definitions are repeated until it has heard of one.
        first = ""
        while not first:
            import select

            daemon.define(daemon.virsh("dumpxml", "evented"))
            if select.select([listener.stdout], [], [], 0.05)[0]:
                first = listener.stdout.readline()
        for command in ("start", "suspend", "resume", "destroy", "undefine"):
            daemon.virsh(command, "evented")
        heard = []
        while not heard or "Undefined" not in heard[-1]:
            line = listener.stdout.readline()
            assert line
            if "Defined" not in line:
                heard.append(line.partition(": ")[2].strip())
        listener.terminate()
    assert heard == ["Started Booted", "Suspended Paused", "Resumed Unpaused", "Stopped Destroyed", "Undefined Removed"]


def test_a_new_daemon_finds_everything_again() -> None:
    with DaemonProcess() as daemon:
        daemon.define(tiny("kept"))
        daemon.define(tiny("runs"))
        daemon.virsh("autostart", "kept")
        daemon.virsh("start", "runs")
        file = daemon.path / "t.xml"
        file.write_text(tiny("passing"))
        daemon.virsh("create", str(file), "--paused")
        before = daemon.virsh("dumpxml", "runs"), daemon.virsh("dumpxml", "passing"), daemon.pid("runs")
        for end in (daemon.kill, daemon.stop):
            end()
            daemon.start()
            wait_for(lambda: daemon.virsh("domstate", "kept") == "running", "not started by itself")
            assert daemon.virsh("domstate", "passing") == "paused"
            after = daemon.virsh("dumpxml", "runs"), daemon.virsh("dumpxml", "passing"), daemon.pid("runs")
            assert after == before
        daemon.virsh("destroy", "runs")
        assert daemon.virsh("domstate", "runs", "--reason") == "shut off (destroyed)"
        daemon.virsh("destroy", "passing")
        assert sorted(daemon.virsh("list", "--all", "--name").split()) == ["kept", "runs"]
