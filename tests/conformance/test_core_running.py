"""cpu/contract.py: parking and kicking, the alarm, several vCPUs, signals. Every core."""

import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

from cpu.contract import Capability, Space
from cpu.errors import ConfigError, StateError
from cpu.exits import AlarmDue, CompleteRead, Interrupted, MmioWrite, PortIn, PortOut, Posted
from tests.support.cores import DEADLINE_S, DONE, MMIO, RESUME, SCRATCH

ACCESSES = [PortOut(0x60, 1, 5), PortIn(0x60, 4), MmioWrite(MMIO, 4, 5)]


def spin(guest, vcpu=0):
    """Let a vCPU run without an exit."""
    if not guest.scripted:  # a script that has ended idles
        guest.load_code(b"\xeb\xfe", vcpu)
    guest.vcpus[vcpu].resume(RESUME)


def nothing_comes(guest):
    return not select.select([guest.vm.fileno()], [], [], 0.05)[0] or guest.vm.take() == []


def test_a_kick_parks_a_running_vcpu_between_instructions(core, guests):
    guest = guests(core)
    spin(guest)
    for _ in range(20):
        guest.vcpus[0].kick()
        assert guest.next_exit() == (0, Interrupted())
        guest.vcpus[0].registers()
        guest.vcpus[0].resume(RESUME)


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("access", ACCESSES, ids=lambda access: type(access).__name__)
def test_an_access_is_completed_and_no_instruction_follows(core, guests, access, vcpus):
    """complete(), in place of resume() and then kick(), which leaves the vCPU its time between both."""
    guest = guests(core, vcpus=vcpus)
    guest.load([access] * 20)
    for index in range(1, vcpus):
        spin(guest, index)
    guest.vcpus[0].resume(RESUME)
    reads = isinstance(access, PortIn)
    for number in range(20):
        assert guest.next_exit() == (0, access)
        guest.vcpus[0].complete(CompleteRead(number) if reads else RESUME)
        assert guest.next_exit() == (0, Interrupted())
        guest.vcpus[0].state()
        guest.vcpus[0].complete(RESUME)
        assert guest.next_exit() == (0, Interrupted())
        with pytest.raises(StateError):
            guest.vcpus[0].complete(CompleteRead(0))
        guest.vcpus[0].resume(RESUME)
    assert guest.next_exit() == (0, PortOut(DONE, 1, 0))
    assert not reads or guest.answers == list(range(20))


@pytest.mark.parametrize("vcpus", [1, 2])
def test_an_access_of_a_hot_loop_is_completed(real_core, guests, vcpus):
    """Where the next store stands in the same block, which has been translated by then."""
    guest = guests(real_core, vcpus=vcpus)
    store = b"\xa3" + MMIO.to_bytes(4, "little") + b"\x40"  # mov [MMIO], eax; inc eax
    guest.load_code(b"\x31\xc0" + 2 * store + b"\xeb" + (-2 * len(store) - 2).to_bytes(1, "little", signed=True))
    for index in range(1, vcpus):
        spin(guest, index)
    guest.vcpus[0].resume(RESUME)
    for number in range(200):
        assert guest.next_exit() == (0, MmioWrite(MMIO, 4, number))
        guest.vcpus[0].complete(RESUME)
        assert guest.next_exit() == (0, Interrupted())
        guest.vcpus[0].resume(RESUME)


def test_a_kick_from_another_thread(core, guests):
    guest = guests(core)
    spin(guest)
    thread = threading.Thread(target=guest.vcpus[0].kick)
    thread.start()
    assert guest.next_exit() == (0, Interrupted())
    thread.join()


def test_kicking_a_parked_vcpu_does_nothing(core, guests):
    guest = guests(core)
    guest.vcpus[0].kick()
    guest.load([PortOut(1, 1, 1)])
    guest.go()
    assert guest.next_exit() == (0, PortOut(1, 1, 1))
    guest.vcpus[0].kick()
    guest.vcpus[0].resume(RESUME)
    assert guest.next_exit() == (0, PortOut(DONE, 1, 0))


def test_a_kick_is_owed_when_another_exit_comes_first(core, guests):
    """The exit was on its way when the kick came: Interrupted follows once it is answered, with the access done."""
    guest = guests(core)
    guest.load([PortIn(0x60, 1), PortOut(1, 1, 1)])
    guest.go()
    assert select.select([guest.vm.fileno()], [], [], DEADLINE_S)[0]
    guest.vcpus[0].kick()
    assert guest.run(lambda _: 0x77) == [(0, PortIn(0x60, 1)), (0, Interrupted()), (0, PortOut(1, 1, 1))]
    assert guest.answers == [0x77]


