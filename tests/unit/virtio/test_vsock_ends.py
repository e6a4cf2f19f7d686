"""How vsock connections end, whoever ends them: nothing stays on the host, and the guest hears of it (5.10.6.5)."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from virtio.backends.vsock import MemoryVsock, Streams, UnixVsock, VsockBackend
from virtio.devices import vsock, vsock_host
from virtio.devices.vsock import FIRST_PORT, VsockDevice
from virtio.devices.vsock_stream import REFUSALS_MAX

from .conftest import Connect
from .test_vsock import CID, Guest, Op

PORT = 1025
ROUNDS = 20
BOTH = 3


def tasks(kind: str) -> int:
    """Of the vsock devices in this loop."""
    return sum(task.get_name() == f"VsockDevice.{kind}" for task in asyncio.all_tasks())


async def until_eof(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A host's end that says nothing, and closes after the guest did."""
    await reader.read()


async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A host's end that says something and never closes."""
    writer.write(b"hello")
    await asyncio.Event().wait()


async def guest_of(connect: Connect, backend: VsockBackend, alloc: int = 1 << 20) -> Guest:
    device = VsockDevice(backend, CID)
    await device.start()
    driver = connect(device)
    driver.initialize()
    return Guest(driver, alloc)


async def test_a_connection_that_the_device_ends_leaves_nothing(connect: Connect) -> None:
    """A guest that breaks the rules on one connection after the other does not fill the host."""
    backend = MemoryVsock()
    backend.listen(PORT, until_eof)
    guest = await guest_of(connect, backend)
    for port in range(ROUNDS):
        guest.send(port, PORT, Op.REQUEST)
        await guest.expect(Op.RESPONSE)
        guest.send(port, PORT, 99)
        await guest.expect(Op.RST)
    await guest.driver.wait(lambda: not tasks("to-host") and not tasks("to-guest"))


async def test_a_guest_without_credit_that_closes(connect: Connect) -> None:
    """Bytes that wait for its credit go nowhere."""
    backend = MemoryVsock()
    backend.listen(PORT, deaf)
    guest = await guest_of(connect, backend, alloc=0)
    for port in range(ROUNDS):
        guest.send(port, PORT, Op.REQUEST)
        await guest.expect(Op.RESPONSE)
        guest.send(port, PORT, Op.SHUTDOWN, flags=BOTH)
        await guest.expect(Op.RST)
    await guest.driver.wait(lambda: not tasks("to-host") and not tasks("to-guest"))


async def test_a_half_closed_connection_is_closed(connect: Connect) -> None:
    """5.10.6.5: the guest ends its direction, then the other one: it gets its RST although the host says no more."""
    backend = MemoryVsock()
    backend.listen(PORT, deaf)
    guest = await guest_of(connect, backend)
    guest.send(1, PORT, Op.REQUEST)
    await guest.expect(Op.RESPONSE)
    await guest.expect(Op.RW)
    guest.send(1, PORT, Op.SHUTDOWN, flags=2)
    await guest.driver.wait(lambda: not tasks("to-host"))
    guest.send(1, PORT, Op.SHUTDOWN, flags=BOTH)
    await guest.expect(Op.RST)
    await guest.driver.wait(lambda: not tasks("to-guest"))


class Silent(MemoryVsock):
    """Nobody refuses, nobody answers."""

    async def dial(self, port: int) -> Streams:
        await asyncio.Event().wait()
        raise AssertionError


async def test_connections_given_up_before_they_are_answered(connect: Connect) -> None:
    """Each is given up on the host as well."""
    guest = await guest_of(connect, Silent())
    for port in range(ROUNDS):
        guest.send(port, PORT, Op.REQUEST)
        await guest.driver.wait(lambda: tasks("dial") == 1)
        guest.send(port, PORT, Op.RST)
        await guest.driver.wait(lambda: not tasks("dial"))


async def test_a_host_without_descriptors(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest accepted, and hears that it came to nothing."""

    async def none_left() -> Any:
        raise OSError(24, "Too many open files")

    backend = MemoryVsock()
    guest = await guest_of(connect, backend)
    monkeypatch.setattr(vsock, "stream_pair", none_left)
    opening = asyncio.ensure_future(backend.open(1024))
    packet, _ = await guest.expect(Op.REQUEST)
    guest.send(1024, packet.src_port, Op.RESPONSE)
    with pytest.raises(OSError, match="Too many"):
        await asyncio.wait_for(opening, 10)
    await guest.expect(Op.RST)


async def test_one_who_gave_up_does_not_end_anothers_connection(connect: Connect) -> None:
    """The guest refuses a connection from the host, and makes one of its own with the same ports."""
    backend = MemoryVsock()
    backend.listen(FIRST_PORT, until_eof)
    device = VsockDevice(backend, CID)
    await device.start()
    driver = connect(device)
    driver.initialize()
    opening = asyncio.ensure_future(backend.open(1024))
    await driver.wait(lambda: opening.done() or device._connections)
    guest = Guest(driver)
    await guest.expect(Op.REQUEST)
    guest.send(1024, FIRST_PORT, Op.RST)
    guest.send(1024, FIRST_PORT, Op.REQUEST)
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(opening, 10)
    await guest.expect(Op.RESPONSE)
    guest.send(1024, FIRST_PORT, Op.CREDIT_REQUEST)
    await guest.expect(Op.CREDIT_UPDATE)


async def test_a_refusal_that_nobody_waits_for(connect: Connect) -> None:
    """The host gives up while its request still waits for the guest's buffers, and the guest refused it."""
    unhandled: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    backend = MemoryVsock()
    device = VsockDevice(backend, CID)
    await device.start()
    driver = connect(device)
    driver.initialize()
    guest = Guest.__new__(Guest)
    guest.driver, guest.alloc, guest.forwarded = driver, 0, 0
    guest._slots = [driver.allocator.take(64) for _ in range(8)]
    for _ in range(REFUSALS_MAX - 1):
        guest.send(9, 9, Op.RW)
        await driver.used(1)
    opening = asyncio.ensure_future(backend.open(1024))
    await asyncio.sleep(0)
    assert not opening.done()
    guest.send(1024, FIRST_PORT, Op.RST)
    await driver.used(1)
    opening.cancel()
    await asyncio.wait([opening])
    del opening
    gc.collect()
    assert not unhandled


@pytest.mark.parametrize("how", ["connection", "device"])
async def test_a_host_that_does_not_read(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What it was sent waits for it after the guest has gone, for a bounded number of connections."""
    monkeypatch.setattr(vsock_host, "CONNECTIONS_MAX", 4)
    monkeypatch.setattr(vsock_host, "LINGERING_MAX", 4)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / f"v_{PORT}"))
        listener.listen(100)
        guest = await guest_of(connect, UnixVsock(tmp_path / "v"))
        before = len(os.listdir("/proc/self/fd"))
        for port in range(ROUNDS):
            guest.send(port, PORT, Op.REQUEST)
            while (await guest.receive())[0].op != Op.RESPONSE:  # after refusals of what came beyond
                pass
            for _ in range(28):  # more than its credit, so that the device ends the connection
                guest.send(port, PORT, Op.RW, bytes(32768))
                await guest.driver.used(1)
            while (await guest.receive())[0].op != Op.RST:
                pass
            if how == "device":
                guest.driver.initialize()
                guest = Guest(guest.driver)
        assert len(os.listdir("/proc/self/fd")) - before <= 8
