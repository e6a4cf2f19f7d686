"""Split rings: what a driver sees of them, and every way to be malformed. Both implementations."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from virtio import _ring
from virtio.constants import Feature
from virtio.driver import F_INDIRECT, F_NEXT, F_WRITE, Allocator, DriverQueue
from virtio.errors import GuestError, StateError
from virtio.fake import FakeMemory
from virtio.layouts import SplitDescriptor
from virtio.split import SplitRing

BASE = 0x4000
END = BASE + (1 << 20)


def native(memory: FakeMemory, *args: int) -> Any:
    return _ring.Ring(_ring.Memory(memory.regions(), memory.written), *args)


MAKERS: dict[str, Callable[..., Any]] = {"c": native, "python": SplitRing}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., tuple[Any, DriverQueue]]:
    def build(features: int = 0, size: int = 8) -> tuple[Any, DriverQueue]:
        memory = FakeMemory(1 << 20, BASE)
        queue = DriverQueue(Allocator(memory, BASE, END), size, features)
        return MAKERS[request.param](memory, size, queue.desc, queue.driver, queue.device, features), queue

    return build


Make = Callable[..., tuple[Any, DriverQueue]]


@pytest.mark.clause("2.7.8.2-b")
def test_a_chain_is_popped_read_written_and_returned(make: Make) -> None:
    ring, queue = make()
    a, b = queue.allocator.put(b"hello "), queue.allocator.put(b"world")
    room = queue.allocator.take(8)
    assert ring.pop() is None
    head = queue.add([(a, 6), (b, 5)], [(room, 4), (room + 4, 4)])
    chain = ring.pop()
    assert (chain.id, chain.readable_length, chain.writable_length) == (head, 11, 8)
    assert chain.read() == b"hello world"
    assert chain.read(5, 4) == b"o wor"
    assert chain.read(99, 11) == b""
    assert chain.write(b"abcdef") == 6
    assert chain.write(b"ghijk") == 2
    assert [bytes(view) for view in chain.readable()] == [b"hello ", b"world"]
    assert [bytes(view) for view in chain.writable()] == [b"abcd", b"efgh"]
    assert queue.used() == [], "what was written is there before the used index moves"
    ring.push(chain)
    (used,) = queue.used()
    assert (used.id, used.length) == (head, 8)
    assert bytes(queue.memory.view(room, 8)) == b"abcdefgh"
    assert ring.in_flight == 0
    with pytest.raises(StateError):
        chain.write(b"late")
    with pytest.raises(StateError):
        ring.push(chain)


def test_the_written_length_is_bounded_by_the_buffer(make: Make) -> None:
    ring, queue = make()
    queue.add([], [(queue.allocator.take(4), 4)])
    with pytest.raises(ValueError):
        ring.push(ring.pop(), 5)


@pytest.mark.clause("2.7.5.3.2-a", "2.7.5.3.2-b")
def test_indirect_after_direct_descriptors(make: Make) -> None:
    """2.7.5.3.2: zero or more normal descriptors, then one that refers to a table; its WRITE flag is
    ignored."""
    ring, queue = make(Feature.INDIRECT_DESC)
    data, room = queue.allocator.put(b"data"), queue.allocator.take(16)
    table = SplitDescriptor.build({"addr": data + 2, "len": 2, "flags": F_NEXT, "next": 1})
    table += SplitDescriptor.build({"addr": room, "len": 16, "flags": F_WRITE, "next": 7})
    queue.set_descriptor(0, data, 2, F_NEXT, 3)
    queue.set_descriptor(3, queue.allocator.put(table), len(table), F_INDIRECT | F_WRITE)
    queue.offer(0)
    chain = ring.pop()
    assert chain.read() == b"data" and chain.writable_length == 16
    assert chain.segments == ((data, 2, False), (data + 2, 2, False), (room, 16, True))


def test_completions_may_come_in_any_order(make: Make) -> None:
    ring, queue = make()
    heads = [queue.add([(queue.allocator.put(b"x"), 1)]) for _ in range(3)]
    chains = ring.pop_batch(10)
    for chain in reversed(chains):
        ring.push(chain)
    assert [used.id for used in queue.used()] == heads[::-1]


@pytest.mark.clause("6.2-b")
def test_in_order_holds_completions_back(make: Make) -> None:
    """2.7.9: with VIRTIO_F_IN_ORDER buffers are used in the order in which they were made available."""
    ring, queue = make(Feature.IN_ORDER)
    heads = [queue.add([(queue.allocator.put(b"x"), 1)]) for _ in range(3)]
    first, second, third = ring.pop_batch(3)
    ring.push(third)
    ring.push(second)
    assert queue.used() == [] and ring.in_flight == 3
    ring.push(first)
    assert [used.id for used in queue.used()] == heads
    heads = [queue.add([(queue.allocator.put(b"x"), 1)]) for _ in range(3)]
    first, second, third = ring.pop_batch(3)
    ring.push_batch([(first, 0), (third, 0), (second, 0)])
    assert [used.id for used in queue.used()] == heads


def test_push_batch_and_undo(make: Make) -> None:
    ring, queue = make()
    heads = [queue.add([], [(queue.allocator.take(4), 4)]) for _ in range(3)]
    chains = ring.pop_batch(3)
    with pytest.raises(ValueError):
        ring.undo_pop(chains[0])
    ring.undo_pop(chains[2])
    assert ring.in_flight == 2
    ring.push_batch([(chains[0], 1), (chains[1], 4)])
    assert [(used.id, used.length) for used in queue.used()] == [(heads[0], 1), (heads[1], 4)]
    assert ring.pop().id == heads[2]


def used_flags(queue: DriverQueue) -> int:
    return int.from_bytes(queue.memory.view(queue.device, 2), "little")


@pytest.mark.clause("2.7.7.2-a", "2.7.7.2-b", "2.7.10.2-a")
def test_suppression_by_flags(make: Make) -> None:
    """2.7.7, 2.7.10: without EVENT_IDX, flags decide on both sides."""
    ring, queue = make()
    queue.memory.view(queue.driver + 4 + 2 * queue.size, 2)[:] = b"\x77\x77"  # where used_event would be
    assert used_flags(queue) == 0
    queue.add([(queue.allocator.put(b"x"), 1)])
    assert queue.needs_notification()
    ring.disable_notification()
    assert used_flags(queue) == 1
    ring.push(ring.pop())
    assert ring.needs_notification()
    assert not ring.needs_notification(), "nothing new was pushed"
    queue.used()
    queue.no_interrupts(True)
    queue.add([(queue.allocator.put(b"x"), 1)])
    assert not queue.needs_notification()
    assert ring.enable_notification(), "one came while notifications were off"
    assert used_flags(queue) == 0
    ring.push(ring.pop())
    assert not ring.needs_notification()
    assert not ring.enable_notification()


@pytest.mark.clause("2.7.7.2-c", "2.7.7.2-d")
def test_suppression_by_event_index(make: Make) -> None:
    """2.7.7.2, 2.7.10: used_event and avail_event."""
    ring, queue = make(Feature.EVENT_IDX)
    queue.memory.view(queue.driver, 2)[:] = b"\1\0"  # flags, which mean nothing now
    buffer = (queue.allocator.put(b"x"), 1)
    queue.add([buffer])
    assert queue.needs_notification()
    queue.add([buffer])
    assert not queue.needs_notification(), "avail_event was passed already"
    ring.push(ring.pop())
    assert ring.needs_notification(), "used_event is 0"
    ring.push(ring.pop())
    assert not ring.needs_notification(), "the driver has not moved used_event"
    queue.used()
    assert not ring.enable_notification()
    queue.add([buffer])
    assert queue.needs_notification()
    queue.no_interrupts(True)
    ring.push(ring.pop())
    assert not ring.needs_notification()


@pytest.mark.clause("2.7.10.2-b")
def test_flags_stay_zero_with_event_index(make: Make) -> None:
    """2.7.10.2, also if the driver left something in them."""
    memory = FakeMemory(1 << 20, BASE)
    queue = DriverQueue(Allocator(memory, BASE, END), 8, Feature.EVENT_IDX)
    for maker in MAKERS.values():
        memory.view(queue.device, 2)[:] = b"\xff\xff"
        ring = maker(memory, 8, queue.desc, queue.driver, queue.device, Feature.EVENT_IDX)
        for call in (ring.disable_notification, ring.enable_notification, ring.want_more, ring.disable_notification):
            call()
            assert used_flags(queue) == 0


@pytest.mark.clause("2.7.5.1-a", "2.7.5.1-b")
def test_only_writable_buffers_and_the_used_ring_are_written(make: Make) -> None:
    ring, queue = make(Feature.INDIRECT_DESC)
    memory = queue.memory
    source, room = queue.allocator.put(b"read only"), queue.allocator.take(64)
    for _ in range(20):
        queue.add([(source, 9)], [(room, 32), (room + 32, 32)], indirect=True)
        queue.add([(source, 4)], [(room, 16)])
        before = bytes(memory.bytes)
        for chain in ring.pop_batch(2):
            chain.write(b"w" * 64)
            ring.push(chain)
        ring.enable_notification()
        after = bytes(memory.bytes)
        allowed = {*range(room - BASE, room - BASE + 64), *range(queue.device - BASE, queue.device - BASE + 6 + 64)}
        assert {at for at in range(len(before)) if before[at] != after[at]} <= allowed
        assert before != after
        queue.used()


def test_want_more_asks_beyond_what_is_available(make: Make) -> None:
    ring, queue = make(Feature.EVENT_IDX)
    buffer = (queue.allocator.put(b"x"), 1)
    queue.add([buffer])
    queue.needs_notification()
    ring.want_more()
    queue.add([buffer])
    assert queue.needs_notification()


def test_indices_wrap_at_2_16(make: Make) -> None:
    ring, queue = make(Feature.EVENT_IDX, 4)
    buffer = (queue.allocator.put(b"x"), 1)
    for _ in range(0x10000 + 9):
        queue.add([buffer])
        ring.push(ring.pop())
        assert ring.needs_notification()
        assert len(queue.used()) == 1
    assert ring.save()["next_avail"] == 9


def test_save_needs_an_idle_ring_and_restores(make: Make) -> None:
    ring, queue = make()
    queue.add([(queue.allocator.put(b"x"), 1)])
    chain = ring.pop()
    with pytest.raises(StateError):
        ring.save()
    ring.push(chain)
    state = ring.save()
    assert state == {"next_avail": 1, "next_used": 1, "avail_wrap": True, "used_wrap": True}
    ring.restore(**state)
    with pytest.raises(ValueError):
        ring.restore(0x10000, 0)


def test_after_close_nothing_touches_memory(make: Make) -> None:
    ring, queue = make()
    room = queue.allocator.take(4)
    queue.add([], [(room, 4)])
    chain = ring.pop()
    ring.close()
    for call in (lambda: chain.write(b"late"), chain.writable, lambda: ring.push(chain), ring.pop):
        with pytest.raises(StateError):
            call()
    assert queue.used() == []


@pytest.mark.parametrize("at_once", [False, True])
def test_the_c_path_reports_what_it_wrote(at_once: bool) -> None:
    """Range by range, or all of a chain's in one call where the memory takes that."""
    memory = FakeMemory(1 << 20, BASE)
    calls: list[list[tuple[int, int]]] = []

    def ranges(packed: bytes) -> None:
        calls.append(list(struct.iter_unpack("=QQ", packed)))
        memory.log += calls[-1]

    native_memory = _ring.Memory(memory.regions(), memory.written, ranges if at_once else None)
    queue = DriverQueue(Allocator(memory, BASE, END), 8)
    ring = _ring.Ring(native_memory, 8, queue.desc, queue.driver, queue.device)
    area = (queue.device, 6 + 64)
    assert memory.log == [area]  # it wrote used->flags
    memory.log.clear()
    room = queue.allocator.take(12)
    queue.add([], [(room, 4), (room + 4, 4), (room + 8, 4)])
    chain = ring.pop()
    assert chain is not None
    chain.write(b"12345")
    ring.push(chain)
    ring.needs_notification()
    assert memory.log == [(room, 4), (room + 4, 1), area]
    assert calls == ([[(room, 4), (room + 4, 1)]] if at_once else [])
    memory.log.clear()
    ring.disable_notification()
    assert memory.log == [area]
    queue.add([], [(room, 4), (room + 4, 8)])
    chain = ring.pop()
    assert chain is not None
    assert len(chain.writable()) == 2
    ring.push(chain, 0)  # what the holder of the views wrote nobody knows
    assert memory.log == [area, (room, 4), (room + 4, 8)]


