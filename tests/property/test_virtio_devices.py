"""Hostile drivers: random register accesses and random rings against every device on both transports.

Nothing may come out of a register access, whatever happens; after a reset the device works. VIRTIO_EXAMPLES is the
number of examples per device (default 15).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.virtio import MEMORY, Driver, MmioDriver, PciDriver
from virtio.backends.block import MemoryBlock
from virtio.backends.char import MemoryChar
from virtio.backends.file import FileBlock
from virtio.backends.net import MemoryNet
from virtio.backends.vsock import MemoryVsock
from virtio.device import Device
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.devices.console import ConsoleDevice, Port
from virtio.devices.net import NetDevice
from virtio.devices.rng import EntropyDevice
from virtio.devices.vsock import VsockDevice

EXAMPLES = int(os.environ.get("VIRTIO_EXAMPLES", "15"))
DISK = 64 << 10
HEADERS = [
    struct.pack("<IIQ", kind, 0, sector) for kind in (0, 1, 4, 8, 11, 13, 99) for sector in (0, 1, 127, 128, 2**63)
]


async def file_disk(folder: Path) -> Device:
    path = folder / "disk"
    if not path.exists():
        path.write_bytes(bytes(DISK))
    return BlockDevice(await FileBlock.open(path), queues=2)


async def memory_disk(folder: Path) -> Device:
    return BlockDevice(MemoryBlock(DISK))


async def network(folder: Path) -> Device:
    one, two = MemoryNet.pair()
    for number in range(20):
        await two.send(bytes([number]) * (60 + 100 * number))
    return NetDevice(one, b"\x52\x54\0\0\0\1")


async def console(folder: Path) -> Device:
    chars = [MemoryChar() for _ in range(3)]
    for char in chars:
        char.feed(b"typed " * 100)
    return ConsoleDevice([Port(chars[0]), Port(chars[1], "a", console=False), Port(chars[2], "b", console=False)])


async def entropy(folder: Path) -> Device:
    return EntropyDevice(random.Random(1).randbytes)


async def vsock(folder: Path) -> Device:
    return VsockDevice(MemoryVsock())


DEVICES: dict[str, Callable[[Path], Any]] = {
    "blk-file": file_disk,
    "blk-memory": memory_disk,
    "net": network,
    "console": console,
    "rng": entropy,
    "vsock": vsock,
}


def connect(kind: str, device: Device, packed: bool) -> Driver:
    return (PciDriver if kind == "pci" else MmioDriver)(device, packed=packed)


def scribble(driver: Driver, source: random.Random) -> None:
    """Requests of random shape, some with sensible headers; then some bytes of the rings changed."""
    memory = driver.memory
    for index, queue in enumerate(driver.queues):
        for _ in range(source.randrange(6)):
            readable, writable = [], []
            if source.random() < 0.8:
                readable.append(
                    driver.buffer(source.choice(HEADERS) if source.random() < 0.6 else source.randbytes(44))
                )
            for parts, chance in ((readable, 0.4), (writable, 0.7)):
                while source.random() < chance:
                    parts.append(
                        (source.randrange(memory.base, memory.base + MEMORY - 5000), source.randrange(1, 5000))
                    )
            if readable or writable:
                try:
                    queue.add(readable, writable, indirect=source.random() < 0.3)
                except MemoryError:
                    break
        for _ in range(source.choice((0, 0, 0, 1, 3, 20))):
            area = source.choice(((queue.desc, 16 * queue.size), (queue.driver, 4), (queue.driver, 4 + queue.size)))
            at = area[0] + source.randrange(area[1])
            memory.view(at, 1)[0] = source.choice((0, 1, 2, 4, 7, 0x80, 0xFF, source.randrange(256)))
        if source.random() < 0.9:
            driver.notify(index)


def access(driver: Driver, source: random.Random) -> None:
    """One access to a register, to any address of the range, with any width."""
    size = source.choice((1, 2, 4, 4, 4, 8))
    value = source.choice((0, 1, 2, 3, 4, 7, 8, 15, 64, 128, 0xFFFFFFFF, source.getrandbits(64))) & (1 << 8 * size) - 1
    if isinstance(driver, PciDriver):
        bar = source.choice((4, 4, 4, 4, 1, 0))
        offset = source.choice((0, 0x1000, 0x2000, 0x3000)) + source.randrange(64)
        what = source.randrange(5)
        if what == 0:
            driver.pci.bar_read(bar, offset, size)
        elif what == 1:
            driver.pci.config_write(0x80 + 4 * source.randrange(6), min(size, 4), value & 0xFFFFFFFF)
        elif what == 2:
            driver.pci.config_read(0x80 + 4 * source.randrange(6), min(size, 4))
        else:
            driver.pci.bar_write(bar, offset, size, value)
    elif isinstance(driver, MmioDriver):
        offset = source.choice((4 * source.randrange(64), source.randrange(0x200)))
        if source.random() < 0.3:
            driver.mmio.read(offset, size)
        else:
            driver.mmio.write(offset, size, value)


async def campaign(name: str, kind: str, seed: int, folder: Path) -> None:
    source = random.Random(seed)
    device = await DEVICES[name](folder)
    driver = connect(kind, device, source.random() < 0.5)
    if isinstance(driver, PciDriver):
        driver.pci.capability_placed(4, 0x80)
    loop = asyncio.get_running_loop()
    unexpected: list[Any] = []
    loop.set_exception_handler(lambda _, context: unexpected.append(context))
    try:
        for _ in range(4):
            if source.random() < 0.8:
                driver.write_status(0)
                await driver.wait(lambda: driver.read_status() == 0)
                driver.initialize(source.choice((-1, source.getrandbits(40))))
                scribble(driver, source)
            for _ in range(source.randrange(40)):
                access(driver, source)
                if source.random() < 0.2:
                    await asyncio.sleep(0)
            if driver.queues and source.random() < 0.5:
                scribble(driver, source)
            for _ in range(source.randrange(10)):
                await asyncio.sleep(0)
        driver.write_status(0)
        await driver.wait(lambda: driver.read_status() == 0)
        driver.initialize()
        await works(name, driver)
    finally:
        driver.transport.reset()
        await device.aclose()
    assert not unexpected


async def works(name: str, driver: Driver) -> None:
    """The device does its work for a driver that behaves."""
    if name.startswith("blk"):
        header = struct.pack("<IIQ", blk.IN, 0, 3)
        assert (await driver.request(0, [header], [512, 1]))[-1] == blk.OK
    elif name == "net":
        driver.submit(1, [driver.buffer(bytes(12) + b"frame".ljust(60))])
        await driver.used(1)
    elif name == "console":
        driver.submit(1, [driver.buffer(b"output")])
        await driver.used(1)
    elif name == "rng":
        assert len(await driver.request(0, [], [10])) == 10
    else:
        driver.submit(1, [driver.buffer(struct.pack("<QQIIIHHIII", 3, 2, 1, 2, 0, 1, 1, 0, 4096, 0))])
        room = driver.buffer(100)
        driver.submit(0, [], [room])
        await driver.used(0)


@pytest.mark.parametrize("kind", ["pci", "mmio"])
@pytest.mark.parametrize("name", DEVICES)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32))
def test_hostile_driver(name: str, kind: str, seed: int, tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    try:
        asyncio.run(campaign(name, kind, seed, tmp_path))
    finally:
        logging.disable(logging.NOTSET)


async def both_disks(seed: int, folder: Path) -> None:
    """The same requests to the path in C and to the coroutines: the same answers, the same disk."""
    source = random.Random(seed)
    content = source.randbytes(DISK)
    (folder / "disk").write_bytes(content)
    memory = MemoryBlock(DISK)
    memory.data[:] = content
    drivers = [PciDriver(BlockDevice(backend)) for backend in (await FileBlock.open(folder / "disk"), memory)]
    try:
        wanted = source.choice((-1, ~blk.Feature.DISCARD, ~blk.Feature.FLUSH))
        for driver in drivers:
            driver.initialize(wanted)
        for _ in range(20):
            kind = source.choice((blk.IN, blk.IN, blk.OUT, blk.OUT, blk.FLUSH, blk.WRITE_ZEROES, blk.GET_ID, 99))
            sector = source.choice(
                (source.randrange(DISK // 512), source.randrange(DISK // 512), 2**64 - 1, DISK // 512)
            )
            payload = source.randbytes(512 * source.randrange(5) + source.choice((0, 0, 0, 7)))
            if kind == blk.WRITE_ZEROES:
                entries = [(source.randrange(140), source.randrange(9), source.choice((0, 1, 2))) for _ in range(3)]
                payload = b"".join(struct.pack("<QII", *entry) for entry in entries)
            cut = source.randrange(1, 16)
            head = struct.pack("<IIQ", kind, 0, sector)
            readable = [head[:cut], head[cut:]] + ([payload] if payload and kind != blk.IN else [])
            space = source.choice((0, 512, 1024, 20, 700))
            writable = ([space] if space and kind != blk.OUT else []) + [1]
            answers = [await driver.request(0, readable, writable) for driver in drivers]
            assert answers[0][-1] == answers[1][-1], (kind, sector, len(payload), space)
            if answers[0][-1] == blk.OK:
                assert answers[0] == answers[1]
        assert (folder / "disk").read_bytes() == bytes(memory.data)
    finally:
        for driver in drivers:
            driver.transport.reset()
            await driver.transport.device.aclose()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_both_block_paths_do_the_same(seed: int, tmp_path: Path) -> None:
    asyncio.run(both_disks(seed, tmp_path))
