"""From process start to the first line of /init, beside QEMU's TCG in the same run.

The same kernel, initramfs, command line and vCPUs on the software core and on QEMU. Pairs alternate, so that what
disturbs the machine disturbs both; figures are medians, ratios are of medians. A tiny guest's whole life is measured
by bench_start.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from images import builder, packages
from images.tree import Tree

MARK = b"init: first line"
VMM = str(Path(sys.executable).parent / "vmm")
QEMU = shutil.which("qemu-system-x86_64")


def until(command: list[str], mark: bytes, timeout: float = 120) -> float:
    """Seconds from starting the command until it has written `mark` to standard output. Then it is ended."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    seen = b""
    try:
        while mark not in seen:
            part = os.read(process.stdout.fileno(), 65536)
            if not part or time.monotonic() - begin > timeout:
                raise RuntimeError(f"{command[0]}: ended without {mark!r}: {seen[-300:]!r}")
            seen += part
        return time.monotonic() - begin
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def initramfs(folder: Path) -> Path:
    """busybox, and an /init that says its line and powers off."""
    deb = packages.download(packages.resolve("busybox-static"))
    binary = next(data for member, data in packages.contents(deb) if member.name == "./bin/busybox")
    tree = Tree()
    tree.directory("dev")
    tree.character_device("dev/console", 5, 1)
    tree.file("bin/busybox", binary, 0o755)
    tree.file("init", b"#!/bin/busybox sh\necho '" + MARK + b"'\n/bin/busybox poweroff -f\n", 0o755)
    path = folder / "initrd"
    path.write_bytes(tree.cpio())
    return path


def rows() -> Iterator[Mapping[str, object]]:
    """Debian's cloud kernel to the first line of /init."""
    built = builder.build("linux")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        initrd = str(initramfs(folder))
        kernel = str(built.directory / "vmlinuz")
        vmlinux = folder / "vmlinux"
        vmlinux.write_bytes(unpacked(Path(kernel)))
        line = "console=ttyS0 panic=-1 cryptomgr.notests no_timer_check quiet"
        for cpus in ("1", "2"):
            ours = [VMM, "run", "--core", "soft", "--kernel", kernel, "--initrd", initrd, "--memory", "256M"]
            ours += ["--cpus", cpus, "--cmdline", line]
            theirs = [str(QEMU), "-M", "q35", "-accel", "tcg", "-m", "256", "-smp", cpus, "-kernel", str(vmlinux)]
            theirs += ["-initrd", initrd, "-append", line, "-nodefaults", "-serial", "stdio", "-display", "none"]
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(4):
                times["ours"].append(until(ours, MARK))
                if QEMU:
                    times["theirs"].append(until(theirs, MARK))
            mine = statistics.median(times["ours"][1:])
            yield {"name": f"linux, {cpus} vCPU, to the first line of /init, soft", "value": mine, "unit": "s"}
            if QEMU:
                other = statistics.median(times["theirs"][1:])
                yield {"name": f"QEMU q35, tcg, same vmlinux and initramfs, {cpus} vCPU", "value": other, "unit": "s"}
                yield {"name": f"soft / QEMU, {cpus} vCPU", "value": mine / other, "unit": "×", "goal": 0.75}


def unpacked(kernel: Path) -> bytes:
    """vmlinux out of a bzImage, as the loader has it in its cache."""
    from vmm.boot import linux as protocol
    from vmm.boot.request import read_file
    from vmm.boot.unpack import unpack_cached

    return bytes(unpack_cached(protocol.parse(read_file(kernel), str(kernel)).payload))
