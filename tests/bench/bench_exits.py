"""What a guest's exit costs on KVM: the bare C round trip, and each kind of access on top of it.

The guests are the same few real-mode instructions in every row that is compared. Measurements alternate, since hosts
drift; each row shows the median of its quietest round.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import select
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import uvloop

from cpu import select as choice
from cpu.contract import MsiRoute, Registers, Space, System, VmConfig
from cpu.exits import Resume
from cpu.scripted import ScriptedSystem
from cpu.vm import CoreVcpu, CoreVm
from tests.support.cores import Guest, make
from tests.support.interrupts import EOI_LAPIC, LAPIC, LAPIC_ON, MASK_PIC, VECTOR, prepare

RESUME = Resume()
PORT, MARK = 0x3D0, 0x3D1
LAP = 100
# mov dx, PORT; 1: out dx, al; jmp 1b
WRITES = "bad003 ee ebfd"
# 1: mov dx, PORT; mov cx, LAP; 2: out dx, al; loop 2b; mov dx, MARK; out dx, al; jmp 1b
WRITE_LAPS = "bad003 b96400 ee e2fd bad103 ee ebf1"
READ_LAPS = "bad003 b96400 ec e2fd bad103 ee ebf1"
# mov dx, PORT; 1: out dx, al; 2: cmp byte [0x500], 0; je 2b; mov byte [0x500], 0; jmp 1b
PING = "bad003 ee 803e000500 74f9 c606000500 ebf1"
FLAG = 0x500

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


class Real:
    """A KVM VM whose vCPU runs real-mode code at 0x1000."""

    def __init__(self, system: System, code: str) -> None:
        vm = system.create_vm(VmConfig())
        assert isinstance(vm, CoreVm)
        self.vm = vm
        self.memory = mmap.mmap(-1, 1 << 16)
        self.vm.set_memory_slot(0, 0, memoryview(self.memory))
        blob = bytes.fromhex(code)
        self.memory[0x1000 : 0x1000 + len(blob)] = blob
        self.vcpu: CoreVcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid(system.supported_cpuid())
        now = self.vcpu.system_registers()
        self.vcpu.set_system_registers(replace(now, cs=replace(now.cs, base=0, selector=0)))
        self.vcpu.set_registers(Registers(rip=0x1000))

    def close(self) -> None:
        self.vm.close()
        self.memory.close()


def compile_floor(folder: str) -> str | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    program = f"{folder}/roundtrip"
    source = str(Path(__file__).with_name("roundtrip.c"))
    subprocess.run([compiler, "-O2", "-o", program, source], check=True, timeout=60)
    return program


def floor(program: str, count: int, burst: int, code: str) -> list[float]:
    """ns an exit, for each of `count` bursts."""
    made = subprocess.run(
        [program, str(count), str(burst), code.replace(" ", "")], check=True, capture_output=True, timeout=60
    )
    return [int(line) / burst for line in made.stdout.split()][count // 50 :]


def periods(stamps: list[int]) -> list[float]:
    return [float(after - before) for before, after in zip(stamps, stamps[1:], strict=False)]


def served(real: Real | Guest, factory: LoopFactory, count: int) -> list[float]:
    """ns between one synchronous exit's arrival on the loop and the next's."""
    vm, vcpu = real.vm, real.vcpu if isinstance(real, Real) else real.vcpus[0]
    stamps: list[int] = []
    loop = factory()
    take, linger, resume, clock = vm.take, vm.linger, vcpu.resume, time.perf_counter_ns

    def ready() -> None:
        for item in take():
            if type(item) is tuple:
                stamps.append(clock())
                if len(stamps) > count:
                    loop.stop()
                    return
                resume(RESUME)
        linger()

    loop.add_reader(vm.fileno(), ready)
    resume(RESUME)
    loop.run_forever()
    loop.remove_reader(vm.fileno())
    loop.close()
    return periods(stamps[count // 50 :])


def synchronous(system: System, factory: LoopFactory, count: int) -> list[float]:
    real = Real(system, WRITES)
    try:
        return served(real, factory, count)
    finally:
        real.close()


def lap(system: System, *, shadow: bool, laps: int) -> list[float]:
    """ns for one posted write or shadow read: laps of 100 between two synchronous exits, whose own cost is left in."""
    real = Real(system, READ_LAPS if shadow else WRITE_LAPS)
    try:
        if shadow:
            real.vm.add_shadow(Space.PORT, PORT, 1).set(0x60)
        else:
            real.vm.add_posted(Space.PORT, PORT, 1, 1)
        return [each / (LAP + 1) for each in served(real, uvloop.new_event_loop, laps)]
    finally:
        real.close()


def doorbell(system: System, count: int) -> list[float]:
    """ns from one ioeventfd callback to the next, the guest writing again as soon as the callback cleared it to."""
    real = Real(system, PING)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    loop = uvloop.new_event_loop()
    stamps: list[int] = []
    try:
        real.vm.add_ioeventfd(fd, Space.PORT, PORT, 1)

        def ready() -> None:
            os.eventfd_read(fd)
            stamps.append(time.perf_counter_ns())
            if len(stamps) > count:
                loop.stop()
            real.memory[FLAG] = 1

        loop.add_reader(fd, ready)
        real.vcpu.resume(RESUME)
        loop.run_forever()
        loop.remove_reader(fd)
        return periods(stamps)
    finally:
        loop.close()
        real.close()
        os.close(fd)


def interrupt(system: System, count: int) -> list[float]:
    """ns from an irqfd write on the loop until the guest handler's own doorbell calls back."""
    guest = make(system)
    irq, bell = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
    loop = uvloop.new_event_loop()
    stamps: list[int] = []
    try:
        guest.vm.set_msi_routes([MsiRoute(24, LAPIC, VECTOR)])
        guest.vm.add_irqfd(irq, 24)
        guest.vm.add_ioeventfd(bell, Space.PORT, PORT, 1)
        prepare(guest, MASK_PIC + LAPIC_ON, EOI_LAPIC, told=PORT)

        def ready() -> None:
            os.eventfd_read(bell)
            stamps.append(time.perf_counter_ns())
            if len(stamps) > count:
                loop.stop()
            else:
                os.eventfd_write(irq, 1)

        loop.add_reader(bell, ready)
        os.eventfd_write(irq, 1)
        loop.run_forever()
        loop.remove_reader(bell)
        return periods(stamps)
    finally:
        loop.close()
        guest.close()
        os.close(irq)
        os.close(bell)


