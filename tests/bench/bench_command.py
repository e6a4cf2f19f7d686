"""From `vmm run linux -- sh -c 'echo hi; exit 7'` to its output, beside QEMU's TCG doing the same.

Both get the image's kernel (QEMU as vmlinux, which it enters directly), initramfs and root disk, one vCPU, 256 MiB
and no network. QEMU has no agent in the guest: the command is typed at the shell on the serial console as soon as its
prompt stands there, which our side does not have to wait for. Pairs alternate, so that what disturbs the machine
disturbs both; figures are medians. Processor time, of all threads and children up to the output, is what a busy host
disturbs least. One row has the network that `vmm run linux` has by default. The last rows are the phases of
`vmm run linux -- true` (`--timing`), in time by the clock and in processor time.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from images import builder
from tests.bench.bench_boot import QEMU, VMM, unpacked

PROMPT, OUTPUT = b"linux:~# ", b"hi"
SCRIPT = "echo hi; exit 7"
PAIRS = 5


class Run(NamedTuple):
    """Seconds to OUTPUT on standard output, to the end, and of processor time; the exit status."""

    output: float
    end: float
    processor: float
    status: int


def timed(command: list[str], typed: bytes = b"") -> Run:
    """`typed` goes in at the PROMPT, and the command is then ended after its OUTPUT."""
    begin, before = time.monotonic(), os.times()
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
    after = os.times()
    processor = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(seconds, time.monotonic() - begin, processor, process.returncode)


def medians(runs: list[Run]) -> Run:
    """Of all but the first, which warms the caches."""
    columns = list(zip(*runs[1:], strict=True))
    return Run(*(statistics.median(column) for column in columns[:3]), runs[0].status)


PHASE = re.compile(r"  (\w+) +(host|guest) +([\d.]+) +([\d.]+) +([\d.]+)  \|")
"""A line of --timing: name, where, and ms: when it begins, takes, processor time."""


def phases() -> dict[str, tuple[float, float]]:
    """Of one run: name -> ms that it took, and ms of processor time."""
    words = [VMM, "run", "linux", "--core", "soft", "--net", "none", "--timing", "--", "true"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True)
    found = {name: (float(took), float(processor)) for name, _, _, took, processor in PHASE.findall(done.stderr)}
    if "kernel" not in found:
        raise RuntimeError(f"no phases in {done.stderr!r}")
    return found


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
        mine: list[Run] = []
        peer: list[Run] = []
        networked: list[Run] = []
        for _ in range(PAIRS + 1):
            mine.append(timed([*ours, "--net", "none", *command]))
            if mine[-1].status != 7:
                raise RuntimeError(f"exit status {mine[-1].status} instead of 7")
            if QEMU:
                peer.append(timed(theirs, b"sh -c 'echo h''i; exit 7'\n"))
            if shutil.which("passt"):
                networked.append(timed([*ours, *command]))
        ours_to = medians(mine)
        yield {"name": "vmm run linux -- sh -c 'echo hi; exit 7', to its output", "value": ours_to.output, "unit": "s"}
        yield {"name": "the same, to its end", "value": ours_to.end, "unit": "s"}
        yield {"name": "the same, processor time", "value": ours_to.processor, "unit": "s"}
        if networked:
            yield {"name": "to the output, with the network", "value": medians(networked).output, "unit": "s"}
        if QEMU:
            theirs_to = medians(peer)
            yield {"name": "QEMU q35, tcg, same kernel, initramfs and disk", "value": theirs_to.output, "unit": "s"}
            yield {"name": "the same, processor time", "value": theirs_to.processor, "unit": "s"}
            ratio = ours_to.output / theirs_to.output
            yield {"name": "vmm / QEMU, to the output", "value": ratio, "unit": "×", "goal": 1.0}
            ratio = ours_to.processor / theirs_to.processor
            yield {"name": "vmm / QEMU, processor time", "value": ratio, "unit": "×"}
    runs = [phases() for _ in range(PAIRS + 1)][1:]
    for name in runs[0]:
        taken, processor = (statistics.median(column) for column in zip(*(run[name] for run in runs), strict=True))
        note = f"{processor:.1f} ms of processor time" + (", a part of build" if name == "unpack" else "")
        yield {"name": f"vmm run linux -- true: {name}", "value": taken, "unit": "ms", "note": note}
