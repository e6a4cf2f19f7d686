"""Packed rings (2.8): what a driver sees of them. Both implementations."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.rings import BASE, RIGS
from virtio.constants import Feature
from virtio.driver import EVENT_DESC, EVENT_DISABLE, F_AVAIL, F_INDIRECT, F_USED, F_WRITE, PackedDriverQueue
from virtio.layouts import PackedDescriptor, fast

_packed = fast(PackedDescriptor)


class World:
    """A ring of 8 with the driver's side of it."""

    def __init__(self, implementation: str, features: int = 0, size: int = 8) -> None:
        self.ring: Any
        self.ring, queue = RIGS[f"packed-{implementation}"].make(features, size)
        assert isinstance(queue, PackedDriverQueue)
        self.queue = queue
        self.memory = queue.memory

    def raw(self, index: int) -> tuple[int, int, int, int]:
        """addr, len, id, flags"""
        fields = _packed.unpack(self.memory.view(self.queue.desc + 16 * index, 16))
        return fields[0], fields[1], fields[2], fields[3]

    def text(self, data: bytes) -> tuple[int, int]:
        return self.queue.allocator.put(data), len(data)

    def room(self, length: int) -> tuple[int, int]:
        return self.queue.allocator.take(length), length


@pytest.fixture(params=["c", "python"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.clause("2.8.12-a", "2.8.12-b")
def test_taken_in_ring_order_used_in_order_of_completion(kind: str) -> None:
    world = World(kind)
    ids = [world.queue.add([world.text(bytes([letter]))]) for letter in b"abcd"]
    chains = world.ring.pop_batch(9)
    assert [chain.read() for chain in chains] == [b"a", b"b", b"c", b"d"]
    assert [chain.id for chain in chains] == ids
    for index in (2, 0, 3, 1):
        world.ring.push(chains[index])
    assert [used.id for used in world.queue.used()] == [ids[index] for index in (2, 0, 3, 1)]


@pytest.mark.clause("2.8.18-a", "2.8.15-a")
def test_lists_keep_their_order_and_readable_parts_their_content(kind: str) -> None:
    world = World(kind, Feature.INDIRECT_DESC)
    for indirect in (False, True):
        parts = [world.text(b"one "), world.text(b"two "), world.text(b"three")]
        rooms = [world.room(3), world.room(5)]
        world.queue.add(parts, rooms, indirect=indirect)
        chain = world.ring.pop()
        assert chain.read() == b"one two three"
        assert chain.segments == tuple((*part, False) for part in parts) + tuple((*room, True) for room in rooms)
        assert chain.write(b"written!overflow") == 8
        world.ring.push(chain)
        assert b"".join(bytes(world.memory.view(*room)) for room in rooms) == b"written!"
        assert [bytes(world.memory.view(*part)) for part in parts] == [b"one ", b"two ", b"three"]
        assert [used.length for used in world.queue.used()] == [8]


@pytest.mark.clause("2.8.15-b")
def test_a_descriptor_is_used_only_after_its_avail_bit_changed(kind: str) -> None:
    world = World(kind)
    assert world.ring.pop() is None, "zeroes are not available"
    for flags in (F_AVAIL | F_USED, F_USED, 0):
        world.queue.set_descriptor(0, BASE, 4, flags)
        assert world.ring.pop() is None and not world.ring.has_available()
    for lap in range(3):
        for _ in range(8):
            assert world.ring.pop() is None, "what was available in the lap before is not in this one"
            world.queue.add([world.text(b"x")])
            world.ring.push(world.ring.pop())
        assert len(world.queue.used()) == 8, lap


@pytest.mark.clause("2.8.15-c", "2.8.1-a", "2.8.3-a")
def test_used_descriptors_are_whole_and_final(kind: str) -> None:
    """Marked by the device's wrap counter; WRITE tells whether anything was written; nothing changes afterwards."""
    world = World(kind)
    for lap in range(3):
        for index in range(0, 8, 2):
            first = world.queue.add([world.text(b"x")], [world.room(10)])
            chain = world.ring.pop()
            wrote = chain.write(b"abc") if index % 4 else 0
            world.ring.push(chain)
            _, length, number, flags = world.raw(index)
            assert (length, number) == (wrote, first)
            assert flags & (F_AVAIL | F_USED) == (0 if lap % 2 else F_AVAIL | F_USED)
            assert bool(flags & F_WRITE) == bool(wrote)
            final = bytes(world.memory.view(world.queue.desc + 16 * index, 16))
            world.ring.enable_notification()
            world.ring.needs_notification()
            world.ring.disable_notification()
            assert bytes(world.memory.view(world.queue.desc + 16 * index, 16)) == final
        assert len(world.queue.used()) == 4


@pytest.mark.clause("2.8.15-c")
def test_a_batch_appears_at_once(kind: str) -> None:
    """2.8.9: the first of several is marked last, so that the driver never sees a part."""
    world = World(kind)
    ids = [world.queue.add([], [world.room(4)]) for _ in range(3)]
    world.ring.push_batch([(chain, 4) for chain in world.ring.pop_batch(3)])
    assert [(used.id, used.length) for used in world.queue.used()] == [(number, 4) for number in ids]


@pytest.mark.clause("2.8.7-a")
def test_an_indirect_table_knows_the_write_flag_alone(kind: str) -> None:
    """Other flags and the buffer IDs within are ignored, and so is WRITE of the descriptor that refers to it."""
    world = World(kind, Feature.INDIRECT_DESC)
    data, room = world.text(b"data"), world.room(4)
    table = _packed.pack(*data, 77, 0x8080 | 1) + _packed.pack(*room, 78, F_WRITE | 0x80)
    world.queue.set_descriptor(0, world.queue.allocator.put(table), len(table), F_INDIRECT | F_WRITE, 5)
    world.queue.offer(0)
    chain = world.ring.pop()
    assert (chain.id, chain.slots) == (5, 1)
    assert chain.segments == ((*data, False), (*room, True))


def wish(world: World) -> tuple[int, int]:
    """(offset and wrap counter, flags) of the device's event suppression."""
    value = int.from_bytes(world.memory.view(world.queue.device, 4), "little")
    return value & 0xFFFF, value >> 16


@pytest.mark.clause("2.8.10-a")
def test_event_suppression(kind: str) -> None:
    """2.8.10, 2.8.14: ENABLE, DISABLE, DESC; 3 is reserved and asks for nothing less than ENABLE."""
    world = World(kind, Feature.EVENT_IDX)
    driver = world.memory.view(world.queue.driver, 4).cast("I")

    def notified(event: int) -> bool:
        driver[0] = event
        world.queue.add([world.text(b"x")])
        world.ring.push(world.ring.pop())
        result: bool = world.ring.needs_notification()
        world.queue.used()
        return result

    for at, (event, expected) in enumerate((
        (0, True),
        (EVENT_DISABLE << 16, False),
        (EVENT_DESC << 16 | 0x8000 | 2, True),
        (EVENT_DESC << 16 | 0x8000 | 2, False),  # passed already
        (EVENT_DESC << 16 | 0x8000 | 6, False),
        (3 << 16, True),
        (EVENT_DESC << 16 | 0x8000 | 6, True),
        (EVENT_DESC << 16 | 7, False),  # of the next lap
        (EVENT_DESC << 16 | 0, True),
    )):  # fmt: skip
        assert notified(event) == expected, at
    world.ring.disable_notification()
    assert wish(world)[1] == EVENT_DISABLE
    assert not world.ring.enable_notification()
    assert wish(world) == (1, EVENT_DESC), "the next descriptor, with the wrap counter of the second lap"
    world.ring.want_more()
    assert wish(world)[1] == 0


def test_without_event_index_descriptor_events_are_not_asked_for(kind: str) -> None:
    world = World(kind)
    assert not world.ring.enable_notification()
    assert wish(world)[1] == 0
    world.memory.view(world.queue.driver, 4).cast("I")[0] = EVENT_DESC << 16 | 5
    world.queue.add([world.text(b"x")])
    world.ring.push(world.ring.pop())
    assert world.ring.needs_notification(), "the offset is valid only if VIRTIO_F_EVENT_IDX was negotiated"


@pytest.mark.clause("6.2-b")
def test_in_order_holds_completions_back(kind: str) -> None:
    world = World(kind, Feature.IN_ORDER)
    ids = [world.queue.add([world.text(b"x")]) for _ in range(4)]
    chains = world.ring.pop_batch(4)
    for index in (3, 1):
        world.ring.push(chains[index])
    assert world.queue.used() == []
    world.ring.push(chains[0])
    assert [used.id for used in world.queue.used()] == ids[:2]
    world.ring.push(chains[2])
    assert [used.id for used in world.queue.used()] == ids[2:]
    ids = [world.queue.add([world.text(b"x")]) for _ in range(3)]
    chains = world.ring.pop_batch(3)
    world.ring.push_batch([(chains[index], 0) for index in (0, 2, 1)])
    assert [used.id for used in world.queue.used()] == ids


def test_a_size_that_is_no_power_of_two(kind: str) -> None:
    world = World(kind, Feature.EVENT_IDX, 5)
    for number in range(40):
        rooms = [world.room(4) for _ in range(1 + number % 3)]
        world.queue.add([], rooms)
        chain = world.ring.pop()
        chain.write(b"abcd")
        world.ring.push(chain)
        assert world.ring.needs_notification()
        (used,) = world.queue.used()
        assert used.length == 4


def test_undo_across_the_end_of_the_ring(kind: str) -> None:
    world = World(kind)
    for _ in range(7):
        world.queue.add([world.text(b"x")])
        world.ring.push(world.ring.pop())
    world.queue.used()
    number = world.queue.add([world.text(b"a"), world.text(b"b")])
    for _ in range(3):
        chain = world.ring.pop()
        assert (chain.id, chain.slots, world.ring.next_avail) == (number, 2, 1)
        world.ring.undo_pop(chain)
        assert world.ring.next_avail == 7 and world.ring.in_flight == 0
    world.ring.push(world.ring.pop())
    assert [used.id for used in world.queue.used()] == [number]


def test_state(kind: str) -> None:
    world = World(kind)
    for _ in range(11):
        world.queue.add([world.text(b"x")])
        world.ring.push(world.ring.pop())
        world.queue.used()
    state = world.ring.save()
    assert state == {"next_avail": 3, "next_used": 3, "avail_wrap": False, "used_wrap": False}
    other = RIGS[f"packed-{kind}"].ring(world.queue)
    other.restore(**state)
    number = world.queue.add([world.text(b"moved")])
    chain = other.pop()
    assert chain.read() == b"moved"
    other.push(chain)
    assert [used.id for used in world.queue.used()] == [number]
    with pytest.raises(ValueError):
        other.restore(8, 0)
