"""What domains have used and moved so far: processor time, memory, disks, interfaces; one by one or in bulk."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

from vmm.convert import KIB
from vmm.errors import VmmError
from vmm.libvirt import host
from vmm.libvirt.domain import Domain
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.live import balloon_of
from vmm.libvirt.machines import ask
from vmm.libvirt.spec import disk_ids
from vmm.libvirt.wire import Param, int_param, string_param, uint_param, ullong_param

STATS_SECONDS = 2.0
"""How long a machine may take to tell its counters before bulk statistics leave them out."""
STATE, CPU, BALLOON, VCPU, INTERFACE, BLOCK = 1, 2, 4, 8, 16, 32
KNOWN = STATE | CPU | BALLOON | VCPU | INTERFACE | BLOCK
"""virDomainStatsTypes that are here."""
Counters = dict[str, Any]


class Sizes(NamedTuple):
    """Of a disk, in bytes: what its file takes on the host, what the guest sees, how long the file is."""

    allocation: int
    capacity: int
    physical: int


def disk_sizes(path: Path, capacity: int | None) -> Sizes:
    """Raises LibvirtError if the file is not there."""
    try:
        status = path.stat()
        size = status.st_size
        if path.is_block_device():
            with path.open("rb") as device:
                size = device.seek(0, 2)
            return Sizes(size, capacity or size, size)
    except OSError as error:
        raise LibvirtError(Code.OPERATION_FAILED, f"{path}: {error.strerror}") from error
    return Sizes(status.st_blocks * 512, size if capacity is None else capacity, size)


async def devices(domain: Domain, patience: float = 10.0) -> dict[str, list[Counters | None]]:
    """The counters of a running domain's disks and interfaces, in its description's order. Raises VmmError."""
    told = await ask(domain.running_entry(), "devices", patience)
    spec = domain.spec
    disks = {disk["id"]: disk for disk in told["disks"] if disk}
    nets = {net["mac"]: net for net in told["nets"] if net}
    others = iter(told["nets"])
    return {
        "disks": [disks.get(name) for name in disk_ids(spec.config)],
        "nets": [nets.get(net.mac.lower()) if net.mac else next(others, None) for net in spec.config.nets],
    }


def find_disk(domain: Domain, name: str) -> int:
    """The place of a disk by its target or its source. Raises LibvirtError."""
    for index, disk in enumerate(domain.spec.config.disks):
        if name in (domain.spec.disks[index].target, str(disk.path)):
            return index
    raise LibvirtError(Code.INVALID_ARG, f"invalid path: {name}")


def find_interface(domain: Domain, name: str, counters: list[Counters | None]) -> int:
    """The place of an interface by its host's name or its MAC. Raises LibvirtError."""
    for index, net in enumerate(domain.spec.config.nets):
        found = counters[index] if index < len(counters) else None
        if name and name in (net.target, net.mac, f"net{index}", found and found.get("mac")):
            return index
    raise LibvirtError(Code.INVALID_ARG, f"'{name}' is not a known interface")


async def bulk(domain: Domain, groups: int) -> list[Param]:
    """The statistics of one domain, by groups. A machine that does not answer has none of its devices."""
    config = domain.spec.config
    params: list[Param] = []
    if groups & STATE:
        params += [int_param("state.state", int(domain.state)), int_param("state.reason", int(domain.reason))]
    user, system = host.process_times(domain.pid) if domain.active else (0, 0)
    if groups & CPU and domain.active:
        params += [
            ullong_param("cpu.time", user + system),
            ullong_param("cpu.user", user),
            ullong_param("cpu.system", system),
        ]
    if groups & BALLOON:
        balloon = await balloon_of(domain, STATS_SECONDS) if domain.active else None
        now = config.memory if balloon is None else int(balloon["actual"])
        params += [ullong_param("balloon.current", now // KIB), ullong_param("balloon.maximum", config.memory // KIB)]
        if domain.active:
            params.append(ullong_param("balloon.rss", host.resident(domain.pid)))
    if groups & VCPU:
        params += [uint_param("vcpu.current", config.cpus), uint_param("vcpu.maximum", config.most_cpus)]
        for number in range(config.cpus if domain.active else 0):
            params.append(int_param(f"vcpu.{number}.state", 1))
            params.append(ullong_param(f"vcpu.{number}.time", (user + system) // config.cpus))
    if groups & (INTERFACE | BLOCK):
        told: dict[str, list[Counters | None]] = {}
        if domain.active and (config.disks or config.nets):
            try:
                told = await devices(domain, STATS_SECONDS)
            except VmmError:
                pass
        if groups & INTERFACE and domain.active:
            params += _interfaces(domain, told.get("nets", []))
        if groups & BLOCK:
            # Files may be slow to look at, on a network for instance.
            params += await asyncio.to_thread(_blocks, domain, told.get("disks", []))
    return params


def _interfaces(domain: Domain, counters: list[Counters | None]) -> list[Param]:
    nets = domain.spec.config.nets
    params = [uint_param("net.count", len(nets))]
    for index, net in enumerate(nets):
        found = (counters[index] if index < len(counters) else None) or {}
        params.append(string_param(f"net.{index}.name", net.target or f"net{index}"))
        for name, value in interface_counters(found).items():
            way, _, what = name.partition("_")
            short = {"packets": "pkts"}.get(what, what)
            params.append(ullong_param(f"net.{index}.{way}.{short}", value))
    return params


def interface_counters(found: Counters) -> dict[str, int]:
    """By libvirt's names: "rx" is what the guest received."""
    return {
        "rx_bytes": found.get("bytes_received", 0),
        "rx_packets": found.get("received", 0),
        "rx_errs": 0,
        "rx_drop": 0,
        "tx_bytes": found.get("bytes_sent", 0),
        "tx_packets": found.get("sent", 0),
        "tx_errs": 0,
        "tx_drop": found.get("dropped", 0),
    }


def _blocks(domain: Domain, counters: list[Counters | None]) -> list[Param]:
    disks = domain.spec.config.disks
    params = [uint_param("block.count", len(disks))]
    for index, disk in enumerate(disks):
        prefix = f"block.{index}."
        params.append(string_param(prefix + "name", domain.spec.disks[index].target))
        params.append(string_param(prefix + "path", str(disk.path)))
        found = counters[index] if index < len(counters) else None
        if found is not None:
            names = {"rd.reqs": "reads", "rd.bytes": "bytes_read", "wr.reqs": "writes", "wr.bytes": "bytes_written",
                     "fl.reqs": "flushes", "errors": "failures"}  # fmt: skip
            params += [ullong_param(prefix + name, found[key]) for name, key in names.items()]
        try:
            sizes = disk_sizes(disk.path, found["capacity"] if found is not None else None)
        except LibvirtError:
            continue
        params += [ullong_param(prefix + name, value) for name, value in sizes._asdict().items()]
    return params
