"""cpu/contract.py: exits and their answers; posted writes, shadow reads, ioeventfds. Every core."""

import os
import select
import time

import pytest

from cpu.contract import Capability, Space
from cpu.errors import ConfigError, StateError
from cpu.exits import CompleteRead, InternalError, MmioRead, MmioWrite, PortIn, PortOut, Posted, Resume, Shutdown
from tests.support.cores import CODE, DEADLINE_S, DONE, MMIO, RESUME, set_long

SIZES = [1, 2, 4]
VALUE = 0x8899_AABB


def cut(value, size):
    return value & (1 << 8 * size) - 1


@pytest.mark.parametrize("size", SIZES)
def test_a_port_write_arrives_with_its_size_and_value(core, guests, size):
    guest = guests(core)
    guest.load([PortOut(0x3F8, size, cut(VALUE, size))])
    guest.go()
    assert guest.run() == [(0, PortOut(0x3F8, size, cut(VALUE, size)))]


@pytest.mark.parametrize("size", SIZES)
def test_a_port_read_yields_the_answer_truncated_to_its_size(core, guests, size):
    guest = guests(core)
    guest.load([PortIn(0x60, size), PortIn(0x64, size)])
    guest.go()
    answers = {0x60: VALUE | 1 << 40, 0x64: 0x11}
    assert guest.run(lambda exit_: answers[exit_.port]) == [(0, PortIn(0x60, size)), (0, PortIn(0x64, size))]
    assert guest.answers == [cut(VALUE, size), 0x11]


@pytest.mark.parametrize("size", SIZES)
def test_mmio_arrives_and_reads_yield_the_answer(core, guests, size):
    guest = guests(core)
    guest.load([MmioWrite(MMIO + 8, size, cut(VALUE, size)), MmioRead(MMIO + 4, size)])
    guest.go()
    seen = guest.run(lambda _: VALUE)
    assert seen == [(0, MmioWrite(MMIO + 8, size, cut(VALUE, size))), (0, MmioRead(MMIO + 4, size))]
    assert guest.answers == [cut(VALUE, size)]


@pytest.mark.parametrize("port", [0x40, 0x43, 0x61])
def test_ports_of_a_pit_that_is_not_there_are_exits(core, guests, port):
    guest = guests(core, pit=False)
    guest.load([PortOut(port, 1, 0x34), PortIn(port, 1)])
    guest.go()
    assert guest.run(lambda _: 0x5A) == [(0, PortOut(port, 1, 0x34)), (0, PortIn(port, 1))]
    assert guest.answers == [0x5A]


def test_a_triple_fault_is_a_shutdown(core, guests):
    guest = guests(core)
    guest.load([PortOut(0x80, 1, 1), Shutdown()])
    guest.go()
    assert guest.run(until=Shutdown) == [(0, PortOut(0x80, 1, 1))]


def test_string_output_is_one_exit_an_element(real_core, guests):
    guest = guests(real_core)
    guest.memory[0x9000:0x9006] = b"abcdef"
    # mov esi, 0x9000; mov ecx, 3; mov edx, 0x10; rep outsw; mov edx, DONE; out dx, al; jmp $
    guest.load_code(bytes.fromhex("be00900000 b903000000 ba10000000 66f36f baf00f0000 ee ebfe"))
    guest.go()
    assert guest.run() == [(0, PortOut(0x10, 2, int.from_bytes(pair, "little"))) for pair in (b"ab", b"cd", b"ef")]


def test_string_input_fills_memory(real_core, guests):
    guest = guests(real_core)
    # mov edi, 0x9000; mov ecx, 4; mov edx, 0x10; rep insb; mov edx, DONE; out dx, al; jmp $
    guest.load_code(bytes.fromhex("bf00900000 b904000000 ba10000000 f36c baf00f0000 ee ebfe"))
    guest.go()
    values = iter(b"wxyz")
    seen = guest.run(lambda _: next(values))
    assert seen == [(0, PortIn(0x10, 1))] * 4
    assert guest.memory[0x9000:0x9004] == b"wxyz"


