"""libvirt's own clients, unmodified: libvirt-python, virt-install, virt-clone, virt-xml, SSH, an exporter."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import environment
from tests.support.libvirtd import GUESTS, DaemonProcess, needs_virsh, tiny, wait_for

PYTHON = "/usr/bin/python3"


def has_bindings() -> bool:
    return (
        Path(PYTHON).exists() and not subprocess.run([PYTHON, "-c", "import libvirt"], capture_output=True).returncode
    )


needs_bindings = pytest.mark.skipif(not has_bindings(), reason="libvirt-python is not installed (python3-libvirt)")
needs_virtinst = pytest.mark.skipif(
    shutil.which("virt-install") is None, reason="virt-install is not installed (virtinst)"
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as running:
        yield running


def python(daemon: DaemonProcess, code: str, *arguments: str) -> str:
    done = subprocess.run(
        [PYTHON, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env=environment(daemon.path)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LIFE = """
import json, sys, threading, libvirt
uri, xml = sys.argv[1:3]
libvirt.virEventRegisterDefaultImpl()
stop = threading.Event()
def loop():
    while not stop.is_set():
        libvirt.virEventRunDefaultImpl()
libvirt.virEventAddTimeout(100, lambda *_: None, None)
thread = threading.Thread(target=loop); thread.start()
heard, done = [], threading.Event()
def lifecycle(connection, domain, event, detail, opaque):
    heard.append((domain.name(), event, detail))
    if event == libvirt.VIR_DOMAIN_EVENT_UNDEFINED:
        done.set()
c = libvirt.open(uri)
c.setKeepAlive(5, 3)
c.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)
d = c.defineXML(xml)
assert not d.isActive() and d.isPersistent()
d.create()
assert d.isActive() and c.lookupByID(d.ID()).UUIDString() == d.UUIDString()
assert d.info()[0] == libvirt.VIR_DOMAIN_RUNNING and d.info()[3] == 1
stats = c.getAllDomainStats(0, libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE)
assert [s[0].name() for s in stats] == ["py"] and stats[0][1]["state.state"] == 1, stats
try:
    d.create()
except libvirt.libvirtError as error:
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    assert error.get_error_domain() == libvirt.VIR_FROM_QEMU
else:
    raise SystemExit("started twice")
stream = c.newStream(0)
d.openConsole(None, stream, 0)
stream.send(b"by stream")
said = b""
while not said.endswith(b"by stream"):
    said += stream.recv(4096)
try:
    d.openConsole(None, c.newStream(0), 0)
except libvirt.libvirtError as error:
    assert "Active console session" in str(error)
else:
    raise SystemExit("two had the console")
