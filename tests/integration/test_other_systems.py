"""Systems other than Linux, from Debian's packages, unmodified: a Linux-protocol image without a payload (memtest86+),
multiboot kernels of 32 and 64 bits (Xen with a Linux dom0, GNU Mach)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vmm
from tests.support import debian

pytestmark = [pytest.mark.debian]


def extract(folder: Path, package: str, pattern: str) -> Path:
    """The first file of a package whose base name matches, written to `folder`."""
    from images import packages

    for member, data in packages.contents(debian.package(package)):
        name = Path(member.name).name
        if member.isreg() and re.fullmatch(pattern, name):
            path = folder / name
            path.write_bytes(data)
            return path
    pytest.fail(f"{package} has no file like {pattern}")


async def test_memtest86_finds_no_error_in_guest_memory(tmp_path: Path) -> None:
    image = extract(tmp_path, "memtest86+", r"memtest86\+x64\.bin")
    config = vmm.Config(core="soft", kernel=image, memory="32M", cmdline="console=ttyS0,115200")
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(rb"Memtest86\+ v\d", timeout=120)
        await machine.console.expect(rb"Using: All Cores", timeout=120)
        await machine.console.expect(rb"Errors: 0 ", timeout=60)
        machine.kill()


async def test_gnu_mach_starts_by_multiboot(tmp_path: Path) -> None:
    image = extract(tmp_path, "gnumach-image-1.8-486", r"gnumach-.*\.gz")
    config = vmm.Config(core="soft", kernel=image, memory="128M", cmdline="console=com0")
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(rb"GNU Mach 1\.", timeout=60)
        await machine.console.expect(rb"RTC time is 20\d\d-", timeout=60)
        # Without servers as modules there is nothing more for a microkernel to start.
        await machine.console.expect(rb"No bootstrap code loaded", timeout=60)
        machine.kill()


@pytest.mark.slow
async def test_xen_starts_a_linux_dom0(tmp_path: Path) -> None:
    try:
        from images import packages

        name = packages.dependency("xen-system-amd64", r"xen-hypervisor-\d.*")
    except Exception as error:
        pytest.skip(f"needs the Debian package xen-system-amd64: {error}")
    image = extract(tmp_path, name, r"xen-\d.*\.gz")
    # Xen takes the first word of its command line for its own file name. The module's part follows " -- ".
    cmdline = "xen console=com1 com1=115200,8n1 -- console=hvc0 panic=-1"
    config = vmm.Config(
        core="soft", kernel=image, initrd=debian.kernel("linux-image-amd64"), memory="1G", cmdline=cmdline
    )
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(rb"\(XEN\) Xen version", timeout=60)
        await machine.console.expect(rb"Linux version 6\.", timeout=120)
        await machine.console.expect(rb"Hypervisor detected: Xen PV", timeout=120)
        machine.kill()