def test_mmio_of_eight_bytes(real_core, guests):
    guest = guests(real_core)
    # mov rax, 0x1122334455667788; mov rbx, MMIO; mov [rbx], rax; mov rcx, [rbx + 8]; mov [0x9000], rcx; DONE
    set_long(
        guest,
        bytes.fromhex("48b88877665544332211 48bb000000e000000000 488903 488b4b08 48890c2500900000 baf00f0000 ee ebfe"),
    )
    guest.go()
    value = 0xFEDC_BA98_7654_3210
    assert guest.run(lambda _: value) == [(0, MmioWrite(MMIO, 8, 0x1122_3344_5566_7788)), (0, MmioRead(MMIO + 8, 8))]
    assert int.from_bytes(guest.memory[0x9000:0x9008], "little") == value


def test_an_instruction_that_the_core_cannot_execute_is_told_with_its_bytes(real_core, guests):
    if Capability.STOCK_KERNELS in real_core.capabilities():
        pytest.skip(f"{real_core.name} executes everything that stock kernels use")
    guest = guests(real_core, finish=False)
    code = bytes.fromhex("d9e8 d8c0")  # fld1; fadd st, st0
    guest.load_code(code)
    guest.go()
    index, exit_ = guest.next_exit()
    assert isinstance(exit_, InternalError)
    assert exit_.suberror == 1
    assert CODE <= exit_.rip < CODE + len(code)
    assert exit_.instruction.startswith(code[exit_.rip - CODE :])


def test_an_answer_must_fit_the_exit(core, guests):
    guest = guests(core)
    guest.load([PortIn(0x60, 1), PortOut(0x62, 1, 0)])
    guest.go()
    assert guest.next_exit() == (0, PortIn(0x60, 1))
    with pytest.raises(StateError):
        guest.vcpus[0].resume(Resume())
    guest.vcpus[0].resume(CompleteRead(5))
    assert guest.next_exit() == (0, PortOut(0x62, 1, 0))
    with pytest.raises(StateError):
        guest.vcpus[0].resume(CompleteRead(5))
    with pytest.raises(TypeError):
        guest.vcpus[0].resume(5)


# ---- posted ----


def test_posted_writes_stand_before_the_exit_that_follows_them_and_are_merged(core, guests):
    guest = guests(core)
    guest.vm.add_posted(Space.PORT, 0x3F8, 1, 7)
    guest.vm.add_posted(Space.PORT, 0x3F8, 2, 8)
    guest.vm.add_posted(Space.MMIO, MMIO, 4, 9)
    guest.load(
        [
            *(PortOut(0x3F8, 1, byte) for byte in b"hello"),
            PortOut(0x3F8, 2, 0x1234),
            MmioWrite(MMIO, 4, VALUE),
            MmioWrite(MMIO, 4, 5),
            PortOut(0x3F8, 1, 0x21),
            PortOut(0x80, 1, 1),
            PortOut(0x3F8, 4, VALUE),
        ]
    )
    guest.go()
    seen = guest.run()
    joined: list[object] = []
    for item in seen:  # how the writes are split over take() calls is timing
        last = joined[-1] if joined else None
        if isinstance(item, Posted) and isinstance(last, Posted) and (last.tag, last.size) == (item.tag, item.size):
            joined[-1] = Posted(item.tag, item.size, last.data + item.data)
        else:
            joined.append(item)
    assert joined == [
        Posted(7, 1, b"hello"),
        Posted(8, 2, b"\x34\x12"),
        Posted(9, 4, VALUE.to_bytes(4, "little") + b"\5\0\0\0"),
        Posted(7, 1, b"!"),
        (0, PortOut(0x80, 1, 1)),
        (0, PortOut(0x3F8, 4, VALUE)),
    ]
    assert guest.vm.stats()["posted"] == 9


def test_a_removed_posted_address_exits_again(core, guests):
    guest = guests(core)
    guest.vm.add_posted(Space.PORT, 0x3F8, 1, 7)
    with pytest.raises(ConfigError):
        guest.vm.add_posted(Space.PORT, 0x3F8, 1, 8)
    guest.vm.remove_posted(Space.PORT, 0x3F8, 1)
    with pytest.raises(ConfigError):
        guest.vm.remove_posted(Space.PORT, 0x3F8, 1)
    guest.load([PortOut(0x3F8, 1, 0x41)])
    guest.go()
    assert guest.run() == [(0, PortOut(0x3F8, 1, 0x41))]