def latency(system: System, count: int) -> list[float]:
    """ns from an eventfd write in a thread to its callback on a loop, while two vCPUs spin."""
    guest = make(system, config=VmConfig(vcpus=2))
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    loop = uvloop.new_event_loop()
    stamps: list[float] = []
    written = [0]
    go = threading.Event()

    def ready() -> None:
        os.eventfd_read(fd)
        stamps.append(float(time.perf_counter_ns() - written[0]))
        if len(stamps) >= count:
            loop.call_soon(loop.stop)
        go.set()

    def write() -> None:
        while len(stamps) < count:
            select.select([], [], [], 0.001)  # the guests spin; the loop sleeps
            go.clear()
            written[0] = time.perf_counter_ns()
            os.eventfd_write(fd, 1)
            go.wait(1)

    try:
        for index in range(2):
            guest.load_code(b"\xeb\xfe", index)
        guest.go()
        loop.add_reader(fd, ready)
        thread = threading.Thread(target=write)
        thread.start()
        loop.run_forever()
        thread.join()
        loop.remove_reader(fd)
        return stamps
    finally:
        loop.close()
        guest.close()
        os.close(fd)


def median(samples: list[float]) -> float:
    return round(statistics.median(samples) / 1000, 2)


def p99(samples: list[float]) -> float:
    return round(sorted(samples)[len(samples) * 99 // 100] / 1000, 2)


def row(name: str, value: float | None, **more: object) -> dict[str, object]:
    return {"name": name, "value": value, "unit": "µs", **more}


def scripted(count: int) -> list[float]:
    """The handing over alone: no guest, the thread exits again at once."""
    from cpu.exits import PortOut

    guest = make(ScriptedSystem())
    try:
        guest.load([PortOut(PORT, 1, 0)] * (count + 10))
        return served(guest, uvloop.new_event_loop, count)
    finally:
        guest.close()


def rows(rounds: int = 5) -> Iterator[dict[str, object]]:
    yield row("handing an exit to the loop and back (scripted core)", median(scripted(5000)))
    found = choice.probe("kvm")
    if not found.available:
        yield row("exits on KVM", None, note=found.reason)
        return
    system = choice.open_system(choice.Choice("kvm", found, ""))
    with tempfile.TemporaryDirectory() as folder:
        program = compile_floor(folder)
        bare, in_laps, uv, plain, posted, shadow = ([] for _ in range(6))  # type: list[float]
        for _ in range(rounds):
            if program:
                bare.append(median(floor(program, 3000, 1, WRITES)))
                in_laps.append(median(floor(program, 150, LAP + 1, WRITE_LAPS)))
            posted.append(median(lap(system, shadow=False, laps=150)))
            shadow.append(median(lap(system, shadow=True, laps=150)))
            uv.append(median(synchronous(system, uvloop.new_event_loop, 3000)))
            plain.append(median(synchronous(system, asyncio.new_event_loop, 3000)))
    middle = min  # the quietest round: other load on the host only ever adds
    if program:
        yield row("bare C round trip", middle(bare))
        yield row("synchronous exit, above bare C (uvloop)", round(middle(uv) - middle(bare), 2), goal=15)
        yield row("bare C round trip, laps of 100", middle(in_laps))
        yield row("posted write, above bare C", round(middle(posted) - middle(in_laps), 2), goal=1)
        yield row("shadow read, above bare C", round(middle(shadow) - middle(in_laps), 2), goal=1)
    else:
        yield row("bare C round trip", None, note="no C compiler")
    yield row("synchronous exit through the loop, uvloop", middle(uv))
    yield row("synchronous exit through the loop, asyncio", middle(plain))
    yield row("posted write", middle(posted))
    yield row("shadow read", middle(shadow))
    yield row("ioeventfd to callback and back to the guest", median(doorbell(system, 3000)))
    yield row("irqfd to guest handler to callback", median(interrupt(system, 3000)))
    spinning = latency(system, 1000)
    yield row("eventfd to callback with 2 spinning vCPUs, median", median(spinning))
    yield row("eventfd to callback with 2 spinning vCPUs, p99", p99(spinning))
    system.close()


if __name__ == "__main__":
    for each in rows():
        print(each)
