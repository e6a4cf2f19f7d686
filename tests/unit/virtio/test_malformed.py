"""Malformed rings of both kinds and implementations: GuestError, then DEVICE_NEEDS_RESET, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.support import malformed
from tests.support.rings import BASE, MEMORY, RIGS
from tests.support.virtio import Driver, MmioDriver, PciDriver
from virtio.constants import Feature
from virtio.device import Device
from virtio.driver import F_INDIRECT, F_NEXT, F_WRITE
from virtio.errors import GuestError
from virtio.fake import FakeMemory
from virtio.packed import reference_ring
from virtio.queue import Queue

CASES = [(name, case) for name, rig in RIGS.items() for case in malformed.cases(rig.packed)]


@pytest.mark.parametrize(("rig", "case"), CASES)
def test_guest_errors_are_latched(rig: str, case: str) -> None:
    features, spoil, message = malformed.cases(RIGS[rig].packed)[case]
    ring, queue = RIGS[rig].make(features)
    spoil(queue)
    for _ in range(2):
        with pytest.raises(GuestError, match=message):
            ring.pop()
    assert message in ring.error
    assert not ring.needs_notification() and not ring.enable_notification() and not ring.has_available()
    assert queue.used() == [] and ring.in_flight == 0


@pytest.mark.parametrize("rig", RIGS)
@pytest.mark.parametrize("indirect", [False, True])
def test_longer_than_2_32_bytes_in_total(rig: str, indirect: bool) -> None:
    """2.7.5.2, 2.8.17: each descriptor is sound, their sum is not."""
    memory = FakeMemory(64 << 20, BASE)
    ring, queue = RIGS[rig].make(Feature.INDIRECT_DESC, 128, memory)
    entries = [(BASE, 60 << 20, F_NEXT if index < 127 else 0, index + 1) for index in range(128)]
    (malformed.indirect if indirect else malformed.direct)(queue, *entries)
    with pytest.raises(GuestError, match="2\\^32"):
        ring.pop()


@pytest.mark.parametrize("rig", RIGS)
def test_more_in_flight_than_the_queue_holds(rig: str) -> None:
    ring, queue = RIGS[rig].make()
    for index in range(8):
        queue.set_descriptor(index if RIGS[rig].packed else 0, BASE, 4, 0)
        queue.offer(index if RIGS[rig].packed else 0)
        assert ring.pop() is not None
    if RIGS[rig].packed:
        queue.set_descriptor(0, BASE, 4, 0x8000)  # available in the next lap, while it is not used in this one
    else:
        queue.offer(0)
    with pytest.raises(GuestError, match="than the queue holds"):
        ring.pop()


@pytest.mark.parametrize("rig", RIGS)
def test_a_chain_is_what_it_was_when_it_was_popped(rig: str) -> None:
    """What a driver writes into descriptors and tables afterwards does not count."""
    ring, queue = RIGS[rig].make(Feature.INDIRECT_DESC)
    memory = queue.memory
    data, room = queue.allocator.put(b"good"), queue.allocator.take(4)
    for indirect in (False, True):
        queue.add([(data, 4)], [(room, 4)], indirect=indirect)
        chain = ring.pop()
        before = chain.segments
        memory.view(queue.desc, 128)[:] = b"\xff" * 128
        for view in (memory.view(queue.allocator._next - 32, 32),) if indirect else ():
            view[:] = b"\xff" * 32
        assert chain.segments == before == ((data, 4, False), (room, 4, True))
        assert chain.read() == b"good" and chain.write(b"done!") == 4
        ring.push(chain)
        ring, queue = RIGS[rig].make(Feature.INDIRECT_DESC)
        memory = queue.memory
        data, room = queue.allocator.put(b"good"), queue.allocator.take(4)


class SharedMemory(FakeMemory):
    """Guest memory that another process has too."""

    def __init__(self, size: int, base: int) -> None:
        super().__init__(size, base)
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, size)
        self.buffer = mmap.mmap(self.fd, size)
        self.bytes = memoryview(self.buffer)


FLIPPER = """
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 0)
words = [(int(at), bytes.fromhex(a), bytes.fromhex(b)) for at, a, b in (word.split(":") for word in sys.argv[2:])]
while True:
    for at, a, b in words:
        memory[at : at + len(a)] = a
    for at, a, b in words:
        memory[at : at + len(b)] = b