def test_a_flood_of_posted_writes_is_bounded_and_complete(core, guests):
    """The guest outruns a loop that does not look: it waits, nothing is lost, order is kept."""
    guest = guests(core)
    guest.vm.add_posted(Space.PORT, 0x10, 2, 1)
    count = 20000
    if guest.scripted:
        guest.load([PortOut(0x10, 2, at & 0xFFFF) for at in range(count)])
    else:
        # mov ecx, count; mov edx, 0x10; xor eax, eax; 1: out dx, ax; inc eax; dec ecx; jnz 1b; DONE
        guest.load_code(bytes.fromhex("b9204e0000 ba10000000 31c0 66ef 40 49 75fa baf00f0000 ee ebfe"))
    guest.go()
    data = b"".join(item.data for item in guest.run() if isinstance(item, Posted))
    assert data == b"".join((at & 0xFFFF).to_bytes(2, "little") for at in range(count))


@pytest.mark.parametrize("address", [0x10000, 1 << 20])
def test_ports_end_at_ffff(core, guests, address):
    with pytest.raises(ConfigError):
        guests(core).vm.add_posted(Space.PORT, address, 1, 0)


@pytest.mark.parametrize("size", [0, 3, 16, -1])
def test_only_sizes_of_accesses_are_taken(core, guests, size):
    guest = guests(core)
    with pytest.raises(ConfigError):
        guest.vm.add_posted(Space.PORT, 0x10, size, 0)
    with pytest.raises(ConfigError):
        guest.vm.add_shadow(Space.MMIO, MMIO, size)


# ---- shadow ----


def test_a_shadow_answers_once_it_is_set_and_until_it_is_invalidated(core, guests):
    guest = guests(core)
    shadow = guest.vm.add_shadow(Space.PORT, 0x3FD, 1)
    guest.load([PortIn(0x3FD, 1), PortIn(0x3FD, 1), PortIn(0x3FD, 2), PortOut(0x80, 1, 1), PortIn(0x3FD, 1)])
    guest.go()
    assert guest.next_exit() == (0, PortIn(0x3FD, 1))
    shadow.set(0x160)
    guest.vcpus[0].resume(CompleteRead(1))
    assert guest.next_exit() == (0, PortIn(0x3FD, 2))
    guest.vcpus[0].resume(CompleteRead(2))
    assert guest.next_exit() == (0, PortOut(0x80, 1, 1))
    shadow.invalidate()
    guest.vcpus[0].resume(RESUME)
    assert guest.next_exit() == (0, PortIn(0x3FD, 1))
    guest.vcpus[0].resume(CompleteRead(3))
    assert guest.next_exit() == (0, PortOut(DONE, 1, 0))
    assert guest.answers == [1, 0x60, 2, 3]
    assert guest.vm.stats()["shadow"] == 1


def test_a_read_to_clear_shadow_switches_by_itself_and_tells(core, guests):
    guest = guests(core)
    shadow = guest.vm.add_shadow(Space.MMIO, MMIO + 0x60, 4, 42)
    shadow.set(3, after=0)
    guest.load([MmioRead(MMIO + 0x60, 4), MmioRead(MMIO + 0x60, 4)])
    guest.go()
    assert guest.run() == [Posted(42, 4, b"")]
    assert guest.answers == [3, 0]


def test_a_removed_shadow_exits_and_its_handle_is_dead(core, guests):
    guest = guests(core)
    shadow = guest.vm.add_shadow(Space.PORT, 0x71, 1)
    with pytest.raises(ConfigError):
        guest.vm.add_shadow(Space.PORT, 0x71, 1)
    shadow.set(1)
    guest.vm.remove_shadow(Space.PORT, 0x71, 1)
    for use in (lambda: shadow.set(1), shadow.invalidate):
        with pytest.raises(ConfigError):
            use()
    guest.load([PortIn(0x71, 1)])
    guest.go()
    assert guest.run(lambda _: 9) == [(0, PortIn(0x71, 1))]


# ---- ioeventfd ----


