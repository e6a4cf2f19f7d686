"""Every way of a driver to make a malformed ring, for split and for packed rings, and what the device says of it.

Each case is (features, spoil, message): `spoil(queue)` writes into the queue of tests/support/rings.py, size 8.
"""

from __future__ import annotations

from collections.abc import Callable

from virtio.constants import Feature
from virtio.driver import F_INDIRECT, F_NEXT, F_WRITE, AnyDriverQueue, PackedDriverQueue
from virtio.layouts import PackedDescriptor, SplitDescriptor, fast

Descriptor = tuple[int, int, int, int]
"""gpa, length, flags, following (split) or buffer id (packed)"""
Case = tuple[int, Callable[[AnyDriverQueue], object], str]

_split, _packed = fast(SplitDescriptor), fast(PackedDescriptor)


def low(queue: AnyDriverQueue) -> int:
    """The first address of memory."""
    return queue.allocator.start


def high(queue: AnyDriverQueue) -> int:
    """The first address behind memory."""
    base, view = queue.memory.regions()[0]
    return base + len(view)


def direct(queue: AnyDriverQueue, *descriptors: Descriptor) -> None:
    """Descriptors from number 0 on, made available as the ring's kind wants it."""
    for index, (gpa, length, flags, following) in enumerate(descriptors):
        queue.set_descriptor(index, gpa % 2**64, length, flags, following)
        if isinstance(queue, PackedDriverQueue) and index:
            queue.offer(index)
    queue.offer(0)


def indirect(queue: AnyDriverQueue, *descriptors: Descriptor, length: int | None = None) -> None:
    """One descriptor that refers to a table of these, said to be `length` bytes long."""
    data = b"".join(
        _packed.pack(gpa, size, following, flags)
        if isinstance(queue, PackedDriverQueue)
        else _split.pack(gpa, size, flags, following)
        for gpa, size, flags, following in descriptors
    )
    direct(queue, (queue.allocator.put(data), len(data) if length is None else length, F_INDIRECT, 0))


def chain(queue: AnyDriverQueue, count: int, length: int, *, end: bool = True) -> None:
    """A chain of equal readable descriptors; without an `end` the last refers to the first."""
    descriptors = [(low(queue), length, F_NEXT, (index + 1) % count) for index in range(count)]
    if end:
        descriptors[-1] = (low(queue), length, 0, 0)
    direct(queue, *descriptors)


def crowd(queue: AnyDriverQueue, length: int) -> None:
    """An indirect table of 1024 buffers, each of so many bytes; each is sound."""
    entries = [(low(queue), length, F_NEXT if index < 1023 else 0, index + 1) for index in range(1024)]
    indirect(queue, *entries)


def direct_and_indirect(queue: AnyDriverQueue) -> None:
    """One direct descriptor, then a table as long as it may be: together they are longer."""
    table = b"".join(_split.pack(low(queue), 1, F_NEXT if index < 1023 else 0, index + 1) for index in range(1024))
    direct(queue, (low(queue), 1, F_NEXT, 1), (queue.allocator.put(table), len(table), F_INDIRECT, 0))


