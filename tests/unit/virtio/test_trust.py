"""Backends that break their contract: the guest gets an error, the log names the class, the device goes on."""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import Any

import pytest

from virtio.backends.block import BlockBackend, MemoryBlock
from virtio.backends.char import INPUT_MAX, MemoryChar
from virtio.backends.net import FRAME_MAX, MemoryNet
from virtio.devices import blk
from virtio.devices.blk import BlockDevice
from virtio.devices.console import ConsoleDevice
from virtio.devices.net import NetDevice
from virtio.devices.rng import EntropyDevice
from virtio.errors import ConfigError, GuestError

from .conftest import Connect

MAC = b"\x52\x54\0\0\0\1"
SECTORS = 64


def raises(error: BaseException) -> Any:
    def mistaken(*_: Any) -> Any:
        raise error

    return mistaken


def returns(value: Any) -> Any:
    return lambda *_: value


MISTAKES = {
    "os-error": raises(OSError(5, "Input/output error")),
    "key-error": raises(KeyError("sector")),
    "guest-error": raises(GuestError("not the guest's")),
    "cancelled": raises(asyncio.CancelledError()),
    "stop": raises(StopAsyncIteration()),
}
SHORT = {
    "one-byte": returns(b"x"),
    "too-long": returns(bytes(100_000)),
    "text": returns("text"),
    "none": returns(None),
    "list": returns([0] * 512),
}


def named(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if name in record.getMessage()]


class Careless(MemoryBlock):
    """Each method does what `mistake` does."""

    def __init__(self, mistake: Any) -> None:
        super().__init__(SECTORS * 512)
        self.mistake = mistake

    async def read(self, offset: int, length: int) -> bytes:
        result: bytes = self.mistake(offset, length)
        return result

    async def write(self, offset: int, data: bytes) -> None:
        self.mistake(offset, data)

    async def flush(self) -> None:
        self.mistake()

    async def discard(self, offset: int, length: int) -> None:
        self.mistake(offset, length)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.mistake(offset, length, unmap)


