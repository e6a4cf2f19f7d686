"""The rig's guest: kernel, and an initramfs that loads kvm-amd, changes to the host's files and runs one command."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from images import cache, modules, packages
from images.tree import Tree

MODULES = [
    "virtio_pci", "9pnet_virtio", "9p", "virtio_blk", "crc32c_generic", "ext4", "kvm_amd", "tun", "dummy", "veth",
]  # fmt: skip
ARGUMENTS = {"kvm_amd": "vgif=0 vls=0"}
"""With QEMU 7.2's virtual GIF an interrupt gets lost now and then, and the guest with it."""
# LOOPVISOR_GUEST_APPEND: QEMU 7.2's emulated SVM lets a guest's XSETBV through without an exit, so KVM never learns the
# guest's XCR0 and tells a wrong size of the XSAVE area. A guest kernel notices, warns and uses FXSAVE. A test that
# compares kernel messages takes XSAVE away on both sides.

INIT_BEGIN = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read module arguments; do
    $b insmod $module $arguments || echo "rig: cannot load $module"
done < /etc/modules
"""
"""How the first program of each rig begins: the kernel's file systems, then its modules."""
INIT = INIT_BEGIN + """$b mkdir -p /host
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host || echo "rig: no host files"
command=$($b cat /sys/firmware/qemu_fw_cfg/by_name/opt/rig/command/raw)
for name in proc sys dev; do $b mount --move /$name /host/$name; done
exec $b switch_root /host /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/dev/shm/home \\
    TMPDIR=/dev/scratch XDG_RUNTIME_DIR=/dev/shm/run LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 LOOPVISOR_PATIENCE=10 \\
    LOOPVISOR_GUEST_APPEND=noxsave RIG_REPORT=/dev/shm/report HYPOTHESIS_STORAGE_DIRECTORY=/dev/shm/hypothesis \\
    /bin/sh -c "$($b cat /etc/second)" rig "$command" </dev/console >/dev/console 2>&1
"""
SECOND = """
mkdir -p /dev/shm /dev/pts /dev/scratch
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t ext4 /dev/vda /dev/scratch || echo "rig: no scratch disk"
mount -t tmpfs -o mode=755 run /run
mount -t devpts -o ptmxmode=666 pts /dev/pts
mkdir -p $HOME $XDG_RUNTIME_DIR
ip link set lo up
# passt takes addresses and routes from an interface of its host.
ip addr add 10.0.2.15/24 dev dummy0 && ip link set dummy0 up &&
    ip route add default via 10.0.2.2 dev dummy0
ls -l /dev/kvm
sh -c "$1"
{ echo "status $?"; cat $RIG_REPORT 2>/dev/null; } > /dev/ttyS1
echo o > /proc/sysrq-trigger
sleep 60
"""
"""Runs as the first process on the host's own file system: only as the root of the mount namespace, not in a chroot,
may programs make user namespaces (passt does)."""


@dataclass(frozen=True, slots=True)
class Guest:
    kernel: Path
    initrd: Path


def build(wanted: Sequence[str] = MODULES, init: str = INIT) -> Guest:
    """The guest of the Debian packages that apt offers now, from the cache if it was built before: with these modules
    and what they need, and this first program."""
    kernel = packages.resolve(packages.dependency("linux-image-amd64", r"linux-image-[\d.]+-\d+-amd64"))
    busybox = packages.resolve("busybox-static")
    inputs = [kernel.sha256, busybox.sha256, init, SECOND, *wanted, *ARGUMENTS.values()]
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]
    folder = cache.directory("rig")
    target = folder / key
    with cache.lock("rig"):
        if not target.exists():
            with cache.workspace() as work:
                made = work / "guest"
                made.mkdir()
                _make(packages.download(kernel), packages.download(busybox), made, wanted, init)
                cache.publish(made, target)
    return Guest(target / "vmlinuz", target / "initrd")


def _make(kernel: Path, busybox: Path, made: Path, wanted: Sequence[str], init: str) -> None:
    files: dict[str, bytes] = {}
    built_in: set[str] = set()
    for member, data in packages.contents(kernel):
        path = member.name.removeprefix("./").removeprefix("usr/")
        if path.startswith("boot/vmlinuz-"):
            (made / "vmlinuz").write_bytes(data)
        elif path.startswith("lib/modules/") and ".ko" in path:
            files[path] = modules.unpack(path, data)
        elif path.endswith("/modules.builtin"):
            built_in |= {modules.module_name(line) for line in data.decode().splitlines()}
    tree = Tree()
    for name in ("dev", "proc", "sys", "etc"):
        tree.directory(name)
    tree.character_device("dev/console", 5, 1)
    tree.file("init", init.encode(), 0o755)
    listed = []
    for path in modules.closure([*wanted, "qemu_fw_cfg"], files, built_in):
        short = f"lib/{modules.module_name(path)}.ko"
        tree.file(short, files[path])
        listed.append(f"/{short} {ARGUMENTS.get(modules.module_name(path), '')}\n")
    tree.file("etc/modules", "".join(listed).encode())
    tree.file("etc/second", SECOND.encode())
    for member, data in packages.contents(busybox):
        if member.isreg() and member.name.removeprefix("./").removeprefix("usr/") == "bin/busybox":
            tree.file("bin/busybox", data, 0o755)
    (made / "initrd").write_bytes(tree.cpio())
