"""Networks that virsh defines: bridges in a namespace of the test's own, their guests and their leases."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_libvirt_live import Linux
from tests.support.libvirtd import DaemonProcess, needs_virsh, wait_for
from tests.support.netns import Namespace, cable, namespaces, need

pytestmark = needs_virsh

NAT = """<network><name>inner</name><forward mode='nat'/><bridge name='lvtest0' stp='off'/>
<ip address='192.168.150.1' netmask='255.255.255.0'><dhcp><range start='192.168.150.10' end='192.168.150.20'/>
</dhcp></ip></network>"""
ISOLATED = """<network><name>alone</name><bridge stp='off'/><ip address='192.168.151.1' netmask='255.255.255.0'><dhcp>
<range start='192.168.151.10' end='192.168.151.20'/></dhcp></ip></network>"""
CLIENT = """
import socket, struct, sys
mac = bytes.fromhex(sys.argv[1].replace(":", ""))
made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
made.bind(("", 68))
made.settimeout(2)
def ask(*options):
    head = struct.pack("!BBBBIHH4s4s4s4s16s64s128s", 1, 1, 6, 0, 9, 0, 0x8000, *[bytes(4)] * 4, mac, b"", b"")
    body = b"".join(bytes([code, len(value)]) + value for code, value in options)
    for _ in range(30):
        made.sendto(head + b"\\x63\\x82\\x53\\x63" + body + b"\\xff", ("255.255.255.255", 67))
        try:
            return made.recv(2048)
        except TimeoutError:
            pass
    raise SystemExit("no answer")
