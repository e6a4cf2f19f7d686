"""Machines put down, taken up and copied: how long each takes, and how long the machine stands still.

The guest is the linux image. Beside it QEMU TCG runs the same kernel and disk, and is saved in both ways that it has:
`migrate` to a file, taken up by `-incoming`; and `savevm` into a qcow2 disk, taken up by `-loadvm`.

The memory of a copy is what the process holds outside guest RAM with the original and its copies (proportional set
size, so what is shared counts once) beyond what it held without any machine, for each of them: once as soon as all have
answered, and once when all are at rest. Beside it the pages of RAM that a copy has for itself: those that it wrote.
"""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

import vmm
from tests.bench.settled import settled
from tests.support import pss
from vmm.state.taking import SnapshotProgress

Row = Mapping[str, object]
ROUNDS = 7
COPIES = 20
DIRTY = (
    "mkdir -p /d; mount -t tmpfs none /d; dd if=/dev/zero of=/d/f bs=1M count=128 2>/dev/null;"
    "(while :; do dd if=/dev/zero of=/d/f bs=1M count=5 conv=notrunc seek=$((i % 24 * 5)) 2>/dev/null;"
    "i=$((i + 1)); usleep 50000; done) >/dev/null 2>&1 &"
)
"""100 MB a second, as far as the guest comes to it."""


async def _restores(folder: Path) -> tuple[list[float], list[float]]:
    first, answered = [], []
    for _ in range(ROUNDS):
        began = time.monotonic()
        async with vmm.restore(folder) as vm:
            while not vm.stats().get("instructions", 0) and not dict(vm.timeline.moments).get("first exit"):
                await asyncio.sleep(0)
            first.append((time.monotonic() - began) * 1e3)
            await vm.exec("true", timeout=60)
            answered.append((time.monotonic() - began) * 1e3)
    return first, answered


async def _measure(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with vmm.run("linux") as vm:
        await vm.exec("true", timeout=120)
        began = time.monotonic()
        await vm.snapshot(folder / "small")
        found["snapshot"] = (time.monotonic() - began) * 1e3
    found["first"], found["answered"] = await _restores(folder / "small")
    async with vmm.run("linux", memory="1G") as vm:
        await vm.exec("sh", "-c", DIRTY, timeout=120)
        await asyncio.sleep(1)
        still = []
        for number in range(3):
            progress = SnapshotProgress()
            await vm.snapshot(folder / f"busy{number}", progress=progress)
            still.append(progress.stood_still_ns / 1e6)
        found["busy"] = still
    empty, _ = _memory()
    async with vmm.run("linux") as vm:
        await vm.exec("true", timeout=120)
        from vmm.state.fork import freeze

        still = []
        for _ in range(3):
            with await freeze(vm) as frozen:
                still.append(frozen.stood_still_ns / 1e6)
        found["frozen"] = still
        began = time.monotonic()
        copies = await vm.fork(COPIES)
        await asyncio.gather(*(copy.exec("true", timeout=120) for copy in copies))
        found["copies"] = time.monotonic() - began
        found["copy at work"] = (_memory(vm, *copies)[0] - empty) / (COPIES + 1) / (1 << 20)
        after, written = await settled(lambda: _memory(vm, *copies), lambda found: found[0])
        found["copy"] = (after - empty) / (COPIES + 1) / (1 << 20)
        found["written"] = (written - _memory(vm)[1]) / COPIES / (1 << 20)
        async with AsyncExitStack() as stack:
            for copy in copies:
                stack.push_async_callback(copy.aclose)
    return found


def _memory(*machines: vmm.VirtualMachine) -> tuple[int, int]:
    """(bytes of the process outside the RAM of these machines, private bytes of that RAM)."""
    gc.collect()
    regions = [view for vm in machines for _, view in vm.machine.memory.regions()]
    starts = [pss.address(view) for view in regions]
    spans = [(start, start + len(view)) for start, view in zip(starts, regions, strict=True)]
    return pss.split(pss.mappings(), spans)


def _warm() -> tuple[list[float], list[float]]:
    command = [str(Path(sys.executable).parent / "vmm")]
    cold, warm = list[float](), list[float]()
    subprocess.run([*command, "run", "linux", "--warm", "--", "true"], check=True, capture_output=True)
    for _ in range(5):
        for times, option in ((cold, []), (warm, ["--warm"])):
            began = time.monotonic()
            subprocess.run([*command, "run", "linux", *option, "--", "true"], check=True, capture_output=True)
            times.append((time.monotonic() - began) * 1e3)
    return cold, warm


class _Qemu:
    """QEMU TCG with the image's kernel and disk, steered by QMP."""

    def __init__(self, folder: Path, *more: str, disk: Path | None = None) -> None:
        """`disk`: a qcow2 file to run from and write to, instead of the image's."""
        from images import builder

        built = builder.build("linux").directory
        self._path = folder / "qmp"
        self._path.unlink(missing_ok=True)
        kernel, initrd = next(built.glob("vmlinu*")), next(built.glob("initr*"))
        image = f"file={disk},format=qcow2"
        if disk is None:
            image = f"file={next(built.glob('*.img'))},format=raw,snapshot=on"
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-m", "256M", "-nographic", "-serial", f"file:{folder}/serial",
             "-monitor", "none", "-kernel", str(kernel), "-initrd", str(initrd),
             "-drive", f"{image},if=virtio", "-append", "console=ttyS0 root=/dev/vda rw quiet",
             "-qmp", f"unix:{self._path},server=on,wait=off", *more],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 30
        while self._socket.connect_ex(str(self._path)):
            if time.monotonic() > deadline:
                self.process.kill()
                raise TimeoutError(f"QEMU does not answer at {self._path}")
            time.sleep(0.002)
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "return" in answer or "error" in answer:
                return answer.get("return")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self.process.kill()
        self.process.wait()


