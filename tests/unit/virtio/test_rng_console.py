"""Entropy (5.4) and console (5.3) devices."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import pytest

from virtio.backends import char
from virtio.backends.char import MemoryChar, SocketChar
from virtio.devices.console import ConsoleDevice, ControlEvent, Port
from virtio.devices.rng import EntropyDevice

from .conftest import Connect


def counting(length: int) -> bytes:
    return bytes(i & 0xFF for i in range(length))


@pytest.mark.clause("5.4.6.2-a")
async def test_entropy_comes_from_the_injected_source(connect: Connect) -> None:
    driver = connect(EntropyDevice(counting))
    driver.initialize()
    assert await driver.request(0, [], [5, 5]) == counting(10)


async def test_entropy_answers_are_bounded(connect: Connect) -> None:
    driver = connect(EntropyDevice(counting))
    driver.initialize()
    assert len(await driver.request(0, [], [100_000])) == 65536


async def test_entropy_rate(connect: Connect) -> None:
    driver = connect(EntropyDevice(counting, bytes_per_second=1000))
    driver.initialize()
    assert len(await driver.request(0, [], [5000])) == 100


async def test_a_readable_entropy_buffer_needs_a_reset(connect: Connect) -> None:
    """5.4.6.1"""
    driver = connect(EntropyDevice(counting))
    driver.initialize()
    driver.submit(0, [driver.buffer(b"x")], [driver.buffer(4)])
    await driver.wait(lambda: driver.needs_reset)


async def test_console_both_ways(connect: Connect) -> None:
    char = MemoryChar()
    driver = connect(ConsoleDevice(char, columns=100, rows=40))
    driver.initialize()
    assert len(driver.queues) == 2
    assert (driver.config_read(0, 2), driver.config_read(2, 2)) == (100, 40)
    driver.submit(1, [driver.buffer(b"hello "), driver.buffer(b"guest\n")])
    await char.wait_output(b"hello guest\n")
    char.feed(b"typed input")
    room = [driver.buffer(6), driver.buffer(20)]
    driver.submit(0, [], room[:1])
    driver.submit(0, [], room[1:])
    first, second = await driver.used(0, 2)
    assert driver.bytes_at(room[0]) + driver.bytes_at(room[1])[: second.length] == b"typed input"
    assert first.length == 6


async def test_a_huge_output_buffer_is_taken_in_pieces(connect: Connect) -> None:
    char = MemoryChar()
    driver = connect(ConsoleDevice(char))
    driver.initialize()
    data = driver.buffer(b"a" * 70_000)
    driver.submit(1, [data] * 10)
    await driver.used(1)
    await driver.wait(lambda: len(char.output) == 700_000)


async def test_the_loop_has_its_turns_while_much_is_written(connect: Connect) -> None:
    """The same MiB many times over in one buffer, which is longer than guest memory: others go on meanwhile."""
    char = MemoryChar()
    driver = connect(ConsoleDevice(char))
    driver.initialize()
    driver.submit(1, [driver.buffer(bytes(1 << 20))] * 64, indirect=True)
    await driver.wait(lambda: char.output)
    assert len(char.output) < 32 << 20
    await driver.used(1)
    assert len(char.output) == 64 << 20


async def test_resize_is_a_configuration_change(connect: Connect) -> None:
    device = ConsoleDevice(MemoryChar())
    driver = connect(device)
    driver.initialize()
    device.resize(132, 50)
    assert driver.interrupted.is_set()
    assert driver.config_read(0, 4) == 132 | 50 << 16


async def control(driver: Any, count: int) -> list[tuple[int, int, int, bytes]]:
    """Offer control receive buffers until `count` messages came."""
    found = []
    for _ in range(count):
        message = await driver.request(2, [], [64])
        found.append((*struct.unpack("<IHH", message[:8]), message[8:]))
    return found


def send(driver: Any, port: int, event: int, value: int) -> None:
    driver.submit(3, [driver.buffer(struct.pack("<IHH", port, event, value))])


@pytest.mark.clause("5.3.6.2-a", "5.3.6.2-b")
async def test_multiport(connect: Connect) -> None:
    """5.3.6.2: the driver is told of ports, names and sizes, and opens them."""
    console, agent = MemoryChar(), MemoryChar()
    device = ConsoleDevice([Port(console), Port(agent, "org.test.agent", console=False)])
    driver = connect(device)
    driver.initialize()
    assert len(driver.queues) == 6
    send(driver, 0, ControlEvent.DEVICE_READY, 1)
    assert [message[:3] for message in await control(driver, 2)] == [
        (0, ControlEvent.DEVICE_ADD, 1),
        (1, ControlEvent.DEVICE_ADD, 1),
    ]
    send(driver, 0, ControlEvent.PORT_READY, 1)
    assert await control(driver, 3) == [
        (0, ControlEvent.CONSOLE_PORT, 1, b""),
        (0, ControlEvent.RESIZE, 0, struct.pack("<HH", 80, 25)),
        (0, ControlEvent.PORT_OPEN, 1, b""),
    ]
    send(driver, 1, ControlEvent.PORT_READY, 1)
    assert await control(driver, 2) == [
        (1, ControlEvent.PORT_NAME, 1, b"org.test.agent"),
        (1, ControlEvent.PORT_OPEN, 1, b""),
    ]
    agent.feed(b"to the guest")
    room = driver.buffer(32)
    driver.submit(4, [], [room])
    await asyncio.sleep(0)
    assert driver.queues[4].used() == [], "the port is not open yet"
    send(driver, 1, ControlEvent.PORT_OPEN, 1)
    await driver.used(4)
    assert driver.bytes_at(room)[:12] == b"to the guest"
    driver.submit(5, [driver.buffer(b"from the guest")])
    await agent.wait_output(b"from the guest")
    device.resize(90, 30)
    assert await control(driver, 1) == [(0, ControlEvent.RESIZE, 0, struct.pack("<HH", 90, 30))]
    state = device.save_device()
    assert [port.open for port in state.ports] == [False, True]


async def test_input_waits_for_a_port_that_is_closed(connect: Connect) -> None:
    """Also if it was open when the device began to wait for input: a driver throws away what comes to a closed one."""
    char = MemoryChar()
    driver = connect(ConsoleDevice([Port(MemoryChar()), Port(char, "p", console=False)]))
    driver.initialize()
    room = driver.buffer(32)
    driver.submit(4, [], [room])
    for _ in range(2):
        for value in (1, 0):
            send(driver, 1, ControlEvent.PORT_OPEN, value)
            for _ in range(5):
                await asyncio.sleep(0)
        char.feed(b"typed")
        for _ in range(5):
            await asyncio.sleep(0)
        assert driver.queues[4].used() == []
        send(driver, 1, ControlEvent.PORT_OPEN, 1)
        (used,) = await driver.used(4)
        assert driver.bytes_at(room)[: used.length] == b"typed"
        driver.submit(4, [], [room])


async def messages(driver: Any, rooms: list[Any]) -> list[tuple[int, int, int, bytes]]:
    """What came into the control receive buffers `rooms` once the device has nothing more to say."""
    send(driver, 0, ControlEvent.PORT_READY, 1)
    found: list[tuple[int, int, int, bytes]] = []
    while not found or found[-1][:3] != (0, ControlEvent.PORT_OPEN, 1):
        for used in await driver.used(2):
            data = driver.bytes_at(rooms.pop(0))[: used.length]
            found.append((*struct.unpack("<IHH", data[:8]), data[8:]))
    return found


@pytest.mark.clause("5.3.6.2.1-a", "5.3.6.2.1-b")
async def test_each_port_is_added_once(connect: Connect) -> None:
    """5.3.6.2.1: no port that exists, none from max_nr_ports on; after a reset none exists."""
    ports = [Port(MemoryChar()), *(Port(MemoryChar(), f"p{number}", console=False) for number in range(3))]
    driver = connect(ConsoleDevice(ports))
    for _ in range(2):
        driver.initialize()
        assert driver.config_read(4, 4) == 4
        rooms = [driver.buffer(64) for _ in range(64)]
        for room in rooms:
            driver.submit(2, [], [room])
        for value in (0, 1, 1, 0, 1):
            send(driver, 0, ControlEvent.DEVICE_READY, value)
        found = await messages(driver, rooms)
        assert [message[0] for message in found if message[1] == ControlEvent.DEVICE_ADD] == [0, 1, 2, 3]
        assert ControlEvent.DEVICE_REMOVE not in [message[1] for message in found]


async def test_control_messages_that_make_no_sense(connect: Connect) -> None:
    device = ConsoleDevice([Port(MemoryChar()), Port(MemoryChar(), "b", console=False)])
    driver = connect(device)
    driver.initialize()
    for port, event, value in ((9, ControlEvent.PORT_READY, 1), (0, 77, 1), (2**32 - 1, ControlEvent.PORT_OPEN, 1)):
        send(driver, port, event, value)
    driver.submit(3, [driver.buffer(b"short")])
    for _ in range(300):
        send(driver, 1, ControlEvent.PORT_READY, 1)
        await driver.used(3)
    assert len(device.save_device().messages) == 256, "a driver that asks and takes no answers"
    assert (await control(driver, 1))[0][:3] == (1, ControlEvent.PORT_NAME, 1)
    assert not driver.needs_reset


async def test_a_socket_console_replays_to_late_clients(tmp_path: Path) -> None:
    path = tmp_path / "console"
    char = await SocketChar(path).start()
    await char.write(b"boot messages\n")
    readers = [await asyncio.open_unix_connection(path) for _ in range(2)]
    for reader, _ in readers:
        assert await asyncio.wait_for(reader.readexactly(14), 10) == b"boot messages\n"
    await char.write(b"live\n")
    for reader, _ in readers:
        assert await asyncio.wait_for(reader.readexactly(5), 10) == b"live\n"
    readers[1][1].write(b"typed")
    assert await asyncio.wait_for(char.read(), 10) == b"typed"
    for _, writer in readers:
        writer.close()
    await char.aclose()
    assert not path.exists()


async def test_a_client_that_types_on_does_not_outlive_the_console(tmp_path: Path) -> None:
    char = await SocketChar(tmp_path / "console").start()
    before = asyncio.all_tasks()
    _, writer = await asyncio.open_unix_connection(tmp_path / "console")
    writer.write(bytes(8 << 20))
    async with asyncio.timeout(10):
        while not char._input._putters:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    await char.aclose()
    writer.transport.abort()
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")


async def test_watchers_of_a_socket_are_a_bounded_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one beyond is sent away; a late one gets the last 64 KiB however small the pieces were that they came in."""
    monkeypatch.setattr(char, "CLIENTS_MAX", 2)
    backend = await SocketChar(tmp_path / "console").start()
    for number in range(70_000):
        await backend.write(b"%d" % (number % 10))
    clients = [await asyncio.open_unix_connection(tmp_path / "console") for _ in range(2)]
    for reader, _ in clients:
        replayed = await asyncio.wait_for(reader.readexactly(65536), 10)
        assert replayed == b"".join(b"%d" % (number % 10) for number in range(70_000))[-65536:]
    reader, writer = await asyncio.open_unix_connection(tmp_path / "console")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    for one in (writer, *(writer for _, writer in clients)):
        one.close()
    await backend.aclose()
