"""The server's side of DHCP, by the clauses of RFC 2131."""

from __future__ import annotations

import ipaddress
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import ConfigError, HostError
from vmm.network.dhcp import (
    COOKIE,
    DECLINED_SECONDS,
    OFFER_SECONDS,
    DhcpKind,
    DhcpServer,
    Option,
    Plan,
    plan_from,
    plan_values,
)
from vmm.network.server import LeaseFile, read_leases

SERVER = "192.168.150.1"
ONE, TWO, THREE = (f"52:54:00:00:00:0{number}" for number in (1, 2, 3))


def plan(**values: object) -> Plan:
    given_values: dict[str, object] = {
        "address": ipaddress.IPv4Interface(f"{SERVER}/24"),
        "start": ipaddress.IPv4Address("192.168.150.10"),
        "end": ipaddress.IPv4Address("192.168.150.11"),
    }
    return Plan(**{**given_values, **values})  # type: ignore[arg-type]


def message(kind: int, mac: str, *options: tuple[int, bytes], current: str = "0.0.0.0", **fields: int) -> bytes:
    head = struct.pack(
        "!BBBBIHH4s4s4s4s16s64s128s", fields.get("op", 1), 1, 6, 0, fields.get("xid", 7), 0, 0x8000,
        ipaddress.IPv4Address(current).packed, bytes(4), bytes(4), struct.pack("!I", fields.get("relay", 0)),
        bytes.fromhex(mac.replace(":", "")), b"", b"",
    )  # fmt: skip
    given_options = [(int(Option.KIND), bytes([kind])), *options]
    return head + COOKIE + b"".join(bytes([code, len(value)]) + value for code, value in given_options) + b"\xff"


def read(reply: bytes | None) -> tuple[int, str, dict[int, bytes]]:
    """(kind, the address given, the options)."""
    assert reply is not None
    assert reply[0] == 2
    assert len(reply) >= 300
    options, at = {}, 240
    while reply[at] != Option.END:
        options[reply[at]] = reply[at + 2 : at + 2 + reply[at + 1]]
        at += 2 + reply[at + 1]
    return options[Option.KIND][0], str(ipaddress.IPv4Address(reply[16:20])), options


def address(text: str) -> bytes:
    return ipaddress.IPv4Address(text).packed


def obtain(server: DhcpServer, mac: str, now: float) -> str:
    """Discover and request; the address."""
    kind, offered, options = read(server.answer(message(DhcpKind.DISCOVER, mac), now))
    assert kind == DhcpKind.OFFER
    wanted = ((Option.REQUESTED, address(offered)), (Option.SERVER, options[Option.SERVER]))
    kind, given_address, _ = read(server.answer(message(DhcpKind.REQUEST, mac, *wanted), now))
    assert (kind, given_address) == (DhcpKind.ACK, offered)
    return given_address


def test_four_messages_make_a_lease() -> None:
    server = DhcpServer(plan(domain="inner.test", mtu=1400))
    first = obtain(server, ONE, 100.0)
    assert first in ("192.168.150.10", "192.168.150.11")
    (lease,) = server.leases(100.0)
    assert (lease.mac, lease.address, lease.expires) == (ONE, first, 3700.0)
    assert server.leases(3701.0) == []


def test_the_options_say_what_the_plan_says() -> None:
    _, _, options = read(DhcpServer(plan(domain="inner.test", mtu=1400)).answer(message(DhcpKind.DISCOVER, ONE), 0.0))
    assert options[Option.ROUTER] == options[Option.NAME_SERVER] == options[Option.SERVER] == address(SERVER)
    assert options[Option.MASK] == address("255.255.255.0")
    assert options[Option.DOMAIN] == b"inner.test"
    assert struct.unpack("!H", options[Option.MTU]) == (1400,)
    assert struct.unpack("!I", options[Option.LEASE_TIME]) == (3600,)
    _, _, options = read(DhcpServer(plan(router=False, name_server=False)).answer(message(DhcpKind.DISCOVER, ONE), 0.0))
    assert Option.ROUTER not in options
    assert Option.NAME_SERVER not in options


def test_no_two_clients_have_one_address_and_a_full_range_answers_nobody() -> None:
    server = DhcpServer(plan())
    assert obtain(server, ONE, 0.0) != obtain(server, TWO, 0.0)
    assert server.answer(message(DhcpKind.DISCOVER, THREE), 0.0) is None
    # Expired addresses are given again.
    assert obtain(server, THREE, 3601.0)


