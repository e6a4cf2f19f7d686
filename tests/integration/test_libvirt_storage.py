"""Storage pools and volumes, networks, devices and what else clients list, by virsh."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny

pytestmark = needs_virsh


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as running:
        yield running


@pytest.fixture
def pool(daemon: DaemonProcess) -> Iterator[Path]:
    path = daemon.path / "pool"
    daemon.virsh("pool-define-as", "p", "dir", "--target", str(path))
    daemon.virsh("pool-build", "p")
    daemon.virsh("pool-start", "p")
    yield path
    daemon.virsh("pool-destroy", "p")
    for file in path.iterdir():
        file.unlink()
    daemon.virsh("pool-delete", "p")
    daemon.virsh("pool-undefine", "p")


def test_a_pools_life(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pool"
    daemon.virsh("pool-define-as", "life", "dir", "--target", str(path))
    assert daemon.virsh("pool-list", "--all", "--name") == "life"
    assert daemon.virsh("pool-list", "--name") == ""
    assert "no such directory" in daemon.virsh("pool-start", "life", ok=False)
    daemon.virsh("pool-build", "life")
    daemon.virsh("pool-start", "life")
    daemon.virsh("pool-autostart", "life")
    info = daemon.virsh("pool-info", "life")
    assert "State:          running" in info and "Autostart:      yes" in info and "GiB" in info
    assert f"<path>{path}</path>" in daemon.virsh("pool-dumpxml", "life")
    daemon.kill()
    daemon.start()
    assert "State:          running" in daemon.virsh("pool-info", "life")
    assert "still active" in daemon.virsh("pool-undefine", "life", ok=False)
    daemon.virsh("pool-destroy", "life")
    daemon.virsh("pool-undefine", "life")
    assert daemon.virsh("pool-list", "--all", "--name") == ""
    assert "dir" in daemon.virsh("pool-define-as", "n", "netfs", "--target", "/x", ok=False)


def test_a_volumes_life(daemon: DaemonProcess, pool: Path, tmp_path: Path) -> None:
    daemon.virsh("vol-create-as", "p", "v", "3M", "--allocation", "0")
    file = pool / "v"
    assert file.stat().st_size == 3 << 20 and file.stat().st_mode & 0o777 == 0o600
    assert daemon.virsh("vol-list", "p").split() == ["v", str(file)]
    assert "exists already" in daemon.virsh("vol-create-as", "p", "v", "1M", ok=False)
    data = random.Random(1).randbytes(1_500_001)
    (tmp_path / "in").write_bytes(data)
    daemon.virsh("vol-upload", "v", str(tmp_path / "in"), "--pool", "p", "--offset", "512")
    assert file.read_bytes()[512 : 512 + len(data)] == data and file.stat().st_size == 3 << 20
    daemon.virsh("vol-download", str(file), str(tmp_path / "out"), "--offset", "512", "--length", str(len(data)))
    assert (tmp_path / "out").read_bytes() == data
    daemon.virsh("vol-clone", "v", "copy", "--pool", "p")
    assert (pool / "copy").read_bytes() == file.read_bytes()
    daemon.virsh("vol-resize", "v", "4M", "--pool", "p")
    assert "Can't shrink" in daemon.virsh("vol-resize", "v", "1M", "--pool", "p", ok=False)
    daemon.virsh("vol-wipe", "v", "--pool", "p")
    assert file.read_bytes() == bytes(4 << 20)
    assert "<capacity unit='bytes'>4194304</capacity>" in daemon.virsh("vol-dumpxml", "v", "--pool", "p")
    daemon.virsh("vol-delete", "v", "--pool", "p")
    assert not file.exists()
    assert "no storage vol" in daemon.virsh("vol-info", "v", "--pool", "p", ok=False)


def test_qcow2_volumes(daemon: DaemonProcess, pool: Path, tmp_path: Path) -> None:
    daemon.virsh("vol-create-as", "p", "base", "1M")
    daemon.virsh("vol-create-as", "p", "q", "64M", "--format", "qcow2", "--backing-vol", "base",
                 "--backing-vol-format", "raw")  # fmt: skip
    assert (pool / "q").read_bytes()[:4] == b"QFI\xfb" and (pool / "q").stat().st_mode & 0o777 == 0o600
    xml = daemon.virsh("vol-dumpxml", "q", "--pool", "p")
    assert "<format type='qcow2'/>" in xml and "<capacity unit='bytes'>67108864</capacity>" in xml
    daemon.virsh("vol-resize", "q", "128M", "--pool", "p")
    assert "134217728" in daemon.virsh("vol-dumpxml", "q", "--pool", "p")
    outside = tmp_path / "secret.raw"
    outside.write_bytes(bytes(512))
    (tmp_path / "v.xml").write_text(
        "<volume><name>r</name><capacity>512</capacity><target><format type='qcow2'/></target>"
        f"<backingStore><path>{outside}</path><format type='raw'/></backingStore></volume>"
    )
    assert "same pool" in daemon.virsh("vol-create", "p", str(tmp_path / "v.xml"), ok=False)
    assert not (pool / "r").exists()


def test_nothing_outside_the_pool_is_a_volume(daemon: DaemonProcess, pool: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    (pool / "link").symlink_to(outside)
    os.mkfifo(pool / "fifo")
    (pool / ".hidden").write_text("x")
    assert daemon.virsh("vol-list", "p") == ""
    for name in ("link", "fifo", ".hidden", "../outside", "..", str(outside)):
        daemon.virsh("vol-delete", name, "--pool", "p", ok=False)
        daemon.virsh("vol-create-as", "p", name, "1M", ok=False)
    assert outside.read_text() == "secret" and (pool / ".hidden").exists()


def test_a_stream_beyond_the_volume_is_refused(daemon: DaemonProcess, pool: Path, tmp_path: Path) -> None:
    daemon.virsh("vol-create-as", "p", "small", "4096")
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    assert daemon.virsh("vol-upload", "small", str(tmp_path / "large"), "--pool", "p", ok=False)
    assert (pool / "small").stat().st_size == 4096
    assert daemon.virsh("list") == ""


def test_a_read_only_client_changes_no_storage(daemon: DaemonProcess, pool: Path) -> None:
    daemon.virsh("vol-create-as", "p", "v", "1M")
    for command in (["vol-delete", "v", "--pool", "p"], ["pool-destroy", "p"], ["vol-create-as", "p", "w", "1M"],
                    ["vol-download", "v", "/dev/null", "--pool", "p"], ["net-destroy", "default"]):  # fmt: skip
        assert "read only" in daemon.virsh(*command, ok=False, read_only=True), command
    assert "<name>v</name>" in daemon.virsh("vol-dumpxml", "v", "--pool", "p", read_only=True)


def test_what_clients_list_at_the_start(daemon: DaemonProcess) -> None:
    assert daemon.virsh("net-list", "--all", "--name") == "default"
    assert "<forward mode='nat'/>" in daemon.virsh("net-dumpxml", "default")
    assert "user networking" in daemon.virsh("net-destroy", "default", ok=False)
    assert "computer" in daemon.virsh("nodedev-list").split()
    assert "<capability type='system'>" in daemon.virsh("nodedev-dumpxml", "computer")
    for command in ("iface-list", "secret-list", "nwfilter-list", "nwfilter-binding-list"):
        daemon.virsh(command)
    assert "x86_64" in daemon.virsh("nodeinfo") and "<arch name='x86_64'>" in daemon.virsh("capabilities")
    told = daemon.virsh("domcapabilities", "--virttype", "qemu").replace('"', "'")
    assert "<domain>qemu</domain>" in told and "<machine>pc</machine>" in told and "<value>virtiofs</value>" in told
    bare = daemon.virsh("domcapabilities", "--virttype", "qemu", "--machine", "bare").replace('"', "'")
    assert "<disk supported='no'" in bare and "<machine>bare</machine>" in bare
    assert "'isapc' is not known" in daemon.virsh("domcapabilities", "--machine", "isapc", ok=False)
    for command in ("nodecpustats", "nodememstats", "freecell", "maxvcpus", "cpu-models x86_64", "nodecpumap"):
        daemon.virsh(*command.split())


def test_devices_of_a_definition(daemon: DaemonProcess) -> None:
    daemon.define(tiny("dev").replace("machine='bare'", "machine='pc'"))
    daemon.virsh("attach-disk", "dev", "/tmp/one.img", "vda", "--config", "--targetbus", "virtio")
    daemon.virsh(
        "attach-interface", "dev", "user", "x", "--model", "virtio", "--config", "--mac", "52:54:00:00:00:09", ok=False
    )
    daemon.virsh("attach-interface", "dev", "network", "default", "--model", "virtio", "--config",
                 "--mac", "52:54:00:00:00:09")  # fmt: skip
    assert daemon.virsh("domblklist", "dev").split() == ["vda", "/tmp/one.img"]
    assert "network" in daemon.virsh("domiflist", "dev") and "52:54:00:00:00:09" in daemon.virsh("domiflist", "dev")
    assert "already exists" in daemon.virsh("attach-disk", "dev", "/tmp/b", "vda", "--config", ok=False)
    daemon.virsh("detach-disk", "dev", "vda", "--config")
    daemon.virsh("detach-interface", "dev", "network", "--mac", "52:54:00:00:00:09", "--config")
    assert daemon.virsh("domblklist", "dev") == "" and daemon.virsh("domiflist", "dev") == ""
    daemon.virsh("undefine", "dev")
