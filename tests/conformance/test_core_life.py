"""cpu/contract.py: closing at any point, and 200 VMs without a leak. Every core."""

import gc
import mmap
import os
import select
import signal
import subprocess
import sys
import warnings

import pytest

from cpu.contract import MsiRoute, Space, VmConfig
from cpu.errors import ConfigError, CpuError, StateError
from cpu.exits import MmioRead, PortOut, Resume
from tests.support.cores import DEADLINE_S, MMIO, RESUME, make, open_core


def census():
    """(threads, descriptors, mappings) of this process, without what earlier tests left to the garbage collector."""
    gc.collect()
    with open("/proc/self/maps") as file:
        maps = sum(1 for line in file if "kvm-vcpu" in line or "/dev/zero" in line)
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), maps


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def leave_fresh(guest):
    pass


def leave_running(guest):
    guest.load([])
    if not guest.scripted:
        guest.load_code(b"\xeb\xfe")
    guest.go()


def leave_with_an_exit_untaken(guest):
    guest.load([PortOut(1, 1, 1)])
    guest.go()
    assert select.select([guest.vm.fileno()], [], [], DEADLINE_S)[0]


def leave_parked_in_a_read(guest):
    guest.load([MmioRead(MMIO, 4)])
    guest.go()
    guest.next_exit()


def leave_interrupted(guest):
    leave_running(guest)
    guest.park()


def leave_with_the_queue_full(guest):
    guest.vm.add_posted(Space.PORT, 0x10, 1, 0)
    if guest.scripted:
        guest.load([PortOut(0x10, 1, 0)] * 20000)
    else:  # mov edx, 0x10; 1: out dx, al; jmp 1b
        guest.load_code(bytes.fromhex("ba10000000 ee ebfd"))
    guest.go()
    while not guest.vm.stats()["posted.waits"]:
        pass


def leave_halted(guest):
    if not guest.scripted:
        guest.load_code(bytes.fromhex("f4"))
    guest.go()


LEAVE = [
    leave_fresh,
    leave_running,
    leave_with_an_exit_untaken,
    leave_parked_in_a_read,
    leave_interrupted,
    leave_with_the_queue_full,
    leave_halted,
]


@pytest.mark.parametrize("leave", LEAVE, ids=lambda leave: leave.__name__[6:])
def test_close_at_any_point_leaves_nothing(core, leave):
    make(core).close()  # whatever is made once is made now
    before = census()
    guest = make(core, config=VmConfig(vcpus=1))
    leave(guest)
    guest.close()
    guest.vm.close()
    assert census() == before


def test_after_close_everything_says_so(core, guests):
    guest = guests(core)
    shadow = guest.vm.add_shadow(Space.PORT, 1, 1)
    vm, vcpu = guest.vm, guest.vcpus[0]
    vm.close()
    vcpu.kick()
    for use in (
        vm.take,
        vm.fileno,
        vm.state,
        vm.now_ns,
        vm.stats,
        vcpu.registers,
        lambda: vcpu.resume(Resume()),
        lambda: vm.set_irq(1, True),
        lambda: shadow.set(1),
        lambda: vm.create_vcpu(0),
    ):
        with pytest.raises(StateError):
            use()


def test_a_vm_that_was_forgotten_warns_and_closes(core):
    make(core).close()
    before = census()
    guest = make(core)
    leave_running(guest)
    with pytest.warns(ResourceWarning, match="unclosed VM"):
        del guest
        gc.collect()
    assert census() == before


def leave_idle(guest):
    if not guest.scripted:
        guest.load_code(bytes.fromhex("fb f4 ebfd"))  # sti; 1: hlt; jmp 1b
    guest.go()


