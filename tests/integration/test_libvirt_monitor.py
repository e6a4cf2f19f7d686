"""QEMU's monitor as virsh asks it, processors that a domain is pinned to, and the host's boards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny, wait_for
from vmm.libvirt.pinning import threads_of

pytestmark = needs_virsh


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as running:
        yield running


def ask(daemon: DaemonProcess, command: str, **more: Any) -> Any:
    return json.loads(daemon.virsh("qemu-monitor-command", "m", json.dumps({"execute": command, **more})))


def test_the_monitor(daemon: DaemonProcess) -> None:
    daemon.define(tiny("m"))
    assert "not running" in daemon.virsh("qemu-monitor-command", "m", '{"execute":"query-status"}', ok=False)
    daemon.virsh("start", "m")
    assert ask(daemon, "query-status", id=7) == {"return": {"status": "running", "running": True}, "id": 7}
    assert ask(daemon, "query-name")["return"] == {"name": "m"}
    assert ask(daemon, "query-uuid")["return"]["UUID"] == daemon.virsh("domuuid", "m")
    assert ask(daemon, "query-kvm")["return"]["enabled"] is False  # its type is qemu
    assert ask(daemon, "query-memory-size-summary")["return"] == {"base-memory": 4 << 20}
    assert ask(daemon, "query-block")["return"] == ask(daemon, "query-blockstats")["return"] == []
    assert ask(daemon, "query-block-jobs")["return"] == []
    assert ask(daemon, "query-balloon")["error"]["class"] == "DeviceNotActive"
    wait_for(lambda: threads_of(daemon.pid("m")).shared, "no processor runs")
    (cpu,) = ask(daemon, "query-cpus-fast")["return"]
    assert Path(f"/proc/{daemon.pid('m')}/task/{cpu['thread-id']}/comm").read_text() == "vcpu\n"
    assert ask(daemon, "blockdev-add")["error"]["class"] == "CommandNotFound"
    assert "unexpected" in ask(daemon, "query-status", arguments={"x": 1})["error"]["desc"]
    assert "no power button" in ask(daemon, "system_powerdown")["error"]["desc"]
    assert "{'execute'" in daemon.virsh("qemu-monitor-command", "m", '{"arguments": {}}', ok=False)
    listed = {one["name"] for one in ask(daemon, "query-commands")["return"]}
    assert {"query-status", "human-monitor-command"} <= listed
    ask(daemon, "stop")
    wait_for(lambda: daemon.virsh("domstate", "m") == "paused", "it goes on")
    assert ask(daemon, "query-status")["return"] == {"status": "paused", "running": False}
    assert daemon.virsh("qemu-monitor-command", "m", "--hmp", "info status").strip() == "VM status: paused"
    assert "unknown command: 'info registers'" in daemon.virsh("qemu-monitor-command", "m", "--hmp", "info registers")
    ask(daemon, "human-monitor-command", arguments={"command-line": "cont"})
    wait_for(lambda: daemon.virsh("domstate", "m") == "running", "it does not go on")
    daemon.virsh("qemu-monitor-command", "m", "--hmp", "quit")
    wait_for(lambda: daemon.virsh("domstate", "m") == "shut off", "it does not end")
    daemon.virsh("undefine", "m")


@pytest.mark.skipif(not {0, 1} <= os.sched_getaffinity(0), reason="processors 0 and 1 are not both this process's")
def test_processors_of_the_host(daemon: DaemonProcess) -> None:
    daemon.define(tiny("p"))
    daemon.virsh("vcpupin", "p", "0", "1", "--config")
    assert '<vcpupin vcpu="0" cpuset="1"' in daemon.virsh("dumpxml", "p").replace("'", '"')
    daemon.virsh("start", "p")
    wait_for(lambda: threads_of(daemon.pid("p")).shared, "no processor runs")
    threads = threads_of(daemon.pid("p"))
    wait_for(lambda: os.sched_getaffinity(threads.shared) == {1}, "it is not pinned")
    assert re.search(r"0\s+1$", daemon.virsh("vcpupin", "p"))
    assert re.search(r"CPU Affinity:\s+-y", daemon.virsh("vcpuinfo", "p"))
    daemon.virsh("emulatorpin", "p", "0", "--live")
    assert {frozenset(os.sched_getaffinity(one)) for one in threads_of(daemon.pid("p")).others} == {frozenset({0})}
    assert daemon.virsh("emulatorpin", "p").endswith("0")
    assert "emulatorpin" not in daemon.virsh("dumpxml", "p", "--inactive")
    # Another daemon knows it and keeps it so.
    daemon.kill()
    daemon.start()
    os.sched_setaffinity(threads.shared, {0})
    wait_for(lambda: os.sched_getaffinity(threads.shared) == {1}, "it is not put back")
    daemon.virsh("vcpupin", "p", "0", "r", "--live", "--config")  # any processor
    wait_for(lambda: {0, 1} <= os.sched_getaffinity(threads.shared), "it is pinned on")
    assert "vcpupin" not in daemon.virsh("dumpxml", "p")
    daemon.virsh("emulatorpin", "p", "r", "--live")
    others = {frozenset(os.sched_getaffinity(one)) for one in threads_of(daemon.pid("p")).others}
    assert others == {frozenset(os.sched_getaffinity(0))}
    assert "emulatorpin" not in daemon.virsh("dumpxml", "p")
    assert "vcpu 3" in daemon.virsh("vcpupin", "p", "3", "0", "--config", ok=False).lower()
    daemon.virsh("vcpupin", "p", "0", "0", ok=False, read_only=True)
    daemon.virsh("destroy", "p")
    daemon.virsh("undefine", "p")


def test_the_hosts_boards(daemon: DaemonProcess) -> None:
    if Path("/sys/class/dmi/id/sys_vendor").exists():
        assert "<sysinfo type='smbios'>" in daemon.virsh("sysinfo").replace('"', "'")
    else:
        assert "tells nothing of its firmware" in daemon.virsh("sysinfo", ok=False)