offer = ask((53, b"\\1"))
answer = ask((53, b"\\3"), (50, offer[16:20]), (12, b"client"))
assert answer[242] == 5, answer
print(socket.inet_ntoa(answer[16:20]))
"""
"""A DHCP client: prints its address."""

GET = "printf 'GET /word HTTP/1.0\\r\\n\\r\\n' | nc -w 5 10.9.0.2 8000 2>&1"


@pytest.fixture
def host() -> Iterator[tuple[DaemonProcess, Namespace, Namespace]]:
    """A daemon in a namespace, and another host at the end of its cable, 10.9.0.2."""
    need("nft")
    with namespaces("h", "o") as (inside, outside):
        cable(inside, outside)
        inside.ip("addr", "add", "10.9.0.1/24", "dev", "eth0")
        outside.ip("addr", "add", "10.9.0.2/24", "dev", "eth0")
        with Linux(prefix=inside.command()) as daemon:
            try:
                yield daemon, inside, outside
            finally:
                for line in daemon.virsh("net-list", "--name").split():
                    if line != "default":
                        daemon.virsh("net-destroy", line)


def define(daemon: DaemonProcess, xml: str) -> None:
    file = daemon.path / "network.xml"
    file.write_text(xml)
    daemon.virsh("net-define", str(file))


def servers(daemon: DaemonProcess) -> list[int]:
    return [int(path.read_text()) for path in (daemon.path / "state" / "networks").glob("*.lock")]


def test_a_networks_life(host: tuple[DaemonProcess, Namespace, Namespace]) -> None:
    daemon, inside, _ = host
    define(daemon, NAT)
    assert "inner" in daemon.virsh("net-list", "--inactive")
    daemon.virsh("net-start", "inner")
    assert "already active" in daemon.virsh("net-start", "inner", ok=False)
    assert re.search(r"Active:\s+yes\n.*\n?.*Autostart:\s+no\nBridge:\s+lvtest0", daemon.virsh("net-info", "inner"))
    assert "192.168.150.1/24" in inside.run("ip", "addr", "show", "lvtest0")
    assert "masquerade" in inside.run("nft", "list", "ruleset")
    assert inside.run("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "1"
    (server,) = servers(daemon)
    daemon.virsh("net-autostart", "inner")

    # The daemon's end is nobody else's.
    daemon.kill()
    daemon.start()
    assert servers(daemon) == [server]
    assert daemon.virsh("net-list", "--name").split() == ["default", "inner"]

    # A host that starts anew has no bridge; what starts by itself is there again.
    daemon.kill()
    inside.ip("link", "del", "lvtest0")
    subprocess.run(["kill", str(server)], check=True)
    daemon.start()
    assert "192.168.150.1/24" in inside.run("ip", "addr", "show", "lvtest0")
    assert servers(daemon) != [server]

    daemon.virsh("net-destroy", "inner")
    assert "lvtest0" not in inside.run("ip", "link")
    assert inside.run("nft", "list", "ruleset") == ""
    assert servers(daemon) == []
    daemon.virsh("net-undefine", "inner")
    assert daemon.virsh("net-list", "--all", "--name").split() == ["default"]


def test_what_cannot_be_is_refused_and_leaves_nothing(host: tuple[DaemonProcess, Namespace, Namespace]) -> None:
    daemon, inside, _ = host
    define(daemon, NAT.replace("192.168.150", "10.9.0"))
    assert "already in use by interface eth0" in daemon.virsh("net-start", "inner", ok=False)
    assert "lvtest0" not in inside.run("ip", "link")
    assert daemon.virsh("net-list", "--name").split() == ["default"]
    inside.ip("link", "add", "lvtest0", "type", "bridge")
    daemon.virsh("net-undefine", "inner")
    define(daemon, NAT)
    assert "has an interface of that name" in daemon.virsh("net-start", "inner", ok=False)
    daemon.virsh("net-define", str(daemon.path / "network.xml"), ok=False, read_only=True)
    assert "user networking" in daemon.virsh("net-destroy", "default", ok=False)
    daemon.define(
        "<domain type='qemu'><name>d</name><memory unit='MiB'>64</memory><os><type>hvm</type><kernel>/bin/true</kernel>"
        "</os><devices><interface type='network'><source network='inner'/></interface></devices></domain>"
    )
    assert "network 'inner' is not active" in daemon.virsh("start", "d", ok=False)


def test_leases(host: tuple[DaemonProcess, Namespace, Namespace]) -> None:
    daemon, inside, _ = host
    define(daemon, ISOLATED)
    daemon.virsh("net-start", "alone")
    bridge = daemon.virsh("net-info", "alone").split()[-1]
    with namespaces("c") as (client,):
        inside.ip("link", "add", "port", "type", "veth", "peer", "name", "eth0", "netns", client.name)
        inside.ip("link", "set", "port", "master", bridge, "up")
        client.ip("link", "set", "eth0", "up")
        script = daemon.path / "client.py"
        script.write_text(CLIENT)
        mac = "52:54:00:00:00:77"
        address = client.run(sys.executable, script, mac, timeout=120).strip()
        assert re.fullmatch(r"192\.168\.151\.(1\d|20)", address)
        listed = daemon.virsh("net-dhcp-leases", "alone")
        assert re.search(rf"{mac}\s+ipv4\s+{re.escape(address)}/24\s+client", listed)
        assert daemon.virsh("net-dhcp-leases", "alone", "--mac", "52:54:00:00:00:78") == ""
        daemon.virsh(
            "net-update", "alone", "add", "ip-dhcp-host", f"<host mac='{mac}' ip='192.168.151.99'/>", "--live",
            "--config",
        )  # fmt: skip
        assert daemon.virsh("net-dumpxml", "alone").count(mac) == 1
        assert daemon.virsh("net-dumpxml", "alone", "--inactive").count(mac) == 1
        wait_for(
            lambda: client.run(sys.executable, script, mac, timeout=120).strip() == "192.168.151.99", "the old address"
        )


def test_hosts_of_a_network_that_gives_no_addresses(host: tuple[DaemonProcess, Namespace, Namespace]) -> None:
    daemon, _, _ = host
    add = ("add", "ip-dhcp-host", "<host mac='52:54:00:00:00:79' ip='192.168.152.9'/>")
    define(daemon, "<network><name>still</name><ip address='192.168.152.1' netmask='255.255.255.0'/></network>")
    daemon.virsh("net-start", "still")
    assert "without <dhcp>" in daemon.virsh("net-update", "still", *add, "--live", ok=False)
    assert "without <dhcp>" in daemon.virsh("net-update", "still", *add, "--live", "--config", ok=False)
    assert "<host" not in daemon.virsh("net-dumpxml", "still", "--inactive")
    daemon.virsh("net-update", "still", *add, "--config")
    assert "52:54:00:00:00:79" in daemon.virsh("net-dumpxml", "still", "--inactive")
    define(daemon, "<network><name>bare</name></network>")
    assert "no <ip>" in daemon.virsh("net-update", "bare", *add, "--config", ok=False)


@pytest.mark.debian
@pytest.mark.slow
def test_guests_of_a_bridge(host: tuple[DaemonProcess, Namespace, Namespace], tmp_path: Path) -> None:
    """A Linux guest gets its address, reaches the world through the host, is there after a restart of its network, and
    is cut off in an isolated one."""
    from images.catalog import resolve
    from images.errors import ImageError

    try:
        image = resolve("linux", build=True)
    except ImageError as error:
        pytest.skip(str(error))
    daemon, inside, outside = host
    assert isinstance(daemon, Linux)
    for xml in (NAT, ISOLATED):
        define(daemon, xml)
    daemon.virsh("net-start", "inner")
    daemon.virsh("net-start", "alone")
    (daemon.path / "root.img").write_bytes(Path(image.disk or "").read_bytes())
    mac = "52:54:00:00:00:31"
    daemon.define(
        f"""<domain type='qemu'><name>d</name><memory unit='MiB'>256</memory>
        <os><type>hvm</type><kernel>{image.kernel}</kernel><initrd>{image.initrd}</initrd></os><devices>
        <disk type='file'><source file='{daemon.path}/root.img'/><target dev='vda' bus='virtio'/></disk>
        <interface type='network'><mac address='{mac}'/><source network='inner'/></interface></devices>
        <loopvisor:machine xmlns:loopvisor='urn:loopvisor:domain:1' agent='on' append='root=/dev/vda rw quiet'/>
        </domain>"""
    )
    daemon.virsh("start", "d")
    wait_for(daemon.answers, "no agent", 120)
    # The guest's init asks for its address by itself.
    wait_for(lambda: "192.168.150." in daemon.sh("ip -4 -o addr show eth0"), "no address", 60)
    address = re.search(r"192\.168\.150\.\d+", daemon.sh("ip -4 -o addr show eth0"))
    assert address is not None
    assert re.search(rf"lv525400000031 +{mac} +ipv4 +{address[0]}/24", daemon.virsh("domifaddr", "d"))
    assert "master lvtest0" in inside.run("ip", "link", "show", "lv525400000031")
    assert "connections='1'" in daemon.virsh("net-dumpxml", "inner")

    outside.start(sys.executable, "-m", "http.server", "-d", tmp_path, "-b", "10.9.0.2", "8000")
    (tmp_path / "word").write_text("from outside")
    fetch = "ip route add default via 192.168.150.1 2>/dev/null; " + GET
    wait_for(lambda: "from outside" in daemon.sh(fetch), "the world is not reached", 60)

    # A network that starts anew takes its guests back.
    daemon.virsh("net-destroy", "inner")
    assert "master" not in inside.run("ip", "link", "show", "lv525400000031")
    daemon.virsh("net-start", "inner")
    assert "master lvtest0" in inside.run("ip", "link", "show", "lv525400000031")
    wait_for(lambda: "from outside" in daemon.sh(fetch), "the world is not reached again", 60)

    # A second card, while it runs, in the network that is cut off.
    daemon.virsh("attach-interface", "d", "network", "alone", "--mac", "52:54:00:00:00:32", "--live")
    daemon.sh("ip link set eth0 down")
    bridge = daemon.virsh("net-info", "alone").split()[-1]
    assert f"master {bridge}" in inside.run("ip", "link", "show", "lv525400000032")
    card = "ip link set eth1 up; udhcpc -i eth1 -n -q -t 10 2>&1"
    wait_for(lambda: "lease of 192.168.151.1" in daemon.sh(card), "no address", 60)
    daemon.sh("ip addr add 192.168.151.10/24 dev eth1")
    reached = "ip route add default via 192.168.151.1; " + GET
    assert "from outside" not in daemon.sh(reached)
    assert daemon.sh("ping -c 1 -W 5 192.168.151.1 >/dev/null && echo reached") == "reached"

    daemon.virsh("destroy", "d")
    wait_for(lambda: "lv525400000031" not in inside.run("ip", "link"), "the interface is left")
