"""A guest that tries everything against its network's policy: what the other end of the host's cable sees is what is
allowed, and nothing else."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import struct
import sys
from pathlib import Path

import pytest

import vmm
from tests.support import linuximage, netns, passt
from tests.support.debian import PATIENCE
from tests.support.guestprograms import static
from tests.support.passt import FAR
from tests.unit.virtio.test_policed import question, tcp, udp
from virtio.backends.packets import checksum
from vmm.config import Net

pytestmark = [pytest.mark.debian, pytest.mark.root]
SECONDS = 240 * PATIENCE
sh = functools.partial(linuximage.sh, seconds=SECONDS)
OTHER = "10.214.7.2"
FAR_6, OTHER_6 = "fd00:7::3", "fd00:7::2"
SNIFFER = """
import socket, sys
heard = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("ready", flush=True)
while True:
    print(heard.recv(65536).hex(), flush=True)
"""


def packet(target: str, source: str, protocol: int, data: bytes, flags: int = 0, options: bytes = b"") -> bytes:
    to, by = ipaddress.ip_address(target), ipaddress.ip_address(source)
    if to.version == 4:
        size = 20 + len(options)
        head = struct.pack(">BBHHHBBH4s4s", 0x40 | size // 4, 0, size + len(data), 1, flags, 64, protocol, 0,
                           by.packed, to.packed) + options  # fmt: skip
        return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + data
    return struct.pack(">IHBB16s16s", 6 << 28, len(data), protocol, 64, by.packed, to.packed) + data


def summed(target: str, source: str, protocol: int, data: bytes) -> bytes:
    """With the checksum of TCP, UDP or ICMP."""
    to, by = ipaddress.ip_address(target), ipaddress.ip_address(source)
    at = {6: 16, 17: 6, 58: 2, 1: 2}[protocol]
    pseudo = b"" if protocol == 1 else by.packed + to.packed + struct.pack(">II", len(data), protocol)
    return data[:at] + checksum(pseudo + data).to_bytes(2, "big") + data[at + 2 :]


def attempts(mac: bytes, gateway: bytes, own: str, own_6: str) -> list[bytes]:
    """Frames, none of which may have any effect outside."""
    v4, v6, vlan = b"\x08\0", b"\x86\xdd", b"\x81\0\0\5"

    def frame(target: str, protocol: int, data: bytes, source: str = "", sender: bytes = mac, tag: bytes = b"",
              flags: int = 0, options: bytes = b"") -> bytes:  # fmt: skip
        six = ":" in target
        by = source or (own_6 if six else own)
        body = packet(target, by, protocol, summed(target, by, protocol, data) if protocol in (1, 6, 17, 58) else data,
                      flags, options)  # fmt: skip
        return gateway + sender + tag + (v6 if six else v4) + body

    ask = question("secret.tunnel.example")
    length = struct.pack(">H", len(ask))
    echo = b"\x08\0\0\0\0\1\0\1" + b"ping" * 8
    found = [
        # other ports, literal addresses, both protocols
        frame(FAR, 6, tcp(11)), frame(FAR, 6, tcp(80)), frame(FAR, 17, udp(10)), frame(OTHER, 17, udp(9)),
        frame(OTHER, 6, tcp(9)), frame(FAR_6, 17, udp(10)), frame(OTHER_6, 17, udp(9)), frame(OTHER_6, 6, tcp(9)),
        # name servers: others, by TCP, over TLS, multicast, IPv6, what is no plain question
        frame(OTHER, 17, udp(53, ask)), frame(FAR, 17, udp(53, ask)), frame(OTHER_6, 17, udp(53, ask)),
        frame(OTHER, 6, tcp(53)), frame(FAR, 6, tcp(53)[:13] + b"\x18" + tcp(53)[14:] + length + ask),
        frame(OTHER, 6, tcp(853)), frame(OTHER, 17, udp(853)), frame(OTHER, 17, udp(5353, ask)),
        frame("224.0.0.251", 17, udp(5353, ask)), frame("ff02::fb", 17, udp(5353, ask)),
        frame(OTHER, 17, udp(53, b"tunnel" * 100)),
        # ICMP, redirects, other protocols
        frame(FAR, 1, echo), frame(OTHER, 1, echo), frame(OTHER_6, 58, b"\x80" + echo[1:]),
        frame(OTHER, 1, b"\5\1\0\0" + bytes(28)), frame(OTHER_6, 58, b"\x89\0\0\0" + bytes(36)),
        frame(OTHER, 47, b"gre" * 20), frame(FAR, 132, b"sctp" * 10), frame(OTHER, 4, packet(OTHER, own, 17, udp(9))),
        # fragments, options, extension headers, lengths that lie
        frame(FAR, 17, udp(9, b"first"), flags=0x2000), frame(FAR, 17, b"the rest", flags=1),
        frame(OTHER, 17, udp(9), flags=0x2000), frame(FAR, 17, udp(9), options=b"\x83\7\4" + bytes(4) + b"\0"),
        frame(FAR_6, 44, b"\x11\0\0\1" + bytes(4) + udp(9)), frame(FAR_6, 0, b"\x11\0\5\2\0\0\0\0" + udp(9)),
        frame(FAR_6, 43, b"\x11\2\0\1" + bytes(20) + udp(9)), frame(FAR, 17, udp(9))[:30],
        # VLAN tags, one and two
        frame(FAR, 17, udp(9), tag=vlan), frame(FAR, 17, udp(9), tag=vlan + vlan),
        frame(FAR, 17, udp(9), tag=b"\x88\xa8\0\5"),
        # who it is not
        frame(FAR, 17, udp(9), sender=bytes.fromhex("020000000099")), frame(FAR, 17, udp(9), source="10.214.7.77"),
        frame(FAR, 17, udp(9), source=OTHER), frame(FAR, 17, udp(9), sender=gateway),
        *(frame(FAR_6, 17, udp(port, b"spoofed"), source=source) for port in (9, 10)
          for source in (OTHER_6, FAR_6, "fd00:7::77", "2001:db8::1", "ff02::1", "::1", "::ffff:10.214.7.2")),
        # this host's own addresses, and what stands for them
        *(frame(target, 17, udp(port)) for target in ("127.0.0.1", "0.0.0.0", "::1", "::ffff:127.0.0.1", "fd00:7::1")
          for port in (9, 99)),
        # ARP, reverse ARP and neighbour advertisements of others
        b"\xff" * 6 + mac + b"\x08\6\0\1\x08\0\6\4\0\2" + mac + ipaddress.ip_address(OTHER).packed + bytes(10),
        b"\xff" * 6 + mac + b"\x08\6\0\1\x08\0\6\4\0\2" + gateway + ipaddress.ip_address(own).packed + bytes(10),
        b"\xff" * 6 + mac + b"\x80\x35\0\1\x08\0\6\4\0\3" + mac + bytes(4) + mac + bytes(4),
        frame(OTHER_6, 58, b"\x88\0\0\0\x60\0\0\0" + ipaddress.ip_address(OTHER_6).packed + b"\2\1" + gateway),
        # and what is no packet at all
        *(gateway + mac + kind + bytes(46) for kind in (b"\x88\xcc", b"\x08\0", b"\0\x2e")),
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("given", ["from the start", "while it runs"])
async def test_only_what_is_allowed_gets_out(stock_core: str, tmp_path: Path, given: str) -> None:
    netns.need("passt")
    passt.need()
    program = static("sendframes")
    linuximage.need()
    with passt.networks(tmp_path) as (near, far):
        near.ip("addr", "add", "fd00:7::1/64", "dev", "eth0", "nodad")
        near.ip("route", "add", "default", "via", OTHER_6)
        for address in (OTHER_6, FAR_6):
            far.ip("addr", "add", f"{address}/64", "dev", "eth0", "nodad")
        sniffer = await asyncio.create_subprocess_exec(
            *far.command(sys.executable, "-c", SNIFFER), stdout=asyncio.subprocess.PIPE, limit=1 << 20
        )
        assert sniffer.stdout is not None
        try:
            assert await sniffer.stdout.readline() == b"ready\n"
            policy = {"allow": f"{FAR}:9+[{FAR_6}]:9+example.test:9", "dns": "none"}
            net = Net(kind="user").replace(**(policy if given == "from the start" else {}))
            async with vmm.run("linux", core=stock_core, nets=(net,), timeout=SECONDS) as vm:
                await sh(vm, "until ip route | grep -q default; do sleep 0.1; done")
                mac = bytes.fromhex((await sh(vm, "cat /sys/class/net/eth0/address")).strip().replace(":", ""))
                own = (await sh(vm, "ip -4 addr show eth0 | sed -n 's,.*inet \\([^/]*\\)/.*,\\1,p'")).split()[0]
                # passt answers ARP for every address
                await sh(vm, f"ping -c 1 -W 1 {OTHER} >/dev/null; true")
                gateway = (await sh(vm, f"ip neigh show {OTHER} | sed 's/.*lladdr \\([^ ]*\\).*/\\1/'")).strip()
                peer = bytes.fromhex(gateway.replace(":", ""))
                await vm.copy_in(program, "/tmp/sendframes")
                await sh(vm, "chmod +x /tmp/sendframes")
                if given == "while it runs":
                    await vm.set(nets={"net0": policy})
                tries = attempts(mac, peer, own, "fd00:7::1")
                begin, good = (
                    peer + mac + b"\x08\0" + packet(FAR, own, 17, summed(FAR, own, 17, udp(9, text)))
                    for text in (b"the beginning", b"the end")
                )
                text = "\n".join(frame.hex() for frame in [begin, *tries, good]) + "\n"
                (tmp_path / "frames").write_text(text)
                await vm.copy_in(tmp_path / "frames", "/tmp/frames")
                await sh(vm, "/tmp/sendframes eth0 </tmp/frames")
                seen: list[bytes] = []
                async with asyncio.timeout(SECONDS):
                    # IPv6 looks for its neighbour first, and its packets may come after the end
                    while not all(any(text in frame for frame in seen) for text in (b"the end", b"spoofed")):
                        seen.append(bytes.fromhex((await sniffer.stdout.readline()).decode()))
                        if b"the beginning" in seen[-1]:
                            del seen[:-1]
                (facts,) = [one["policy"]["refused"] for one in vm.attached() if one["kind"] == "net"]
        finally:
            sniffer.kill()
            await sniffer.wait()
    near_v6, allowed_v6 = ipaddress.ip_address("fd00:7::1").packed, ipaddress.ip_address(FAR_6).packed
    near_v4 = ipaddress.ip_address("10.214.7.1").packed
    packets = [frame[14:] for frame in seen if frame[12:14] == b"\x08\0" and frame[26:30] == near_v4]
    allowed = ipaddress.ip_address(FAR).packed
    assert packets and all((one[9], one[16:20]) == (17, allowed) for one in packets), packets
    assert {one[22:24] for one in packets} == {b"\0\x09"}
    # what has the address of nobody, or of another, and goes where it may, goes as this host's
    six = [frame[14:] for frame in seen if frame[12:14] == b"\x86\xdd" and frame[20] in (6, 17)]
    assert all((one[8:24], one[24:40], one[42:44]) == (near_v6, allowed_v6, b"\0\x09") for one in six), six
    assert not any(b"tunnel" in frame for frame in seen)
    hardware, ours = "a frame with another hardware address", "a packet from another address"
    others = {"a fragment of a packet", "an ARP packet with another address", "a frame of type 0x8100"}
    assert {hardware, ours, "destination", "name", *others} <= set(facts), facts
    assert sum(facts.values()) >= len(tries) - 12, facts
