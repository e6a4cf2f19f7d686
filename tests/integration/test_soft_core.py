"""The software core as a machine: kick, park, state in mid-run, virtual clock, entropy, interrupts, SMP."""

from __future__ import annotations

import hashlib
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cpu import _core
from cpu.contract import MsiRoute, Space, System, VmConfig
from cpu.exits import (
    CompleteRead,
    Halt,
    Interrupted,
    MmioRead,
    MmioWrite,
    PortIn,
    PortOut,
    Resume,
    Shutdown,
)
from images import guests
from tests.support.assemble import assemble
from tests.support.bare import Bare

pytestmark = pytest.mark.skipif("soft" not in _core.CORES, reason="this build has no software core")

ROOT = Path(__file__).parents[2]
CODE = 0x10000
COUNTERS = 0x8000
VIRTUAL = VmConfig(virtual_clock=True, seed=1)


@pytest.fixture
def soft() -> Iterator[System]:
    from cpu.system import soft_system

    system = soft_system()
    yield system
    system.close()


def counter(bare: Bare, index: int) -> int:
    return int(struct.unpack_from("<Q", bare.ram, COUNTERS + 8 * index)[0])


COUNT32 = f"""
1:  lock inc dword ptr [{COUNTERS}]
    jmp 1b
"""
HLT_ON = "1: sti\n hlt\n jmp 1b"
HLT_OFF = "mov dword ptr [0x8000], 1\n 1: cli\n hlt\n inc dword ptr [0x8000]\n jmp 1b"

START_APS = f"""
    /* INIT and SIPI to all others; their code stands at 0x9000 */
    mov dword ptr [0xfee000f0], 0x1ff
    mov dword ptr [0xfee00300], 0xc4500
    mov dword ptr [0xfee00300], 0xc4609
1:  lock inc dword ptr [{COUNTERS}]
    pause
    jmp 1b
"""
AP = """
    mov ax, 0
    mov ds, ax
    mov ebx, 0x8008
    mov ecx, 1
    lock xadd [0x8100], ecx
    shl ecx, 3
    add ebx, ecx
1:  lock inc dword ptr [ebx]
    pause
    jmp 1b
"""


def smp(soft: System, vcpus: int, config: VmConfig | None = None) -> Bare:
    bare = Bare(soft, replace(config or VmConfig(), vcpus=vcpus))
    bare.code(CODE, assemble(START_APS, CODE))
    bare.write(0x9000, assemble(AP, 0x9000, 16))
    return bare


@pytest.mark.parametrize("code", [COUNT32, HLT_ON], ids=["spinning", "halted"])
def test_kick_parks_between_instructions(soft: System, code: str, record_property: pytest.FixtureRequest) -> None:
    with Bare(soft) as bare:
        bare.code(CODE, assemble(code, CODE))
        bare.start()
        slowest = 0.0
        for _ in range(20):
            begin = time.perf_counter()
            bare.pause(0)
            slowest = max(slowest, time.perf_counter() - begin)
            assert CODE <= bare.vcpus[0].registers().rip < CODE + 64
            bare.vcpus[0].resume(Resume())
        record_property("slowest kick, ms", slowest * 1000)  # type: ignore[operator]


def test_a_kick_while_parked_is_forgotten(soft: System) -> None:
    with Bare(soft) as bare:
        bare.code(CODE, assemble("mov al, 7\n out 0xf4, al\n hlt", CODE))
        bare.vcpus[0].kick()
        bare.start()
        bare.run()
        assert bare.ended == 7
        assert bare.exits == []


def test_hlt_with_interrupts_off_is_told_once(soft: System) -> None:
    with Bare(soft) as bare:
        bare.code(CODE, assemble(HLT_OFF, CODE))
        bare.start()
        bare.run()
        assert bare.exits == [(0, Halt())]
        bare.vcpus[0].resume(Resume())
        bare.pause(0)
        assert bare.exits == [(0, Halt())]


def test_each_vcpu_that_halted_for_good_is_told(soft: System) -> None:
    with smp(soft, 3) as bare:  # one halts, the others wait for INIT and SIPI
        bare.code(CODE, assemble("cli\n hlt", CODE))
        bare.start()
        bare.run(until=lambda bare: len(bare.exits) == 3)
        assert sorted(bare.exits, key=lambda pair: pair[0]) == [(index, Halt()) for index in range(3)]


