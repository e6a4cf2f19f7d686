"""The network card as Debian's kernel sees it, over taps and over passt in network namespaces, through PCI and MMIO.

On each core that runs stock kernels. The host's side is a namespace (of passt's, one more) that ends with the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pytest

import vmm
from tests.support import linuximage, netns, passt, pcap
from tests.support.debian import PATIENCE
from tests.support.guestprograms import install
from tests.support.netns import Namespace
from tests.support.passt import FAR
from virtio.backends import policed
from virtio.devices.net import NetDevice, NetFeature
from vmm.config import Net

pytestmark = [pytest.mark.debian]
SECONDS = 120 * PATIENCE
sh = functools.partial(linuximage.sh, seconds=SECONDS)
HOST, GUEST = "10.213.7.1", "10.213.7.2"
TRANSPORTS = pytest.mark.parametrize("transport", ["pci", "mmio"])
Transport = Literal["pci", "mmio"]
LISTENS = 'until grep -q ":$(printf %04X {port}) [0-9A-F:]* 0A" /proc/net/tcp /proc/net/tcp6; do sleep 0.05; done'
"""Wait in the guest until somebody listens on a port."""


def card(vm: vmm.VirtualMachine) -> NetDevice:
    return cast(NetDevice, vm.device("net0"))


class Files:
    """Something to download, on both sides."""

    def __init__(self, folder: Path, size: int) -> None:
        self.body = os.urandom(size)
        self.digest = hashlib.md5(self.body).hexdigest()
        self.folder = folder / "www"
        self.folder.mkdir()
        (self.folder / "body").write_bytes(self.body)
        self.fetched = folder / "fetched"

    async def both_ways(self, vm: vmm.VirtualMachine, host: Namespace, out: str, back: str, port: int) -> None:
        """The guest downloads from `out`:8000, where `host` serves; `host` downloads from `back`:`port`."""
        await host.serve(self.folder, out, 8000)
        await sh(vm, f"mkdir /tmp/www; wget -q -O /tmp/www/body http://{out}:8000/body")
        assert (await sh(vm, "md5sum < /tmp/www/body")).split()[0] == self.digest
        await sh(vm, f"httpd -p 80 -h /tmp/www; {LISTENS.format(port=80)}")
        assert await host.download(f"http://{back}:{port}/body", self.fetched) == self.body


def arrived(report: str, mebibytes: int) -> bool:
    """Whether iperf3's receiver got what was sent; it stops counting before the sender does, and on a slow machine much
    of it is on its way then."""
    return int(json.loads(report)["end"]["sum_received"]["bytes"]) > mebibytes << 17


async def iperf(vm: vmm.VirtualMachine, call: str, mebibytes: int) -> bool:
    """iperf3 in the guest, for so many MiB."""
    run = f"{call} -n {mebibytes}M -J > /tmp/iperf.json"
    return arrived(await sh(vm, f"{run} || {{ cat /tmp/iperf.json; exit 1; }}; cat /tmp/iperf.json"), mebibytes)


# Tap


@contextlib.asynccontextmanager
async def tap_guest(
    core: str, transport: Transport, **options: Any
) -> AsyncIterator[tuple[vmm.VirtualMachine, Namespace, str]]:
    """(a running guest with address GUEST, the namespace at the other end of its cable with HOST, the tap's name)"""
    netns.need("iperf3")
    linuximage.need()
    name = f"lvt{os.getpid() % 1000000}{transport[0]}"
    queues = options.pop("queues", 1)
    net = Net(kind="tap", target=name, transport=transport, queues=queues)
    with netns.namespaces("tap") as (host,):
        async with contextlib.AsyncExitStack() as stack:
            try:
                running = vmm.run("linux", core=core, nets=(net,), timeout=SECONDS, **options)
                vm = await stack.enter_async_context(running)
            except vmm.ConfigError as error:
                pytest.skip(str(error))
            subprocess.run(["ip", "link", "set", name, "netns", host.name], check=True)
            host.ip("addr", "add", f"{HOST}/24", "dev", name)
            host.ip("link", "set", name, "up")
            # the image asks for an address by itself, and takes ours away when it begins
            await sh(vm, "for i in $(seq 200); do pidof udhcpc && break; sleep 0.1; done")
            await sh(vm, "while pidof udhcpc; do killall -9 udhcpc; sleep 0.1; done")
            await sh(vm, f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up")
            yield vm, host, name


def counted(host: Namespace, tap: str) -> dict[str, int]:
    """Bytes and packets through the tap, as the host counts them."""
    folder = f"/sys/class/net/{tap}/statistics"
    names = ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets")
    values = host.run("cat", *(f"{folder}/{name}" for name in names)).split()
    return dict(zip(names, map(int, values), strict=True))


@pytest.mark.root
@TRANSPORTS
async def test_tap(tmp_path: Path, stock_core: str, transport: Transport) -> None:
    """ping, downloads and iperf3 both ways, with checksum and segmentation offload that is really used."""
    async with tap_guest(stock_core, transport) as (vm, host, tap):
        path = await sh(vm, "readlink -f /sys/class/net/eth0")
        assert ("/LNRO0005:" in path) == (transport == "mmio"), path
        assert "3 packets received" in await sh(vm, f"ping -c 3 -i 0.1 {HOST}")
        assert "3 received" in await host.arun("ping", "-c", "3", "-i", "0.1", GUEST)
        await Files(tmp_path, 4 << 20).both_ways(vm, host, HOST, GUEST, 80)
        wanted = (
            NetFeature.CSUM
            | NetFeature.GUEST_CSUM
            | NetFeature.HOST_TSO4
            | NetFeature.GUEST_TSO4
            | NetFeature.MRG_RXBUF
        )
        assert card(vm).active.features & wanted == wanted
        await host.listen(5201, "iperf3", "-s", "-B", HOST)
        call = await install(vm, "iperf3")
        before = counted(host, tap)
        assert await iperf(vm, f"{call} -c {HOST}", 16)
        between = counted(host, tap)
        assert await iperf(vm, f"{call} -c {HOST} -R", 16)
        after = counted(host, tap)
        for start, end, way in ((before, between, "rx"), (between, after, "tx")):
            packets = end[f"{way}_packets"] - start[f"{way}_packets"]
            size = (end[f"{way}_bytes"] - start[f"{way}_bytes"]) / packets
            assert size > 2 * 1514, f"{way}: {size:.0f} bytes a packet, so segments were cut before the tap"


@pytest.mark.root
@TRANSPORTS
async def test_tap_with_two_queues(stock_core: str, transport: Transport) -> None:
    """Two vCPUs take two pairs of queues; both carry packets, both ways."""
    async with tap_guest(stock_core, transport, cpus=2, queues=2) as (vm, host, _):
        found = await sh(vm, "ls /sys/class/net/eth0/queues")
        assert found.split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
        assert card(vm).active.features & NetFeature.MQ and card(vm).pairs == 2
        await host.listen(5201, "iperf3", "-s", "-B", HOST)
        call = await install(vm, "iperf3")
        for back in ("", "-R"):
            for cpu in (1, 2):  # a flow is sent on its processor's queue, and answered there
                assert await iperf(vm, f"taskset {cpu} {call} -c {HOST} -P 2 {back}", 4)
        frames = card(vm).frames
        assert len(frames) == 2 and all(sent > 20 and received > 20 for sent, received in frames), frames
        if transport == "pci":
            interrupts = await sh(vm, "grep -E 'virtio[0-9]+-(in|out)put' /proc/interrupts")
            lines = [line.split() for line in interrupts.splitlines()]
            assert {line[-1].split("-")[1] for line in lines if int(line[1]) + int(line[2])} >= {"input.0", "input.1"}


@pytest.mark.root
@TRANSPORTS
async def test_the_cable_is_pulled_and_plugged(stock_core: str, transport: Transport) -> None:
    """The link at run time: the guest sees its carrier go and come, and nothing passes in between."""
    async with tap_guest(stock_core, transport) as (vm, host, _):
        assert "1 packets received" in await sh(vm, f"ping -c 1 {HOST}")
        for _ in range(2):
            card(vm).set_link(False)
            await sh(vm, "while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.05; done")
            assert "0 packets received" in await sh(vm, f"ping -c 1 -W 1 {HOST} || true")
            card(vm).set_link(True)
            await sh(vm, "until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.05; done")
            assert "2 packets received" in await sh(vm, f"ping -c 2 -i 0.1 {HOST}")
            assert "2 received" in await host.arun("ping", "-c", "2", "-i", "0.1", GUEST)


# passt


@pytest.fixture
def passt_networks(tmp_path: Path) -> Iterator[tuple[Namespace, Namespace]]:
    """passt.networks."""
    passt.need()
    netns.need("iperf3", "passt")
    with passt.networks(tmp_path) as spaces:
        yield spaces


@pytest.mark.root
@TRANSPORTS
async def test_passt(
    tmp_path: Path, stock_core: str, transport: Transport, passt_networks: tuple[Namespace, Namespace]
) -> None:
    """DHCP, ping, downloads and iperf3 both ways, without privileges; ports that lead to the guest."""
    _, far = passt_networks
    linuximage.need()
    net = Net(kind="user", transport=transport, forward="8080:80+5202:5202")
    async with vmm.run("linux", core=stock_core, nets=(net,), timeout=SECONDS) as vm:
        await sh(vm, "until ip route | grep -q default; do sleep 0.1; done")
        assert "10.214.7.1/" in await sh(vm, "ip addr show eth0")
        assert "3 packets received" in await sh(vm, f"ping -c 3 -i 0.1 {FAR}")
        await Files(tmp_path, 2 << 20).both_ways(vm, far, FAR, "10.214.7.1", 8080)
        await far.listen(5201, "iperf3", "-s", "-B", FAR)
        call = await install(vm, "iperf3")
        assert await iperf(vm, f"{call} -c {FAR}", 16)
        assert await iperf(vm, f"{call} -c {FAR} -R", 16)
        await sh(vm, f"{call} -s -D -p 5202; {LISTENS.format(port=5202)}")
        report = await far.arun("iperf3", "-J", "-c", "10.214.7.1", "-p", "5202", "-n", "32M")
        assert arrived(report, 32)


@pytest.mark.root
async def test_a_policy_lets_through_what_it_allows_alone(
    stock_core: str, passt_networks: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name, its address and port; not another port, address or protocol, nor a name server; and at what speed."""

    async def resolve(name: str, kind: int) -> list[ipaddress.IPv4Address]:
        return [ipaddress.IPv4Address(FAR)] if kind == 1 else []

    monkeypatch.setattr(policed, "host_addresses", resolve)
    _, far = passt_networks
    linuximage.need()
    await far.listen(5201, "iperf3", "-s", "-B", FAR)
    await far.listen(5203, "iperf3", "-s", "-p", "5203", "-B", FAR)
    net = Net(kind="user", allow="far.test:5201+10.214.7.9:80", forward="5202:5202")
    async with vmm.run("linux", core=stock_core, nets=(net,), timeout=SECONDS) as vm:
        events = vm.events()
        await sh(vm, "until ip route | grep -q default; do sleep 0.1; done")
        call = await install(vm, "iperf3")
        refused = f"timeout 3 {call} -c {FAR} -n 1K -p %d >/dev/null 2>&1; [ $? -ne 0 ]"
        await sh(vm, refused % 5201)
        assert FAR in await sh(vm, "nslookup far.test")
        assert await iperf(vm, f"{call} -c {FAR}", 16)
        assert await iperf(vm, f"{call} -c {FAR} -R", 16)
        await sh(vm, refused % 5203)
        await sh(vm, f"ping -c 1 -W 2 {FAR} >/dev/null; [ $? -ne 0 ]")
        await sh(vm, "nslookup other.test >/dev/null; [ $? -ne 0 ]")
        await sh(vm, f"{call} -s -D -p 5202; {LISTENS.format(port=5202)}")
        assert arrived(await far.arun("iperf3", "-J", "-c", "10.214.7.1", "-p", "5202", "-n", "32M"), 32)
        await change_while_it_runs(vm, call)
    told = [event.text async for event in events if isinstance(event, vmm.Warned)]
    for what in (f"TCP to {FAR}:5201", f"TCP to {FAR}:5203", f"ICMP to {FAR}", "the name other.test"):
        assert f"net0: refused by the network's policy: {what}" in told


async def change_while_it_runs(vm: vmm.VirtualMachine, call: str) -> None:
    """A transfer is cut when the policy forbids it, what is allowed now passes, and a copy has the same policy."""
    await transfer(vm, call)
    await vm.set(nets={"net0": {"allow": f"far.test:5203+{FAR}:5204"}})
    seen = await ended(vm)
    assert "reset" in seen or "broken pipe" in seen  # whichever of its calls meets it first
    assert await iperf(vm, f"{call} -c {FAR} -p 5203", 2)
    with pytest.raises(vmm.ConfigError, match="is neither a name"):
        await vm.set(nets={"net0": {"allow": "a b"}})
    (policy,) = [one["policy"] for one in vm.attached() if one["kind"] == "net"]
    assert policy["allow"] == f"far.test:5203+{FAR}:5204" and policy["refused"]["destination"] > 0
    (copy,) = await vm.fork()
    try:
        assert [net.allow for net in copy.config.nets] == [policy["allow"]]
        assert await iperf(copy, f"{call} -c {FAR} -p 5203", 2)
        await sh(copy, f"timeout 3 {call} -c {FAR} -n 1K -p 5201 >/dev/null 2>&1; [ $? -ne 0 ]")
    finally:
        await copy.aclose()


async def iperf_when_free(vm: vmm.VirtualMachine, call: str, mebibytes: int) -> bool:
    """`iperf`, again while the server is busy with a transfer of whose end it has not heard."""
    run = f"{call} -n {mebibytes}M -J > /tmp/iperf.json; grep -q sum_received /tmp/iperf.json"
    return arrived(await sh(vm, f"until {run}; do sleep 0.2; done; cat /tmp/iperf.json"), mebibytes)


async def transfer(vm: vmm.VirtualMachine, call: str) -> None:
    """Begin to send for good, and wait until bytes flow."""
    await vm.exec("sh", "-c", f"{call} -c {FAR} -t 1000 >/tmp/cut 2>&1 & echo", timeout=SECONDS, check=True)
    before = card(vm).counters["bytes_sent"]
    async with asyncio.timeout(SECONDS):
        while card(vm).counters["bytes_sent"] < before + (2 << 20):
            await asyncio.sleep(0.05)


async def ended(vm: vmm.VirtualMachine) -> str:
    """What the transfer said when it was reset."""
    await sh(vm, "while pgrep -f 't 1000' >/dev/null; do sleep 0.2; done")
    return (await sh(vm, "cat /tmp/cut")).lower()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["native", "recorded"])
async def test_a_first_policy_comes_and_the_last_one_goes(
    kind: str, tmp_path: Path, stock_core: str, passt_networks: tuple[Namespace, Namespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """While the machine runs: what was open is reset each time. With the policy this host's loopback is no more behind
    the gateway, names open what they lead to, and the published port goes on; without it all is as it was."""

    async def resolve(name: str, kind: int) -> list[ipaddress.IPv4Address]:
        return [ipaddress.IPv4Address(FAR)] if (name, kind) == ("far.test", 1) else []

    monkeypatch.setattr(policed, "host_addresses", resolve)
    near, far = passt_networks
    linuximage.need()
    await far.listen(5201, "iperf3", "-s", "-B", FAR)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "secret").write_text("of the host")
    await near.serve(tmp_path / "www", "127.0.0.1", 7000)
    recording = tmp_path / "frames.pcap" if kind == "recorded" else None
    net = Net(kind="user", forward="5202:5202", packed=recording is not None, pcap=recording)
    host = "wget -q -O - http://10.214.7.2:7000/secret"
    async with vmm.run("linux", core=stock_core, nets=(net,), timeout=SECONDS) as vm:
        await sh(vm, "until ip route | grep -q default; do sleep 0.1; done")
        call = await install(vm, "iperf3")
        assert await sh(vm, host) == "of the host"
        await sh(vm, f"{call} -s -D -p 5202; {LISTENS.format(port=5202)}")
        await transfer(vm, call)
        await vm.set(nets={"net0": {"allow": "far.test:5201"}})
        seen = await ended(vm)
        assert "reset" in seen or "broken pipe" in seen
        short = f"timeout 3 {call} -c {FAR} -n 1K >/dev/null 2>&1"
        await sh(vm, f"! {short}; ! timeout 5 {host}; nslookup far.test 10.214.7.2")
        assert await iperf_when_free(vm, f"{call} -c {FAR}", 32)
        assert arrived(await far.arun("iperf3", "-J", "-c", "10.214.7.1", "-p", "5202", "-n", "32M"), 2)
        assert await sh(vm, f"timeout 5 {host} || echo no") == "no\n"
        (policy,) = [one["policy"] for one in vm.attached() if one["kind"] == "net"]
        assert policy["allow"] == "far.test:5201" and policy["refused"]["destination"] > 0
        await transfer(vm, call)
        await vm.set(nets={"net0": {"allow": ""}})
        seen = await ended(vm)
        assert "reset" in seen or "broken pipe" in seen
        assert not any("policy" in one for one in vm.attached())
        assert await sh(vm, host) == "of the host"
        assert await iperf_when_free(vm, f"{call} -c {FAR}", 32)
        assert arrived(await far.arun("iperf3", "-J", "-c", "10.214.7.1", "-p", "5202", "-n", "32M"), 2)


OWN = """
import asyncio, sys
import vmm
from vmm.config import Net
async def main():
    net = Net(kind="user", allow="*")
    async with vmm.run("linux", core=sys.argv[1], nets=(net,), timeout=float(sys.argv[2])) as vm:
        events = vm.events()
        sh = lambda text: vm.exec("sh", "-c", text, timeout=float(sys.argv[2]))
        await sh("until ip route | grep -q default; do sleep 0.1; done")
        for allow in ("*", "10.214.0.0/16", "*+host:7000", "10.214.8.1"):
            await vm.set(nets={"net0": {"allow": allow}})
            print(allow, (await sh("timeout 10 wget -q -O - http://10.214.8.1:7000/secret || echo no")).text)
            print(allow, (await sh(f"timeout 10 wget -q -O - http://{sys.argv[3]}:7000/other || echo no")).text)
    async for event in events:
        if isinstance(event, vmm.Warned):
            print(event.text)
asyncio.run(main())
"""


@pytest.mark.root
async def test_own_addresses_of_this_host_have_to_be_listed(
    tmp_path: Path, stock_core: str, passt_networks: tuple[Namespace, Namespace]
) -> None:
    """allow=* and networks open other hosts alone, for a machine of which this is the host."""
    near, far = passt_networks
    linuximage.need()
    near.ip("addr", "add", "10.214.8.1/32", "dev", "lo")
    for name, text in (("secret", "of the host"), ("other", "of another")):
        (tmp_path / name).write_text(text)
    await near.serve(tmp_path, "10.214.8.1", 7000)
    await far.serve(tmp_path, FAR, 7000)
    said = (await near.arun(sys.executable, "-c", OWN, stock_core, str(SECONDS), FAR, timeout=SECONDS)).split("\n")
    for allow, here, there in (
        ("*", "no", "of another"), ("10.214.0.0/16", "no", "of another"),
        ("*+host:7000", "of the host", "of another"), ("10.214.8.1", "of the host", "no"),
    ):  # fmt: skip
        assert f"{allow} {here}" in said and f"{allow} {there}" in said, (allow, said)
    assert "net0: refused by the network's policy: TCP to 10.214.8.1:7000, an address of this host's own" in said


@TRANSPORTS
async def test_a_recording_holds_every_frame(tmp_path: Path, stock_core: str, transport: Transport) -> None:
    """What the guest downloaded can be put together again from the pcap file; so can how it got its address."""
    passt.need()
    linuximage.need()
    body = os.urandom(1 << 20)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    path = tmp_path / "frames.pcap"
    net = Net(kind="user", transport=transport, pcap=path)
    async with vmm.run("linux", core=stock_core, nets=(net,), timeout=SECONDS) as vm:
        await sh(vm, "until ip route | grep -q default; do sleep 0.1; done")
        gateway = (await sh(vm, "ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'")).split()[0]
        digest = await sh(vm, f"wget -q -O - http://{gateway}:{port}/ | md5sum")
        assert digest.split()[0] == hashlib.md5(body).hexdigest()
        mac = (await sh(vm, "cat /sys/class/net/eth0/address")).strip()
    server.close()
    assert pcap.stream(path, port).partition(b"\r\n\r\n")[2] == body
    found = pcap.frames(path)
    assert [moment for moment, _ in found] == sorted(moment for moment, _ in found)
    guest = bytes.fromhex(mac.replace(":", ""))
    assert all(guest in (frame[:6], frame[6:12]) or frame[0] & 1 for _, frame in found), "no frame of anyone else's"
    ports = [frame[34:38] for _, frame in found if frame[12:14] == b"\x08\x00" and frame[23] == 17]
    assert b"\0\x44\0\x43" in ports and b"\0\x43\0\x44" in ports, "DHCP, both ways"
    if tool := shutil.which("tcpdump"):
        read = subprocess.run([tool, "-n", "-r", path], capture_output=True, text=True, timeout=60)
        assert read.returncode == 0 and len(read.stdout.splitlines()) >= len(found)