def head(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.mark.parametrize("mistake", MISTAKES | SHORT)
async def test_a_disk_of_the_embedders(connect: Connect, caplog: pytest.LogCaptureFixture, mistake: str) -> None:
    """Reads of the wrong type or length, and every exception, are I/O errors of that request alone."""
    backend = Careless((MISTAKES | SHORT)[mistake])
    driver = connect(BlockDevice(backend))
    driver.initialize()
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            assert (await driver.request(0, [head(blk.IN)], [512, 1]))[-1] == blk.IOERR
        wrong = blk.IOERR if mistake in MISTAKES else blk.OK
        entry = struct.pack("<QII", 0, 1, 0)
        assert (await driver.request(0, [head(blk.OUT), bytes(512)], [1]))[-1] == wrong
        assert (await driver.request(0, [head(blk.FLUSH)], [1]))[-1] == wrong
        assert (await driver.request(0, [head(blk.DISCARD), entry], [1]))[-1] == wrong
        assert (await driver.request(0, [head(blk.WRITE_ZEROES), entry], [1]))[-1] == wrong
    assert not driver.needs_reset
    assert 0 < len(named(caplog, "Careless")) <= 8
    backend.mistake = returns(b"y" * 512)
    assert await driver.request(0, [head(blk.IN)], [512, 1]) == b"y" * 512 + b"\0"


class Synchronous(MemoryBlock):
    """Its author forgot `async`."""

    def read(self, offset: int, length: int) -> Any:
        return bytes(length)


async def test_a_method_that_is_no_coroutine(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    driver = connect(BlockDevice(Synchronous(SECTORS * 512)))
    driver.initialize()
    with caplog.at_level(logging.WARNING):
        assert (await driver.request(0, [head(blk.IN)], [512, 1]))[-1] == blk.IOERR
    assert named(caplog, "Synchronous")


@pytest.mark.parametrize(
    ("name", "value"),
    [("capacity", -1), ("capacity", "1M"), ("capacity", 1 << 63), ("block_size", 0), ("block_size", 513),
     ("block_size", 8192)],
)  # fmt: skip
def test_a_disk_that_cannot_be(name: str, value: Any) -> None:
    backend = MemoryBlock(SECTORS * 512)
    setattr(backend, name, value)
    with pytest.raises(ConfigError, match="MemoryBlock"):
        BlockDevice(backend)


class Stubborn(BlockBackend):
    """Reads never end, and take their time to be cancelled."""

    capacity = SECTORS * 512

    def __init__(self) -> None:
        self.running = self.most = 0
        self.release = asyncio.Event()

    async def read(self, offset: int, length: int) -> bytes:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while not self.release.is_set():
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    continue
        finally:
            self.running -= 1
        return bytes(length)

    async def write(self, offset: int, data: bytes) -> None:
        return None


async def test_resets_while_requests_do_not_end(connect: Connect) -> None:
    """However often the driver resets the device and floods it again, the backend has a bounded number of requests, and
    the reset is complete at once; when the backend comes round the driver is served."""
    backend = Stubborn()
    driver = connect(BlockDevice(backend))
    for _ in range(10):
        driver.initialize()
        for _ in range(80):
            driver.submit(0, [driver.buffer(head(blk.IN))], [driver.buffer(512), driver.buffer(1)])
        for _ in range(10):
            await asyncio.sleep(0)
    assert backend.most <= blk.REQUESTS_MAX
    driver.initialize()
    backend.release.set()
    assert (await driver.request(0, [head(blk.IN)], [512, 1]))[-1] == blk.OK


class Wire(MemoryNet):
    def __init__(self, sending: Any, receiving: Any) -> None:
        super().__init__()
        self.sending, self.receiving = sending, receiving

    async def send(self, frame: bytes) -> None:
        self.sending()
        await super().send(frame)

    async def receive(self) -> bytes:
        result: bytes = self.receiving() if self.receiving else await super().receive()
        return result


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_wire_that_loses_frames(connect: Connect, caplog: pytest.LogCaptureFixture, mistake: str) -> None:
    backend = Wire(MISTAKES[mistake], None)
    driver = connect(NetDevice(backend, MAC))
    driver.initialize()
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            driver.submit(1, [driver.buffer(bytes(12) + b"frame".ljust(60))])
            await driver.used(1)
    assert not driver.needs_reset and driver.config_read(6, 2) == 1
    assert 0 < len(named(caplog, "Wire")) <= 8
    backend.sending = returns(None)
    driver.submit(1, [driver.buffer(bytes(12) + b"frame".ljust(60))])
    await driver.wait(lambda: backend.sent)


@pytest.mark.parametrize(
    "mistake", MISTAKES | {key: SHORT[key] for key in ("text", "none", "list")} | {"empty": 0, "too-long": 0}
)
async def test_a_wire_that_gives_no_frames(connect: Connect, caplog: pytest.LogCaptureFixture, mistake: str) -> None:
    """The link goes down: the guest sees it, and the loop does not turn for nothing."""
    mistakes = MISTAKES | SHORT | {"empty": returns(b""), "too-long": returns(bytes(FRAME_MAX + 1))}
    driver = connect(NetDevice(Wire(returns(None), mistakes[mistake]), MAC))
    with caplog.at_level(logging.WARNING):
        driver.initialize()
        await driver.wait(lambda: driver.config_read(6, 2) == 0)
    assert not driver.needs_reset
    assert len(named(caplog, "Wire")) == 1


class Typist(MemoryChar):
    def __init__(self, reading: Any, writing: Any) -> None:
        super().__init__()
        self.reading, self.writing = reading, writing

    async def read(self) -> bytes:
        result: bytes = self.reading()
        return result

    async def write(self, data: bytes) -> None:
        self.writing()
        await super().write(data)


@pytest.mark.parametrize(
    "mistake", MISTAKES | {key: SHORT[key] for key in ("text", "none", "list")} | {"end": 0, "too-long": 0}
)
async def test_a_console_that_reads_wrongly(connect: Connect, caplog: pytest.LogCaptureFixture, mistake: str) -> None:
    """No input comes any more, the output goes on. An end of input is no mistake."""
    mistakes = MISTAKES | SHORT | {"end": returns(b""), "too-long": returns(bytes(INPUT_MAX + 1))}
    backend = Typist(mistakes[mistake], returns(None))
    driver = connect(ConsoleDevice(backend))
    with caplog.at_level(logging.WARNING):
        driver.initialize()
        driver.submit(0, [], [driver.buffer(100)])
        driver.submit(1, [driver.buffer(b"output")])
        await driver.used(1)
        await backend.wait_output(b"output")
    assert not driver.needs_reset and not driver.queues[0].used()
    assert len(named(caplog, "Typist")) == (mistake != "end")


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_console_that_writes_wrongly(connect: Connect, caplog: pytest.LogCaptureFixture, mistake: str) -> None:
    """That output is lost, what follows is not."""
    backend = Typist(returns(b"typed"), MISTAKES[mistake])
    driver = connect(ConsoleDevice(backend))
    with caplog.at_level(logging.WARNING):
        driver.initialize()
        for _ in range(20):
            driver.submit(1, [driver.buffer(b"lost")])
            await driver.used(1)
    assert 0 < len(named(caplog, "Typist")) <= 8
    backend.writing = returns(None)
    driver.submit(1, [driver.buffer(b"output")])
    await backend.wait_output(b"output")
    assert bytes(backend.output) == b"output"


@pytest.mark.parametrize("mistake", ["os-error", "key-error", "text", "none", "empty", "too-long"])
async def test_a_source_that_is_not_random(connect: Connect, caplog: pytest.LogCaptureFixture, mistake: str) -> None:
    """There is no answer that says so: the device needs a reset, and works once the source does."""
    mistakes = MISTAKES | SHORT | {"empty": returns(b"")}

    class Dice:
        def __init__(self) -> None:
            self.throw = mistakes[mistake]

        def __call__(self, count: int) -> Any:
            return self.throw(count)

    dice = Dice()
    driver = connect(EntropyDevice(dice))
    driver.initialize()
    with caplog.at_level(logging.WARNING):
        driver.submit(0, [], [driver.buffer(16)])
        await driver.wait(lambda: driver.needs_reset)
    assert named(caplog, "Dice")
    dice.throw = lambda count: b"\x55" * count
    driver.initialize()
    assert await driver.request(0, [], [16]) == b"\x55" * 16