second = c.newStream(0)
d.openConsole(None, second, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
assert stream.recv(4096) == b""  # who had it hears that there is no more
said = b""
while b"by stream" not in said:
    said += second.recv(4096)
second.abort()
d.suspend(); d.resume(); d.destroy(); d.undefine()
try:
    c.lookupByName("py")
except libvirt.libvirtError as error:
    assert error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN
assert done.wait(20)
stop.set(); thread.join()
ro = libvirt.openReadOnly(uri)
try:
    ro.defineXML(xml)
except libvirt.libvirtError as error:
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_DENIED
print(json.dumps(heard))
"""


@needs_bindings
def test_libvirt_python_with_its_default_loop(daemon: DaemonProcess) -> None:
    heard = json.loads(python(daemon, LIFE, daemon.uri(), tiny("py")))
    # DEFINED, STARTED, SUSPENDED, RESUMED, STOPPED (destroyed), UNDEFINED
    assert heard == [["py", 0, 0], ["py", 2, 0], ["py", 3, 0], ["py", 4, 0], ["py", 5, 1], ["py", 1, 0]]


ERRORS = """
import json, sys, libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
c = libvirt.open(sys.argv[1])
d = c.defineXML(sys.argv[2])
nobody = "00000000-0000-0000-0000-000000000001"
calls = {
    "domain by name": lambda: c.lookupByName("nope"), "domain by uuid": lambda: c.lookupByUUIDString(nobody),
    "domain by id": lambda: c.lookupByID(99999), "network": lambda: c.networkLookupByName("nope"),
    "pool": lambda: c.storagePoolLookupByName("nope"), "pool by uuid": lambda: c.storagePoolLookupByUUIDString(nobody),
    "volume": lambda: c.storageVolLookupByPath("/nope"), "device": lambda: c.nodeDeviceLookupByName("nope"),
    "interface": lambda: c.interfaceLookupByName("nope"), "secret": lambda: c.secretLookupByUUIDString(nobody),
    "filter": lambda: c.nwfilterLookupByName("nope"), "no XML": lambda: c.defineXML("<domain"),
    "another root": lambda: c.defineXML("<network/>"), "no name": lambda: c.defineXML("<domain type='qemu'/>"),
    "suspend": d.suspend, "resume": d.resume, "destroy": d.destroy, "reset": lambda: d.reset(0), "time": d.getTime,
    "statistics": lambda: d.blockStats("vda"), "console": lambda: d.openConsole(None, c.newStream(), 0),
    "snapshot": lambda: d.snapshotLookupByName("nope"), "current": d.snapshotCurrent,
    "title": lambda: d.metadata(1, None),
    "live": lambda: d.setVcpusFlags(1, 1), "maximum": d.maxVcpus, "unknown flag": lambda: d.createWithFlags(1 << 20),
}
found = {}
for name, call in calls.items():
    try:
        call()
        found[name] = None
    except libvirt.libvirtError as error:
        found[name] = [error.get_error_code(), error.get_error_domain()]
d.undefine()
print(json.dumps(found))
"""
NOT_RUNNING = [55, 20]


@needs_bindings
def test_errors_are_those_of_libvirtd(daemon: DaemonProcess) -> None:
    """Codes and domains as libvirtd 9.0 with its QEMU driver answered the same calls."""
    found = json.loads(python(daemon, ERRORS, daemon.uri("qemu"), tiny("err")))
    running = ("suspend", "resume", "destroy", "reset", "time", "statistics", "console", "live", "maximum")
    assert {name: found.pop(name) for name in running} == dict.fromkeys(running, NOT_RUNNING)
    assert found == {
        "domain by name": [42, 10], "domain by uuid": [42, 10], "domain by id": [42, 10], "network": [43, 19],
        "pool": [49, 18], "pool by uuid": [49, 18], "volume": [50, 18], "device": [53, 22], "interface": [57, 26],
        "secret": [66, 30], "filter": [62, 33], "no XML": [35, 20], "another root": [27, 5], "no name": [21, 20],
        "snapshot": [72, 10], "current": [72, 10], "title": [80, 20], "unknown flag": [8, 10],
    }  # fmt: skip


ASYNC = """
import asyncio, sys, libvirt, libvirtaio
async def main():
    libvirtaio.virEventRegisterAsyncIOImpl()
    c = libvirt.open(sys.argv[1])
    heard = asyncio.Queue()
    loop = asyncio.get_running_loop()
    c.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                             lambda c, d, event, detail, o: heard.put_nowait(event), None)
    d = await asyncio.to_thread(c.createXML, sys.argv[2], 0)
    assert await asyncio.wait_for(heard.get(), 20) == libvirt.VIR_DOMAIN_EVENT_STARTED
    await asyncio.to_thread(d.destroy)
    assert await asyncio.wait_for(heard.get(), 20) == libvirt.VIR_DOMAIN_EVENT_STOPPED
    print("heard")
    import os
    sys.stdout.flush(); os._exit(0)
