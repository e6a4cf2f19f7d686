"""Debian's kernel with our devices: disks over both transports, network by passt, consoles, vsock, durability.

On each core that runs stock kernels.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import vmm
from images import catalog
from images.errors import ImageError
from tests.support import passt
from tests.support.debian import PATIENCE
from vmm.config import Disk, Net, Port

pytestmark = [pytest.mark.debian]
SECONDS = 90 * PATIENCE


def image() -> catalog.Image:
    try:
        return catalog.resolve("linux", build=True)
    except ImageError as error:
        pytest.skip(f"the image linux cannot be built here: {error}")


async def sh(vm: vmm.VirtualMachine, script: str) -> str:
    """Run a script in the guest; its output. GuestError if it fails."""
    result = await vm.exec("sh", "-c", script, timeout=SECONDS, check=True)
    return result.stdout.decode()


def has_direct_io(folder: Path) -> bool:
    """Whether the folder's file system has O_DIRECT; tmpfs, which is all that tests.rig can write to, has not."""
    try:
        os.close(os.open(folder / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    return True


async def test_disks_over_pci_and_mmio(tmp_path: Path, stock_core: Any) -> None:
    """What the guest reads is what the image holds, and the other way round; also read-only and O_DIRECT."""
    image()
    content = os.urandom(4 << 20)
    disks: Sequence[Disk] = [
        Disk(path=tmp_path / "pci", id="pcidisk"),
        Disk(path=tmp_path / "mmio", id="mmiodisk", transport="mmio"),
        Disk(path=tmp_path / "ro", id="rodisk", readonly=True),
    ]
    if has_direct_io(tmp_path):
        disks = [*disks, Disk(path=tmp_path / "direct", id="directdisk", cache="none")]
    for disk in disks:
        disk.path.write_bytes(content)
    want = hashlib.md5(content).hexdigest()
    async with vmm.run("linux", core=stock_core, disks=tuple(disks), timeout=SECONDS) as vm:
        names = {}
        for line in (await sh(vm, "cd /sys/block; for d in vd?; do echo $d $(cat $d/serial); done")).splitlines():
            device, serial = line.split()
            names[serial] = device
        for disk in disks:
            device = names[disk.id]
            assert (await sh(vm, f"md5sum /dev/{device}")).split()[0] == want
            if disk.readonly:
                assert (await sh(vm, f"cat /sys/block/{device}/ro")).strip() == "1"
                continue
            await sh(
                vm, f"dd if=/dev/{device} of=/tmp/x bs=64k count=16; dd if=/tmp/x of=/dev/{device} bs=64k seek=20; sync"
            )
            data = disk.path.read_bytes()
            assert data[20 << 16 : 36 << 16] == content[: 16 << 16] and data[: 20 << 16] == content[: 20 << 16]
        path = await sh(vm, f"readlink -f /sys/block/{names['mmiodisk']}")
        assert "/LNRO0005:" in path, path
        assert (tmp_path / "ro").read_bytes() == content


@pytest.mark.parametrize("transport", ["pci", "mmio"])
async def test_network_by_passt(tmp_path: Path, stock_core: Any, transport: str) -> None:
    """DHCP, and an HTTP download from a server on the host; every frame is in the pcap file."""
    passt.need()
    image()
    body = os.urandom(3 << 20)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    net = Net(kind="user", transport=transport, pcap=tmp_path / "frames.pcap")  # type: ignore[arg-type]
    async with vmm.run("linux", core=stock_core, nets=(net,), timeout=SECONDS) as vm:
        await sh(vm, "until ip route | grep -q default; do sleep 0.1; done")
        gateway = (await sh(vm, "ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'")).split()[0]
        digest = await sh(vm, f"wget -q -O - http://{gateway}:{port}/ | md5sum")
        assert digest.split()[0] == hashlib.md5(body).hexdigest()
    server.close()
    assert (tmp_path / "frames.pcap").stat().st_size > len(body)


@pytest.mark.root
@pytest.mark.parametrize("transport", ["pci", "mmio"])
async def test_network_by_tap(tmp_path: Path, stock_core: Any, transport: str) -> None:
    """Ping and downloads both ways through a tap with checksum and segmentation offload."""
    image()
    name, host, guest = f"lv{os.getpid() % 100000}{transport[0]}", "10.213.7.1", "10.213.7.2"
    body = os.urandom(5 << 20)
    want = hashlib.md5(body).hexdigest()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(body)
        await writer.drain()
        writer.close()

    net = Net(kind="tap", target=name, transport=transport)  # type: ignore[arg-type]
    try:
        machine = vmm.run("linux", core=stock_core, nets=(net,), timeout=SECONDS)
        vm = await machine.__aenter__()
    except vmm.ConfigError as error:
        pytest.skip(str(error))
    try:
        for command in (f"addr add {host}/24 dev {name}", f"link set {name} up"):
            process = await asyncio.create_subprocess_exec("ip", *command.split())
            assert await process.wait() == 0
        server = await asyncio.start_server(serve, host, 0)
        port = server.sockets[0].getsockname()[1]
        # the image asks for an address by itself, and takes ours away when it begins
        await sh(vm, "for i in $(seq 200); do pidof udhcpc && break; sleep 0.1; done")
        await sh(vm, "while pidof udhcpc; do killall -9 udhcpc; sleep 0.1; done")
        await sh(vm, f"ip addr add {guest}/24 dev eth0; ip link set eth0 up")
        assert "3 packets received" in await sh(vm, f"ping -c 3 -i 0.1 {host}")
        assert (await sh(vm, f"nc {host} {port} | tee /tmp/body | md5sum")).split()[0] == want
        server.close()
        sending = asyncio.ensure_future(sh(vm, "nc -l -p 4000 < /tmp/body"))
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    reader, writer = await asyncio.open_connection(guest, 4000)
                    break
                except ConnectionRefusedError:
                    await asyncio.sleep(0.05)
            digest = hashlib.md5()
            while data := await reader.read(1 << 20):
                digest.update(data)
            writer.close()
        assert digest.hexdigest() == want
        await sending
    finally:
        await machine.__aexit__(None, None, None)


async def test_consoles_and_vsock(tmp_path: Path, stock_core: Any) -> None:
    """hvc0 joins the console, a named port is a socket, and Firecracker's CONNECT reaches the guest."""
    image()
    async with vmm.run(
        "linux",
        core=stock_core,
        hvc=True,
        ports=(Port(name="org.test.port", path=tmp_path / "port"),),
        vsock=tmp_path / "vsock",
        timeout=SECONDS,
    ) as vm:
        await sh(vm, "echo from the hypervisor console > /dev/hvc0")
        await vm.console.expect(rb"from the hypervisor console", timeout=SECONDS)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "port")
        name = (await sh(vm, "grep -l org.test.port /sys/class/virtio-ports/*/name")).split("/")[4]
        echo = asyncio.ensure_future(sh(vm, f"read line < /dev/{name}; echo got $line > /dev/{name}"))
        writer.write(b"through the port\n")
        assert await asyncio.wait_for(reader.readline(), SECONDS) == b"got through the port\n"
        await echo
        writer.close()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "vsock")
        writer.write(b"CONNECT 1024\n")
        assert await asyncio.wait_for(reader.readline(), SECONDS) == b"OK 1024\n"
        writer.close()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "vsock")
        writer.write(b"CONNECT 4242\n")
        assert await asyncio.wait_for(reader.read(), SECONDS) == b"", "nobody listens there"
        writer.close()
