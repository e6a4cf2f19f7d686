"""Live migration's protocol: frames, messages, pages, plans. A hostile peer raises StateError at most."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm import _native
from vmm.errors import ConfigError, StateError
from vmm.migration import protocol
from vmm.migration.link import Address, Closed, Link, parse_uri
from vmm.migration.precopy import Options, Pace, Pages, Planner
from vmm.migration.protocol import COMPRESSED, HEADER, LIMITS, Hello, Kind

PAGE = 4096


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp:host:4444", Address("tcp", host="host", port=4444)),
        ("tcp://[::1]:1", Address("tcp", host="::1", port=1)),
        ("unix:/run/a", Address("unix", path=__import__("pathlib").Path("/run/a"))),
        ("unix:///run/a", Address("unix", path=__import__("pathlib").Path("/run/a"))),
        ("fd:7", Address("fd", fd=7)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_uri(text) == address
    assert parse_uri(str(address)) == address


@pytest.mark.parametrize("text", ["", "host:1", "tcp:host", "tcp:host:99999", "unix:", "fd:x", "http://a:1"])
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="tcp:HOST:PORT"):
        parse_uri(text)


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_any_header_parses_or_raises_a_state_error(data: bytes) -> None:
    try:
        kind, _, length, _ = protocol.parse_header(data)
    except StateError:
        return
    assert length <= LIMITS[kind]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
)


@given(
    st.sampled_from(list(Kind)),
    st.binary(max_size=200) | json_values.map(lambda v: __import__("json").dumps(v).encode()),
)
def test_any_payload_parses_or_raises_a_state_error(kind: Kind, data: bytes) -> None:
    try:
        protocol.unpack(kind, data)
    except StateError:
        pass


def test_versions_n_and_before_are_spoken() -> None:
    newest = protocol.VERSION
    assert protocol.common_version(Hello(protocol.OLDEST, newest)) == newest
    assert protocol.common_version(Hello(newest - 1, newest - 1)) == newest - 1
    assert protocol.common_version(Hello(newest, newest + 5)) == newest
    with pytest.raises(StateError, match="update the older"):
        protocol.common_version(Hello(newest + 1, newest + 2))


@given(
    st.lists(st.sampled_from([b"\0", b"a", b"b"]), min_size=64, max_size=64),
    st.lists(st.sampled_from([b"\0", b"a", b"c"]), min_size=64, max_size=64),
    st.integers(0, 2**64 - 1),
    st.integers(1, 64),
    st.integers(1, 8),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_pages_arrive_as_they_were(
    first: list[bytes], then: list[bytes], chosen: int, room: int, table: int, keep: bool
) -> None:
    """Two rounds, the first of all pages into empty memory, the second of any: with and without digests."""
    memory = bytearray(b"".join(byte * PAGE for byte in first))
    there = bytearray(len(memory))
    digests = bytearray(64 * 16) if keep else None

    def move(bitmap: bytes, fresh: bool) -> int:
        at, data_pages = 0, 0
        while at < 64:
            entries, out = bytearray(8 * table), bytearray(PAGE * room)
            at, runs, data, zero, same = _native.pack_pages(memory, bitmap, at, entries, out, digests, fresh)
            assert runs or at == 64
            assert _native.unpack_pages(there, entries[: 8 * runs], out[: data * PAGE]) == data + zero
            data_pages += data
        return data_pages

    move(b"\xff" * 8, True)
    assert there == memory
    memory[:] = b"".join(byte * PAGE for byte in then)
    moved = move(chosen.to_bytes(8, "little"), False)
    wanted = [then[n] if chosen >> n & 1 else first[n] for n in range(64)]
    assert there == b"".join(byte * PAGE for byte in wanted)
    if keep:
        changed = [n for n in range(64) if chosen >> n & 1 and then[n] != first[n] and then[n] != b"\0"]
        assert moved == len(changed), "what holds the same is not sent again"


@given(st.binary(max_size=64), st.integers(0, 3))
def test_a_table_out_of_bounds_changes_nothing(table: bytes, pages: int) -> None:
    memory = bytearray(b"x" * (8 * PAGE))
    before = bytes(memory)
    try:
        _native.unpack_pages(memory, table, bytes(pages * PAGE))
    except ValueError:
        assert memory == before


def pair() -> tuple[Link, Link]:
    one, other = socket.socketpair()
    return Link(one, "one"), Link(other, "other")


def test_frames_over_a_socket() -> None:
    ours, theirs = pair()
    import threading

    greeting = threading.Thread(target=theirs.greet)
    greeting.start()
    ours.greet()
    greeting.join()
    assert ours.version == theirs.version == protocol.VERSION
    ours.send_message(Kind.ROUND, protocol.Round(3))
    assert theirs.expect(Kind.ROUND) == (Kind.ROUND, protocol.Round(3))
    ours.send_message(Kind.READY)
    with pytest.raises(StateError, match="sent READY instead of TAKEN"):
        theirs.expect(Kind.TAKEN)
    ours.close()
    with pytest.raises(Closed):
        theirs.receive()
    theirs.close()


@pytest.mark.parametrize("damage", range(0, 40, 3))
def test_a_damaged_frame_is_told(damage: int) -> None:
    one, other = socket.socketpair()
    link = Link(other, "other")
    payload = protocol.pack(protocol.Round(3))
    frame = bytearray(protocol.header(Kind.ROUND, len(payload), _native.crc32c(payload)) + payload)
    frame[damage] ^= 0x10
    one.sendall(frame)
    one.close()
    with pytest.raises((StateError, Closed)):
        link.receive()
    link.close()


def test_a_frame_that_unpacks_to_much_is_refused() -> None:
    import zstandard

    one, other = socket.socketpair()
    link = Link(other, "other")
    payload = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    one.sendall(protocol.header(Kind.PAGES, len(payload), _native.crc32c(payload), COMPRESSED) + payload)
    with pytest.raises(StateError, match="at most"):
        link.receive()
    one.close()
    link.close()


@pytest.mark.parametrize("compress", [False, True])
def test_rounds_over_several_connections(compress: bool) -> None:
    """Whatever connection a page took, it arrives."""
    import threading

    memory = memoryview(bytearray(b"".join(bytes([n % 7]) * PAGE for n in range(512))))
    there = bytearray(len(memory))
    links = [pair() for _ in range(3)]
    pages = Pages([ours for ours, _ in links], [memory], Pace(0), threading.Event(), compress=compress, digests=True)
    pages.round = 1

    def read(link: Link) -> None:
        while True:
            kind, payload = link.receive()
            if kind is Kind.ROUND:
                return
            region, base, runs = protocol.PAGES.unpack_from(payload)
            assert region == 0
            table = payload[protocol.PAGES.size : protocol.PAGES.size + 8 * runs]
            _native.unpack_pages(memoryview(there)[base * PAGE :], table, payload[protocol.PAGES.size + 8 * runs :])

    readers = [threading.Thread(target=read, args=(theirs,)) for _, theirs in links]
    for reader in readers:
        reader.start()
    work = pages.pieces([b"\xff" * 64])
    sent = [pages.send(number, work, fresh=True) for number in range(3)]
    for reader in readers:
        reader.join()
    assert bytes(there) == bytes(memory) and sum(each.pages for each in sent) == 512 - len(range(0, 512, 7))
    for ours, theirs in links:
        ours.close()
        theirs.close()


def decisions(options: Options, *rounds: tuple[int, int]) -> list[str]:
    planner = Planner(options, 0.0)
    return [planner.after_round(sent, left, 100e6) for sent, left in rounds]


def test_plans() -> None:
    """It stands still when what is left fits the goal; slows a guest down that writes as fast as the link, to a limit;
    gives up at last."""
    megabyte = 1_000_000
    goal = Options(downtime=0.3)
    assert decisions(goal, (1000 * megabyte, megabyte // 2)) == ["stop"]
    assert decisions(goal, (1000 * megabyte, 200 * megabyte), (200 * megabyte, megabyte)) == ["again", "stop"]
    # The goal is met, and another round makes it shorter still: as long as each leaves less than half.
    assert decisions(goal, (1000 * megabyte, 20 * megabyte), (20 * megabyte, 11 * megabyte)) == ["again", "stop"]
    halves = [(24 * megabyte >> n, 12 * megabyte >> n) for n in range(4)]
    assert decisions(goal, *halves) == ["again"] * 3 + ["stop"]
    fast = [(1000 * megabyte, 990 * megabyte)] * 20
    found = decisions(Options(downtime=0.1, throttle=60), *fast)
    assert found[0] == "again" and found[1:4] == ["slower"] * 3 and "give up" in found[4:]
    assert "slower" not in decisions(Options(downtime=0.1, throttle=0), *fast)


def test_a_slow_first_answer_does_not_make_the_goal_unreachable() -> None:
    assert Planner(Options(downtime=0.1), 5.0).after_round(1 << 30, 4096, 100e6) == "stop"


@pytest.mark.parametrize(
    "wrong", [{"bandwidth": 1}, {"downtime": 0.0}, {"connections": 0}, {"connections": 17}, {"throttle": 100}]
)
def test_options_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Options(**wrong).check()