def test_nmi_wakes_a_vcpu_that_halted_for_good(soft: System) -> None:
    # Real mode: the vector of NMI at 2 * 4.
    with Bare(soft) as bare:
        bare.write(8, struct.pack("<HH", 0x7100, 0))
        bare.write(0x7100, assemble("mov al, 9\n out 0xf4, al\n hlt", 0x7100, 16))
        bare.code(0x7200, assemble("cli\n hlt", 0x7200, 16), bits=16)
        bare.start()
        bare.run()
        assert bare.exits == [(0, Halt())]
        bare.vcpus[0].resume(Resume())
        bare.vcpus[0].nmi()
        bare.run()
        assert bare.ended == 9


def test_triple_fault_is_a_shutdown(soft: System) -> None:
    with Bare(soft) as bare:
        bare.boot(guests.path("triple"))
        bare.start()
        bare.run()
        assert bare.exits == [(0, Shutdown())]


def test_one_of_several_vcpus_parks_and_goes_on(soft: System) -> None:
    with smp(soft, 4) as bare:
        bare.start()
        bare.run(lambda b: all(counter(b, i) & 0xFFFFFFFF > 1000 for i in range(4)))
        bare.pause(0)
        still = counter(bare, 0)
        others = [counter(bare, i) for i in range(1, 4)]
        bare.run(lambda b: all(counter(b, i) > others[i - 1] + 1000 for i in range(1, 4)))
        assert counter(bare, 0) == still
        assert bare.vcpus[0].registers().rip >= CODE  # readable while the others run
        bare.vcpus[0].resume(Resume())
        bare.run(lambda b: counter(b, 0) > still)
        bare.pause()
        frozen = bare.read(COUNTERS, 32)
        assert bare.vm.take() == []
        assert bare.read(COUNTERS, 32) == frozen


def test_a_vcpu_that_never_ran_is_not_run(soft: System) -> None:
    with smp(soft, 2) as bare:
        bare.vcpus[0].resume(Resume())
        bare.run(lambda b: counter(b, 0) > 1000)
        assert counter(bare, 1) == 0
        bare.vcpus[1].resume(Resume())
        bare.run(lambda b: counter(b, 1) > 1000)


def test_close_while_it_runs_and_while_an_exit_waits(soft: System) -> None:
    for code in (COUNT32, HLT_ON, HLT_OFF, "1: in al, 0x60\n jmp 1b"):
        bare = Bare(soft)
        bare.code(CODE, assemble(code, CODE))
        bare.start()
        bare.vm.take()
        bare.vm.close()
        bare.vm.close()
        bare.ram.close()


# ---- time ----


def traced(soft: System, config: VmConfig, kernel: str, cmdline: str = "", hops: int = 0) -> tuple[bytes, int, str]:
    """Run a guest to its end: (console, instructions, RAM hash). `hops`: move it to a fresh VM that many times, each
    time further on in the guest's time than the last; TooLate if it ends before."""
    bare = Bare(soft, config)
    try:
        bare.boot(guests.path(kernel), cmdline)
        bare.start()
        moved_ns = -1
        for _ in range(hops):
            bare.run(lambda b, last=moved_ns: b.ended is None and b.vm.now_ns() > last)
            bare.pause()
            moved_ns = bare.vm.now_ns()
            state = bare.state()
            other = Bare(soft, config, console=bare.console)
            bare.__exit__()
            bare = other
            bare.set_state(state)
            bare.start()
        bare.run()
        instructions = bare.vm.stats()["instructions"]
        return bytes(bare.console), instructions, hashlib.sha256(bare.ram[:]).hexdigest()
    finally:
        bare.__exit__()


@pytest.mark.parametrize("kernel", ["hello", "timer", "long", "dirty", "flood 3000"])
def test_virtual_clock_makes_a_run_a_function_of_its_inputs(soft: System, kernel: str) -> None:
    name, _, cmdline = kernel.partition(" ")
    first = traced(soft, VIRTUAL, name, cmdline)
    assert first == traced(soft, VIRTUAL, name, cmdline)
    assert first[0]


def test_virtual_clock_skips_what_the_guest_sleeps(soft: System) -> None:
    with Bare(soft, VIRTUAL) as bare:
        bare.boot(guests.path("timer"), "200")
        bare.start()
        bare.run()
        assert bytes(bare.console) == b"200 ticks\n"
        assert 1_990_000_000 < bare.vm.now_ns() < 2_020_000_000


