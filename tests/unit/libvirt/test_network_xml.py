"""Networks' definitions: XML in, XML out, and what is refused."""

from __future__ import annotations

import pytest

from vmm.libvirt.errors import LibvirtError
from vmm.libvirt.network_xml import (
    ADD_LAST,
    DELETE,
    MODIFY,
    SECTION_HOST,
    SECTION_RANGE,
    read_network,
    updated,
)

IP = (
    "<ip address='192.168.150.1' netmask='255.255.255.0'><dhcp><range start='192.168.150.2' end='192.168.150.254'/>"
    "<host mac='52:54:00:00:00:01' name='one' ip='192.168.150.5'/></dhcp></ip>"
)


def network(inside: str) -> str:
    return f"<network><name>n</name><uuid>f0023a47-741c-4aec-b31c-8dfcf146e6ef</uuid>{inside}</network>"


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "<forward mode='nat'/><bridge name='virbr7' stp='off' delay='0'/><mac address='52:54:00:00:00:09'/>" + IP,
        "<forward mode='route'/><mtu size='1400'/><domain name='a.test' localOnly='yes'/><dns enable='no'/>" + IP,
        "<forward mode='open'/><ip address='10.0.0.1' prefix='8'/>",
        "<forward mode='bridge'/><bridge name='br0'/>",
        "<title>t</title><metadata><x:y xmlns:x='urn:x'>z</x:y></metadata>" + IP,
    ],
)
def test_there_and_back(inside: str) -> None:
    first = read_network(network(inside))
    again = read_network(first.xml())
    assert again == first
    assert again.xml() == first.xml()


def test_what_virsh_users_write() -> None:
    """The file that libvirt brings as its own network."""
    spec = read_network(
        "<network><name>x</name><forward mode='nat'><nat><port start='1024' end='65535'/></nat></forward>"
        "<bridge name='virbr%d' stp='on' delay='0'/>" + IP + "</network>"
    )
    assert (spec.mode, spec.bridge, spec.dhcp, spec.names) == ("nat", "", True, True)
    plan = spec.plan()
    assert plan is not None
    assert plan.router
    assert plan.name_server


def test_who_is_cut_off_asks_nobody_for_names() -> None:
    plan = read_network(network(IP)).plan()
    assert plan is not None
    assert not plan.router
    assert not plan.name_server
    assert read_network(network("<ip address='10.0.0.1' prefix='8'/>")).plan() is None


@pytest.mark.parametrize(
    ("inside", "names"),
    [
        ("<forward mode='hostdev'/>", "hostdev"),
        ("<forward mode='nat' dev='eth0'/>" + IP, "dev='eth0'"),
        ("<forward mode='nat'/>", "<ip> is missing"),
        ("<forward mode='bridge'/>", "bridge name"),
        ("<forward mode='bridge'/><bridge name='br0'/>" + IP, "leave <ip> out"),
        ("<bridge name='much-too-long-a-name'/>", "much-too-long"),
        ("<bridge name='a/b'/>", "a/b"),
        ("<virtualport type='openvswitch'/>", "virtualport"),
        ("<portgroup name='a'/>", "portgroup"),
        ("<bandwidth/>", "bandwidth"),
        ("<vlan><tag id='1'/></vlan>", "vlan"),
        ("<dns><host ip='10.0.0.1'/></dns>", "dns/host"),
        ("<ip family='ipv6' address='fd00::1' prefix='64'/>", "ipv6"),
        ("<ip address='10.0.0.1' prefix='31'/>", "at least four"),
        ("<ip address='10.0.0.1' prefix='24'/>" * 2, "one <ip>"),
        (IP.replace("<range start='192.168.150.2'", "<range start='10.0.0.1'"), "not in the network"),
        (IP.replace("150.5", "151.5"), "not in the network"),
        (IP.replace("ip='192.168.150.5'", "ip='x'"), "ip='x'"),
        (IP.replace("mac='52:54:00:00:00:01'", "mac='x'"), "mac='x'"),
        (IP.replace("name='one'", "name='o_ne;'"), "o_ne;"),
        ("<mac address='01:00:00:00:00:00'/>", "unicast"),
        ("<mtu size='9'/>", "68 to 65535"),
        ("<domain name='a b'/>", "a b"),
    ],
)
def test_what_is_not_here_is_refused_by_name(inside: str, names: str) -> None:
    with pytest.raises(LibvirtError) as refused:
        read_network(network(inside))
    assert names in str(refused.value)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "x" * 51, " "])
def test_names_are_files(name: str) -> None:
    with pytest.raises(LibvirtError):
        read_network(f"<network><name>{name}</name></network>")


def test_hosts_and_the_range_change_piece_by_piece() -> None:
    spec = read_network(network(IP))
    two = "<host mac='52:54:00:00:00:02' ip='192.168.150.6'/>"
    more = updated(spec, ADD_LAST, SECTION_HOST, two)
    assert [host.address for host in more.hosts] == ["192.168.150.5", "192.168.150.6"]
    with pytest.raises(LibvirtError, match="existing"):
        updated(more, ADD_LAST, SECTION_HOST, two)
    moved = updated(more, MODIFY, SECTION_HOST, two.replace("150.6", "150.7"))
    assert moved.hosts[1].address == "192.168.150.7"
    assert len(updated(moved, DELETE, SECTION_HOST, two).hosts) == 1
    with pytest.raises(LibvirtError, match="couldn't locate"):
        updated(spec, DELETE, SECTION_HOST, two)
    with pytest.raises(LibvirtError, match="not in the network"):
        updated(spec, ADD_LAST, SECTION_HOST, two.replace("192.168", "10.0"))
    span = "<range start='192.168.150.2' end='192.168.150.254'/>"
    assert updated(spec, DELETE, SECTION_RANGE, span).ranges == ()
    with pytest.raises(LibvirtError, match="ip-dhcp-host"):
        updated(spec, ADD_LAST, 9, "<x/>")
