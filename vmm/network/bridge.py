"""Bridges of the host and what is allowed through them, by the programs `ip` (iproute2) and `nft` (nftables).

Everything here may be done again and ends in the same: a daemon that was killed half-way puts right what it finds.
Loop thread; each call waits for a program, which has PROGRAM_SECONDS.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import ConfigError, HostError, os_reason

NET = Path("/sys/class/net")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
PROGRAM_SECONDS = 15.0
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
"""Of an interface: 15 characters (IFNAMSIZ - 1)."""
PACKAGES = {"ip": "iproute2", "nft": "nftables"}


@dataclass(frozen=True)
class Bridge:
    """One bridge as it should be."""

    name: str
    identity: uuid.UUID
    """Of its network: what is its on this host has this in its name."""
    mac: str
    forward: str
    """nat, route, open (nothing is filtered), or "" for a bridge that is cut off from other networks."""
    address: ipaddress.IPv4Interface | None = None
    stp: bool = True
    delay: int = 0
    """Forwarding delay of the spanning tree, seconds."""
    mtu: int = 0

    @property
    def table(self) -> str:
        """Of its rules."""
        return f"loopvisor_{self.identity.hex[:16]}"


def program(name: str, why: str) -> str:
    """The path of a program. Raises ConfigError that says where to get it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise ConfigError(f"{why} needs {name}, which is not installed (apt install {PACKAGES[name]})")
    return found


async def run(*command: str, text: str = "") -> str:
    """A program's output. Raises HostError with what it says."""
    try:
        done = await asyncio.to_thread(
            subprocess.run, command, input=text.encode(), capture_output=True, timeout=PROGRAM_SECONDS, check=False
        )
    except OSError as error:
        raise HostError(f"{command[0]}: {os_reason(error)}") from error
    except subprocess.TimeoutExpired:
        raise HostError(f"{' '.join(command)}: not done within {PROGRAM_SECONDS:g} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = (said[0] if said else f"status {done.returncode}").removeprefix("RTNETLINK answers: ")
        if "not permitted" in reason:
            reason += "; it needs root (CAP_NET_ADMIN), and the network 'default' does without"
        raise HostError(f"{Path(command[0]).name} {' '.join(command[1:])}: {reason}")
    return done.stdout.decode(errors="replace")


def is_bridge(name: str) -> bool:
    """Whether the host has a bridge of that name."""
    return (NET / name / "bridge").is_dir()


async def up(bridge: Bridge) -> None:
    """Make it, or make it right. Raises ConfigError, HostError."""
    ip = program("ip", "a bridge")
    if not is_bridge(bridge.name):
        if bridge.address is not None:
            await refuse_overlap(bridge.name, bridge.address.network)
        await run(ip, "link", "add", bridge.name, "address", bridge.mac, "type", "bridge")
    stp, delay = str(int(bridge.stp)), str(max(bridge.delay * 100, 200) if bridge.stp else 0)
    await run(ip, "link", "set", bridge.name, "type", "bridge", "stp_state", stp, "forward_delay", delay)
    if bridge.mtu:
        await run(ip, "link", "set", bridge.name, "mtu", str(bridge.mtu))
    if bridge.address is not None:
        await run(ip, "addr", "replace", str(bridge.address), "broadcast", "+", "dev", bridge.name)
    await run(ip, "link", "set", bridge.name, "up")
    if bridge.forward in ("nat", "route", "open"):
        try:
            FORWARDING.write_text("1\n")
        except OSError as error:
            raise HostError(f"{FORWARDING}: {os_reason(error)}") from error
    if bridge.forward != "open":
        await run(program("nft", "a network that is translated or cut off"), "-f", "-", text=rules(bridge))


async def down(bridge: Bridge) -> None:
    """Remove it with its rules; what is not there is no mistake. Raises ConfigError, HostError."""
    if bridge.forward != "open":
        nft = program("nft", "a network that is translated or cut off")
        await run(nft, "-f", "-", text=f"table inet {bridge.table} {{}}\ndelete table inet {bridge.table}\n")
    if is_bridge(bridge.name):
        await run(program("ip", "a bridge"), "link", "del", bridge.name)


def rules(bridge: Bridge) -> str:
    """What nft is given, as one transaction: the bridge's table anew."""
    name, here = f'"{bridge.name}"', bridge.address.network if bridge.address is not None else None
    lines = [
        f"iifname {name} oifname {name} accept",
        *({"nat": [f"oifname {name} ip daddr {here} ct state established,related accept"],
           "route": [f"oifname {name} ip daddr {here} accept"]}.get(bridge.forward, [])),
        *([f"iifname {name} ip saddr {here} accept"] if bridge.forward and here is not None else []),
        f"oifname {name} reject",
        f"iifname {name} reject",
    ]  # fmt: skip
    chains = ["chain forward {", "type filter hook forward priority filter; policy accept;", *lines, "}"]
    if bridge.forward == "nat":
        chains += [
            "chain nat {",
            "type nat hook postrouting priority srcnat; policy accept;",
            f"ip saddr {here} ip daddr {{ 224.0.0.0/24, 255.255.255.255 }} return",
            f"ip saddr {here} ip daddr != {here} masquerade",
            "}",
        ]
    table = f"table inet {bridge.table}"
    return "\n".join([f"{table} {{}}", f"delete {table}", f"{table} {{", *chains, "}", ""])


async def refuse_overlap(name: str, network: ipaddress.IPv4Network) -> None:
    """Raises HostError if another interface's network is this one or a part of it."""
    listed = await run(program("ip", "a bridge"), "-j", "-4", "addr")
    for interface in json.loads(listed or "[]"):
        for info in interface.get("addr_info", ()):
            there = ipaddress.ip_network(f"{info['local']}/{info['prefixlen']}", strict=False)
            if interface.get("ifname") != name and there.overlaps(network):
                raise HostError(f"network is already in use by interface {interface['ifname']} ({there})")


async def plug(tap: str, bridge: str, mtu: int = 0) -> None:
    """Make a machine's interface a port of a bridge. Raises HostError."""
    if not is_bridge(bridge):
        raise HostError(f"{bridge}: there is no such bridge on this host")
    size = ("mtu", str(mtu)) if mtu else ()
    await run(program("ip", "a bridge"), "link", "set", tap, "master", bridge, *size, "up")