INDIRECT = int(Feature.INDIRECT_DESC)
SHARED: dict[str, Case] = {
    "zero length": (0, lambda q: direct(q, (low(q), 0, 0, 0)), "length zero"),
    "zero length later": (0, lambda q: direct(q, (low(q), 4, F_NEXT, 1), (low(q), 0, 0, 0)), "length zero"),
    "below memory": (0, lambda q: direct(q, (low(q) - 1, 4, 0, 0)), "outside guest memory"),
    "past the end": (0, lambda q: direct(q, (high(q) - 3, 4, 0, 0)), "outside guest memory"),
    "address wrap": (0, lambda q: direct(q, (2**64 - 2, 4, F_WRITE, 0)), "outside guest memory"),
    "address wrap to memory": (0, lambda q: direct(q, (low(q) - 2**32, 2**32 - 1, 0, 0)), "outside guest memory"),
    "huge": (0, lambda q: direct(q, (low(q), 2**32 - 1, 0, 0)), "outside guest memory"),
    "writable first": (0, lambda q: direct(q, (low(q), 4, F_WRITE | F_NEXT, 1), (low(q), 4, 0, 0)), "readable"),
    "indirect without the feature": (0, lambda q: indirect(q, (low(q), 16, 0, 0)), "without VIRTIO_F_INDIRECT_DESC"),
    "indirect in indirect": (INDIRECT, lambda q: indirect(q, (low(q), 16, F_INDIRECT, 0)), "inside an indirect"),
    "indirect odd length": (INDIRECT, lambda q: indirect(q, (low(q), 16, 0, 0), length=17), "multiple of 16"),
    "indirect empty": (INDIRECT, lambda q: indirect(q, (low(q), 16, 0, 0), length=0), "multiple of 16"),
    "indirect too long": (INDIRECT, lambda q: indirect(q, (low(q), 16, 0, 0), length=16 * 1025), "too long"),
    "indirect huge": (INDIRECT, lambda q: indirect(q, (low(q), 16, 0, 0), length=2**32 - 16), "too long"),
    "indirect outside": (INDIRECT, lambda q: direct(q, (high(q), 16, F_INDIRECT, 0)), "table is outside"),
    "indirect wraps": (INDIRECT, lambda q: direct(q, (2**64 - 16, 32, F_INDIRECT, 0)), "table is outside"),
    "indirect writable first": (
        INDIRECT, lambda q: indirect(q, (low(q), 4, F_WRITE | F_NEXT, 1), (low(q), 4, 0, 0)), "readable"
    ),
    "indirect zero length": (INDIRECT, lambda q: indirect(q, (low(q), 0, 0, 0)), "length zero"),
}  # fmt: skip
SPLIT: dict[str, Case] = {
    "loop": (0, lambda q: chain(q, 2, 4, end=False), "loop"),
    "self loop": (0, lambda q: chain(q, 1, 4, end=False), "loop"),
    "loop of the whole table": (0, lambda q: chain(q, 8, 4, end=False), "loop"),
    "head outside": (0, lambda q: q.offer(8), "outside the table"),
    "head far outside": (0, lambda q: q.offer(0xFFFF), "outside the table"),
    "next outside": (0, lambda q: direct(q, (low(q), 4, F_NEXT, 8)), "outside the table"),
    "index jump": (0, lambda q: [q.offer(0) for _ in range(9)], "jumped"),
    "index jump back": (0, lambda q: q.memory.view(q.driver + 2, 2).__setitem__(slice(2), b"\xff\xff"), "jumped"),
    "indirect and next": (INDIRECT, lambda q: direct(q, (low(q), 16, F_INDIRECT | F_NEXT, 1)), "VIRTQ_DESC_F_NEXT"),
    "indirect next outside": (INDIRECT, lambda q: indirect(q, (low(q), 16, F_NEXT, 1)), "outside the table"),
    "direct and indirect too long": (INDIRECT, direct_and_indirect, "too long"),
    "indirect loop": (
        INDIRECT, lambda q: indirect(q, (low(q), 4, F_NEXT, 1), (low(q), 4, F_NEXT, 0)), "loop"
    ),
}  # fmt: skip
PACKED: dict[str, Case] = {
    "loop": (0, lambda q: chain(q, 8, 4, end=False), "than the queue holds"),
    "list into the next lap": (
        0,
        lambda q: (chain(q, 8, 4, end=False), q.set_descriptor(0, low(q), 4, F_NEXT | 0x80)),
        "than the queue holds",
    ),
    "index jump": (
        0,
        lambda q: (q.set_descriptor(1, low(q), 4, F_NEXT), direct(q, (low(q), 4, F_NEXT, 0))),
        "not available",
    ),
    "list into used ones": (
        0,
        lambda q: (q.set_descriptor(1, low(q), 4, 0x8080), direct(q, (low(q), 4, F_NEXT, 0))),
        "not available",
    ),
    "indirect and next": (
        INDIRECT,
        lambda q: direct(q, (low(q), 16, F_INDIRECT | F_NEXT, 0), (low(q), 16, 0, 0)),
        "indirect descriptor in a packed descriptor list",
    ),
    "indirect in a list": (
        INDIRECT,
        lambda q: direct(q, (low(q), 16, F_NEXT, 0), (low(q), 16, F_INDIRECT, 0)),
        "indirect descriptor in a packed descriptor list",
    ),
}


def cases(packed: bool) -> dict[str, Case]:
    return SHARED | (PACKED if packed else SPLIT)
