"""TCP connections whose other end forgot them: a card that goes on from a saved state resets them (RFC 9293, 3.10.7.1,
3.5.2), and leaves new ones alone."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hops import moves
from tests.support.segments import ACK, FIN, RST, SYN, Segment
from virtio import _ring
from virtio.backends.net import MemoryNet
from virtio.backends.sockets import StreamNet
from virtio.devices.net import NetDevice, parse_mac
from virtio.devices.netstate import NetState, NetStateV2
from virtio.errors import HostError, StateError
from vmm.state.payload import encode, parse

from .conftest import Connect

GUEST, HOST = parse_mac("52:54:00:12:34:56"), parse_mac("52:54:00:99:99:99")
V4 = Segment(GUEST, HOST, "10.0.2.15", "10.0.2.2", 40000, 80, SYN, 1000)
V6 = replace(V4, source="fd00::15", target="fd00::2")
HEADER = bytes(12)


def back(segment: Segment, flags: int, **changes: Any) -> Segment:
    """A segment of the same connection from its other end."""
    turned = replace(
        segment, source_mac=segment.target_mac, target_mac=segment.source_mac, source=segment.target,
        target=segment.source, source_port=segment.target_port, target_port=segment.source_port, flags=flags,
    )  # fmt: skip
    return replace(turned, **{"seq": 0, "ack": 0, "data": b"", **changes})


@pytest.fixture(params=[V4, V6], ids=["v4", "v6"])
def opening(request: pytest.FixtureRequest) -> Segment:
    """The SYN of a connection that the guest begins."""
    segment: Segment = request.param
    return segment


def test_what_ends_is_not_saved(opening: Segment) -> None:
    """Connections of both directions are, until a reset or two FINs end them."""
    flows = _ring.Flows()
    assert flows.save() == []
    assert not flows.outgoing(opening.frame())
    inward = back(opening, SYN, source_port=5000, target_port=22)
    flows.incoming(inward.frame())
    assert len(flows.save()) == 2 and all(len(item) == 50 for item in flows.save())
    flows.outgoing(replace(opening, flags=FIN | ACK).frame())
    assert len(flows.save()) == 2, "half closed"
    flows.incoming(back(opening, FIN | ACK).frame())
    assert len(flows.save()) == 1
    flows.outgoing(back(inward, RST | ACK).frame())
    assert flows.save() == []


def test_an_unknown_segment_is_answered_as_the_rfc_says(opening: Segment) -> None:
    """With ACK: <SEQ=SEG.ACK><CTL=RST>; without: <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>; a RST: not at all."""
    flows = _ring.Flows()
    old = replace(opening, flags=ACK, seq=5000, ack=7000, data=b"hello")
    assert not flows.outgoing(old.frame()), "nothing is answered before the other end is known to be new"
    flows.forgotten([])
    assert flows.outgoing(old.frame())
    assert [Segment.read(item) for item in flows.replies()] == [back(opening, RST, seq=7000)]
    assert flows.replies() == []
    assert flows.outgoing(replace(old, flags=FIN).frame())
    assert [Segment.read(item) for item in flows.replies()] == [back(opening, RST | ACK, ack=5006)]
    assert flows.outgoing(replace(old, flags=RST).frame()) and flows.replies() == []


def test_connections_that_begin_afterwards_are_left_alone(opening: Segment) -> None:
    """Those of the guest and those of others, until long after their end."""
    flows = _ring.Flows()
    flows.forgotten([])
    inward = back(opening, SYN, source_port=5000, target_port=22)
    assert not flows.outgoing(opening.frame())
    flows.incoming(inward.frame())
    for flags in (ACK, FIN | ACK, ACK):
        assert not flows.outgoing(replace(opening, flags=flags).frame())
        assert not flows.outgoing(back(inward, flags | (SYN if flags == ACK else 0)).frame())
        flows.incoming(back(opening, flags).frame())
    assert flows.replies() == []


def test_those_that_were_saved_are_made_to_speak(opening: Segment) -> None:
    """A silent guest hears of the end, too: a segment that fits no window is answered with an ACK (3.10.7.4), and that
    with a reset that does fit."""
    before = _ring.Flows()
    before.outgoing(opening.frame())
    flows = _ring.Flows()
    flows.forgotten(before.save())
    (probe,) = map(Segment.read, flows.replies())
    assert probe == back(opening, ACK)
    assert flows.outgoing(replace(opening, flags=ACK, seq=1234, ack=4321).frame())
    assert Segment.read(flows.replies()[0]) == back(opening, RST, seq=4321)


def test_more_than_can_be_kept() -> None:
    """Connections beyond the table are forgotten; none of them is reset then, for it may be alive."""
    flows = _ring.Flows()
    flows.forgotten([])
    for port in range(1, 20000):
        flows.outgoing(replace(V4, source_port=port).frame())
    assert 3500 < len(flows.save()) <= 4096
    for port in range(1, 20000):
        assert not flows.outgoing(replace(V4, source_port=port, flags=ACK).frame())
    assert flows.replies() == []


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([V4, V6]), st.integers(0, 130))
def test_no_frame_disturbs_it(data: bytes, segment: Segment, at: int) -> None:
    """Frames of any content and length, and damaged segments."""
    whole = segment.frame()
    for frame in (data, whole[:at] + data, whole[:at]):
        flows = _ring.Flows()
        flows.incoming(frame)
        flows.outgoing(frame)
        flows.forgotten(flows.save())
        flows.outgoing(frame)
        flows.incoming(frame)
        for reply in flows.replies():
            Segment.read(reply)


@pytest.mark.parametrize("saved", [[b""], [bytes(50)], [bytes(49)], [b"\xff" * 50]])
def test_saved_connections_are_checked(saved: list[bytes]) -> None:
    """Of the right length, and of a version of IP that there is."""
    with pytest.raises(ValueError, match="not the addresses"):
        _ring.Flows().forgotten(saved)


def test_a_state_without_connections_is_accepted() -> None:
    """The version before had none."""
    old = NetStateV2(GUEST, True, 1, None, None, False)
    assert parse(NetState, "virtio-net", encode(old)).connections == ()


class Kept(MemoryNet):
    """As passt: connections end in it."""

    keeps_connections = True


class KeptStream(StreamNet):
    keeps_connections = True


def memory() -> tuple[Any, Any]:
    one, two = Kept(), Kept()
    one.peer, two.peer = two, one
    return one, two


def stream() -> tuple[Any, Any]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return KeptStream(one), KeptStream(two)


@moves("virtio-net")
@pytest.mark.parametrize("pair", [memory, stream])
async def test_a_card_that_goes_on_resets_them(
    connect: Connect, pair: Callable[[], tuple[Any, Any]], opening: Segment
) -> None:
    """Through the queues, on both data paths: the probe comes by itself; the guest's old connection is reset, and
    nothing of it reaches the new other end; a new one works."""
    near, far = pair()
    driver = connect(NetDevice(near, GUEST))
    driver.initialize()
    driver.submit(1, [driver.buffer(HEADER + opening.frame())])
    assert await asyncio.wait_for(far.receive(), 30) == opening.frame()
    await driver.used(1)
    state = driver.transport.device.save_device()
    assert len(state.connections) == 1
    await far.aclose()

    near, far = pair()
    device = NetDevice(near, GUEST)
    device.restore_device(parse(NetState, "virtio-net", json.loads(json.dumps(encode(state)))))
    driver = connect(device)
    driver.initialize()
    rooms = [driver.buffer(2000) for _ in range(4)]
    for room in rooms:
        driver.submit(0, [], [room])
    device.resume()

    async def arrives() -> Segment:
        room = rooms.pop(0)
        (used,) = await driver.used(0)
        return Segment.read(driver.bytes_at(room)[len(HEADER) : used.length])

    assert await arrives() == back(opening, ACK)
    driver.submit(1, [driver.buffer(HEADER + replace(opening, flags=ACK, seq=9, ack=77).frame())])
    assert await arrives() == back(opening, RST, seq=77)
    fresh = replace(opening, source_port=40001)
    driver.submit(1, [driver.buffer(HEADER + fresh.frame())])
    assert await asyncio.wait_for(far.receive(), 30) == fresh.frame()
    await driver.used(1, 2)
    await far.aclose()


@pytest.mark.parametrize("pair", [memory, stream])
@pytest.mark.parametrize("overlap", [True, False])
async def test_a_card_gets_another_backend(
    connect: Connect, pair: Callable[[], tuple[Any, Any]], overlap: bool
) -> None:
    """While it is used: the connection of before is reset, a frame that is sent meanwhile arrives at the new one, and
    what it counted stays. One that does not come costs the link until another does, or nothing if the old one stays."""
    near, far = pair()
    device = NetDevice(near, GUEST)
    driver = connect(device)
    driver.initialize()
    rooms = [driver.buffer(2000) for _ in range(4)]
    for room in rooms:
        driver.submit(0, [], [room])
    driver.submit(1, [driver.buffer(HEADER + V4.frame())])
    assert await asyncio.wait_for(far.receive(), 30) == V4.frame()
    await driver.used(1)

    async def fails() -> Any:
        raise HostError("no network")

    with pytest.raises(HostError, match="no network"):
        await device.exchange(near.aclose, fails, overlap=overlap)
    assert device.link is overlap
    begun, come = asyncio.Event(), asyncio.Event()
    new_near, new_far = pair()

    async def make() -> Any:
        begun.set()
        await come.wait()
        return new_near

    change = asyncio.create_task(device.exchange(near.aclose, make, overlap=overlap))
    await begun.wait()
    fresh = replace(V4, source_port=40001)
    if not overlap:  # else the old one is there to the end
        driver.submit(1, [driver.buffer(HEADER + fresh.frame())])
    come.set()
    await asyncio.wait_for(change, 30)
    assert device.link

    async def arrives() -> Segment:
        room = rooms.pop(0)
        (used,) = await driver.used(0)
        return Segment.read(driver.bytes_at(room)[len(HEADER) : used.length])

    assert await arrives() == back(V4, ACK)
    driver.submit(1, [driver.buffer(HEADER + replace(V4, flags=ACK, seq=9, ack=77).frame())])
    assert await arrives() == back(V4, RST, seq=77)
    if overlap:
        driver.submit(1, [driver.buffer(HEADER + fresh.frame())])
    assert await asyncio.wait_for(new_far.receive(), 30) == fresh.frame()
    inward = back(V4, SYN, source_port=5000, target_port=22)
    await new_far.send(inward.frame())
    assert await arrives() == inward
    await driver.used(1, 2)
    assert device.counters["sent"] >= 2 and device.counters["received"] >= 1
    await far.aclose()
    await new_far.aclose()


async def test_a_card_that_goes_takes_its_next_backend_along() -> None:
    """Nothing stays behind of one that came too late."""
    near, far = stream()
    device, (late, other) = NetDevice(near, GUEST), stream()

    async def make() -> Any:
        await device.aclose()
        return late

    with pytest.raises(StateError, match="gone"):
        await device.exchange(near.aclose, make, overlap=False)
    assert late.channels == ()
    for end in (far, other):
        await end.aclose()


def test_a_connection_in_use_is_not_the_one_that_gives_way() -> None:
    """However many come after it."""
    flows = _ring.Flows()
    flows.outgoing(V4.frame())
    for port in range(1, 40000):
        flows.incoming(back(V4, ACK).frame())
        flows.outgoing(replace(V4, source_port=port).frame())
    assert len(flows.save()) <= 4096
    assert V4.source_port.to_bytes(2, "big") in [item[46:48] for item in flows.save()]


def test_a_card_refuses_nonsense() -> None:
    """A saved state is hostile."""
    device = NetDevice(Kept(), GUEST)
    with pytest.raises(StateError, match="connections"):
        device.restore_device(NetState(GUEST, True, 1, None, None, False, (b"\xff" * 50,), None))