@pytest.fixture
def eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("space", [Space.PORT, Space.MMIO])
def test_an_ioeventfd_takes_matching_writes_only(core, guests, eventfd, space):
    guest = guests(core)
    address = 0x100 if space is Space.PORT else MMIO
    write = PortOut if space is Space.PORT else MmioWrite
    guest.vm.add_ioeventfd(eventfd, space, address, 2, 5)
    guest.load([write(address, 2, 5), write(address, 2, 6), write(address, 4, 5), write(address, 2, 5)])
    guest.go()
    assert guest.run() == [(0, write(address, 2, 6)), (0, write(address, 4, 5))]
    assert os.eventfd_read(eventfd) == 2


def test_an_ioeventfd_without_match_takes_any_value_of_its_size(core, guests, eventfd):
    guest = guests(core)
    guest.vm.add_ioeventfd(eventfd, Space.MMIO, MMIO, 4)
    guest.load([MmioWrite(MMIO, 4, 1), MmioWrite(MMIO, 4, 2), MmioWrite(MMIO, 1, 3)])
    guest.go()
    assert guest.run() == [(0, MmioWrite(MMIO, 1, 3))]
    assert os.eventfd_read(eventfd) == 2


def test_an_ioeventfd_of_size_zero_takes_any_size(core, guests, eventfd):
    guest = guests(core)
    guest.vm.add_ioeventfd(eventfd, Space.MMIO, MMIO, 0)
    guest.load([MmioWrite(MMIO, 1, 1), MmioWrite(MMIO, 2, 2), MmioWrite(MMIO, 4, 3)])
    guest.go()
    assert guest.run() == []
    assert os.eventfd_read(eventfd) == 3


def test_a_removed_ioeventfd_exits_again(core, guests, eventfd):
    guest = guests(core)
    guest.vm.add_ioeventfd(eventfd, Space.PORT, 0x100, 2, 5)
    with pytest.raises(ConfigError):
        guest.vm.add_ioeventfd(eventfd, Space.PORT, 0x100, 2, 5)
    guest.vm.remove_ioeventfd(eventfd, Space.PORT, 0x100, 2, 5)
    with pytest.raises(ConfigError):
        guest.vm.remove_ioeventfd(eventfd, Space.PORT, 0x100, 2, 5)
    guest.load([PortOut(0x100, 2, 5)])
    guest.go()
    assert guest.run() == [(0, PortOut(0x100, 2, 5))]
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_an_ioeventfd_must_be_an_open_descriptor(core, guests):
    with pytest.raises(ConfigError):
        guests(core).vm.add_ioeventfd(999_999, Space.PORT, 0x100, 2)


@pytest.fixture
def one_processor():
    """What this process starts has one processor for all of its threads."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("then", ["spins", "halts", "exits"])
def test_no_write_to_an_ioeventfd_is_lost_where_one_processor_does_all(real_core, guests, eventfd, one_processor, then):
    """The core may put off telling the descriptor there, but not beyond what a guest that goes on would wait for."""
    guest = guests(real_core)
    pauses = 30_000 if real_core.name == "soft" else 100  # long enough that the test waits for the next one
    rings = 1000
    guest.vm.add_ioeventfd(eventfd, Space.MMIO, MMIO, 4)
    ring = b"\xa3" + MMIO.to_bytes(4, "little")
    pause = b"\xba" + pauses.to_bytes(4, "little") + bytes.fromhex("4a 75fd")  # mov edx, pauses; dec edx; jnz
    body = ring + pause + b"\x49"  # dec ecx
    loop = b"\xb9" + rings.to_bytes(4, "little") + body + bytes([0x75, 0x100 - len(body) - 2])
    ends = {"spins": b"\xeb\xfe", "halts": b"\xfb\xf4\xeb\xfe", "exits": bytes.fromhex("baf00f0000 ee ebfe")}
    guest.load_code(loop + ends[then])
    guest.go()
    heard, deadline = 0, time.monotonic() + DEADLINE_S
    while heard < rings:
        assert select.select([eventfd], [], [], deadline - time.monotonic())[0], f"{heard} of {rings}"
        heard += os.eventfd_read(eventfd)
    assert heard == rings