def _boot(folder: Path, machine: _Qemu) -> None:
    """To its shell."""
    serial = folder / "serial"
    deadline = time.monotonic() + 120
    while b"# " not in serial.read_bytes():
        if time.monotonic() > deadline:
            raise TimeoutError("QEMU's guest has no shell")
        time.sleep(0.1)


def _running(machine: _Qemu) -> None:
    while machine.ask("query-status").get("status") != "running":
        time.sleep(0.002)


def _savevm(folder: Path) -> dict[str, float]:
    """ms: to save, all of it standing still, and from exec of the new process to its running machine."""
    from images import builder

    disk = folder / "disk.qcow2"
    base = next(builder.build("linux").directory.glob("*.img"))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(disk)]
    subprocess.run(command, check=True)
    (folder / "serial").unlink(missing_ok=True)
    with closing(_Qemu(folder, disk=disk)) as machine:
        _boot(folder, machine)
        began = time.monotonic()
        said = machine.ask("human-monitor-command", **{"command-line": "savevm one"})
        saved = (time.monotonic() - began) * 1e3
        if said:
            raise RuntimeError(f"savevm: {said}")
    began = time.monotonic()
    with closing(_Qemu(folder, "-loadvm", "one", disk=disk)) as machine:
        _running(machine)
        return {"saved": saved, "restored": (time.monotonic() - began) * 1e3}


def _migrate(folder: Path) -> dict[str, float]:
    """ms: to save, standing still, and from exec of the new process to its running machine."""
    with closing(_Qemu(folder)) as machine:
        _boot(folder, machine)
        began = time.monotonic()
        machine.ask("migrate", uri=f"exec:cat >{folder}/state")
        while (status := machine.ask("query-migrate")).get("status") not in ("completed", "failed"):
            time.sleep(0.002)
        saved, still = (time.monotonic() - began) * 1e3, float(status.get("downtime", 0))
    began = time.monotonic()
    with closing(_Qemu(folder, "-incoming", f"exec:cat {folder}/state")) as machine:
        _running(machine)
        return {"saved": saved, "still": still, "restored": (time.monotonic() - began) * 1e3}


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="loopvisor-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        found = uvloop.run(_measure(folder))
        yield {"name": "snapshot of a 256 MiB Debian machine, whole", "value": found["snapshot"], "unit": "ms"}
        yield {"name": "restore to its first exit (median)", "value": median(found["first"]), "unit": "ms", "goal": 10}
        answered = median(found["answered"])
        yield {"name": 'restore to a finished exec("true")', "value": answered, "unit": "ms", "goal": 60}
        yield {"name": "stands still: 1 GiB, dirtying 100 MB/s", "value": max(found["busy"]), "unit": "ms", "goal": 50}
        yield {"name": "stands still while it is copied (longest of 3)", "value": max(found["frozen"]), "unit": "ms",
               "goal": 20}  # fmt: skip
        yield {"name": f"{COPIES} copies, until all answered", "value": found["copies"], "unit": "s", "goal": 1}
        yield {"name": "memory of a copy beside its RAM, at rest", "value": found["copy"], "unit": "MiB", "goal": 3}
        work = found["copy at work"]
        yield {"name": "the same as all have just answered", "value": work, "unit": "MiB", "goal": 3}
        yield {"name": "pages of RAM that a copy wrote", "value": found["written"], "unit": "MiB"}
        cold, warm = _warm()
        yield {"name": "vmm run linux -- true, cold (median)", "value": median(cold), "unit": "ms"}
        yield {"name": "the same, --warm", "value": median(warm), "unit": "ms"}
        ratio = median(b / a for a, b in zip(cold, warm, strict=True))
        yield {"name": "warm / cold", "value": ratio, "unit": "×", "goal": 0.15}
        if shutil.which("qemu-system-x86_64") is None:
            yield {"name": "QEMU TCG", "value": None, "unit": "ms", "note": "qemu-system-x86_64 is not installed"}
            return
        theirs = _migrate(folder)
        yield {"name": "QEMU: migration to a file", "value": theirs["saved"], "unit": "ms"}
        yield {"name": "QEMU: stands still", "value": theirs["still"], "unit": "ms"}
        yield {"name": "QEMU: process to running machine from it", "value": theirs["restored"], "unit": "ms"}
        ratio = found["snapshot"] / theirs["saved"]
        yield {"name": "snapshot / QEMU's migration", "value": ratio, "unit": "×", "goal": 1}
        theirs = _savevm(folder)
        yield {"name": "QEMU: savevm, standing still", "value": theirs["saved"], "unit": "ms"}
        yield {"name": "QEMU: process to running machine by -loadvm", "value": theirs["restored"], "unit": "ms"}
        ratio = found["snapshot"] / theirs["saved"]
        yield {"name": "snapshot / savevm", "value": ratio, "unit": "×", "goal": 1}
