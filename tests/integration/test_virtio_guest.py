"""Debian's kernel with our devices: disks, consoles, vsock and entropy, through PCI and MMIO; a device that breaks.

On each core that runs stock kernels.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support import linuximage
from tests.support.debian import PATIENCE
from tests.support.guestprograms import static
from virtio.devices.console import ConsoleDevice
from vmm.config import Disk, PortConfig

pytestmark = [pytest.mark.debian]
TRANSPORTS = pytest.mark.parametrize("transport", ["pci", "mmio"])
SECONDS = 90 * PATIENCE
sh = functools.partial(linuximage.sh, seconds=SECONDS)
HVC0 = "console=hvc0 panic=-1 cryptomgr.notests no_timer_check"


async def on_its_transport(vm: vmm.VirtualMachine, module: str, transport: str) -> None:
    """A device that this driver has is found the way that was asked for."""
    path = await sh(vm, f"readlink -f /sys/bus/virtio/drivers/{module}/virtio*")
    assert ("/LNRO0005:" in path) == (transport == "mmio"), path


def has_direct_io(folder: Path) -> bool:
    """Whether the folder's file system has O_DIRECT; tmpfs, which is all that tests.rig can write to, has not."""
    try:
        os.close(os.open(folder / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    return True


RING_PACKED = 34
"""6: the bit, and so the place in sysfs' text of negotiated features."""


async def packed_devices(vm: vmm.VirtualMachine) -> dict[str, bool]:
    """A disk's serial number, or a driver -> whether the device has packed rings."""
    where = "/sys/bus/virtio/devices/*"
    script = (
        f"for d in {where}; do [ -d $d/block ] && n=$(cat $d/block/*/serial) || n=$(basename $(readlink $d/driver));"
        " echo $n $(cat $d/features); done"
    )
    lines = (line.split() for line in (await sh(vm, script)).splitlines())
    return {name: features[RING_PACKED] == "1" for name, features in lines}


@pytest.mark.parametrize("machine", [False, True])
async def test_packed_rings_are_asked_for(tmp_path: Path, stock_core: Any, machine: bool) -> None:
    """By `packed` of a disk, or of the whole machine; the guest's driver takes them and works."""
    linuximage.need()
    content = os.urandom(1 << 20)
    (tmp_path / "disk").write_bytes(content)
    disk = Disk.parse(f"{tmp_path / 'disk'},id=mine{'' if machine else ',packed'}")
    async with vmm.run("linux", core=stock_core, disks=(disk,), packed=machine, timeout=SECONDS) as vm:
        found = await packed_devices(vm)
        assert found.pop("mine") is True
        assert set(found.values()) == {machine}, found
        text = await sh(vm, "md5sum $(dirname $(grep -lx mine /sys/block/vd*/serial) | sed s,/sys/block,/dev,)")
        assert text.split()[0] == hashlib.md5(content).hexdigest()


async def test_disks_over_pci_and_mmio(tmp_path: Path, stock_core: Any) -> None:
    """What the guest reads is what the image holds, and the other way round; also read-only and O_DIRECT."""
    linuximage.need()
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


@TRANSPORTS
async def test_named_ports(tmp_path: Path, stock_core: Any, transport: str) -> None:
    """hvc0 joins the console; each named port is a socket, both ways; the size of the terminal follows."""
    linuximage.need()
    names = ("org.test.one", "org.test.two")
    ports = tuple(PortConfig(name=name, path=tmp_path / name) for name in names)
    async with vmm.run(
        "linux", core=stock_core, hvc=True, ports=ports, transport=transport, timeout=SECONDS
    ) as vm:
        await on_its_transport(vm, "virtio_console", transport)
        await sh(vm, "echo from the hypervisor console > /dev/hvc0")
        await vm.console.expect(rb"from the hypervisor console", timeout=SECONDS)
        for name in names:
            reader, writer = await asyncio.open_unix_connection(tmp_path / name)
            port = (await sh(vm, f"grep -l {name} /sys/class/virtio-ports/*/name")).split("/")[4]
            assert (await sh(vm, f"cat /sys/class/virtio-ports/{port}/name")) == f"{name}\n"
            echo = asyncio.ensure_future(sh(vm, f"read line < /dev/{port}; echo got $line > /dev/{port}"))
            writer.write(b"through " + name.encode() + b"\n")
            assert await asyncio.wait_for(reader.readline(), SECONDS) == b"got through " + name.encode() + b"\n"
            await echo
            body = os.urandom(300_000)
            receiving = asyncio.ensure_future(sh(vm, f"head -c {len(body)} /dev/{port} | md5sum"))
            writer.write(body)
            assert (await receiving).split()[0] == hashlib.md5(body).hexdigest()
            sending = asyncio.ensure_future(sh(vm, f"head -c 300000 /dev/zero | tr '\\0' x > /dev/{port}"))
            assert await asyncio.wait_for(reader.readexactly(300_000), SECONDS) == b"x" * 300_000
            await sending
            writer.close()
        console = vm.device("console")
        assert isinstance(console, ConsoleDevice)
        for columns, rows in ((132, 43), (80, 24)):
            console.resize(columns, rows)
            await sh(vm, f"until [ \"$(stty size < /dev/hvc0)\" = '{rows} {columns}' ]; do sleep 0.05; done")


@TRANSPORTS
async def test_a_shell_on_hvc0(stock_core: Any, transport: str) -> None:
    """The kernel's console and a shell on hvc0: what is typed goes there, what it says comes back."""
    linuximage.need()
    async with vmm.run(
        "linux", core=stock_core, cmdline=HVC0, hvc=True, transport=transport, timeout=SECONDS
    ) as vm:
        await vm.console.expect(rb"linux:~# ", timeout=SECONDS)
        await vm.console.write(b"tty\n")
        await vm.console.expect(rb"/dev/hvc0", timeout=SECONDS)
        for number in range(5):
            await vm.console.write(b"echo $((%d * 7)) is sevenfold\n" % number)
            await vm.console.expect(rb"\n%d is sevenfold" % (7 * number), timeout=SECONDS)
        await vm.console.write(b"dd if=/dev/zero bs=1000 count=50 2>/dev/null | tr '\\0' x; echo; echo all of it\n")
        await vm.console.expect(rb"x{50000}\r?\nall of it", timeout=SECONDS)
        await vm.console.write(b"poweroff -f\n")
        assert (await vm.wait()).reason is vmm.Reason.SHUTDOWN


@TRANSPORTS
async def test_vsock_both_ways(tmp_path: Path, stock_core: Any, transport: str) -> None:
    """A megabyte is echoed: by the guest to a host that says CONNECT, and by the host to the guest."""
    linuximage.need()
    program = static("vsock")
    body = os.urandom(1 << 20)
    base = tmp_path / "vsock"

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        reader, writer = await asyncio.open_unix_connection(base)
        writer.write(b"CONNECT %d\n" % port)
        return reader, writer, await asyncio.wait_for(reader.readline(), SECONDS)

    async with vmm.run("linux", core=stock_core, vsock=base, transport=transport, timeout=SECONDS) as vm:
        await on_its_transport(vm, "vmw_vsock_virtio_transport", transport)
        await vm.copy_in(program, "/tmp/vsock")
        await sh(vm, "chmod +x /tmp/vsock")
        listener = await vm.start_process("/tmp/vsock", "5000")
        assert b"listening" in await anext(aiter(listener.stdout))
        for _ in range(2):
            reader, writer, answer = await connect(5000)
            assert answer == b"OK 5000\n"
            receiving = asyncio.ensure_future(reader.readexactly(len(body)))
            writer.write(body)
            assert await asyncio.wait_for(receiving, SECONDS) == body
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), SECONDS) == b""
            writer.close()
        reader, writer, answer = await connect(4242)
        assert answer == b"", "nobody listens there"
        writer.close()
        (tmp_path / "body").write_bytes(body)
        await vm.copy_in(tmp_path / "body", "/tmp/body")
        server = await asyncio.start_unix_server(echo, f"{base}_6000")
        digest = await sh(vm, "/tmp/vsock 2 6000 < /tmp/body | md5sum")
        assert digest.split()[0] == hashlib.md5(body).hexdigest()
        refused = await vm.exec("/tmp/vsock", "2", "6001", timeout=SECONDS)
        assert refused.status == 1, "nobody listens on the host's port"
        server.close()
        await listener.aclose()


