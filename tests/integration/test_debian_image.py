"""The image `debian`, a whole Debian that mmdebstrap made: login on the serial console, network by DHCP, names, ssh,
agent, an identity for each machine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest

import vmm
from images import builder
from images.errors import ImageError
from vmm.lifecycle import Reason

pytestmark = [
    pytest.mark.debian,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed"),
]
BOOT = 300.0


@pytest.fixture(scope="module")
def debian() -> builder.Built:
    try:
        return builder.build("debian")
    except ImageError as error:
        pytest.skip(f"no debian image: {error}")


async def run(vm: vmm.VirtualMachine, script: str) -> str:
    result = await vm.exec("sh", "-c", script, timeout=BOOT)
    assert result.status == 0, result
    return result.text


async def test_login_network_and_poweroff(debian: builder.Built) -> None:
    nets = ("user",) if shutil.which("passt") else ()
    async with vmm.run("debian", core="soft", nets=nets, timeout=900) as vm:
        await vm.console.expect(rb"debian login: ", timeout=BOOT)
        await vm.console.write("root\n")
        await vm.console.expect(rb"root@debian:~# ", timeout=BOOT)
        await vm.console.write("tty; cat /etc/debian_version\n")
        await vm.console.expect(rb"/dev/ttyS0\s+12\.", timeout=BOOT)

        assert await run(vm, "systemctl is-system-running --wait") == "running"
        assert await run(vm, "systemctl is-active ssh serial-getty@ttyS0") == "active\nactive"
        if nets:
            await run(vm, "until networkctl status | grep -q 'Online state: online'; do sleep 0.2; done")
            lease = await run(vm, "ip -br -4 addr show scope global; ip route show default; cat /etc/resolv.conf")
            assert "proto dhcp" in lease and "UP" in lease
            assert "nameserver 127.0.0.53" in lease
            # What the host uses, passt tells by DHCP.
            assert "DNS Servers: " in await run(vm, "resolvectl dns; resolvectl status")

        # Pages and translations are left out, their directories are there for the scripts of packages.
        find = "find man info locale -type f ! -path info/dir ! -name locale.alias"
        assert await run(vm, f"cd /usr/share && ls -d man/man1 info && {find}") == "info\nman/man1"

        packages = json.loads((debian.directory / "manifest.json").read_text())["packages"]
        installed = set((await run(vm, "dpkg-query -W -f '${Package}\\n'")).splitlines())
        if len(packages) > 1:  # those that came through our cache
            kernel = {name for name in installed if name.startswith("linux-image")}
            assert installed - kernel <= {name.partition("_")[0] for name in packages}
        assert not await run(vm, "ls /etc/ssh/ssh_host_rsa_key 2>/dev/null || true")
        await vm.console.write("poweroff\n")
        assert (await asyncio.wait_for(vm.wait(), BOOT)).reason is Reason.SHUTDOWN


async def test_two_machines_have_their_own_identity(debian: builder.Built) -> None:
    async def identity() -> tuple[str, str]:
        async with vmm.run("debian", core="soft", nets=(), timeout=900) as vm:
            await run(vm, "until [ -s /etc/ssh/ssh_host_ed25519_key.pub ]; do sleep 0.2; done")
            return await run(vm, "cat /etc/ssh/*.pub"), await run(vm, "cat /etc/machine-id")

    one, two = await asyncio.gather(identity(), identity())
    assert one[0] != two[0] and one[1] != two[1] and len(one[1]) == 32


@pytest.mark.root
@pytest.mark.skipif(not (shutil.which("ssh") and shutil.which("ssh-keygen")), reason="needs an ssh client")
@pytest.mark.skipif(not os.access("/dev/net/tun", os.W_OK), reason="needs /dev/net/tun")
async def test_ssh_from_the_host(debian: builder.Built, tmp_path: Path) -> None:
    """Over a tap, to the address that every interface has by itself."""
    tap = f"lvs{os.getpid() % 100000}"
    await finish("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key"))
    try:
        machine = vmm.run("debian", core="soft", nets=(f"tap={tap},mac=52:54:00:12:34:56",), timeout=900)
        vm = await machine.__aenter__()
    except vmm.ConfigError as error:
        pytest.skip(str(error))
    try:
        await finish("ip", "link", "set", tap, "up")
        await run(vm, "mkdir -m 700 -p /root/.ssh")
        await vm.copy_in(tmp_path / "key.pub", "/root/.ssh/authorized_keys")
        await run(vm, "chmod 600 /root/.ssh/authorized_keys; systemctl is-system-running --wait")
        said = await finish(
            "ssh", "-i", str(tmp_path / "key"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "LogLevel=ERROR", "-o", "ConnectionAttempts=20", "-o", "ConnectTimeout=20", "-F", "/dev/null",
            f"root@fe80::5054:ff:fe12:3456%{tap}", "cat /etc/hostname; id -un",
        )  # fmt: skip
        assert said == "debian\nroot\n"
    finally:
        await machine.__aexit__(None, None, None)


async def finish(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await asyncio.wait_for(process.communicate(), BOOT)
    assert process.returncode == 0, error.decode()
    return out.decode()
