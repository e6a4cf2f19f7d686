"""cpu/contract.py: the dirty log misses no write, whoever makes it, and can be read while vCPUs run. Every core."""

import mmap
import struct
import time
from dataclasses import replace

import pytest

from cpu.contract import Registers
from cpu.errors import ConfigError, CpuError, StateError
from cpu.exits import InternalError, MmioRead, MmioWrite, PortOut
from cpu.scripted import StoreStep
from tests.support.cores import CODE, DEADLINE_S, DONE, RAM, RESUME, SCRATCH, set_long

PAGE = 4096
LOAD = 0x4_0000
"""Where the programs below write."""


def pages(bitmap: bytes) -> set[int]:
    bits = int.from_bytes(bitmap, "little")
    return {at for at in range(bits.bit_length()) if bits >> at & 1}


def changed(before: bytes, after: bytes) -> set[int]:
    return {at // PAGE for at in range(0, len(before), PAGE) if before[at : at + PAGE] != after[at : at + PAGE]}


def code32(text: str) -> bytes:
    """`text`, then a write to DONE."""
    return bytes.fromhex(text + "baf00f0000 ee ebfe")


PROGRAMS = {
    "stores": code32("c605 00000400 01  66c705 fe1f0400 0202  c705 fe3f0400 03040506"),
    "read-modify-write": code32("ff05 00000400  f00105 00200400  8705 00400400  f00fc105 00600400 d125 00800400"),
    "rep stosb": code32("fc bf00000400 b900a00000 b077 f3aa"),
    "rep stosd downwards": code32("fd bffc9f0400 b900280000 b811223344 f3ab fc"),
    "rep movsd": code32("fc be00200000 bf02000400 b900280000 f3a5"),
    "stack": code32("bc00100400 9c 6800000100 60 e800000000 c8002000 ff3500200000 61"),
    "cmpxchg8b": code32("b811111111 ba00000000 bb01000000 b902000000 c705 00000400 11111111 0fc70d 00000400"),
    "descriptor tables": code32("0f0105 fe0f0400 0f010d 00300400"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_program_changed_is_in_the_log(real_core, guests, name):
    guest = guests(real_core, log_dirty=True)
    guest.load_code(PROGRAMS[name])
    guest.memory[LOAD : LOAD + 0xB000] = b"\xee" * 0xB000
    guest.vm.dirty_log(0)
    before = bytes(guest.memory)
    guest.go()
    assert guest.run() == []
    wrote = changed(before, bytes(guest.memory))
    assert LOAD >> 12 in wrote
    assert wrote <= pages(guest.vm.dirty_log(0))
    assert guest.vm.dirty_log(0) == bytes(RAM // PAGE // 8)


def test_page_tables_and_the_stack_of_an_exception_are_in_the_log(real_core, guests):
    """The walker's accessed and dirty bits, and what the delivery of #UD pushes (SDM 3A 4.8, 6.14)."""
    guest = guests(real_core)
    handler, idt, gdt, tss = 0x3000, 0x5000, 0x6000, 0x6800
    done = bytes.fromhex("baf00f0000 ee ebfe")
    guest.memory[handler : handler + len(done)] = done
    struct.pack_into("<HHBBHII", guest.memory, idt + 16 * 6, handler, 8, 0, 0x8E, 0, 0, 0)
    struct.pack_into("<QQQ", guest.memory, gdt, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    set_long(guest, bytes.fromhex("0f0b"))  # ud2
    vcpu = guest.vcpus[0]
    old = vcpu.system_registers()
    task = replace(old.tr, base=tss, limit=0x67, selector=0, type=11, s=0, present=1, unusable=0)
    vcpu.set_system_registers(replace(old, gdt=(gdt, 23), idt=(idt, 0xFFF), tr=task))
    vcpu.set_registers(Registers(rip=CODE, rsp=LOAD + 0x1010))
    before = bytes(guest.memory)
    guest.vm.start_dirty_log()
    guest.go()
    assert guest.run() == []
    wrote = changed(before, bytes(guest.memory))
    assert {LOAD >> 12} & wrote, "nothing was pushed"
    assert {0x10, 0x11, 0x12} & wrote, "no accessed bits were set"
    assert wrote <= pages(guest.vm.dirty_log(0))


@pytest.mark.parametrize("moment", ["msr", "entry", "stood still", "clock set"])
def test_what_the_core_writes_for_the_guest_is_in_the_log(real_core, guests, moment):
    """kvmclock's page (Linux Documentation/virt/kvm/x86/msr.rst)."""
    guest = guests(real_core, log_dirty=True)
    guest.load([PortOut(0x10, 1, 0), PortOut(0x10, 1, 1)])
    vcpu = guest.vcpus[0]
    guest.vm.dirty_log(0)
    before = bytes(guest.memory)
    vcpu.set_msr(0x4B56_4D01, SCRATCH | 1)
    if moment == "entry":
        vcpu.resume(RESUME)
        assert guest.next_exit() == (0, PortOut(0x10, 1, 0))
    elif moment != "msr":
        vcpu.resume(RESUME)
        assert guest.next_exit() == (0, PortOut(0x10, 1, 0))
        guest.vm.dirty_log(0)
        before = bytes(guest.memory)
        if moment == "stood still":
            vcpu.stood_still()
        else:
            guest.vm.set_state(guest.vm.state())
        vcpu.resume(RESUME)
        assert guest.next_exit() == (0, PortOut(0x10, 1, 1))
    assert changed(before, bytes(guest.memory)) <= pages(guest.vm.dirty_log(0))


def test_a_write_that_was_under_way_when_the_log_was_read_is_in_the_next(real_core, guests):
    """It begins in MMIO and ends in RAM: the vCPU waits in its first part while the log is read."""
    guest = guests(real_core)
    start = 0x20_0000
    ram = mmap.mmap(-1, 4 * PAGE)
    guest.vm.set_memory_slot(1, start, memoryview(ram), log_dirty=True)
    guest.load([MmioWrite(start - 2, 4, 0x4433_2211)])
    guest.vm.dirty_log(1)
    guest.go()
    assert guest.next_exit() == (0, MmioWrite(start - 2, 2, 0x2211))
    seen, early = bytes(ram[:2]), pages(guest.vm.dirty_log(1))
    guest.vcpus[0].resume(RESUME)
    assert guest.next_exit() == (0, PortOut(DONE, 1, 0))
    assert ram[:2] == b"\x33\x44"
    assert 0 in pages(guest.vm.dirty_log(1)) or (seen == ram[:2] and 0 in early)
    guest.vm.set_memory_slot(1, 0, None)
    ram.close()


# eax = 1; 1: eax = eax * 1103515245 + 12345; [LOAD + (eax >> 12 & 0x7fffc)] = eax; jmp 1b
SCATTER = bytes.fromhex("b801000000 69c06d4ec641 0539300000 89c1 c1e90c 81e1fcff0700 898100000400 ebe2")


def test_a_copy_that_follows_the_log_of_a_running_guest_equals_its_memory(core, guests):
    """As a live migration does it."""
    guest = guests(core)
    if guest.scripted:
        guest.load([StoreStep(LOAD + at * 0x3004 % 0x8_0000 & ~3, 4, at) for at in range(1, 3000)])
    else:
        guest.load_code(SCATTER)
    guest.vm.start_dirty_log()
    copy = bytearray(guest.memory)

    def follow() -> int:
        dirty = pages(guest.vm.dirty_log(0))
        for at in dirty:
            copy[at * PAGE : (at + 1) * PAGE] = guest.memory[at * PAGE : (at + 1) * PAGE]
        return len(dirty)

    guest.go()
    copied = rounds = 0
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end and (copied < 100 or rounds < 20):
        copied += follow()
        rounds += 1
    guest.vcpus[0].kick()
    guest.next_exit()
    copied += follow()
    assert copied >= 100
    assert copy == guest.memory[:]


def test_what_the_vmm_wrote_is_in_the_log(core, guests):
    guest = guests(core, log_dirty=True)
    guest.vm.dirty_log(0)
    guest.vm.memory_written(0x5FFF, 2)
    guest.vm.memory_written_ranges(struct.pack("=6Q", 0x9000, 1, 0xB000, 0x2001, 0xF_F000, 1 << 40))
    guest.vm.memory_written(1 << 30, 4096)  # not in a slot
    guest.vm.memory_written(0, 0)
    guest.vm.memory_written((1 << 64) - 1, (1 << 64) - 1)
    assert pages(guest.vm.dirty_log(0)) == {5, 6, 9, 0xB, 0xC, 0xD, 0xFF}
    assert pages(guest.vm.dirty_log(0)) == set()
    guest.vm.stop_dirty_log()
    guest.vm.memory_written(0x5000, 1)
    guest.vm.start_dirty_log()
    assert pages(guest.vm.dirty_log(0)) == set()


def test_the_log_of_all_slots_is_turned_on_and_off_while_vcpus_run(core, guests):
    guest = guests(core)
    rom, ram = mmap.mmap(-1, PAGE), mmap.mmap(-1, 70 * PAGE)
    guest.vm.set_memory_slot(3, 0x20_0000, memoryview(ram))
    guest.vm.set_memory_slot(5, 0x30_0000, memoryview(rom), readonly=True)
    if not guest.scripted:
        guest.load_code(SCATTER)
    guest.go()
    for _ in range(5):
        with pytest.raises(ConfigError):
            guest.vm.dirty_log(0)
        guest.vm.start_dirty_log()
        guest.vm.start_dirty_log()  # it is on
        end = time.monotonic() + DEADLINE_S
        while not guest.scripted and not pages(guest.vm.dirty_log(0)):
            assert time.monotonic() < end
        assert guest.vm.dirty_log(3) == bytes(16), "two words for 70 pages"
        with pytest.raises(ConfigError):
            guest.vm.dirty_log(5)
        guest.vm.stop_dirty_log()
        guest.vm.stop_dirty_log()
    guest.vcpus[0].kick()
    guest.next_exit()
    guest.vm.set_memory_slot(3, 0, None)
    guest.vm.set_memory_slot(5, 0, None)
    with pytest.raises(CpuError):
        guest.vm.dirty_log(3)
    guest.vm.close()
    with pytest.raises(StateError):
        guest.vm.start_dirty_log()
    rom.close()
    ram.close()


def test_translated_code_lives_on_when_the_log_is_turned_on(real_core, guests):
    """Self-modifying code is still noticed, logged or not."""
    guest = guests(real_core)
    # mov eax, 0; out 0x10, al; inc byte [CODE + 1]; cmp byte [CODE + 1], 6; jb CODE; DONE
    code = code32("b800000000 ba10000000 ee fe0501200000 803d01200000 06 72e6")
    guest.load_code(code)
    seen = []
    guest.go()
    for turn in range(6):
        index, exit_ = guest.next_exit()
        assert not isinstance(exit_, InternalError | MmioRead)
        seen.append(exit_)
        (guest.vm.start_dirty_log, guest.vm.stop_dirty_log)[turn % 2]()
        guest.vcpus[index].resume(RESUME)
    assert seen == [PortOut(0x10, 1, turn) for turn in range(6)]