def leave_signalling(guest):
    """Its thread nearly always holds a lock."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    guest.vm.add_ioeventfd(fd, Space.PORT, 0x10, 1)
    os.close(fd)
    if guest.scripted:
        guest.load([PortOut(0x10, 1, 0)] * 20000)
    else:  # mov edx, 0x10; 1: out dx, al; jmp 1b
        guest.load_code(bytes.fromhex("ba10000000 ee ebfd"))
    guest.go()


def in_the_child(guest):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(DEADLINE_S))
    guest.vcpus[0].kick()
    for use in (guest.vm.take, guest.vm.stats, guest.vcpus[0].registers, lambda: guest.vm.set_alarm(1)):
        with pytest.raises(StateError, match="belongs to the process that made it"):
            use()
    guest.vm.close()


@pytest.mark.parametrize("leave", [leave_running, leave_idle, leave_signalling], ids=["running", "idle", "signalling"])
def test_a_forked_child_can_close_its_copy(core, guests, leave):
    """The threads are the parent's; the child gets rid of what it inherited and disturbs nothing."""
    guest = guests(core)
    leave(guest)
    for _ in range(5):
        with warnings.catch_warnings():  # Python 3.12 dislikes a fork beside threads: that is what this is about
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                in_the_child(guest)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    guest.park()


class Closing:
    """A number that closes the VM when it is asked for."""

    def __init__(self, vm, number=0):
        self.vm, self.number = vm, number

    def __index__(self):
        self.vm.close()
        return self.number

    def __bool__(self):
        self.vm.close()
        return True


@pytest.mark.parametrize(
    "use",
    [
        lambda vm, n: vm.set_memory_slot(1, n, None),
        lambda vm, n: vm.memory_written(n, 1),
        lambda vm, n: vm.set_alarm(n),
        lambda vm, n: vm.get_blob(n),
        lambda vm, n: vm.set_blob(n, b""),
        lambda vm, n: vm.add_posted(0, n, 1, 0),
        lambda vm, n: vm.remove_posted(0, n, 1),
        lambda vm, n: vm.add_shadow(0, n, 1),
        lambda vm, n: vm.remove_shadow(0, n, 1),
        lambda vm, n: vm.add_shadow(0, 1, 1).set(n),
        lambda vm, n: vm.add_ioeventfd(0, 0, n, 1),
        lambda vm, n: vm.remove_ioeventfd(0, 0, 1, 1, n),
        lambda vm, n: vm.set_irq(n, True),
        lambda vm, n: vm.set_irq(1, n),
        lambda vm, n: vm.signal_msi(0xFEE00000, n),
        lambda vm, n: vm.set_msi_routes([MsiRoute(24, n, 0)]),
        lambda vm, n: vm.add_irqfd(0, n),
        lambda vm, n: vm.remove_irqfd(0, n),
        lambda vm, n: vm.create_vcpu(n),
    ],
)  # fmt: skip
def test_an_argument_that_closes_the_vm_finds_it_closed(core, guests, use):
    vm = guests(core).vm
    with pytest.raises(StateError, match="the VM is closed"):
        use(vm, Closing(vm))


# Makes one ioctl of the kernel's wait until the program says so, after telling that it was reached.
HOLD_IOCTL = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>
int ioctl(int fd, unsigned long request, ...)
{
    static int (*real)(int, unsigned long, ...);
    va_list list;
    char byte = 0;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!real)
        real = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    const char *held = getenv("HELD");
    if (held && request == strtoul(held, NULL, 16) &&
        (write(atoi(getenv("REACHED")), &byte, 1) != 1 || read(atoi(getenv("GO_ON")), &byte, 1) != 1))
        abort();
    return real(fd, request, argument);
}
'''
MAKE_BESIDE = r'''
import os, threading
from cpu.contract import VmConfig
from tests.support.cores import open_core
system = open_core("kvm")
system.capabilities(), system.msr_indices()
(reached, tell), (wait, go_on) = os.pipe(), os.pipe()
os.environ.update(REACHED=str(tell), GO_ON=str(wait))

def make():
    vm = system.create_vm(VmConfig())
    vm.create_vcpu(0)
    vm.close()

