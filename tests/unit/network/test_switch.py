"""A private switch: who gets which frame, its limits, and its bad wires; in this loop and as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmm
from tests.support.clocks import SteppedClock
from virtio.backends.impaired import ImpairedNet, Impairment
from virtio.backends.net import MemoryNet, NetBackend
from virtio.backends.switch import MAX_ADDRESSES, QUEUE_FRAMES, SwitchCore
from virtio.errors import HostError
from vmm.config import Net
from vmm.network import switch

A, B, C = (bytes([2, 0, 0, 0, 0, number]) for number in (1, 2, 3))
ALL = b"\xff" * 6


def frame(target: bytes, source: bytes, text: bytes = b"") -> bytes:
    return target + source + b"\x88\xb5" + text


async def got(net: NetBackend) -> bytes:
    return await asyncio.wait_for(net.receive(), 60)


async def passes(sender: NetBackend, receiver: NetBackend, sent: bytes) -> None:
    """Until a frame is there: what comes before the switch's process has the receiver's port is lost."""
    async with asyncio.timeout(60):
        while True:
            await sender.send(sent)
            with contextlib.suppress(TimeoutError):
                while await asyncio.wait_for(receiver.receive(), 0.5) != sent:
                    pass
                return


async def test_addresses_are_learnt_and_forgotten() -> None:
    core = SwitchCore()
    one, two, three = (core.port() for _ in range(3))
    await one.send(frame(B, A, b"unknown"))
    assert [await got(port) for port in (two, three)] == [frame(B, A, b"unknown")] * 2
    await two.send(frame(A, B))
    await one.send(frame(B, A, b"known"))
    await one.send(frame(ALL, A, b"all"))
    assert await got(one) == frame(A, B) and await got(two) == frame(B, A, b"known")
    assert await got(two) == await got(three) == frame(ALL, A, b"all")
    await three.send(frame(A, B, b"moved"))
    await one.send(frame(B, A, b"after"))
    assert await got(three) == frame(B, A, b"after")
    three.unplug()
    await one.send(frame(B, A, b"again"))
    assert await got(two) == frame(B, A, b"again"), "nobody knows where B is"
    with pytest.raises(HostError):
        await three.receive()
    await one.send(b"short")
    await one.send(frame(ALL, ALL))
    assert await got(two) == frame(ALL, ALL)
    assert len(core.ports) == 2


async def test_floods_stay_within_limits() -> None:
    core = SwitchCore()
    one, two = core.port(), core.port()
    for number in range(MAX_ADDRESSES + 100):
        await one.send(frame(ALL, b"\2\1" + number.to_bytes(4, "big")))
    assert len(core._addresses) == MAX_ADDRESSES
    assert two.lost == MAX_ADDRESSES + 100 - QUEUE_FRAMES
    for _ in range(QUEUE_FRAMES):
        await got(two)
    await one.send(frame(ALL, A))
    assert await got(two) == frame(ALL, A)


async def through(impairment: Impairment, count: int = 200) -> tuple[list[int], list[int]]:
    """The numbers of frames that come out of a wire, by the order of their arrival, and when, in milliseconds."""
    near, far = MemoryNet.pair()
    net, clock = ImpairedNet(near, impairment), SteppedClock()
    net.use_clock(lambda: clock)
    arrived: list[int] = []
    moments: list[int] = []
    begun = clock.now
    for number in range(count):
        await net.send(frame(ALL, A, number.to_bytes(4, "big")))

    async def take() -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        while far._arrived:
            arrived.append(int.from_bytes((await far.receive())[14:], "big"))
            moments.append((clock.now - begun) // 1_000_000)

    await take()
    while clock.step():
        await take()
    await net.aclose()
    return arrived, moments


async def test_a_bad_wire_is_bad_by_its_seed() -> None:
    clean, _ = await through(Impairment())
    assert clean == list(range(200))
    first, moments = await through(Impairment(delay=0.01, jitter=0.002, loss=0.1, duplicate=0.1, reorder=0.1, seed=3))
    again, _ = await through(Impairment(delay=0.01, jitter=0.002, loss=0.1, duplicate=0.1, reorder=0.1, seed=3))
    other, _ = await through(Impairment(delay=0.01, jitter=0.002, loss=0.1, duplicate=0.1, reorder=0.1, seed=4))
    assert first == again and first != other
    assert min(moments) >= 10 and max(moments) <= 24
    assert 5 < 200 - len(set(first)) < 50 and 5 < len(first) - len(set(first)) < 50 and first != sorted(first)
    late, moments = await through(Impairment(delay=0.5))
    assert late == clean and set(moments) == {500}


async def test_a_cut_wire_passes_nothing() -> None:
    near, far = MemoryNet.pair()
    net = ImpairedNet(near, Impairment())
    await net.send(frame(ALL, A, b"1"))
    assert await got(far) == frame(ALL, A, b"1")
    net.cut = True
    await net.send(frame(ALL, A, b"2"))
    await far.send(frame(ALL, B, b"2"))
    for _ in range(20):
        await asyncio.sleep(0)
    net.cut = False
    await far.send(frame(ALL, B, b"3"))
    await net.send(frame(ALL, A, b"3"))
    assert await got(far) == frame(ALL, A, b"3") and await got(net) == frame(ALL, B, b"3")
    await net.aclose()


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path


async def test_a_switch_in_this_loop(runtime: Path) -> None:
    async with vmm.Switch("lan") as lan:
        with pytest.raises(vmm.ConfigError, match="there already"):
            async with vmm.Switch("lan"):
                pass
        one, two = await switch.connect("lan"), await switch.connect("lan")
        ours = lan.port()
        await one.send(frame(ALL, A))
        assert await got(two) == await got(ours) == frame(ALL, A)
        await two.send(frame(A, B, b"x" * 60000))
        assert await got(one) == frame(A, B, b"x" * 60000)
        await two.aclose()
        lan.cut()
        await one.send(frame(ALL, A, b"lost"))
        async with asyncio.timeout(60):
            while lan.ports != 2:
                await asyncio.sleep(0.01)
        lan.cut(False)
        await ours.send(frame(A, C, b"back"))
        assert await got(one) == frame(A, C, b"back")
        await one.aclose()
    assert not list(runtime.rglob("*.sock"))


async def test_a_port_counts_from_the_moment_it_is_plugged_in(runtime: Path) -> None:
    """Else a switch that looks whether anybody is there could end under who has just come."""
    async with vmm.Switch("lan") as lan:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.settimeout(60)
        lan.plug(theirs)
        assert lan.ports == 1 and not lan.idle.is_set()
    assert lan.ports == 0 and lan.idle.is_set()
    assert ours.recv(1) == b"", "closed, though its task never began"
    ours.close()


async def test_a_lock_that_cannot_be_had_is_told_apart_from_what_goes_wrong_under_it(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch, "LOCK_SECONDS", 0.1)
    async with switch._locked("lan") as path:
        with pytest.raises(vmm.HostError, match="somebody holds"):
            async with switch._locked("lan"):
                pass
    with pytest.raises(TimeoutError):
        async with switch._locked("lan"):
            raise TimeoutError
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").mkdir()
    with pytest.raises(vmm.HostError, match="switch lan: .*lan.lock"):
        async with switch._locked("lan"):
            pass


async def test_a_switch_between_processes(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first who comes begins it; it ends when nobody is left, and if it is killed the next who comes begins it."""
    monkeypatch.setenv("LOOPVISOR_SWITCH_IDLE", "0.2")
    one = await switch.connect("lan")
    two = await switch.connect("lan")
    await passes(one, two, frame(ALL, A))
    await one.aclose()
    three = await switch.connect("lan")
    await passes(three, two, frame(ALL, C, b"still"))
    (path,) = runtime.rglob("*.sock")
    number = int(path.with_suffix(".pid").read_text())
    os.kill(number, signal.SIGKILL)
    (process,) = [begun for begun in switch._begun if begun.pid == number]
    process.wait(60)  # until then its socket may still take connections
    with pytest.raises(HostError):
        while True:
            await got(two)
    for net in (two, three):
        await net.aclose()
    one, two = await switch.connect("lan"), await switch.connect("lan")
    await passes(two, one, frame(ALL, B))
    for net in (one, two):
        await net.aclose()
    async with asyncio.timeout(60):
        while list(runtime.rglob("*.sock")):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("text", ["switch=", "switch=a/b", "switch=..", "user,loss=0.1", "switch=lan,loss=2",
                                  "switch=lan,delay=-1", "switch=lan,allow=*", "switch=lan,queues=2"])  # fmt: skip
def test_what_is_no_switch(text: str) -> None:
    with pytest.raises(vmm.ConfigError):
        Net.parse(text)


def test_a_card_on_a_switch() -> None:
    net = Net.parse("switch=lan,delay=0.01,loss=0.05,seed=7")
    assert (net.kind, net.target, net.impaired) == ("switch", "lan", {"delay": 0.01, "loss": 0.05, "seed": 7})


@pytest.mark.parametrize("values", [{"loss": 2}, {"delay": -1}, {"colour": 1}])
def test_what_a_switch_does_not_do(values: dict[str, float]) -> None:
    with pytest.raises(vmm.ConfigError):
        vmm.Switch("lan", **values)