asyncio.run(main())
"""


@needs_bindings
def test_libvirt_python_with_asyncio(daemon: DaemonProcess) -> None:
    assert python(daemon, ASYNC, daemon.uri(), tiny("aio")) == "heard\n"


@needs_virtinst
@needs_virsh
def test_virt_install_clone_and_xml(daemon: DaemonProcess) -> None:
    disk = daemon.path / "vi.img"
    disk.write_bytes(b"contents" + bytes(1 << 20))
    uri = daemon.uri("qemu")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            timeout=100,
            env=environment(daemon.path),
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    run("virt-install", "--connect", uri, "--name", "vi", "--memory", "64", "--vcpus", "1", "--import",
        "--disk", f"{disk},format=raw", "--osinfo", "linux2022", "--graphics", "none", "--network", "none",
        "--boot", f"kernel={GUESTS / 'echo.bin'},kernel_args=a b", "--noautoconsole")  # fmt: skip
    assert daemon.virsh("domstate", "vi") == "running"
    assert "virtio" in daemon.virsh("dumpxml", "vi") and "<cmdline>a b</cmdline>" in daemon.virsh("dumpxml", "vi")
    assert "USB" in daemon.virsh("dominfo", "vi")  # what was taken though there is none is told
    (daemon.path / "plain.img").write_bytes(bytes(1 << 20))
    for scheme in ("qemu", "loopvisor"):  # told nothing of the guest's system, of a display or a console
        run("virt-install", "--connect", daemon.uri(scheme), "--name", f"plain-{scheme}", "--memory", "64", "--import",
            "--disk", f"{daemon.path / 'plain.img'},format=raw", "--osinfo", "detect=off,require=off",
            "--noautoconsole", "--boot", f"kernel={GUESTS / 'echo.bin'}")  # fmt: skip
        assert daemon.virsh("domstate", f"plain-{scheme}") == "running"
        assert "this machine has no display" in daemon.virsh("dominfo", f"plain-{scheme}")
        daemon.virsh("destroy", f"plain-{scheme}")
        daemon.virsh("undefine", f"plain-{scheme}")
    daemon.virsh("destroy", "vi")
    run("virt-clone", "--connect", uri, "--original", "vi", "--name", "vi2", "--file", str(daemon.path / "vi2.img"))
    assert (daemon.path / "vi2.img").read_bytes() == disk.read_bytes()
    run("virt-xml", "--connect", uri, "vi2", "--edit", "--memory", "96")
    run("virt-xml", "--connect", uri, "vi2", "--edit", "--metadata", "title=edited")
    assert daemon.virsh("desc", "vi2", "--title") == "edited" and ">98304</memory>" in daemon.virsh("dumpxml", "vi2")
    refused = subprocess.run(
        ["virt-install", "--connect", uri, "--name", "vi3", "--memory", "64", "--disk", "none", "--import", "--osinfo",
         "linux2022", "--network", "none", "--boot", f"kernel={GUESTS / 'echo.bin'}", "--graphics", "vnc,port=5901",
         "--noautoconsole"], capture_output=True, text=True, timeout=100, env=environment(daemon.path),
    )  # fmt: skip
    assert refused.returncode == 1 and "no display" in refused.stderr
    for name in ("vi", "vi2"):
        daemon.virsh("undefine", name)


@needs_virsh
@pytest.mark.skipif(shutil.which("nc") is None, reason="nc is not installed (netcat-openbsd)")
def test_ssh_needs_nothing_but_nc_at_the_other_end(daemon: DaemonProcess) -> None:
    """The command that takes ssh's place runs what it would run on the other host."""
    ssh = daemon.path / "ssh"
    ssh.write_text('#!/bin/sh\\nwhile [ "$1" != host ]; do shift; done; shift; exec sh -c "$*"\\n'.replace("\\n", "\n"))
    ssh.chmod(0o700)
    uri = f"loopvisor+ssh://host/system?socket={daemon.socket}&proxy=netcat&command={ssh}"
    done = subprocess.run(["virsh", "-q", "-c", uri, "hostname"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == os.uname().nodename


@needs_virsh
@pytest.mark.skipif(
    shutil.which("prometheus-libvirt-exporter") is None, reason="prometheus-libvirt-exporter is not installed"
)
def test_the_prometheus_exporter(daemon: DaemonProcess) -> None:
    import socket

    daemon.define(tiny("metric"))
    daemon.virsh("start", "metric")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "prometheus-libvirt-exporter",
        "--web.listen-address",
        f"127.0.0.1:{port}",
        "--libvirt.uri",
        daemon.uri(),
    ]
    text = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as exporter:
        try:
            deadline = time.monotonic() + 20
            while 'domain="metric"' not in text and time.monotonic() < deadline:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                        text = answer.read().decode()
                except OSError:
                    time.sleep(0.05)
        finally:
            exporter.terminate()
    assert re.search(r"^libvirt_up 1$", text, re.MULTILINE), text[-2000:]
    assert 'domain="metric"' in text
    daemon.virsh("destroy", "metric")
    daemon.virsh("undefine", "metric")


@needs_virsh
def test_many_domains_in_one_session(daemon: DaemonProcess) -> None:
    commands = "; ".join(f"define {daemon.path / f'm{number}.xml'}" for number in range(60))
    for number in range(60):
        (daemon.path / f"m{number}.xml").write_text(tiny(f"many{number}"))
    daemon.virsh(commands)
    assert len(daemon.virsh("list", "--all", "--name").split()) == 60
    assert daemon.virsh("domstats", "--state").count("state.state=5") == 60
    daemon.virsh("; ".join(f"undefine many{number}" for number in range(60)))
    wait_for(lambda: daemon.virsh("list", "--all", "--name") == "", "still there")