os.environ["HELD"] = os.environ["REQUEST"]
thread = threading.Thread(target=make)
thread.start()
os.read(reached, 1)  # the other thread is inside the ioctl now, and this one goes on
os.write(go_on, b"x")
thread.join()
'''


@pytest.mark.kvm
@pytest.mark.parametrize("request_number", ["ae01", "ae41"], ids=["KVM_CREATE_VM", "KVM_CREATE_VCPU"])
def test_other_threads_run_while_the_kernel_makes_a_vm(tmp_path, request_number):
    open_core("kvm").close()
    (tmp_path / "hold.c").write_text(HOLD_IOCTL)
    library = tmp_path / "hold.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "hold.c", "-ldl"], check=True)
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    subprocess.run(
        [sys.executable, "-c", MAKE_BESIDE], check=True, timeout=DEADLINE_S,
        env=os.environ | {"LD_PRELOAD": preload, "REQUEST": request_number},
    )  # fmt: skip


def test_a_closed_system_makes_no_vm(core):
    core.close()
    core.close()
    with pytest.raises(StateError):
        core.create_vm(VmConfig())


def test_200_vms_in_a_row_leak_nothing(core):
    def one():
        guest = make(core)
        guest.load([PortOut(1, 1, 1)])
        guest.go()
        guest.run()
        guest.close()

    for _ in range(10):
        one()
    gc.collect()
    before, memory = census(), resident()
    for _ in range(200):
        one()
    gc.collect()
    assert census() == before
    assert resident() - memory < 4 << 20


def test_50_vms_at_the_same_time(core):
    make(core).close()
    before = census()
    all_of_them = [make(core) for _ in range(50)]
    for guest in all_of_them:
        leave_running(guest)
    for guest in all_of_them:
        guest.vcpus[0].kick()
    for guest in all_of_them:
        guest.next_exit()
        guest.vcpus[0].resume(RESUME)
    for guest in all_of_them:
        guest.close()
    assert census() == before


# ---- memory slots ----


def test_a_slot_holds_its_buffer_until_it_is_removed(core):
    vm = core.create_vm(VmConfig())
    memory = mmap.mmap(-1, 1 << 16)
    vm.set_memory_slot(3, 1 << 20, memoryview(memory))
    with pytest.raises(BufferError):
        memory.close()
    vm.set_memory_slot(3, 0, None)
    memory.close()
    with pytest.raises(ConfigError):
        vm.set_memory_slot(3, 0, None)
    vm.close()


@pytest.mark.parametrize(
    ("slot", "address", "length"),
    [(0, 0x800, 4096), (0, 0, 100), (64, 0, 4096), (0, (1 << 52) - 4096, 8192), (0, 1 << 63, 4096), (0, 0, 0)],
)
def test_a_slot_must_be_aligned_and_inside_the_address_space(core, guests, slot, address, length):
    vm = core.create_vm(VmConfig())
    memory = mmap.mmap(-1, 1 << 16)
    with pytest.raises(ConfigError):
        vm.set_memory_slot(slot, address, memoryview(memory)[:length])
    vm.close()
    memory.close()


def test_slots_do_not_overlap_and_a_used_one_is_not_replaced(core, guests):
    guest = guests(core)
    other = mmap.mmap(-1, 1 << 16)
    with pytest.raises(ConfigError):
        guest.vm.set_memory_slot(1, 0x1000, memoryview(other))
    with pytest.raises(ConfigError):
        guest.vm.set_memory_slot(0, 0, memoryview(other))
    other.close()


def test_memory_of_a_slot_must_be_writable(core, guests):
    with pytest.raises((BufferError, CpuError)):
        guests(core).vm.set_memory_slot(1, 1 << 24, memoryview(bytes(1 << 16)))


@pytest.mark.parametrize("vcpus", [0, 65, 1 << 20])
def test_the_number_of_vcpus_is_checked(core, vcpus):
    with pytest.raises(ConfigError):
        core.create_vm(VmConfig(vcpus=vcpus))
