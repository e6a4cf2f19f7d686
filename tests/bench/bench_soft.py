"""Compute guests on the software core and on QEMU's TCG: the same binaries, in turn, on the same host.

Each guest writes S when it begins and E when it is done to port 0xe9, with its result between; only the time between
the two counts, and results must be equal. A ratio above 1 means that the software core is faster.

    python -m tests.bench.bench_soft [WORKLOAD ...]
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpu import _core
from cpu.contract import VmConfig
from cpu.exits import Resume
from cpu.model import has_avx
from cpu.system import soft_system
from tests.support.bare import Bare

GUESTS = Path(__file__).parent / "guests"
MEMORY_MIB = 256
GOALS = {"sha256": 0.6, "sort": 0.6, "branches": 0.6, "tlb": 1.2, "movs": 20.0}
"""Workload -> the ratio that is asked for."""
VECTOR = ("scan", "chacha", "matrix", "extended")
"""SSE2 and x87 workloads, of guests/vector.c; nothing is asked for."""
AVX = ("avx_scan", "avx_chacha", "avx_matrix")
"""AVX2 and FMA workloads, of guests/avx.c, where the host has them, beside QEMU's `-cpu max`. Of SSE2's work in VECTOR
they do twice that of scan, the same of chacha, four times that of matrix."""
FLAGS = ["-m64", "-O2", "-std=gnu11", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-mno-red-zone",
         "-fno-tree-vectorize", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none",
         "-Wl,-z,max-page-size=4096"]
QEMU = ["qemu-system-x86_64", "-accel", "tcg", "-M", "microvm,pit=on,pic=on,rtc=on", "-m", str(MEMORY_MIB), "-display",
        "none", "-nodefaults", "-no-reboot", "-debugcon", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    soft_seconds: float
    tcg_seconds: float | None
    ratio: float | None
    goal: float | None
    mips: float


def build(workload: str, folder: Path) -> Path:
    """The ELF file of one workload."""
    target = folder / f"{workload}.elf"
    source = "vector.c" if workload in VECTOR else "avx.c" if workload in AVX else "compute.c"
    sources = [GUESTS / "start.S", GUESTS / source]
    registers = {"vector.c": [], "avx.c": ["-mavx2", "-mfma"], "compute.c": ["-mgeneral-regs-only"]}[source]
    linker = f"-Wl,-T,{GUESTS / 'guest.ld'}"
    subprocess.run(["gcc", *FLAGS, *registers, linker, f"-DWORKLOAD={workload}", "-o", target, *sources], check=True)
    return target


def _between(marks: list[tuple[int, float]]) -> tuple[float, str]:
    """Seconds from S to E and what stands between."""
    begin = next(at for byte, at in marks if byte == ord("S"))
    end = next(at for byte, at in marks if byte == ord("E"))
    text = bytes(byte for byte, _ in marks).decode()
    return end - begin, text[text.index("S") + 1 : text.index("E")]


def on_soft(kernel: Path, timeout: float = 120) -> tuple[float, str, int]:
    """(seconds, result, instructions) on the software core."""
    marks: list[tuple[int, float]] = []
    with Bare(soft_system(), VmConfig(), memory=MEMORY_MIB << 20) as machine:
        machine.log = lambda byte: marks.append((byte, time.perf_counter()))
        machine.boot(kernel)
        machine.start()
        machine.run(timeout=timeout)
        instructions = machine.vm.stats()["instructions"]
    return *_between(marks), instructions


def on_tcg(kernel: Path, timeout: float = 120, options: Sequence[str] = ()) -> tuple[float, str]:
    """(seconds, result) on QEMU."""
    marks: list[tuple[int, float]] = []
    deadline = time.monotonic() + timeout
    command = [*QEMU, *options, "-kernel", str(kernel)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as qemu:
        assert qemu.stdout is not None
        try:
            while (byte := qemu.stdout.read(1)) and time.monotonic() < deadline:
                marks.append((byte[0], time.perf_counter()))
        finally:
            qemu.kill()
    return _between(marks)


def measure(workload: str, folder: Path) -> Result:
    kernel = build(workload, folder)
    tcg = shutil.which("qemu-system-x86_64") is not None
    soft_best, tcg_best, instructions = float("inf"), float("inf"), 0
    for _ in range(ROUNDS):
        seconds, result, instructions = on_soft(kernel)
        soft_best = min(soft_best, seconds)
        if tcg:
            seconds, other = on_tcg(kernel, options=["-cpu", "max"] if workload in AVX else [])
            tcg_best = min(tcg_best, seconds)
            if other != result:
                raise RuntimeError(f"{workload}: the software core computed {result}, QEMU {other}")
    return Result(
        workload, soft_best, tcg_best if tcg else None, tcg_best / soft_best if tcg else None, GOALS.get(workload),
        instructions / soft_best / 1e6,
    )


def kicks(count: int = 200) -> list[float]:
    """Seconds from kick() until Interrupted was taken, of a guest that computes without exits."""
    code = bytes.fromhex("40ebfd")  # 1: inc eax; jmp 1b
    latencies = []
    with Bare(soft_system(), VmConfig()) as machine:
        machine.code(0x10000, code)
        machine.start()
        for _ in range(count):
            begin = time.perf_counter()
            machine.pause(0)
            latencies.append(time.perf_counter() - begin)
            machine.vcpus[0].resume(Resume())
    return latencies


def rows(workloads: list[str] | None = None) -> Iterator[dict[str, object]]:
    """Rows of tests.bench: ratio of speed against TCG, or the bare time where there is no QEMU; kick latency."""
    if "soft" not in _core.CORES:
        yield {"name": "compute guests", "value": None, "unit": "", "note": "this build has no software core"}
        return
    with tempfile.TemporaryDirectory() as folder:
        vectors = AVX if has_avx(soft_system().supported_cpuid()) else ()
        for workload in workloads or [*GOALS, *VECTOR, *vectors]:
            r = measure(workload, Path(folder))
            note = f"{r.soft_seconds:.3f} s, {r.mips:.0f} MIPS"
            if r.ratio is None:
                yield {"name": f"{r.name}: speed against TCG", "value": None, "unit": "x", "note": f"no QEMU; {note}"}
            else:
                yield {
                    "name": f"{r.name}: speed against TCG", "value": round(r.ratio, 3), "unit": "x",
                    **({} if r.goal is None else {"goal": r.goal}), "better": "more",
                    "note": f"{note}; TCG {r.tcg_seconds:.3f} s",
                }
    latencies = sorted(kicks())
    yield {
        "name": "kick of a computing guest, median", "value": round(statistics.median(latencies) * 1e6, 1),
        "unit": "us", "goal": 1000, "note": f"p95 {latencies[int(len(latencies) * 0.95)] * 1e6:.0f} us",
    }


if __name__ == "__main__":
    for row in rows(sys.argv[1:]):
        print(row)
