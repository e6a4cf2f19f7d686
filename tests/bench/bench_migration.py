"""A machine that moves to another process of this host, by TCP over loopback: how long it takes, how long it stands
still, how many bytes it takes. Beside it QEMU TCG migrates the same kernel and disk, by turns.

The guest has 1 GiB and idles, or writes to memory at a rate. The standstill is each program's own measure, and what a
neighbour on the guest's network sees (neighbour.py): the longest time without one of the datagrams that a program in
the guest sends every millisecond, and without an answer to a ping. The guest's own clock would not do, since QEMU's
stands still with the guest. Then, how long the machine stands still when it is handed over before its memory
(post-copy). At last, how long another machine of the same process takes to answer while this one migrates, and while it
only runs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, Self

import uvloop

import vmm
from tests.bench.bench_state import _Qemu
from tests.support.command import VMM, environment

Row = Mapping[str, object]
ROUNDS = 3
ANSWERS = 1000
BESIDE = 125_000_000
MAC = "52:54:00:09:00:02"
ROWS = {
    "total": ("total", "ms"),
    "still": ("still, as each program says", "ms"),
    "ticks": ("no sign of the guest", "ms"),
    "pings": ("no answer to a ping", "ms"),
    "bytes": ("bytes", "MB"),
}
CASES = {"idle": 0, "writing 50 MB/s": 50, "writing 200 MB/s": 200}


def writing(rate: int) -> str:
    """A shell command that goes on writing so many MB a second over 256 MiB of a tmpfs, as far as the guest comes to
    it: parts of a random file, at another place each time."""
    if not rate:
        return "true"
    return (
        "mkdir -p /d; mount -t tmpfs -o size=400m none /d; dd if=/dev/urandom of=/d/r bs=1M count=32 2>/dev/null; "
        f"(i=0; while :; do dd if=/d/r of=/d/f bs=64k count={max(rate * 16 // 20, 1)} conv=notrunc "
        f"skip=$((i % 300)) seek=$((i * 40 % 4000)) 2>/dev/null; i=$((i + 1)); usleep 50000; done) >/dev/null 2>&1 &"
    )


class Neighbour:
    """neighbour.py, at a socket."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "network"
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("neighbour.py"), self.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while not self.path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def ask(self, what: str) -> dict[str, float]:
        """The answer to `begin` or `end`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def ticking(folder: Path) -> str:
    """Shell commands that bring the guest's card up and start tick.c; a shell's lines are shorter than 1,000 bytes."""
    program = folder / "tick"
    subprocess.run(
        ["gcc", "-std=gnu11", "-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-asynchronous-unwind-tables",
         "-fno-stack-protector", "-fcf-protection=none", "-s", "-Wl,--build-id=none,-n,-z,norelro,-z,noseparate-code",
         "-o", program, Path(__file__).with_name("tick.c")],
        check=True, capture_output=True,
    )  # fmt: skip
    text = base64.b64encode(program.read_bytes()).decode()
    parts = "".join(f"echo {text[at : at + 400]} >>/tick.text\n" for at in range(0, len(text), 400))
    return (
        f"ip link set eth0 up; ip addr add 10.9.0.2/24 dev eth0\n{parts}base64 -d /tick.text >/tick; chmod +x /tick\n"
        "/tick >/dev/null 2>&1 &"
    )


@asynccontextmanager
async def receiving(folder: Path) -> AsyncIterator[str]:
    """Where a process waits for a machine."""
    runtime = folder / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    command = [*VMM, "receive", "tcp:127.0.0.1:0", "--trust", "--name", "there", "--console", "none"]
    with subprocess.Popen(command, env=environment(runtime), stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            yield (await asyncio.to_thread(child.stderr.readline)).split()[-1]
        finally:
            child.kill()


async def _ours(folder: Path, rate: int, **options: Any) -> dict[str, float]:
    """ms and MB of one migration into a process of its own."""
    with Neighbour(folder) as neighbour:
        nets = [f"unix={neighbour.path},mac={MAC}"]
        async with vmm.run("linux", memory="1G", nets=nets, core="soft") as vm:
            await vm.exec("sh", "-c", ticking(folder), timeout=120)
            await vm.exec("sh", "-c", writing(rate), timeout=120)
            await asyncio.sleep(2)
            async with receiving(folder) as where:
                await asyncio.to_thread(neighbour.ask, "begin")
                progress = await vm.migrate(where, **options)
                seen = await asyncio.to_thread(neighbour.ask, "end")
    return {
        "total": progress.seconds * 1e3,
        "still": progress.downtime * 1e3,
        "bytes": progress.sent / 1e6,
        "rounds": progress.rounds,
        "throttle": progress.throttle,
        **seen,
    }


async def _answers(vm: vmm.VirtualMachine, until: Callable[[int], bool]) -> list[float]:
    """ms that a machine that echoes takes for a byte, again and again."""
    times: list[float] = []
    while not until(len(times)):
        begun = time.perf_counter()
        await vm.console.write(b"x")
        await vm.console.expect(b"x", timeout=60)
        times.append((time.perf_counter() - begun) * 1e3)
        await asyncio.sleep(0.002)
    return times


def _high(times: list[float]) -> float:
    """The 99th percentile."""
    return sorted(times)[len(times) * 99 // 100]


async def _beside(folder: Path) -> tuple[list[float], list[float]]:
    """ms of another machine's answers, before and during a migration at BESIDE bytes a second."""
    async with (
        vmm.run("linux", memory="1G", nets=[], core="soft") as vm,
        vmm.run("echo", core="soft", memory="16M") as other,
    ):
        await other.console.expect(rb"Ctrl-D ends\n", timeout=60)
        await vm.exec("sh", "-c", writing(50), timeout=120)
        await asyncio.sleep(2)
        before = await _answers(other, lambda count: count >= ANSWERS)
        async with receiving(folder) as where:
            moving = asyncio.create_task(vm.migrate(where, bandwidth=BESIDE))
            during = await _answers(other, lambda count: count > 0 and moving.done())
            await moving
    return before, during


