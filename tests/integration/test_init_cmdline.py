"""The guest's init and the kernel's command line: which root file system, how it is mounted, which program is init."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import vmm
from images.builder import Built
from tests.support.debian import PATIENCE

pytestmark = pytest.mark.debian
BOOT = 90 * PATIENCE
MIB = 1 << 20


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"needs {name}")
    return found


def disk_with_root(path: Path, script: str, linux: Built) -> Path:
    """A disk whose second megabyte on is the image's root file system, in a partition."""
    with path.open("wb") as file:
        file.truncate(70 * MIB)
    subprocess.run([tool("sfdisk"), "-q", path], input=script, text=True, check=True, capture_output=True)
    with path.open("r+b") as file, (linux.directory / "root.img").open("rb") as root:
        file.seek(MIB)
        shutil.copyfileobj(root, file)
    return path


async def mounted(append: str, *disks: Path) -> str:
    """The line of /proc/mounts about the root that this command line gives."""
    given = tuple(vmm.Disk(path=path, snapshot=True) for path in disks)
    async with vmm.run("linux", core="soft", nets=(), disks=given, append=append, timeout=2 * BOOT) as vm:
        result = await vm.exec("grep", " / ", "/proc/mounts", timeout=BOOT)
        return result.check().text


async def console(append: str, *disks: Path) -> tuple[str, vmm.Outcome]:
    """What a machine says that ends by itself, and how it ended."""
    given = tuple(vmm.Disk(path=path, snapshot=True) for path in disks)
    async with vmm.run("linux", core="soft", nets=(), disks=given, append=append, timeout=2 * BOOT) as vm:
        outcome = await vm.wait()
        return vm.console.text, outcome


async def test_a_partition_by_its_label_with_options(linux: Built, tmp_path: Path) -> None:
    """A quoted value with a space; ro and options of mount(2) and of the file system."""
    script = 'label: gpt\nsize=1M, start=66M\nstart=1M, size=64M, name="my root"\n'
    disk = disk_with_root(tmp_path / "disk", script, linux)
    line = await mounted('root="PARTLABEL=my root" ro rootflags=noatime,commit=9 rootdelay=1', disk)
    assert re.match(r"/dev/vdb2 / ext4 ro,noatime,commit=9 ", line), line


async def test_a_partition_by_its_uuid(linux: Built, tmp_path: Path) -> None:
    """An MBR's, in capitals; PARTNROFF counts from it. Neither ro nor rw: mounted ro, then made writable by init."""
    script = "label: dos\nlabel-id: 0xdeadbeef\nstart=66M, size=1M\nstart=1M, size=64M\n"
    disk = disk_with_root(tmp_path / "disk", script, linux)
    async with vmm.VirtualMachine(
        kernel=linux.directory / "vmlinuz", initrd=linux.directory / "initrd", core="soft", memory="256M", agent=True,
        disks=(vmm.Disk(path=disk, snapshot=True),), append="root=PARTUUID=DEADBEEF-01/PARTNROFF=1 rootwait quiet",
        console="none", timeout=2 * BOOT,
    ) as vm:  # fmt: skip
        vm.resume()
        line = (await vm.exec("grep", " / ", "/proc/mounts", timeout=BOOT)).check().text
    assert line.startswith("/dev/vda2 / ext4 rw,"), line


async def test_another_file_system(linux: Built, tmp_path: Path) -> None:
    """Told by its superblock, its module loaded for it; found by the number of its device."""
    squash, debugfs = tool("mksquashfs"), tool("debugfs")
    (tmp_path / "tree").mkdir()
    root = linux.directory / "root.img"
    subprocess.run([debugfs, "-R", f"rdump / {tmp_path}/tree", root], check=True, capture_output=True)
    subprocess.run([squash, tmp_path / "tree", tmp_path / "disk", "-comp", "xz"], check=True, capture_output=True)
    assert re.match("/dev/vdb / squashfs ro,", await mounted("root=fe10", tmp_path / "disk"))


async def test_a_root_that_is_not_there(linux: Built) -> None:
    """What was seen is said, and `vmm run` ends as with a guest that failed."""
    said, outcome = await console("root=UUID=01234567-89ab-cdef-0123-456789abcdef rootwait=1")
    assert outcome.status == 3, outcome
    assert re.search("init: cannot mount the root file system root=UUID=01234567-.*-456789abcdef: no such device", said)
    assert re.search(r'init:   /dev/vda 65536K TYPE="ext4" UUID="[0-9a-f-]{36}" LABEL="linux"', said), said
    assert "init: the machine ends; for a shell here add: rescue" in said


async def test_a_shell_where_there_is_no_root(linux: Built) -> None:
    """Asked for by a word on the command line; its end tries again, and `rdinit` is the kernel's own way there."""
    async with vmm.run(
        "linux", core="soft", nets=(), append="root=LABEL=none rootwait=1 rescue", timeout=2 * BOOT
    ) as vm:
        await vm.console.expect(rb"(?s)root=LABEL=none: no such device.*a shell; exit tries again.*# ", timeout=BOOT)
        await vm.console.write("ls /sys/block; exit\n")
        await vm.console.expect(rb"(?s)vda.*root=LABEL=none: no such device.*tries again.*# ", timeout=BOOT)
        vm.kill()
    async with vmm.run("linux", core="soft", nets=(), append="rdinit=/bin/sh", timeout=2 * BOOT) as vm:
        await vm.console.expect(rb"# ", timeout=BOOT)
        await vm.console.write("echo $$ $0\n")
        await vm.console.expect(rb"1 /bin/sh", timeout=BOOT)
        vm.kill()


async def test_programs_as_init(linux: Built) -> None:
    """It gets the words that the kernel does not know, and what follows "--"; one that is not there is named."""
    said, _ = await console('init=/bin/echo quiet single -- rest "of it"')
    assert re.search(r"^single rest of it\r?$", said, re.MULTILINE), said
    said, outcome = await console("init=/no/such")
    assert "init: cannot run /no/such: it is not in the root file system" in said and outcome.status == 3
    said, outcome = await console("rootfstype=squashfs,btrfs")
    assert "init: cannot mount the root file system root=/dev/vda: " in said and outcome.status == 3


async def test_a_single_user(linux: Built) -> None:
    """One shell, which ends the machine; /etc/rc does not run, and the root stays read-only when asked."""
    async with vmm.run("linux", core="soft", nets=(), append="ro single", timeout=2 * BOOT) as vm:
        await vm.console.expect(rb"(?s)init: for a single user: /etc/rc did not run.*# ", timeout=BOOT)
        await vm.console.write("grep -c ' / ext4 ro,' /proc/mounts; cat /proc/1/cmdline; exit\n")
        await vm.console.expect(rb"1\r?\n/sbin/init\0single", timeout=BOOT)
        assert (await vm.wait()).reason is vmm.Reason.SHUTDOWN
