"""Systems other than Linux, from Debian's packages, unmodified: GRUB as a coreboot payload to its prompt, and what it
boots from there (Linux; Xen with a Linux dom0; both to a shell); memtest86+, a Linux-protocol image without a payload;
multiboot kernels of 32 and 64 bits (GNU Mach, Xen)."""

from __future__ import annotations

import re
import subprocess
import tarfile
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


GRUB_CONFIG = """
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
"""
GRUB_MODULES = (
    "serial", "terminal", "normal", "echo", "ls", "memdisk", "tar", "gzio", "linux", "multiboot", "boot", "lspci",
    "lsmmap", "date", "halt",
)  # fmt: skip


def grub(folder: Path, **memdisk: Path) -> Path:
    """An image of Debian's GRUB for coreboot whose terminal is the serial port, made by GRUB's own tool, with the files
    of `memdisk` in its (memdisk)."""
    from images import packages

    root = folder / "grub"
    for package in ("grub-common", "grub-coreboot-bin"):
        for member, data in packages.contents(debian.package(package)):
            path = root / member.name
            if member.isreg() and re.search(r"/grub-mkimage$|/i386-coreboot/", member.name):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    tool = root / "usr/bin/grub-mkimage"
    tool.chmod(0o755)
    with tarfile.open(folder / "memdisk.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, path in memdisk.items():
            archive.add(path, name)
    config, image = folder / "early.cfg", folder / "grub.elf"
    config.write_text(GRUB_CONFIG)
    made = subprocess.run(
        [tool, "-O", "i386-coreboot", "-d", root / "usr/lib/grub/i386-coreboot", "-c", config, "-p", "(memdisk)/",
         "-m", folder / "memdisk.tar", "-o", image, *GRUB_MODULES],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if made.returncode == 127:
        pytest.skip(f"Debian's grub-mkimage does not run here: {made.stderr.strip()}")
    assert made.returncode == 0, made.stderr
    return image


async def test_grub_has_a_prompt_that_answers_and_powers_off(tmp_path: Path) -> None:
    config = vmm.Config(core="soft", kernel=grub(tmp_path), memory="64M", epoch=1_700_000_000)
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        for typed, answer in (
            ("echo hello from GRUB", rb"\rhello from GRUB"),
            ("lsmmap", rb"base_addr = 0x100000, length = 0x3f00000, available RAM"),
            ("lspci", rb"00:00.0 1b36:0008 \[0600\] Host Bridge"),
            ("date", rb"2023-11-14 22:13:\d\d Tuesday"),
        ):
            await machine.console.expect(rb"grub> ", timeout=60)
            await machine.console.write(typed + "\n")
            await machine.console.expect(answer, timeout=30)
        await machine.console.write("halt\n")
        outcome = await machine.wait()
    assert outcome.reason is vmm.Reason.SHUTDOWN


async def test_grub_boots_linux_to_a_shell(tmp_path: Path) -> None:
    image = grub(tmp_path, vmlinuz=debian.kernel(), initrd=debian.initramfs(tmp_path))
    async with vmm.VirtualMachine(vmm.Config(core="soft", kernel=image, memory="256M")) as machine:
        machine.resume()
        for typed in (
            "ls (memdisk)/",
            "linux (memdisk)/vmlinuz console=ttyS0 cryptomgr.notests no_timer_check quiet do=shell",
            "initrd (memdisk)/initrd",
        ):
            await machine.console.expect(rb"grub> ", timeout=60)
            await machine.console.write(typed + "\n")
        await machine.console.expect(rb"grub> ", timeout=60)
        assert re.search(r"initrd +vmlinuz|vmlinuz +initrd", machine.console.text)
        await machine.console.write("boot\n")
        await machine.console.expect(rb"shell# ", timeout=60)
        await machine.console.write("uname -s; exit\n")
        await machine.console.expect(rb"\nLinux\r", timeout=60)
        outcome = await machine.wait()
    assert outcome.reason is vmm.Reason.SHUTDOWN


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


def xen(folder: Path) -> Path:
    try:
        from images import packages

        name = packages.dependency("xen-system-amd64", r"xen-hypervisor-\d.*")
    except Exception as error:
        pytest.skip(f"needs the Debian package xen-system-amd64: {error}")
    return extract(folder, name, r"xen-\d.*\.gz")


@pytest.mark.slow
async def test_xen_by_multiboot_starts_a_linux_dom0(tmp_path: Path) -> None:
    # Xen takes the first word of its command line for its own file name. The module's part follows " -- ".
    cmdline = "xen console=com1 com1=115200,8n1 -- console=hvc0 panic=-1"
    config = vmm.Config(
        core="soft", kernel=xen(tmp_path), initrd=debian.kernel("linux-image-amd64"), memory="1G", cmdline=cmdline
    )
    async with vmm.VirtualMachine(config) as machine:
        machine.resume()
        await machine.console.expect(rb"\(XEN\) Xen version", timeout=60)
        await machine.console.expect(rb"Hypervisor detected: Xen PV", timeout=120)
        machine.kill()


@pytest.mark.slow
async def test_grub_boots_xen_with_a_dom0_to_its_shell(tmp_path: Path) -> None:
    files = {"vmlinuz": debian.kernel("linux-image-amd64"), "initrd": debian.initramfs(tmp_path)}
    image = grub(tmp_path, xen=xen(tmp_path), **files)
    async with vmm.VirtualMachine(vmm.Config(core="soft", kernel=image, memory="1G")) as machine:
        machine.resume()
        for typed in (
            "multiboot (memdisk)/xen console=com1 com1=115200,8n1",
            "module (memdisk)/vmlinuz vmlinuz console=hvc0 quiet panic=-1 do=shell",
            "module (memdisk)/initrd initrd",
            "boot",
        ):
            await machine.console.expect(rb"grub> ", timeout=60)
            await machine.console.write(typed + "\n")
        await machine.console.expect(rb"shell# ", timeout=180)
        await machine.console.write("cat /sys/hypervisor/type; exit\n")
        await machine.console.expect(rb"\nxen\r", timeout=60)
        outcome = await machine.wait()
    assert outcome.reason is vmm.Reason.SHUTDOWN