def _theirs(folder: Path, rate: int) -> dict[str, float]:
    """The same of QEMU; its own figures. Nothing if it does not end."""
    (folder / "there").mkdir(exist_ok=True)
    (folder / "tty").unlink(missing_ok=True)
    append = "console=ttyS1 root=/dev/vda rw quiet"
    neighbour = Neighbour(folder)
    common = ["-m", "1G", "-append", append, "-device", f"virtio-net-pci,netdev=n,mac={MAC}", "-netdev"]
    common += [f"stream,id=n,server=off,addr.type=unix,addr.path={neighbour.path}"]
    machine = _Qemu(folder, *common, "-serial", f"unix:{folder}/tty,server=on,wait=off")
    other = None
    try:
        with socket.socket(socket.AF_UNIX) as tty:
            tty.settimeout(60)
            tty.connect(f"{folder}/tty")
            seen = b""
            while b"# " not in seen:
                seen += tty.recv(4096)
            tty.sendall(ticking(folder).encode() + b"\n" + writing(rate).encode() + b"\n")
            time.sleep(4)
        other = _Qemu(folder / "there", *common, "-serial", "null", "-incoming", "tcp:127.0.0.1:4999")
        neighbour.ask("begin")
        machine.ask("migrate-set-parameters", **{"downtime-limit": 300, "max-bandwidth": 100 << 30})
        capabilities = [{"capability": "auto-converge", "state": True}]
        machine.ask("migrate-set-capabilities", capabilities=capabilities)
        machine.ask("migrate", uri="tcp:127.0.0.1:4999")
        deadline = time.monotonic() + 120
        while (status := machine.ask("query-migrate")).get("status") not in ("completed", "failed"):
            if time.monotonic() > deadline:
                return {}
            time.sleep(0.005)
        if status["status"] != "completed":
            return {}
        return {
            **neighbour.ask("end"),
            "total": float(status.get("total-time", 0)),
            "still": float(status.get("downtime", 0)),
            "bytes": status.get("ram", {}).get("transferred", 0) / 1e6,
        }
    finally:
        neighbour.__exit__()
        for each in (machine, other):
            if each is not None:
                each.close()


def rows() -> Iterator[Row]:
    qemu = shutil.which("qemu-system-x86_64") is not None
    with tempfile.TemporaryDirectory(prefix="loopvisor-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        for case, rate in CASES.items():
            ours: list[dict[str, float]] = []
            theirs: list[dict[str, Any]] = []
            for _ in range(ROUNDS):
                ours.append(uvloop.run(_ours(folder, rate)))
                if qemu:
                    with suppress(OSError, ValueError):
                        theirs.append(_theirs(folder, rate))
            theirs = [each for each in theirs if each]
            for what, (text, unit) in ROWS.items():
                mine = median(each[what] for each in ours)
                yield {"name": f"1 GiB, {case}: {text}", "value": mine, "unit": unit}
                if not theirs:
                    note = "it did not end within two minutes" if qemu else "qemu-system-x86_64 is not installed"
                    yield {"name": "beside QEMU TCG", "value": None, "unit": "×", "note": note}
                    continue
                peer = median(each[what] for each in theirs)
                row: dict[str, object] = {"name": "beside QEMU TCG", "value": mine / max(peer, 1e-9), "unit": "×"}
                if what == "still":  # QEMU's is shorter than what a neighbour sees
                    yield row | {"note": f"{peer:.0f} {unit}, which leaves out some of it"}
                else:
                    yield row | {"goal": 1.0, "note": f"{peer:.0f} {unit}"}
        for case, rate in CASES.items():
            switched = [uvloop.run(_ours(folder, rate, postcopy="now")) for _ in range(ROUNDS)]
            yield {
                "name": f"1 GiB, {case}: switch to post-copy at once",
                "value": median(each["still"] for each in switched),
                "unit": "ms",
                "goal": 50.0,
                "note": f"all memory there after {median(each['total'] for each in switched):.0f} ms",
            }
        before, during = uvloop.run(_beside(folder))
        yield {"name": "another machine's answer, this one runs: p99", "value": _high(before), "unit": "ms"}
        yield {
            "name": "another machine's answer, this one migrates: p99",
            "value": _high(during),
            "unit": "ms",
            "note": f"{_high(during) / _high(before):.2f} × without; medians {median(before):.2f} and "
            f"{median(during):.2f} ms; {len(during)} answers",
        }