def test_state_is_for_parked_vcpus_only(core, guests):
    guest = guests(core)
    spin(guest)
    vcpu = guest.vcpus[0]
    for use in (vcpu.registers, vcpu.state, lambda: vcpu.resume(RESUME), lambda: vcpu.set_msr(0x10, 0)):
        with pytest.raises(StateError):
            use()
    guest.park()
    vcpu.registers()


def test_exits_that_nobody_took_do_not_park_for_the_caller(core, guests):
    guest = guests(core)
    guest.load([PortOut(1, 1, 1)])
    guest.go()
    assert select.select([guest.vm.fileno()], [], [], DEADLINE_S)[0]
    with pytest.raises(StateError):
        guest.vcpus[0].resume(RESUME)
    assert guest.run() == [(0, PortOut(1, 1, 1))]


def test_vcpus_run_and_exit_each_for_itself(core, guests):
    guest = guests(core, vcpus=3)
    for index in range(3):
        guest.load([PortOut(0x10 + index, 1, at) for at in range(20)], index)
    guest.go()
    seen = guest.run()
    for index in range(3):
        assert [exit_.value for at, exit_ in seen if at == index] == list(range(20))
        assert all(exit_.port == 0x10 + index for at, exit_ in seen if at == index)


def test_posted_writes_of_one_vcpu_keep_their_order_beside_others(core, guests):
    guest = guests(core, vcpus=2)
    for index in range(2):
        guest.vm.add_posted(Space.PORT, 0x10 + index, 1, index)
        guest.load([PortOut(0x10 + index, 1, at) for at in range(200)], index)
    guest.go()
    seen = guest.run()
    for index in range(2):
        assert b"".join(item.data for item in seen if item.tag == index) == bytes(range(200))


def test_lingering_loses_nothing_and_ends_by_itself(core, guests):
    """Before anything ran, after each answer, beside a vCPU that computes, and after what was not answered at all."""
    guest = guests(core)
    guest.vm.linger()
    guest.load([PortOut(0x10, 1, value) for value in range(200)])
    guest.go()
    for value in range(200):
        assert guest.take() == [(0, PortOut(0x10, 1, value))]
        guest.vm.linger()
        if value < 199:
            guest.vcpus[0].resume(RESUME)
            guest.vm.linger()
    computing = guests(core)
    spin(computing)
    computing.vcpus[0].kick()
    assert computing.take() == [(0, Interrupted())]
    computing.vcpus[0].resume(RESUME)
    for _ in range(100):
        computing.vm.linger()
    computing.vm.close()
    with pytest.raises(StateError):
        computing.vm.linger()


def test_a_vcpu_that_waits_does_not_hold_up_the_others_kick(core, guests):
    """vCPU 0 is parked in a read that nobody answers; vCPU 1 can still be parked."""
    guest = guests(core, vcpus=2)
    guest.load([PortIn(0x60, 1)], 0)
    spin(guest, 1)
    guest.vcpus[0].resume(RESUME)
    assert guest.next_exit() == (0, PortIn(0x60, 1))
    guest.vcpus[1].kick()
    assert guest.next_exit() == (1, Interrupted())


def test_a_vcpu_exists_once_and_below_the_configured_number(core, guests):
    guest = guests(core, vcpus=2)
    for index in (0, 1, 2, 1000):
        with pytest.raises(ConfigError):
            guest.vm.create_vcpu(index)


# ---- time ----


def test_the_alarm_comes_once_and_not_before_it_is_due(core, guests):
    guest = guests(core)
    spin(guest)
    due = guest.vm.now_ns() + 3_000_000
    guest.vm.set_alarm(due)
    assert guest.take() == [AlarmDue()]
    assert guest.vm.now_ns() >= due
    assert nothing_comes(guest)


def test_a_cancelled_alarm_does_not_come(core, guests):
    guest = guests(core)
    spin(guest)
    guest.vm.set_alarm(guest.vm.now_ns() + 3_000_000)
    guest.vm.set_alarm(None)
    assert nothing_comes(guest)


def test_an_alarm_that_is_past_comes_at_once(core, guests):
    guest = guests(core)
    spin(guest)
    guest.vm.set_alarm(0)
    assert guest.take() == [AlarmDue()]