@pytest.mark.parametrize(
    ("size", "offsets", "message"),
    [
        (0, (0, 0, 0), "size"),
        (3, (0, 0, 0), "size"),
        (65536, (0, 0, 0), "size"),
        (8, (8, 0, 0), "aligned"),
        (8, (0, 1, 0), "aligned"),
        (8, (0, 0, 2), "aligned"),
        (8, (END - BASE - 16, 0, 0), "outside"),
        (8, (0, END - BASE, 0), "outside"),
        (8, (0, 0, 2**64 - BASE), "outside"),
    ],
)
@pytest.mark.parametrize("kind", MAKERS)
def test_queue_areas_are_checked(kind: str, size: int, offsets: tuple[int, int, int], message: str) -> None:
    memory = FakeMemory(1 << 20, BASE)
    with pytest.raises(GuestError, match=message):
        MAKERS[kind](memory, size, *((BASE + offset) % 2**64 for offset in offsets), 0)


def test_memory_views_are_bounded() -> None:
    memory = _ring.Memory([(0, bytearray(16)), (0x100, bytearray(16))])
    memory.view(0x108, 8)[:] = b"12345678"
    assert bytes(memory.view(0x10E, 2)) == b"78"
    for gpa, length in ((8, 9), (16, 1), (0xFF, 1), (0x110, 1), (2**64 - 1, 2)):
        with pytest.raises(GuestError):
            memory.view(gpa, length)
