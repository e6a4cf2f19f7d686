"""What virsh changes of a domain that runs: devices, memory, limits, disks and their jobs; with a Linux guest."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import VMM
from tests.support.libvirtd import DaemonProcess, needs_virsh, wait_for

pytestmark = [needs_virsh, pytest.mark.debian]


NETWORK = "<interface type='user'/>" if shutil.which("passt") else ""
"""With a card from the start the guest has its driver loaded."""


class Linux(DaemonProcess):
    """A daemon with one Linux domain, d, which has an agent, a balloon and a shared directory."""

    def answers(self) -> bool:
        """The guest's agent is there."""
        command = ["virsh", "-q", "-c", self.uri(), "qemu-agent-command", "d", '{"execute":"guest-ping"}']
        return subprocess.run(command, capture_output=True).returncode == 0

    def sh(self, script: str) -> str:
        program = {
            "execute": "guest-exec",
            "arguments": {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True},
        }
        number = json.loads(self.virsh("qemu-agent-command", "d", json.dumps(program)))["return"]["pid"]
        status = json.dumps({"execute": "guest-exec-status", "arguments": {"pid": number}})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            answer = json.loads(self.virsh("qemu-agent-command", "d", status))["return"]
            if answer.get("exited"):
                return base64.b64decode(answer.get("out-data", "")).decode().strip()
        raise AssertionError(script)

    def file(self, name: str, size: int) -> Path:
        path = self.path / name
        with path.open("wb") as file:
            file.truncate(size)
        return path


@pytest.fixture(scope="module")
def linux() -> Iterator[Linux]:
    from images.catalog import resolve
    from images.errors import ImageError

    try:
        image = resolve("linux", build=True)
    except ImageError as error:
        pytest.skip(str(error))
    with Linux() as daemon:
        disk = daemon.path / "root.img"
        disk.write_bytes(Path(image.disk or "").read_bytes())
        (daemon.path / "shared").mkdir()
        daemon.define(
            f"""<domain type='qemu'><name>d</name><memory unit='MiB'>256</memory><vcpu current='1'>3</vcpu>
            <os><type>hvm</type>
            <kernel>{image.kernel}</kernel><initrd>{image.initrd}</initrd></os>
            <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking><devices>
            <disk type='file'><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
            <filesystem type='mount' accessmode='passthrough'><driver type='virtiofs'/>
            <source dir='{daemon.path}/shared'/><target dir='tag'/></filesystem>
            <memballoon model='virtio'/>{NETWORK}</devices>
            <loopvisor:machine xmlns:loopvisor='urn:loopvisor:domain:1' agent='on' append='root=/dev/vda rw quiet'/>
            </domain>"""
        )
        daemon.virsh("start", "d")
        wait_for(daemon.answers, "no agent", 120)
        yield daemon


