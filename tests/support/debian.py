"""Debian's kernels and a small initramfs of busybox, for tests that boot stock Linux. Everything is cached."""

from __future__ import annotations

import functools
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from images import cache, packages
from images.errors import ImageError
from images.tree import Tree
from tests.support.patience import PATIENCE as PATIENCE

APPEND = os.environ.get("LOOPVISOR_GUEST_APPEND", "")
"""What this host's processor needs on the command line of a guest whose messages are compared (tests.rig)."""

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
set -- $(/bin/busybox cat /proc/cmdline)
for word; do case $word in do=*) what=${word#do=};; esac; done
for module in $(/bin/busybox cat /modules/order 2>/dev/null); do /bin/busybox insmod /modules/$module; done
echo "INIT $what cpus=$(/bin/busybox nproc)"
case $what in
  dmesg) echo; echo DMESG-BEGIN; /bin/busybox dmesg -r; echo DMESG-END; /bin/busybox sleep 0.3;;
  interrupts) /bin/busybox cat /proc/interrupts; echo INTERRUPTS-END; /bin/busybox sleep 0.3;;
  reboot) /bin/busybox reboot -f;;
  panic) echo c > /proc/sysrq-trigger;;
  halt) /bin/busybox halt -f;;
  idle) echo IDLE; while :; do /bin/busybox sleep 1; done;;
  shell) for tty in $(/bin/busybox cat /sys/class/tty/console/active); do :; done
    PS1='shell# ' /bin/busybox setsid -c /bin/busybox sh -i < /dev/$tty > /dev/$tty 2>&1;;
  button) exec 3</dev/input/event0; echo WAITING; /bin/busybox dd of=/dev/null bs=24 count=1 <&3; echo BUTTON;;
esac
/bin/busybox poweroff -f
"""


@functools.cache
def package(name: str) -> Path:
    """The file of a Debian package, downloaded by apt if it is not cached; the test is skipped if that fails."""
    try:
        return packages.download(packages.resolve(name))
    except ImageError as error:
        pytest.skip(f"needs the Debian package {name}: {error}")


@functools.cache
def files(name: str, *wanted: str) -> dict[str, bytes]:
    """Files of a package whose paths end with one of `wanted`, by base name."""
    found = {}
    for member, data in packages.contents(package(name)):
        if member.isreg() and member.name.endswith(wanted):
            found[Path(member.name).name] = data
    return found


@functools.cache
def kernel(meta: str = "linux-image-cloud-amd64") -> Path:
    """The newest kernel image of a meta package, as a file. $LOOPVISOR_KERNELS may name it ("META=FILE META=FILE"),
    for a host without apt."""
    for item in os.environ.get("LOOPVISOR_KERNELS", "").split():
        name, _, path = item.partition("=")
        if name == meta:
            return Path(path)
    try:
        name = packages.dependency(meta, r"linux-image-\d.*")
    except ImageError as error:
        pytest.skip(f"needs the Debian package {meta}: {error}")
    deb = package(name)
    target = cache.directory("tests") / f"{deb.stem[:32]}-vmlinuz"
    if not target.exists():
        for member, data in packages.contents(deb):
            if member.isreg() and member.name.startswith("./boot/vmlinuz"):
                temporary = target.with_suffix(".part")
                temporary.write_bytes(data)
                temporary.rename(target)
                break
    return target


@functools.cache
def modules(meta: str = "linux-image-cloud-amd64", *names: str) -> dict[str, bytes]:
    """Kernel modules by file name, e.g. "evdev.ko"."""
    return files(packages.dependency(meta, r"linux-image-\d.*"), *(f"/{name}" for name in names))


def busybox() -> Path:
    """A static busybox."""
    path = shutil.which("busybox")
    if path is None or "statically linked" not in _kind(path):
        pytest.skip("needs a static busybox (Debian: busybox-static)")
    return Path(path)


def initramfs(folder: Path, *, loaded: dict[str, bytes] | None = None) -> Path:
    """busybox and INIT, with modules that are loaded in order. What it does then, `do=…` on the command line says."""
    tree = Tree()
    for name in ("bin", "dev", "proc", "sys", "modules"):
        tree.directory(name)
    tree.character_device("dev/console", 5, 1)
    tree.file("bin/busybox", busybox().read_bytes(), 0o755)
    tree.file("init", INIT.encode(), 0o755)
    for name, data in (loaded or {}).items():
        tree.file(f"modules/{name}", data)
    tree.file("modules/order", " ".join(loaded or {}).encode())
    path = folder / "initramfs"
    path.write_bytes(tree.cpio())
    return path


def _kind(path: str) -> str:
    """'statically linked' if the ELF file has no interpreter."""
    data = Path(path).read_bytes()[:4096]
    return "dynamically linked" if b"ld-linux" in data else "statically linked"


def qemu(
    image: Path, initrd: Path, *, cmdline: str, cpus: int = 1, memory_mib: int = 256, timeout: float = 120.0,
    until: bytes = b"DMESG-END",
) -> str:
    """What the same kernel prints on QEMU's q35 without KVM, up to `until`; the test is skipped where there is none."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("needs qemu-system-x86_64 as the oracle")
    process = subprocess.Popen(
        [program, "-M", "q35", "-accel", "tcg", "-m", str(memory_mib), "-smp", str(cpus), "-display", "none",
         "-serial", "stdio", "-monitor", "none", "-no-reboot", "-nic", "none", "-kernel", str(image),
         "-initrd", str(initrd), "-append", cmdline],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    seen = bytearray()
    deadline = time.monotonic() + timeout
    try:
        # Without ACPI the guest cannot switch QEMU off: its log's last line ends the run.
        while until not in seen and time.monotonic() < deadline:
            if select.select([process.stdout], [], [], 1.0)[0]:
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                seen += data
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return seen.decode("utf-8", "replace").replace("\r", "")