MWAITS = """
    xor ecx, ecx
    xor edx, edx
    mov esi, 1000
1:  mov eax, 0x8000
    monitor
    xor eax, eax
    mwait
    dec esi
    jnz 1b
    mov al, 1
    out 0xf4, al
    hlt
"""


def test_mwait_sleeps(soft: System) -> None:
    """With the virtual clock time that nobody executes instructions in is skipped: so it is seen that MWAIT sleeps."""
    with Bare(soft, VIRTUAL) as bare:
        bare.code(CODE, assemble(MWAITS, CODE))
        bare.start()
        bare.run()
        assert bare.vm.stats()["instructions"] < 10_000
        assert bare.vm.now_ns() > 1000 * 10_000


HANDSHAKE = """
    mov dword ptr [0xfee000f0], 0x1ff
    mov dword ptr [0xfee00300], 0xc4500
    mov dword ptr [0xfee00300], 0xc4609
    mov ecx, 200
1:  mov [0x8000], ecx
2:  {wait}
    cmp [0x8004], ecx
    jne 2b
    loop 1b
    mov al, 1
    out 0xf4, al
    hlt
"""
ANSWER = """
    mov ax, 0
    mov ds, ax
1:  {wait}
    mov eax, [0x8000]
    mov [0x8004], eax
    jmp 1b
"""


def test_pause_gives_the_turn_to_others(soft: System) -> None:
    """200 times one vCPU waits for another: with PAUSE in the waiting loops that takes few instructions."""
    spent = {}
    for wait in ("pause", "nop"):
        with Bare(soft, replace(VIRTUAL, vcpus=2)) as bare:
            bare.code(CODE, assemble(HANDSHAKE.format(wait=wait), CODE))
            bare.write(0x9000, assemble(ANSWER.format(wait=wait), 0x9000, 16))
            bare.start()
            bare.run()
            spent[wait] = bare.vm.stats()["instructions"]
    assert spent["pause"] * 20 < spent["nop"], spent


def test_state_moves_to_a_fresh_vm_in_mid_run(soft: System) -> None:
    """Far more ticks than a host can run while it is told to pause twelve times."""
    alone = traced(soft, VIRTUAL, "timer", "200000")
    moved = traced(soft, VIRTUAL, "timer", "200000", hops=12)
    assert moved[0] == alone[0] == b"200000 ticks\n"


WORK = """
    mov ecx, 300000000
    mov eax, 1
1:  imul eax, eax, 1103515245
    add eax, 12345
    rol eax, 7
    push eax
    pop edx
    add [0x8000], edx
    loop 1b
    mov dx, 0xe9
    mov ecx, 4
2:  out dx, al
    shr eax, 8
    loop 2b
    mov al, 1
    out 0xf4, al
    hlt
"""


def test_state_of_a_computation_moves_at_arbitrary_points(soft: System) -> None:
    code = assemble(WORK.replace("300000000", "3000000"), CODE)
    results = []
    for hops in (0, 20):
        bare = Bare(soft)
        bare.code(CODE, code)
        bare.start()
        for _ in range(hops):
            bare.pause()
            state = bare.state()
            bare.__exit__()
            bare = Bare(soft)
            bare.set_state(state)
            bare.start()
        bare.run()
        results.append((bytes(bare.console), bare.read(0x8000, 8)))
        bare.__exit__()
    assert results[0] == results[1]


RUN_AND_TELL = """
import resource, signal, sys
from cpu.system import soft_system
from tests.support.assemble import assemble
from tests.support.bare import Bare
from tests.integration.test_soft_core import CODE, WORK
if sys.argv[1] == "limited":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with Bare(soft_system()) as bare:
    bare.code(CODE, assemble(WORK.replace("300000000", "3000000"), CODE))
    bare.start()
    bare.run()
    maps = list(open("/proc/self/maps"))
    found = sorted(line.split()[1] for line in maps if "loopvisor-code" in line or "wx" in line.split()[1])
    print(bytes(bare.console).hex(), *found)
"""