def test_the_clock_starts_at_zero_and_goes_on(core, guests):
    guest = guests(core)
    first = guest.vm.now_ns()
    assert 0 <= first < DEADLINE_S * 1e9
    spin(guest)
    end = time.monotonic() + DEADLINE_S
    while guest.vm.now_ns() <= first and time.monotonic() < end:
        pass
    assert guest.vm.now_ns() > first


def test_with_the_virtual_clock_a_posted_write_waits_until_the_loop_has_handled_it(core, guests):
    if Capability.VIRTUAL_CLOCK not in core.capabilities():
        with pytest.raises(ConfigError):
            guests(core, virtual_clock=True)
        return
    guest = guests(core, virtual_clock=True)
    guest.vm.add_posted(Space.PORT, 0x10, 1, 1)
    guest.load([PortOut(0x10, 1, 5), PortOut(0x10, 1, 6)])
    guest.go()
    assert guest.take() == [Posted(1, 1, b"\5")]
    before = guest.vm.now_ns()
    assert select.select([guest.vm.fileno()], [], [], DEADLINE_S)[0]  # the core wants the loop to come again
    assert guest.vm.now_ns() == before
    assert guest.run() == [Posted(1, 1, b"\6")]


def test_with_the_virtual_clock_an_idle_machine_skips_to_the_alarm(core, guests):
    if Capability.VIRTUAL_CLOCK not in core.capabilities():
        pytest.skip(f"{core.name} has no virtual clock")
    guest = guests(core, virtual_clock=True)
    if not guest.scripted:
        guest.load_code(bytes.fromhex("fb f4 ebfd"))  # sti; hlt
    hour = 3600 * 10**9
    guest.vm.set_alarm(guest.vm.now_ns() + hour)
    guest.go()
    assert guest.take() == [AlarmDue()]
    assert guest.vm.now_ns() >= hour


# ---- signals ----


def dispositions():
    with open("/proc/self/status") as file:
        return [line for line in file if line.startswith(("SigCgt", "SigIgn", "SigBlk"))]


def test_kicks_touch_no_signal_of_the_embedding_program(core, guests):
    before = dispositions()
    got = []
    old = signal.signal(signal.SIGALRM, lambda number, _: got.append(number))
    try:
        guest = guests(core)
        spin(guest)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        end = time.monotonic() + DEADLINE_S
        while len(got) < 20 and time.monotonic() < end:
            guest.vcpus[0].kick()
            assert guest.next_exit() == (0, Interrupted())
            guest.vcpus[0].resume(RESUME)
        assert set(got) == {signal.SIGALRM}
        assert len(got) >= 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert dispositions() == before


def test_a_kick_needs_no_room_in_the_users_signal_queue(core, guests):
    """Another program of the same user may have filled it."""
    guest = guests(core)
    if not guest.scripted:
        guest.load_code(b"\xfe\x05" + struct.pack("<I", SCRATCH) + b"\xeb\xf8")  # 1: inc byte [SCRATCH]; jmp 1b
    guest.go()
    while not guest.scripted and not guest.memory[SCRATCH]:  # until it is in guest mode
        pass
    old = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, old[1]))
    try:
        guest.vcpus[0].kick()
        assert guest.next_exit() == (0, Interrupted())
    finally:
        resource.setrlimit(resource.RLIMIT_SIGPENDING, old)


STOPPED = """
import sys
from cpu.exits import PortOut
from tests.support.cores import make, open_core
guest = make(open_core(sys.argv[1]))
guest.load([PortOut(0x10, 1, at & 0xFF) for at in range(3000)])
guest.go()
print("running", flush=True)
seen = guest.run()
assert [exit_.value for _, exit_ in seen] == [at & 0xFF for at in range(3000)]
guest.close()
print("done", flush=True)
"""


def test_stopping_and_continuing_the_process_changes_nothing(core):
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, core.name], stdout=subprocess.PIPE, cwd=os.getcwd(), text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        for _ in range(5):
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            child.send_signal(signal.SIGCONT)
        assert child.stdout.readline() == "done\n"
    assert child.returncode == 0


def test_what_runs_past_its_slot_is_mmio(core, guests):
    guest = guests(core)
    guest.load([MmioWrite(1 << 20, 4, 7), MmioWrite(MMIO, 1, 8)])
    guest.go()
    assert guest.run() == [(0, MmioWrite(1 << 20, 4, 7)), (0, MmioWrite(MMIO, 1, 8))]
