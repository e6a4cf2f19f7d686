"""The rings in C and in Python do the same, whatever a driver does to them; nothing but GuestError comes out.

VIRTIO_EXAMPLES is the number of examples per test (default 150).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtio import _ring
from virtio.constants import Feature
from virtio.driver import F_INDIRECT, F_NEXT, F_WRITE
from virtio.errors import GuestError
from virtio.fake import FakeMemory
from virtio.layouts import PackedDescriptor, SplitDescriptor, fast
from virtio.packed import reference_ring

EXAMPLES = int(os.environ.get("VIRTIO_EXAMPLES", "150"))
BASE, SIZE, QUEUE = 0x1000, 0x4000, 8
DESC, DRIVER, DEVICE, TABLES, DATA = BASE, BASE + 0x400, BASE + 0x800, BASE + 0x1000, BASE + 0x2000
relaxed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

split_layout, packed_layout = fast(SplitDescriptor), fast(PackedDescriptor)

addresses = st.one_of(
    st.integers(DATA, DATA + 0x800),
    st.sampled_from([TABLES, TABLES + 0x100, BASE, BASE + SIZE - 4, BASE + SIZE, 0, 2**64 - 1, 2**64 - 16]),
    st.integers(0, 2**64 - 1),
)
lengths = st.one_of(
    st.integers(1, 64), st.sampled_from([0, 16, 32, 48, 17, 2**32 - 1, SIZE]), st.integers(0, 2**32 - 1)
)
flags = st.one_of(
    st.sampled_from([0, F_NEXT, F_WRITE, F_NEXT | F_WRITE, F_INDIRECT, F_INDIRECT | F_WRITE, F_INDIRECT | F_NEXT]),
    st.integers(0, 0xFFFF),
)
small = st.one_of(st.integers(0, QUEUE + 1), st.integers(0, 0xFFFF))
descriptors = st.tuples(addresses, lengths, small, flags)

steps = st.lists(
    st.one_of(
        st.tuples(st.just("descriptor"), st.integers(0, QUEUE - 1), descriptors),
        st.tuples(st.just("table"), st.integers(0, 15), descriptors),
        st.tuples(st.just("offer"), small),
        st.tuples(st.just("index"), small),
        st.tuples(st.just("wish"), st.integers(0, 2**32 - 1)),
        st.tuples(st.just("pop")),
        st.tuples(st.just("pop")),
        st.tuples(st.just("push"), st.integers(0, 9), st.integers(0, 80)),
        st.tuples(st.just("push_batch"), st.integers(0, 9)),
        st.tuples(st.just("undo")),
        st.tuples(st.just("enable")),
        st.tuples(st.just("disable")),
        st.tuples(st.just("want_more")),
        st.tuples(st.just("needs")),
    ),
    max_size=60,
)


class Side:
    """One implementation over its own memory."""

    def __init__(self, kind: str, features: int) -> None:
        self.memory = FakeMemory(SIZE, BASE)
        self.packed = bool(features & Feature.RING_PACKED)
        areas = (QUEUE, DESC, DRIVER, DEVICE, features)
        if kind == "c":
            self.ring: Any = _ring.Ring(_ring.Memory(self.memory.regions()), *areas)
        else:
            self.ring = reference_ring(self.memory, *areas)
        self.chains: list[Any] = []
        self.wrap = True
        self.next = 0

    def step(self, step: tuple[Any, ...]) -> Any:
        """Do it; what is seen from outside."""
        try:
            return self._step(*step)
        except (GuestError, ValueError) as error:
            return type(error).__name__, str(error) if isinstance(error, GuestError) else ""

    def _put(self, at: int, descriptor: tuple[int, int, int, int]) -> None:
        gpa, length, number, flag = descriptor
        if self.packed:
            data = packed_layout.pack(gpa, length, number, flag)
        else:
            data = split_layout.pack(gpa, length, flag, number)
        self.memory.view(at, 16)[:] = data

    def _step(self, kind: str, *arguments: Any) -> Any:
        ring = self.ring
        match kind:
            case "descriptor":
                self._put(DESC + 16 * arguments[0], arguments[1])
            case "table":
                self._put(TABLES + 16 * arguments[0], arguments[1])
            case "offer":
                self._offer(arguments[0])
            case "index":
                self.memory.view(DRIVER + 2, 2)[:] = arguments[0].to_bytes(2, "little")
            case "wish":
                where = DRIVER if self.packed else DRIVER + 4 + 2 * QUEUE
                self.memory.view(where, 4)[:] = arguments[0].to_bytes(4, "little")
            case "pop":
                chain = ring.pop()
                if chain is None:
                    return None
                self.chains.append(chain)
                lengths = chain.readable_length, chain.writable_length
                return chain.id, chain.slots, chain.segments, lengths, chain.read(100, 3)
            case "push" if self.chains:
                chain = self.chains.pop(arguments[0] % len(self.chains))
                wrote = chain.write(bytes(range(arguments[1])))
                ring.push(chain)
                return wrote, chain.written
            case "push_batch":
                batch, self.chains = self.chains[: arguments[0]], self.chains[arguments[0] :]
                ring.push_batch([(chain, min(chain.writable_length, 7)) for chain in batch])
            case "undo" if self.chains:
                ring.undo_pop(self.chains[-1])
                self.chains.pop()
            case "enable":
                return ring.enable_notification()
            case "disable":
                ring.disable_notification()
            case "want_more":
                ring.want_more()
            case "needs":
                return ring.needs_notification()
        return None

    def _offer(self, value: int) -> None:
        if self.packed:
            at = DESC + 16 * self.next + 14
            flag = int.from_bytes(self.memory.view(at, 2), "little") & ~0x8080 | (0x80 if self.wrap else 0x8000)
            self.memory.view(at, 2)[:] = flag.to_bytes(2, "little")
            self.next += 1
            if self.next == QUEUE:
                self.next, self.wrap = 0, not self.wrap
        else:
            index = int.from_bytes(self.memory.view(DRIVER + 2, 2), "little")
            self.memory.view(DRIVER + 4 + 2 * (index % QUEUE), 2)[:] = value.to_bytes(2, "little")
            self.memory.view(DRIVER + 2, 2)[:] = ((index + 1) & 0xFFFF).to_bytes(2, "little")

    def state(self) -> Any:
        ring = self.ring
        return ring.in_flight, ring.next_avail, ring.next_used, ring.error, bytes(self.memory.bytes)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@relaxed
@given(
    steps=steps,
    optional=st.integers(0, 7),
    start=st.tuples(st.integers(0, QUEUE - 1), st.integers(0, QUEUE - 1), st.booleans(), st.booleans()),
)
def test_both_rings_do_the_same(packed: bool, steps: list[Any], optional: int, start: tuple[Any, ...]) -> None:
    features = Feature.RING_PACKED if packed else 0
    for bit, feature in enumerate((Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER)):
        features |= feature if optional >> bit & 1 else 0
    sides = [Side("c", int(features)), Side("python", int(features))]
    for side in sides:
        if packed:
            side.ring.restore(*start)
            side.next, side.wrap = start[0], start[2]
    for step in steps:
        results = [side.step(step) for side in sides]
        assert results[0] == results[1], step
        states = [side.state() for side in sides]
        assert states[0] == states[1], step


chunks = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200)), min_size=1, max_size=6)


@relaxed
@given(
    data=st.binary(max_size=600),
    readable=st.lists(st.integers(1, 200), max_size=5),
    writable=st.lists(st.integers(1, 200), max_size=5),
    reads=st.lists(st.tuples(st.integers(-1, 700), st.integers(0, 700)), max_size=4),
    writes=st.lists(st.tuples(st.binary(max_size=300), st.one_of(st.none(), st.integers(0, 700))), max_size=4),
)
def test_chains_read_and_write_the_same(
    data: bytes, readable: list[int], writable: list[int], reads: list[Any], writes: list[Any]
) -> None:
    """Any offset, any length, across any segments."""
    if not readable and not writable:
        return
    results = []
    for kind in ("c", "python"):
        side = Side(kind, Feature.INDIRECT_DESC)
        side.memory.view(DATA, len(data))[:] = data
        at, parts = DATA, []
        for length, flag in [(n, 0) for n in readable] + [(n, F_WRITE) for n in writable]:
            parts.append((at, length, flag))
            at += length
        for index, (gpa, length, flag) in enumerate(parts):
            last = index + 1 == len(parts)
            side._put(TABLES + 16 * index, (gpa, length, index + 1, flag | (0 if last else F_NEXT)))
        side._put(DESC, (TABLES, 16 * len(parts), 0, F_INDIRECT))
        side._offer(0)
        chain = side.ring.pop()
        seen = [chain.read(*read) for read in reads] + [chain.write(*write) for write in writes]
        seen += [chain.written, [bytes(view) for view in chain.readable() + chain.writable()]]
        side.ring.push(chain, min(chain.written, chain.writable_length))
        results.append((seen, bytes(side.memory.bytes)))
    assert results[0] == results[1]
