"""From `vmm run linux -- sh -c 'echo hi; exit 7'` to its output, beside QEMU's TCG doing the same.

Both get the image's kernel (QEMU as vmlinux, which it enters directly), initramfs and root disk, one vCPU, 256 MiB
and no network. QEMU has no agent in the guest: the command is typed at the shell on the serial console as soon as its
prompt stands there, which our side does not have to wait for. Pairs alternate, so that what disturbs the machine
disturbs both; figures are medians. A third row has the network that `vmm run linux` has by default.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from images import builder
from tests.bench.bench_boot import QEMU, VMM, unpacked

PROMPT, OUTPUT = b"linux:~# ", b"hi"
SCRIPT = "echo hi; exit 7"
PAIRS = 5


def timed(command: list[str], typed: bytes = b"") -> tuple[float, float, int]:
    """(seconds to OUTPUT on standard output, seconds to the end, exit status); `typed` goes in at the PROMPT, and the
    command is then ended after its OUTPUT."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None
    seen, seconds, endless = b"", 0.0, bool(typed)
    with process:
        while data := os.read(process.stdout.fileno(), 65536):
            seen += data
            if typed and PROMPT in seen:
                process.stdin.write(typed)
                process.stdin.flush()
                seen, typed = b"", b""
            if not typed and not seconds and OUTPUT in seen:
                seconds = time.monotonic() - begin
                if endless:
                    process.kill()
    if not seconds:
        raise RuntimeError(f"{command[0]} ended without the output: {seen[-300:]!r}")
    return seconds, time.monotonic() - begin, process.returncode


def rows() -> Iterator[Mapping[str, object]]:
    built = builder.build("linux")
    with tempfile.TemporaryDirectory() as folder:
        vmlinux = Path(folder) / "vmlinux"
        vmlinux.write_bytes(unpacked(built.directory / "vmlinuz"))
        theirs = [
            str(QEMU), "-M", "q35", "-accel", "tcg", "-m", "256", "-kernel", str(vmlinux),
            "-initrd", str(built.directory / "initrd"),
            "-append", "console=ttyS0 panic=-1 cryptomgr.notests no_timer_check root=/dev/vda rw quiet",
            "-drive", f"file={built.directory / 'root.img'},format=raw,if=virtio,snapshot=on",
            "-nodefaults", "-nic", "none", "-serial", "stdio", "-display", "none",
        ]  # fmt: skip
        ours = [VMM, "run", "linux", "--core", "soft"]
        command = ["--", "sh", "-c", SCRIPT]
        mine: list[float] = []
        ends: list[float] = []
        peer: list[float] = []
        networked: list[float] = []
        for _ in range(PAIRS + 1):
            to_output, to_end, status = timed([*ours, "--net", "none", *command])
            if status != 7:
                raise RuntimeError(f"exit status {status} instead of 7")
            mine.append(to_output)
            ends.append(to_end)
            if QEMU:
                peer.append(timed(theirs, b"sh -c 'echo h''i; exit 7'\n")[0])
            if shutil.which("passt"):
                networked.append(timed([*ours, *command])[0])
        # The first pair warms the caches.
        best = statistics.median(mine[1:])
        yield {"name": "vmm run linux -- sh -c 'echo hi; exit 7', to its output", "value": best, "unit": "s"}
        yield {"name": "the same, to its end", "value": statistics.median(ends[1:]), "unit": "s"}
        if networked:
            yield {"name": "to the output, with the network", "value": statistics.median(networked[1:]), "unit": "s"}
        if QEMU:
            other = statistics.median(peer[1:])
            yield {"name": "QEMU q35, tcg, same kernel, initramfs and disk", "value": other, "unit": "s"}
            yield {"name": "vmm / QEMU", "value": best / other, "unit": "×", "goal": 1.0}