def test_a_disk_comes_and_goes(linux: Linux) -> None:
    linux.sh("uname")
    more = linux.file("more.img", 32 << 20)
    linux.virsh("attach-disk", "d", str(more), "vdb", "--live", "--subdriver", "raw")
    assert linux.sh("echo written >/dev/vdb; cat /sys/block/vdb/size") == str((32 << 20) // 512)
    linux.sh("sync")
    assert more.read_bytes().startswith(b"written")
    assert "vdb" in linux.virsh("domblklist", "d") and "vdb" not in linux.virsh("domblklist", "d", "--inactive")
    assert int(re.findall(r"wr_bytes (\d+)", linux.virsh("domblkstat", "d", "vdb"))[0]) > 0
    assert "already exists" in linux.virsh("attach-disk", "d", str(more), "vdb", "--live", ok=False)
    with subprocess.Popen(
        ["virsh", "-c", linux.uri(), "event", "d", "--event", "device-removed", "--timeout", "60"],
        stdout=subprocess.PIPE, text=True,
    ) as events:  # fmt: skip
        linux.virsh("detach-disk", "d", "vdb", "--live")
        out, _ = events.communicate(timeout=90)
    assert "device-removed" in out and "virtio-disk1" in out
    assert linux.sh("ls /sys/block") == "vda" and "vdb" not in linux.virsh("domblklist", "d")
    linux.virsh("attach-disk", "d", str(more), "vdb", "--persistent", "--subdriver", "raw")
    assert "vdb" in linux.virsh("domblklist", "d", "--inactive")
    # A new daemon finds the running machine as it is.
    linux.kill()
    linux.start()
    assert "vdb" in linux.virsh("domblklist", "d")
    linux.virsh("detach-disk", "d", "vdb", "--persistent")
    assert "vdb" not in linux.virsh("domblklist", "d", "--inactive")


def test_memory_goes_to_the_balloon_and_comes_back(linux: Linux) -> None:
    linux.virsh("setmem", "d", "128M", "--live")
    wait_for(lambda: re.search(r"Used memory: +131072 KiB", linux.virsh("dominfo", "d")), "it keeps its memory")
    stats = dict(line.split() for line in linux.virsh("dommemstat", "d").splitlines())
    assert int(stats["actual"]) == 131072 and 0 < int(stats["unused"]) < 131072 and "available" in stats
    told = linux.virsh("domstats", "d", "--balloon")
    assert "balloon.current=131072" in told and "balloon.maximum=262144" in told
    linux.virsh("setmem", "d", "256M", "--live")
    assert "higher than max" in linux.virsh("setmem", "d", "512M", "--live", ok=False)
    assert "active domain" in linux.virsh("setmaxmem", "d", "512M", "--live", ok=False)


def test_processors_come_and_go(linux: Linux) -> None:
    assert linux.sh("nproc") == "1" and linux.virsh("vcpucount", "d", "--maximum", "--live") == "3"
    linux.virsh("setvcpus", "d", "2", "--live")
    wait_for(lambda: linux.sh("nproc") == "2", "it has not come")
    assert linux.virsh("vcpucount", "d", "--current", "--live") == "2"
    assert "vcpu.current=2" in linux.virsh("domstats", "d", "--vcpu")
    linux.virsh("setvcpus", "d", "1", "--live")
    assert linux.sh("nproc") == "1"
    assert "greater than max" in linux.virsh("setvcpus", "d", "4", "--live", ok=False)


def test_a_card_that_the_guest_gives_up_leaves_the_description(linux: Linux) -> None:
    if not shutil.which("passt"):
        pytest.skip("passt is not installed")
    card = linux.path / "card.xml"
    card.write_text("<interface type='user'><mac address='52:54:00:aa:bb:cc'/><model type='virtio'/></interface>")
    linux.virsh("attach-device", "d", str(card), "--live")
    assert "52:54:00:aa:bb:cc" in linux.virsh("domiflist", "d")
    wait_for(lambda: "52:54:00:aa:bb:cc" in linux.sh("cat /sys/class/net/*/address"), "no card in the guest")
    linux.sh(
        "card=$(dirname $(grep -l 52:54:00:aa:bb:cc /sys/class/net/*/address));"
        "at=$(basename $(dirname $(readlink -f $card/device)));"
        "for slot in /sys/bus/pci/slots/*; do grep -q ${at%.0} $slot/address && echo 0 >$slot/power; done"
    )
    wait_for(lambda: "52:54:00:aa:bb:cc" not in linux.virsh("domiflist", "d"), "it is described on")


def test_limits_of_disks(linux: Linux) -> None:
    linux.virsh(
        "blkdeviotune", "d", "vda", "--total-iops-sec", "500", "--total-bytes-sec", "50000000", "--live", "--config"
    )
    shown = linux.virsh("blkdeviotune", "d", "vda")
    assert re.search(r"total_bytes_sec: 50000000", shown) and re.search(r"total_iops_sec : 500", shown)
    assert "<total_iops_sec>500</total_iops_sec>" in linux.virsh("dumpxml", "d", "--inactive")
    linux.kill()
    linux.start()  # another daemon knows them too
    assert re.search(r"total_iops_sec : 500", linux.virsh("blkdeviotune", "d", "vda"))
    linux.virsh("blkdeviotune", "d", "vda", "--total-iops-sec", "0", "--total-bytes-sec", "0", "--live", "--config")


@pytest.mark.skipif(not NETWORK, reason="passt is not installed")
def test_a_cable_is_pulled_and_bandwidth_changes_in_place(linux: Linux) -> None:
    mac = linux.virsh("domiflist", "d").split()[-1]
    state = "cat /sys/class/net/eth0/carrier"
    linux.sh("ip link set eth0 up")
    wait_for(lambda: linux.sh(state) == "1", "no carrier")
    linux.virsh("domif-setlink", "d", mac, "down")
    assert linux.virsh("domif-getlink", "d", mac).endswith("down")
    wait_for(lambda: linux.sh(state) == "0", "the carrier is left")
    linux.virsh("domif-setlink", "d", mac, "up")
    wait_for(lambda: linux.sh(state) == "1", "the carrier does not come back")
    linux.virsh("domiftune", "d", mac, "--inbound", "1000,0,200", "--live")
    assert "<inbound average='1000' burst='200'/>" in linux.virsh("dumpxml", "d")
    changed = f"<interface type='user'><mac address='{mac}'/><model type='e1000'/></interface>"
    (linux.path / "card.xml").write_text(changed)
    assert "e1000" in linux.virsh("update-device", "d", str(linux.path / "card.xml"), "--live", ok=False)


def test_the_agent_freezes_trims_and_sets_the_clock(linux: Linux) -> None:
    assert re.search(r"/\s+vda\s+ext4\s+vda", linux.virsh("domfsinfo", "d"))
    linux.virsh("domfsfreeze", "d")
    status = ("qemu-agent-command", "d", '{"execute":"guest-fsfreeze-status"}')
    assert "frozen" in linux.virsh(*status)
    assert "frozen already" in linux.virsh("domfsfreeze", "d", ok=False)
    # A frozen file system takes no write before it is thawed.
    linux.sh("(echo x >/root-written; echo done >/run/written) >/dev/null 2>&1 &")
    assert linux.sh("cat /run/written 2>/dev/null; true") == ""
    linux.virsh("domfsthaw", "d")
    assert "thawed" in linux.virsh(*status)
    wait_for(lambda: linux.sh("cat /run/written 2>/dev/null; true") == "done", "the write does not go on")
    assert "no file system" in linux.virsh("domfsfreeze", "d", "--mountpoint", "/nowhere", ok=False)
    linux.virsh("domtime", "d", "--time", "1000000000")
    assert int(linux.sh("date +%s")) - 1_000_000_000 < 300
    linux.virsh("domtime", "d", "--now")
    assert abs(int(linux.sh("date +%s")) - time.time()) < 300
    assert linux.virsh("domhostname", "d", "--source", "agent")


def agent(linux: Linux, command: str, **arguments: Any) -> Any:
    text = json.dumps({"execute": command, "arguments": arguments})
    return json.loads(linux.virsh("qemu-agent-command", "d", text))["return"]


def test_files_of_the_guest_by_the_agent(linux: Linux) -> None:
    assert agent(linux, "guest-sync", id=17) == 17
    data = bytes(range(256)) * 4
    handle = agent(linux, "guest-file-open", path="/run/by agent", mode="w")
    assert (
        agent(linux, "guest-file-write", handle=handle, **{"buf-b64": base64.b64encode(data).decode()})["count"] == 1024
    )
    agent(linux, "guest-file-seek", handle=handle, offset=1, whence="set")
    agent(linux, "guest-file-write", handle=handle, **{"buf-b64": base64.b64encode(b"XY").decode()})
    agent(linux, "guest-file-flush", handle=handle)
    agent(linux, "guest-file-close", handle=handle)
    want = data[:1] + b"XY" + data[3:]
    assert linux.sh("sha256sum <'/run/by agent'").split()[0] == hashlib.sha256(want).hexdigest()
    handle = agent(linux, "guest-file-open", path="/run/by agent")
    got = agent(linux, "guest-file-read", handle=handle, count=1000)
    assert got["count"] == 1000 and base64.b64decode(got["buf-b64"]) == want[:1000] and not got["eof"]
    assert base64.b64decode(agent(linux, "guest-file-read", handle=handle, count=1000)["buf-b64"]) == want[1000:]
    assert agent(linux, "guest-file-read", handle=handle, count=1000)["eof"]
    assert agent(linux, "guest-file-seek", handle=handle, offset=-4, whence="end")["position"] == 1020
    refused = json.dumps({"execute": "guest-file-write", "arguments": {"handle": handle, "buf-b64": "eA=="}})
    assert "reading only" in linux.virsh("qemu-agent-command", "d", refused, ok=False)
    agent(linux, "guest-file-close", handle=handle)
    closed = json.dumps({"execute": "guest-file-close", "arguments": {"handle": handle}})
    assert "is not open" in linux.virsh("qemu-agent-command", "d", closed, ok=False)
    missing = json.dumps({"execute": "guest-file-open", "arguments": {"path": "/no/such"}})
    assert "/no/such" in linux.virsh("qemu-agent-command", "d", missing, ok=False)


def test_what_else_the_agent_is_asked(linux: Linux) -> None:
    assert agent(linux, "guest-get-timezone").keys() == {"zone", "offset"}
    assert {key: value for key, value in agent(linux, "guest-get-vcpus")[0].items() if key != "can-offline"} == {
        "logical-id": 0,
        "online": True,
    }
    assert re.search(r"vcpus\s*: 0\b", linux.virsh("guestvcpus", "d"))
    assert "no processor 7" in linux.virsh("guestvcpus", "d", "--cpulist", "7", "--disable", ok=False)
    linux.sh(
        "grep -q ^root: /etc/passwd || echo root:x:0:0::/root:/bin/sh >>/etc/passwd; mkdir -p /root; rm -rf /root/.ssh"
    )
    keys = linux.path / "keys"
    keys.write_text("ssh-ed25519 AAAA one\nssh-ed25519 BBBB two\n")
    assert linux.virsh("get-user-sshkeys", "d", "root") == ""
    linux.virsh("set-user-sshkeys", "d", "root", "--file", str(keys))
    shown = linux.virsh("get-user-sshkeys", "d", "root").replace("\n", "")  # virsh 9.0 puts them into one line
    assert shown == "ssh-ed25519 AAAA onessh-ed25519 BBBB two"
    assert linux.sh("cat /root/.ssh/authorized_keys") == "ssh-ed25519 AAAA one\nssh-ed25519 BBBB two"
    linux.virsh("set-user-sshkeys", "d", "root", "--file", str(keys))  # once more changes nothing
    linux.sh("echo '# whose they are' >>/root/.ssh/authorized_keys")
    keys.write_text("ssh-ed25519 AAAA one\n")
    linux.virsh("set-user-sshkeys", "d", "root", "--file", str(keys), "--remove")
    kept = linux.sh("cat /root/.ssh/authorized_keys; stat -c %a /root/.ssh/authorized_keys")
    assert kept == "ssh-ed25519 BBBB two\n# whose they are\n600"
    assert linux.virsh("get-user-sshkeys", "d", "root") == "ssh-ed25519 BBBB two"
    assert "no user r..t" in linux.virsh("get-user-sshkeys", "d", "r..t", ok=False)
    assert "no user nobody-here" in linux.virsh("get-user-sshkeys", "d", "nobody-here", ok=False)


def test_the_agent_sets_a_password(linux: Linux) -> None:
    told = linux.virsh("set-user-password", "d", "root", "a secret", ok=False)
    assert "chpasswd in the guest: status 127" in told  # this image has none: here is one that keeps what it is given
    linux.sh("printf '#!/bin/sh\\necho \"given $@\" >/g; cat >>/g' >/bin/chpasswd; chmod +x /bin/chpasswd")
    linux.virsh("set-user-password", "d", "root", "a secret")
    assert linux.sh("cat /g") == "given \nroot:a secret"
    linux.virsh("set-user-password", "d", "root", "$6$x", "--encrypted")
    assert linux.sh("cat /g") == "given -e\nroot:$6$x"
    assert "one line" in linux.virsh("set-user-password", "d", "a:b", "x", ok=False)


def test_an_nmi_and_a_core_file(linux: Linux) -> None:
    linux.virsh("inject-nmi", "d")
    wait_for(lambda: "NMI" in linux.sh("dmesg | grep -i 'NMI received'; true"), "the guest saw no NMI")
    core = linux.path / "core"
    linux.virsh("dump", "d", str(core), "--memory-only", "--live")
    data = core.read_bytes()
    assert data[:5] == b"\x7fELF\x02"
    kind, machine = struct.unpack_from("<HH", data, 16)
    assert (kind, machine) == (4, 62)
    start, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    segments = [struct.unpack_from("<IIQQQQQQ", data, start + 56 * at) for at in range(count)]
    assert sum(segment[5] for segment in segments if segment[0] == 1) == 256 << 20
    (note,) = [segment for segment in segments if segment[0] == 4]
    assert note[5] % (20 + 336) == 0
    release = linux.sh("uname -r").encode()
    assert b"Linux version " + release in data
    assert "--format" in linux.virsh("dump", "d", str(core), "--memory-only", "--format", "kdump-zlib", ok=False)
    assert "no such file" in linux.virsh("dump", "d", "/no/such/place/core", ok=False).lower()
    assert linux.virsh("domstate", "d") == "running"


def test_a_disk_is_resized_copied_and_committed(linux: Linux) -> None:
    work = linux.path / "work.qcow2"
    subprocess.run([*VMM, "disk", "create", str(work), "16M"], check=True, capture_output=True)
    linux.virsh("attach-disk", "d", str(work), "vdb", "--live", "--subdriver", "qcow2")
    linux.virsh("blockresize", "d", "vdb", "32M")
    assert linux.sh("cat /sys/block/vdb/size") == str((32 << 20) // 512)
    linux.sh("dd if=/dev/urandom of=/dev/vdb bs=1M count=8; sync")
    total = linux.sh("sha256sum </dev/vdb")
    copy = linux.path / "copy.qcow2"
    linux.virsh("blockcopy", "d", "vdb", str(copy), "--format", "qcow2", "--wait", "--pivot")
    assert copy.exists() and linux.sh("sha256sum </dev/vdb") == total
    assert "Block" not in linux.virsh("blockjob", "d", "vdb", "--info")
    wait_for(lambda: str(copy) in linux.virsh("domblklist", "d"), "the description names the old file")
    # Raw, with a file alone: DomainBlockRebase; then into a file that is there, without the machine going over.
    raw, there, apart = (linux.path / name for name in ("copy.raw", "there.raw", "apart.raw"))
    linux.virsh("blockcopy", "d", "vdb", str(raw), "--format", "raw", "--wait", "--pivot")
    wait_for(lambda: str(raw) in linux.virsh("domblklist", "d"), "the description names the old file")
    assert linux.sh("sha256sum </dev/vdb") == total
    assert "is not there" in linux.virsh(
        "blockcopy", "d", "vdb", str(there), "--format", "raw", "--reuse-external", "--wait", ok=False
    )
    assert "there already" in linux.virsh("blockcopy", "d", "vdb", str(copy), "--format", "raw", "--wait", ok=False)
    there.write_bytes(b"x" * (32 << 20))
    linux.virsh("blockcopy", "d", "vdb", str(there), "--format", "raw", "--reuse-external", "--wait", "--pivot")
    assert hashlib.sha256(there.read_bytes()).hexdigest() == total.split()[0]
    wait_for(lambda: str(there) in linux.virsh("domblklist", "d"), "the description names the old file")
    linux.virsh("blockcopy", "d", "vdb", str(apart), "--format", "raw", "--wait", "--finish")
    wait_for(lambda: "Block" not in linux.virsh("blockjob", "d", "vdb", "--info"), "the job does not end")
    assert hashlib.sha256(apart.read_bytes()).hexdigest() == total.split()[0]
    assert str(there) in linux.virsh("domblklist", "d")
    # Slowed down, watched, and ended before it has everything.
    slow = linux.path / "slow.raw"
    linux.virsh("blockcopy", "d", "vdb", str(slow), "1", "--format", "raw")
    told = linux.virsh("blockjob", "d", "vdb", "--info", "--raw")
    assert re.search(r"bandwidth=1\b", told.replace(" ", "")) and "cur=" in told.replace(" ", "")
    linux.virsh("blockjob", "d", "vdb", "--bytes", "65536")
    assert "65536" in linux.virsh("blockjob", "d", "vdb", "--info", "--raw", "--bytes")
    linux.virsh("blockjob", "d", "vdb", "--abort")
    assert not slow.exists() and "no current block job" in linux.virsh("blockjob", "d", "vdb", "3", ok=False)
    # Over a backing file, which a shallow copy shares.
    over = linux.path / "over.qcow2"
    linux.virsh("detach-disk", "d", "vdb", "--live")
    subprocess.run(
        [*VMM, "disk", "create", str(over), "--backing", str(there), "--backing-format", "raw"],
        check=True,
        capture_output=True,
    )
    linux.virsh("attach-disk", "d", str(over), "vdb", "--live", "--subdriver", "qcow2")
    linux.sh("echo more | dd of=/dev/vdb bs=512 seek=9 conv=sync; sync")
    total = linux.sh("sha256sum </dev/vdb")
    shallow = linux.path / "shallow.qcow2"
    linux.virsh("blockcopy", "d", "vdb", str(shallow), "--shallow", "--wait", "--pivot")
    assert linux.sh("sha256sum </dev/vdb") == total and shallow.stat().st_blocks * 512 < 4 << 20
    linux.virsh("detach-disk", "d", "vdb", "--live")


def test_the_monitor_tells_what_disks_and_memory_are(linux: Linux) -> None:
    def ask(command: str) -> Any:
        return json.loads(linux.virsh("qemu-monitor-command", "d", json.dumps({"execute": command})))["return"]

    block, counted = ask("query-block")[0], ask("query-blockstats")[0]
    assert block["inserted"]["file"] == str(linux.path / "root.img") and block["inserted"]["drv"] == "raw"
    assert block["inserted"]["image"]["virtual-size"] == (linux.path / "root.img").stat().st_size
    assert counted["device"] == block["device"] and counted["stats"]["rd_bytes"] > 0
    assert ask("query-balloon")["actual"] == 256 << 20
    assert 'discard="unmap"' in linux.virsh("dumpxml", "d").replace("'", '"')


def test_a_share_is_a_filesystem(linux: Linux) -> None:
    assert '<driver type="virtiofs"' in linux.virsh("dumpxml", "d").replace("'", '"')
    (linux.path / "shared/host").write_text("from the host")
    assert "virtiofs" in linux.sh(
        "modprobe virtiofs 2>/dev/null; cat /sys/bus/virtio/devices/*/modalias | grep -q d0000001A && echo virtiofs"
    )


def test_the_agent_powers_off(linux: Linux) -> None:
    """The last one: the domain is gone."""
    assert "acpi or agent" in linux.virsh("shutdown", "d", "--mode", "signal", ok=False)
    linux.virsh("shutdown", "d", "--mode", "agent")
    wait_for(lambda: linux.virsh("domstate", "d", "--reason") == "shut off (shutdown)", "it does not end", 120)