def test_an_offer_that_nobody_takes_is_free_again() -> None:
    server = DhcpServer(plan(end=ipaddress.IPv4Address("192.168.150.10")))
    assert server.answer(message(DhcpKind.DISCOVER, ONE), 0.0) is not None
    assert server.answer(message(DhcpKind.DISCOVER, TWO), 1.0) is None
    assert obtain(server, TWO, OFFER_SECONDS + 1) == "192.168.150.10"


def test_a_client_keeps_its_address() -> None:
    server = DhcpServer(plan())
    before = obtain(server, ONE, 0.0)
    # Renewal: the address in ciaddr, no server named (4.3.2).
    kind, given_address, _ = read(server.answer(message(DhcpKind.REQUEST, ONE, current=before), 1800.0))
    assert (kind, given_address) == (DhcpKind.ACK, before)
    assert server.leases(1800.0)[0].expires == 5400.0
    again = DhcpServer(plan(), server.leases(1800.0))  # another process goes on
    assert obtain(again, ONE, 1801.0) == before


def test_a_wrong_address_is_refused() -> None:
    server = DhcpServer(plan())
    kind, given_address, options = read(
        server.answer(message(DhcpKind.REQUEST, ONE, (Option.REQUESTED, address("10.0.0.9"))), 0.0)
    )
    assert (kind, given_address) == (DhcpKind.NAK, "0.0.0.0")
    assert Option.LEASE_TIME not in options
    assert server.leases(0.0) == []


def test_another_servers_offer_was_taken() -> None:
    server = DhcpServer(plan())
    wanted = ((Option.REQUESTED, address("192.168.150.10")), (Option.SERVER, address("192.168.150.250")))
    assert server.answer(message(DhcpKind.REQUEST, ONE, *wanted), 0.0) is None
    assert server.leases(0.0) == []


def test_release_and_decline() -> None:
    server = DhcpServer(plan(end=ipaddress.IPv4Address("192.168.150.10")))
    held = obtain(server, ONE, 0.0)
    assert server.answer(message(DhcpKind.RELEASE, TWO, current=held), 1.0) is None
    assert len(server.leases(1.0)) == 1  # it was not that client's
    server.answer(message(DhcpKind.RELEASE, ONE, current=held), 1.0)
    assert obtain(server, TWO, 2.0) == held
    server.answer(message(DhcpKind.DECLINE, TWO, (Option.REQUESTED, address(held))), 3.0)
    assert server.answer(message(DhcpKind.DISCOVER, ONE), 4.0) is None
    assert obtain(server, ONE, 4.0 + DECLINED_SECONDS) == held


def test_hosts_have_their_own_addresses() -> None:
    server = DhcpServer(plan(hosts={ONE: ("192.168.150.10", "one"), TWO: ("192.168.150.99", "")}))
    assert obtain(server, TWO, 0.0) == "192.168.150.99"
    assert obtain(server, THREE, 0.0) == "192.168.150.11"
    assert obtain(server, ONE, 0.0) == "192.168.150.10"
    assert {lease.mac: lease.hostname for lease in server.leases(0.0)}[ONE] == "one"


def test_a_guests_name_is_a_name_or_none() -> None:
    server = DhcpServer(plan())
    for told, kept in ((b"web-1", "web-1"), (b"web.example.org", "web"), (b"<b>\x00\xff", ""), (b"a b", "")):
        server.answer(message(DhcpKind.DISCOVER, ONE), 0.0)
        offered = server.answer(message(DhcpKind.DISCOVER, ONE), 0.0)
        _, wanted, _ = read(offered)
        server.answer(
            message(DhcpKind.REQUEST, ONE, (Option.REQUESTED, address(wanted)), (Option.HOST_NAME, told)), 0.0
        )
        assert server.leases(0.0)[0].hostname == kept