def test_host_code_is_never_writable_where_it_runs() -> None:
    """Two mappings of one memory; where the host does not allow them, the interpreter does the same work."""
    told = {}
    for how in ("usual", "limited"):
        command = [sys.executable, "-c", RUN_AND_TELL, how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        told[how] = done.stdout.split()
    assert told["usual"][1:] == ["r-xs", "rw-s"]
    assert told["limited"][1:] == []
    assert told["usual"][0] == told["limited"][0]


def smp_run(soft: System, posted: bool) -> tuple[list[int], int, str]:
    with smp(soft, 3, VIRTUAL) as bare:
        bare.vm.set_alarm(5_000_000)
        if posted:
            bare.vm.add_posted(Space.PORT, 0xE9, 1, 5)
        bare.start()
        bare.run(lambda b: b.alarms == 1)
        bare.pause()
        counters = [counter(bare, i) for i in range(3)]
        return counters, bare.vm.stats()["instructions"], hashlib.sha256(bare.ram).hexdigest()


DICE = """
    mov ecx, 64
1:  rdrand eax
    jnc 1b
    mov edx, 0xe9
    out dx, al
    rdseed eax
    out dx, al
    loop 1b
    mov al, 1
    out 0xf4, al
    hlt
"""


def dice(soft: System, seed: int | None) -> bytes:
    with Bare(soft, VmConfig(seed=seed)) as bare:
        bare.code(CODE, assemble(DICE, CODE))
        bare.start()
        bare.run()
        return bytes(bare.console)


def test_a_seed_determines_rdrand(soft: System) -> None:
    assert dice(soft, 7) == dice(soft, 7)
    assert dice(soft, 7) != dice(soft, 8)
    assert dice(soft, None) != dice(soft, None)
    assert len(set(dice(soft, 7))) > 64


def test_chacha20_is_that_of_the_rfc(soft: System) -> None:
    # RFC 8439 A.1, test vector 1: key zero, block 0 begins 76 b8 e0 ad. RDRAND of 32 bits draws whole words.
    assert dice(soft, 0)[0] == 0x76


# ---- interrupts, accesses ----

ECHO_IRQ = """
    lidt [idtr]
    mov al, 0x11
    out 0x20, al
    mov al, 0x20
    out 0x21, al
    mov al, 4
    out 0x21, al
    mov al, 1
    out 0x21, al
    mov al, 0
    out 0x21, al
    mov dword ptr [0xfee000f0], 0x1ff
    mov al, 'R'
    out 0xe9, al
1:  sti
    hlt
    jmp 1b
irq:
    push eax
    mov al, 'I'
    out 0xe9, al
    mov al, 0x20
    out 0x20, al
    pop eax
    iret
msi:
    push eax
    mov al, 'M'
    out 0xe9, al
    mov dword ptr [0xfee000b0], 0
    pop eax
    iret
    .balign 8
idt: .skip 8 * 0x24
    .word irq - _start, 8, 0x8e00, 1
    .skip 8 * 27
    .word msi - _start, 8, 0x8e00, 1
idtr: .word 8 * 0x41 - 1
    .long idt
"""


def listening(soft: System, config: VmConfig | None = None) -> Bare:
    bare = Bare(soft, config or VmConfig())
    code = assemble(ECHO_IRQ, CODE)
    bare.code(CODE, code)
    selector = bare.vcpus[0].system_registers().cs.selector
    bare.write(CODE, code.replace(struct.pack("<HH", 8, 0x8E00), struct.pack("<HH", selector, 0x8E00)))
    bare.vm.memory_written(CODE, len(code))
    bare.start()
    bare.run(lambda b: b.console == b"R")
    return bare


CALLS = """
_start: call one
    out 0xe9, al
    call two
    out 0xe9, al
    jmp _start
one: mov al, 'a'
    ret
    .skip 256
two: mov al, 'b'
    ret
"""


@pytest.mark.parametrize("at_once", [False, True])
def test_code_that_a_device_replaces_is_seen(soft: System, at_once: bool) -> None:
    with Bare(soft) as bare:
        code = assemble(CALLS, CODE)
        bare.code(CODE, code)
        bare.start()
        bare.run(lambda b: len(b.console) > 200)  # often enough to be translated
        assert set(bare.console) == set(b"ab")
        places = [CODE + code.index(bytes((0xB0, letter))) for letter in b"ab"]
        for place, letter in zip(places, b"cd", strict=True):
            bare.ram[place + 1] = letter
        if at_once:
            bare.vm.memory_written_ranges(struct.pack("=QQQQ", places[0], 2, places[1], 2))
        else:
            for place in places:
                bare.vm.memory_written(place, 2)
        bare.console.clear()
        bare.run(lambda b: b.console.endswith(b"cdcdcd"))


def test_interrupts_reach_a_halted_vcpu(soft: System) -> None:
    with listening(soft) as bare:
        bare.vm.set_irq(4, True)
        bare.run(lambda b: b.console == b"RI")
        bare.vm.set_irq(4, False)
        bare.vm.signal_msi(0xFEE00000, 0x40)
        bare.run(lambda b: b.console == b"RIM")
        bare.vm.set_irq(4, True)
        bare.run(lambda b: b.console == b"RIMI")


def test_irqfds_raise_gsis_and_messages(soft: System) -> None:
    line, message = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with listening(soft) as bare:
            bare.vm.set_msi_routes([MsiRoute(30, 0xFEE00000, 0x40)])
            bare.vm.add_irqfd(line, 4)
            bare.vm.add_irqfd(message, 30)
            os.eventfd_write(line, 1)
            bare.run(lambda b: b.console == b"RI")
            os.eventfd_write(message, 1)
            bare.run(lambda b: b.console == b"RIM")
            os.eventfd_write(line, 1)
            bare.run(lambda b: b.console == b"RIMI")
    finally:
        os.close(line)
        os.close(message)


def test_the_level_of_a_line_survives_a_move(soft: System) -> None:
    """A line that was high when the state was saved falls in the new VM when its device lowers it."""
    with listening(soft) as bare:
        bare.vm.set_irq(17, True)
        bare.pause()
        state = bare.state()
        with Bare(soft) as other:
            other.set_state(state)
            assert other.vm.state().ioapic.irr >> 17 & 1
            other.vm.set_irq(17, False)
            other.start()
            other.pause()
            assert not other.vm.state().ioapic.irr >> 17 & 1


def test_registers_set_at_an_exit_are_those_that_it_goes_on_with(soft: System) -> None:
    with Bare(soft) as bare:
        bare.code(CODE, assemble("out 0x80, al\n hlt\n .skip 61\n mov al, 5\n out 0xf4, al\n hlt", CODE))
        bare.start()
        poll_until_exit(bare)
        vcpu = bare.vcpus[0]
        vcpu.set_registers(replace(vcpu.registers(), rip=CODE + 64))
        vcpu.resume(Resume())
        bare.run()
        assert bare.ended == 5


def poll_until_exit(bare: Bare) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for item in bare.vm.take():
            assert item == (0, PortOut(0x80, 1, 0))
            return
    raise AssertionError("no exit")


def test_interrupted_is_not_lost_while_an_access_waits(soft: System) -> None:
    with Bare(soft) as bare:
        bare.code(CODE, assemble("1: out 0x80, al\n jmp 1b", CODE))
        bare.start()
        assert select.select([bare.vm.fileno()], [], [], 10)[0]
        bare.vcpus[0].kick()  # its exit is on its way, not taken yet
        poll_until_exit(bare)
        bare.vcpus[0].resume(Resume())
        bare.run(lambda b: b.exits == [(0, Interrupted())])


def test_smp_with_the_virtual_clock_is_deterministic(soft: System) -> None:
    assert smp_run(soft, False) == smp_run(soft, False)


# ---- accesses of several vCPUs that wait for the loop at once ----

BUSY = """
    mov esi, 0
1:  mov eax, esi
    out 0xe0, eax               /* the round */
    in eax, 0xe4
    cmp eax, esi
    jne 9f
    add dword ptr [0x3e000000], esi   /* a read and a write in one instruction */
    mov edi, BUFFER
    mov ecx, 5
    mov edx, 0xe8
    cld
    rep insb
    mov ebp, esi
    mov esi, BUFFER
    mov ecx, 5
    mov edx, 0xec
    rep outsb
    mov esi, ebp
    inc esi
    cmp esi, 40
    jb 1b
    mov eax, 0x600d
    out 0xf0, eax
    cli
    hlt
9:  mov eax, 0xbad
    out 0xf0, eax
    hlt
"""


def expected(rounds: int) -> list[tuple[str, int]]:
    """What one vCPU does in the code above, in order."""
    steps: list[tuple[str, int]] = []
    for n in range(rounds):
        steps += [("oute0", n), ("ine4", 0), ("load", 0), ("store", 1000 + n + n)]
        steps += [("ine8", 0)] * 5 + [("outec", n + i & 0xFF) for i in range(5)]
    return [*steps, ("outf0", 0x600D)]


@pytest.mark.parametrize("kicks", [False, True])
def test_every_access_of_several_vcpus_happens_once_and_in_order(soft: System, kicks: bool) -> None:
    count = 3
    with Bare(soft, VmConfig(vcpus=count)) as bare:
        for index in range(count):
            at = CODE + 0x1000 * index
            bare.code(at, assemble(BUSY.replace("BUFFER", hex(0x8000 + 64 * index)), at), vcpu=index)
            vcpu = bare.vcpus[index]
            vcpu.set_state(replace(vcpu.state(), mp_state="runnable"))
        done: list[list[tuple[str, int]]] = [[] for _ in range(count)]
        bytes_in = [0] * count
        hops = 0
        bare.start()
        deadline = time.monotonic() + 30
        while any(not steps or steps[-1][0] != "outf0" for steps in done) and time.monotonic() < deadline:
            select.select([bare.vm.fileno()], [], [], 1)
            for item in bare.vm.take():
                assert isinstance(item, tuple)
                index, exit_ = item
                steps, value = done[index], 0
                this_round = sum(name == "oute0" for name, _ in steps) - 1
                match exit_:
                    case Interrupted():
                        hops += 1
                        vcpu = bare.vcpus[index]
                        vcpu.set_state(vcpu.state())  # complete between instructions
                        vcpu.resume(Resume())
                        continue
                    case PortOut(port=port, value=written):
                        steps.append((f"out{port:x}", written))
                    case PortIn(port=port):
                        steps.append((f"in{port:x}", 0))
                        value = this_round if port == 0xE4 else this_round + bytes_in[index] % 5 & 0xFF
                        bytes_in[index] += port == 0xE8
                    case MmioRead():
                        steps.append(("load", 0))
                        value = 1000 + this_round
                    case MmioWrite(value=written):
                        steps.append(("store", written))
                    case _:
                        raise AssertionError(exit_)
                if steps[-1][0] == "outf0":
                    continue
                reads = isinstance(exit_, PortIn | MmioRead)
                bare.vcpus[index].resume(CompleteRead(value) if reads else Resume())
                if kicks and len(steps) % 3 == 0:
                    bare.vcpus[index].kick()
        for steps in done:
            assert steps == expected(40)
        assert hops > 0 or not kicks


def test_other_vcpus_run_while_one_waits_for_an_answer(soft: System) -> None:
    with smp(soft, 2) as bare:
        bare.code(CODE, assemble("mov dword ptr [0xfee000f0], 0x1ff\n mov dword ptr [0xfee00300], 0xc4500\n"
                                 "mov dword ptr [0xfee00300], 0xc4609\n in al, 0x60\n out 0xf4, al\n hlt", CODE))
        bare.start()
        deadline = time.monotonic() + 10
        items: list[object] = []
        while not items and time.monotonic() < deadline:
            items = list(bare.vm.take())
        assert items == [(0, PortIn(0x60, 1))]
        first = counter(bare, 1)
        bare.run(lambda b: counter(b, 1) > first + 100000)
        bare.vcpus[0].resume(CompleteRead(33))
        bare.run()
        assert bare.ended == 33


def test_a_kick_outlives_an_access_that_is_dropped(soft: System) -> None:
    """The kick came while the read waited; the caller then moves the vCPU elsewhere instead of completing it."""
    with Bare(soft, VmConfig(vcpus=2)) as bare:
        bare.code(CODE, assemble("in al, 0x60\n hlt\n .skip 61\n 1: jmp 1b", CODE))
        bare.start()
        assert select.select([bare.vm.fileno()], [], [], 10)[0]
        bare.vcpus[0].kick()
        assert list(bare.vm.take()) == [(0, PortIn(0x60, 1))]
        bare.vcpus[0].set_registers(replace(bare.vcpus[0].registers(), rip=CODE + 64))
        bare.vcpus[0].resume(CompleteRead(0))
        bare.run(lambda b: b.exits == [(0, Interrupted())])