"""


@contextlib.contextmanager
def other_processor(memory: SharedMemory, *words: tuple[int, bytes, bytes]) -> Iterator[None]:
    """Another processor of the guest: it changes words (address, one value, the other) as fast as it can."""
    texts = [f"{at - memory.base}:{one.hex()}:{two.hex()}" for at, one, two in words]
    process = subprocess.Popen([sys.executable, "-c", FLIPPER, str(memory.fd), *texts], pass_fds=[memory.fd])
    try:
        yield
    finally:
        process.kill()
        process.wait()
        os.close(memory.fd)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("rig", RIGS)
def test_double_fetch(rig: str, indirect: bool) -> None:
    """While a descriptor changes between sound and unsound, each pop gives a sound chain or a GuestError."""
    memory = SharedMemory(MEMORY, BASE)
    _, queue = RIGS[rig].make(Feature.INDIRECT_DESC, 8, memory)
    packed = RIGS[rig].packed
    sound, unsound = (BASE + MEMORY - 64, 64), (BASE + MEMORY - 8, 4096)
    where = queue.allocator.put(bytes(16)) if indirect else queue.desc
    words = [
        (where + at, *(value[at // 8].to_bytes(size, "little") for value in (sound, unsound)))
        for at, size in ((0, 8), (8, 4))
    ]
    good, bad = 0, 0
    deadline = time.monotonic() + 20
    with other_processor(memory, *words):  # type: ignore[arg-type]
        while time.monotonic() < deadline and not (good > 100 and bad > 100):
            ring = RIGS[rig].ring(queue)
            if indirect:
                queue.set_descriptor(0, where, 16, F_INDIRECT)
            flags = (0x80 if packed else 0) | (F_INDIRECT if indirect else 0)
            memory.view(queue.desc + (14 if packed else 12), 2)[:] = flags.to_bytes(2, "little")
            if not packed:
                memory.view(queue.driver, 6)[:] = bytes((0, 0, 1, 0, 0, 0))
            try:
                chain = ring.pop()
            except GuestError as error:
                assert "outside guest memory" in str(error) or "length zero" in str(error)
                bad += 1
                continue
            ((gpa, length, writable),) = chain.segments
            assert gpa + length <= BASE + MEMORY and not writable
            assert len(chain.read()) == length == chain.readable_length
            good += 1
    assert good > 100 and bad > 100, "the other processor was not seen"


# Devices


class Echo(Device):
    device_id = 42
    queue_sizes = (8, 8)

    async def serve(self, queues: Sequence[Queue]) -> None:
        async def answer(queue: Queue) -> None:
            async for chain in queue:
                chain.write(chain.read(4096)[::-1])
                queue.complete(chain)

        self.spawn(answer(queues[1]), "second")
        await answer(queues[0])


async def echoes(driver: Driver, queue: int = 0) -> bool:
    return await driver.request(queue, [b"abc"], [3]) == b"cba"


Connect = Callable[..., Driver]
KINDS = {f"{kind}-{name}": (maker, rig) for kind, maker in (("pci", PciDriver), ("mmio", MmioDriver))
         for name, rig in RIGS.items()}  # fmt: skip


def connect(kind: str, **options: Any) -> Driver:
    maker, rig = KINDS[kind]
    if rig.implementation == "python":
        options["ring_factory"] = reference_ring
    return maker(Echo(), packed=rig.packed, **options)


@pytest.mark.clause("2.1.2-b")
@pytest.mark.parametrize("kind", KINDS)
async def test_a_device_needs_a_reset_and_others_go_on(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each malformed ring, on one of two devices of a machine, beside another machine in the same loop."""
    caplog.set_level(logging.ERROR)
    rig = KINDS[kind][1]
    memory = FakeMemory(4 << 20, BASE)
    victim = connect(kind, memory=memory)
    neighbour = connect(kind, memory=memory)
    neighbour.allocator.start = neighbour.allocator._next = BASE + (2 << 20)
    stranger = connect(kind)
    for driver in (victim, neighbour, stranger):
        driver.initialize()
    for name, (features, spoil, _) in malformed.cases(rig.packed).items():
        victim.initialize(~Feature.INDIRECT_DESC if not features else -1)
        assert await echoes(victim) and await echoes(victim, 1)
        victim.initialize(~Feature.INDIRECT_DESC if not features else -1)
        victim.interrupted.clear()
        spoil(victim.queues[0])
        victim.notify(0)
        await victim.wait(lambda: victim.needs_reset)
        assert victim.interrupted.is_set(), name
        for driver in (neighbour, stranger):
            assert await echoes(driver), name
        # the other queue of the broken device is not served any more, and nothing is retried
        victim.queues[1].add([victim.buffer(b"x")], [victim.buffer(1)])
        victim.notify(1)
        victim.notify(0)
        for _ in range(3):
            await asyncio.sleep(0)
        assert victim.queues[0].used() == [] and victim.queues[1].used() == [], name
    victim.initialize()
    assert await echoes(victim)
    for driver in (victim, neighbour, stranger):
        driver.transport.reset()
        await driver.transport.device.aclose()


@pytest.mark.parametrize("rig", RIGS)
def test_time_and_memory_are_bounded(rig: str) -> None:
    """The longest chain that is accepted, again and again: the same small number of segments."""
    ring, queue = RIGS[rig].make(Feature.INDIRECT_DESC)
    entries = [(BASE, 1, F_NEXT | F_WRITE if index < 1023 else F_WRITE, index + 1) for index in range(1024)]
    malformed.indirect(queue, *entries)
    chain = ring.pop()
    assert len(chain.segments) == 1024
    ring, queue = RIGS[rig].make(Feature.INDIRECT_DESC)
    malformed.indirect(queue, *entries, (BASE, 1, F_WRITE, 0))
    with pytest.raises(GuestError, match="too long"):
        ring.pop()


def test_every_case_is_there() -> None:
    """Those that the rings' contract names."""
    for rig in RIGS.values():
        names = " ".join(malformed.cases(rig.packed))
        for wanted in ("loop", "address wrap", "zero length", "index jump", "indirect in indirect", "writable first"):
            assert wanted in names