@pytest.mark.parametrize(
    "data",
    [
        b"",
        message(DhcpKind.DISCOVER, ONE)[:239],
        message(DhcpKind.DISCOVER, ONE, op=2),
        message(DhcpKind.DISCOVER, ONE, relay=1),
        message(DhcpKind.DISCOVER, "ff:ff:ff:ff:ff:ff"),
        message(DhcpKind.OFFER, ONE),
        message(DhcpKind.DISCOVER, ONE)[:-1] + bytes([Option.REQUESTED, 200, 1]),
        message(DhcpKind.REQUEST, ONE, (Option.REQUESTED, b"\1\2")),
    ],
)
def test_what_is_no_question_is_not_answered(data: bytes) -> None:
    server = DhcpServer(plan())
    assert server.answer(data, 0.0) is None
    assert server.leases(0.0) == []


@given(st.lists(st.tuples(st.binary(max_size=400), st.binary(max_size=60)), max_size=30))
def test_whatever_guests_send_the_tables_stay_bounded(given_data: list[tuple[bytes, bytes]]) -> None:
    server = DhcpServer(plan())
    now = 0.0
    for raw, options in given_data:
        server.answer(raw, now)
        head = message(DhcpKind.REQUEST, f"52:54:00:00:{len(options) % 256:02x}:{now % 256:02.0f}")
        server.answer(head[:-1] + options, now)
        now += 1
        assert len(server.leases(now)) <= 2
        assert len({lease.address for lease in server.leases(now)}) == len(server.leases(now))


def test_plans_that_do_not_fit_are_refused() -> None:
    for wrong in (
        {"start": ipaddress.IPv4Address("10.0.0.1")},
        {"end": ipaddress.IPv4Address("192.168.150.9")},
        {"hosts": {ONE: ("10.0.0.1", "")}},
        {"hosts": {ONE: ("192.168.150.7", ""), TWO: ("192.168.150.7", "")}},
    ):
        with pytest.raises(ConfigError, match="dhcp"):
            plan(**wrong)


def test_a_plan_goes_through_its_file() -> None:
    whole = plan(hosts={ONE: ("192.168.150.7", "one")}, domain="d", mtu=1400, seconds=120)
    assert plan_from(plan_values(whole)) == whole
    with pytest.raises(ConfigError):
        plan_from({})


def test_changes_are_told_once_and_the_file_stays_short(tmp_path: Path) -> None:
    server, file = DhcpServer(plan(seconds=100)), LeaseFile(tmp_path / "n.leases")

    def request(mac: str, asked: str, now: float) -> None:
        server.answer(message(DhcpKind.REQUEST, mac, (Option.REQUESTED, address(asked))), now)

    request(ONE, "192.168.150.10", 1000.0)
    (lease,) = server.take_changes()
    assert (lease.mac, lease.address, lease.expires) == (ONE, "192.168.150.10", 1100.0)
    request(ONE, "192.168.150.10", 1000.5)
    assert server.take_changes() == []  # asked again within the second
    for second in range(3 * LeaseFile.SHORTEST):
        request(ONE, "192.168.150.10", 1001.0 + second)
        changes = server.take_changes()
        assert len(changes) == 1
        file.record(changes, lambda now=1001.0 + second: server.leases(now))  # type: ignore[misc]
        (told,) = read_leases(tmp_path / "n.leases")
        assert told == changes[0]
        assert len((tmp_path / "n.leases").read_text().splitlines()) <= LeaseFile.SHORTEST + 1
    server.answer(message(DhcpKind.RELEASE, ONE, current="192.168.150.10"), 2000.0)
    file.record(server.take_changes(), lambda: server.leases(2000.0))
    assert [lease.expires for lease in read_leases(tmp_path / "n.leases")] == [0.0]
    with (tmp_path / "n.leases").open("a") as torn:
        torn.write('{"mac": "52:54:00:00:00:02", "addr')
    assert [lease.mac for lease in read_leases(tmp_path / "n.leases")] == [ONE]


def test_what_cannot_be_recorded_is_written_whole_the_next_time(tmp_path: Path) -> None:
    path, server = tmp_path / "away" / "n.leases", DhcpServer(plan())
    file = LeaseFile(path)
    server.answer(message(DhcpKind.REQUEST, ONE, (Option.REQUESTED, address("192.168.150.10"))), 1000.0)
    with pytest.raises(HostError):
        file.record(server.take_changes(), lambda: server.leases(1000.0))
    path.parent.mkdir()
    server.answer(message(DhcpKind.REQUEST, TWO, (Option.REQUESTED, address("192.168.150.11"))), 1000.0)
    file.record(server.take_changes(), lambda: server.leases(1000.0))
    assert {lease.mac for lease in read_leases(path)} == {ONE, TWO}