@TRANSPORTS
async def test_entropy(stock_core: Any, transport: str) -> None:
    linuximage.need()
    async with vmm.run("linux", core=stock_core, transport=transport, timeout=SECONDS) as vm:
        await on_its_transport(vm, "virtio_rng", transport)
        assert (await sh(vm, "cat /sys/class/misc/hw_random/rng_current")).startswith("virtio_rng")
        first, second = [(await sh(vm, "head -c 4096 /dev/hwrng | md5sum")) for _ in range(2)]
        assert first != second


def jump(vm: vmm.VirtualMachine, name: str) -> None:
    """Do what a hostile driver of the device would: move the available index too far, and notify."""
    assert vm._machine is not None
    transport = vm._machine.components["virtio"].transports[name]  # type: ignore[attr-defined]
    index = vm._machine.memory.view(transport.queues[0].driver + 2, 2)  # type: ignore[union-attr]
    index[:] = (int.from_bytes(index, "little") + 1000 & 0xFFFF).to_bytes(2, "little")
    transport.notify(0)


async def test_a_broken_ring_hurts_nobody_else(tmp_path: Path, stock_core: Any) -> None:
    """A disk's ring becomes malformed under a running guest: that device needs a reset. The guest's other devices and
    another machine in the same loop go on."""
    linuximage.need()
    disks = [Disk(path=tmp_path / name, id=name) for name in ("broken", "sound")]
    for disk in disks:
        disk.path.write_bytes(os.urandom(4 << 20))
    async with (
        vmm.run("linux", core=stock_core, disks=tuple(disks), timeout=SECONDS) as vm,
        vmm.run("linux", core=stock_core, timeout=SECONDS) as other,
    ):
        names = {}
        for line in (await sh(vm, "cd /sys/block; for d in vd?; do echo $d $(cat $d/serial); done")).splitlines():
            device, serial = line.split()
            names[serial] = device
        read = "dd if=/dev/{} of=/dev/null bs=64k iflag=direct"
        for serial in ("broken", "sound"):
            await sh(vm, read.format(names[serial]))
        device = vm.device("broken")
        assert not device.paused
        jump(vm, "broken")
        assert device.paused, "it takes nothing more until it is reset"
        waiting = await vm.start_process("sh", "-c", read.format(names["broken"]))
        want = hashlib.md5((tmp_path / "sound").read_bytes()).hexdigest()
        for _ in range(2):
            await sh(vm, f"echo 3 > /proc/sys/vm/drop_caches; {read.format(names['sound'])}")
            assert (await sh(vm, f"md5sum < /dev/{names['sound']}")).split()[0] == want
            assert len(await sh(vm, "head -c 100 /dev/hwrng | od -An -tx1")) > 200
            assert await sh(other, "head -c 1000000 /dev/zero | wc -c") == "1000000\n"
        assert device.paused
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting.wait(), 0.2)  # the answer that its reader waits for never comes
        await waiting.aclose()
